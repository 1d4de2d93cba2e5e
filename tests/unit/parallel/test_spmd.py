"""Off torch_xla, laying out changes nothing and loads nothing."""

import subprocess
import sys

import torch
from torch import nn

from dalle_torch.parallel.rules import Spec
from dalle_torch.parallel.spmd import check_layout, mark, mark_gradients, place, spec_lookup

SPECS: dict[str, Spec] = {"weight": ("mp", None), "bias": (None,)}


def test_it_is_the_identity() -> None:
    model = nn.Linear(4, 3)
    parameters, values = list(model.parameters()), model.weight.detach().clone()
    assert place(model, torch.device("cpu"), None, SPECS) is model
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    model(torch.ones(2, 4)).sum().backward()
    gradient = model.weight.grad
    mark_gradients(model, None, SPECS)
    check_layout(model, None, SPECS)
    assert model.weight.grad is gradient
    assert torch.equal(model.weight, values)
    tensor = torch.ones(2)
    assert mark(tensor, None, ("mp",)) is tensor


def test_a_model_goes_to_its_device() -> None:
    assert place(nn.Linear(4, 3), torch.device("meta"), None, SPECS).weight.is_meta


def test_parameters_find_their_specs() -> None:
    model = nn.Linear(4, 3)
    spec_of = spec_lookup(model, SPECS)
    assert [spec_of(parameter) for parameter in model.parameters()] == [("mp", None), (None,)]


def test_nothing_of_torch_xla_is_imported() -> None:
    code = (
        "import sys, torch; from torch import nn; from dalle_torch.parallel import mesh, rules, spmd; "
        "spmd.place(nn.Linear(2, 2), torch.device('cpu'), None, {}); print('torch_xla' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
