"""Devices by name, and a clear word where there is none."""

import os
import sys

import pytest
import torch

from dalle_torch.parallel.runtime import let_devices_wait, pick_device


@pytest.fixture
def nothing_but_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_the_best_there_is(nothing_but_a_cpu, monkeypatch):
    assert pick_device() == pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "word"),
    [("cuda", "CUDA devices found: 0"), ("cuda:1", "cuda:1"), ("mps", "Apple"), ("gpu", "auto, cpu, cuda, mps, xla"),
     ("cuda:x", "cuda:x"), ("", "''"), ("meta", "meta")],
)  # fmt: skip
def test_devices_that_are_not_here_are_refused(nothing_but_a_cpu, name, word):
    with pytest.raises(ValueError, match="device=") as caught:
        pick_device(name)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_xla_without_torch_xla_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ValueError, match="torch_xla"):
        pick_device("xla")


@pytest.mark.parametrize(
    ("device", "devices", "given", "threads"),
    [("CPU", "8", None, "64"), ("CPU", "8", "16", "16"), ("CPU", "1", None, None), ("TPU", "8", None, None)],
)
def test_devices_of_one_cpu_have_threads_to_wait_in(monkeypatch, device, devices, given, threads):
    wanted = {"PJRT_DEVICE": device, "CPU_NUM_DEVICES": devices, "PJRT_NPROC": given}
    environment = {name: value for name, value in wanted.items() if value is not None}
    monkeypatch.setattr(os, "environ", environment)
    let_devices_wait()
    assert environment.get("PJRT_NPROC") == threads
