"""Small random-weight GGUF models that llama.cpp loads and runs, one recipe an architecture.

The vocabulary is one SentencePiece token a byte, so that any text tokenizes, unless another is given. Weights are
float32 and seeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from tiny_recipes import RECIPES, Shape, Value


@dataclass(frozen=True)
class Vocabulary:
    """Metadata ``tokenizer.*`` as what GGUFWriter has a method for; tokens with their scores and types."""

    model: str
    tokens: list[str]
    scores: list[float]
    types: list[int]

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_token_list(self.tokens)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)


def sentencepiece(pieces: list[str]) -> Vocabulary:
    """Bytes, and these pieces, of which those before others are merged first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [gguf.TokenType.UNKNOWN, *2 * [gguf.TokenType.CONTROL], *256 * [gguf.TokenType.BYTE]]
    scores = [0.0] * len(types) + [-float(i) for i in range(len(pieces))]
    return Vocabulary("llama", tokens, scores, types + [gguf.TokenType.NORMAL] * len(pieces))


BYTES = sentencepiece(["▁"])


def make_model(
    path: Path,
    arch: str = "llama",
    shape: Shape | None = None,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = BYTES,
    edit: Callable[[str, np.ndarray], None] = lambda name, values: None,
    **keys: Value,
) -> Path:
    """Writes a model.

    Args:
        path: file to be written.
        arch: a name in :data:`RECIPES`.
        shape: its geometry; the vocabulary decides on ``n_vocab``.
        seed: of the weights.
        vocabulary: its tokens.
        edit: changes a tensor in place, given its name and values.
        keys: more metadata, ``__`` standing for a dot: integers as uint32, floats as float32, strings as they are.

    Returns:
        ``path``.
    """
    shape = replace(shape or Shape(), n_vocab=len(vocabulary.tokens))
    recipe = RECIPES[arch]
    arch = recipe.arch or arch
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    vocabulary.write(writer)
    hyperparameters = _hyperparameters(shape) | recipe.keys(shape)
    for key, value in [(f"{arch}.{key}", value) for key, value in hyperparameters.items()] + list(keys.items()):
        writer.add_key_value(key.replace("__", "."), value, _GGUF_TYPES[type(value)])
    for name, dims in recipe.tensors(shape):
        values = _weights(rng, name, dims)
        if name.endswith(("attn_q_norm.weight", "attn_q.weight", "attn_q_b.weight", "attn_qkv.weight")):
            values *= np.float32(np.sqrt(recipe.peak) if "qkv" in name else recipe.peak)
        if recipe.scales_embeddings and name == "token_embd.weight":
            values /= np.float32(np.sqrt(shape.n_embd))  # llama.cpp scales them back, and the layers must still count
        edit(name, values)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
    list: gguf.GGUFValueType.ARRAY,
}


def _weights(rng: np.random.Generator, name: str, dims: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(dims[::-1], dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if name.endswith("ssm_a"):
        return -np.exp(0.1 * values)  # the state must decay
    if name.endswith("attn_sinks.weight"):
        return 5 + values  # against hundreds of cells
    if name.startswith("rope_f"):
        return np.exp(values)  # frequencies are divided by these
    if name == "token_embd.weight":
        return values
    return values / np.float32(np.sqrt(dims[0])) if len(dims) > 1 else np.float32(0.1) * values


def _hyperparameters(shape: Shape) -> dict[str, Value]:
    return {
        "block_count": shape.n_layer,
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.key_length": shape.n_embd_head,
        "attention.value_length": shape.n_embd_head,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.n_embd_head if shape.n_rot is None else shape.n_rot,
        "rope.freq_base": shape.rope_base,
    }
