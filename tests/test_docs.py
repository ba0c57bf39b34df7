"""The README stays short, and what it and docs/ name is there: links, commands, make targets, files, Python names."""

import ast
import json
import pkgutil
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

from fasa_edge.bench.models import BenchRow
from fasa_edge.cli import main

import click
import pytest
from server_suite.unlike import EXCLUDED, TEXTS

pytestmark = pytest.mark.check

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "ggml_kernels/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_LINES, MAX_COLUMNS = 120, 120

INSTALLED = ["fasa_edge/llama.cpp/"]  # what no source tree has

FOREIGN = {  # options of other programs that stand by themselves
    "-b": "test-backend-ops",
    "-fa": "llama.cpp",
    "-fit": "llama.cpp",
    "--cache-ram": "llama-server",
    "--context-shift": "llama-server",
    "--fasa": "llama-server",
    "--fasa-budget": "llama-server",
    "--fasa-profile": "llama-server",
    "--kv-unified": "llama-server",
    "--metrics": "llama-server",
    "--no-mangle-all": "delvewheel",
    "--prune-layers": "llama-quantize",
    "--slot-save-path": "llama-server",
    "--split-mode": "llama.cpp",
    "-hf": "llama.cpp",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?|-[a-z]{1,3}")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def without_code(text: str) -> str:
    return _SPAN.sub("", _FENCED.sub("", text))


def headings(page: Path) -> set[str]:
    """Anchors, as repositories' sites make them of headings."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code(page: Path) -> Iterator[str]:
    """Code spans, and each line of a block that is shell or has no language."""
    text = page.read_text(encoding="utf-8")
    for language, block in _FENCED.findall(text):
        if language in ("", "sh"):
            yield from block.replace("\\\n", " ").splitlines()
    text = _FENCED.sub("", text)
    yield from (line.strip() for line in re.findall(r"^    (\S.*)$", text, re.M))
    yield from _SPAN.findall(text)


def words(line: str) -> list[str]:
    """Of a shell command, without its comment and what it is piped into."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: no command
        return []


def options(command: click.Command) -> set[str]:
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}


COMMANDS = main.commands
OPTIONS = {name: options(command) | {"-h", "--help"} for name, command in COMMANDS.items()}
ALL_OPTIONS = set.union(*OPTIONS.values(), options(main), FOREIGN)


def unknown(line: str) -> list[str]:
    """What is wrong with a code span or a line of shell that may be a command of ours."""
    args = words(line)
    while args and re.fullmatch(r"\w+=.*", args[0]):  # the environment
        args = args[1:]
    if not args:
        return []
    program, *args = args
    if "llama" in args[:1]:  # what follows is another program's
        args = args[:2]
    if "--" in args:  # likewise
        args = args[: args.index("--")]
    given = [arg.split("=")[0] for arg in args if _OPTION.match(arg)]
    if _OPTION.fullmatch(program):
        return [name for name in (program.split("=")[0], *given) if name not in ALL_OPTIONS]
    if Path(program).name == "fasa-edge" and args and re.fullmatch(r"[a-z]+", args[0]):
        program = args[0]
        if program not in COMMANDS:
            return [program]
    elif Path(program).name == "fasa-edge":
        return [name for name in given if name not in options(main) | {"-h", "--help"}]
    return [name for name in given if name not in OPTIONS.get(program, given)]


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name for names in re.findall(r"^([a-z][a-z -]*):(?![=])", makefile, re.M) for name in names.split()}


def test_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < MAX_LINES
    assert not [f"{no}: {len(line)}" for no, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]


@each_page
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert not broken


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    assert not {line: wrong for line in code(page) if (wrong := unknown(line))}


@each_page
def test_make_targets_exist(page: Path) -> None:
    known = targets()
    lines = [args for line in code(page) if (args := words(line)) and args[0] == "make"]
    assert not {arg for _, *args in lines for arg in args if re.fullmatch(r"[a-z][a-z-]*", arg)} - known


@each_page
def test_files_exist(page: Path) -> None:
    folders = r"(docs|convert|examples|fasa_edge|ggml_kernels|patches|tests|\.github)/[\w./*-]+"
    paths = [span for span in _SPAN.findall(page.read_text(encoding="utf-8")) if re.fullmatch(folders, span)]
    found = lambda path: any(any(root.glob(path.rstrip("/"))) for root in (ROOT, ROOT / "patches/overlay"))  # noqa: E731
    assert not [path for path in paths if path not in INSTALLED and not found(path)]


@each_page
def test_python_is_right(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = [block for language, block in _FENCED.findall(text) if language == "python"]
    for block in blocks:
        ast.parse(block)
    # objects of the API reference, and what code names
    names = re.findall(r"^::: (\S+)$", text, re.M)
    names += [
        name for part in (*blocks, *_SPAN.findall(text)) for name in re.findall(r"\bfasa_edge(?:\.[A-Za-z]\w*)+", part)
    ]
    for name in names:
        pkgutil.resolve_name(name)


def test_the_picture_is_drawn_from_what_bench_prints(tmp_path: Path) -> None:
    speed = runpy.run_path(str(ROOT / "docs/speed.py"))
    (tmp_path / "rows.json").write_text(json.dumps([row(0, "dense", 20.0), row(9, "dense", 5.0), row(9, "fasa", 15.0)]))
    rows = speed["measured"]([str(tmp_path / "rows.json")])
    assert rows[2] == dict(zip(speed["COLUMNS"], ("m.Q4_1", 2, "fasa", 512, 9, 15.0, 14.0, 16.0), strict=True))
    labels = [line.get_label() for line in speed["draw"](rows).axes[0].get_lines()]
    assert labels == ["FASA, 512 cells", "stock, flash attention"]


def row(depth: int, method: str, median: float) -> dict[str, object]:
    """A row of ``fasa-edge bench --json``, as far as the picture takes it."""
    result = BenchRow("m.Q4_1-fasa.gguf", 1, 1, 2, "f16", "f16", True, 0, 1, depth, "prefill", method, False, 512)
    result.budget *= method == "fasa"
    result.samples_ts, result.samples_ns = [median - 1, median, median + 1], [1, 1, 1]
    return result.as_dict()


def test_what_is_left_of_upstreams_server_tests_is_listed() -> None:
    page = (ROOT / "docs/server.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\S+::\S.*)` \| (.+) \|$", page, re.M) == list(EXCLUDED.items())
    assert re.findall(r"^- `(\S+::\S+)`$", page, re.M) == list(TEXTS)


def test_what_is_wrong_is_found() -> None:
    assert unknown("fasa-edge run m.gguf --bugdet 3  # --no") == ["--bugdet"]
    assert unknown("A=b .venv/bin/fasa-edge walk m.gguf") == ["walk"]
    assert unknown("--no-chekc") == ["--no-chekc"]
    assert unknown("convert --n-tip auto --walk") == ["--walk"]
    assert unknown("fasa-edge bench -ngl -1 --geometry llama-3.1-8b -d 0,32768 -n 32") == []
    assert "docs" in targets() and "help" in targets()
