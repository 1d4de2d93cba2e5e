"""Change settings of a run that goes, or have it save or stop.

Owns: the options of the command, what it prints, how long it waits. Does not own: what can be adjusted and how it gets
there (`training.control`), the folder (`training.run_folder`).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle_torch.config import RunConfig
    from dalle_torch.storage.places import Place
    from dalle_torch.training.control import Answer, Change, Mailbox, Request
    from dalle_torch.training.run_folder import Holder

_PAUSE, _REMOTE_PAUSE = 0.1, 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = _Formatter
    parser.epilog = _EPILOG
    parser.add_argument("run_folder", metavar="RUN", help="folder of the run, or the URL of its checkpoints' folder")
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE | save | stop", help="settings with their new values; "
                        "save a checkpoint now; stop after saving one")  # fmt: skip
    parser.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for the run to "
                        "take it up; 0: not at all")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the settings that can be adjusted, with their values")
    what.add_argument("--history", action="store_true", help="show the changes that were made so far")
    what.add_argument("--show", action="store_true", help="show whether the run goes, and requests that wait for it")
    what.add_argument("--cancel", action="store_true", help="take back all requests that wait")


def run(args: argparse.Namespace) -> int:
    from dalle_torch.training.control import parse_request

    asked = [name for name in ("list", "history", "show", "cancel") if getattr(args, name)]
    if asked and args.words:
        raise ValueError(f"--{asked[0]} goes without settings: leave out {' '.join(args.words)}")
    if not asked and not args.words:
        raise ValueError("say what to do: NAME=VALUE, save or stop; --list shows the names")
    if not args.wait >= 0:
        raise ValueError(f"--wait {args.wait:g} must be at least 0")
    target = _open(args.run_folder)
    if args.list:
        print(_table(_setting_rows(target.config)))
    elif args.history:
        print(_table(_history_rows(target.history)) if target.history else "no setting has been changed so far")
    elif args.show:
        _show(target)
    elif args.cancel:
        cancelled = target.mailbox.cancel()
        print("\n".join(f"taken back: {name}" for name in cancelled) or "nothing waits")
    else:
        return _send(target, parse_request(args.words, target.config), args.wait)
    return 0


@dataclass
class _Target:
    """A run as it can be seen from here."""

    place: "Place"
    config: "RunConfig"
    history: "list[Change]"
    mailbox: "Mailbox"
    holder: "Holder | None"

    @property
    def stopped(self) -> bool:
        """Nothing runs there; behind a URL nobody can tell."""
        return self.holder is None and not self.place.is_remote


def _open(name: str) -> _Target:
    from dalle_torch.storage.places import Place
    from dalle_torch.training.control import History, Mailbox
    from dalle_torch.training.run_folder import RunFolder

    place = Place(name)
    config = _config(place)
    history = History(saved=[change.to_json() for change in _history(place)])
    folder = None if place.path is None else RunFolder(place.path)
    mailbox = Mailbox([f"{place}/control"], remote_seconds=0)
    return _Target(
        place, history.config_at(config), list(history), mailbox, None if folder is None else folder.holder()
    )


def _config(place: "Place") -> "RunConfig":
    from dalle_torch.config import RunConfig
    from dalle_torch.config_io import load_config

    try:
        data = place.read("config.yaml")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{place} has no config.yaml, so it is no folder of a run: name the one that `dalle-torch train` writes to"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "config.yaml"
        copy.write_bytes(data)
        try:
            return load_config(RunConfig, copy)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), f"{place}/config.yaml")) from error


def _history(place: "Place") -> "list[Change]":
    from dalle_torch.training.control import read_history

    try:
        return read_history(place.read("history.jsonl"), f"{place}/history.jsonl")
    except FileNotFoundError:
        return []


def _send(target: _Target, request: "Request", wait: float) -> int:
    for remark in request.unchanged:
        print(remark)
    if request.words and target.stopped:
        raise ValueError(f"nothing is running in {target.place} that could {' and '.join(request.words)}")
    request_id = target.mailbox.send(request)
    if target.stopped:
        print(
            f"nothing is running in {target.place}: the request waits for the run's next start "
            f"(`dalle-torch adjust {target.place} --cancel` takes it back)"
        )
        return 0
    if not wait:
        print(f"sent as {request_id}")
        return 0
    print("waiting for the run to take it up at its next step", file=sys.stderr, flush=True)
    answer = _await(target, request_id, wait)
    if answer is None:
        raise TimeoutError(
            f"no answer in {wait:g} s; the request stays until the run takes it up (`dalle-torch adjust "
            f"{target.place} --cancel` takes it back, --show tells whether it waits)"
        )
    if answer.error is not None:
        raise ValueError(f"the run refuses: {answer.error}")
    for change in answer.changes:
        print(change)
    for word in request.words:
        print(f"step {answer.step}: {'saves a checkpoint' if word == 'save' else 'stops after saving a checkpoint'}")
    if not answer.changes and not request.words:
        print("nothing to change: the run has these values already")
    return 0


def _await(target: _Target, request_id: str, seconds: float) -> "Answer | None":
    end = time.monotonic() + seconds
    pause = _REMOTE_PAUSE if target.place.is_remote else _PAUSE
    while (answer := target.mailbox.answer(request_id)) is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(pause, left))
    return answer


def _show(target: _Target) -> None:
    if target.holder is not None:
        print(f"running: {target.holder}")
    else:
        print("nothing is running" if target.stopped else "whether it runs cannot be seen from here")
    waiting = target.mailbox.pending()
    for request in waiting:
        settings = [f"{name}={value}" for name, value in request.settings.items()]
        print(f"waits: {' '.join([*settings, *request.words])}, sent {request.time} by {request.by}")
    if not waiting:
        print("no request waits")


def _setting_rows(config: "RunConfig") -> Iterable[Sequence[str]]:
    from dalle_torch.training.control import ADJUSTABLE, WORDS, shown, value_of

    yield "NAME", "SHORT", "NOW", "MEANING"
    for setting in ADJUSTABLE.values():
        if not setting.missing(config):
            yield setting.name, setting.short, shown(value_of(config, setting.name)), setting.meaning
    for word, meaning in WORDS.items():
        yield word, "", "", meaning


def _history_rows(history: "Iterable[Change]") -> Iterable[Sequence[str]]:
    from dalle_torch.training.control import shown

    yield "STEP", "TIME", "NAME", "OLD", "NEW", "BY"
    for change in history:
        yield str(change.step), change.time, change.name, shown(change.old), shown(change.new), change.by


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


_EPILOG = """\
A change is checked against the run as it is now, made by all hosts right before the same step, and noted in
RUN/history.jsonl; a run that is killed and goes on from an older checkpoint makes it again at that step.

  dalle-torch adjust runs/mega --list
  dalle-torch adjust runs/mega learning_rate=5e-5 blank_caption_prob=0.1
  dalle-torch adjust runs/mega stop
  dalle-torch adjust gs://bucket/mega eval_every=500 --wait 300
"""
