"""The VQGAN: pictures to codes and back (Esser et al., arXiv 2012.09841).

Owns: `VQGAN` over the networks of taming-transformers (`taming.modules`), of which this is the only importer, and
pictures in and out of it. Does not own: foreign checkpoints (`convert`), the training losses beside the codebook's.

Shapes: B pictures, H and W pixels, T = h * w codes of a picture in row-major order, C = embed_dim.
"""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dalle_torch.models.configuration import VQGANConfig
from dalle_torch.models.convert import flax_vqgan, taming
from dalle_torch.models.convert.formats import MIN_DALLE_VQGAN
from dalle_torch.models.loading import CheckpointModel, ForeignFormat
from dalle_torch.models.vqgan_fast import FastNetwork

COMMITMENT_WEIGHT = 0.25
"""Beta of the VQ-VAE objective (van den Oord et al., arXiv 1711.00937), as in taming's `VQModel`."""

FLAX = ForeignFormat(name="Flax", files=(flax_vqgan.WEIGHTS_NAME,), tensors=flax_vqgan.read_flax_vqgan)
TAMING = ForeignFormat(
    name="taming-transformers",
    files=(taming.CONFIG_NAME, taming.WEIGHTS_NAME),
    tensors=taming.read_taming,
    config=taming.read_taming_config,
    pickled=True,
)

HOST_SLICE_BYTES = 1 << 30
"""Activations that one slice may hold where the free memory is not asked for."""


@dataclass
class VQGANOutput(ModelOutput):
    """What `VQGAN.forward` returns.

    Attributes:
        reconstruction: [B, out_ch, H, W], in the network's own range, unclipped.
        codebook_loss: [], codebook and weighted commitment term (VQ), or weighted divergence from the prior (Gumbel).
        codes: [B, T] int64.
    """

    reconstruction: Tensor | None = None
    codebook_loss: Tensor | None = None
    codes: Tensor | None = None


class VQGAN(CheckpointModel):
    """Encoder, codebook and decoder; parameters are named as in taming-transformers' checkpoints.

    `encode` and `decode` are for inference and record no gradient; `forward` and `decode_latents` are differentiable.
    """

    config_class = VQGANConfig
    config: VQGANConfig
    main_input_name = "pixel_values"
    foreign_formats = (FLAX, TAMING, MIN_DALLE_VQGAN)
    _no_split_modules: ClassVar[list[str]] = ["Encoder", "Decoder"]

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        network = {
            name: getattr(config, name)
            for name in (
                "ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "resamp_with_conv",
                "in_channels", "resolution", "z_channels", "double_z",
            )
        }  # fmt: skip
        # taming's Decoder announces its latent shape on stdout, which belongs to the caller.
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder = Encoder(**network)
            self.decoder = Decoder(**network, give_pre_end=config.give_pre_end)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = config.norm_groups
        if config.quantizer == "gumbel":
            self.quantize = GumbelQuantize(
                config.z_channels, config.embed_dim, n_embed=config.n_embed, kl_weight=config.kl_weight
            )
        else:
            self.quantize = VectorQuantizer2(config.n_embed, config.embed_dim, beta=COMMITMENT_WEIGHT, legacy=False)
        # The Gumbel quantizer projects from z_channels itself; the published ones have embed_dim = z_channels.
        quantized = config.z_channels if config.quantizer == "gumbel" else config.embed_dim
        self.quant_conv = nn.Conv2d(config.z_channels, quantized, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self._fast = FastNetwork()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialisation, as taming leaves it; every function it calls goes through torch.nn.init, which
        # transformers guards for weights that were already loaded.
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.reset_parameters()
        elif isinstance(module, GumbelQuantize):
            nn.init.normal_(module.embed.weight)
        elif isinstance(module, VectorQuantizer2):
            nn.init.uniform_(module.embedding.weight, -1.0 / module.n_e, 1.0 / module.n_e)

    @property
    def codebook(self) -> nn.Parameter:
        """[n_embed, embed_dim]."""
        return self.quantize.embed.weight if self.config.quantizer == "gumbel" else self.quantize.embedding.weight

    @property
    def downsampling(self) -> int:
        """Pixels of a code's side."""
        return 2 ** (len(self.config.ch_mult) - 1)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> VQGANOutput | tuple[Tensor, ...]:
        """Encodes, quantizes and decodes, differentiably (straight-through at the codebook).

        Args:
            pixel_values: [B, in_channels, H, W], in `config.pixel_range`; H and W multiples of `downsampling`.

        In training mode the Gumbel quantizer samples (temperature: `quantize.temperature`); otherwise it takes the
        likeliest code.

        Raises:
            ValueError: a shape that does not fit.
        """
        self._check_pixels(pixel_values)
        latents = self.quant_conv(self._run(self.encoder, pixel_values))
        if self.config.quantizer == "gumbel" and not self.training:
            quantized, loss, codes = self._likeliest(latents)
        else:
            quantized, loss, (_, _, codes) = self.quantize(latents)
        output = VQGANOutput(self.decode_latents(quantized), loss, codes.reshape(len(pixel_values), -1))
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, slice_size: int | None = None) -> Tensor:
        """Pictures to codes.

        Args:
            pixel_values: [B, in_channels, H, W], in `config.pixel_range`; H and W multiples of `downsampling`. Moved
                to the model's device and dtype.
            slice_size: pictures that go through the network together; by default as many as fit memory.

        Returns:
            [B, T] int64, row-major over the [H / downsampling, W / downsampling] grid.

        Raises:
            ValueError: a shape that does not fit, or `slice_size` below 1.
        """
        self._check_pixels(pixel_values)
        pixel_values = self._placed(pixel_values)
        size = self._slice_size(len(pixel_values), pixel_values.shape[-2:], slice_size)
        return torch.cat([self._encode_slice(part) for part in pixel_values.split(size)])

    @torch.no_grad()
    def decode(self, codes: Tensor, slice_size: int | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes to pictures.

        Args:
            codes: [B, T] integers below `config.n_embed`. They are checked on the CPU only: elsewhere looking at them
                would wait for the device.
            slice_size: pictures that go through the network together; by default as many as fit memory.
            grid: rows and columns of codes; by default the square of `config.latent_size`.

        Returns:
            [B, out_ch, rows * downsampling, columns * downsampling], in the network's own range, unclipped.

        Raises:
            ValueError: codes outside the codebook, a shape that does not fit, or `slice_size` below 1.
        """
        rows, columns = grid or (self.config.latent_size, self.config.latent_size)
        self._check_codes(codes, rows, columns)
        codes = codes.to(self.codebook.device).reshape(-1, rows, columns)
        pixels = (rows * self.downsampling, columns * self.downsampling)
        size = self._slice_size(len(codes), pixels, slice_size)
        return torch.cat([self.decode_latents(self._look_up(part)) for part in codes.split(size)])

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantized latents [B, embed_dim, h, w] to pictures [B, out_ch, H, W], differentiably."""
        return self._run(self.decoder, self.post_quant_conv(latents))

    def images_to_pixels(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL images of any mode and size to what `encode` takes.

        EXIF rotation is applied, transparency is laid over white, and the centre square is resized (Lanczos, which
        does not alias) to `config.resolution`.

        Returns:
            [B, 3, resolution, resolution] float32 on the CPU, in `config.pixel_range`.

        Raises:
            ValueError: no image, or one that has no conversion to RGB.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        if not images:
            raise ValueError("images_to_pixels was given no image; pass at least one")
        side = (self.config.resolution, self.config.resolution)
        upright = [to_rgb(ImageOps.exif_transpose(image)) for image in images]
        squares = [ImageOps.fit(image, side, method=Image.Resampling.LANCZOS) for image in upright]
        return self.bytes_to_pixels(torch.from_numpy(np.stack([np.asarray(square) for square in squares])))

    def bytes_to_pixels(self, pictures: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to [B, 3, H, W] float32 in `config.pixel_range`, on the device where they are."""
        black, white = self.config.pixel_range
        return rearrange(pictures, "b h w c -> b c h w").float().mul_((white - black) / 255).add_(black)

    def pixels_to_images(self, pixels: Tensor) -> list[Image.Image]:
        """Pictures [B, 3, H, W] or [3, H, W] in the network's own range to PIL images, clipped and rounded.

        Raises:
            ValueError: another shape, or values that are not numbers.
        """
        if pixels.ndim == 3:
            pixels = pixels[None]
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels has shape {list(pixels.shape)}; expected [B, 3, H, W] or [3, H, W]")
        black, white = self.config.pixel_range
        values = (pixels.detach().float() - black) * (255 / (white - black))
        array = rearrange(values, "b c h w -> b h w c").cpu().numpy()
        if np.isnan(array).any():
            raise ValueError("pixels holds NaN; the weights or the dtype (float16 overflows easily) are at fault")
        return [Image.fromarray(picture) for picture in array.clip(0, 255).round().astype(np.uint8)]

    def train(self, mode: bool = True) -> "VQGAN":
        """As in `nn.Module`; what was prepared for inference is given back."""
        self._fast.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VQGAN":
        self._fast.clear()
        return super()._apply(fn, recurse)

    def _run(self, network: nn.Module, maps: Tensor) -> Tensor:
        return self._fast(network, maps) if self._fast.can_run(network, maps) else network(maps)

    @classmethod
    def _find_config(
        cls, folder: Path, source: Any, config: Any, foreign: ForeignFormat | None, overrides: dict[str, Any]
    ) -> VQGANConfig:
        found = super()._find_config(folder, source, config, foreign, overrides)
        told = config is not None or "pixel_range" in overrides or flax_vqgan.names_pixel_range(folder)
        if foreign is FLAX and not told:
            found.pixel_range = flax_vqgan.PIXEL_RANGE
        return found

    def _encode_slice(self, pixel_values: Tensor) -> Tensor:
        latents = self.quant_conv(self._run(self.encoder, pixel_values))
        if self.config.quantizer == "gumbel":
            return self.quantize.proj(latents).argmax(dim=1).flatten(1)
        vectors = rearrange(latents, "b c h w -> (b h w) c").float()
        codebook = self.codebook.float()
        # |z|^2 is the same for every entry, so it does not move the minimum.
        distance = torch.addmm(codebook.square().sum(dim=1), vectors, codebook.T, alpha=-2)
        return distance.argmin(dim=1).reshape(len(pixel_values), -1)

    def _likeliest(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.quantize.proj(latents)
        codes = logits.argmax(dim=1)
        log_prior_ratio = logits.log_softmax(dim=1) + math.log(self.config.n_embed)
        divergence = (logits.softmax(dim=1) * log_prior_ratio).sum(dim=1).mean()
        return self._look_up(codes), self.quantize.kl_weight * divergence, codes

    def _look_up(self, codes: Tensor) -> Tensor:
        return rearrange(nn.functional.embedding(codes, self.codebook), "b h w c -> b c h w")

    def _placed(self, pixel_values: Tensor) -> Tensor:
        weight = self.encoder.conv_in.weight
        return pixel_values.to(dtype=weight.dtype) if weight.is_meta else pixel_values.to(weight.device, weight.dtype)

    def _slice_size(self, pictures: int, pixels: Sequence[int], slice_size: int | None) -> int:
        if slice_size is not None:
            if slice_size < 1:
                raise ValueError(f"slice_size={slice_size} must be at least 1")
            return slice_size
        budget = HOST_SLICE_BYTES
        if self.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.device)[0] // 2
        fitting = max(1, budget // self._picture_bytes(*pixels))
        # Slices of equal size, so that a compiler sees as few shapes as can be.
        return math.ceil(pictures / math.ceil(max(pictures, 1) / fitting)) or 1

    def _picture_bytes(self, height: int, width: int) -> int:
        """Activations that one picture needs at the most: six maps of the widest level, or the attention's scores."""
        config = self.config
        area = height * width
        maps = max(config.ch * factor * area // 4**level for level, factor in enumerate(config.ch_mult))
        scores = max(
            [(area // 4**level) ** 2 for level in range(len(config.ch_mult))
             if config.resolution // 2**level in config.attn_resolutions]
            + [(area // self.downsampling**2) ** 2]
        )  # fmt: skip
        codebook = area // self.downsampling**2 * config.n_embed
        return max(6 * maps, 3 * scores, 2 * codebook) * max(self.dtype.itemsize, 1)

    def _check_pixels(self, pixel_values: Tensor) -> None:
        shape = list(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.config.in_channels:
            raise ValueError(f"pixel_values has shape {shape}; expected [B, {self.config.in_channels}, H, W]")
        if 0 in shape:
            raise ValueError(f"pixel_values has shape {shape}, which is empty; pass at least one picture")
        if shape[2] % self.downsampling or shape[3] % self.downsampling:
            raise ValueError(
                f"pixel_values is {shape[2]} x {shape[3]} pixels; both sides must be multiples of {self.downsampling}"
            )

    def _check_codes(self, codes: Tensor, rows: int, columns: int) -> None:
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes has dtype {codes.dtype}; expected integers, such as torch.int64")
        if rows < 1 or columns < 1 or codes.ndim != 2 or codes.shape[1] != rows * columns or not len(codes):
            raise ValueError(
                f"codes has shape {list(codes.shape)}; expected [B, {rows * columns}] for a grid of "
                f"{rows} x {columns} codes (pass grid=(rows, columns) for another one)"
            )
        if codes.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(bound) for bound in codes.aminmax())
        if low < 0 or high >= self.config.n_embed:
            wrong = low if low < 0 else high
            raise ValueError(f"codes holds {wrong}; the codebook has n_embed={self.config.n_embed} entries, from 0")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to RGB: transparency is laid over white, 16-bit values are scaled to 8 bits.

    Raises:
        ValueError: the mode has no conversion to RGB.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        # Mode "I" is what some readers make of 16-bit pictures, and others of 8-bit ones.
        depth = 257 if image.mode != "I" or values.max() > 255 else 1
        image = Image.fromarray((values // depth).clip(0, 255).astype(np.uint8))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"an image of mode {image.mode!r} has no conversion to RGB; convert it first") from error
