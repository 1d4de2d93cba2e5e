"""One update: gradients add up over batches, the norm is clipped, precision and compilation change little."""

import pytest
import torch

from dalle_torch.config import TrainingConfig
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.training.step import forward_pass, train_step


def _weights(state) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def test_two_batches_make_the_update_of_one_large_one(make_state, batches) -> None:
    apart, together = make_state(), make_state()
    pair = [batches(0), batches(1)]
    whole = {name: torch.cat([batch[name] for batch in pair]) for name in pair[0]}
    first = train_step(apart.model, apart.optimizer, pair, lr=1e-3)
    second = train_step(together.model, together.optimizer, [whole], lr=1e-3)
    torch.testing.assert_close(first["loss"], second["loss"])
    # Adam divides by the gradient's own size, which lifts rounding of near-zero gradients to a share of the rate.
    torch.testing.assert_close(_weights(apart), _weights(together), atol=2e-4, rtol=0)


def test_the_reported_norm_is_that_before_clipping(make_state, batches) -> None:
    free, clipped = make_state(), make_state()
    plain = train_step(free.model, free.optimizer, [batches(0)], lr=0.0)
    limited = train_step(clipped.model, clipped.optimizer, [batches(0)], lr=0.0, max_grad_norm=1e-3)
    assert plain["grad_norm"] > 1e-2
    torch.testing.assert_close(plain["grad_norm"], limited["grad_norm"])
    moments = [state["exp_avg"].norm() for state in clipped.optimizer.state.values()]
    # The first moment after one step is (1 - beta1) times the clipped gradient.
    assert torch.stack(moments).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_gradients_are_cleared(make_state, batches) -> None:
    state = make_state()
    train_step(state.model, state.optimizer, [batches(0)], lr=1e-3)
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_the_loss_falls(make_state, batches) -> None:
    state = make_state()
    losses = [float(train_step(state.model, state.optimizer, [batches(i)], lr=1e-2)["loss"]) for i in range(60)]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


@pytest.mark.parametrize("layout", ["normformer", "subln", "swinv2"])
def test_mixed_precision_keeps_weights_and_loss_in_float32(config: DalleBartConfig, batches, layout: str) -> None:
    torch.manual_seed(0)
    model = DalleBart(DalleBartConfig(**config.to_dict() | {"ln_positions": layout}))
    forward = forward_pass(model, TrainingConfig(precision="bfloat16"))
    exact, mixed = model(**batches(0)), forward(**batches(0))
    assert (mixed.logits.dtype, mixed.loss.dtype) == (torch.bfloat16, torch.float32)
    # bfloat16 has 8 bits; a loss is the mean of many logits.
    torch.testing.assert_close(mixed.loss, exact.loss, rtol=1e-2, atol=0)
    mixed.loss.backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_compiled_update_is_the_plain_one(make_state, batches) -> None:
    plain, compiled = make_state(), make_state()
    forward = forward_pass(compiled.model, TrainingConfig(compile=True))
    for i in range(2):
        train_step(plain.model, plain.optimizer, [batches(i)], lr=1e-3)
        train_step(compiled.model, compiled.optimizer, [batches(i)], lr=1e-3, forward=forward)
    # As above: rounding is lifted to a share of the rate, twice.
    torch.testing.assert_close(_weights(plain), _weights(compiled), atol=4e-4, rtol=0)
