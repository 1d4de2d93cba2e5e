"""Files to configurations: what the file says is what the run gets, and what it cannot mean is refused in one line."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dalle_torch.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PlateauConfig,
    RunConfig,
    ShampooConfig,
    ShapesConfig,
    TrackingConfig,
    TrainingConfig,
)
from dalle_torch.config_io import load_config, save_config
from dalle_torch.models.configuration import DalleBartConfig, VQGANConfig

SHAPES_FILE = Path(__file__).parents[2] / "configs" / "train" / "shapes.yaml"


def test_the_file_of_the_embedded_model_is_complete() -> None:
    config = load_config(ShapesConfig, SHAPES_FILE)
    network, codebook = DalleBartConfig(**config.model), VQGANConfig(**config.vqgan)
    assert network.image_length == codebook.image_length
    written = json.loads((SHAPES_FILE.parents[1] / "model" / "shapes.json").read_text())
    assert {key: getattr(network, key) for key in written} == written


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nbatch_size: 3\n")
    config = load_config(TrainingConfig, path, ["steps=9"])
    assert (config.steps, config.batch_size, config.seed) == (9, 3, TrainingConfig().seed)


def test_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.yaml"
    path.write_text("lr: 3e-4\n")
    assert load_config(OptimizerConfig, path).lr == 3e-4
    assert load_config(OptimizerConfig, path, ["lr=1e-5"]).lr == 1e-5


def test_sections_of_an_optimizer_are_read_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.yaml"
    path.write_text("name: shampoo\nshampoo: {block_size: 256}\nschedule: plateau\n")
    config = load_config(OptimizerConfig, path, ["shampoo.nesterov=true", "plateau.patience=3"])
    assert config.shampoo == ShampooConfig(block_size=256, nesterov=True)
    assert config.plateau == PlateauConfig(patience=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shampoo.blok_size=7"], "'blok_size' is not accepted$"),
        (["shampoo.block_size=0"], "shampoo cannot be used: block_size=0 must be at least 1$"),
        (["shampoo.block_size=many"], "many$"),
        (["max_grad_norm=many"], "\"max_grad_norm\": Expected a <class 'float'> Given value: many$"),
        (["name=adamw"], "shampoo has no effect with name=adamw: leave it out$"),
    ],
)
def test_mistakes_in_sections_are_told_plainly(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "optimizer.yaml"
    path.write_text("name: shampoo\nshampoo: {block_size: 256}\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_config(OptimizerConfig, path, overrides)
    assert "Union" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("step: 7", [], "step"),
        ("steps: many", [], "many"),
        ("steps: 0\nbatch_size: 0", [], "steps=0 must be at least 1; batch_size=0"),
        ("steps: 7", ["nothing=1"], "nothing"),
        ("steps: 7", ["steps"], "key=value"),
        ("steps: [", [], "run.yaml"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(TrainingConfig, path, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["{}", "{a: 1}", "3", "null", "[]"])
def test_unknown_keys_are_refused_whatever_their_value(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    for text, message in (
        (
            f"model: {{config: x, optoins: {value}}}\ndata: {{train: [a]}}",
            r"model.optoins is no option; did you mean opt",
        ),
        (f"model: {{config: x}}\ndata: {{train: [a]}}\nzzz: {value}", "zzz is no option; known are model, data"),
        (
            f"model: {{config: x}}\ndata: {{train: [a]}}\noptimizer: {{shampoo: {{blok: {value}}}}}",
            "optimizer.shampoo.blok",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(RunConfig, path)


@pytest.mark.parametrize(
    ("section", "option"),
    [
        ("optimizer", "lr"), ("optimizer", "weight_decay"), ("optimizer", "max_grad_norm"), ("optimizer", "eps"),
        ("samples", "temperature"), ("samples", "condition_scale"), ("data", "min_clip_score"),
        ("runtime", "timeout_minutes"), ("training", "peak_tflops"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, section: str, option: str, value: str) -> None:
    tree = {"model": "{config: x}", "data": "{train: [a]}"}
    tree[section] = f"{{train: [a], {option}: {value}}}" if section == "data" else f"{{{option}: {value}}}"
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in tree.items()))
    with pytest.raises(ValueError, match=f"{option}=-?(nan|inf) must be a finite number"):
        load_config(RunConfig, path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed=99999999999999999999", r"training cannot be used: .*seed=9+ must lie in \[0, 2\^63\)"),
        ("data.seed=-1", r"data cannot be used: seed=-1 must lie"),
        ("samples.seed=-1", r"samples cannot be used: seed=-1 must lie"),
        ("data.evaluation={v: []}", r"evaluation\.v is empty: name its shards"),
    ],
)
def test_seeds_and_sets_that_cannot_be_used_are_named(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {config: x}\ndata: {train: [a]}\n")
    with pytest.raises(ValueError, match=message):
        load_config(RunConfig, path, [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.yaml"):
        load_config(TrainingConfig, tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    "fields", [{"lr": -1.0}, {"beta2": 1.0}, {"max_grad_norm": 0.0}, {"warmup_steps": -1}], ids=str
)
def test_options_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        OptimizerConfig(**fields)


def full_config(**model: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(config="x", **model),  # type: ignore[arg-type]
        data=DataConfig(train=["a", "1e-3", "a: b"], evaluation={"1": ["b"]}, filter_column="q", filter_value="1e3"),
        optimizer=OptimizerConfig(name="shampoo", lr=1e-5, shampoo=ShampooConfig(matrix_epsilon=1e-30)),
        tracking=TrackingConfig(name="mega: 1", tags=["1", "true", "~"]),
    )


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=12))
@settings(max_examples=30, deadline=None)
@example("1e-3")
@example("1_0")
@example(".5e3")
@example("12:30")
@example("[1]")
@example("a\nb")
def test_what_is_written_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Strings of every form, also those that look like something else; in `options`, which may be anything, the reader
    itself takes a string that looks like a number for one."""
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    config = full_config(options={"gelu": "gelu", "n": [text, 1, 1e-7, None]}, train=[text, f"x{text}"])
    save_config(config, path)
    assert load_config(RunConfig, path) == config


def test_a_written_configuration_has_the_defaults_too_and_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "below" / "config.yaml"
    save_config(full_config(), path)
    assert "warmup_steps: 100" in path.read_text()
    assert load_config(RunConfig, path, ["optimizer.shampoo.block_size=64"]).optimizer.shampoo == ShampooConfig(
        matrix_epsilon=1e-30, block_size=64
    )
