"""`dalle-torch generate` with a small random model: files, names, metadata, where prompts come from."""

import io
import shutil
import sys

import pytest
from PIL import Image

from dalle_torch.cli.generate import writable_folder
from dalle_torch.cli.main import main
from dalle_torch.pipeline.output import read_metadata
from dalle_torch.studies.prompts import read_prompts
from tests.tiny_pipeline import save_tiny, tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def generate(model, output, *arguments):
    return main(["generate", "--model", model, "--output", str(output), "--device", "cpu", *arguments])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_pictures_and_grid_with_everything_in_their_metadata(model, tmp_path, capsys):
    options = ["--num-images", "2", "--seed", "5", "--condition-scale", "3", "--temperature", "2", "--top-k", "7",
               "--top-p", "0.9", "--batch-size", "3", "--dtype", "float32"]  # fmt: skip
    assert generate(model, tmp_path, "a red cat", "a dog", *options) == 0
    files = ["a-dog-5.png", "a-dog-6.png", "a-red-cat-5.png", "a-red-cat-6.png", "grid.png"]
    assert names(tmp_path) == files
    captured = capsys.readouterr()
    assert captured.out.startswith(f"4 pictures in {tmp_path}")
    assert captured.err == "", "no bar where stderr is no terminal"
    about = read_metadata(tmp_path / "a-dog-6.png")
    expected = {"prompt": "a dog", "seed": 6, "condition_scale": 3.0, "temperature": 2.0, "top_k": 7, "top_p": 0.9,
                "model": model, "dtype": "float32", "device": "cpu"}  # fmt: skip
    assert {key: about[key] for key in expected} == expected
    assert about["model_hash"].startswith("sha256:")
    assert read_metadata(tmp_path / "grid.png")["prompts"] == ["a red cat", "a dog"]
    drawn = tiny_pipeline()(["a red cat", "a dog"], num_images=2, seed=5, condition_scale=3, temperature=2, top_k=7,
                            top_p=0.9, progress=False)  # fmt: skip
    for name, image in zip(["a-red-cat-5", "a-red-cat-6", "a-dog-5", "a-dog-6"], drawn.images, strict=True):
        with Image.open(tmp_path / f"{name}.png") as written:
            assert written.tobytes() == image.tobytes()
    # The settings of one picture draw it again.
    settings = {key: about[key] for key in ("seed", "condition_scale", "temperature", "top_k", "top_p")}
    redrawn = tiny_pipeline()(about["prompt"], progress=False, **settings)
    assert redrawn.images[0].tobytes() == drawn.images[3].tobytes()


def test_nothing_is_replaced_unless_told(model, tmp_path):
    for _ in range(2):
        generate(model, tmp_path, "a")
    assert names(tmp_path) == ["a-0-2.png", "a-0.png"]
    generate(model, tmp_path, "a", "--overwrite")
    assert names(tmp_path) == ["a-0-2.png", "a-0.png"]


def test_prompts_from_file_and_stdin(model, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\ufeffa bär\n\n  two words \r\n", encoding="utf-8")
    found = read_prompts(["first", ""], str(tmp_path / "prompts.txt"))
    assert [request.prompt for request in found] == ["first", "", "a bär", "two words"]
    stdin = io.TextIOWrapper(io.BytesIO(b"from stdin\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate(model, tmp_path / "out", "--prompts-file", "-") == 0
    assert names(tmp_path / "out") == ["from-stdin-0.png"]


def test_a_picture_is_continued(model, tmp_path):
    generate(model, tmp_path, "a")
    arguments = ["--init-image", str(tmp_path / "a-0.png"), "--keep-rows", "3"]
    assert generate(model, tmp_path / "out", "b", *arguments) == 0
    about = read_metadata(tmp_path / "out" / "b-0.png")
    assert (about["given_codes"], about["init_image"]) == (12, "a-0.png")


def test_a_tiled_picture(model, tmp_path):
    assert generate(model, tmp_path, "a", "--tile", "1x3") == 0
    with Image.open(tmp_path / "a-0.png") as image:
        assert image.size == (32, 16)
    assert read_metadata(tmp_path / "a-0.png")["tile"] == [1, 3]


def test_weights_in_8_bits(model, tmp_path):
    assert generate(model, tmp_path, "a", "--quantize", "int8") == 0
    assert read_metadata(tmp_path / "a-0.png")["quantize"] == "int8"


def test_temperature_zero_is_greedy(model, tmp_path):
    assert generate(model, tmp_path, "a", "--temperature", "0", "--num-images", "2") == 0
    with Image.open(tmp_path / "a-0.png") as first, Image.open(tmp_path / "a-1.png") as second:
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("prompt", ["", "x " * 5000, "bell \x07, escape \x1b[31m, half a pair \ud800, newline \n."])
def test_odd_prompts_are_drawn(model, tmp_path, prompt):
    assert generate(model, tmp_path, prompt) == 0
    (path,) = tmp_path.iterdir()
    assert len(path.name) < 100
    assert path.name.isprintable()
    assert read_metadata(path)["prompt"] == prompt


def test_ctrl_c_leaves_no_half_written_file(model, tmp_path, monkeypatch, capsys):
    from dalle_torch.models.dalle_bart import DalleBart

    def interrupted(*args, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(DalleBart, "generate_stream", interrupted)
    assert generate(model, tmp_path / "out" / "deep", "a") == 130
    assert names(tmp_path) == []
    assert capsys.readouterr().err == "dalle-torch: interrupted\n"


def test_a_folder_that_was_made_goes_again_only_if_it_is_empty(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError), writable_folder(str(tmp_path / "old")):
        raise RuntimeError
    with pytest.raises(RuntimeError), writable_folder(str(tmp_path / "new")) as folder:
        (folder / "kept").touch()
        raise RuntimeError
    with pytest.raises(RuntimeError), writable_folder(str(tmp_path / "gone")):
        raise RuntimeError
    assert names(tmp_path) == ["new", "old"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-images", "0"], "num_images=0"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--seed", "-1", "--batch-size", "0"], "seed=-1"),
        (["--tile", "2x2", "--temperature", "-1"], "temperature=-1.0"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(monkeypatch, tmp_path, capsys, arguments, words):
    def load(*args, **kwargs):
        pytest.fail("the model was loaded first")

    monkeypatch.setattr("dalle_torch.cli.generate.load_pipeline", load)
    assert main(["generate", "a", "--output", str(tmp_path / "out"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_revision_of_a_folder_is_refused(model, tmp_path, capsys):
    assert generate(model, tmp_path, "a", "--revision", "v2") == 1
    assert "revision='v2' is for the hub" in capsys.readouterr().err


def test_a_model_may_lie_in_a_subfolder(model, tmp_path):
    shutil.copytree(model, tmp_path / "all" / "tiny")
    assert generate(str(tmp_path / "all"), tmp_path / "out", "a", "--subfolder", "tiny") == 0
    assert names(tmp_path / "out") == ["a-0.png"]


def test_many_prompts_of_a_file_make_a_gallery(model, tmp_path, capsys):
    (tmp_path / "prompts").write_text("".join(f"number {n}\n" for n in range(33)))
    arguments = ["--prompts", str(tmp_path / "prompts"), "--batch-size", "16"]
    assert generate(model, tmp_path / "out", *arguments) == 0
    assert names(tmp_path / "out") == ["gallery.html", "pictures", "results.jsonl"]
    assert len(names(tmp_path / "out" / "pictures")) == 33
    assert capsys.readouterr().out.startswith(f"33 pictures in {tmp_path / 'out'}/: results.jsonl, gallery.html")
    assert generate(model, tmp_path / "out", *arguments) == 0
    assert "33 of them drawn before" in capsys.readouterr().out


def test_prompts_of_a_file_may_have_seeds_of_their_own(model, tmp_path):
    (tmp_path / "prompts").write_text('{"prompt": "a", "seed": 7}\n{"prompt": "b"}\n')
    assert generate(model, tmp_path / "out", "--prompts", str(tmp_path / "prompts"), "--seed", "2") == 0
    assert names(tmp_path / "out") == ["a-7.png", "b-2.png", "grid.png"]
    (drawn,) = tiny_pipeline()("a", seed=7, progress=False).images
    with Image.open(tmp_path / "out" / "a-7.png") as image:
        assert image.tobytes() == drawn.tobytes()


def test_a_gallery_of_a_continued_picture_is_not_one_of_another(model, tmp_path, capsys):
    generate(model, tmp_path, "a", "b")
    for name, status in (("a-0.png", 0), ("b-0.png", 1)):
        arguments = ["c", "--gallery", "--init-image", str(tmp_path / name)]
        assert generate(model, tmp_path / "out", *arguments) == status
    assert "of other settings (init_image" in capsys.readouterr().err
