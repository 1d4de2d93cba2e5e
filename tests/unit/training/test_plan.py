"""The plan of a run against what such a run holds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle_torch.config import MeshConfig, RunConfig, RuntimeConfig
from dalle_torch.config_io import load_config
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.optim.build import build_optimizer, prepare
from dalle_torch.optim.saving import state_tensors
from dalle_torch.training.plan import devices_of, plan_run
from tests.tiny_pipeline import tiny_model
from tests.tiny_run import OPTIMIZERS, run_config

NETWORK = tiny_model().config
ROOT = Path(__file__).parents[3]


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda **sections: run_config(tmp_path / "run.yaml", tmp_path, **sections)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_on_one_device_are_those_of_the_real_thing(name: str, config_of: Callable[..., RunConfig]) -> None:
    config = config_of(optimizer=OPTIMIZERS[name])
    plan = plan_run(config, NETWORK, 1, 1)
    model = DalleBart(NETWORK)
    optimizer = build_optimizer(model, config.optimizer)
    prepare(optimizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert plan.parameters == plan.trained == parameters
    assert plan.shares["weights"].device == plan.shares["gradients"].device == 4 * parameters
    counts = ("step", "root_failures", "nonfinite_gradients")
    tensors = {key: value for key, value in state_tensors(optimizer).items() if key.rpartition("/")[2] not in counts}
    state = {key: share for key, share in plan.shares.items() if key not in ("weights", "gradients")}
    assert sum(share.device for share in state.values()) == sum(value.nbytes for value in tensors.values())
    assert all(share.total == share.device for share in state.values())


def test_momenta_in_8_bits_are_counted_so(config_of: Callable[..., RunConfig]) -> None:
    shampoo = OPTIMIZERS["shampoo"]["shampoo"] | {"best_effort_memory_usage_reduction": True}
    config = config_of(optimizer=OPTIMIZERS["shampoo"] | {"shampoo": shampoo})
    optimizer = build_optimizer(DalleBart(NETWORK), config.optimizer)
    prepare(optimizer)
    held = sum(value.nbytes for key, value in state_tensors(optimizer).items() if "/momentum" in key)
    assert plan_run(config, NETWORK, 1, 1).shares["momentum"].device == held


def test_over_a_mesh_each_device_has_its_part(config_of: Callable[..., RunConfig]) -> None:
    config = config_of(optimizer=OPTIMIZERS["shampoo"])
    config = replace(config, runtime=RuntimeConfig(backend="xla"), mesh=MeshConfig(dp=4, mp=2, uneven="pad"))
    network = DalleBartConfig(**NETWORK.to_dict() | {"decoder_ffn_dim": 41})
    plan = plan_run(config, network, 8, 1)
    with torch.device("meta"):
        model = DalleBart(network)
    layer = model.decoder.layers[0].feed_forward
    assert layer.up_proj.weight.shape == (41, 32)
    whole = sum(parameter.numel() for parameter in model.parameters())
    split = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    # Matrices halve, those of 41 rows up to 21; vectors stay whole. Two layers with three such matrices each.
    odd = 2 * 3 * 32
    vocabulary = sum(
        table.shape[0] % 2 * table.shape[1] for table in (model.lm_head.weight, model.decoder.embed_tokens.weight)
    )
    assert plan.shares["weights"].device == 4 * (whole - split + (split + odd + vocabulary) // 2)
    assert plan.shares["statistics"].device == pytest.approx(plan.shares["statistics"].total / 8, rel=1e-3)


def test_every_file_of_the_repository_has_a_plan() -> None:
    for name in ("mega-v3-256", "mini-v3-8", "finetune-1gpu"):
        config = load_config(RunConfig, ROOT / "configs" / "train" / f"{name}.yaml")
        network = DalleBartConfig.from_pretrained(ROOT / (config.model.config or "configs/model/mini.json"))
        plan = plan_run(config, network, *devices_of(config, 8))
        assert plan.batches.per_update in (4224, 768, 64), name
        assert config.data.lanes % plan.mesh.hosts == 0 and config.training.batch_size % config.data.lanes == 0
        # A TPU v3 core has 16 GiB; half of it is left to activations.
        assert name == "finetune-1gpu" or sum(share.device for share in plan.shares.values()) < 9 * 2**30


def test_devices_that_cannot_be_known_are_asked_for(config_of: Callable[..., RunConfig]) -> None:
    config = replace(config_of(), runtime=RuntimeConfig(backend="xla"))
    with pytest.raises(ValueError, match=r"mesh.dp=null .* set it"):
        devices_of(config, 8)
    assert devices_of(replace(config, mesh=MeshConfig(dp=2, mp=2)), 8) == (4, 1)
    with pytest.raises(ValueError, match="mesh.dp x mesh.mp = 12 is no multiple of the 8"):
        devices_of(replace(config, mesh=MeshConfig(dp=6, mp=2)), 8)
