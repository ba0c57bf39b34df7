"""What the runtime tests share: running token by token in this process, and a model on another library in a child."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

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
    from fasa_edge._lib import llama_cpp

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
    from fasa_edge._lib import llama_cpp

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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over the steps of KL(reference || other), both logits."""
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())
