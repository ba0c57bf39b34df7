"""Functions called in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fasa_edge.errors import FasaError, ModelError
from fasa_edge.runtime import child, planning

import psutil
import pytest

pytestmark = pytest.mark.check

PATIENCE = 60  # seconds; nothing takes so long


def test_what_it_returns_and_raises(tmp_path: Path) -> None:
    assert child.call(os.getpid) not in (os.getpid(), 0)
    assert child.call(sorted, [2, 1], reverse=True) == [2, 1]
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="x.gguf cannot be loaded"):
        child.call(planning.plan, tmp_path / "x.gguf")


def test_what_it_prints_is_no_answer() -> None:
    assert child.call(print, "no answer", flush=True) is None
    assert child.call(os.write, 1, b"no answer") == 9


def test_one_that_ends() -> None:
    for end in (os.abort, os._exit):
        with pytest.raises(FasaError, match="ended its process with status"):
            child.call(end, *[3] * (end is os._exit))


@pytest.mark.skipif(os.name != "posix", reason="on Windows a process is not tied to who asks (fasa_edge.runtime.child)")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_outlives_who_asks(name: str) -> None:
    code = """
import signal, time
from fasa_edge.cli.signals import unwound_by_signals
from fasa_edge.runtime import child
signal.signal(signal.SIGINT, signal.default_int_handler)
with unwound_by_signals():
    child.call(time.sleep, 600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + PATIENCE
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        process.wait(PATIENCE)
    assert not psutil.wait_procs(children, PATIENCE)[1]
