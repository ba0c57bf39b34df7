"""The installed libraries work from any directory."""

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
