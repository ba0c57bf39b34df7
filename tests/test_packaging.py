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


def test_notices_lie_beside_what_they_are_of() -> None:
    """Whoever gives the libraries and programs away has to name what of others is in them."""
    texts = {path.name: path.read_text("utf-8") for path in lib_dir().glob("LICENSE*")}
    wanted = {"llama.cpp": "ggml authors", "llamafile": "Mozilla", "xxHash": "Yann Collet", "rotate-bits": "Casarin"}
    if any(lib_dir().glob("fasa-llama-*")):
        wanted |= {"cpp-httplib": "yhirose", "nlohmann-json": "Niels Lohmann"}
    for name, author in wanted.items():
        assert author in texts[f"LICENSE.{name}"] and "copyright notice" in texts[f"LICENSE.{name}"]


def test_notices_of_the_web_ui(tmp_path: Path) -> None:
    """Packages that its sources import, with what these depend on, each as deep as npm puts it; no others."""
    ui, modules = tmp_path / "ui", tmp_path / "ui/node_modules"
    (ui / "src/vendors/copied.js").mkdir(parents=True)
    (ui / "src/vendors/copied.js/LICENCE.md").write_text("text of copied.js")
    (ui / "src/page.svelte").write_text("import { a } from '@scope/a/part';\nimport b from \"b\";\nimport '../styles';")
    (ui / "src/styles.css").write_text("@import 'c';")
    packages = {
        "@scope/a": ("1.0", "MIT", {"b": "2", "vite": "7"}),
        "@scope/a/node_modules/b": ("2.0", "ISC", {}),
        "b": ("1.5", "BSD-3-Clause", {"absent": "1"}),
        "c": ("3.0", {"type": "Apache-2.0"}, {}),
        "vite": ("7.0", "MIT", {}),
        "unused": ("1.0", "MIT", {}),
        "workbox-core": ("7.4", "MIT", {}),
    }
    for path, (version, licence, depends) in packages.items():
        folder, name = modules / path, path.rpartition("node_modules/")[2]
        folder.mkdir(parents=True)
        package = {
            "name": name,
            "version": version,
            "license": licence,
            "dependencies": depends,
            "author": f"who made {name}",
        }
        (folder / "package.json").write_text(json.dumps(package))
        if name != "c":
            (folder / "LICENSE").write_text(f"text of {name} {version}")
    script = Path(__file__).resolve().parents[1] / "patches/programs/ui_notices.py"
    subprocess.run([sys.executable, script, ui, tmp_path / "out"], check=True)
    _, *notices = (tmp_path / "out").read_text().split(f"\n\n{'-' * 80}\n\n")
    assert [notice.strip().replace("\n\n", "|") for notice in notices] == [
        "@scope/a 1.0: MIT|text of @scope/a 1.0",
        "b 1.5: BSD-3-Clause|text of b 1.5",
        "b 2.0: ISC|text of b 2.0",
        "c 3.0: Apache-2.0|who made c",
        "copied.js|text of copied.js",
        "workbox-core 7.4: MIT|text of workbox-core 7.4",
    ]


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
