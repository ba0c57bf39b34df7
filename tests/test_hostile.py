"""Short forms of `make fuzz` and `make soak`, on the installed libraries: the same cases each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASES = {"profiles": 1500, "headers": 800, "states": 500, "settings": 500, "ops": 400}


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, TESTS / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("kind", "cases"), CASES.items())
def test_hostile_inputs(kind: str, cases: int) -> None:
    assert f"{kind}: {cases} cases" in run("fuzz.py", "--seed", "1", "--cases", str(cases), "--seconds", "600", kind)


def test_a_long_life() -> None:
    assert "8000 turns" in run("soak.py", "--seed", "1", "--steps", "8000")
