"""What asks a run to stop: real signals, and a server that stands for Google's metadata."""

import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dalle_torch.training import signals
from dalle_torch.training.signals import stop_requests


@pytest.mark.parametrize(("signum", "reason"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_is_a_request_and_not_an_end(signum: int, reason: str) -> None:
    before = signal.getsignal(signum)
    with stop_requests() as request:
        assert request.reason is None
        os.kill(os.getpid(), signum)
        assert request.reason == reason
    assert signal.getsignal(signum) is before


def test_the_second_ctrl_c_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_a_sigterm_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.reason == "terminated"
        os.kill(os.getpid(), signal.SIGINT)


def test_off_the_main_thread_signals_are_left_alone() -> None:
    found = []

    def work() -> None:
        with stop_requests() as request:
            found.append(request.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch):
    """A metadata server; its answers are taken from a list, the last one for ever."""
    answers, asked = ["FALSE"], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Metadata-Flavor")))
            body = (answers.pop(0) if len(answers) > 1 else answers[0]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(signals, "PREEMPTION_INTERVAL", 0.01)
    yield answers, asked
    server.shutdown()
    server.server_close()


def _wait_for(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_preempted_machine_is_a_request(metadata) -> None:
    answers, asked = metadata
    answers[:] = ["FALSE", "FALSE", "TRUE"]
    with stop_requests(watch_preemption=True) as request:
        assert _wait_for(lambda: request.reason == "preempted")
    assert asked[0] == ("/computeMetadata/v1/instance/preempted", "Google")


def test_a_machine_that_stays_is_watched_until_the_end(metadata) -> None:
    _, asked = metadata
    with stop_requests(watch_preemption=True) as request:
        assert _wait_for(lambda: len(asked) > 2)
        assert request.reason is None
    assert _wait_for(lambda: all(thread.name != "preemption" for thread in threading.enumerate()))


def test_elsewhere_than_on_google_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with stop_requests(watch_preemption=True) as request:
        assert _wait_for(lambda: all(thread.name != "preemption" for thread in threading.enumerate()))
        assert request.reason is None
