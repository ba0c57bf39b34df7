"""What the engine makes of a model and some tokens depends on, to the bit."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import Any

from fasa_edge.runtime import capi, capi_eval, library
from fasa_edge.runtime.library import llama_cpp


def engine(llm: llama_cpp.Llama) -> dict[str, Any]:
    """Return libraries, devices, parameters of model and context, and threads, as values for JSON."""
    types = {name: capi.type_name(getattr(llm.context_params, name)) for name in ("type_k", "type_v")}
    return {
        "library": [sha256(path) for path in (*_libraries(), *capi_eval.library())],
        "devices": [about for _, about in library.devices()],
        "model": _changed(llm.model_params, llama_cpp.llama_model_default_params()),
        "tensor_split": llm.tensor_split,
        "context": _changed(llm.context_params, llama_cpp.llama_context_default_params()),
        "n_threads": llm.n_threads,
        "n_threads_batch": llm.n_threads_batch,
        **types,
    }


def sha256(path: Path) -> str:
    """Hash a file as a whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _changed(params: ctypes.Structure, default: ctypes.Structure) -> dict[str, Any]:
    """Tells what results may depend on: the numbers among parameters that are not the defaults."""
    named = {name: getattr(params, name) for name, *_ in params._fields_ if name not in _TOLD_APART}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, int | float) and value != getattr(default, name)
    }


_TOLD_APART = (
    *("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "type_k", "type_v"),
    *("load_mode", "lazy_mode", "check_tensors"),
)
"""Told otherwise, or of no effect on what one token after another gives."""


def _libraries() -> list[Path]:
    """libllama, libggml-base and the backends that are loaded, or could be where the system does not tell."""
    build = library.check(library.llama_cpp, library.lib_dir())
    loaded = library.backends()
    backends = sorted(filter(library.is_backend, library.lib_dir().iterdir())) if loaded is None else map(Path, loaded)
    return [*(Path(os.fsdecode(path)) for path in (build.llama_path, build.ggml_base_path)), *backends]
