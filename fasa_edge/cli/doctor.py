"""The command ``fasa-edge doctor``."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import fasa_edge
from fasa_edge.cli.common import echo, json_option, print_json
from fasa_edge.config import FasaConfig, default_n_tip, tip_bytes
from fasa_edge.runtime import ggml, library

import click
from tabulate import tabulate


def _devices() -> list[str]:
    """The devices of all backends that are loaded, each with what it is, and from which depth on FASA pays there."""
    registry, base = (library.ggml(library.llama_cpp, name) for name in ("ggml", "ggml-base"))
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_dev_name.restype = base.ggml_backend_dev_description.restype = ctypes.c_char_p
    base.ggml_fasa_bandwidth.restype = ctypes.c_float
    res = []
    for handle in (ctypes.c_void_p(registry.ggml_backend_dev_get(i)) for i in range(registry.ggml_backend_dev_count())):
        names = (base.ggml_backend_dev_name, base.ggml_backend_dev_description)
        about = ": ".join(name(handle).decode().strip() for name in names)
        if bandwidth := base.ggml_fasa_bandwidth(handle):
            about += f", {bandwidth:,.0f} GB/s; with 32/8 heads of 128 sparse from {_pays_from(bandwidth):,} cells on"
        res.append(about)
    return res


def _pays_from(bandwidth: float) -> int:
    """Cells from which on the default budget is faster than dense attention, for the heads of an 8B model in f16."""
    n_head_kv, n_embd_head, budget = 8, 128, FasaConfig.budget
    row_bytes, n_bytes = n_head_kv * n_embd_head * 2 * 2, n_head_kv * tip_bytes(default_n_tip(n_embd_head))
    return max(2 * budget, ggml.base.ggml_fasa_min_cells(bandwidth, row_bytes, n_bytes, budget))


@click.command(name="doctor")
@json_option
def command(as_json: bool) -> None:
    """Check the installation: library, commit, CPU features, backends, FASA."""
    llama_cpp = library.llama_cpp
    build = library.check(llama_cpp, library.lib_dir())
    llama_cpp.llama_backend_init()
    report = {
        "fasa_edge": fasa_edge.__version__,
        "llama_cpp_python": llama_cpp.__version__,
        "libllama": build.llama_path.decode(),
        "libggml_base": build.ggml_base_path.decode(),
        "llama_commit": build.llama_commit.decode(),
        "struct_sizes": "as the bindings expect",
        "system_info": llama_cpp.llama_print_system_info().decode().strip(),
        "devices": _devices(),
        "cpu_backend": library.cpu_backends(),
        "fasa": "compiled in",
        "python": sys.version.split()[0],
        "package": str(Path(fasa_edge.__file__).parent),
    }
    if as_json:
        return print_json(report)
    echo(tabulate(report.items()))
