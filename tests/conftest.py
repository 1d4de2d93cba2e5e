"""Settings for every test: no network, no account, no cache of the user's, and no torch_xla unless it is asked for."""

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

XLA_TESTS = os.environ.get("DALLE_TORCH_XLA_TESTS") == "1"
_HOME = Path(tempfile.mkdtemp(prefix="dalle_torch_tests_"))

# Libraries read these when they are imported, so they are set before any test module is.
os.environ["USE_TORCH_XLA"] = "1" if XLA_TESTS else "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if XLA_TESTS:
    # As `parallel.runtime.let_devices_wait`, for tests that start torch_xla by themselves.
    os.environ.setdefault("PJRT_NPROC", "64")
os.environ["HF_HOME"] = str(_HOME / "huggingface")
os.environ["XDG_CACHE_HOME"] = str(_HOME / "cache")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port: nobody listens
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE",
             "WANDB_API_KEY", "DALLE_TORCH_LOG", "RANK", "WORLD_SIZE"):  # fmt: skip
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts so what it puts in the background, and commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `xla` run only where the process was started for them; `cuda` only where there is a GPU."""
    if not XLA_TESTS:
        elsewhere = [item for item in items if item.get_closest_marker("xla")]
        if elsewhere:
            config.hook.pytest_deselected(items=elsewhere)
            items[:] = [item for item in items if item not in elsewhere]
    on_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU here"))


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


def _is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    return name in (None, "", "localhost", "::1", "0.0.0.0", socket.gethostname()) or str(name).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A test that wants to leave this machine fails at once, and says where it wanted to go."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_local(address[0]):
            raise ConnectionRefusedError(f"tests do not use the network: connection to {address}")
        return connect(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise socket.gaierror(socket.EAI_NONAME, f"tests do not use the network: look-up of {host}")
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on this machine, which huggingface_hub uses during the test, with an empty cache of the test's own.

    `hub.add_repo("name/repo", folder)` serves a folder; `refuse`, `cut` and `stop` make it fail. See `HubServer`.
    """
    from tests.hub_server import HubServer

    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "hf_home")
        yield server
