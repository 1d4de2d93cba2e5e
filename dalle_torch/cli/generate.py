"""Draw pictures from prompts.

Owns: the options of the command, where prompts come from, where pictures go. Does not own: drawing (`pipeline`), files
(`output`).
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

_MAX_NAMES = 10
_SMALL_MODEL = 20_000_000  # parameters; a step of fewer is over before threads have met, and they spin till they do
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='what to draw; "" draws whatever comes')
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; - reads them from stdin")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures drawn at once; by default what fits")
    parser.add_argument("--init-image", metavar="FILE", help="a picture whose upper part is kept and drawn on")
    parser.add_argument("--keep-rows", type=int, metavar="N", help="rows of codes kept of it; by default half of them")
    parser.add_argument("--tile", type=_tile, metavar="ROWSxCOLUMNS", help="one larger picture of so many windows")
    parser.add_argument("--rank-with", metavar="CLIP", help="hub id or folder of a CLIP model that puts the best first")
    parser.add_argument("--num-best", type=int, metavar="N", help="with --rank-with: keep the N best of each prompt")
    parser.add_argument("--output", default="out", metavar="DIR", help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures of the same name, not number them")


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
    prompts = read_prompts(args.prompts, args.prompts_file)
    init_image = None if args.init_image is None else _read_image(args.init_image)
    drawing = {name: getattr(args, name) for name in ("num_images", "batch_size", "keep_rows", "tile")}
    check_options(args, init_image=init_image, **drawing)
    with writable_folder(args.output) as folder:
        pipe = load_pipeline(args, image_processors=args.rank_with is not None)
        output = pipe(
            prompts,
            rank_with=args.rank_with,
            num_best=args.num_best,
            init_image=init_image,
            **drawing,
            **sampling_options(args),
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


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of a file (or stdin, "-"), whose blank lines are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not text, or there is no prompt at all.
    """
    prompts = list(given)
    if file is not None:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            name = "stdin" if file == "-" else file
            raise ValueError(f"{name} is not UTF-8 text (byte {error.start} cannot be read)") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('no prompt: name one or more, or --prompts-file FILE ("" draws whatever comes)')
    return prompts


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
