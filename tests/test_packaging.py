"""The installed libraries work from any directory; what the Makefile remembers was built."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fasa_edge.runtime.library import lib_dir

import pytest

pytestmark = pytest.mark.check


def test_libraries_are_relocatable(tmp_path: Path) -> None:
    assert not [path for path in lib_dir().rglob("*") if path.is_symlink()]  # wheels hold none
    copy = tmp_path / "somewhere else"
    shutil.copytree(lib_dir(), copy)
    report = json.loads(
        subprocess.run(
            [sys.executable, "-c", "from fasa_edge.cli import main; main()", "doctor", "--json"],
            cwd=tmp_path,
            env=os.environ | {"FASA_LIB_PATH": str(copy)},
            check=True,
            capture_output=True,
        ).stdout
    )
    # None where the system does not tell
    mapped = [report["libllama"], report["libggml_base"], *(report["cpu_backend"] or [])]
    assert {Path(path).parent for path in mapped} == {copy.resolve()}


def test_what_failed_is_not_kept(tmp_path: Path) -> None:
    """Programs and the web UI are built again by `make install` once they were built, not where that failed."""
    venv, root = tmp_path / "venv", Path(__file__).resolve().parents[1]
    (venv / "bin").mkdir(parents=True)
    for name in (".tools", ".bindings", ".node", ".installed"):
        (venv / name).touch()
    (venv / ".cmake-args").write_text("\n")
    python = venv / "bin/python"  # its only task is pip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def make(target: str, *, fails: bool) -> str:
        python.write_text(f"#!/bin/sh\necho $@\nexit {int(fails)}\n")
        python.chmod(0o755)
        command = ["make", "-C", str(root), f"VENV={venv}", f"BIN={venv}/bin", "CMAKE_ARGS=", target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout

    def built() -> set[str]:
        return {path.name for path in venv.iterdir()} & {".installed", ".programs", ".ui"}

    for target in ("programs", "ui"):
        make(target, fails=True)
        assert built() == set()
    (venv / ".installed").touch()
    assert "FASA_PROGRAMS=ON" in make("programs", fails=False) and built() == {".installed", ".programs"}
    said = make("ui", fails=True)
    assert "FASA_PROGRAMS=ON" in said and "LLAMA_BUILD_UI=ON" in said and built() == {".programs"}
    said = make("install", fails=False)
    assert "FASA_PROGRAMS=ON" in said and "LLAMA_BUILD_UI=OFF" in said
    assert "LLAMA_BUILD_UI=ON" in make("ui", fails=False) and built() == {".installed", ".programs", ".ui"}
