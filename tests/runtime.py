"""What the runtime tests share: running token by token in this process, and a model on another library in a child."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from fasa_edge.config import FasaConfig
from fasa_edge.eval.text import log_softmax
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp

import numpy as np
from tiny_models import Shape, make_model
from unchecked import convert

TINY_BUDGET = 64

GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
"""Of a KV cache, by the names of ``--cache-type-k``: numbers of ``enum ggml_type``."""

# tokens of the tiny models are bytes, from 3 on; these are the printable ones
TEXTS = (3 + np.random.default_rng(0).integers(32, 127, (3, 1500))).tolist()

# Runs in a child process on whatever library LLAMA_CPP_LIB_PATH names; knows nothing of fasa_edge.
_LOGITS_SCRIPT = """
import sys
import llama_cpp, numpy as np
model, tokens, n_prompt, n_threads, out = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]
tokens = np.load(tokens).tolist()
llm = llama_cpp.Llama(model, n_ctx=len(tokens) + 256, n_threads=n_threads, n_threads_batch=n_threads,
                      flash_attn=True, verbose=False)
def logits():
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), (llm.n_vocab(),)).copy()
llm.eval(tokens[:n_prompt])
rows = [logits()]
for token in tokens[n_prompt:]:
    llm.eval([token])
    rows.append(logits())
np.save(out, np.stack(rows))
"""


def logits_on(
    lib_dir: Path, model: Path, tokens: list[int], n_prompt: int, n_threads: int, tmp_path: Path
) -> np.ndarray:
    """Logits after a prompt and after each token that follows it, on the llama.cpp libraries in a directory.

    Returns:
        float32 [1 + len(tokens) - n_prompt, n_vocab].
    """
    np.save(tmp_path / "tokens.npy", np.array(tokens))
    out = tmp_path / f"logits-{lib_dir.parent.name}-{n_threads}.npy"
    subprocess.run(
        [sys.executable, "-c", _LOGITS_SCRIPT, model, tmp_path / "tokens.npy", str(n_prompt), str(n_threads), out],
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(lib_dir)},
        cwd=tmp_path,
        check=True,
    )
    return np.load(out)


def last_logits(llm) -> np.ndarray:
    """Logits after the last token that a model has evaluated: float32 [n_vocab]."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), (llm.n_vocab(),)).copy()


def teacher_forced(llm, tokens: list[int], n_prompt: int, dense_prompt: bool = True, **settings) -> np.ndarray:
    """Evaluate a prompt, then the other tokens one by one under the settings; as :func:`logits_on`."""
    llm.reset()
    if dense_prompt:
        llm.fasa.configure(enabled=False)
    llm.eval(tokens[:n_prompt])
    rows = [last_logits(llm)]
    if llm.fasa.available:
        llm.fasa.configure(**{"enabled": True, **settings})
    llm.fasa.reset_stats()
    for token in tokens[n_prompt:]:
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.stack(rows)


def decode_embeddings(llm, embd: np.ndarray, pos: np.ndarray) -> None:
    """Decode embeddings, as those of an image: float32 [n, n_embd] at positions int32 [positions of a token, n]."""
    n = len(embd)
    embd, pos = np.ascontiguousarray(embd, np.float32), np.ascontiguousarray(pos, np.int32)  # alive until decoded
    seq_id = (llama_cpp.llama_seq_id * 1)(0)
    batch = llama_cpp.llama_batch(
        n,
        None,
        embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
        (ctypes.c_int32 * n)(*[1] * n),
        (ctypes.POINTER(llama_cpp.llama_seq_id) * n)(*[seq_id] * n),
        (ctypes.c_int8 * n)(),
    )
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over the steps of KL(reference || other), both logits."""
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


class Context:
    """A context of several sequences on the bare C API, for what the classes of llama-cpp-python do not offer.

    Args:
        path: an annotated model.
        model_params: fields of ``llama_model_params``.
        params: fields of ``llama_context_params``.
    """

    def __init__(self, path: Path, model_params: dict[str, object] | None = None, **params) -> None:
        c_model_params = llama_cpp.llama_model_default_params()
        for name, value in (model_params or {}).items():
            setattr(c_model_params, name, value)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), c_model_params)
        assert self.model
        defaults = {"n_ctx": 4096, "n_batch": 2048, "n_threads": 2, "n_threads_batch": 2, "flash_attn_type": 1}
        c_params = llama_cpp.llama_context_default_params()
        for name, value in (defaults | params).items():
            setattr(c_params, name, value)
        self.ctx = llama_cpp.llama_init_from_model(self.model, c_params)
        assert self.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)

    def decode(self, entries: list[tuple[int, int, tuple[int, ...]]]) -> np.ndarray:
        """Decode one batch.

        Args:
            entries: token, position and sequences of each.

        Returns:
            The logits of each, float32 [n_entries, n_vocab].
        """
        batch = llama_cpp.llama_batch_init(len(entries), 0, max(len(seqs) for *_, seqs in entries))
        batch.n_tokens = len(entries)
        for i, (token, pos, seqs) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, len(seqs), True
            for j, seq in enumerate(seqs):
                batch.seq_id[i][j] = seq
        status = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0
        logits = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(logits, (len(entries), self.n_vocab)).copy()

    def read(self, tokens: list[int], seq: int = 0, start: int = 0) -> np.ndarray:
        """Decode a sequence's tokens in one batch: the logits of each, float32 [n_tokens, n_vocab]."""
        return self.decode([(token, start + i, (seq,)) for i, token in enumerate(tokens)])

    def step(self, token: int, pos: int, seq: int = 0) -> np.ndarray:
        """Decode one token: its logits, float32 [n_vocab]."""
        return self.decode([(token, pos, (seq,))])[0]

    def stats(self):
        """Counters, and their reset."""
        stats = capi.get_stats(self.ctx)
        capi.reset_stats(self.ctx)
        return stats

    def reasons(self) -> dict[str, int]:
        """Layers run since the last look, by the reason why they ran dense; "none": sparse."""
        counts = zip(capi.REASONS, self.stats().n_layers, strict=True)
        return {name: n for (name, _), n in counts if n}

    def configure(self, **settings) -> None:
        """Change settings of FASA."""
        params = capi.get_params(self.ctx)
        for name, value in settings.items():
            setattr(params, name, value)
        capi.set_params(self.ctx, params)


def save(ctx: Context, seq: int | None = None) -> ctypes.Array:
    """The state of a context, or of one sequence."""
    size = llama_cpp.llama_state_get_size(ctx.ctx) if seq is None else llama_cpp.llama_state_seq_get_size(ctx.ctx, seq)
    data = (ctypes.c_uint8 * size)()
    if seq is None:
        assert llama_cpp.llama_state_get_data(ctx.ctx, data, size)
    else:
        assert llama_cpp.llama_state_seq_get_data(ctx.ctx, data, size, seq)
    return data


def load(ctx: Context, data: ctypes.Array, seq: int | None = None, ok: bool = True) -> None:
    """Restore what :func:`save` returned; ``ok``: whether that has to succeed."""
    if seq is None:
        n_read = llama_cpp.llama_state_set_data(ctx.ctx, data, len(data))
    else:
        n_read = llama_cpp.llama_state_seq_set_data(ctx.ctx, data, len(data), seq)
    assert bool(n_read) == ok


def annotated_tiny(folder: Path, arch: str = "llama", n_tip: int | None = None, **shape: int) -> Path:
    """Write a random model, and a copy with a profile that keeps ``TINY_BUDGET`` cells in every layer of any context.

    Its attention is spread wide: whoever attends to other cells gets other logits. A process converts it once.

    Returns:
        The copy, beside ``tiny.gguf``.
    """
    make_model(folder / "tiny.gguf", arch, Shape(**shape))
    path = folder / "annotated.gguf"
    path.write_bytes(_annotated_tiny(arch, n_tip, Shape(**shape)))
    return path


@cache
def _annotated_tiny(arch: str, n_tip: int | None, shape: Shape) -> bytes:
    config = FasaConfig(budget=TINY_BUDGET, n_sink=4, n_recent=8, n_dense_layers=0, min_ctx=1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "tiny.gguf", arch, shape)
        return convert(model, Path(folder) / "annotated.gguf", tokens=512, config=config, n_tip=n_tip).path.read_bytes()


def fresh_steps(model: Path, prompt: list[int], *steps: int, **params) -> np.ndarray:
    """Logits of the last tokens, decoded one by one after a prompt in a fresh context: float32 [n_steps, n_vocab]."""
    with Context(model, **params) as ctx:
        ctx.read(prompt)
        ctx.stats()
        rows = [ctx.step(token, len(prompt) + i) for i, token in enumerate(steps)]
        assert ctx.stats().n_steps_decode == len(steps)
        return np.stack(rows)


SAME = 1e-8
"""NMSE of two runs on a tiny model that attend to the same cells, in whatever order or place."""


def check(wanted: np.ndarray, found: np.ndarray, tolerance: float = SAME) -> None:
    """Logits must be the same."""
    assert np.isfinite(found).all()
    assert nmse(wanted, found) <= tolerance


def nmse(wanted: np.ndarray, found: np.ndarray) -> float:
    """Squared distance relative to the energy of what is wanted."""
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())
