"""What the K and V that a model makes of tokens depend on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from fasa_edge.config import FasaConfig
from fasa_edge.io.split import model_files
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp

_N_START, _N_SAMPLES, _N_SAMPLE = 16 << 20, 256, 4096

ROPE_ARGUMENTS = (
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)
"""What changes RoPE at run time, of the arguments of :class:`llama_cpp.Llama`."""


def fingerprint(path: Path) -> str:
    """Tell a file of weights from others without reading it all: some 17 MB of it, in hundredths of a second.

    It is the hash of its size, its first 16 MiB, where a GGUF has its metadata (among them hashes of weights, if it has
    any) and the descriptions of its tensors, and 4 KiB at each of 256 places, evenly over the rest. Weights that differ
    between these places alone go unnoticed; another training or quantization changes all.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_N_START))
        rest = max(size - _N_START, 0)
        for i in range(_N_SAMPLES if rest else 0):
            file.seek(_N_START + i * max(rest - _N_SAMPLE, 0) // (_N_SAMPLES - 1))
            digest.update(file.read(_N_SAMPLE))
    return digest.hexdigest()


def identity(llm: llama_cpp.Llama, profile: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return, as values for JSON, what K and V of a model depend on besides the tokens, up to what rounding differs in.

    Args:
        llm: the model.
        profile: the file of its FASA profile, if that is not its own.

    Raises:
        OSError: a file cannot be read.
    """
    params = llm.context_params
    overrides = {key: value for key, value in (llm.kv_overrides or {}).items() if not key.startswith("fasa.")}
    return {
        "model": [fingerprint(file) for file in model_files(Path(llm.model_path))],
        "profile": profile and fingerprint(Path(profile)),
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
    """Return the settings in force where prompts are read by blocks (``prompt_mass``), on which K and V depend then."""
    params = capi.get_params(llm.ctx)
    return params.as_dict() if params and params.prompt_mass < FasaConfig.prompt_mass else None


def _is_long(llm: llama_cpp.Llama) -> bool:
    """Whether the context is one for which a model with two sets of frequency factors takes those for long ones."""
    arch = llm.metadata.get("general.architecture", "")
    n_ctx_orig = llm.context_params.yarn_orig_ctx or int(
        llm.metadata.get(f"{arch}.rope.scaling.original_context_length", 0)
    )
    return bool(n_ctx_orig) and llm.n_ctx() > n_ctx_orig
