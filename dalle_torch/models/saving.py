"""`save_pretrained` for our models: files that are whole, and readable by whom the umask lets read.

Owns: where the files of a saving go. Does not own: what is in them (transformers), the way back (`loading`).
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from dalle_torch.models.packing import BlockedLinear, Int8Linear
from dalle_torch.storage import atomic_file

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class SavedModel(PreTrainedModel):
    """A `PreTrainedModel` whose files are whole when they appear."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and the weights; each file in `save_directory` is the old one or the new one, whole.

        Args:
            save_directory: made if need be; files of other names stay, weights of an earlier saving go.
            is_main_process: False writes nothing, beside another process that saves the same model.
            state_dict: instead of the model's own.
            push_to_hub: also upload what was written, to the repository `repo_id`, by default named like the folder.
            **kwargs: of transformers' `save_pretrained`: `max_shard_size`, `repo_id`, `token`, `commit_message` ...

        Raises:
            ValueError: the model is packed for drawing and has no weights to save; nothing is written.
            OSError: something cannot be written.
        """
        folder = Path(save_directory).expanduser()
        self._refuse_packed()
        if kwargs.get("distributed_checkpoint"):  # every process writes into the one folder
            super().save_pretrained(folder, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        repository = _taken(kwargs, "repo_id", "token", "private")
        commit = _taken(kwargs, "commit_message", "create_pr")
        with files_in_their_places(folder) as place, _bars_on_terminals_only():
            super().save_pretrained(place, is_main_process, state_dict, **kwargs)
            names = sorted(path.name for path in place.iterdir())
        if push_to_hub and is_main_process:
            _upload(folder, names, {"repo_id": folder.resolve().name} | repository, commit)

    def _refuse_packed(self) -> None:
        packed = [name for name, module in self.named_modules() if isinstance(module, (BlockedLinear, Int8Linear))]
        if packed:
            raise ValueError(
                f"{len(packed)} layers ({packed[0]}, ...) are packed for drawing and hold no weights to save: "
                "load the model again, and save it before it is packed"
            )


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """transformers shows its bars in log files too."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def files_in_their_places(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to save a model to; on success each of its files takes its place in `folder`.

    Weights of an earlier saving that are not written again are removed.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: something cannot be written; safetensors' own error becomes one.
    """
    from safetensors import SafetensorError

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder to save the model to")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as name:
        place = Path(name)
        try:
            yield place
        except SafetensorError as error:
            raise OSError(f"{folder}: the weights cannot be written: {error}") from error
        files = sorted(place.iterdir())
        _let_read(place, files)
        for file in files:
            with atomic_file(folder / file.name) as target:
                file.replace(target)
    _remove_older_weights(folder, {file.name for file in files})


def _let_read(place: Path, files: list[Path]) -> None:
    """Give weights, which safetensors writes for their owner alone, the access rights of any other new file."""
    probe = place / ".mode"  # the umask itself cannot be read without changing it
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in files:
        if file.suffix == ".safetensors":
            file.chmod(mode)


def _remove_older_weights(folder: Path, written: set[str]) -> None:
    """Another number of files would else be read in place of what was written, or lie beside it."""
    if written & {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME}:
        for path in folder.iterdir():
            if path.name not in written and _WEIGHT_FILES.fullmatch(path.name):
                path.unlink()


def _taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def _upload(folder: Path, names: list[str], repository: dict[str, Any], commit: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=repository.pop("token", None))
    name = api.create_repo(**repository, exist_ok=True).repo_id
    api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=names, **commit)
