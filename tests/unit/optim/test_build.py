"""Options to optimizers: each option arrives, what an optimizer would ignore is refused, and each one learns."""

import inspect
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from dalle_torch.config import AdafactorConfig, ExponentialConfig, OptimizerConfig, PlateauConfig, ShampooConfig
from dalle_torch.optim import DistributedShampoo
from dalle_torch.optim.build import build_optimizer, parameter_groups, prepare
from dalle_torch.optim.saving import expected_shapes, state_tensors

KINDS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "shampoo": DistributedShampoo}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_positions = nn.Embedding(6, 8)
        self.layer = nn.Linear(8, 4)
        self.frozen = nn.Linear(8, 4).requires_grad_(False)

    def forward(self) -> torch.Tensor:
        return (self.layer(self.embed_positions.weight) - 1).square().mean()


@pytest.mark.parametrize("name", KINDS)
def test_only_trained_matrices_decay(name: str) -> None:
    decayed, free = build_optimizer(Network(), OptimizerConfig(name=name, weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert decayed["param_names"] == ["layer.weight"]
    assert free["param_names"] == ["embed_positions.weight", "layer.bias"]


def test_without_decay_there_is_one_group() -> None:
    (group,) = parameter_groups(Network(), 0.0, split=False)
    assert [name for name, _ in group["params"]] == ["embed_positions.weight", "layer.weight", "layer.bias"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_each_optimizer_learns(name: str, weight_decay: float) -> None:
    model = Network()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=3e-2, weight_decay=weight_decay))
    assert type(optimizer) is KINDS[name]
    before = model().item()
    for _ in range(60):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model().item() < 0.3 * before
    assert model.frozen.weight.grad is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OptimizerConfig(), {"betas": (0.9, 0.98), "eps": 1e-8, "fused": True}),
        (OptimizerConfig(beta1=0.0, beta2=0.5, eps=0.0), {"betas": (0.0, 0.5), "eps": 0.0}),
        (OptimizerConfig(name="adafactor"), {"beta2_decay": -0.8, "d": 1.0, "eps": (None, 1e-3)}),
        (
            OptimizerConfig(
                name="adafactor", adafactor=AdafactorConfig(beta2_decay=-0.5, clip_threshold=2.0, min_scale=0.1)
            ),
            {"beta2_decay": -0.5, "d": 2.0, "eps": (None, 0.1)},
        ),
        (OptimizerConfig(name="shampoo"), {"beta1": 0.9, "beta2": 0.999, "diagonal_epsilon": 1e-10}),
        (
            OptimizerConfig(name="shampoo", beta2=1.0, eps=1e-3, shampoo=ShampooConfig(block_size=7, nesterov=True)),
            {"beta2": 1.0, "diagonal_epsilon": 1e-3, "block_size": 7, "nesterov": True},
        ),
    ],
)
def test_options_arrive(config: OptimizerConfig, expected: dict[str, Any]) -> None:
    (group,) = build_optimizer(Network(), config).param_groups
    assert {name: group[name] for name in expected} == expected


def test_shampoos_options_are_those_of_the_optimizer_with_its_defaults() -> None:
    parameters = inspect.signature(DistributedShampoo).parameters
    elsewhere = {"params", "lr", "beta1", "beta2", "diagonal_epsilon", "weight_decay", "sharding"}
    assert asdict(ShampooConfig()) == {n: p.default for n, p in parameters.items() if n not in elsewhere}
    (group,) = build_optimizer(Network(), OptimizerConfig(name="shampoo")).param_groups
    assert all(group[name] == parameters[name].default for name in ("beta1", "beta2", "diagonal_epsilon"))


@pytest.mark.parametrize(
    ("options", "offenders"),
    [
        ({"shampoo": ShampooConfig(), "adafactor": AdafactorConfig()}, ["shampoo", "adafactor"]),
        ({"name": "shampoo", "adafactor": AdafactorConfig()}, ["adafactor"]),
        ({"name": "adafactor", "beta1": 0.9, "beta2": 0.5, "eps": 1e-8}, ["beta1", "beta2", "eps"]),
    ],
)
def test_what_the_optimizer_would_ignore_is_refused_by_name(options: dict[str, Any], offenders: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        OptimizerConfig(**options)
    name = options.get("name", "adamw")
    assert all(f"{option} has no effect with name={name}: leave it out" in str(caught.value) for option in offenders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear", "plateau": PlateauConfig()}, "plateau has no effect with schedule=linear"),
        (
            {"schedule": "plateau", "exponential": ExponentialConfig(decay_rate=0.5, transition_steps=1)},
            "exponential has no effect with schedule=plateau",
        ),
        ({"schedule": "constant", "final_lr": 0.1}, "final_lr has no effect with schedule=constant"),
        ({"schedule": "exponential"}, "schedule=exponential needs decay_rate and transition_steps"),
        ({"lr": -1.0, "beta2": 2.0}, "lr=-1.0 must be at least 0; beta2=2.0 must lie in [0, 1)"),
        ({"name": "shampoo", "beta2": 0.0}, "beta2=0.0 must lie in (0, 1]"),
        ({"offset_steps": -1, "eps": -1.0}, "offset_steps=-1 must be at least 0; eps=-1.0 must be at least 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        OptimizerConfig(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ShampooConfig, {"block_size": 0, "matrix_epsilon": 0.0}, "block_size=0 must be at least 1; matrix_eps"),
        (ShampooConfig, {"start_preconditioning_step": -1}, "start_preconditioning_step=-1 must be at least 0"),
        (AdafactorConfig, {"clip_threshold": 0.5, "beta2_decay": 0.1}, "clip_threshold=0.5 must be at least 1; beta2"),
        (ExponentialConfig, {"decay_rate": 0.0, "transition_steps": 0}, "transition_steps=0 must be at least 1; decay"),
        (PlateauConfig, {"factor": 1.0, "patience": -1}, "patience=-1 must be at least 0; factor=1.0 must lie in"),
    ],
)
def test_sections_out_of_range_are_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "shampoo"])
def test_a_prepared_optimizer_has_its_whole_state_and_has_changed_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, twin = Network(), Network()
    twin.load_state_dict(model.state_dict())
    config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.1)
    first, second = build_optimizer(model, config), build_optimizer(twin, config)
    prepare(first)
    assert state_tensors(first).keys() == expected_shapes(first).keys()
    assert {key: value.shape for key, value in state_tensors(first).items()} == expected_shapes(first)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other) and one.grad is None
    for optimizer, network in ((first, model), (second, twin)):
        for seed, parameter in enumerate(network.parameters()):
            generator = torch.Generator().manual_seed(seed)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert state_tensors(first).keys() == state_tensors(second).keys()
