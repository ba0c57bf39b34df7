#!/usr/bin/env python3
"""Compile all that we add to CUDA with nvcc, for every supported architecture, and print registers and spills.

The file of ggml-cuda that is patched is host code, compiled for the newest architecture only.

    python ggml_kernels/tools/cuda_check.py [--arch 89 ...]

Needs no GPU, and nothing of CUDA but its compiler: where cuBLAS' headers are missing, which ggml-cuda includes, they
come out of NVIDIA's Python package. What is compiled here has not run anywhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / ".venv" / "cuda-check"
TREE = ROOT / ".venv" / "build" / "llama.cpp"
KERNELS = TREE / "ggml/src/ggml-fasa/cuda"

ARCHS = (75, 80, 86, 89, 90, 100, 120)  # compute capability times ten: Turing, Ampere, Ada, Hopper, Blackwell

# ggml-cuda's own (its CMakeLists.txt)
FLAGS = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-Wno-deprecated-gpu-targets"]
DEFINES = ["-DGGML_CUDA_USE_GRAPHS", "-DGGML_CUDA_PEER_MAX_BATCH_SIZE=128"]

_FUNCTION = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores")
_REGISTERS = re.compile(r"Used (\d+) registers")


class CudaCheckError(Exception):
    """Something is missing or does not compile; the message names the remedy."""


def find_nvcc() -> Path:
    """Find CUDA's compiler: NVCC names it, or it is on the PATH, or where CUDA's installer puts it.

    Raises:
        CudaCheckError: it is at none of these places.
    """
    found = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not shutil.which(found):
        raise CudaCheckError(f"{found}: no such compiler\n  remedy: install CUDA's nvcc, or set NVCC to it")
    return Path(found)


def run(nvcc: Path, *arguments: str | Path) -> str:
    """Run nvcc, through ccache where that is installed, and return its stdout and stderr.

    Raises:
        CudaCheckError: it failed; the message has the command and what it printed.
    """
    command = [*filter(None, [shutil.which("ccache")]), nvcc, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CudaCheckError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def finds_cublas(nvcc: Path) -> bool:
    """Return whether nvcc finds cuBLAS' headers by itself."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "cublas.cu"
        source.write_text("#include <cublas_v2.h>\n")
        try:
            run(nvcc, "-E", source, "-o", os.devnull)
        except CudaCheckError:
            return False
    return True


def cuda_version(nvcc: Path) -> str:
    """Return CUDA's version, such as 13.0."""
    return re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))[1]


def download_cublas(nvcc: Path, folder: Path, *parts: str) -> Path:
    """Download NVIDIA's Python package of cuBLAS into a folder, unless it is there, and return the folder of its parts.

    Args:
        nvcc: the compiler, whose major version the package must have.
        folder: where it is unpacked.
        parts: the folders of the package that are taken: "include", "lib".

    Raises:
        CudaCheckError: pip could not download it.
    """
    if not (found := list(folder.rglob("cublas_v2.h"))):
        version = cuda_version(nvcc).split(".")[0]
        package = f"nvidia-cublas=={version}.*" if int(version) >= 13 else f"nvidia-cublas-cu{version}"
        print(f"no cuBLAS beside nvcc: taking that of the Python package {package}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
            done = subprocess.run([*command, "--dest", wheels, package], check=False)
            if done.returncode != 0:
                raise CudaCheckError(f"pip could not download {package}\n  remedy: install CUDA's cuBLAS")
            with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
                names = [name for name in wheel.namelist() if any(f"/{part}/" in name for part in parts)]
                wheel.extractall(folder, names)
        found = list(folder.rglob("cublas_v2.h"))
    return found[0].parent.parent


def cublas_headers(nvcc: Path) -> list[str]:
    """Return the option that leads to cuBLAS' headers, or none where nvcc finds them by itself."""
    return [] if finds_cublas(nvcc) else [f"-I{download_cublas(nvcc, OUT / 'cublas', 'include')}/include"]


def kernel_name(mangled: str) -> str:
    """Return a kernel's name, such as ``fasa_split_kernel<16, 4>``, from its mangled one."""
    name = re.search(r"(fasa_[a-z_]+?_kernel)", mangled)[1]
    parameters = [number.replace("n", "-") for number in re.findall(r"(?<=[IE])Li(n?\d+)E", mangled)]
    return name + (f"<{', '.join(parameters)}>" if parameters else "")


def usage(log: str) -> dict[str, dict[int, str]]:
    """Read out of ptxas' messages how many registers a thread takes, and how many bytes are spilled.

    Returns:
        By kernel and architecture (compute capability times ten): "40", or "255, 16 B spilled".
    """
    res: dict[str, dict[int, str]] = {}
    name, arch, spills = "", 0, 0
    for line in log.splitlines():
        if match := _FUNCTION.search(line):
            name, arch, spills = kernel_name(match[1]), int(match[2]), 0
        elif match := _SPILLS.search(line):
            spills = int(match[1])
        elif match := _REGISTERS.search(line):
            res.setdefault(name, {})[arch] = match[1] + (f", {spills} B spilled" if spills else "")
    return res


def check(archs: Sequence[int]) -> None:
    """Compile everything and print a table of registers.

    Args:
        archs: compute capabilities times ten.

    Raises:
        CudaCheckError: something is missing or does not compile.
    """
    from tabulate import tabulate  # gpu_pack.py, which takes functions from here, does without

    nvcc = find_nvcc()
    if not KERNELS.is_dir():
        raise CudaCheckError(f"{TREE}: no prepared llama.cpp\n  remedy: run `make install`")
    OUT.mkdir(parents=True, exist_ok=True)
    include = [f"-I{TREE}/ggml/include"]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = [f"-gencode=arch=compute_{max(archs)},code=sm_{max(archs)}"]

    print("the kernels alone ...", flush=True)
    run(nvcc, *FLAGS, *code, *include, "--threads=0", "-c", ROOT / "tests/simt/cuda-alone.cu", "-o", OUT / "alone.o")

    include += [f"-I{TREE}/ggml/src", *cublas_headers(nvcc)]
    print(f"the ops in ggml-cuda, for {', '.join(f'sm_{arch}' for arch in archs)} ...", flush=True)
    compile_ = [*FLAGS, *DEFINES, *include, "--threads=0", "-c"]
    log = run(nvcc, *compile_, *code, "--ptxas-options=-v", KERNELS / "fasa.cu", "-o", OUT / "fasa.o")

    print("what of ggml-cuda is patched ...", flush=True)
    run(nvcc, *compile_, *newest, TREE / "ggml/src/ggml-cuda/ggml-cuda.cu", "-o", OUT / "ggml-cuda.o")

    if not (found := usage(log)):
        raise CudaCheckError(f"ptxas names no kernel of {KERNELS / 'fasa.cu'}: has its output another form?\n{log}")
    rows = [
        {"registers of": name, **{f"sm_{arch}": registers.get(arch, "") for arch in archs}}
        for name, registers in sorted(found.items())
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), help="compute capability times ten")
    try:
        check(parser.parse_args().arch)
    except CudaCheckError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
