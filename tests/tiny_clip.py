"""A CLIP model of transformers with random weights that takes 16 x 16 pixels in milliseconds."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tests.tiny_pipeline import tiny_processor


def tiny_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """Always the same."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 300, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(do_resize=True, size=size, do_center_crop=False)
    return model, CLIPProcessor(images, tiny_processor().tokenizer)


def save_tiny_clip(folder: Path) -> Path:
    """The same as a folder that `from_pretrained` reads."""
    for part in tiny_clip():
        part.save_pretrained(folder)
    return folder
