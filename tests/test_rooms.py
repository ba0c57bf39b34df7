"""Who may import whom in the Python sources, and that they run where they lie."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.check

ROOT = Path(__file__).resolve().parent.parent

BELOW = {"config": {"errors"}, "schema": {"config", "errors"}}
BELOW["io"] = {"schema", *BELOW["schema"]}
BELOW["runtime"] = {"io", "version", *BELOW["io"]}
BELOW["bench"] = BELOW["eval"] = {"runtime", *BELOW["runtime"]}
BELOW["convert"] = {"eval", *BELOW["eval"]}
BELOW["cli"] = {"", "bench", *BELOW["bench"], "convert", *BELOW["convert"]}
BELOW[""] = {"runtime", *BELOW["runtime"]}
"""By room what its files import besides each other; "" is ``fasa_edge/__init__.py``, which everything runs first."""


def sources() -> Iterator[tuple[str, Path]]:
    """All of them, each with its room."""
    for path in sorted((ROOT / "fasa_edge").rglob("*.py")):
        first = path.relative_to(ROOT / "fasa_edge").parts[0]
        yield "" if first == "__init__.py" else first.removesuffix(".py"), path
    for path in sorted((ROOT / "convert").rglob("*.py")):
        yield "convert", path


def imported(path: Path) -> Iterator[str]:
    """The rooms from which a file imports, also inside of functions and for types alone."""
    here = path.relative_to(ROOT).with_suffix("").parts
    here = here if here[0] == "fasa_edge" else ("fasa_edge", *here)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join([*here[: len(here) - node.level], *([node.module] if node.module else [])])
            module = module if node.level else node.module
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fasa_edge" else [module]
        else:
            continue
        for package, *room in (name.split(".") for name in names):
            if package == "fasa_edge":
                yield room[0] if room else ""


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other or 'fasa_edge'}"
        for room, path in sources()
        for other in imported(path)
        if other != room and other not in BELOW.get(room, set())
    ]
    assert not wrong


def test_every_source_is_in_a_room_that_is_known() -> None:
    assert {room for room, _ in sources()} == {*BELOW, "errors", "version"}


@pytest.mark.parametrize(
    "code",
    [
        "import fasa_edge.convert; print(fasa_edge.convert.convert.__module__, fasa_edge.convert.__file__)",
        "from fasa_edge.convert import checkpoint; assert checkpoint._SCRIPT.is_file(); print(checkpoint.__file__)",
        "from fasa_edge.cli import main; print(__import__('fasa_edge').__file__); main(['doctor'])",
        "import fasa_edge; from fasa_edge import errors, convert; print(fasa_edge.Llama, convert.__file__)",
    ],
)
def test_the_sources_run_on_the_installed_library(code: str) -> None:
    """Scripts started in the clone's top folder import from there."""
    environment = {name: value for name, value in os.environ.items() if name != "FASA_LIB_PATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) in done.stdout


def test_the_sources_are_what_is_imported_there() -> None:
    code = "import fasa_edge, fasa_edge.convert as c; print(fasa_edge.__file__); print(c.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert list(map(Path, done.stdout.splitlines())) == [ROOT / "fasa_edge/__init__.py", ROOT / "convert/__init__.py"]


def test_users_load_no_reference() -> None:
    assert not list((ROOT / "fasa_edge").rglob("*reference*.py"))
