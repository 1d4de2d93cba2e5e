"""Comparisons from files: what rows change, and what is refused before anything is trained."""

from pathlib import Path

import pytest
import yaml

from dalle_torch.cli.main import build_parser
from dalle_torch.studies.compare import Study
from dalle_torch.studies.compare_config import ComparisonConfig, Row, load_comparison, place, plan_runs, slug
from dalle_torch.training.setup import model_config

RUN = {
    "model": {"config": "configs/model/shapes.json", "tokenizer": "t"},
    "data": {"train": ["a"], "evaluation": {"e": ["b"]}},
    "optimizer": {"name": "shampoo", "lr": 0.1, "shampoo": {"block_size": 8}},
}


def config(rows: list[Row], **options: object) -> ComparisonConfig:
    return ComparisonConfig(**({"run": RUN, "rows": rows} | options))  # type: ignore[arg-type]


def test_a_key_replaces_a_value_or_a_whole_section() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    place(tree, "a.c", {"f": 4})
    place(tree, "e.g", 5)
    place(tree, "a.b", 6)
    assert tree == {"a": {"b": 6, "c": {"f": 4}}, "e": {"g": 5}}


def test_rows_change_their_keys_alone() -> None:
    rows = [
        Row(name="Base"),
        Row(name="AdamW", set={"optimizer": {"name": "adamw"}}, learning_rates=[1e-3, 2e-3]),
        Row(name="post-LN", set={"model.options.ln_positions": "postln"}),
    ]
    study = config(rows, seeds=[5, 7])
    (base, _), adamw, (post, _) = (
        plan_runs(study, row, study.seeds, row.learning_rates or [None], {"data.workers": 0}) for row in rows
    )
    assert base.name == "base-seed5" and base.config.training.seed == base.config.data.seed == 5
    assert base.config.optimizer.name == "shampoo" and base.config.data.workers == 0
    assert [run.name for run in adamw] == [
        "adamw-lr0.001-seed5", "adamw-lr0.001-seed7", "adamw-lr0.002-seed5", "adamw-lr0.002-seed7"
    ]  # fmt: skip
    assert [run.config.optimizer.lr for run in adamw] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert adamw[0].config.optimizer.shampoo is None
    assert model_config(post.config.model).ln_positions == "postln"
    assert post.config.optimizer == base.config.optimizer


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows is empty"),
        ([Row(name="a"), Row(name="A!")], {}, "the same folder name twice: a"),
        ([Row(name="a")], {"seeds": [1, 1]}, "seeds="),
        ([Row(name="a")], {"run": {}}, "name no shards"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(rows: list[Row], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(rows, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "?"}, "needs a letter"),
        ({"name": "a", "learning_rates": [0.0]}, "above 0"),
        ({"name": "a", "learning_rates": [0.1, 0.1]}, "one twice"),
        ({"name": "a", "learning_rates": [0.1], "set": {"optimizer.lr": 1}}, "no effect beside"),
    ],
)
def test_rows_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(**options)


def test_a_row_with_options_that_do_not_fit_is_named(tmp_path: Path) -> None:
    wrong = Row(name="My row", set={"optimizer.name": "adamw"})
    with pytest.raises(ValueError, match=r"^row 'My row': .*shampoo has no effect with name=adamw"):
        Study(config([Row(name="base"), wrong]), tmp_path)
    misspelt = Row(name="My row", set={"model.options.ln_position": "postln"})
    with pytest.raises(ValueError, match="ln_position"):
        Study(config([Row(name="base"), misspelt]), tmp_path)


@pytest.mark.parametrize(("name", "rows"), [("variants", 14), ("optimizers", 8)])
def test_the_shipped_comparisons_can_be_run(tmp_path: Path, name: str, rows: int) -> None:
    found = load_comparison(f"configs/compare/{name}.yaml")
    study = Study(found, tmp_path)
    assert len(study.plans) == rows
    models = {row: model_config(runs[0].config.model) for row, runs in study.plans.items()}
    if name == "variants":
        assert len({str(model.to_dict()) for model in models.values()}) == rows, "two rows are the same"
    else:
        assert {runs[0].config.optimizer.name for runs in study.plans.values()} == {"shampoo", "adamw", "adafactor"}
    # Nothing is written before the training.
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_the_runs_and_the_comparison() -> None:
    found = load_comparison(
        "configs/compare/variants.yaml",
        ["seeds=[3]", "run.training.steps=7", "run.optimizer.lr=1e-4", "data.shapes.scenes=64"],
    )
    assert found.seeds == [3] and found.data is not None and found.data.shapes.scenes == 64
    (run,) = plan_runs(found, found.rows[0], found.seeds, [None], {"data.train": ["x"], "model.config": "c.json"})
    assert run.config.training.steps == 7 and run.config.optimizer.lr == 1e-4
    with pytest.raises(ValueError, match="key=value"):
        load_comparison("configs/compare/variants.yaml", ["run.training.steps"])


def test_names_become_folders() -> None:
    assert slug("Sandwich-LN (CogView)") == "sandwich-ln-cogview"


def test_the_sweep_has_the_rows_of_the_comparison_each_with_all_rates_and_seeds() -> None:
    sweep = yaml.safe_load(Path("configs/compare/sweep.yaml").read_text(encoding="utf-8"))
    found = load_comparison("configs/compare/variants.yaml")
    assert sweep["parameters"]["only"]["values"] == [slug(row.name) for row in found.rows]
    # Other seeds than the first wait for the rate that this one chooses: an agent has all of a row.
    assert list(sweep["parameters"]) == ["only"]
    # An agent puts the parameters in as --only=NAME.
    words = [word for word in sweep["command"][1:] if word != "${args}"]
    args = build_parser().parse_args([*words[1:], "--only=pre-ln"])
    assert (args.only, args.jobs) == (["pre-ln"], 1)
    assert load_comparison(args.config, args.overrides).run["tracking"] == {"wandb": "online"}
