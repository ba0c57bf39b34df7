"""patches/series.py: patches into commits and back, on the stand-in of test_prepare.py and on the real series."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import ROOT, SOURCE, UPSTREAM, Project, diff, read, write

AUTHOR, DATE = "Ada <ada@example.org>", "Fri, 2 Jan 2026 03:04:05 +0600"


class Series:
    """A project whose patches are worked on in a repository."""

    def __init__(self, project: Project):
        self.project = project
        self.tree = project.root.parent / "tree"
        shutil.copy(ROOT / "patches/series.py", project.root / "patches")
        hooked = diff("src/llama.cpp", SOURCE, SOURCE.replace("line_20", "hook"))
        header = "diff --git a/src/llama.cpp b/src/llama.cpp\n"
        mail = f"From: {AUTHOR}\nDate: {DATE}\nSubject: [PATCH] src: a hook\n\nWith a reason.\n\n"
        project.patch.write_text(f"From {'0' * 40} Mon Sep 17 00:00:00 2001\n{mail}{header}{hooked}")
        self.run("tree")
        self.run("refresh")  # in git's words

    def run(self, task: str, archive: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, self.project.root / "patches/series.py", task, self.tree],
            env=os.environ | {"FASA_LLAMA_CPP_ARCHIVE": str(archive or self.project.archive)},
            capture_output=True,
            text=True,
        )

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.tree, check=True, capture_output=True, text=True).stdout

    def patches(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.project.root / "patches").glob("*.patch")}


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return Series(Project(tmp_path))


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_patch_becomes_a_commit(series):
    assert series.git("log", "--format=%B", "stock..series").strip() == "src: a hook\n\nWith a reason."
    assert series.git("log", "--format=%an <%ae>, %aD", "stock..series").strip() == f"{AUTHOR}, {DATE}"
    assert series.git("status", "--porcelain") == ""  # our own files are there, and none of the commits' business
    assert (series.tree / "src/fasa.cpp").resolve() == series.project.root / "patches/overlay/src/fasa.cpp"
    assert (series.tree / "ggml/src/ggml-fasa/cpu/fasa.cpp").resolve() == series.project.kernel


def test_commits_become_patches(series):
    edit(series.tree / "src/llama.cpp", "hook", "better_hook")
    series.git("commit", "--all", "--amend", "--message=src: a better hook")
    edit(series.tree / "ggml/src/ggml.c", "ggml", "ggml_hook")
    series.git("commit", "--all", "--message=ggml: Another hook!")
    done = series.run("refresh")
    assert done.stdout.split(", ")[1:] == ["0001-src-a-hook.patch", "0002-ggml-another-hook.patch\n"]
    assert sorted(series.patches()) == ["0001-src-a-better-hook.patch", "0002-ggml-another-hook.patch"]

    files = series.project.tree()
    assert "int better_hook;\n" in files["src/llama.cpp"]
    assert files["ggml/src/ggml.c"] == "int ggml_hook;\n"

    first, second = (series.patches()[name] for name in sorted(series.patches()))
    assert f"\nFrom: {AUTHOR}\nDate: {DATE}\nSubject: [PATCH] src: a better hook\n" in first
    assert "\nFrom: The fasa-edge authors <" in second and second.endswith("+int ggml_hook;\n")


def test_a_patch_that_is_no_mail(series):
    (patch,) = (series.project.root / "patches").glob("*.patch")
    patch.write_text(patch.read_text().partition("\n\n")[2])
    shutil.rmtree(series.tree)
    done = series.run("tree")
    assert done.returncode == 1 and "git am" in done.stderr


def pin_another(series: Series, upstream: dict[str, str]) -> Path:
    """Pins another llama.cpp and returns its archive."""
    other = Project(series.tree.parent / "other", upstream)
    write(other.unpacked / "vendor/llama.cpp", upstream)
    other.pin(hashlib.sha256(other.archive.read_bytes()).hexdigest())
    shutil.copy(other.root / "patches/upstream.txt", series.project.root / "patches")
    return other.archive


def test_series_moves_to_another_llama_cpp(series):
    moved = UPSTREAM | {"src/llama.cpp": "int new_first_line;\n" * 9 + SOURCE, "src/new.cpp": "int new_file;\n"}
    archive = pin_another(series, moved)
    before = series.patches()

    assert series.run("rebase", archive).returncode == 0
    assert series.run("refresh").returncode == 0
    assert series.patches() != before
    files = series.project.tree(FASA_LLAMA_CPP_ARCHIVE=archive)
    assert files["src/llama.cpp"] == moved["src/llama.cpp"].replace("line_20", "hook")
    assert files["src/new.cpp"] == "int new_file;\n"


def test_conflict_is_left_to_git(series):
    archive = pin_another(series, UPSTREAM | {"src/llama.cpp": SOURCE.replace("line_20", "renamed")})
    done = series.run("rebase", archive)
    assert done.returncode == 1
    assert "CONFLICT (content): Merge conflict in src/llama.cpp" in done.stderr
    assert "git rebase --continue" in done.stderr

    before = series.patches()
    series.git("checkout", "--theirs", "src/llama.cpp")
    series.git("add", "src/llama.cpp")
    series.git("commit", "--message=resolved, with more of the series to come")
    assert "a rebase is under way" in series.run("refresh").stderr
    assert series.patches() == before


@pytest.mark.parametrize("task", ["refresh", "rebase"])
def test_changes_that_no_commit_holds(series, task):
    before = series.patches()
    edit(series.tree / "src/llama.cpp", "hook", "better_hook")
    done = series.run(task)
    assert done.returncode == 1
    assert " M src/llama.cpp" in done.stderr and "remedy: commit or amend" in done.stderr
    assert series.patches() == before


@pytest.mark.parametrize("task, error", [("tree", "is not empty"), ("refresh", "is no repository")])
def test_folder_of_somebody_else(series, task, error):
    shutil.rmtree(series.tree)
    write(series.tree, {"letter.txt": "dear"})
    done = series.run(task)
    assert done.returncode == 1
    assert error in done.stderr and "remedy: " in done.stderr
    assert read(series.tree) == {"letter.txt": "dear"}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our project, its series as commits in the folder tree."""
    root = tmp_path_factory.mktemp("real")
    for folder in ("patches", "ggml_kernels"):
        shutil.copytree(ROOT / folder, root / folder)
    run_real(root, "series.py", "tree", root / "tree")
    return root


def run_real(root: Path, script: str, *arguments: object) -> bytes:
    environment = {"FASA_DOWNLOAD_DIR": str(ROOT / ".venv/download")} | os.environ
    command = [sys.executable, root / "patches" / script, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True).stdout


def test_real_series_survives_the_round_trip(real):
    assert run_real(real, "series.py", "refresh", real / "tree") == b"series: no patch changed\n"


def test_git_am_takes_the_real_series(real):
    """As a maintainer would, in a repository with our own files: what comes out is what is compiled."""
    run_real(real, "prepare.py", "--out", real / "stock", "--stock")
    run_real(real, "prepare.py", "--out", real / "patched")
    git = lambda *arguments: subprocess.run(["git", *arguments], cwd=real / "stock", check=True)  # noqa: E731
    identity = ("-c", "user.name=A maintainer", "-c", "user.email=maintainer@example.org")
    git("init", "--quiet")
    git("add", "--all")
    git(*identity, "commit", "--quiet", "--message=llama.cpp")
    git(*identity, "am", "--quiet", "--keep-cr", *sorted((real / "patches").glob("*.patch")))
    patched, found = bytes_of(real / "patched"), bytes_of(real / "stock")
    assert [path for path in found if found[path] != patched.get(path)] == []


def bytes_of(folder: Path) -> dict[str, bytes]:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith((".git/", ".fasa-stamp"))}


def test_rpc_with_more_ops_is_another_version_of_the_protocol(real):
    """A client and a server that number the ops otherwise would run one for another."""
    show = lambda commit: ["git", "show", f"{commit}:ggml/include/ggml-rpc.h"]  # noqa: E731
    stock, ours = (
        subprocess.run(show(commit), cwd=real / "tree", check=True, capture_output=True, text=True).stdout
        for commit in ("stock", "series")
    )
    of = lambda text, pattern: re.search(pattern, text)[1]  # noqa: E731
    assert int(of(ours, r"GGML_OP_COUNT == (\d+)")) == int(of(stock, r"GGML_OP_COUNT == (\d+)")) + 3
    version = r"RPC_PROTO_PATCH_VERSION +(\d+)"
    assert int(of(ours, version)) > int(of(stock, version))
