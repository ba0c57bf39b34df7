"""Waiting for a llama-server: for as long as it gets on. Programs in Python stand in for it."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from fasa_edge.errors import FasaError
from fasa_edge.runtime import serving

import pytest

pytestmark = pytest.mark.programs


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of Python in the place of llama-server."""

    def put(text: str) -> None:
        path = tmp_path / "llama-server"
        path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setattr(serving, "find_program", lambda name: path)

    return put


def test_one_that_hangs(program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    program("import time; time.sleep(600)")
    monkeypatch.setattr(serving, "_PATIENCE", 1)
    port = serving.free_port("127.0.0.1", 0)
    with pytest.raises(FasaError, match=f"neither answers on port {port} of 127.0.0.1 nor does anything since 1 sec"):
        with serving.running("127.0.0.1", port, []):
            pass


def test_one_that_takes_long_but_works(program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for as long as it works: here it allocates until it has had its way with patience several times."""
    program("import sys, time\nfor i in range(40): kept = bytearray(4 << 20) * (i + 1); time.sleep(0.1)\nsys.exit(7)")
    monkeypatch.setattr(serving, "_PATIENCE", 1)
    with pytest.raises(FasaError, match="ended with status 7 before it could answer"):
        with serving.running("127.0.0.1", serving.free_port("127.0.0.1", 0), []):
            pass


def test_asking_whether_it_answers_is_no_work_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs while it answers 503 is given up, although each answer, behind TLS, takes CPU time of it."""
    clock, cpu_time = [0.0], [0.0]

    class Hanging:
        def wait(self, seconds: float) -> int:
            clock[0] += seconds
            assert clock[0] < 10 * serving._PATIENCE, "it is waited for without end"
            raise subprocess.TimeoutExpired("llama-server", seconds)

    def answers(*_: object) -> bool:
        cpu_time[0] += 0.01  # a handshake of a certificate of 4096 bits
        return False

    monkeypatch.setattr(serving.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(serving, "_answers", answers)
    monkeypatch.setattr(serving, "_work", lambda process: (cpu_time[0], 0, 0))
    with pytest.raises(FasaError, match="neither answers on port 8080 of 127.0.0.1 nor does anything"):
        serving._wait_for(Hanging(), "127.0.0.1", 8080, serving.ServerOptions([], {}))
    assert clock[0] < 1.2 * serving._PATIENCE


def test_another_server_is_not_taken_for_it(program: Callable[[str], None]) -> None:
    """It came between the look whether the port is free and the start, and answers at once."""

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    program("import sys, time; time.sleep(2); sys.exit(9)")  # until it finds that
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        try:
            with pytest.raises(FasaError, match="ended with status 9 before it could answer"):
                with serving.running("127.0.0.1", other.server_address[1], []):
                    pass
        finally:
            other.shutdown()
