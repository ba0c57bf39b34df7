#!/usr/bin/env python3
"""Build for the GPUs of one architecture, on a machine that needs none, and pack what measures them on another.

`make gpu-pack ARCH=90` runs this:

    python ggml_kernels/tools/gpu_pack.py --arch 90 [--model MODEL.gguf]

It leaves in .venv/gpu-pack, none of them larger than 60 MiB:

    fasa-gpu.tar.xz             libraries, test-backend-ops, Python packages, and gpu_check.py, which runs them
    fasa-gpu-model.1of2, ...    MODEL, annotated, in parts: for a second and a third trip

Where they go, nothing is installed or compiled. It takes an x86-64 with AVX2, glibc no older than here, CUDA's runtime
and cuBLAS of the same major version (those of PyTorch will do), Python with numpy.

    tar -xJf fasa-gpu.tar.xz && python3 fasa-gpu/gpu_check.py --out results

It needs nvcc. What else of CUDA is missing here is made up for: cuBLAS comes out of NVIDIA's Python package, and a
library of empty functions stands for the driver. `make gpu` builds likewise on a machine with a GPU, and runs it there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from cuda_check import CudaCheckError, cuda_version, download_cublas, find_nvcc, finds_cublas, run
from gpu_check import _FASA_EDGE, MANIFEST, MODEL_PARTS, CheckError, pack_environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / ".venv" / "gpu-pack"
BUILD = OUT / "build"
SITE = OUT / "site"  # Python packages as pip installs them, those of this machine's Python among them
PACK = OUT / "fasa-gpu"
ARCHIVE = OUT / "fasa-gpu.tar.xz"

MAX_BYTES = 60 << 20

# What fasa-edge imports, less what only the hub needs: distributions, and what is packed of them. numpy must be there.
REQUIRED = ("click", "diskcache", "gguf", "jinja2", "psutil", "pyyaml", "rich", "tabulate", "tqdm", "typing-extensions")
PACKED = (
    *("click", "diskcache", "gguf", "jinja2", "markdown_it", "markupsafe", "mdurl", "psutil", "pygments", "rich"),
    *("tabulate", "tqdm", "typing_extensions", "yaml"),
)

# GGML_NATIVE would mean the CPU of this machine.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON "
    "-DGGML_BMI2=ON -DLLAMA_BUILD_MTMD=OFF"
).split()


class PackError(Exception):
    """Something is missing or does not work; the message names the remedy."""


def call(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run a command, whose output is shown.

    Raises:
        PackError: it failed.
    """
    print("$", *("fasa-edge" if part == _FASA_EDGE else part for part in command if part != "-c"), flush=True)
    done = subprocess.run([str(part) for part in command], env=os.environ | (env or {}), cwd=cwd, check=False)
    if done.returncode != 0:
        raise PackError(f"{command[0]} failed with status {done.returncode}: see above")


def ask(*command: str) -> str:
    """Return what a command prints, or nothing if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def native_arch() -> str:
    """Return the compute capability, times ten, of the first GPU of this machine.

    Raises:
        PackError: there is none.
    """
    if not (found := ask("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()):
        raise PackError("nvidia-smi names no GPU here\n  remedy: name an architecture, --arch 90 for Hopper")
    return found[0].strip().replace(".", "")


#
# build
#


def compiler(nvcc: Path) -> Path:
    """Find the nvcc that a script of that name calls: CMake looks for the rest of CUDA beside it."""
    source = OUT / "empty.cu"
    source.write_text("")
    match = re.search(r"^#\$ _HERE_=(.+)$", run(nvcc, "--dryrun", "-c", source, "-o", os.devnull), re.MULTILINE)
    beside = Path(match[1].strip()) / "nvcc" if match else nvcc
    return beside if beside.exists() else nvcc


def cublas_options(nvcc: Path) -> list[str]:
    """Return the options that lead CMake to cuBLAS; none where CUDA's own is installed."""
    if finds_cublas(nvcc):
        return []
    folder = download_cublas(nvcc, OUT / "cublas", "include", "lib")
    # the second for test-backend-ops, which links to cuBLAS through libggml-cuda only
    options = [f"-DCMAKE_CUDA_FLAGS=-I{folder}/include", f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,{folder}/lib"]
    for name in ("cublas", "cublasLt"):
        link = folder / f"lib/lib{name}.so"
        if not link.exists():
            link.symlink_to(next(link.parent.glob(f"lib{name}.so.*")).name)
        options.append(f"-DCUDA_{name}_LIBRARY={link}")
    return options


def has_driver() -> bool:
    """Return whether the loader finds NVIDIA's driver."""
    return "libcuda.so.1 " in (ask("ldconfig", "-p") or ask("/sbin/ldconfig", "-p"))


def driver_calls(sources: Iterable[Path]) -> list[str]:
    """List the functions of the driver that files call, in order of their names."""
    pattern = re.compile(r"\bcu[A-Z]\w*(?=\()")
    return sorted({name for path in sources for name in pattern.findall(path.read_text(errors="replace"))})


def make_driver_stub(folder: Path, functions: Sequence[str]) -> Path:
    """Make a libcuda.so to link to, which fails whatever it is asked for, unless the same is there; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "cuda.c", folder / "libcuda.so"
    text = "".join(f"int {name}(void) {{ return 999; }}\n" for name in functions)
    if not library.exists() or source.read_text() != text:
        source.write_text(text)
        options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library]
        call(os.environ.get("CC") or "cc", *options, source)
        (folder / "libcuda.so.1").unlink(missing_ok=True)
        (folder / "libcuda.so.1").symlink_to(library.name)  # for linking programs
    return library


def build(arch: str, nvcc: Path) -> None:
    """Compile the libraries and test-backend-ops: a quarter of an hour to an hour, seconds once ccache knows them.

    Args:
        arch: compute capability times ten.
        nvcc: CUDA's compiler.
    """
    bin_ = Path(sys.executable).parent
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={bin_ / 'ninja'}"]
    options += [*OPTIONS, f"-DCMAKE_CUDA_ARCHITECTURES={arch}", f"-DCMAKE_CUDA_COMPILER={nvcc}", *cublas_options(nvcc)]
    stubs = None if has_driver() else OUT / "stubs"
    if stubs:
        options.append(f"-DCUDA_cuda_driver_LIBRARY={stubs / 'libcuda.so'}")
    call(bin_ / "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options)
    if stubs:  # by now the sources are there
        folder = BUILD / "llama.cpp/ggml/src/ggml-cuda"
        make_driver_stub(stubs, driver_calls([*folder.glob("*.cu"), *folder.glob("*.cuh")]))
    call(bin_ / "cmake", "--build", BUILD, "--target", "all", "test-backend-ops")


#
# pack
#


def copy_python(source: Path, target: Path) -> None:
    """Copy a module or package, of compiled parts only those that any Python loads."""
    if source.is_file():
        shutil.copy2(source, target)
        return

    def ignored(folder: str, names: list[str]) -> set[str]:
        compiled = {name for name in names if name.endswith(".so") and ".abi3." not in name}
        return compiled | {name for name in names if name in ("__pycache__", "lib", "tests") or name.endswith(".pyc")}

    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)


def stage_python(folder: Path) -> dict[str, str]:
    """Copy fasa_edge, the bindings and what they import into a folder; return the versions of others' packages."""
    missing = [name for name in PACKED if not any((SITE / f"{name}{end}").exists() for end in ("", ".py"))]
    if missing:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        call(*pip, "--only-binary", ":all:", "--upgrade", "--target", SITE, *REQUIRED, "numpy")
    folder.mkdir(parents=True)
    copy_python(ROOT / "fasa_edge", folder / "fasa_edge")
    copy_python(ROOT / "convert", folder / "fasa_edge/convert")  # as pyproject.toml has it
    for name in PACKED:
        path = SITE / name if (SITE / name).is_dir() else SITE / f"{name}.py"
        copy_python(path, folder / path.name)
    bindings = importlib.util.find_spec("llama_cpp")  # not imported: it would load a library
    if bindings is None:
        raise PackError("llama_cpp is not installed\n  remedy: run this by `make gpu-pack`")
    copy_python(Path(bindings.origin).parent, folder / "llama_cpp")
    found = importlib.metadata.distributions(path=[str(SITE)])
    versions = {dist.name: dist.version for dist in found if dist.name.lower().replace("_", "-") in REQUIRED}
    return versions | {"llama_cpp_python": importlib.metadata.version("llama_cpp_python")}


def stage_binaries(pack: Path, build: Path) -> None:
    """Copy shared libraries and test-backend-ops into the pack, stripped.

    Raises:
        PackError: a library was not built.
    """
    libraries = sorted((build / "bin").glob("lib*.so"))
    names = {path.name for path in libraries}
    if missing := {"libllama.so", "libggml.so", "libggml-base.so", "libggml-cuda.so"} - names:
        raise PackError(f"{build / 'bin'}: no {', '.join(sorted(missing))}")
    for folder, paths in (("lib", libraries), ("bin", [build / "bin/test-backend-ops"])):
        (pack / folder).mkdir(parents=True)
        for path in paths:
            call("strip", "--strip-unneeded", "-o", pack / folder / path.name, path)


def commit() -> str:
    """Return the commit that is packed, with a word if the tree differs from it."""
    return ask("git", "rev-parse", "HEAD") + (" and changes" if ask("git", "status", "--porcelain") else "")


def stage(pack: Path, arch: str, cuda: str) -> None:
    """Make the folder that is packed.

    Args:
        pack: the folder; what it held is removed.
        arch: compute capability times ten.
        cuda: CUDA's version, such as 13.0.
    """
    shutil.rmtree(pack, ignore_errors=True)
    pack.mkdir(parents=True)
    stage_binaries(pack, BUILD)
    packages = stage_python(pack / "python")
    shutil.copy2(HERE / "gpu_check.py", pack)
    write_manifest(pack, arch, cuda, packages)


def write_manifest(pack: Path, arch: str, cuda: str, packages: dict[str, str]) -> None:
    """Write down what the pack is made of; gpu_check.py knows by this file that it is in one."""
    versions = {"commit": commit(), "architecture": arch, "cuda": cuda, "packages": packages}
    files = {
        str(path.relative_to(pack)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted([*pack.glob("lib/*"), *pack.glob("bin/*")])
    }
    (pack / MANIFEST).write_text(json.dumps(versions | {"files": files}, indent=1) + "\n")


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return the member of an archive without its owner."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def write_archive(pack: Path, archive: Path) -> None:
    """Compress a folder into an archive."""
    print(f"compressing {pack} ...", flush=True)
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        tar.add(pack, pack.name, filter=anonymous)


def write_parts(model: Path, folder: Path, max_bytes: int = MAX_BYTES) -> list[Path]:
    """Write a model in as few parts as can be, of equal size, in the place of those of another; return their paths.

    Args:
        model: the file.
        folder: where the parts go.
        max_bytes: of a part.
    """
    for path in folder.glob(MODEL_PARTS):
        path.unlink()
    data = model.read_bytes()
    n = -(-len(data) // max_bytes)
    step = -(-len(data) // n)
    parts = [folder / MODEL_PARTS.replace("*of*", f"{i + 1}of{n}") for i in range(n)]
    for i, path in enumerate(parts):
        path.write_bytes(data[i * step : (i + 1) * step])
    return parts


def check_sizes(paths: Iterable[Path], max_bytes: int = MAX_BYTES) -> None:
    """Print the sizes of files, in MiB.

    Raises:
        PackError: a file has more than ``max_bytes`` and is too large to be carried.
    """
    for path in paths:
        size = path.stat().st_size
        print(f"{size / (1 << 20):6.1f} MiB  {path}", flush=True)
        if size > max_bytes:
            raise PackError(f"{path} has {size} bytes, more than {max_bytes}: pack for one architecture only")


def local_environment() -> dict[str, str]:
    """Return the variables that run the pack on this machine, with the parts of CUDA that this machine lacks."""
    folders = [*OUT.glob("cublas/nvidia/*/lib"), *([] if has_driver() else [OUT / "stubs"])]
    before = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [*map(str, folders), before]))
    os.environ["PYTHONPATH"] = str(SITE)  # numpy
    return pack_environment(PACK)


def annotated(model: Path) -> Path:
    """Make a copy of a model with a FASA profile, and return its path: by the packed libraries, so these load."""
    fasa_edge = [sys.executable, "-c", _FASA_EDGE]
    where = {"env": local_environment(), "cwd": PACK}  # elsewhere Python would find fasa_edge's sources first
    call(*fasa_edge, "doctor", **where)
    copy = OUT / f"{model.stem}-fasa.gguf"
    if not copy.exists() or copy.stat().st_mtime < model.stat().st_mtime:
        call(*fasa_edge, "convert", "--force", "--output", copy, model, **where)
    return copy


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="native", help="compute capability times ten; native: of the GPU here")
    parser.add_argument("--model", type=Path, help="a small one, for the check of a real model")
    parser.add_argument(
        "--run", nargs=argparse.REMAINDER, help="pack nothing, but run gpu_check.py with these arguments"
    )
    options = parser.parse_args()
    try:
        nvcc = find_nvcc()
        OUT.mkdir(parents=True, exist_ok=True)
        arch = native_arch() if options.arch == "native" else options.arch
        nvcc = compiler(nvcc)
        build(arch, nvcc)
        stage(PACK, arch, cuda_version(nvcc))
        model = annotated(options.model.resolve()) if options.model else None
        if options.run is not None:
            local_environment()
            given = ["--model", str(model)] if model else []
            sys.exit(
                subprocess.run([sys.executable, PACK / "gpu_check.py", *given, *options.run], check=False).returncode
            )
        write_archive(PACK, ARCHIVE)
        check_sizes([ARCHIVE, *(write_parts(model, OUT) if model else [])])
    except (PackError, CudaCheckError, CheckError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
