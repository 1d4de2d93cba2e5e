"""From checked options to codes on a canvas, batch by batch.

Owns: the options of a drawing and their checks, seeds, continuing pictures, windows, smaller batches when memory runs
out. Does not own: drawing one batch (`models.generation`), pictures (`pipeline`).

Shapes: P prompts, N pictures a prompt, R x C codes a picture.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from dalle_torch.log import get_logger
from dalle_torch.log import progress as progress_bar
from dalle_torch.pipeline.batching import Batch, is_out_of_memory
from dalle_torch.pipeline.canvas import UNDRAWN, Canvas

if TYPE_CHECKING:
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.models.drawing_inputs import EncoderCache
    from dalle_torch.models.vqgan import VQGAN

logger = get_logger(__name__)

Progress = bool | Callable[[int, int], None] | None
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How pictures are drawn.

    How tokens are chosen (the first five) is checked where they are, in `models.sampling`.

    Raises:
        ValueError: an option is out of range or contradicts another; every offender is named.
    """

    condition_scale: float = 10.0
    """Weight of the prompt against the empty prompt (super conditioning); 1 is plain drawing, twice as fast."""
    top_k: int | None = None
    """Only the k most likely tokens; None: all."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability; None: all."""
    temperature: float = 1.0
    """Below 1 pictures are more alike, above 1 wilder; 0 takes the most likely token always."""
    compile: bool = False
    """Draw through `torch.compile`: slow to start, then faster."""
    num_images: int = 1
    """Pictures of each prompt."""
    seed: int | tuple[int, ...] = 0
    """Of each prompt's first picture, one for all prompts or one for each; the next one has the next number."""
    batch_size: int | None = None
    """Pictures drawn together; None goes by the free memory. Halved when memory runs out."""
    prefix: Tensor | None = None
    """Codes that pictures begin with, int64 [n], [1, n] or [P, n]."""
    init_image: Image.Image | None = None
    """A picture whose upper part is kept (of its centre square, at the model's resolution) and drawn on."""
    keep_rows: int | None = None
    """Rows of codes of `init_image` that are kept; None: half of them."""
    tile: tuple[int, int] | None = None
    """(rows, columns) of windows of one larger picture: see `canvas.Canvas`."""
    tile_overlap: int | None = None
    """Codes that neighbouring windows share; None: half a window."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("num_images", "batch_size", "keep_rows", "tile_overlap"):
            value = getattr(self, name)
            missing = value is None and name != "num_images"
            if not missing and (not isinstance(value, int) or value < 1):
                problems.append(f"{name}={value!r} must be a whole number of at least 1")
        # The last picture's seed has to be one that can be asked for again.
        highest = MAX_SEED - self.num_images + 1 if isinstance(self.num_images, int) else MAX_SEED
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            if not isinstance(seed, int) or not 0 <= seed <= highest:
                problems.append(f"seed={seed!r} must be a whole number between 0 and {highest}")
                break
        if self.init_image is not None and not isinstance(self.init_image, Image.Image):
            problems.append(f"init_image is a {type(self.init_image).__name__}; open it first, as a PIL image")
        if self.keep_rows is not None and self.init_image is None:
            problems.append(f"keep_rows={self.keep_rows} needs an init_image")
        if self.tile_overlap is not None and self.tile is None:
            problems.append(f"tile_overlap={self.tile_overlap} needs tile")
        if self.prefix is not None and self.init_image is not None:
            problems.append("prefix and init_image both say how pictures begin: give one")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def sampling(self) -> dict[str, Any]:
        """What decides how tokens are chosen."""
        return {name: getattr(self, name) for name in ("condition_scale", "top_k", "top_p", "temperature")}

    def canvas(self, side: int) -> Canvas:
        """The canvas for a model whose grid has `side` codes a side."""
        if self.tile is None:
            return Canvas(side)
        half = max(side // 2, 1)
        return Canvas(side, self.tile, half if self.tile_overlap is None else self.tile_overlap)

    def given_codes(self, vqgan: "VQGAN", prompts: int) -> Tensor | None:
        """The codes that pictures begin with, int64 [1 or P, n] on the CPU; None: nothing is given.

        Raises:
            ValueError: `prefix` or `keep_rows` does not fit the VQGAN.
        """
        side = vqgan.config.latent_size
        if self.init_image is not None:
            rows = max(side // 2, 1) if self.keep_rows is None else self.keep_rows
            if rows >= side:
                raise ValueError(f"keep_rows={rows} must be less than the {side} rows of codes of a picture")
            return vqgan.encode(vqgan.images_to_pixels(self.init_image)).cpu()[:, : rows * side]
        if self.prefix is None:
            return None
        prefix = torch.atleast_2d(torch.as_tensor(self.prefix, device="cpu"))
        wrong = prefix.is_floating_point() or prefix.ndim != 2 or len(prefix) not in (1, prompts)
        if wrong or not 0 < prefix.shape[1] < vqgan.config.image_length:
            raise ValueError(
                f"prefix is {prefix.dtype} of shape {list(prefix.shape)}; it must be integers [1 or {prompts}, n] "
                f"with n between 1 and {vqgan.config.image_length - 1}"
            )
        low, high = (int(bound) for bound in prefix.aminmax())
        if low < 0 or high >= vqgan.config.n_embed:
            raise ValueError(
                f"prefix has codes from {low} to {high}; the VQGAN knows those from 0 to {vqgan.config.n_embed - 1}"
            )
        return prefix.long()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One call of the pipeline, checked and encoded: everything that decides which codes come out."""

    model: "DalleBart"
    options: DrawingOptions
    prompts: list[str]
    inputs: dict[str, Tensor]
    """What the processor made of the prompts, int64 [P, T] each."""
    canvas: Canvas
    given: Tensor | None
    """int64 [1 or P, n]: the codes that the first window begins with."""
    max_token: int
    """Ids from it up are not codes and never drawn."""
    batch_size: int
    after_step: Callable[[], None] | None = None
    encoder_cache: "EncoderCache | None" = None

    @property
    def pictures(self) -> int:
        """P * N, all pictures of the first prompt first."""
        return len(self.prompts) * self.options.num_images

    @property
    def tokens(self) -> int:
        """Tokens that are drawn or given in all windows of all pictures."""
        return self.pictures * len(self.canvas.corners) * self.canvas.window**2

    @property
    def seeds(self) -> list[int]:
        """One a picture; given ones only, so that a picture does not depend on what is drawn beside it."""
        seed = self.options.seed
        first = seed if isinstance(seed, tuple) else (seed,) * len(self.prompts)
        return [number + image for number in first for image in range(self.options.num_images)]

    def run(self, every: int) -> Iterator[tuple[Tensor, int]]:
        """Draw; yields the codes so far every `every` tokens of a batch, and at its end.

        A batch that runs out of memory is begun again, as two.

        Yields:
            int64 [P * N, R, C] with `UNDRAWN`, the same tensor each time, and how many of `tokens` are done.
        """
        codes = torch.full((self.pictures, *self.canvas.shape), UNDRAWN)
        waiting = deque(Batch(0, len(self.prompts), 0, self.options.num_images).split(self.batch_size))
        finished = 0
        while waiting:
            batch = waiting.popleft()
            rows = batch.rows(self.options.num_images)
            try:
                for part, drawn in self._run_batch(batch, every):
                    codes[rows] = part
                    yield codes, finished + drawn * batch.size
            except Exception as error:
                if batch.size == 1 or not is_out_of_memory(error):
                    raise
                limit = -(-batch.size // 2)
            else:
                finished += self.tokens // self.pictures * batch.size
                continue
            # Out of the handler, whose traceback keeps the failed batch's tensors alive.
            logger.warning("out of memory with %d pictures at once: going on with %d", batch.size, limit)
            codes[rows] = UNDRAWN
            waiting = deque(smaller for larger in (batch, *waiting) for smaller in larger.split(limit))

    def finish(self, every: int, report: Callable[[int], None]) -> Tensor:
        """Draw to the end, int64 [P * N, R, C]; `report` is told how many of `tokens` are done."""
        state = None
        for state in self.run(every):
            report(state[1])
        assert state is not None, "there is at least one picture of at least one token"
        return state[0]

    def _run_batch(self, batch: Batch, every: int) -> Iterator[tuple[Tensor, int]]:
        """Codes so far of one batch, int64 [B, R, C], and how many tokens of each picture are done."""
        prompts = slice(batch.first_prompt, batch.last_prompt)
        inputs = {name: ids[prompts].to(self.model.device) for name, ids in self.inputs.items()}
        codes = torch.full((batch.size, *self.canvas.shape), UNDRAWN)
        if self.given is not None:
            given = self.given.expand(len(self.prompts), -1)[prompts].repeat_interleave(batch.images, dim=0)
            self.canvas.put(codes, (0, 0), given)
        generators = [torch.Generator().manual_seed(self.seeds[row]) for row in batch.rows(self.options.num_images)]
        length = self.canvas.window**2
        for number, corner in enumerate(self.canvas.corners):
            forced = self.canvas.cut(codes, corner)
            for tokens in self.model.generate_stream(
                **inputs,
                **self.options.sampling,
                images_per_prompt=batch.images,
                generator=generators,
                forced_tokens=forced if (forced != UNDRAWN).any() else None,
                max_token=self.max_token,
                every=every,
                compile=self.options.compile,
                after_step=self.after_step,
                encoder_cache=self.encoder_cache,
            ):
                # What is given further on in the window stays in sight while it is drawn.
                self.canvas.put(codes, corner, tokens[:, 1:])
                yield codes, number * length + tokens.shape[1] - 1


@contextmanager
def reporting(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes how many tokens of `total` are drawn, and shows or passes it on."""
    if callable(progress):
        yield lambda done: progress(done, total)
    elif progress is False:
        yield lambda done: None
    else:
        with progress_bar(total=total, desc="drawing", unit="token", force=progress is True) as bar:
            # After running out of memory the count steps back.
            yield lambda done: bar.update(done - bar.n) and None
