"""Inception and open_clip through the loading code that real weights take, on weights made here."""

import pytest
import torch
from PIL import Image

from dalle_torch.evaluation import features
from dalle_torch.evaluation.loading import load_features, load_scorer
from dalle_torch.evaluation.open_clip import OpenClipScorer

IMAGES = [Image.effect_noise((40 + 8 * n, 64), 90).convert("RGB") for n in range(3)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torch-fidelity's own, with random numbers."""
    network = features._network_class()
    path = tmp_path_factory.mktemp("inception") / features.WEIGHTS_FILE
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = {}
        patch.setattr(network, "load_state_dict", lambda self, state: found.update(super(network, self).state_dict()))
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        network("x", ["2048"])
    torch.save(found, path)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Thirty-two pictures of 299 x 299 a chunk would only take time."""
    monkeypatch.setattr(features, "CHUNK", 4)


def test_features_are_those_of_the_network_on_resized_pictures(weights):
    extractor = load_features(weights)
    found = extractor.features(IMAGES)
    assert found.shape == (3, 2048) and found.dtype == torch.float32
    resized = [image.resize((299, 299), Image.Resampling.BICUBIC) for image in IMAGES]
    pixels = torch.stack([features._pixels(image) for image in resized])
    expected = extractor._network(pixels)[0]
    # A batch of another size rounds differently.
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert (extractor.features(IMAGES[2:]) == found[2:]).all()


def test_the_judge_names_its_resize_and_whether_it_is_the_standard(weights):
    judge = load_features(weights).judge
    assert judge.settings["resampling"] == "Pillow bicubic, antialiased, to 299 x 299 bytes"
    assert judge.standard is False and judge.name == "inception-v3"


def test_weights_in_torchs_cache_are_found_by_name(weights, monkeypatch):
    folder = weights.parent / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / features.WEIGHTS_FILE).write_bytes(weights.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder.parent))
    assert load_features("inception").features(IMAGES[:1]).shape == (1, 2048)


def test_without_network_it_is_said_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "WEIGHTS_URL", "http://127.0.0.1:9/" + features.WEIGHTS_FILE)
    with pytest.raises(OSError, match="fetch http://127.0.0.1:9/weights-inception") as error:
        load_features("inception")
    assert str(tmp_path / "checkpoints") in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused_and_never_unpickled(tmp_path):
    with pytest.raises(OSError, match="is not there"):
        load_features(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold Inception's weights"):
        load_features(tmp_path / "other.pth")
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="does not hold Inception's weights"):
        load_features(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


class TinyTowers(torch.nn.Module):
    """What open_clip's models offer."""

    def __init__(self):
        super().__init__()
        self.text = torch.nn.Embedding(300, 8)

    def encode_text(self, ids):
        return self.text(ids).mean(1)

    def encode_image(self, pixels):
        return pixels.flatten(1)[:, :8]


def test_models_of_open_clip_score_by_their_cosine():
    from dalle_torch.evaluation.base import Judge

    torch.manual_seed(0)
    model = TinyTowers()
    tokenize = lambda texts: torch.tensor([[ord(text[0]), ord(text[-1])] for text in texts])  # noqa: E731
    preprocess = lambda image: torch.tensor(list(image.resize((2, 4)).tobytes())).float()  # noqa: E731
    scorer = OpenClipScorer(model, preprocess, tokenize, Judge(name="x", source="x", sha256=None, standard=False))
    prompts = ["cat", "dog", "sun"]
    with torch.no_grad():
        texts = model.encode_text(tokenize(prompts))
        pictures = torch.stack([preprocess(image)[:8] for image in IMAGES])
    expected = torch.nn.functional.cosine_similarity(pictures, texts)
    assert scorer.score(IMAGES, prompts) == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_real_architecture_of_open_clip_loads_from_a_file(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    name = "RN50"
    try:
        model = open_clip.create_model(name)
    except Exception as error:  # pragma: no cover
        pytest.fail(f"open_clip cannot make {name}: {error}")
    path = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    scorer = load_scorer(f"open_clip:{name}:{path}", filled=False)
    with torch.no_grad():
        text = model.eval().encode_text(open_clip.get_tokenizer(name)(["a cat"]))
    assert torch.allclose(scorer.text_features(["a cat"]), torch.nn.functional.normalize(text, dim=-1), atol=1e-5)
    with pytest.raises(ValueError, match="no architecture 'ViT-X'"):
        load_scorer("open_clip:ViT-X:file")
    with pytest.raises(OSError, match="no file of weights"):
        load_scorer(f"open_clip:{name}:{tmp_path}/none")
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"no weights of {name}"):
        load_scorer(f"open_clip:{name}:{path}")
