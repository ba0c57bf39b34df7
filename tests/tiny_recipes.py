"""What tiny models of each architecture consist of: tensors with their shapes, and metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

Tensors = Iterator[tuple[str, tuple[int, ...]]]  # name and shape in ggml order: the contiguous dimension first
Value = bool | int | float | str | list


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
    n_vocab: int = 260

    @property
    def n_embd(self) -> int:
        return self.n_head * self.n_embd_head

    @property
    def n_embd_kv(self) -> int:
        return self.n_head_kv * self.n_embd_head


@dataclass(frozen=True)
class Recipe:
    """An architecture: its tensors, and its metadata without the prefix, beyond those that all have."""

    tensors: Callable[[Shape], Tensors]
    keys: Callable[[Shape], dict[str, Value]] = lambda shape: {}
    scales_embeddings: bool = False
    arch: str = ""  # as llama.cpp knows it, where another recipe has that name
    peak: float = 1.5  # factor of the logits: attention over random keys is all too even otherwise


def _ends(shape: Shape, *, bias: bool = False, tied: bool = False) -> Tensors:
    yield "token_embd.weight", (shape.n_embd, shape.n_vocab)
    yield "output_norm.weight", (shape.n_embd,)
    if not tied:
        yield "output.weight", (shape.n_embd, shape.n_vocab)
    if bias:
        yield "output_norm.bias", (shape.n_embd,)


def _qkv(shape: Shape, blk: str, n_head: int = 0, n_head_kv: int = 0, n_embd_head: int = 0) -> Tensors:
    n_embd_head = n_embd_head or shape.n_embd_head
    n_embd_q, n_embd_kv = (n_embd_head * n for n in (n_head or shape.n_head, n_head_kv or shape.n_head_kv))
    yield f"{blk}.attn_norm.weight", (shape.n_embd,)
    yield f"{blk}.attn_q.weight", (shape.n_embd, n_embd_q)
    yield f"{blk}.attn_k.weight", (shape.n_embd, n_embd_kv)
    yield f"{blk}.attn_v.weight", (shape.n_embd, n_embd_kv)
    yield f"{blk}.attn_output.weight", (n_embd_q, shape.n_embd)


def _fused_qkv(shape: Shape, blk: str, n_head: int = 0, n_head_kv: int = 0) -> Tensors:
    n_head, n_head_kv = n_head or shape.n_head, n_head_kv or shape.n_head_kv
    yield f"{blk}.attn_norm.weight", (shape.n_embd,)
    yield f"{blk}.attn_qkv.weight", (shape.n_embd, (n_head + 2 * n_head_kv) * shape.n_embd_head)
    yield f"{blk}.attn_output.weight", (n_head * shape.n_embd_head, shape.n_embd)


def _qk_norm(shape: Shape, blk: str, n_embd_head: int = 0) -> Tensors:
    yield f"{blk}.attn_q_norm.weight", (n_embd_head or shape.n_embd_head,)
    yield f"{blk}.attn_k_norm.weight", (n_embd_head or shape.n_embd_head,)


def _post_norm(shape: Shape, blk: str) -> Tensors:
    yield f"{blk}.post_attention_norm.weight", (shape.n_embd,)
    yield f"{blk}.post_ffw_norm.weight", (shape.n_embd,)


def _ffn(shape: Shape, blk: str) -> Tensors:
    yield f"{blk}.ffn_norm.weight", (shape.n_embd,)
    yield f"{blk}.ffn_gate.weight", (shape.n_embd, shape.n_ff)
    yield f"{blk}.ffn_up.weight", (shape.n_embd, shape.n_ff)
    yield f"{blk}.ffn_down.weight", (shape.n_ff, shape.n_embd)


def _fused_ffn(shape: Shape, blk: str) -> Tensors:
    yield f"{blk}.ffn_norm.weight", (shape.n_embd,)
    yield f"{blk}.ffn_up.weight", (shape.n_embd, 2 * shape.n_ff)
    yield f"{blk}.ffn_down.weight", (shape.n_ff, shape.n_embd)


def _llama(shape: Shape, *, tied: bool = False) -> Tensors:
    """NORM RoPE over the whole head."""
    yield from _ends(shape, tied=tied)
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


def _qwen3(shape: Shape) -> Tensors:
    """NEOX RoPE; Q and K are normed."""
    yield from _llama(shape)
    for il in range(shape.n_layer):
        yield from _qk_norm(shape, f"blk.{il}")


def _phi3(shape: Shape) -> Tensors:
    """NEOX RoPE, partial rotary allowed, with other frequencies in a long context; Q, K and V in one tensor."""
    yield from _ends(shape)
    for name in ("rope_factors_long", "rope_factors_short"):
        yield f"{name}.weight", ((shape.n_rot or shape.n_embd_head) // 2,)
    for il in range(shape.n_layer):
        yield from _fused_qkv(shape, f"blk.{il}")
        yield from _fused_ffn(shape, f"blk.{il}")


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
        yield from _fused_ffn(shape, f"blk.{il}")


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


def _minicpm3(shape: Shape) -> Tensors:
    """Low-rank projections but a cache of whole heads, of which RoPE turns the last dims; V heads are smaller."""
    n_rot, n_embd_v = MLA_ROT, shape.n_embd_head // 2
    yield from _ends(shape)
    for il in range(shape.n_layer):
        yield f"blk.{il}.attn_norm.weight", (shape.n_embd,)
        yield f"blk.{il}.attn_q_a_norm.weight", (MLA_RANK,)
        yield f"blk.{il}.attn_kv_a_norm.weight", (MLA_RANK,)
        yield f"blk.{il}.attn_q_a.weight", (shape.n_embd, MLA_RANK)
        yield f"blk.{il}.attn_q_b.weight", (MLA_RANK, shape.n_embd)
        yield f"blk.{il}.attn_kv_a_mqa.weight", (shape.n_embd, MLA_RANK + n_rot)
        yield f"blk.{il}.attn_kv_b.weight", (MLA_RANK, shape.n_head * (shape.n_embd_head - n_rot + n_embd_v))
        yield f"blk.{il}.attn_output.weight", (shape.n_head * n_embd_v, shape.n_embd)
        yield from _ffn(shape, f"blk.{il}")


def _minicpm3_keys(shape: Shape) -> dict[str, Value]:
    return {
        "attention.head_count_kv": shape.n_head,
        "attention.q_lora_rank": MLA_RANK,
        "attention.kv_lora_rank": MLA_RANK,
        "attention.value_length": shape.n_embd_head // 2,
        "rope.dimension_count": MLA_ROT,
    }


def _t5(shape: Shape) -> Tensors:
    """Encoder and decoder, a bias on the logits by distance, no RoPE."""
    yield "token_embd.weight", (shape.n_embd, shape.n_vocab)
    for side, attentions in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        yield f"{side}.output_norm.weight", (shape.n_embd,)
        for il in range(shape.n_layer):
            for attn in attentions:
                yield f"{side}.blk.{il}.{attn}_norm.weight", (shape.n_embd,)
                yield from ((f"{side}.blk.{il}.{attn}_{name}.weight", (shape.n_embd, shape.n_embd)) for name in "qkvo")
            yield f"{side}.blk.{il}.attn_rel_b.weight", (shape.n_head, N_BUCKETS)
            yield from _ffn(shape, f"{side}.blk.{il}")


N_BUCKETS = 32


SWA_WINDOW = 128


def _is_swa(il: int) -> bool:
    return il % 2 == 0


def _swa_keys(shape: Shape) -> dict[str, Value]:
    return {
        "attention.sliding_window": SWA_WINDOW,
        "attention.sliding_window_pattern": [_is_swa(il) for il in range(shape.n_layer)],
    }


def _gemma2(shape: Shape) -> Tensors:
    """Logits are soft-capped; even layers attend to a sliding window, odd ones to the whole context."""
    yield from _llama(shape, tied=True)
    for il in range(shape.n_layer):
        yield from _post_norm(shape, f"blk.{il}")


def _gemma3(shape: Shape) -> Tensors:
    """Even layers attend to a sliding window, odd ones to the whole context; Q and K are normed."""
    yield from _qwen3(shape)
    for il in range(shape.n_layer):
        yield from _post_norm(shape, f"blk.{il}")


N_SHARED_KV = 2


def _gemma4(shape: Shape) -> Tensors:
    """Smaller heads in the sliding-window layers; the last two layers read the caches of those before."""
    yield from _ends(shape)
    yield "rope_freqs.weight", (shape.n_embd_head // 2,)
    for il in range(shape.n_layer):
        blk, n_embd_head = f"blk.{il}", shape.n_embd_head // (2 if _is_swa(il) else 1)
        no_kv = ("attn_k.", "attn_v.", "attn_k_norm.") if il >= shape.n_layer - N_SHARED_KV else ()
        for name, dims in (*_qkv(shape, blk, n_embd_head=n_embd_head), *_qk_norm(shape, blk, n_embd_head)):
            if not name.removeprefix(f"{blk}.").startswith(no_kv):
                yield name, dims
        yield from _ffn(shape, blk)
        yield from _post_norm(shape, blk)


def _gemma4_keys(shape: Shape) -> dict[str, Value]:
    half = shape.n_embd_head // 2
    return _swa_keys(shape) | {
        "attention.shared_kv_layers": N_SHARED_KV,
        "attention.key_length_swa": half,
        "attention.value_length_swa": half,
        "rope.dimension_count_swa": half,
        "embedding_length_per_layer_input": 0,
    }


N_EXPERT, N_EXPERT_USED = 4, 2


def _llama_moe(shape: Shape) -> Tensors:
    """Experts."""
    yield from _ends(shape)
    for il in range(shape.n_layer):
        yield from _qkv(shape, f"blk.{il}")
        yield f"blk.{il}.ffn_norm.weight", (shape.n_embd,)
        yield f"blk.{il}.ffn_gate_inp.weight", (shape.n_embd, N_EXPERT)
        for name, n_in, n_out in (
            ("gate", shape.n_embd, shape.n_ff),
            ("up", shape.n_embd, shape.n_ff),
            ("down", shape.n_ff, shape.n_embd),
        ):
            yield f"blk.{il}.ffn_{name}_exps.weight", (n_in, n_out, N_EXPERT)


def _bert(shape: Shape, *, ranks: bool = False) -> Tensors:
    """Encoder, positions are embedded; ``ranks`` adds a head of one output."""
    yield "token_embd.weight", (shape.n_embd, shape.n_vocab)
    yield "token_types.weight", (shape.n_embd, 2)
    yield "position_embd.weight", (shape.n_embd, shape.n_ctx)
    yield from _biased_norm("token_embd_norm", shape)
    for il in range(shape.n_layer):
        for name, n_in, n_out in (
            ("attn_q", shape.n_embd, shape.n_embd),
            ("attn_k", shape.n_embd, shape.n_embd_kv),
            ("attn_v", shape.n_embd, shape.n_embd_kv),
            ("attn_output", shape.n_embd, shape.n_embd),
            ("ffn_up", shape.n_embd, shape.n_ff),
            ("ffn_down", shape.n_ff, shape.n_embd),
        ):
            yield f"blk.{il}.{name}.weight", (n_in, n_out)
            yield f"blk.{il}.{name}.bias", (n_out,)
        yield from _biased_norm(f"blk.{il}.attn_output_norm", shape)
        yield from _biased_norm(f"blk.{il}.layer_output_norm", shape)
    if ranks:
        yield "cls.weight", (shape.n_embd, shape.n_embd)
        yield "cls.bias", (shape.n_embd,)
        yield "cls.output.weight", (shape.n_embd, 1)
        yield "cls.output.bias", (1,)


def _biased_norm(name: str, shape: Shape) -> Tensors:
    yield f"{name}.weight", (shape.n_embd,)
    yield f"{name}.bias", (shape.n_embd,)


def _experts_keys(shape: Shape) -> dict[str, Value]:
    return {"expert_count": N_EXPERT, "expert_used_count": N_EXPERT_USED}


def _gpt_oss(shape: Shape) -> Tensors:
    """Attention sinks, experts; even layers attend to a sliding window."""
    yield from _ends(shape)
    for il in range(shape.n_layer):
        blk = f"blk.{il}"
        yield from _qkv(shape, blk)
        yield f"{blk}.attn_output.bias", (shape.n_embd,)
        yield f"{blk}.attn_sinks.weight", (shape.n_head,)
        yield f"{blk}.post_attention_norm.weight", (shape.n_embd,)
        yield f"{blk}.ffn_gate_inp.weight", (shape.n_embd, N_EXPERT)
        yield f"{blk}.ffn_gate_inp.bias", (N_EXPERT,)
        for name, n_in, n_out in (
            ("gate", shape.n_embd, shape.n_ff),
            ("up", shape.n_embd, shape.n_ff),
            ("down", shape.n_ff, shape.n_embd),
        ):
            yield f"{blk}.ffn_{name}_exps.weight", (n_in, n_out, N_EXPERT)
            yield f"{blk}.ffn_{name}_exps.bias", (n_out, N_EXPERT)


def _gpt_oss_keys(shape: Shape) -> dict[str, Value]:
    return _swa_keys(shape) | _experts_keys(shape) | {"expert_feed_forward_length": shape.n_ff}


def _granite_swa(shape: Shape) -> Tensors:
    """Attention sinks; even layers attend to a sliding window, and the last layer has no RoPE."""
    yield from _llama(shape)
    for il in range(shape.n_layer):
        yield f"blk.{il}.attn_sinks.weight", (shape.n_head,)


def _granite_swa_keys(shape: Shape) -> dict[str, Value]:
    return _swa_keys(shape) | {"logit_scale": 1.0, "attention.rope_pattern": [*[1] * (shape.n_layer - 1), 0]}


OPENELM_HEADS = ((4, 2), (6, 3))  # query and KV heads of each layer


def _openelm(shape: Shape) -> Tensors:
    """Another number of heads in each layer."""
    yield from _ends(shape, tied=True)
    for il, heads in enumerate(OPENELM_HEADS):
        yield from _fused_qkv(shape, f"blk.{il}", *heads)
        yield from _qk_norm(shape, f"blk.{il}")
        yield from _ffn(shape, f"blk.{il}")


DECI_HEADS = ((4, 2), (4, 0), (0, 0), (4, 1))


def _deci(shape: Shape) -> Tensors:
    """Another number of heads in each layer: the second is linear, the third has no attention."""
    yield from _ends(shape)
    for il, (n_head, n_head_kv) in enumerate(DECI_HEADS):
        if n_head_kv > 0:
            yield from _qkv(shape, f"blk.{il}", n_head, n_head_kv)
        elif n_head > 0:
            yield f"blk.{il}.attn_norm.weight", (shape.n_embd,)
            yield f"blk.{il}.attn_output.weight", (shape.n_embd, shape.n_embd)
        yield from _ffn(shape, f"blk.{il}")


def _per_layer_keys(heads: tuple[tuple[int, int], ...]) -> Callable[[Shape], dict[str, Value]]:
    return lambda shape: {
        "attention.head_count": [n_head for n_head, _ in heads],
        "attention.head_count_kv": [n_head_kv for _, n_head_kv in heads],
        "feed_forward_length": [shape.n_ff for _ in heads],
    }


CONV_CACHE = 3


def _is_conv(il: int) -> bool:
    return il % 2 == 0


def _lfm2(shape: Shape) -> Tensors:
    """Hybrid: even layers are short convolutions with a recurrent state, odd ones attend; Q and K are normed."""
    yield "token_embd.weight", (shape.n_embd, shape.n_vocab)
    yield "token_embd_norm.weight", (shape.n_embd,)  # in fact the output norm
    yield "output.weight", (shape.n_embd, shape.n_vocab)
    for il in range(shape.n_layer):
        if _is_conv(il):
            yield f"blk.{il}.attn_norm.weight", (shape.n_embd,)
            yield f"blk.{il}.shortconv.conv.weight", (CONV_CACHE, shape.n_embd)
            yield f"blk.{il}.shortconv.in_proj.weight", (shape.n_embd, 3 * shape.n_embd)
            yield f"blk.{il}.shortconv.out_proj.weight", (shape.n_embd, shape.n_embd)
        else:
            yield from _qkv(shape, f"blk.{il}")
            yield from _qk_norm(shape, f"blk.{il}")
        yield from _ffn(shape, f"blk.{il}")


def _mamba_keys(shape: Shape) -> dict[str, Value]:
    return {
        "attention.head_count": 0,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 2 * shape.n_embd,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 16,
    }


def _deepseek2_keys(shape: Shape) -> dict[str, Value]:
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": MLA_RANK,
        "attention.kv_lora_rank": MLA_RANK,
        "attention.key_length": MLA_RANK + MLA_ROT,
        "attention.value_length": MLA_RANK,
        "attention.key_length_mla": shape.n_embd_head,
        "attention.value_length_mla": shape.n_embd_head,
        "rope.dimension_count": MLA_ROT,
        "leading_dense_block_count": shape.n_layer,
        "expert_feed_forward_length": shape.n_ff,
        "expert_shared_count": 1,
    }


def _lfm2_keys(shape: Shape) -> dict[str, Value]:
    return {
        "shortconv.l_cache": CONV_CACHE,
        "attention.head_count_kv": [0 if _is_conv(il) else shape.n_head_kv for il in range(shape.n_layer)],
    }


MROPE_SECTIONS = (11, 11, 10, 0)  # planes turned by time, height and width


def _mrope_keys(shape: Shape) -> dict[str, Value]:
    return {"rope.dimension_sections": list(MROPE_SECTIONS)}


RECIPES = {
    "llama": Recipe(_llama),
    "llama-moe": Recipe(_llama_moe, _experts_keys, arch="llama"),
    "smollm3": Recipe(_llama),  # each fourth layer has no RoPE
    "baichuan": Recipe(_llama),  # with 40 layers, ALiBi
    "qwen2": Recipe(_qwen2),
    "qwen2vl": Recipe(_qwen2, _mrope_keys),
    "qwen3": Recipe(_qwen3),
    "qwen3vl": Recipe(_qwen3, _mrope_keys),
    "phi3": Recipe(_phi3, lambda shape: {"rope.scaling.original_context_length": shape.n_ctx // 4}),
    "stablelm": Recipe(_stablelm, lambda shape: {"use_parallel_residual": False}),
    "chatglm": Recipe(_chatglm),
    "bloom": Recipe(_bloom),
    "mamba": Recipe(_mamba, _mamba_keys),
    "deepseek2": Recipe(_deepseek2, _deepseek2_keys),
    "minicpm3": Recipe(_minicpm3, _minicpm3_keys, scales_embeddings=True),
    "t5": Recipe(
        _t5,
        lambda shape: {"attention.head_count_kv": shape.n_head, "attention.relative_buckets_count": N_BUCKETS},
    ),
    "gemma2": Recipe(
        _gemma2,
        lambda shape: _swa_keys(shape) | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0},
        scales_embeddings=True,
    ),
    "gemma3": Recipe(_gemma3, _swa_keys, scales_embeddings=True),
    "gemma4": Recipe(_gemma4, _gemma4_keys, scales_embeddings=True, peak=1.0),  # its logits are not scaled down
    "gpt-oss": Recipe(_gpt_oss, _gpt_oss_keys),
    "granite_swa": Recipe(_granite_swa, _granite_swa_keys),
    "openelm": Recipe(_openelm, _per_layer_keys(OPENELM_HEADS)),
    "deci": Recipe(_deci, _per_layer_keys(DECI_HEADS)),
    "lfm2": Recipe(_lfm2, _lfm2_keys),
    "bert": Recipe(_bert, lambda shape: {"attention.causal": False}),
    "bert-rank": Recipe(partial(_bert, ranks=True), lambda shape: {"attention.causal": False}, arch="bert"),
}
