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

# right in Metal, which has host names and converts vectors by their elements
DIALECT = ("an attribute list cannot appear here", "(vector of 4 'int32_t' values) of different size")


def clang_errors(source: str) -> list[str]:
    """What clang refuses of Metal's C++14, with address spaces that it minds."""
    headers = subprocess.check_output([COMPILER, "-print-file-name=include"], text=True).strip()
    include = [ROOT / "tests/simt/metal", BUILD / "simt", TREE / "ggml/include", headers]
    flags = ["-x", "c++", "-std=c++14", "-DSIMT_ADDRESS_SPACES", "-ferror-limit=0", *(f"-I{path}" for path in include)]
    unit = Index.create().parse("unit.cpp", flags, [("unit.cpp", source)])
    errors = [entry for entry in unit.diagnostics if entry.severity >= Diagnostic.Error]
    return [f"{entry.location.file}:{entry.location.line}: {entry.spelling}" for entry in errors]


def test_pointers_stay_in_their_address_spaces() -> None:
    source = '#include "fasa.metal"\n'
    errors = [error for error in clang_errors(source) if not error.endswith(DIALECT)]
    assert not errors, "\n".join(errors)
    (error,) = [error for error in clang_errors(f"{source}device float * f(threadgroup float * p) {{ return p; }}\n")
                if not error.endswith(DIALECT)]  # fmt: skip
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


def test_no_name_has_two_meanings() -> None:
    """ggml-metal puts its own headers in front of a source where it embeds it: what they define we must not."""
    names = r"#define (\w+)|^(?:static inline|struct|kernel void) ?\w* ?(\w+)[ ({]"
    defined = lambda text: {a or b for a, b in re.findall(names, text, re.MULTILINE)}  # noqa: E731
    ours = defined((BUILD / "simt/fasa.metal").read_text())
    theirs = defined((METAL / "kernels/common.h").read_text() + (METAL / "ggml-metal-impl.h").read_text())
    assert "FASA_FN" in ours and "N_SIMDWIDTH" in theirs and not ours & theirs
