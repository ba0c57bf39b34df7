"""Puts the patched llama.cpp under the stock ``llama_cpp`` bindings, and checks that it is really there.

``import fasa_edge`` before ``import llama_cpp`` is enough: the bindings load what ``LLAMA_CPP_LIB_PATH`` names. Whoever
was first decides, also for ggml, whose soname a foreign copy may hold already; so the mapped files are checked, not the
intention.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fasa_edge.errors import LibraryError

import psutil

LLAMA_COMMIT = "0c1e57098"
"""The llama.cpp commit that ``patches/`` applies to and whose structs the bindings mirror."""

_DEVICE_TYPE_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU

_REMEDY = "import fasa_edge before llama_cpp, and before anything else that loads llama.cpp or ggml, in this process"


class Build(ctypes.Structure):
    """Mirror of ``struct llama_fasa_build`` (llama-fasa.h)."""

    _fields_ = [
        ("llama_commit", ctypes.c_char_p),
        ("ggml_base_path", ctypes.c_char_p),
        ("llama_path", ctypes.c_char_p),
        ("sizeof_model_params", ctypes.c_size_t),
        ("sizeof_context_params", ctypes.c_size_t),
        ("sizeof_batch", ctypes.c_size_t),
        ("sizeof_kv_override", ctypes.c_size_t),
        ("sizeof_fasa_params", ctypes.c_size_t),
        ("sizeof_fasa_stats", ctypes.c_size_t),
        ("sizeof_fasa_memory", ctypes.c_size_t),
        ("sizeof_fasa_layer", ctypes.c_size_t),
    ]


def installed(name: str) -> Path:
    """Find ``lib`` or ``llama.cpp``, which the build puts into the package: this one, in a clone the installed one."""
    here = Path(__file__).parents[1] / name
    return here if here.exists() else Path(sysconfig.get_path("platlib"), "fasa_edge", name)


def lib_dir() -> Path:
    """Find the directory of the patched libraries: the build's, or what ``FASA_LIB_PATH`` names for work on them."""
    return Path(os.environ.get("FASA_LIB_PATH") or installed("lib")).resolve()


def load() -> ModuleType:
    """Import ``llama_cpp`` over the patched library and return it.

    Raises:
        LibraryError: another library is mapped, or it does not fit the installed bindings.
    """
    if "llama_cpp" not in sys.modules:
        if not lib_dir().is_dir():
            raise LibraryError(
                f"the patched llama.cpp libraries are not at {lib_dir()}: install fasa-edge with `make install` or pip "
                "and run that environment's Python, or set FASA_LIB_PATH to a directory that holds them"
            )
        os.environ["LLAMA_CPP_LIB_PATH"] = str(lib_dir())
        # vision models load a library of their own, which must be of the same build
        os.environ["MTMD_CPP_LIB"] = str(lib_dir())
    try:
        import llama_cpp
    except (OSError, RuntimeError) as error:
        raise LibraryError(
            f"the libraries in {lib_dir()} do not load: {error}; either another ggml came first (then {_REMEDY}), "
            "or the installation is damaged (then reinstall fasa-edge)"
        ) from error

    check(llama_cpp, lib_dir())
    lib = ggml(llama_cpp)
    lib.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    if not lib.ggml_backend_dev_by_type(_DEVICE_TYPE_CPU):
        # built with GGML_BACKEND_DL: ggml looks for its backends beside the executable, which here is Python's
        logger = llama_cpp._logger.logger
        level = logger.level
        logger.setLevel(logging.ERROR)  # ggml tells what it loads, and an import says nothing
        lib.ggml_backend_load_all_from_path(os.fsencode(lib_dir()))
        logger.setLevel(level)
        if not lib.ggml_backend_dev_by_type(_DEVICE_TYPE_CPU):
            raise LibraryError(
                f"no CPU backend in {lib_dir()} loads on this machine: install a wheel built for it, or build with "
                "`make install`"
            )
    return llama_cpp


def ggml(llama_cpp: ModuleType, name: str = "ggml") -> ctypes.CDLL:
    """Load a library of ggml, which is mapped already.

    Its name is asked for, as Windows finds the functions of a library in that library only, not in those it links to.

    Args:
        llama_cpp: the imported bindings.
        name: ``ggml`` has the registry of the backends, ``ggml-base`` what is done with a device or a tensor.
    """
    return llama_cpp.llama_cpp.load_shared_library(name, lib_dir())


def devices() -> list[tuple[ctypes.c_void_p, str]]:
    """List the devices of all backends that are loaded, each with its name and what it is: of the CPU, which."""
    registry, base = ggml(llama_cpp), ggml(llama_cpp, "ggml-base")
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_dev_name.restype = base.ggml_backend_dev_description.restype = ctypes.c_char_p
    handles = [ctypes.c_void_p(registry.ggml_backend_dev_get(i)) for i in range(registry.ggml_backend_dev_count())]
    names = base.ggml_backend_dev_name, base.ggml_backend_dev_description
    return [(handle, ": ".join(name(handle).decode().strip() for name in names)) for handle in handles]


def backends() -> list[str] | None:
    """List the paths of the backends that are mapped: devices' and the CPU's, of whose variants ggml keeps the best.

    The result is None where the system does not list a process' mapped files to it (macOS).
    """
    maps = getattr(psutil.Process(), "memory_maps", None)
    if maps is None:
        return None
    added = os.environ.get("GGML_BACKEND_PATH")  # ggml loads it, whatever its name
    paths = {os.path.realpath(m.path) for m in maps() if m.path}
    return sorted(path for path in paths if is_backend(Path(path)) or (added and path == os.path.realpath(added)))


def is_backend(path: Path) -> bool:
    """Say whether a library is named as ggml's backends are."""
    return "ggml-" in path.name and "ggml-base" not in path.name and path.suffix in (".so", ".dylib", ".dll")


def cpu_backends() -> list[str] | None:
    """List those of the CPU among :func:`backends`."""
    found = backends()
    return None if found is None else [path for path in found if "ggml-cpu" in Path(path).name]


def check(llama_cpp: ModuleType, lib_dir: Path) -> Build:
    """Verify which libllama and libggml-base are mapped, their commit, and the sizes of the structs they share.

    Args:
        llama_cpp: the imported bindings.
        lib_dir: where both libraries must come from.

    Raises:
        LibraryError: names what is mapped instead, and the remedy.
    """
    lib = llama_cpp.llama_cpp._lib
    try:
        lib.llama_fasa_get_build.restype = Build
        build = lib.llama_fasa_get_build()
    except AttributeError:
        raise LibraryError(f"llama_cpp runs on {lib._name}, which is not the patched library: {_REMEDY}") from None

    for name, path in (("libllama", build.llama_path), ("libggml-base", build.ggml_base_path)):
        mapped = Path(os.fsdecode(path)).resolve()
        if mapped.parent != lib_dir.resolve():
            raise LibraryError(f"{name} is mapped from {mapped}, expected it from {lib_dir}: {_REMEDY}")

    commit = build.llama_commit.decode()
    if commit != LLAMA_COMMIT:
        raise LibraryError(
            f"the library in {lib_dir} was built from llama.cpp {commit}, expected {LLAMA_COMMIT}: reinstall fasa-edge"
        )

    for struct, size in (
        ("llama_model_params", build.sizeof_model_params),
        ("llama_context_params", build.sizeof_context_params),
        ("llama_batch", build.sizeof_batch),
        ("llama_model_kv_override", build.sizeof_kv_override),
    ):
        bound = ctypes.sizeof(getattr(llama_cpp, struct))
        if bound != size:
            raise LibraryError(
                f"{struct} has {bound} bytes in llama-cpp-python {llama_cpp.__version__} and {size} in the library: "
                "install the version of llama-cpp-python that fasa-edge requires"
            )
    return build


if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = load()
