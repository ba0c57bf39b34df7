"""Metal, as far as a machine without it can tell: address spaces, the patched C++ of ggml-metal, its lists.

What the kernels compute is tested with that of all backends, in the emulator (tests/simt).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from clang.cindex import Diagnostic, Index

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".venv/build"
TREE = BUILD / "llama.cpp"
METAL = TREE / "ggml/src/ggml-metal"
KERNELS = TREE / "ggml/src/ggml-fasa"

COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")))


@pytest.fixture(scope="module")
def kernels() -> str:
    """The one file that ggml-metal gets."""
    return (BUILD / "simt/fasa.metal").read_text()


def clang_errors(source: str) -> list[str]:
    """What clang refuses of Metal's C++14, with address spaces that it minds."""
    headers = subprocess.check_output([COMPILER, "-print-file-name=include"], text=True).strip()
    include = [ROOT / "tests/simt/metal", BUILD / "simt", TREE / "ggml/include", headers]
    flags = ["-x", "c++", "-std=c++14", "-DSIMT_ADDRESS_SPACES", "-ferror-limit=0", *(f"-I{path}" for path in include)]
    unit = Index.create().parse("unit.cpp", flags, [("unit.cpp", source)])
    errors = [entry for entry in unit.diagnostics if entry.severity >= Diagnostic.Error]
    return [f"{entry.location.line}: {entry.spelling}" for entry in errors]


def test_pointers_stay_in_their_address_spaces(kernels: str) -> None:
    # in Metal, instances have host names, and vectors are converted by their elements
    source = '#include <metal_stdlib>\n' + re.sub(r"\[\[host_name.*?\]\]", "", kernels)
    source = source.replace("int4(as_type<char4>(a))*int4(as_type<char4>(b))", "{}")
    assert not clang_errors(source)
    (error,) = clang_errors(f"{source}device float * f(threadgroup float * p) {{ return p; }}\n")
    assert "'device float *' with an lvalue of type 'threadgroup float *'" in error


@pytest.mark.parametrize("name", ["ggml-metal.cpp", "ggml-metal-ops.cpp"])
def test_patched_files_compile(name: str) -> None:
    include = [TREE / "ggml/include", TREE / "ggml/src", METAL, KERNELS]
    # upstream's own C++ library brings <memory> along
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-w", "-include", "memory", *(f"-I{path}" for path in include)]
    done = subprocess.run([*command, str(METAL / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_library_is_in_all_lists() -> None:
    """Objective-C, which nothing here compiles: every source of kernels has a library, and the other way round."""
    sources = set(re.findall(r"^    kernels/(\w+)\.metal$", (METAL / "CMakeLists.txt").read_text(), re.MULTILINE))
    libraries = set(re.findall(r"^    X\(\w+, +(\w+)\)", (METAL / "ggml-metal-device.m").read_text(), re.MULTILINE))
    assert "fasa" in sources and sources == libraries


def test_no_macro_of_ggml_metal_is_a_word_of_ours(kernels: str) -> None:
    """ggml-metal puts its own headers in front of a source where it embeds it."""
    headers = [METAL / "kernels/common.h", METAL / "ggml-metal-impl.h", TREE / "ggml/src/ggml-common.h"]
    macros = {name for path in headers for name in re.findall(r"# *define (\w+)", path.read_text())}
    words = set(re.findall(r"\w+", re.sub(r"//.*", "", kernels)))
    assert "N_SIMDWIDTH" in macros and "fasa_warp_sum" in words and not macros & words


def test_what_the_emulator_does_not_read_is_right(kernels: str) -> None:
    """Attributes: buffers are numbered as the parameters stand, names those of the instances that a plan asks for."""
    signatures = re.findall(r"kernel void .*?FASA_PLACE", kernels, re.DOTALL)
    buffers = [re.findall(r"\[\[buffer\((\d+)\)\]\]", signature) for signature in signatures]
    assert len(buffers) == 7 and all(found == [str(i) for i in range(len(found))] for found in buffers)
    instance = r'host_name\("kernel_fasa_split_(\d+)_(\d+)"\).*kernel_fasa_split<\s*(\d+), (\d+)>'
    instances = re.findall(instance, kernels)
    assert sorted((int(a), int(b)) for a, b, _, _ in instances) == [(a, b) for a in (8, 16, 32) for b in (1, 4)]
    assert all(instance[:2] == instance[2:] for instance in instances)


def test_every_pointer_names_its_address_space(kernels: str) -> None:
    code = re.sub(r"//.*", "", kernels)
    pointer = re.compile(r"\b(float|char|u?int\d+_t|u?int4|float4|fasa_\w+) *(const)? *[*&] *\w")
    space = re.compile(r"\b(FASA_(GLOBAL|SHARED|THREAD)|device|threadgroup|constant|thread)\b")
    pointers = [line for line in code.splitlines() if pointer.search(line)]
    assert len(pointers) > 50 and not [line for line in pointers if not space.search(line)]
