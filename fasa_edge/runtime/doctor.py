"""``examine``: what ``fasa-edge doctor`` prints."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fasa_edge.config import FasaConfig, default_n_tip, tip_bytes
from fasa_edge.runtime import ggml, library
from fasa_edge.version import __version__


@dataclass(frozen=True)
class Installation:
    """The libraries and devices that this process has.

    Attributes:
        fasa_edge: version of this package.
        llama_cpp_python: version of the bindings.
        libllama: path of the library that is mapped.
        libggml_base: likewise.
        llama_commit: of llama.cpp, from which they were built.
        struct_sizes: always "as the bindings expect", or there would be an error instead.
        system_info: CPU features that the library uses, as llama.cpp prints them.
        devices: of all backends that are loaded, each with what it is; of a GPU also from which depth on FASA pays.
        cpu_backend: paths of the CPU backends that are mapped; None where the system does not tell.
        fasa: always "compiled in", likewise.
        python: version of the interpreter.
        package: folder of this package.
    """

    fasa_edge: str
    llama_cpp_python: str
    libllama: str
    libggml_base: str
    llama_commit: str
    struct_sizes: str
    system_info: str
    devices: list[str]
    cpu_backend: list[str] | None
    fasa: str
    python: str
    package: str


def examine() -> Installation:
    """Check the installation.

    Raises:
        LibraryError: another library is mapped, or it does not fit the installed bindings.
    """
    llama_cpp = library.llama_cpp
    build = library.check(llama_cpp, library.lib_dir())
    llama_cpp.llama_backend_init()
    return Installation(
        fasa_edge=__version__,
        llama_cpp_python=llama_cpp.__version__,
        libllama=os.fsdecode(build.llama_path),
        libggml_base=os.fsdecode(build.ggml_base_path),
        llama_commit=build.llama_commit.decode(),
        struct_sizes="as the bindings expect",
        system_info=llama_cpp.llama_print_system_info().decode().strip(),
        devices=_devices(),
        cpu_backend=library.cpu_backends(),
        fasa="compiled in",
        python=sys.version.split()[0],
        package=str(Path(__file__).parents[1]),
    )


def _devices() -> list[str]:
    """The devices of all backends that are loaded, each with what it is, and from which depth on FASA pays there."""
    res = []
    for handle, about in library.devices():
        if bandwidth := ggml.base.ggml_fasa_bandwidth(handle):
            about += f", {bandwidth:,.0f} GB/s; with 32/8 heads of 128 sparse from {_pays_from(bandwidth):,} cells on"
        res.append(about)
    return res


def _pays_from(bandwidth: float) -> int:
    """Cells from which on the default budget is faster than dense attention, for the heads of an 8B model in f16."""
    n_head_kv, n_embd_head, budget = 8, 128, FasaConfig.budget
    row_bytes, n_bytes = n_head_kv * n_embd_head * 2 * 2, n_head_kv * tip_bytes(default_n_tip(n_embd_head))
    return max(2 * budget, ggml.base.ggml_fasa_min_cells(bandwidth, row_bytes, n_bytes, budget))
