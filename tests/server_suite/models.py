"""Stand-ins for the models that upstream's server tests download, in repositories of the same names.

All have random weights. A text that upstream's tests count the tokens of has as many in the vocabulary here, so that
what a server says of prompts, caches and shifts can be compared with what upstream expects.
"""

from __future__ import annotations

import string
import struct
import subprocess
import zlib
from pathlib import Path

from fasa_edge.config import FasaConfig
from fasa_edge.runtime.programs import find_program

import gguf
import numpy as np
from tiny_models import Shape, Vocabulary, make_model, sentencepiece
from unchecked import convert

from server_suite.pieces import PIECES

SPARSE = FasaConfig(budget=8, min_ctx=1, n_sink=1, n_recent=2, n_dense_layers=0)
"""Stored in every annotated model: contexts as short as the tests' are sparse from their first cells on."""

SHAPE = Shape(n_embd_head=32, n_ctx=8192)


def write_repositories(folder: Path) -> dict[str, Path]:
    """Writes all of them; the folder of each by its name."""
    repos: dict[str, Path] = {}

    def path(repo: str, file: str) -> Path:
        out = repos.setdefault(repo, folder / repo.replace("/", "--")) / file
        out.parent.mkdir(parents=True, exist_ok=True)
        return out

    stories = path("ggml-org/test-model-stories260K", "stories260K-F32.gguf")
    write_decoder(stories, STORIES)
    path("ggml-org/test-model-router-download", "stories260K-F16.gguf").write_bytes(stories.read_bytes())
    write_decoder(path("ggml-org/test-model-stories260K-infill", "stories260K-infill-F32.gguf"), INFILL, **FIM_IDS)

    split = path("ggml-org/models", "tinyllamas/split/stories15M-q8_0")
    _run("gguf-split", "--split", "--split-max-tensors", "8", stories, split)
    write_encoder(path("ggml-org/models", "bert-bge-small/ggml-model-f16.gguf"))
    write_encoder(path("ggml-org/models", "jina-reranker-v1-tiny-en/ggml-model-f16.gguf"), ranks=True)

    write_decoder(path("ggml-org/stories15M_MOE", "stories15M_MOE-F16.gguf"), WORDS, arch="llama-moe")
    _write_lora(path("ggml-org/stories15M_MOE", "moe_shakespeare15M.gguf"))
    write_decoder(path("ggml-org/tiny-llamas", "stories15M-q4_0.gguf"), WORDS)

    gemma = path("ggml-org/tinygemma3-GGUF", "tinygemma3-Q8_0.gguf")
    write_decoder(gemma, IMAGES, arch="gemma3", quantization="Q8_0", tokenizer__ggml__add_space_prefix=False)
    write_mmproj(gemma.with_name("mmproj-tinygemma3.gguf"))
    for seed, name in enumerate(("11_truck.png", "91_cat.png")):
        write_png(path("ggml-org/tinygemma3-GGUF", f"test/{name}"), seed)

    path("ggml-org/test-preset-ci", "preset.ini").write_text(
        "[tinygemma3-preset]\nhf-repo = ggml-org/tinygemma3-GGUF:Q8_0\n\n"
        "[stories260K-test]\nhf-repo = ggml-org/test-model-stories260K\n"
    )
    return repos


def _prefixes(*words: str) -> list[str]:
    """What SentencePiece merges, one after the other, into these words."""
    return [word[:n] for word in words for n in range(2, len(word) + 1)]


def _with_control(vocabulary: Vocabulary, *tokens: str) -> Vocabulary:
    return Vocabulary(
        vocabulary.model,
        vocabulary.tokens + [*tokens],
        vocabulary.scores + [0.0] * len(tokens),
        vocabulary.types + [gguf.TokenType.CONTROL] * len(tokens),
    )


ASCII = ["▁", *(c for c in string.printable if c.isprintable() and c != " ")]
STORIES = sentencepiece(PIECES + ASCII)
FIM = ("fim_pre", "fim_suf", "fim_mid")
INFILL = _with_control(STORIES, *(f"<{name}>" for name in FIM))
FIM_IDS = {f"tokenizer__ggml__{name}_token_id": len(STORIES.tokens) + i for i, name in enumerate(FIM)}
WORDS = sentencepiece(list(dict.fromkeys(_prefixes("▁Hello", "▁hello") + PIECES)) + ASCII)
IMAGES = _with_control(WORDS, "<start_of_image>", "<end_of_image>")


def write_decoder(
    path: Path, vocabulary: Vocabulary, arch: str = "llama", quantization: str | None = None, **keys: bool | int
) -> None:
    """A model annotated for FASA that, unless a grammar makes it, says letters only: no end, no tool call.

    The last channel of its residual stream is constant for that: the embeddings set it, no layer writes to it, and the
    output weights of other tokens read it.
    """
    silent = np.array([not token.replace("▁", "").isalpha() for token in vocabulary.tokens])

    def edit(name: str, values: np.ndarray) -> None:
        if name == "token_embd.weight":
            values[:, -1] = values.max()
        elif name == "output.weight":
            values[:, -1] = 0
            values[silent] = 0
            values[silent, -1] = -100
        elif ".attn_output." in name or ".ffn_down" in name:
            values[..., -1, :] = 0

    plain = path.with_suffix(".plain")
    make_model(plain, arch, SHAPE, vocabulary=vocabulary, edit=edit, **keys)
    if quantization:
        _run("quantize", plain, path, quantization)
        path.replace(plain)
    convert(plain, path, tokens=512, config=SPARSE)
    plain.unlink()


def _run(program: str, *words: str | Path) -> None:
    subprocess.run([find_program(program), *words], check=True, capture_output=True)


ENCODER_WORDS = (
    """i believe the meaning of life is this a test hello world machine learn which ci par , ? cap de la""".split()
)


def write_encoder(path: Path, *, ranks: bool = False) -> None:
    """A BERT that embeds, or ranks, with words, letters, and letters within words for tokens; it has no KV cache."""
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *(f"▁{word}" for word in ENCODER_WORDS),
        "ing",
        "ty",
        "is",
        "ita",
        "le",
    ]
    tokens += [
        c for c in (*(f"▁{c}" for c in string.printable), *string.printable) if c.isprintable() and c not in tokens
    ]
    types = [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(tokens) - 4)
    keys = {"bert__pooling_type": int(gguf.PoolingType.RANK if ranks else gguf.PoolingType.CLS)}
    ids = {"padding": 0, "unknown": 1, "bos": 2, "cls": 2, "seperator": 3, "eos": 3}
    if ranks:  # between query and document, and at the end
        keys |= {"tokenizer__ggml__add_eos_token": True, "tokenizer__ggml__add_sep_token": False}
    keys |= {f"tokenizer__ggml__{name}_token_id": i for name, i in ids.items()} | {
        "tokenizer__ggml__token_type_count": 2
    }
    vocabulary = Vocabulary("bert", tokens, [0.0] * len(tokens), types)
    make_model(path, "bert-rank" if ranks else "bert", SHAPE, vocabulary=vocabulary, **keys)


def _write_lora(path: Path, rank: int = 4) -> None:
    """An adapter of the model with experts."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for il in range(SHAPE.n_layer):
        name = f"blk.{il}.attn_q.weight"
        writer.add_tensor(f"{name}.lora_a", rng.standard_normal((rank, SHAPE.n_embd), dtype=np.float32))
        writer.add_tensor(f"{name}.lora_b", rng.standard_normal((SHAPE.n_embd, rank), dtype=np.float32))
    _close(writer)


def write_mmproj(path: Path) -> None:
    """A vision encoder of one layer: an image becomes 36 tokens."""
    n_embd, n_ff, n_head, patch, side, merge = 32, 64, 2, 4, 96, 4
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("gemma3")
    writer.add_vision_embedding_length(n_embd)
    writer.add_vision_feed_forward_length(n_ff)
    writer.add_vision_block_count(1)
    writer.add_vision_head_count(n_head)
    writer.add_vision_projection_dim(SHAPE.n_embd)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_size(side)
    writer.add_vision_patch_size(patch)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_use_gelu(True)
    writer.add_uint32("clip.vision.projector.scale_factor", merge)
    shapes = {
        "v.patch_embd.weight": (n_embd, 3, patch, patch),
        "v.patch_embd.bias": (n_embd,),
        "v.position_embd.weight": ((side // patch) ** 2, n_embd),
        "mm.input_projection.weight": (n_embd, SHAPE.n_embd),
        "mm.soft_emb_norm.weight": (n_embd,),
    }
    _write_encoder_layer(writer, "v", n_embd, n_ff, shapes)


def write_ears(path: Path) -> None:
    """An audio encoder of one layer: half a minute, to which sounds are filled up, becomes 150 tokens."""
    n_embd, n_ff, n_head, n_mel, n_pos, stack, n_mid = 32, 64, 2, 80, 1500, 10, 16
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_audio_encoder(True)
    writer.add_clip_projector_type("ultravox")
    writer.add_audio_embedding_length(n_embd)
    writer.add_audio_feed_forward_length(n_ff)
    writer.add_audio_block_count(1)
    writer.add_audio_head_count(n_head)
    writer.add_audio_projection_dim(SHAPE.n_embd)
    writer.add_audio_attention_layernorm_eps(1e-5)
    writer.add_audio_num_mel_bins(n_mel)
    writer.add_audio_stack_factor(stack)  # divides n_pos: upstream rounds up here and down there
    shapes = {
        "a.conv1d.1.weight": (n_embd, n_mel, 3),
        "a.conv1d.1.bias": (n_embd, 1),
        "a.conv1d.2.weight": (n_embd, n_embd, 3),
        "a.conv1d.2.bias": (n_embd, 1),
        "a.position_embd.weight": (n_pos, n_embd),
        "mm.a.norm_pre.weight": (n_embd * stack,),
        "mm.a.mlp.1.weight": (2 * n_mid, n_embd * stack),
        "mm.a.norm_mid.weight": (n_mid,),
        "mm.a.mlp.2.weight": (SHAPE.n_embd, n_mid),
    }
    _write_encoder_layer(writer, "a", n_embd, n_ff, shapes)


def _write_encoder_layer(
    writer: gguf.GGUFWriter, prefix: str, n_embd: int, n_ff: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    """A transformer's layer besides these tensors, all random, and the end of the file."""
    shapes |= {
        f"{prefix}.blk.0.ffn_up.weight": (n_ff, n_embd),
        f"{prefix}.blk.0.ffn_up.bias": (n_ff,),
        f"{prefix}.blk.0.ffn_down.weight": (n_embd, n_ff),
        f"{prefix}.blk.0.ffn_down.bias": (n_embd,),
    }
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        shapes[f"{prefix}.blk.0.{name}.weight"] = (n_embd, n_embd)
        if (prefix, name) != ("a", "attn_k"):
            shapes[f"{prefix}.blk.0.{name}.bias"] = (n_embd,)
    for name in ("blk.0.ln1", "blk.0.ln2", "post_ln"):
        shapes |= {f"{prefix}.{name}.weight": (n_embd,), f"{prefix}.{name}.bias": (n_embd,)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        is_kernel = "conv1d" in name and len(shape) == 3
        writer.add_tensor(name, values.astype(np.float16) if is_kernel else values)
    _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_png(path: Path, seed: int, side: int = 32) -> None:
    """Random pixels, RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.random.default_rng(seed).integers(0, 256, (side, 3 * side), dtype=np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )
