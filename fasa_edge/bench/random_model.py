"""A model of a known geometry with random weights and a random FASA profile: it decodes as fast as the real one.

Its vocabulary has no text (``tokenizer.ggml.model`` is ``no_vocab``), so it evaluates tokens and does nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fasa_edge.bench.geometry import Geometry
from fasa_edge.bench.random_data import RandomFiller
from fasa_edge.config import FasaConfig, default_n_tip
from fasa_edge.errors import FasaError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.profile import encode_profile
from fasa_edge.runtime import capi
from fasa_edge.runtime.fit import without_weights
from fasa_edge.schema import Calibration, Profile, to_metadata
from fasa_edge.version import __version__

import gguf
import numpy as np


def write_random_model(folder: Path, name: str, geometry: Geometry, weight_type: str) -> tuple[Path, Path]:
    """Writes a model and a profile for it.

    Args:
        folder: an empty one.
        name: of the model, and of its file.
        geometry: what it is like.
        weight_type: of its matrices, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`; vectors are f32.

    Returns:
        The model and the profile.

    Raises:
        FasaError: the folder cannot be written, or has too little room.
    """
    model, profile = folder / f"{name}-{weight_type}.gguf", folder / "profile.gguf"
    try:
        _write_model(model, name, geometry, weight_type)
        metadata = to_metadata(_random_profile(geometry, _fingerprint(model)))
        profile.write_bytes(encode_profile(read_header(model), metadata))
    except OSError as error:
        raise FasaError(
            f"{model} cannot be written: {error.strerror}; name another folder with TMPDIR, or take fewer --layers"
        ) from error
    return model, profile


def _write_model(path: Path, name: str, geometry: Geometry, weight_type: str) -> None:
    arch, heads = geometry.arch, geometry.heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_block_count(geometry.n_layer)
    writer.add_context_length(1 << 30)  # as long as may be asked for
    writer.add_embedding_length(geometry.n_embd)
    writer.add_feed_forward_length(geometry.n_ff)
    writer.add_head_count(heads.n_head)
    writer.add_head_count_kv(heads.n_head_kv)
    writer.add_key_length(heads.n_embd_head)
    writer.add_value_length(heads.n_embd_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(heads.n_embd_head)
    writer.add_rope_freq_base(geometry.rope_base)
    writer.add_vocab_size(geometry.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    tensors = list(_tensors(geometry))
    ggml_type, f32 = capi.cache_type(weight_type), capi.cache_type("f32")
    for tensor, shape in tensors:
        type_ = ggml_type if len(shape) > 1 else f32
        # ggml's types are passed as they are; the shape is numpy's way round
        dtype = gguf.GGMLQuantizationType(type_)
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), _n_bytes(shape, type_), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    filler = RandomFiller(np.random.Generator(np.random.SFC64(0)))
    room = np.empty(max(_n_bytes(shape, ggml_type) for _, shape in tensors), np.uint8)  # for one tensor after the other
    for tensor, shape in tensors:
        writer.write_tensor_data(_weights(filler, room, tensor, shape, weight_type))
    writer.close()


def _tensors(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Lists names and shapes, outermost dimension first."""
    n_embd, n_ff, heads = geometry.n_embd, geometry.n_ff, geometry.heads
    n_embd_q, n_embd_kv = heads.n_head * heads.n_embd_head, heads.n_head_kv * heads.n_embd_head
    yield "token_embd.weight", (geometry.n_vocab, n_embd)
    yield "output_norm.weight", (n_embd,)
    if not geometry.tied:
        yield "output.weight", (geometry.n_vocab, n_embd)
    for il in range(geometry.n_layer):
        blk = f"blk.{il}"
        yield f"{blk}.attn_norm.weight", (n_embd,)
        for part, width in (("q", n_embd_q), ("k", n_embd_kv), ("v", n_embd_kv)):
            yield f"{blk}.attn_{part}.weight", (width, n_embd)
            if geometry.arch == "qwen2":
                yield f"{blk}.attn_{part}.bias", (width,)
        if geometry.arch == "qwen3":
            yield f"{blk}.attn_q_norm.weight", (heads.n_embd_head,)
            yield f"{blk}.attn_k_norm.weight", (heads.n_embd_head,)
        yield f"{blk}.attn_output.weight", (n_embd, n_embd_q)
        yield f"{blk}.ffn_norm.weight", (n_embd,)
        yield f"{blk}.ffn_gate.weight", (n_ff, n_embd)
        yield f"{blk}.ffn_up.weight", (n_ff, n_embd)
        yield f"{blk}.ffn_down.weight", (n_embd, n_ff)


def _n_bytes(shape: tuple[int, ...], ggml_type: int) -> int:
    return int(np.prod(shape) * capi.bytes_per_element(ggml_type))


def _weights(filler: RandomFiller, room: np.ndarray, name: str, shape: tuple[int, ...], weight_type: str) -> np.ndarray:
    """Makes one tensor, such that its output is as large as its input; matrices are made in ``room``, uint8."""
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if len(shape) == 1:
        return np.zeros(shape, np.float32)
    weights = room[: _n_bytes(shape, capi.cache_type(weight_type))]
    filler.fill(weight_type, weights, 1.0 if name == "token_embd.weight" else shape[1] ** -0.5)
    return weights


def _random_profile(geometry: Geometry, fingerprint: str) -> Profile:
    rng, heads = np.random.default_rng(0), geometry.heads
    n_chunk = heads.n_embd_head // 2
    chunks = [
        np.stack([rng.permutation(n_chunk) for _ in range(heads.n_head_kv)]).astype(np.int32)
        for _ in range(geometry.n_layer)
    ]
    return Profile(
        n_tip=default_n_tip(heads.n_embd_head),
        chunks=chunks,
        agreement=[np.zeros(layer.shape, np.float32) for layer in chunks],
        centre=[np.zeros((*layer.shape, 2), np.float32) for layer in chunks],
        step=[np.full(layer.shape, 0.35, np.float32) for layer in chunks],  # about one is their deviation
        config=FasaConfig(),
        calibration=Calibration("none", 0, 0, 0, "random", f"fasa-edge {__version__}"),
        fingerprint=fingerprint,
    )


def _fingerprint(model: Path) -> str:
    """Reads the fingerprint as the runtime will compare it."""
    with without_weights(model) as loaded:
        if loaded is None:
            raise FasaError(f"llama.cpp does not load {model}, made of random weights: see its log")
        return capi.fingerprint(loaded)
