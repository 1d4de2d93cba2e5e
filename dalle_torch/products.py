"""Products of float32 matrices on x86 CPUs by oneDNN.

torch sends its own to MKL, which leaves half of an AMD core unused; oneDNN, which torch has for convolutions and half
precision, does not. Owns: the product, where there is one, when it pays in a batch. Does not own: gradients
(`models.linear`).
"""

import torch
from torch import Tensor

_LEAST_PRODUCTS = 1 << 20
"""Multiplications of a matrix, for each thread, below which the calls cost more than they gain; as of 100^3."""


def available() -> bool:
    """Whether torch has oneDNN's products, on a processor on which they are the faster ones.

    `torch.backends.mkldnn.flags(enabled=False)` switches them off.
    """
    # Elsewhere oneDNN may be slower than what torch is built with.
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return capable and torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] times the transpose of b [M, K], float32, in a CPU's memory: [N, M].

    A first factor that is not contiguous is copied, a second one that is a transpose is not.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return result


def pays(batch: Tensor, multiplications: int) -> bool:
    """Whether products with the matrices of a batch, each of so many multiplications, are better made one by one.

    torch's batched products share the matrices out to its threads, oneDNN's share out each matrix.
    """
    return (
        batch.device.type == "cpu"
        and batch.dtype == torch.float32
        # What only stands for values, or is traced, has no such products.
        and type(batch) is Tensor
        and multiplications >= _LEAST_PRODUCTS * torch.get_num_threads()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and available()
    )
