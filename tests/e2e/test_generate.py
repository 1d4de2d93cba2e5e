"""The command as a user starts it, in a process of its own, with nothing but what it needs."""

import os
import subprocess
import sys

from PIL import Image

from dalle_torch.pipeline.output import read_metadata
from tests.tiny_pipeline import save_tiny, tiny_pipeline

TRACED = """
import sys
from dalle_torch.cli.main import main
status = main(sys.argv[1:])
unused = ("torch_xla", "torchvision", "torch._inductor", "pytorch_lightning", "omegaconf", "wandb", "scipy", "pandas")
print([name for name in unused if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""


def test_a_prompt_becomes_a_picture(tmp_path):
    model = save_tiny(tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name != "USE_TORCH_XLA"}
    done = subprocess.run(
        [sys.executable, "-c", TRACED, "generate", "a cat", "--prompts-file", "-", "--model", str(model),
         "--num-images", "2", "--seed", "3", "--output", str(tmp_path / "out"), "--device", "cpu"],
        input="a dog\n", capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n", "nothing is said, and nothing loaded that is not used"
    names = "a-cat-3.png, a-cat-4.png, a-dog-3.png, a-dog-4.png, grid.png"
    assert done.stdout == f"4 pictures in {tmp_path / 'out'}/: {names}\n"
    expected = tiny_pipeline()(["a cat", "a dog"], num_images=2, seed=3, progress=False)
    for prompt, seed, image in zip(expected.prompts, expected.seeds, expected.images, strict=True):
        path = tmp_path / "out" / f"{prompt.replace(' ', '-')}-{seed}.png"
        with Image.open(path) as written:
            assert written.tobytes() == image.tobytes()
        assert read_metadata(path)["prompt"] == prompt
