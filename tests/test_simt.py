"""The emulator of GPUs (tests/simt) finds the faults of blocks that wait for one another.

tests/simt/selftest.cpp has a kernel without faults and the same one with each of them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.check


@pytest.fixture(scope="module")
def simt_lib() -> Path:
    """The emulator, beside the libraries of ggml that it links to."""
    from conftest import _built

    return _built("fasa-simt.so")


def run(simt_lib: Path, name: str) -> tuple[int, str]:
    """Exit status, which is how many of 50 launches give a wrong result, and stderr."""
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).simt_selftest(sys.argv[2].encode()))"
    command = [sys.executable, "-c", code, str(simt_lib), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def test_blocks_meet(simt_lib: Path) -> None:
    assert run(simt_lib, "meet") == (0, "")


@pytest.mark.parametrize(
    "name",
    [
        "missing barrier",
        "missing __syncthreads before arriving",
        "missing __syncthreads after waiting",
        "count too small",
    ],
)
def test_wrong_results(simt_lib: Path, name: str) -> None:
    status, messages = run(simt_lib, name)
    assert (10 <= status <= 50, messages) == (True, ""), status


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("count too large", "waits for ever: 378 threads wait for their block, 0 for their warp, 6 for memory"),
        ("one after the other", "waits for ever: 63 threads wait for their block, 0 for their warp, 1 for memory"),
        ("no release", "waits for what was added without release"),
        ("no release, atomicAdd", "waits for what was added without release"),
        ("no release by one block", "waits for what was added without release"),
        ("no acquire", "waits without acquire"),
        ("too little shared memory", "this block writes behind its shared memory"),
        ("too many blocks", "the device holds 5 blocks at once, not all 6 that wait for one another; it would"),
    ],
)
def test_aborts(simt_lib: Path, name: str, message: str) -> None:
    status, messages = run(simt_lib, name)
    assert status == -signal.SIGABRT
    assert messages.startswith(f"simt: kernel {name}, block (")
    assert message in messages
