"""patches/series.py: patches into commits and back, on the stand-in of test_prepare.py and on the real series."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import ROOT, SOURCE, UPSTREAM, Project, diff, read, write


class Series:
    """A project whose patches are worked on in a repository."""

    def __init__(self, project: Project):
        self.project = project
        self.tree = project.root.parent / "tree"
        shutil.copy(ROOT / "patches/series.py", project.root / "patches")
        hooked = diff("src/llama.cpp", SOURCE, SOURCE.replace("line_20", "hook"))
        header = "diff --git a/src/llama.cpp b/src/llama.cpp\n"
        project.patch.write_text(f"src: a hook\n\nWith a reason.\n\n\n{header}{hooked}")
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


def test_real_series_survives_the_round_trip(tmp_path):
    for folder in ("patches", "ggml_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    command = [sys.executable, tmp_path / "patches/series.py"]
    environment = {"FASA_DOWNLOAD_DIR": str(ROOT / ".venv/download")} | os.environ
    subprocess.run([*command, "tree", tmp_path / "tree"], env=environment, check=True)
    done = subprocess.run([*command, "refresh", tmp_path / "tree"], env=environment, check=True, capture_output=True)
    assert done.stdout == b"series: no patch changed\n"
