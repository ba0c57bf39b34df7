"""What the K and V that a model makes of tokens depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasa_edge.config import FasaConfig
from fasa_edge.errors import ConvertError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.split import model_files
from fasa_edge.runtime import capi
from fasa_edge.runtime.capi_eval import FASA
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.schema import ARRAYS, PREFIX

_N_START, _N_SAMPLES, _N_SAMPLE = 16 << 20, 256, 4096

ROPE_ARGUMENTS = (
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)
"""What changes RoPE at run time, of the arguments of :class:`llama_cpp.Llama`."""


def fingerprint(path: Path) -> str:
    """Tell a file of weights from others without reading it all: some 17 MB of it, in a tenth of a second.

    It is the hash of a GGUF's metadata, but for a profile, of the descriptions of its tensors, and of the tensor data
    its size, the first 16 MiB, and 4 KiB at each of 256 places, evenly over the rest; of another file likewise, as if
    all were data. Weights that differ between these places alone go unnoticed; another training or quantization changes
    all.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        header = read_header(path)
    except ConvertError:  # an adapter of an old format, or what llama.cpp reads and we do not
        start = 0
    else:
        start = header.data_offset
        for key, entry in sorted(header.entries.items()):
            if not key.startswith(PREFIX):
                digest.update(entry.raw)
        digest.update(header.tensor_infos)
    with path.open("rb", buffering=0) as file:
        n_bytes = os.fstat(file.fileno()).st_size - start
        digest.update(n_bytes.to_bytes(8, "little"))
        for offset, size in _samples(n_bytes):
            file.seek(start + offset)
            digest.update(file.read(size))
    return digest.hexdigest()


def _samples(n_bytes: int) -> Iterator[tuple[int, int]]:
    """Where of so many bytes some are read, and how many."""
    yield 0, _N_START
    rest = max(n_bytes - _N_START, 0)
    for i in range(_N_SAMPLES if rest else 0):
        yield _N_START + i * max(rest - _N_SAMPLE, 0) // (_N_SAMPLES - 1), _N_SAMPLE


def profile_fingerprint(path: Path) -> str:
    """Tell a profile's chunks and tips from others': the hash of its arrays.

    Raises:
        ConvertError: the file cannot be read.
    """
    header = read_header(path)
    digest = hashlib.blake2b(digest_size=16)
    for key in ARRAYS:
        if entry := header.find(key):
            digest.update(entry.raw)
    return digest.hexdigest()


def identity(llm: llama_cpp.Llama) -> dict[str, Any]:
    """Return, as values for JSON, what K and V of a model depend on besides the tokens, up to what rounding differs in.

    Nothing of FASA is among it: prompts are read by dense attention, but for :func:`prompt_settings`, and tips are made
    of K again.

    Raises:
        OSError: a file cannot be read.
    """
    params = llm.context_params
    overrides = {key: value for key, value in (llm.kv_overrides or {}).items() if not key.startswith(PREFIX)}
    return {
        "model": [fingerprint(file) for file in model_files(Path(llm.model_path))],
        "lora": [fingerprint(Path(llm.lora_path)), llm.lora_scale] if llm.lora_path else None,
        "overrides": overrides,
        "type_k": capi.type_name(params.type_k),
        "type_v": capi.type_name(params.type_v),
        "flash_attn": params.flash_attn_type,
        "attention": params.attention_type,
        "rope": {name: getattr(params, name) for name in ROPE_ARGUMENTS},
        "long_rope": _is_long(llm),
    }


def prompt_settings(llm: llama_cpp.Llama) -> dict[str, Any] | None:
    """Return the settings in force on which K and V depend where prompts are read by blocks (``prompt_mass``).

    None: they are read by dense attention.
    """
    params = capi.get_params(llm.ctx)
    if params is None or not capi.has_profile(llm.model) or not params.enabled:
        return None
    if params.prompt_mass == FasaConfig.prompt_mass or params.policy != FASA:
        return None
    return {
        **{name: getattr(params, name) for name in ("prompt_mass", "n_tip", "n_dense_layers")},
        "min_ctx": capi.min_ctx(llm.ctx),
        # layers that have K on a GPU are read densely
        **{name: getattr(llm.model_params, name) for name in ("n_gpu_layers", "split_mode", "main_gpu")},
        "offload_kqv": llm.context_params.offload_kqv,
    }


def _is_long(llm: llama_cpp.Llama) -> bool:
    """Whether the context is one for which a model with two sets of frequency factors takes those for long ones."""
    arch = llm.metadata.get("general.architecture", "")
    n_ctx_orig = llm.context_params.yarn_orig_ctx or int(
        llm.metadata.get(f"{arch}.rope.scaling.original_context_length", 0)
    )
    return bool(n_ctx_orig) and llm.n_ctx() > n_ctx_orig
