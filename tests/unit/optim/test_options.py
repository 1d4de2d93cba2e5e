"""Settings out of range are refused together, each with its value and its bound."""

import pytest
import torch

from dalle_torch.optim import DistributedShampoo
from dalle_torch.optim.shampoo.options import ShampooOptions


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2, 2))]


@pytest.mark.parametrize(
    ("setting", "value", "bound"),
    [
        ("lr", -1e-3, "at least 0"),
        ("lr", float("nan"), "at least 0"),
        ("lr", torch.zeros(2), "tensor of one"),
        ("beta1", 1.0, r"\[0, 1\)"),
        ("beta2", 0.0, r"\(0, 1\]"),
        ("beta2", 1.1, r"\(0, 1\]"),
        ("diagonal_epsilon", -1.0, "at least 0"),
        ("matrix_epsilon", 0.0, "above 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("block_size", 0, "at least 1"),
        ("block_size", 12.5, "whole number"),
        ("block_size", True, "whole number"),
        ("start_preconditioning_step", -1, "at least 0"),
        ("preconditioning_compute_steps", 0, "at least 1"),
        ("statistics_compute_steps", 0, "at least 1"),
        ("exponent_override", -2, r"lie in \[0, 64\]"),
        ("lr", "1e-3", "must be a number"),
        ("preconditioning_compute_steps", "x", "must be a whole number"),
        ("inverse_failure_threshold", 0.0, "above 0"),
        ("clip_by_scaled_gradient_norm", 0.0, "above 0"),
        ("merge_small_dims_block_size", 0, "at least 1"),
        ("graft_type", "adam", "rmsprop_normalized"),
        ("root_method", "qr", "auto, newton, eigh"),
        ("nesterov", "yes", "true or false"),
        ("beta1", "0.9", "a number"),
    ],
)
def test_values_out_of_range_are_refused(setting: str, value: object, bound: str) -> None:
    with pytest.raises(ValueError, match=bound) as caught:
        DistributedShampoo(parameters(), **{setting: value})
    assert setting in str(caught.value)


def test_all_offenders_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="Shampoo cannot be used with") as caught:
        DistributedShampoo(parameters(), beta1=2.0, block_size=-1, graft_type="x")
    assert all(part in str(caught.value) for part in ("beta1=2.0", "block_size=-1", "graft_type='x'"))
    assert "\n" not in str(caught.value)


def test_the_start_follows_the_roots_unless_it_is_given() -> None:
    def start(**settings: int) -> int:
        return DistributedShampoo(parameters(), **settings).param_groups[0]["start_preconditioning_step"]

    assert start() == 101
    assert start(preconditioning_compute_steps=200) == 201
    assert start(start_preconditioning_step=3) == 3


def test_a_group_out_of_range_is_refused_and_leaves_the_optimizer_as_it_was() -> None:
    optimizer = DistributedShampoo(parameters())
    with pytest.raises(ValueError, match="beta2=7"):
        optimizer.add_param_group({"params": parameters(), "beta2": 7})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()


def test_a_setting_changed_to_nonsense_is_refused_by_the_step() -> None:
    optimizer = DistributedShampoo(parameters())
    optimizer.param_groups[0]["beta1"] = 3
    with pytest.raises(ValueError, match="beta1=3"):
        optimizer.step()


def test_defaults_are_those_of_the_trainer() -> None:
    group = DistributedShampoo(parameters()).param_groups[0]
    assert ShampooOptions.of_group(group) == ShampooOptions()
