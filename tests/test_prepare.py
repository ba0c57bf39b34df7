"""patches/prepare.py, run as the build runs it, on a small stand-in for the upstream archive."""

import difflib
import hashlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PREPARE = ROOT / "patches/prepare.py"

SOURCE = "".join(f"int line_{i};\n" for i in range(40))
UPSTREAM = {
    "CMakeLists.txt": "project(llama.cpp)\n",
    "ggml/CMakeLists.txt": "project(ggml)\n",
    "ggml/src/ggml.c": "int ggml;\n",
    "src/llama.cpp": SOURCE,
    "docs/unused.md": "not needed to build\n",
}
SDIST = "llama_cpp_python-0.0.1"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def diff(name: str, before: str, after: str) -> str:
    lines = [text.splitlines(keepends=True) for text in (before, after)]
    return "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}"))


class Project:
    """A project of the same shape as ours: prepare.py, a pin, an archive, and some files of its own."""

    def __init__(self, root: Path, upstream: dict[str, str] = UPSTREAM):
        self.root = root / "project"
        self.archive = root / f"{SDIST}.tar.gz"
        self.unpacked = root / "unpacked"
        self.out = self.root / ".venv/build/llama.cpp"
        self.kernel = self.root / "ggml_kernels/cpu/fasa.cpp"
        self.patch = self.root / "patches/0001-hook.patch"

        write(self.unpacked / "vendor/llama.cpp", UPSTREAM)
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, text in upstream.items():
                member = tarfile.TarInfo(f"{SDIST}/vendor/llama.cpp/{name}")
                member.size, member.mtime = len(text), 1_600_000_000
                tar.addfile(member, io.BytesIO(text.encode()))

        write(
            self.root,
            {
                "patches/overlay/src/fasa.cpp": "int overlay;\n",
                "patches/0001-hook.patch": diff("src/llama.cpp", SOURCE, SOURCE.replace("line_20", "hook")),
                "ggml_kernels/README.md": "documentation stays here\n",
                "ggml_kernels/tools/check.py": "tools, too\n",
                "ggml_kernels/cpu/fasa.cpp": "int kernel;\n",
            },
        )
        shutil.copy(PREPARE, self.root / "patches")
        self.pin(hashlib.sha256(self.archive.read_bytes()).hexdigest())

    def pin(self, archive_sha256: str) -> None:
        tree = runpy.run_path(str(PREPARE))["tree_digest"](self.unpacked / "vendor/llama.cpp")
        (self.root / "patches/upstream.txt").write_text(
            f"# llama.cpp commit: abc123\n# llama.cpp tree: sha256:{tree}\n"
            f"llama-cpp-python==0.0.1 \\\n    --hash=sha256:{archive_sha256}\n"
        )

    def run(self, *arguments: object, **environment: object) -> subprocess.CompletedProcess:
        environment = environment or {"FASA_LLAMA_CPP_ARCHIVE": self.archive}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FASA_")}
        return subprocess.run(
            [sys.executable, self.root / "patches/prepare.py", *(arguments or ("--out", self.out))],
            env=inherited | {key: str(value) for key, value in environment.items()},
            capture_output=True,
            text=True,
        )

    def refusal(self, *arguments: object, **environment: object) -> str:
        done = self.run(*arguments, **environment)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "remedy: " in done.stderr
        return done.stderr

    def tree(self, *arguments: object, **environment: object) -> dict[str, str]:
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in self.out.parent.iterdir()] == [self.out.name]  # no temporary folder is left
        files = read(self.out)
        del files[".fasa-stamp"]
        return files


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


STOCK = {name: text for name, text in UPSTREAM.items() if name != "docs/unused.md"}
PATCHED = STOCK | {
    "src/llama.cpp": SOURCE.replace("line_20", "hook"),
    "src/fasa.cpp": "int overlay;\n",
    "ggml/src/ggml-fasa/cpu/fasa.cpp": "int kernel;\n",
}


@pytest.mark.check
def test_offline_archive(project):
    assert project.tree() == PATCHED


@pytest.mark.check
def test_stock_tree_is_upstream_alone(project):
    assert project.tree("--out", project.out, "--stock") == STOCK


@pytest.mark.parametrize("inside", ["", "vendor/llama.cpp"], ids=["sdist", "llama.cpp"])
def test_unpacked_folder_is_copied(project, inside):
    assert project.tree(FASA_LLAMA_CPP_DIR=project.unpacked / inside) == PATCHED
    assert read(project.unpacked / "vendor/llama.cpp") == UPSTREAM


def test_inside_another_repository(project):
    subprocess.run(["git", "init", "-q", project.root], check=True)
    assert project.tree() == PATCHED


def test_inside_a_git_hook(project):
    subprocess.run(["git", "init", "-q", project.root], check=True)
    environment = {"GIT_DIR": project.root / ".git", "GIT_WORK_TREE": project.root}
    assert project.tree(FASA_LLAMA_CPP_ARCHIVE=project.archive, **environment) == PATCHED


def test_download_is_reused_when_its_hash_matches(project):
    downloads = project.archive.parent
    done = project.run("--fetch", downloads, PIP_NO_INDEX=1)
    assert done.stdout.strip() == str(project.archive)
    assert project.tree(FASA_DOWNLOAD_DIR=downloads, PIP_NO_INDEX=1) == PATCHED


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_changed_archive(project):
    expected = hashlib.sha256(project.archive.read_bytes()).hexdigest()
    project.archive.write_bytes(project.archive.read_bytes() + b"changed")
    found = hashlib.sha256(project.archive.read_bytes()).hexdigest()
    error = project.refusal()
    assert str(project.archive) in error
    assert re.search(f"expected sha256 {expected}\n.*found    sha256 {found}", error)
    assert not project.out.exists()


def test_missing_archive(project):
    assert "/nowhere.tar.gz: no such file" in project.refusal(FASA_LLAMA_CPP_ARCHIVE="/nowhere.tar.gz")


def test_failed_download(project, tmp_path):
    nothing = {"PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": tmp_path / "empty"}
    error = project.refusal("--fetch", tmp_path / "downloads", **nothing)
    assert f"pip could not download {SDIST}.tar.gz" in error
    assert "FASA_LLAMA_CPP_ARCHIVE" in error


def test_archive_that_leaves_the_tree(tmp_path):
    project = Project(tmp_path, UPSTREAM | {"src/../../../../evil.cpp": "int evil;\n"})
    assert "evil.cpp" in project.refusal()
    assert not list(tmp_path.rglob("evil.cpp"))


def test_folder_at_another_commit(project):
    write(project.unpacked, {"vendor/llama.cpp/src/llama.cpp": "int other;\n"})
    error = project.refusal(FASA_LLAMA_CPP_DIR=project.unpacked)
    assert f"{project.unpacked}: its llama.cpp is not the pinned commit abc123" in error


def test_folder_without_llama_cpp(project, tmp_path):
    assert f"FASA_LLAMA_CPP_DIR={tmp_path}" in project.refusal(FASA_LLAMA_CPP_DIR=tmp_path)


@pytest.mark.check
def test_patch_that_does_not_apply(project):
    before = project.tree()
    other = SOURCE.replace("line_19", "moved")
    project.patch.write_text(diff("src/llama.cpp", other, other.replace("line_20", "hook")))
    error = project.refusal()
    assert "0001-hook.patch does not apply" in error
    assert "patch failed: src/llama.cpp:18" in error
    after = read(project.out)
    del after[".fasa-stamp"]
    assert after == before


def test_patch_that_is_damaged(project):
    project.patch.write_text(project.patch.read_text()[:-40])
    assert "0001-hook.patch does not apply" in project.refusal()


def test_patch_that_git_passes_over(project, tmp_path):
    git = tmp_path / "bin/git"
    write(tmp_path, {"bin/git": f'#!/bin/sh\ncase "$*" in *numstat*) exec {shutil.which("git")} "$@";; esac\n'})
    git.chmod(0o755)
    environment = {"FASA_LLAMA_CPP_ARCHIVE": project.archive, "PATH": f"{git.parent}{os.pathsep}{os.environ['PATH']}"}
    assert "0001-hook.patch: git reported success but src/llama.cpp did not change" in project.refusal(**environment)


@pytest.mark.check
@pytest.mark.parametrize(
    "own, upstream",
    [("patches/overlay/src/llama.cpp", "src/llama.cpp"), ("patches/overlay/ggml/src/ggml.c", "ggml/src/ggml.c")],
)
def test_overlay_over_an_upstream_file(project, own, upstream):
    write(project.root, {own: "int mine;\n"})
    assert f"{project.root / own} would overwrite {upstream}" in project.refusal()


def test_folder_of_somebody_else(project, tmp_path):
    write(tmp_path, {"home/letter.txt": "dear"})
    assert "was not made by this program" in project.refusal("--out", tmp_path / "home")
    assert read(tmp_path / "home") == {"letter.txt": "dear"}


# ---- updates -----------------------------------------------------------------------------------------------------


@pytest.mark.check
def test_second_run_does_nothing(project):
    project.tree()
    done = project.run(FASA_LLAMA_CPP_ARCHIVE="/nowhere.tar.gz")  # not even looked at
    assert done.stdout == f"prepare: {project.out} is up to date\n"


@pytest.mark.check
def test_only_changed_files_look_changed(project):
    def times() -> dict[str, int]:
        return {name: (project.out / name).stat().st_mtime_ns for name in PATCHED}

    def changed(before: dict[str, int]) -> set[str]:
        after = times()
        assert all(after[name] >= before[name] for name in before)
        return {name for name in before if after[name] != before[name]}

    project.tree()
    before = times()
    project.kernel.write_text("int better_kernel;\n")
    assert project.tree() == PATCHED | {"ggml/src/ggml-fasa/cpu/fasa.cpp": "int better_kernel;\n"}
    assert changed(before) == {"ggml/src/ggml-fasa/cpu/fasa.cpp"}

    # Upstream's own file comes back, and an older date than that of the patched one would hide this from ninja.
    before = times()
    project.patch.unlink()
    assert project.tree()["src/llama.cpp"] == SOURCE
    assert changed(before) == {"src/llama.cpp"}


def test_removed_file_leaves_the_tree(project):
    project.tree()
    project.kernel.unlink()
    assert "ggml/src/ggml-fasa/cpu/fasa.cpp" not in project.tree()


def test_stock_and_patched_take_turns(project):
    assert project.tree() == PATCHED
    assert project.tree("--out", project.out, "--stock") == STOCK
    assert project.tree() == PATCHED


# ---- the real pin ------------------------------------------------------------------------------------------------


@pytest.mark.check
def test_bindings_and_library_have_one_pin():
    pin = runpy.run_path(str(PREPARE))["read_pin"](ROOT / "patches/upstream.txt")
    assert f'"llama-cpp-python=={pin.version}"' in (ROOT / "pyproject.toml").read_text()
    assert f'LLAMA_COMMIT = "{pin.commit}"\n' in (ROOT / "fasa_edge/runtime/library.py").read_text()
    for name in ("docs/install.md", ".github/workflows/check.yml", ".github/workflows/wheels.yml", "pyproject.toml"):
        assert set(re.findall(r"llama-cpp-python==([\d.]+)", (ROOT / name).read_text())) == {pin.version}, name
