"""The VQGAN's networks on a CPU in float32: the numbers of taming's `Encoder` and `Decoder`, to rounding, sooner.

Owns: the walk over their modules for inference. Does not own: the modules, whose weights are read at each call.
What is done differently:
- 3 x 3 convolutions of large maps go by `winograd`.
- nearest upsampling and the convolution behind it are one convolution of the small map with four times the outputs,
  one for each place in a 2 x 2 square, which are then interleaved.
- norm, activation and convolution go over a map in strips that stay in cache, and a residual is added in place, so
  that two maps of a level are alive instead of six.

Maps are [H, W, C], contiguous; pictures pass one after the other.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_torch.models.winograd import TILE, Kernel, Winograd, Workspace, transform_kernel, transform_upsampling_kernel

STRIP_TILES = 128
"""Tiles of a strip: with 128 channels their transform takes 2.4 MB, about a core's share of cache. Where threads share
a strip it is larger, and four times that at the least, since they wait for each other after each step."""

_KNOWN_MODULES = {
    "Encoder", "Decoder", "ResnetBlock", "AttnBlock", "Upsample", "Downsample", "Module", "ModuleList", "Conv2d",
    "GroupNorm", "Dropout",
}  # fmt: skip


class _Prepared(NamedTuple):
    source: Tensor
    """Shares the weight's memory, so that another tensor cannot come to lie there unnoticed."""
    version: int
    checksum: float
    kernel: Kernel


class FastNetwork:
    """Runs a taming `Encoder` or `Decoder` for inference, and keeps the transformed kernels.

    A kernel is transformed again once its weight was replaced, written to, or differs in its sum, which also notices
    writes through `.data`.
    """

    def __init__(self) -> None:
        self.prepared: weakref.WeakKeyDictionary[nn.Conv2d, _Prepared] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["FastNetwork"], tuple[()]]:
        return FastNetwork, ()  # a copy of the model prepares its own kernels

    def clear(self) -> None:
        """Give the memory of the transformed kernels back."""
        self.prepared.clear()

    @staticmethod
    def can_run(network: nn.Module, maps: Tensor) -> bool:
        """Whether the walk gives what calling `network` would: nothing is recorded, traced, hooked or replaced."""
        if torch.is_grad_enabled() or network.training or torch.is_autocast_enabled("cpu"):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or maps.numel() == 0:
            return False
        tensors = [maps, *network.parameters()]
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return False
        if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
            return False
        return all(
            type(module).__name__ in _KNOWN_MODULES
            and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
            for module in network.modules()
        )

    def __call__(self, network: nn.Module, maps: Tensor) -> Tensor:
        """[B, C, H, W] through an `Encoder` or a `Decoder`; `can_run` must hold."""
        for conv, held in list(self.prepared.items()):
            weight = conv.weight
            same = weight.data_ptr() == held.source.data_ptr() and _version(weight) == held.version
            if not same or _checksum(weight) != held.checksum:
                del self.prepared[conv]
        walk = _Walk(self._kernel)
        run = walk.encode if hasattr(network, "down") else walk.decode
        return torch.stack([run(network, x.permute(1, 2, 0).contiguous()).permute(2, 0, 1) for x in maps])

    def _kernel(self, conv: nn.Conv2d, upsampling: bool) -> Kernel:
        held = self.prepared.get(conv)
        if held is None:
            weight = conv.weight.detach()
            transformed = transform_upsampling_kernel(weight) if upsampling else transform_kernel(weight)
            kernel = Kernel(transformed, _enlarged(STRIP_TILES))
            held = self.prepared[conv] = _Prepared(weight, _version(weight), _checksum(weight), kernel)
        return held.kernel


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _checksum(weight: Tensor) -> float:
    # NaN equals nothing, itself included, and would have the kernel made anew each time, which is right if slow.
    return weight.detach().sum().item()


class _Walk:
    """One pass over a network for each picture, with the buffers they share."""

    def __init__(self, kernel: Callable[[nn.Conv2d, bool], Kernel]) -> None:
        self.kernel = kernel
        self.work = Workspace()
        self.winograd = Winograd(self.work)

    def encode(self, network: nn.Module, x: Tensor) -> Tensor:
        x = _convolve(x, network.conv_in)
        for level in network.down:
            x = self.blocks(level, x)
            if hasattr(level, "downsample"):
                x = _downsample(level.downsample, x)
        return self.last(network, self.middle(network.mid, x))

    def decode(self, network: nn.Module, x: Tensor) -> Tensor:
        x = self.middle(network.mid, _convolve(x, network.conv_in))
        for level in reversed(network.up):
            x = self.blocks(level, x)
            if hasattr(level, "upsample"):
                x = self.upsample(level.upsample, x)
        return x if network.give_pre_end else self.last(network, x)

    def middle(self, mid: nn.Module, x: Tensor) -> Tensor:
        return self.residual(mid.block_2, self.attention(mid.attn_1, self.residual(mid.block_1, x)))

    def blocks(self, level: nn.Module, x: Tensor) -> Tensor:
        for i, block in enumerate(level.block):
            x = self.residual(block, x)
            if len(level.attn):
                x = self.attention(level.attn[i], x)
        return x

    def last(self, network: nn.Module, x: Tensor) -> Tensor:
        out = torch.empty(*x.shape[:2], network.conv_out.out_channels)
        self.normed_convolution(network.norm_out, network.conv_out, x, out)
        return out

    def residual(self, block: nn.Module, x: Tensor) -> Tensor:
        """taming's `ResnetBlock`; `x` is overwritten where the channels stay the same."""
        hidden = self.work.take("hidden", *x.shape[:2], block.out_channels)
        self.normed_convolution(block.norm1, block.conv1, x, hidden)
        if block.in_channels != block.out_channels:
            x = _convolve(x, block.conv_shortcut if block.use_conv_shortcut else block.nin_shortcut)
        self.normed_convolution(block.norm2, block.conv2, hidden, x, add=True)
        return x

    def attention(self, block: nn.Module, x: Tensor) -> Tensor:
        """taming's `AttnBlock`, one head as wide as the map; `x` is overwritten."""
        scale, shift = self.affine(block.norm, x)
        normed = torch.addcmul(shift, x, scale)
        q, k, v = (_convolve(normed, conv).flatten(0, 1)[None, None] for conv in (block.q, block.k, block.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x.add_(_convolve(attended.reshape(x.shape), block.proj_out))

    def upsample(self, module: nn.Module, x: Tensor) -> Tensor:
        """taming's `Upsample`."""
        height, width, channels = x.shape
        if module.with_conv and _pays(x, module.conv):
            out = torch.empty(2 * height, 2 * width, module.conv.out_channels)
            self.in_strips(x, None, module.conv, out, upsampling=True)
            return out
        doubled = x[:, None, :, None].expand(height, 2, width, 2, channels).reshape(2 * height, 2 * width, channels)
        return _convolve(doubled, module.conv) if module.with_conv else doubled

    def normed_convolution(
        self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, out: Tensor, add: bool = False
    ) -> None:
        """out = conv(silu(norm(x))), or out += it."""
        self.in_strips(x, self.affine(norm, x), conv, out, add)

    def in_strips(
        self,
        x: Tensor,
        affine: tuple[Tensor, Tensor] | None,
        conv: nn.Conv2d,
        out: Tensor,
        add: bool = False,
        upsampling: bool = False,
    ) -> None:
        zoom = 2 if upsampling else 1
        kernel = self.kernel(conv, upsampling) if _pays(x, conv) else None
        for top, strip in self.strips(x, affine):
            rows = strip.shape[0] - 2
            target = out[zoom * top : zoom * (top + rows)]
            if kernel is None:
                part = F.conv2d(strip.permute(2, 0, 1)[None], conv.weight)[0].permute(1, 2, 0)
            else:
                tiles = self.winograd.convolve(strip, kernel)
                # [row of tiles, row, row of the square, column of tiles, column, column of the square, channel]
                part = tiles.unflatten(-1, (zoom, zoom, -1)).permute(2, 0, 4, 3, 1, 5, 6)
                target = target.view(part.shape)
            if add:
                target.add_(part).add_(conv.bias)
            else:
                torch.add(part, conv.bias, out=target)

    def strips(self, x: Tensor, affine: tuple[Tensor, Tensor] | None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows of the normed, activated map with a border of one); outside of the map is zero.

        A strip [rows + 2, W + 2, C] is overwritten by the next one, which takes over its last two rows.
        """
        height, width, channels = x.shape
        most = min(height, TILE * max(1, _enlarged(STRIP_TILES) * TILE // width))
        buffer = self.work.take("strip", most + 2, width + 2, channels)
        buffer[:, 0] = buffer[:, -1] = buffer[0] = 0
        for top in range(0, height, most):
            rows = min(most, height - top)
            if top:
                buffer[:2] = buffer[most : most + 2]
            first, last = top + bool(top), min(top + rows + 1, height)
            inner = buffer[first - top + 1 : last - top + 1, 1:-1]
            if affine is None:
                inner.copy_(x[first:last])
            else:
                scale, shift = affine
                torch.addcmul(shift, x[first:last], scale, out=inner)
                F.silu(inner, inplace=True)
            if top + rows == height:
                buffer[rows + 1] = 0
            yield top, buffer[: rows + 2]

    def affine(self, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """GroupNorm as (scale [C], shift [C]); sums of a part in float32, of the map in float64."""
        channels = x.shape[2]
        total = torch.zeros(2, channels, dtype=torch.float64)
        for part in x.view(-1, channels).split(max(1, _enlarged(STRIP_TILES) * 2048 // channels)):
            squares = torch.mul(part, part, out=self.work.take("squares", *part.shape))
            total += torch.stack([part.sum(dim=0), squares.sum(dim=0)])
        size = channels // norm.num_groups
        mean, square = total.view(2, norm.num_groups, size).sum(dim=2) / (x.numel() // norm.num_groups)
        deviation = (square - mean.square()).clamp_(min=0).add_(norm.eps).rsqrt_()
        scale = deviation.repeat_interleave(size) * norm.weight
        return scale.float(), (norm.bias - mean.repeat_interleave(size) * scale).float()


def _enlarged(size: int) -> int:
    threads = torch.get_num_threads()
    return size if threads == 1 else size * max(4, threads)


def _pays(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether Winograd is sooner: whole tiles, channels enough, and a map larger than the transformed kernel."""
    height, width, channels = x.shape
    whole = height % TILE == 0 and width % TILE == 0
    return whole and min(channels, conv.out_channels) >= TILE**2 and height * width >= 4 * channels


def _downsample(module: nn.Module, x: Tensor) -> Tensor:
    """taming's `Downsample`, which pads right and bottom alone."""
    maps = x.permute(2, 0, 1)[None]
    if module.with_conv:
        maps = F.conv2d(F.pad(maps, (0, 1, 0, 1)), module.conv.weight, module.conv.bias, stride=2)
    else:
        maps = F.avg_pool2d(maps, kernel_size=2, stride=2)
    return maps[0].permute(1, 2, 0).contiguous()


def _convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """[H, W, C] to a new [H, W, O], padded to the same size."""
    if conv.kernel_size == (1, 1):
        return torch.addmm(conv.bias, x.flatten(0, 1), conv.weight.flatten(1).T).view(*x.shape[:2], -1)
    maps = F.conv2d(x.permute(2, 0, 1)[None], conv.weight, conv.bias, padding=conv.padding)
    return maps[0].permute(1, 2, 0).contiguous()
