#!/usr/bin/env python3
"""Prepare the llama.cpp source tree that fasa-edge compiles.

The tree is the pinned upstream (upstream.txt) with our own files laid over it (overlay/ and ../ggml_kernels/) and the
patch series (NNNN-*.patch) applied in order. CMakeLists.txt calls this at configure time; by hand:

    python patches/prepare.py --out DIR             the patched tree
    python patches/prepare.py --out DIR --stock     the pinned tree as it is

Environment:
    FASA_LLAMA_CPP_DIR      an unpacked llama.cpp (or llama-cpp-python sdist) at the pin; copied, never changed
    FASA_LLAMA_CPP_ARCHIVE  an already downloaded llama-cpp-python sdist
    FASA_DOWNLOAD_DIR       where pip puts the sdist if neither is given (default: beside DIR)

Only the standard library is used, and nothing imports this file at runtime.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).resolve().parent
KERNELS = PATCHES.parent / "ggml_kernels"

# What a library build reads, the converter of checkpoints, the programs, the tests of the ops; most of the archive
# stays packed.
KEPT = (
    *("CMakeLists.txt", "LICENSE", "cmake/", "ggml/", "include/", "src/", "tools/mtmd/", "vendor/"),
    *("convert_hf_to_gguf.py", "conversion/", "gguf-py/"),
    *("common/", "licenses/", "scripts/ui-assets.cmake", "tools/server/", "tools/ui/", "tools/cli/"),
    *("tools/llama-bench/", "tools/perplexity/", "tools/quantize/", "tools/gguf-split/"),
    "tests/test-backend-ops.cpp",
)

STAMP = ".fasa-stamp"


class PrepareError(Exception):
    """A refusal, worded for the user: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Pin:
    """What upstream.txt pins: the sdist by name and hash, the llama.cpp inside by commit and content."""

    version: str
    archive_sha256: str
    commit: str
    tree_sha256: str

    @property
    def archive_name(self) -> str:
        """File name of the sdist."""
        return f"llama_cpp_python-{self.version}.tar.gz"


def read_pin(path: Path) -> Pin:
    """Read upstream.txt, a pip requirement whose comments say which llama.cpp it carries."""
    text = path.read_text(encoding="utf-8")

    def field(pattern: str) -> str:
        found = re.search(pattern, text, re.MULTILINE)
        if not found:
            raise PrepareError(f"{path}: no line matches '{pattern}'\n  remedy: restore the file from version control")
        return found.group(1)

    return Pin(
        version=field(r"^llama-cpp-python==(\S+)"),
        archive_sha256=field(r"--hash=sha256:([0-9a-f]{64})"),
        commit=field(r"^# llama\.cpp commit: ([0-9a-f]+)"),
        tree_sha256=field(r"^# llama\.cpp tree: sha256:([0-9a-f]{64})"),
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def files_under(folder: Path) -> Iterator[Path]:
    """All files below a folder in a stable order, without hidden ones and Python's caches."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield path


def tree_digest(tree: Path) -> str:
    """SHA-256 over the names and contents of what we keep of a llama.cpp tree."""
    digest = hashlib.sha256()
    for path in files_under(tree):
        name = path.relative_to(tree).as_posix()
        if name.startswith(KEPT):
            digest.update(f"{sha256(path)}  {name}\n".encode())
    return digest.hexdigest()


# ---- upstream ----------------------------------------------------------------------------------------------------


def check_archive(archive: Path, pin: Pin) -> Path:
    """Return the archive if it is the pinned one, else refuse it."""
    if not archive.is_file():
        raise PrepareError(f"{archive}: no such file\n  remedy: correct or unset FASA_LLAMA_CPP_ARCHIVE")
    found = sha256(archive)
    if found != pin.archive_sha256:
        raise PrepareError(
            f"{archive} is not the pinned llama-cpp-python {pin.version}\n"
            f"  expected sha256 {pin.archive_sha256}\n"
            f"  found    sha256 {found}\n"
            f"  remedy: delete it to download it again, or point FASA_LLAMA_CPP_ARCHIVE at an unchanged one"
        )
    return archive


def fetch(pin: Pin, folder: Path) -> Path:
    """Return the verified sdist: FASA_LLAMA_CPP_ARCHIVE, or the one in `folder`, downloaded there first if need be."""
    if given := os.environ.get("FASA_LLAMA_CPP_ARCHIVE"):
        return check_archive(Path(given).expanduser().resolve(), pin)

    archive = folder / pin.archive_name
    if archive.is_file() and sha256(archive) == pin.archive_sha256:
        return archive

    # pip knows the user's index, proxy and certificates. It builds the sdist's metadata even for a download; without
    # isolation that needs nothing but the scikit-build-core that is building us.
    folder.mkdir(parents=True, exist_ok=True)
    archive.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    command += ["--requirement", str(PATCHES / "upstream.txt"), "--dest", str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise PrepareError(
            f"pip could not download {pin.archive_name} (its own message is above)\n"
            f"  remedy: offline, set FASA_LLAMA_CPP_ARCHIVE to a copy of it or FASA_LLAMA_CPP_DIR to it unpacked;\n"
            f"          otherwise check that {sys.executable} has pip and scikit-build-core"
        )
    return check_archive(archive, pin)


def unpack(archive: Path, tree: Path) -> None:
    """Unpack what we keep of the llama.cpp inside an sdist."""
    # Regular files only, written by us below `tree`: tarfile's own "data" filter is missing from Pythons as common as
    # Debian 12's. Were something left out for that, the digest of the tree would tell.
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.partition("/vendor/llama.cpp/")[2]
                if not member.isfile() or not name.startswith(KEPT):
                    continue
                if ".." in Path(name).parts:
                    raise PrepareError(f"{archive}: {member.name} leaves the archive's folder\n  remedy: do not use it")
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, (tree / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise PrepareError(f"{archive}: cannot unpack: {error}\n  remedy: delete it and download again") from error


def copy_given(folder: Path, tree: Path) -> None:
    """Copy what we keep of an unpacked llama.cpp, or of the one inside an unpacked sdist."""
    root = next((at for at in (folder / "vendor/llama.cpp", folder) if (at / "ggml/CMakeLists.txt").is_file()), None)
    if root is None:
        raise PrepareError(
            f"FASA_LLAMA_CPP_DIR={folder}: holds neither ggml/CMakeLists.txt nor vendor/llama.cpp\n"
            "  remedy: name an unpacked llama.cpp or llama-cpp-python sdist, or unset it"
        )
    for path in files_under(root):
        name = path.relative_to(root)
        if name.as_posix().startswith(KEPT):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tree / name)


def obtain(pin: Pin, downloads: Path, tree: Path) -> None:
    """Put the pinned llama.cpp, untouched, into `tree`."""
    given = os.environ.get("FASA_LLAMA_CPP_DIR")
    source = Path(given).expanduser().resolve() if given else fetch(pin, downloads)
    if given:
        copy_given(source, tree)
    else:
        unpack(source, tree)

    found = tree_digest(tree)
    if found != pin.tree_sha256:
        raise PrepareError(
            f"{source}: its llama.cpp is not the pinned commit {pin.commit}\n"
            f"  expected tree sha256 {pin.tree_sha256}\n"
            f"  found    tree sha256 {found}\n"
            f"  remedy: use the llama.cpp of llama-cpp-python {pin.version}, unmodified and without build outputs"
        )


# ---- ours --------------------------------------------------------------------------------------------------------


def own_files() -> dict[str, Path]:
    """Return our own source files by their place in the tree; documentation and tools have none."""
    files = {path.relative_to(PATCHES / "overlay").as_posix(): path for path in files_under(PATCHES / "overlay")}
    for path in files_under(KERNELS):
        if not path.name.startswith("README") and KERNELS / "tools" not in path.parents:
            files[f"ggml/src/ggml-fasa/{path.relative_to(KERNELS).as_posix()}"] = path
    return files


def patch_series() -> list[Path]:
    """The patches, in the order in which they apply."""
    return sorted(PATCHES.glob("[0-9]*.patch"))


def place(name: str, source: Path, tree: Path) -> None:
    """Copy one of our files into the tree, where nothing may stand in its place."""
    target = tree / name
    if target.exists():
        raise PrepareError(
            f"{source} would overwrite {name} of llama.cpp\n"
            "  remedy: rename it; changes to upstream files belong into a patch"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def run_git(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in the tree, apart from repositories around it and from the user's own settings."""
    # Inside the folder of another repository (ours, usually) git would take paths relative to that one's root, find
    # nothing to do and report success: the ceiling hides it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {
        "GIT_CEILING_DIRECTORIES": str(tree.parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
    command = ["git", *arguments]
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, encoding="utf-8", check=False)
    except FileNotFoundError:
        raise PrepareError("git is not installed\n  remedy: install git; it applies the patches") from None


def git_apply(patch: Path, tree: Path, *options: str) -> str:
    """Run `git apply` in the tree and return what it prints, or refuse the patch with git's own words."""
    done = run_git(tree, "apply", *options, str(patch))
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in done.stderr.splitlines())
        raise PrepareError(
            f"{patch.name} does not apply:\n{said}\n"
            "  remedy: rebase it on the pinned tree, see docs/updating-llama-cpp.md"
        )
    return done.stdout


def apply_patch(patch: Path, tree: Path) -> None:
    """Apply one patch and make sure that every file it names did change."""
    # Each record is "added<TAB>removed<TAB>name".
    names = [record.split("\t", 2)[2] for record in git_apply(patch, tree, "--numstat", "-z").split("\0") if record]

    def content(name: str) -> bytes | None:
        return (tree / name).read_bytes() if (tree / name).is_file() else None

    before = {name: content(name) for name in names}
    git_apply(patch, tree)
    for name in names:
        if content(name) == before[name]:
            raise PrepareError(
                f"{patch.name}: git reported success but {name} did not change\n"
                "  remedy: report this with the output of `git --version`"
            )


# ---- the tree ----------------------------------------------------------------------------------------------------


def input_digest(own: dict[str, Path], series: list[Path]) -> str:
    """SHA-256 over everything that decides what the tree holds."""
    inputs = {path.name: path for path in (PATCHES / "upstream.txt", Path(__file__), *series)} | own
    return hashlib.sha256("".join(f"{sha256(inputs[name])}  {name}\n" for name in sorted(inputs)).encode()).hexdigest()


def keep_mtimes(old: Path, new: Path) -> None:
    """Give unchanged files their old modification time, so that ninja, which compares just these, leaves them alone."""
    for path in files_under(new):
        before = old / path.relative_to(new)
        if before.is_file() and filecmp.cmp(before, path, shallow=False):
            shutil.copystat(before, path)


def prepare(out: Path, stock: bool, n_patches: int | None = None) -> bool:
    """Bring the tree at `out` up to date, with the first `n_patches` or all; False if it already was."""
    own, series = ({}, []) if stock else (own_files(), patch_series()[:n_patches])
    stamp = input_digest(own, series)
    if (out / STAMP).is_file():
        if (out / STAMP).read_text(encoding="utf-8") == stamp:
            return False
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrepareError(f"{out} was not made by this program\n  remedy: name a new or empty folder")

    out.parent.mkdir(parents=True, exist_ok=True)
    pin = read_pin(PATCHES / "upstream.txt")
    downloads = Path(os.environ.get("FASA_DOWNLOAD_DIR") or out.parent).expanduser().resolve()
    # Beside `out`, so that the finished tree takes its place by a rename; whatever fails before leaves `out` alone.
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as work:
        tree = Path(work) / "new"
        tree.mkdir()
        obtain(pin, downloads, tree)
        for name, source in own.items():
            place(name, source, tree)
        for patch in series:
            apply_patch(patch, tree)
        (tree / STAMP).write_text(stamp, encoding="utf-8")
        if out.exists():
            keep_mtimes(out, tree)
            out.rename(Path(work) / "old")
        tree.rename(out)
    return True


def main() -> int:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Prepare the llama.cpp source tree that fasa-edge compiles.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="make or update the source tree in DIR")
    task.add_argument("--fetch", type=Path, metavar="DIR", help="only download the archive to DIR and print its path")
    parser.add_argument("--stock", action="store_true", help="leave out our own files and patches")
    parser.add_argument("--patches", type=int, metavar="N", help="apply only the first N patches of the series")
    args = parser.parse_args()
    try:
        if args.fetch:
            print(fetch(read_pin(PATCHES / "upstream.txt"), args.fetch.resolve()))
        else:
            changed = prepare(args.out.resolve(), args.stock, args.patches)
            print(f"prepare: {args.out} {'prepared' if changed else 'is up to date'}")
    except PrepareError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
