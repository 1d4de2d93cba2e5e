"""A command that draws starts without the compiler, and can have it afterwards."""

import os
import subprocess
import sys

CODE = """
import sys
from dalle_torch.cli._startup import import_models

import_models()
heavy = ("torch._dynamo", "torch._inductor", "sympy", "torchvision", "torch_xla")
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]

import torch
from transformers.modeling_utils import PreTrainedModel

assert torch.compiler.disable.__module__ == "torch.compiler", "what was put aside is back"
assert torch.compile(lambda x: x * 2, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert sys.modules["torch._dynamo"] is torch._dynamo
assert torch._dynamo.__spec__ is not None
import torchvision

import_models()
print("fine")
"""


def test_the_compiler_comes_in_when_it_is_used_and_not_before():
    environment = os.environ | {"USE_TORCH_XLA": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_functions_are_kept_from_the_compiler_when_first_called():
    from dalle_torch.cli._startup import _disable_later

    disabled = []

    def disable(function, recursive, *, reason=None):
        disabled.append((function.__name__, recursive, reason))
        return function

    def add(a, b):
        return a + b

    plain = _disable_later(disable, add)
    with_options = _disable_later(disable, recursive=False, reason="views")(add)
    assert (plain.__name__, disabled) == ("add", [])
    assert plain(1, b=2) == plain(2, 1) == with_options(1, 2) == 3
    assert disabled == [("add", True, None), ("add", False, "views")]
