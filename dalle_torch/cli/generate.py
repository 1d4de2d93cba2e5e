"""Draw pictures from prompts.

Owns: the options of the command, where pictures go. Does not own: where prompts come from (`studies.prompts`), drawing
(`pipeline`), files of a few pictures (`output`) and of many (`studies.gallery`).
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from dalle_torch.pipeline import DallePipeline
    from dalle_torch.studies.prompts import Request

_MAX_NAMES = 10
_MANY_PROMPTS = 32
"""Of a file; more of them make a gallery."""
_SMALL_MODEL = 20_000_000  # parameters; a step of fewer is over before threads have met, and they spin till they do
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='what to draw; "" draws whatever comes')
    parser.epilog = (
        f"More than {_MANY_PROMPTS} prompts of a file, or --gallery, are drawn in portions: DIR gets pictures/ and "
        "results.jsonl as they are finished and gallery.html at the end, and the same command goes on where it was "
        "interrupted."
    )
    parser.add_argument("--prompts", "--prompts-file", dest="prompts_file", metavar="FILE",
                        help='more prompts, one a line, or JSON lines with "prompt" and, if need be, "seed"; - reads '
                        "them from stdin")  # fmt: skip
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures drawn at once; by default what fits")
    parser.add_argument("--init-image", metavar="FILE", help="a picture whose upper part is kept and drawn on")
    parser.add_argument("--keep-rows", type=int, metavar="N", help="rows of codes kept of it; by default half of them")
    parser.add_argument("--tile", type=_tile, metavar="ROWSxCOLUMNS", help="one larger picture of so many windows")
    parser.add_argument("--rank-with", metavar="JUDGE",
                        help="who puts the best first: hub id or folder of a CLIP model, "
                        "open_clip:ARCHITECTURE:FILE, or shapes")  # fmt: skip
    parser.add_argument("--num-best", type=int, metavar="N", help="with --rank-with: keep the N best of each prompt")
    parser.add_argument("--output", default="out", metavar="DIR", help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace pictures of the same name, not number them; a gallery is begun anew")  # fmt: skip
    parser.add_argument("--gallery", action="store_true", help="make a gallery of a few prompts too")
    parser.add_argument("--wandb", metavar="PROJECT",
                        help="make a gallery, and log it as a table; WANDB_MODE=offline keeps it here")  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say what draws, and on what."""
    parser.add_argument("--model", default="shapes", help="the embedded model shapes, a hub id, a folder, an artifact")
    parser.add_argument("--vqgan", help="the same for the VQGAN; by default the model's own, else that of DALL·E Mini")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    parser.add_argument("--subfolder", default="", help="folder inside the source that holds the model")
    parser.add_argument("--vqgan-revision", help="branch, tag or commit of the VQGAN, if it has a hub id of its own")
    parser.add_argument("--trust-pickle", action="store_true", help="read .pt and .ckpt files, which can run any code")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32, on a GPU bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps or xla")
    parser.add_argument("--quantize", choices=("int8",), help="decoder weights in 8 bits, on the CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile: slow to start, then faster")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, seed: bool = True) -> None:
    """Options that say how tokens are chosen; `seed`: and from which random numbers."""
    parser.add_argument("--condition-scale", type=float, metavar="S", help="weight of the prompt; default: the model's")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens; by default all")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that reach P together")
    parser.add_argument("--temperature", type=float, metavar="T", help="below 1 tamer, above 1 wilder, 0 greedy")
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="of each prompt's first picture; the next has the next")


def run(args: argparse.Namespace) -> int:
    from dalle_torch.studies.prompts import read_prompts

    requests = read_prompts(args.prompts, args.prompts_file)
    init_image = None if args.init_image is None else _read_image(args.init_image)
    drawing = {name: getattr(args, name) for name in ("num_images", "batch_size", "keep_rows", "tile")}
    check_options(args, init_image=init_image, **drawing)
    many = args.prompts_file is not None and len(requests) > _MANY_PROMPTS
    if many or args.gallery or args.wandb is not None:
        return _gallery(args, requests, init_image=init_image, **drawing)
    with writable_folder(args.output) as folder:
        pipe = load_pipeline(args, image_processors=args.rank_with is not None)
        output = pipe(
            [request.prompt for request in requests],
            rank_with=args.rank_with,
            num_best=args.num_best,
            init_image=init_image,
            **drawing,
            **sampling_options(args) | {"seed": _seeds(requests, args.seed)},
        )
        output.settings["model_hash"] = pipe.model_hash
        if args.init_image is not None:
            output.settings["init_image"] = Path(args.init_image).name
        paths = output.save(folder, overwrite=args.overwrite)
    count = len(output.images)
    names = [path.name for path in paths]
    if len(names) > _MAX_NAMES:
        names = [*names[: _MAX_NAMES - 2], "...", names[-1]]
    print(f"{count} picture{'s' if count > 1 else ''} in {folder}{os.sep}: {', '.join(names)}")
    return 0


def _gallery(args: argparse.Namespace, requests: "list[Request]", **drawing: Any) -> int:
    from dalle_torch.cli._startup import import_models

    import_models(image_processors=args.rank_with is not None)
    from dalle_torch.config import TrackingConfig
    from dalle_torch.evaluation.loading import load_scorer
    from dalle_torch.parallel.runtime import pick_device
    from dalle_torch.pipeline.ranking import check_prompts
    from dalle_torch.storage import sha256_of
    from dalle_torch.studies.gallery import make_gallery

    if args.num_best is not None and args.rank_with is None:
        raise ValueError(f"num_best={args.num_best} needs --rank-with")
    tracking = None
    if args.wandb is not None:
        mode: Any = "offline" if os.environ.get("WANDB_MODE") == "offline" else "online"
        tracking = TrackingConfig(wandb=mode, project=args.wandb)
    about = {} if args.init_image is None else {"init_image": sha256_of(Path(args.init_image).expanduser())}
    with writable_folder(args.output) as folder:
        device = pick_device(args.device)
        scorer = None if args.rank_with is None else load_scorer(args.rank_with, device=device)
        check_prompts(scorer, [request.prompt for request in requests])
        made = make_gallery(
            load_pipeline(args, image_processors=args.rank_with is not None), requests, folder, scorer=scorer,
            num_best=args.num_best, overwrite=args.overwrite, tracking=tracking, about=about, **drawing,
            **sampling_options(args),
        )  # fmt: skip
    pages = f" and {len(made.pages) - 1} more" if len(made.pages) > 1 else ""
    before = f", {made.pictures - made.drawn} of them drawn before" if made.drawn < made.pictures else ""
    count = f"{made.pictures} picture{'s' if made.pictures > 1 else ''}"
    print(f"{count} in {folder}{os.sep}{before}: results.jsonl, {made.pages[0].name}{pages}")
    return 0


def _seeds(requests: "list[Request]", seed: int) -> int | list[int]:
    """One for all where none has its own."""
    if all(request.seed is None for request in requests):
        return seed
    return [seed if request.seed is None else request.seed for request in requests]


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_arguments` took, and `--compile`, as options of a call of the pipeline."""
    names = ("condition_scale", "top_k", "top_p", "temperature", "seed", "compile")
    return {name: getattr(args, name) for name in names}


def check_options(args: argparse.Namespace, **drawing: Any) -> None:
    """Refuse what no model could do before one is loaded, which may take a long download.

    Raises:
        ValueError: an option is out of range.
    """
    from dalle_torch.models.sampling import SamplingOptions
    from dalle_torch.pipeline.drawing import DrawingOptions

    given = {name: value for name, value in sampling_options(args).items() if value is not None}
    DrawingOptions(**given, **drawing)
    SamplingOptions(**{name: value for name, value in given.items() if name not in ("seed", "compile")})


def load_pipeline(args: argparse.Namespace, *, image_processors: bool = False, pack: bool = True) -> "DallePipeline":
    """The pipeline that `add_model_arguments` describes, on its device.

    Args:
        image_processors: the command will use transformers' image processors.
        pack: rearrange weights for drawing on the CPU; a packed model does nothing else.
    """
    from dalle_torch.cli._startup import import_models

    import_models(image_processors=image_processors)
    import torch
    from transformers.utils import logging

    from dalle_torch.models.packing import can_pack
    from dalle_torch.parallel.runtime import pick_device
    from dalle_torch.pipeline import DallePipeline

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = pick_device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type in ("cuda", "xla") else "float32"
    pipe = DallePipeline.from_pretrained(
        args.model, args.vqgan, dtype=dtype, device=device, revision=args.revision, subfolder=args.subfolder,
        vqgan_revision=args.vqgan_revision, trust_pickle=args.trust_pickle,
    )  # fmt: skip
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and pipe.model.num_parameters() < _SMALL_MODEL:
        torch.set_num_threads(1)
    # The compiler has layouts of its own.
    if pack and (args.quantize or (can_pack(pipe.model) and not args.compile)):
        pipe.pack(args.quantize)
    return pipe


@contextmanager
def writable_folder(name: str) -> Iterator[Path]:
    """A folder that is known to take files before hours are spent on them; one that was made and got none goes again.

    Raises:
        OSError: nothing can be written there.
    """
    folder = Path(name).expanduser()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"cannot write to --output {name}: {error.strerror or error}") from error
    try:
        yield folder
    except BaseException:
        for path in made:
            try:
                path.rmdir()
            except OSError:
                break
        raise


def _read_image(name: str) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(name).expanduser()) as image:
            image.load()
            return image.copy()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that can be read") from error
    except (SyntaxError, OSError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{name} is a damaged or oversized picture: {error}") from error


def _tile(text: str) -> tuple[int, int]:
    rows, separator, columns = text.lower().partition("x")
    if not (separator and rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCOLUMNS, such as 2x3")
    return int(rows), int(columns)
