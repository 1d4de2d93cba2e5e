"""`DallePipeline`: prompts to pictures, through the processor, `DalleBart` and the VQGAN.

Owns: the order of it all, and from codes to pictures. Does not own: where the parts come from (`loading`),
drawing codes (`drawing`), ranking (`ranking`), files (`output`).
"""

import operator
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from dalle_torch.evaluation.base import TextImageScorer
from dalle_torch.evaluation.clip import ClipScorer
from dalle_torch.evaluation.loading import load_scorer
from dalle_torch.log import get_logger
from dalle_torch.pipeline.batching import automatic_batch_size
from dalle_torch.pipeline.canvas import UNDRAWN, fill_undrawn, grey_out
from dalle_torch.pipeline.drawing import Drawing, DrawingOptions, Progress, reporting
from dalle_torch.pipeline.loading import (
    MetaTensorsAreNotFilled,
    Source,
    check_match,
    load_processor,
    load_vqgan,
    located,
    show_notice,
    weights_hash,
)
from dalle_torch.pipeline.output import DallePipelineOutput, Safety, apply_safety
from dalle_torch.pipeline.ranking import check_prompts, rank

if TYPE_CHECKING:
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.models.drawing_inputs import EncoderCache
    from dalle_torch.models.vqgan import VQGAN
    from dalle_torch.text.processor import DalleBartProcessor

logger = get_logger(__name__)

RankWith = Source | tuple[Any, Any] | TextImageScorer | None

# Tokens between two looks at a drawing: each waits for the device, and on XLA each is one more shape to compile.
_PACE = {"cpu": 1, "xla": 64}
_PACE_ELSEWHERE = 8


class DallePipeline:
    """Draws pictures from prompts.

    The seed of a prompt's picture i is `seed + i`, whatever the prompt and whatever is drawn beside it: picture 5 of
    `num_images=9, seed=0` is the picture of `num_images=1, seed=5`. (On a GPU, batches of different size may round
    differently and now and then choose another token; on the CPU the numbers drawn are the same.)

    Args:
        model: a `DalleBart`.
        processor: its `DalleBartProcessor`.
        vqgan: the `VQGAN` whose codes it draws.

    Raises:
        ValueError: model and VQGAN do not belong together.
    """

    def __init__(self, model: "DalleBart", processor: "DalleBartProcessor", vqgan: "VQGAN") -> None:
        check_match(model, vqgan)
        self.model = model.eval()
        self.processor = processor
        self.vqgan = vqgan.eval()
        self.quantize: str | None = None
        self.source: Source | None = None
        self._hub_options: dict[str, Any] = {}
        self._model_hash: str | None = None
        self._rankers: dict[str, TextImageScorer] = {}
        self.encoder_cache: EncoderCache | None = None
        """Set one where the same prompts are drawn with several settings, to encode each once."""
        self.decoded_at_once: int | None = None
        """Pictures that go through the VQGAN together; None: as many as fit. Rounding depends on it, which now and then
        moves a colour by 1 of 255: with 1 a picture has the same bytes whatever is drawn beside it."""

    @classmethod
    def from_pretrained(
        cls,
        model: Source = "shapes",
        vqgan: "Source | VQGAN | None" = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        trust_pickle: bool = False,
        revision: str | None = None,
        vqgan_revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        processor: "DalleBartProcessor | None" = None,
        **model_options: Any,
    ) -> Self:
        """Load all three parts.

        Args:
            model: "shapes", the model that comes with this package; a hub id such as "dalle-mini/dalle-mega"; a
                folder; a wandb artifact "entity/project/name:version".
            vqgan: the same for the VQGAN, or one that is loaded; None takes the model's own (its folder `vqgan`),
                else the one of DALL·E Mini and Mega.
            dtype: of the model; None keeps the checkpoint's. The VQGAN stays in float32.
            device: where to draw, as `parallel.runtime.pick_device` understands it; None leaves all on the CPU.
            device_map: spreads the model over devices (accelerate); instead of `device`.
            trust_pickle: read weights that are Python pickles; such a file can run any code.
            revision, subfolder: of the model on the hub, and of the VQGAN where it is the model's own.
            vqgan_revision: of a VQGAN with a hub id of its own.
            token, cache_dir, local_files_only: as in `DalleBart.from_pretrained`, for all parts.
            processor: instead of the model's own.
            **model_options: further options of `DalleBart.from_pretrained`, such as `config`.

        Raises:
            OSError: something is not there or cannot be reached.
            ValueError: something is damaged, of the wrong type, or does not fit the rest.
        """
        from dalle_torch.models.dalle_bart import DalleBart

        if device is not None and device_map is not None:
            raise ValueError(f"device={device!r} and device_map={device_map!r} exclude each other: give one")
        source = located(model)
        show_notice(str(source))
        hub: dict[str, Any] = {
            "revision": revision, "token": token, "cache_dir": cache_dir, "subfolder": subfolder,
            "local_files_only": local_files_only,
        }  # fmt: skip
        with MetaTensorsAreNotFilled():
            loaded = DalleBart.from_pretrained(
                source, dtype=dtype, device_map=device_map, trust_pickle=trust_pickle, **hub, **model_options
            )
            codec = load_vqgan(source, vqgan, vqgan_revision, trust_pickle=trust_pickle, **hub)
        if processor is None:
            processor = load_processor(source, loaded.config, **hub)
        pipe = cls(loaded, processor, codec)
        pipe.source, pipe._hub_options = model, hub
        if device_map is not None:
            pipe.vqgan.to(loaded.device)
        return pipe if device is None else pipe.to(device)

    @property
    def device(self) -> torch.device:
        """Where prompts go; with `device_map`, the device of the model's first part."""
        return self.model.device

    @property
    def model_hash(self) -> str | None:
        """Commit or SHA-256 of the model's weights, read when first asked for; None if they came from nowhere."""
        if self._model_hash is None and self.source is not None:
            self._model_hash = weights_hash(located(self.source), **self._hub_options)
        return self._model_hash

    def to(self, device: torch.device | str) -> Self:
        """Move model and VQGAN.

        Raises:
            ValueError: there is no such device here.
        """
        from dalle_torch.parallel.runtime import pick_device

        target = pick_device(device)
        self.model.to(target)
        self.vqgan.to(target)
        return self

    def pack(self, quantize: Literal["int8"] | None = None) -> Self:
        """Rearrange the decoder's weights for drawing on the CPU, about twice as fast; see `models.packing`.

        Afterwards the pipeline draws, but cannot be saved or moved.

        Args:
            quantize: "int8" also stores them in 8 bits, faster still for few pictures; None keeps float32.

        Raises:
            ValueError: the model is not in float32 on the CPU, or packed already.
        """
        from dalle_torch.models.packing import pack_for_drawing

        pack_for_drawing(self.model, quantize)
        self.quantize = quantize
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write all parts into one folder that `from_pretrained` reads: safetensors and JSON, the VQGAN in `vqgan/`.

        Each file is written whole or not at all.

        Raises:
            ValueError: the model is packed (see `pack`); nothing is written then.
            OSError: the folder cannot be written.
        """
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.vqgan.save_pretrained(os.path.join(folder, "vqgan"))

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        condition_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        seed: int | Sequence[int] | None = 0,
        rank_with: RankWith = None,
        num_best: int | None = None,
        safety: Safety | None = None,
        progress: Progress = None,
        **drawing: Any,
    ) -> DallePipelineOutput:
        """Draw `num_images` pictures for each prompt.

        Args:
            prompts: one or several; "" draws unconditionally.
            num_images, condition_scale, top_k, top_p, temperature: see `DrawingOptions`; a scale or
                temperature of None is the one that the model's configuration recommends (10 and 1, the original's).
            seed: of each prompt's first picture, one for all or one for each; None takes a random one, which the
                output tells.
            rank_with: by whom each prompt's pictures are put in order, best first: a CLIP model's hub id or folder, or
                "shapes" (see `evaluation.loading.load_scorer`); (model, processor); or a scorer.
            num_best: how many of each prompt to keep after ranking; None keeps all.
            safety: see `output.apply_safety`.
            progress: True, False, None (a bar where stderr is a terminal), or a function of (tokens drawn, of all).
            **drawing: batch_size, prefix, init_image, keep_rows, tile, tile_overlap, compile: see
                `DrawingOptions`.

        Raises:
            ValueError: an option is out of range or contradicts another, or the model's logits are not finite.
        """
        work = self._prepare(
            prompts, num_images=num_images, condition_scale=condition_scale, top_k=top_k, top_p=top_p,
            temperature=temperature, seed=seed, **drawing,
        )  # fmt: skip
        ranker = self._ranker(rank_with)
        if num_best is not None and (ranker is None or not 1 <= num_best <= num_images):
            needs = "" if ranker else ", and needs rank_with"
            raise ValueError(f"num_best={num_best} must lie between 1 and num_images={num_images}{needs}")
        check_prompts(ranker, work.prompts)
        with reporting(progress, work.tokens) as report:
            codes = work.finish(_PACE.get(self.device.type, _PACE_ELSEWHERE), report)
        output = self._output(work, codes)
        if ranker is not None:
            output = rank(output, ranker, num_images, num_best)
        return output if safety is None else apply_safety(output, safety)

    def stream(
        self, prompts: str | Sequence[str], *, every: int = 32, safety: Safety | None = None, **drawing: Any
    ) -> Iterator[DallePipelineOutput]:
        """Yield the pictures while they are drawn, every `every` tokens, and at the end (`progress` is then 1).

        What is not yet drawn is grey. Options are those of a call, but for `progress` and for ranking, which needs
        whole pictures.

        Raises:
            ValueError: as a call; for most options at once, not at the first picture.
        """
        unknown = sorted(drawing.keys() & {"progress", "rank_with", "num_best"})
        if unknown:
            raise ValueError(f"stream has no {', '.join(unknown)}: pictures are shown while they are drawn")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every} must be a whole number of at least 1")
        work = self._prepare(prompts, **drawing)

        def pictures() -> Iterator[DallePipelineOutput]:
            for codes, _ in work.run(every):
                output = self._output(work, codes)
                yield output if safety is None else apply_safety(output, safety)

        return pictures()

    def with_recommended(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options`, but a `condition_scale` or `temperature` of None is what the model's configuration recommends."""
        return {
            name: float(getattr(self.model.config, f"drawing_{name}"))
            if value is None and name in ("condition_scale", "temperature")
            else value
            for name, value in options.items()
        }

    def _prepare(self, prompts: str | Sequence[str], seed: int | Sequence[int] | None = 0, **drawing: Any) -> Drawing:
        """Check the options of a call and encode its prompts."""
        drawing = self.with_recommended({"condition_scale": None, "temperature": None} | drawing)
        seed = secrets.randbelow(2**32) if seed is None else seed
        options = DrawingOptions(seed=_seeds(seed, prompts), **drawing)
        canvas = options.canvas(self.vqgan.config.latent_size)
        inputs = self.processor(prompts)
        return Drawing(
            model=self.model,
            options=options,
            prompts=[prompts] if isinstance(prompts, str) else list(prompts),
            inputs=inputs,
            canvas=canvas,
            given=options.given_codes(self.vqgan, len(inputs["input_ids"])),
            max_token=self.vqgan.config.n_embed,
            batch_size=options.batch_size or automatic_batch_size(self.model, guided=options.condition_scale != 1),
            after_step=self._after_step(),
            encoder_cache=self.encoder_cache,
        )

    def _after_step(self) -> Callable[[], None] | None:
        if self.device.type != "xla":
            return None
        from dalle_torch.parallel.runtime import sync

        return sync

    @torch.no_grad()
    def _output(self, work: Drawing, codes: Tensor) -> DallePipelineOutput:
        """Pictures of codes [P * N, R, C]; grey where nothing is drawn yet."""
        undrawn = codes == UNDRAWN
        pixels = self.vqgan.decode(fill_undrawn(codes).flatten(1), self.decoded_at_once, work.canvas.shape)
        if undrawn.any():
            pixels = grey_out(pixels, codes, grey=sum(self.vqgan.config.pixel_range) / 2)
        return DallePipelineOutput(
            images=self.vqgan.pixels_to_images(pixels),
            prompts=[prompt for prompt in work.prompts for _ in range(work.options.num_images)],
            seeds=work.seeds,
            tokens=codes.flatten(1).clone(),
            withheld=[False] * work.pictures,
            settings=self._settings(work),
            progress=1 - undrawn.float().mean().item(),
        )

    def _settings(self, work: Drawing) -> dict[str, Any]:
        from dalle_torch import __version__

        settings = work.options.sampling
        if work.given is not None:
            settings["given_codes"] = work.given.shape[1]
        if work.canvas.tile != (1, 1):
            settings |= {"tile": list(work.canvas.tile), "tile_overlap": work.canvas.overlap}
        return settings | {
            "model": str(self.source or self.model.name_or_path or "unnamed"),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantize": self.quantize,
            "device": self.device.type,
            "dalle_torch": __version__,
        }

    def _ranker(self, rank_with: RankWith) -> TextImageScorer | None:
        if rank_with is None:
            return None
        if isinstance(rank_with, tuple):
            return ClipScorer(*rank_with)
        if not isinstance(rank_with, (str, os.PathLike)):
            return rank_with
        name = str(rank_with)
        if name not in self._rankers:
            options = {key: self._hub_options.get(key) for key in ("token", "cache_dir", "local_files_only")}
            self._rankers[name] = load_scorer(name, filled=False, device=self.device, **options)
        return self._rankers[name]


def _seeds(seed: Any, prompts: str | Sequence[str]) -> Any:
    """What is an integer for Python as one, several as a tuple; all else as it is, for the check to name.

    Raises:
        ValueError: another number of seeds than of prompts.
    """
    if hasattr(seed, "__index__"):
        return operator.index(seed)
    if isinstance(seed, str) or not isinstance(seed, Sequence):
        return seed
    count = 1 if isinstance(prompts, str) else len(prompts)
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} prompts: give one for all, or one for each")
    return tuple(operator.index(number) if hasattr(number, "__index__") else number for number in seed)
