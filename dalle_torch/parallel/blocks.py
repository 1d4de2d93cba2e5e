"""How Shampoo's blocks get from parameters that are split over mp to the devices that keep their matrices, and back.

Each device is to have whole blocks, another than all others. A block's parts are on several devices of one mp group,
which hold parts of many blocks; they exchange them among themselves, each keeping as much as it gives away, so that
nowhere a whole matrix comes together. Left alone XLA gathers matrices in every device of a group, and each computes the
same.

Shapes: L parameters [L, *shape], filled up to g0 * f0 * l of them; along dimension i there are g x f x c blocks of size
s, where the g are for other copies of the model and the f for other devices of an mp group. The dimension that mp
splits is h * q * x long: its h parts of neighbouring blocks stay where they are, its q parts of blocks are exchanged.
Owns: which steps lead there. Does not own: marks (`shampoo`, which takes the steps).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from einops import rearrange
from torch import Tensor

Spec = tuple[str | None, ...]


class Region(Protocol):
    """Blocks of one size that lie side by side in a tensor, as the optimizer cuts it: `counts` of `sizes`."""

    @property
    def counts(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def blocks(self) -> int: ...

    def cut(self, stack: Tensor) -> Tensor: ...

    def paste(self, blocks: Tensor, stack: Tensor) -> None: ...


@dataclass(frozen=True)
class Exchange:
    """The same elements in the orders of an exchange, as patterns of einops.

    Attributes:
        filled: how many parameters there are when they are filled up.
        kept, exchanged: h and q; their product is mp.
        lengths: of the axes in the patterns.
        parts: [L, *shape], as parameters lie.
        spread: [dp, mp, ...]: each device's own.
        apart: [dp, h, q, q, ...]: the first q is what devices have different parts of before, the second after.
        gathered, joined: [dp, h, q, ..., q * x]; two ways to write the last dimension.
        blocks: [N, *sizes], in the order of `Region.cut`.
    """

    filled: int
    kept: int
    exchanged: int
    lengths: dict[str, int]
    parts: str
    spread: str
    apart: str
    gathered: str
    joined: str
    blocks: str

    def rewrite(self, tensor: Tensor, before: str, after: str) -> Tensor:
        """`tensor`, written `before` one way and `after` that another."""
        names = re.findall(r"\w+", before)
        return rearrange(tensor, f"{before} -> {after}", **{name: self.lengths[name] for name in names})


def plan_exchange(shape: Sequence[int], region: Region, spec: Spec, count: int, dp: int, mp: int) -> Exchange | None:
    """How N = `count` blocks, L parameters' and zeros, are spread evenly over a mesh; None: sizes do not divide so.

    Args:
        shape: of a parameter, as it is cut into blocks.
        spec: how one lies on the mesh.
    """
    whole = all(c * s == n for c, s, n in zip(region.counts, region.sizes, shape, strict=True))
    if not whole or len(spec) != len(shape) or spec.count("mp") != 1 or set(spec) > {"mp", None}:
        return None
    filled, rest = divmod(count, region.blocks)
    own = 1 + spec.index("mp")
    cuts = _cuts((filled, *region.counts), dp * mp)
    if rest or cuts is None or mp % cuts[own] or shape[own - 1] % mp:
        return None
    # What mp splits is there in one mp group as in another: other dimensions are for the copies to choose from.
    copies = _shares([1 if i == own else cut for i, cut in enumerate(cuts)], dp)
    if copies is None:
        return None
    lengths = {"q": mp // cuts[own], "x": shape[own - 1] // mp}
    for i, (size, cut, copy) in enumerate(zip((filled, *region.counts), cuts, copies, strict=True)):
        lengths |= {f"g{i}": copy, f"f{i}": cut // copy, f"c{i}": size // cut}
    lengths |= {f"s{i}": size for i, size in enumerate(region.sizes, start=1)}
    return Exchange(filled, cuts[own], mp // cuts[own], lengths, *_patterns(len(shape), own))


def _cuts(sizes: Sequence[int], devices: int) -> list[int] | None:
    """Into how many parts each dimension is cut where all together are, into equal pieces of neighbours."""
    cuts = []
    for size in sizes:
        cut = math.gcd(size, devices)
        # Pieces are of neighbours only if whatever is before the last dimension that is cut is cut into single ones.
        if cut not in (size, devices):
            return None
        cuts.append(cut)
        devices //= cut
    return cuts if devices == 1 else None


def _shares(cuts: Sequence[int], devices: int) -> list[int] | None:
    """Divisors of `cuts` whose product is `devices`."""
    shares = []
    for cut in cuts:
        shares.append(math.gcd(cut, devices))
        devices //= shares[-1]
    return shares if devices == 1 else None


def _patterns(rank: int, own: int) -> tuple[str, str, str, str, str, str]:
    """Those of an `Exchange`; `own` is the number, from 1, of the dimension that mp splits."""
    dims = range(rank + 1)
    others = [i for i in dims if i != own]
    sizes = {i: f"s{i}" if i else "" for i in dims}
    parts = " ".join(f"(f{i} q x)" if i == own else f"(g{i} f{i} c{i} {sizes[i]})" for i in dims)
    copies, among = (" ".join(f"{letter}{i}" for i in others) for letter in "gf")
    rest = " ".join(f"c{i} {sizes[i]}" for i in others)
    # A dimension that mp splits is not split over copies.
    blocks = " ".join(f"f{i} c{i}" if i == own else f"g{i} f{i} c{i}" for i in dims)
    return (
        parts,
        f"({copies}) (f{own} q) ({among} {rest} x)",
        f"({copies}) f{own} q ({among}) ({rest} x)",
        f"({copies}) f{own} ({among}) {rest} (q x)",
        f"({copies}) f{own} ({among}) {rest} (c{own} s{own})",
        f"({blocks}) " + " ".join(f"s{i}" for i in dims if i),
    )
