"""Blocks large enough for oneDNN, made one by one: the same as by torch's batched products, and resumed to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dalle_torch import products
from dalle_torch.optim import DistributedShampoo
from dalle_torch.optim.shampoo.matrix_roots import RootProblem, inverse_roots

BLOCK = 128

pytestmark = pytest.mark.skipif(not products.available(), reason="oneDNN's products are for x86 processors with AVX2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def switched(on: bool) -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=on):
        yield


def start() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    # Whole blocks, cut ones, several in both directions, and two parameters of one shape.
    shapes = {"even": (256, 256), "twin": (256, 256), "odd": (200, 300), "narrow": (128, 20), "vector": (300,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def make(parameters: dict[str, nn.Parameter]) -> DistributedShampoo:
    return DistributedShampoo(
        parameters.items(), lr=0.01, block_size=BLOCK, start_preconditioning_step=1, preconditioning_compute_steps=2,
        merge_small_dims_block_size=BLOCK, root_method="eigh",
    )  # fmt: skip


def steps(parameters: dict[str, nn.Parameter], optimizer: DistributedShampoo, first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_such_blocks_take_the_other_way() -> None:
    batch = torch.randn(2, BLOCK, BLOCK)
    assert products.pays(batch, BLOCK**3) and not products.pays(batch, 64**3)
    assert not products.pays(batch.double(), BLOCK**3) and not products.pays(batch.to("meta"), BLOCK**3)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.pays(batch, BLOCK**3)
    with switched(False):
        assert not products.pays(batch, BLOCK**3)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_torchs(transposed: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(130, 70), torch.randn(90, 70)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    torch.testing.assert_close(products.product(a, b), a @ b.T, rtol=1e-5, atol=1e-4)


def test_updates_are_those_of_torchs_products() -> None:
    ways = []
    for on in (True, False):
        parameters = start()
        with switched(on):
            steps(parameters, make(parameters), 0, 6)
        ways.append(parameters)
    begun = start()
    for name, parameter in ways[0].items():
        apart = (parameter - ways[1][name]).norm() / (parameter - begun[name]).norm()
        # Sums in another order; a root of matrices of few gradients makes more of it.
        assert apart < 2e-3, name


def test_a_run_goes_on_bit_for_bit() -> None:
    whole = start()
    steps(whole, make(whole), 0, 7)
    parts = start()
    before = make(parts)
    steps(parts, before, 0, 4)
    after = make(parts)
    after.load_state_dict(before.state_dict())
    steps(parts, after, 4, 3)
    assert all(torch.equal(parameter, whole[name]) for name, parameter in parts.items())


def test_roots_are_roots() -> None:
    torch.manual_seed(0)
    factors = torch.randn(3, BLOCK, 2 * BLOCK)
    matrices = factors @ factors.mT / BLOCK
    found = []
    for on in (True, False):
        with switched(on):
            problem = RootProblem(p=4, epsilon=1e-6, threshold=0.1, padded_size=BLOCK, static=False)
            roots, failed = inverse_roots(matrices, problem, "eigh")
        assert not failed.any()
        found.append(roots)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    fourth = found[0] @ found[0] @ found[0] @ found[0] @ matrices
    torch.testing.assert_close(fourth, torch.eye(BLOCK).expand(3, -1, -1), rtol=0, atol=1e-2)
