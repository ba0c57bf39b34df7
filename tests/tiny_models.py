"""Small random-weight GGUF models that llama.cpp loads and runs, one recipe an architecture.

The vocabulary is one SentencePiece token a byte, so that any text tokenizes. Weights are float32 and seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

Tensors = Iterator[tuple[str, tuple[int, ...]]]  # name and shape in ggml order: the contiguous dimension first


@dataclass(frozen=True)
class Shape:
    """Geometry of a tiny model; ``n_rot`` None rotates the whole head."""

    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 64
    n_rot: int | None = None
    rope_base: float = 10000.0
    n_ctx: int = 4096
    n_ff: int = 128

    @property
    def n_embd(self) -> int:
        return self.n_head * self.n_embd_head

    @property
    def n_embd_kv(self) -> int:
        return self.n_head_kv * self.n_embd_head


def make_model(path: Path, arch: str = "llama", shape: Shape | None = None, *, seed: int = 0, **keys: object) -> Path:
    """Writes a model.

    Args:
        path: file to be written.
        arch: a name in :data:`RECIPES`.
        shape: its geometry.
        seed: of the weights.
        keys: more metadata, ``__`` standing for a dot: integers as uint32, floats as float32, strings as they are.

    Returns:
        ``path``.
    """
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    _write_vocabulary(writer)
    _write_hyperparameters(writer, arch, shape)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key.replace("__", "."), value)
    for name, dims in RECIPES[arch](shape):
        values = _weights(rng, name, dims)
        if arch == "gemma3" and name == "token_embd.weight":
            values /= np.float32(np.sqrt(shape.n_embd))  # llama.cpp scales them back, and the layers must still count
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(rng: np.random.Generator, name: str, dims: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(dims[::-1], dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if name.endswith("ssm_a"):
        return -np.exp(0.1 * values)  # the state must decay
    if name == "token_embd.weight":
        return values
    return values / np.float32(np.sqrt(dims[0])) if len(dims) > 1 else np.float32(0.1) * values


def _write_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    types = [gguf.TokenType.UNKNOWN, *2 * [gguf.TokenType.CONTROL], *256 * [gguf.TokenType.BYTE], gguf.TokenType.NORMAL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)


N_VOCAB = 260


def _write_hyperparameters(writer: gguf.GGUFWriter, arch: str, shape: Shape) -> None:
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "mamba":
        writer.add_embedding_length(shape.n_embd)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * shape.n_embd)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(16)
        return
    writer.add_embedding_length(shape.n_embd)
    writer.add_head_count(shape.n_head)
    writer.add_rope_freq_base(shape.rope_base)
    if arch == "deepseek2":
        writer.add_head_count_kv(1)
        writer.add_rope_dimension_count(MLA_ROT)
        writer.add_q_lora_rank(MLA_RANK)
        writer.add_kv_lora_rank(MLA_RANK)
        writer.add_key_length(MLA_RANK + MLA_ROT)
        writer.add_value_length(MLA_RANK)
        writer.add_key_length_mla(shape.n_embd_head)
        writer.add_value_length_mla(shape.n_embd_head)
        writer.add_leading_dense_block_count(shape.n_layer)
        writer.add_expert_feed_forward_length(shape.n_ff)
        writer.add_expert_shared_count(1)
        return
    if arch == "lfm2":
        writer.add_shortconv_l_cache(CONV_CACHE)
        writer.add_head_count_kv([0 if _is_conv(il) else shape.n_head_kv for il in range(shape.n_layer)])
    else:
        writer.add_head_count_kv(shape.n_head_kv)
    if arch == "gemma3":
        writer.add_sliding_window(SWA_WINDOW)
        writer.add_sliding_window_pattern([il % 2 == 0 for il in range(shape.n_layer)])
    writer.add_rope_dimension_count(shape.n_embd_head if shape.n_rot is None else shape.n_rot)
    if arch == "stablelm":
        writer.add_parallel_residual(False)


def _ends(shape: Shape, bias: bool = False) -> Tensors:
    yield "token_embd.weight", (shape.n_embd, N_VOCAB)
    yield "output_norm.weight", (shape.n_embd,)
    yield "output.weight", (shape.n_embd, N_VOCAB)
    if bias:
        yield "output_norm.bias", (shape.n_embd,)


def _qkv(shape: Shape, blk: str) -> Tensors:
    yield f"{blk}.attn_norm.weight", (shape.n_embd,)
    yield f"{blk}.attn_q.weight", (shape.n_embd, shape.n_embd)
    yield f"{blk}.attn_k.weight", (shape.n_embd, shape.n_embd_kv)
    yield f"{blk}.attn_v.weight", (shape.n_embd, shape.n_embd_kv)
    yield f"{blk}.attn_output.weight", (shape.n_embd, shape.n_embd)


def _ffn(shape: Shape, blk: str) -> Tensors:
    yield f"{blk}.ffn_norm.weight", (shape.n_embd,)
    yield f"{blk}.ffn_gate.weight", (shape.n_embd, shape.n_ff)
    yield f"{blk}.ffn_up.weight", (shape.n_embd, shape.n_ff)
    yield f"{blk}.ffn_down.weight", (shape.n_ff, shape.n_embd)


def _llama(shape: Shape) -> Tensors:
    """NORM RoPE over the whole head."""
    yield from _ends(shape)
    for il in range(shape.n_layer):
        yield from _qkv(shape, f"blk.{il}")
        yield from _ffn(shape, f"blk.{il}")


def _qwen2(shape: Shape) -> Tensors:
    """NEOX RoPE over the whole head, biased Q, K and V."""
    yield from _llama(shape)
    for il in range(shape.n_layer):
        yield f"blk.{il}.attn_q.bias", (shape.n_embd,)
        yield f"blk.{il}.attn_k.bias", (shape.n_embd_kv,)
        yield f"blk.{il}.attn_v.bias", (shape.n_embd_kv,)


def _stablelm(shape: Shape) -> Tensors:
    """NEOX RoPE, partial rotary allowed."""
    yield from _ends(shape, bias=True)
    for il in range(shape.n_layer):
        yield from _qkv(shape, f"blk.{il}")
        yield from _ffn(shape, f"blk.{il}")
        yield f"blk.{il}.attn_norm.bias", (shape.n_embd,)
        yield f"blk.{il}.ffn_norm.bias", (shape.n_embd,)


def _chatglm(shape: Shape) -> Tensors:
    """NORM RoPE, partial rotary allowed; gate and up projection in one tensor."""
    yield from _ends(shape)
    for il in range(shape.n_layer):
        yield from _qkv(shape, f"blk.{il}")
        yield f"blk.{il}.ffn_norm.weight", (shape.n_embd,)
        yield f"blk.{il}.ffn_up.weight", (shape.n_embd, 2 * shape.n_ff)
        yield f"blk.{il}.ffn_down.weight", (shape.n_ff, shape.n_embd)


def _bloom(shape: Shape) -> Tensors:
    """ALiBi, no RoPE."""
    yield from _ends(shape, bias=True)
    yield "token_embd_norm.weight", (shape.n_embd,)
    yield "token_embd_norm.bias", (shape.n_embd,)
    n_qkv = shape.n_embd + 2 * shape.n_embd_kv
    for il in range(shape.n_layer):
        for name, n_in, n_out in (
            ("attn_qkv", shape.n_embd, n_qkv),
            ("attn_output", shape.n_embd, shape.n_embd),
            ("ffn_up", shape.n_embd, shape.n_ff),
            ("ffn_down", shape.n_ff, shape.n_embd),
        ):
            yield f"blk.{il}.{name}.weight", (n_in, n_out)
            yield f"blk.{il}.{name}.bias", (n_out,)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{il}.{name}.weight", (shape.n_embd,)
            yield f"blk.{il}.{name}.bias", (shape.n_embd,)


def _mamba(shape: Shape) -> Tensors:
    """Recurrent, no attention at all."""
    n_inner, n_state, n_dt = 2 * shape.n_embd, 16, 16
    yield from _ends(shape)
    for il in range(shape.n_layer):
        yield f"blk.{il}.attn_norm.weight", (shape.n_embd,)
        yield f"blk.{il}.ssm_in.weight", (shape.n_embd, 2 * n_inner)
        yield f"blk.{il}.ssm_conv1d.weight", (4, n_inner)
        yield f"blk.{il}.ssm_conv1d.bias", (n_inner,)
        yield f"blk.{il}.ssm_x.weight", (n_inner, n_dt + 2 * n_state)
        yield f"blk.{il}.ssm_dt.weight", (n_dt, n_inner)
        yield f"blk.{il}.ssm_dt.bias", (n_inner,)
        yield f"blk.{il}.ssm_a", (n_state, n_inner)
        yield f"blk.{il}.ssm_d", (n_inner,)
        yield f"blk.{il}.ssm_out.weight", (n_inner, shape.n_embd)


MLA_RANK, MLA_ROT = 64, 32


def _deepseek2(shape: Shape) -> Tensors:
    """Latent attention (MLA), dense feed-forward layers only."""
    n_nope = shape.n_embd_head - MLA_ROT
    yield from _ends(shape)
    for il in range(shape.n_layer):
        yield f"blk.{il}.attn_norm.weight", (shape.n_embd,)
        yield f"blk.{il}.attn_q_a_norm.weight", (MLA_RANK,)
        yield f"blk.{il}.attn_kv_a_norm.weight", (MLA_RANK,)
        yield f"blk.{il}.attn_q_a.weight", (shape.n_embd, MLA_RANK)
        yield f"blk.{il}.attn_q_b.weight", (MLA_RANK, shape.n_embd)
        yield f"blk.{il}.attn_kv_a_mqa.weight", (shape.n_embd, MLA_RANK + MLA_ROT)
        yield f"blk.{il}.attn_k_b.weight", (n_nope, MLA_RANK, shape.n_head)
        yield f"blk.{il}.attn_v_b.weight", (MLA_RANK, shape.n_embd_head, shape.n_head)
        yield f"blk.{il}.attn_output.weight", (shape.n_embd, shape.n_embd)
        yield from _ffn(shape, f"blk.{il}")


SWA_WINDOW = 128


def _gemma3(shape: Shape) -> Tensors:
    """Even layers attend to a sliding window, odd ones to the whole context; Q and K are normed."""
    yield from _llama(shape)
    for il in range(shape.n_layer):
        yield f"blk.{il}.attn_q_norm.weight", (shape.n_embd_head,)
        yield f"blk.{il}.attn_k_norm.weight", (shape.n_embd_head,)
        yield f"blk.{il}.post_attention_norm.weight", (shape.n_embd,)
        yield f"blk.{il}.post_ffw_norm.weight", (shape.n_embd,)


CONV_CACHE = 3


def _is_conv(il: int) -> bool:
    return il % 2 == 0


def _lfm2(shape: Shape) -> Tensors:
    """Hybrid: even layers are short convolutions with a recurrent state, odd ones attend; Q and K are normed."""
    yield "token_embd.weight", (shape.n_embd, N_VOCAB)
    yield "token_embd_norm.weight", (shape.n_embd,)  # in fact the output norm
    yield "output.weight", (shape.n_embd, N_VOCAB)
    for il in range(shape.n_layer):
        if _is_conv(il):
            yield f"blk.{il}.attn_norm.weight", (shape.n_embd,)
            yield f"blk.{il}.shortconv.conv.weight", (CONV_CACHE, shape.n_embd)
            yield f"blk.{il}.shortconv.in_proj.weight", (shape.n_embd, 3 * shape.n_embd)
            yield f"blk.{il}.shortconv.out_proj.weight", (shape.n_embd, shape.n_embd)
        else:
            yield from _qkv(shape, f"blk.{il}")
            yield f"blk.{il}.attn_q_norm.weight", (shape.n_embd_head,)
            yield f"blk.{il}.attn_k_norm.weight", (shape.n_embd_head,)
        yield from _ffn(shape, f"blk.{il}")


RECIPES: dict[str, Callable[[Shape], Tensors]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "stablelm": _stablelm,
    "chatglm": _chatglm,
    "bloom": _bloom,
    "mamba": _mamba,
    "deepseek2": _deepseek2,
    "gemma3": _gemma3,
    "lfm2": _lfm2,
}
