"""Prompts as they are asked for on a command line and in files.

Owns: lines of text, JSON lines, what is wrong with them. Does not own: what is drawn of them.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_JSON_SUFFIXES = (".jsonl", ".ndjson")
_OBJECT = re.compile(r'\{\s*"')
_SHOWN = 60
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """A prompt, and the seed of its first picture; None: the seed of all that have none."""

    prompt: str
    seed: int | None = None


def read_prompts(given: list[str], file: str | None) -> list[Request]:
    """The prompts of the command line, then those of a file (or stdin, "-"), whose blank lines are left out.

    A file holds a prompt a line; or, if its name ends in .jsonl or its first line begins with `{"`, an object a line:
    "prompt", and "seed" if it has one of its own. What else such an object holds makes no difference.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not text, a line of it is not right, or there is no prompt at all.
    """
    requests = [Request(prompt) for prompt in given]
    if file is not None:
        requests += _parse(_text(file), file)
    if not requests:
        empty = "" if file is None else f"{_name(file)} holds none; "
        raise ValueError(f'no prompt: {empty}name one or more, or --prompts FILE ("" draws whatever comes)')
    return requests


def _parse(text: str, file: str) -> list[Request]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines or not (file.endswith(_JSON_SUFFIXES) or _OBJECT.match(lines[0][1])):
        return [Request(line) for _, line in lines]
    # Other ends of lines than these may stand inside a string.
    rows = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_request(line, f"{_name(file)}, line {number}") for number, line in rows]


def _request(line: str, where: str) -> Request:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f'{where} is no JSON: {_short(line)}; it has to be like {{"prompt": "a cat"}}') from None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'{where} has no "prompt" that is text: {_short(line)}')
    seed = row.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED):
        raise ValueError(f"{where}: seed={seed!r} must be a whole number between 0 and {MAX_SEED}")
    return Request(prompt, seed)


def _text(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{_name(file)} is not UTF-8 text (byte {error.start} cannot be read)") from error


def _name(file: str) -> str:
    return "stdin" if file == "-" else file


def _short(line: str) -> str:
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
