"""Metal, as far as a machine without it can tell: address spaces, what is patched of ggml-metal.

What the kernels compute is tested with that of all backends, in the emulator (tests/simt).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from clang.cindex import Diagnostic, Index

pytestmark = pytest.mark.check

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


def clang_errors(name: str, source: str, include: list[Path], *flags: str) -> list[str]:
    """What clang's parser refuses."""
    headers = Path(subprocess.check_output([COMPILER, "-print-file-name=include"], text=True).strip())
    flags = (*flags, "-ferror-limit=0", *(f"-I{path}" for path in (*include, headers)))
    unit = Index.create().parse(name, flags, [(name, source)])  # lives as long as what is read of it
    errors = [entry for entry in unit.diagnostics if entry.severity >= Diagnostic.Error]
    return [f"{Path(str(error.location.file)).name}:{error.location.line}: {error.spelling}" for error in errors]


def metal_errors(source: str) -> list[str]:
    """Of kernels: Metal's C++14, with address spaces that clang minds."""
    include = [ROOT / "tests/simt/metal", TREE / "ggml/include"]
    return clang_errors("unit.cpp", source, include, "-x", "c++", "-std=c++14", "-DSIMT_ADDRESS_SPACES")


def test_pointers_stay_in_their_address_spaces(kernels: str) -> None:
    # in Metal, instances have host names, and vectors are converted by their elements
    source = "#include <metal_stdlib>\n" + re.sub(r"\[\[host_name.*?\]\]", "", kernels)
    source = source.replace("int4(as_type<char4>(a))*int4(as_type<char4>(b))", "{}")
    assert not metal_errors(source)
    (error,) = metal_errors(f"{source}device float * f(threadgroup float * p) {{ return p; }}\n")
    assert "'device float *' with an lvalue of type 'threadgroup float *'" in error


@pytest.mark.parametrize("name", ["ggml-metal.cpp", "ggml-metal-ops.cpp"])
def test_patched_files_compile(name: str) -> None:
    include = [TREE / "ggml/include", TREE / "ggml/src", METAL, KERNELS]
    # upstream's own C++ library brings <memory> along
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-w", "-include", "memory", *(f"-I{path}" for path in include)]
    done = subprocess.run([*command, str(METAL / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("embed", [0, 1])
def test_patched_objective_c_parses(embed: int) -> None:
    """On headers of ours that have the names of Foundation and Metal (tests/simt/objc)."""
    file = METAL / "ggml-metal-device.m"
    include = [ROOT / "tests/simt/objc", TREE / "ggml/include", TREE / "ggml/src", METAL]
    flags = ["-x", "objective-c", "-fblocks", "-fobjc-runtime=macosx-11", f"-DGGML_METAL_EMBED_LIBRARY={embed}"]
    source = file.read_text()
    assert not clang_errors(str(file), source, include, *flags)
    for ours in ("ggml_metal_fasa_supported(op)", "lib->objs[GGML_METAL_LIB_FASA]", "kind == GGML_METAL_LIB_FASA"):
        assert source.count(ours) == 1
        broken = source.replace(ours, ours.replace("fasa", "asaf").replace("FASA", "ASAF"))
        assert len(clang_errors(str(file), broken, include, *flags)) == 1


def test_the_library_is_in_all_lists() -> None:
    """Every source of kernels has a library, and the other way round."""
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
