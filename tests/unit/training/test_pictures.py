"""When pictures are drawn and scored on the way, by whom, and that it changes nothing of the training."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.config import ModelConfig, RunConfig
from dalle_torch.pipeline.output import read_metadata
from dalle_torch.training.control import Mailbox, parse_request
from dalle_torch.training.pictures import prepare_pictures
from dalle_torch.training.run import train_run
from tests.tiny_clip import tiny_clip
from tests.tiny_run import run_config, write_source

PROMPTS = ["a red circle", "a blue square above a green triangle"]
SHAPES: dict[str, Any] = {"prompts": PROMPTS, "images": 3, "scorer": "shapes", "features": "shapes"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_source(tmp_path_factory.mktemp("source"))
    for part in tiny_clip():
        part.save_pretrained(folder / "clip")
    return folder


@pytest.fixture
def config_of(tmp_path: Path, source: Path) -> Callable[..., RunConfig]:
    def make(**sections: dict[str, Any]) -> RunConfig:
        # Masks of dropout tell whether its random numbers were disturbed.
        model = {"vqgan": str(source / "model" / "vqgan"), "options": {"dropout": 0.1}} | sections.pop("model", {})
        return run_config(tmp_path / "run.yaml", source, model=model, **sections)

    return make


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(folder: Path, key: str) -> dict[int, Any]:
    return {line["step"]: line[key] for line in lines(folder) if key in line}


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointFolder(str(folder / "checkpoints")).newest()
    assert newest is not None and newest.step == 6
    return newest.read()


def same(left: Path, right: Path) -> bool:
    first, second = final(left), final(right)
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


def sheets(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "samples").iterdir())


def test_scores_and_sheets_come_at_their_steps_and_change_nothing(
    tmp_path: Path, config_of: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    with_scores, without = tmp_path / "with", tmp_path / "without"
    samples = {"every": 3, "prompts": ["n1"], "condition_scale": 2.0}
    assert train_run(config_of(scores=SHAPES | {"every": 2}, samples=samples), with_scores) == "finished"
    assert "figures by shapes (shapes) are not the standard ones" in caplog.text
    assert train_run(config_of(), without) == "finished"
    assert sheets(with_scores) == [
        "scores-00000002.png", "scores-00000004.png", "scores-00000006.png", "step-00000003.png", "step-00000006.png",
    ]  # fmt: skip
    assert sheets(without) == []
    assert values(with_scores, "loss") == values(without, "loss") and same(with_scores, without)
    mean, best = values(with_scores, "score"), values(with_scores, "score_best")
    assert list(mean) == list(best) == list(values(with_scores, "diversity")) == [2, 4, 6]
    assert all(0 < mean[step] < best[step] <= 1 for step in mean)
    assert all(value > 0 for value in values(with_scores, "diversity").values())
    (judges,) = [line for line in lines(with_scores) if line.get("event") == "judges"]
    assert judges["step"] == 2 and judges["scorer"]["name"] == judges["features"]["name"] == "shapes"


def test_the_sheet_and_the_tracker_have_each_prompts_best_first(
    tmp_path: Path, config_of: Callable[..., RunConfig]
) -> None:
    scores_of_one_judge = SHAPES | {"every": 6, "features": None}
    assert train_run(config_of(scores=scores_of_one_judge), tmp_path / "run") == "finished"
    assert not values(tmp_path / "run", "diversity")
    about = read_metadata(tmp_path / "run" / "samples" / "scores-00000006.png")
    scores = about["scores"]
    assert len(scores) == 6 and all(rows == sorted(rows, reverse=True) for rows in (scores[:3], scores[3:]))
    # Each picture's seed is named, so that it can be drawn again.
    assert sorted(about["seeds"][:3]) == [0, 1, 2] and (about["step"], about["scorer"]["name"]) == (6, "shapes")
    assert about["score"] == pytest.approx(sum(scores) / 6) == values(tmp_path / "run", "score")[6]
    assert values(tmp_path / "run", "score_best")[6] == pytest.approx((scores[0] + scores[3]) / 2)
    (ranked,) = [line for line in lines(tmp_path / "run") if line.get("images") == "ranked"]
    assert ranked["captions"][0] == f"{scores[0]:.3f} {PROMPTS[0]}" and len(ranked["captions"]) == 6
    with Image.open(tmp_path / "run" / "samples" / "scores-00000006.png") as sheet:
        assert sheet.width >= 3 * 16 > sheet.width - 3 * 3


def test_a_run_that_is_resumed_scores_as_one_that_was_not(
    tmp_path: Path, source: Path, config_of: Callable[..., RunConfig]
) -> None:
    # The judge of shapes is made with random weights before its own are loaded, after the run's generators were set.
    judges = {"scorer": str(source / "clip"), "features": "shapes"}
    scores = {"prompts": ["n1", "n2"], "images": 2, "every": 1} | judges
    assert train_run(config_of(scores=scores), tmp_path / "whole") == "finished"
    assert train_run(config_of(scores=scores, training={"steps": 2}), tmp_path / "halves") == "finished"
    assert train_run(config_of(scores=scores), tmp_path / "halves") == "finished"
    assert train_run(config_of(), tmp_path / "plain") == "finished"
    for key in ("loss", "score", "score_best", "diversity"):
        assert values(tmp_path / "halves", key) == values(tmp_path / "whole", key), key
    assert values(tmp_path / "whole", "loss") == values(tmp_path / "plain", "loss")
    assert same(tmp_path / "whole", tmp_path / "halves") and same(tmp_path / "whole", tmp_path / "plain")
    scored = values(tmp_path / "whole", "score")
    assert list(scored) == [1, 2, 3, 4, 5, 6] and len(set(scored.values())) > 1


def test_the_interval_is_set_while_the_run_goes(tmp_path: Path, config_of: Callable[..., RunConfig]) -> None:
    config, folder = config_of(scores=SHAPES, training={"eval_every": 1}), tmp_path / "run"

    def asking(model: object, step: int) -> dict[str, float]:
        if step in (2, 4):
            Mailbox([str(folder / "control")]).send(parse_request([f"score_every={step // 2}"], config))
        return {}

    assert train_run(config, folder, asking) == "finished"
    assert list(values(folder, "score")) == [3, 4, 6]
    assert [(line["name"], line["new"]) for line in lines(folder) if line.get("event") == "adjusted"] == [
        ("scores.every", 1), ("scores.every", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"scorer": "nobodys-judge"}, r"scores\.scorer=nobodys-judge: "),
        ({"features": "nobodys-features.pth"}, r"scores\.features=nobodys-features\.pth: "),
        ({"prompts": ["a red cat"]}, r"scores\.prompts cannot be scored by scores\.scorer=shapes: .*'a red cat'"),
    ],
    ids=["scorer", "features", "grammar"],
)
def test_what_cannot_score_is_told_before_the_first_update(
    scores: dict[str, Any], message: str, tmp_path: Path, config_of: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The interval may come later: what it would need is looked at now.
    with pytest.raises((OSError, ValueError), match=message) as caught:
        train_run(config_of(scores=SHAPES | scores), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_damaged_weights_of_a_scorer_are_told(
    tmp_path: Path, source: Path, config_of: Callable[..., RunConfig]
) -> None:
    model, processor = tiny_clip()
    model.visual_projection.weight.data[0, 0] = torch.nan
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"scores\.scorer=.*clip gives scores that are no numbers"):
        train_run(config_of(scores={"prompts": ["n1"], "scorer": str(tmp_path / "clip")}), tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"samples": {"prompts": ["a"]}}, r"samples\.prompts: "),
        ({"scores": SHAPES}, r"scores\.prompts: "),
        ({"samples": {"prompts": ["a"]}, "scores": SHAPES}, r"samples\.prompts and scores\.prompts: "),
    ],
    ids=["samples", "scores", "both"],
)
def test_pictures_are_refused_where_parameters_are_spread(
    sections: dict[str, Any], names: str, config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = config_of(runtime={"device": "cpu", "parallel": "fsdp"}, **sections)
    engine = SimpleNamespace(name="accelerate", host_count=2, host_index=1)
    with pytest.raises(ValueError, match=names + r".*runtime\.parallel=fsdp has not: take ddp"):
        prepare_pictures(cast(Any, SimpleNamespace(config=config, engine=engine)), tmp_path)


def test_a_process_that_does_not_draw_waits_when_the_other_does(
    config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    waits: list[int] = []
    engine = SimpleNamespace(name="accelerate", host_count=2, host_index=1, barrier=lambda: waits.append(1))
    config = config_of(scores=SHAPES | {"every": 4}, samples={"every": 6, "prompts": ["a"]})
    pictures = prepare_pictures(cast(Any, SimpleNamespace(config=config, engine=engine)), tmp_path)
    assert pictures.sampler is None and pictures.scores is None
    assert [step for step in range(1, 13) if pictures.due(config, step)] == [4, 6, 8, 12]
    pictures.draw(config, 4, cast(Any, None))
    assert waits == [1]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"every": 5}, "every=5 without prompts"),
        ({"every": 0, "prompts": ["a"], "scorer": "x"}, "every=0 must be at least 1"),
        ({"prompts": ["a"]}, "prompts without scorer: name a CLIP model"),
        ({"scorer": "x"}, "scorer=x without prompts"),
        ({"prompts": ["a", " "], "scorer": "x"}, "prompts has an empty one"),
        ({"prompts": ["a", "b", "a"], "scorer": "x"}, "prompts has 'a' twice"),
        ({"prompts": ["a"], "scorer": "x", "images": 0}, "images=0 must be at least 1"),
        ({"prompts": ["a"], "scorer": "x", "temperature": 0.0}, "temperature=0 draws the same picture images=4 times"),
        ({"prompts": ["a"], "scorer": "x", "top_k": 1}, "top_k=1 draws the same picture"),
        ({"prompts": ["a"], "scorer": "x", "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"prompts": ["a"], "scorer": "x", "images": 1, "features": "y"}, "features=y compares pictures of a prompt"),
        ({"features": "y"}, "features=y without prompts"),
    ],
)
def test_options_that_cannot_be_are_told(
    scores: dict[str, Any], message: str, config_of: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ValueError, match=f"scores cannot be used: .*{message}"):
        config_of(scores=scores)


@pytest.mark.parametrize("section", ["samples", "scores"])
def test_what_is_drawn_needs_the_vqgan(section: str, config_of: Callable[..., RunConfig]) -> None:
    options = SHAPES if section == "scores" else {"prompts": PROMPTS}
    for every, given in ((None, "prompts"), (3, "every=3")):
        with pytest.raises(ValueError) as caught:
            config_of(model={"vqgan": None}, **{section: options | {"every": every}})
        message = (
            f"{section}.{given} needs the VQGAN to draw with: set model.vqgan to that of the codes in the data, or"
        )
        assert f"{message} leave {section} out" in str(caught.value)


def test_the_embedded_model_brings_its_vqgan() -> None:
    assert ModelConfig(weights="shapes").vqgan == "shapes"
    assert ModelConfig(weights="shapes", vqgan="other").vqgan == "other"
    # Of another codebook, or of a model that only looks like it, nobody knows.
    assert ModelConfig(weights="shapes", reinitialize_embeddings=True).vqgan is None
    assert ModelConfig(config="shapes").vqgan is None
