"""What `--sweep` stands for."""

import pytest

from dalle_torch.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dalle_torch.studies.pod_plan.sweep import variants


@pytest.fixture
def config() -> RunConfig:
    training = TrainingConfig(steps=1, batch_size=1408, accumulation_steps=3)
    return RunConfig(model=ModelConfig(config="x"), data=DataConfig(train=["x"]), training=training)


def test_every_combination_is_named_and_an_update_has_the_same_samples(config: RunConfig) -> None:
    found = dict(variants(config, ["mesh=32x8,64x4", "accumulation=1,6"]))
    assert list(found) == [
        "mesh=32x8, accumulation=1",
        "mesh=32x8, accumulation=6",
        "mesh=64x4, accumulation=1",
        "mesh=64x4, accumulation=6",
    ]
    assert found["mesh=64x4, accumulation=6"] == [
        "mesh.dp=64", "mesh.mp=4", "training.accumulation_steps=6", "training.batch_size=704",
    ]  # fmt: skip


def test_any_option_can_be_an_axis(config: RunConfig) -> None:
    assert dict(variants(config, ["training.use_scan=true,false"])) == {
        "training.use_scan=true": ["training.use_scan=true"],
        "training.use_scan=false": ["training.use_scan=false"],
    }


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("mesh", "give a name and values"),
        ("mesh=", "give a name and values"),
        ("mesh=32x8,", "give a name and values"),
        ("mesh=32", "dp x mp"),
        ("accumulation=5", "4224 samples.*divisor"),
        ("accumulation=0", "divisor"),
    ],
)
def test_what_is_no_axis_is_refused(config: RunConfig, axis: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(variants(config, [axis]))
