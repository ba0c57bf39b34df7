"""Sequence 0 of a context (``llama_context *``): its tokens are decoded, forgotten, saved and restored.

All functions raise :class:`FasaError` where llama.cpp refuses; its log says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from fasa_edge.errors import FasaError
from fasa_edge.runtime.library import llama_cpp

import numpy as np

READING = "reading"
"""The stage, for functions that report more than one, of a prompt that is decoded; counted in tokens, each anew."""
_PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


def decode(
    ctx: int,
    tokens: Sequence[int],
    n_batch: int | None = None,
    *,
    n_logits: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Decode tokens after those that the sequence holds, and wait until that is done.

    Args:
        ctx: the context.
        tokens: what follows.
        n_batch: tokens of a batch; None for all at once.
        n_logits: how many of the last tokens of each batch get logits, see :func:`logits`.
        progress: called with the tokens decoded and those to decode, before the first batch and after each.
    """
    n_batch = n_batch or max(len(tokens), 1)
    if len(tokens):
        progress(0, len(tokens))
    for start in range(0, len(tokens), n_batch):
        part = np.array(tokens[start : start + n_batch], np.int32)
        wanted = (np.arange(len(part)) >= len(part) - n_logits).astype(np.int8)
        batch = llama_cpp.llama_batch(  # llama.cpp fills in what is left out: the next positions of sequence 0
            n_tokens=len(part),
            token=part.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        if status := llama_cpp.llama_decode(ctx, batch):
            raise FasaError(f"llama_decode returned {status} for {len(part)} tokens: see llama.cpp's log")
        llama_cpp.llama_synchronize(ctx)
        progress(start + len(part), len(tokens))


def logits(ctx: int, n: int) -> np.ndarray:
    """Copy the logits of the last ``n`` tokens of the latest batch, float32 [n, n_vocab]."""
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx)))
    if not n:
        return np.empty((0, n_vocab), np.float32)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), (n, n_vocab)).copy()


def n_common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Count the tokens with which two sequences begin alike."""
    n = min(len(a), len(b))
    differs = np.asarray(a[:n]) != np.asarray(b[:n])
    return int(differs.argmax()) if differs.any() else n


def cut(ctx: int, n_tokens: int) -> bool:
    """Forget all but the first ``n_tokens``; False: a memory that cannot forget a part, and did not."""
    return llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx), 0, n_tokens, -1)


def settle(ctx: int, n_tokens: int, n_batch: int) -> int:
    """Let the sequence hold whole batches only, after something was broken off while a batch was decoded, or around it.

    Python notices Ctrl-C when ``llama_decode`` returns: then all of the batch is there.

    Args:
        ctx: the context.
        n_tokens: tokens that it held before the batch.
        n_batch: tokens of the batch; 0 if llama.cpp failed to decode it.

    Returns:
        Tokens that it holds: with the batch, if it is there, else without; or none, where it cannot go back to these.
    """
    if llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(ctx), 0) + 1 == n_tokens + n_batch:
        n_tokens += n_batch
    if holds(ctx, n_tokens) and cut(ctx, n_tokens):
        return n_tokens
    clear(ctx)
    return 0


def is_recurrent(ctx: int) -> bool:
    """Whether a part of the memory is a state of all tokens, which can be neither cut back nor freed of some."""
    model = llama_cpp.llama_get_model(ctx)
    return llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)


def holds(ctx: int, n_tokens: int) -> bool:
    """Whether the sequence has its first ``n_tokens``, and :func:`cut` can forget the others, so that it can go on.

    Of sliding windows the cells before ``n_tokens`` must be there still, what llama.cpp does not look at when it
    forgets others.
    """
    mem, n_swa = llama_cpp.llama_get_memory(ctx), llama_cpp.llama_model_n_swa(llama_cpp.llama_get_model(ctx))
    first, last = llama_cpp.llama_memory_seq_pos_min(mem, 0), llama_cpp.llama_memory_seq_pos_max(mem, 0)
    if last <= n_tokens - 1:
        return last == n_tokens - 1
    return not is_recurrent(ctx) and first <= max(n_tokens - n_swa, 0)


def remove(ctx: int, start: int, end: int) -> bool:
    """Forget the tokens from ``start`` to before ``end``; those after them move up to their positions (context shift).

    Their keys are turned by the next decoding. What they attended to when they were decoded stays in them.

    Returns:
        False: a memory that cannot, and did not.
    """
    memory = llama_cpp.llama_get_memory(ctx)
    # of a hybrid memory llama.cpp says that it can shift, and means the part that attends
    if is_recurrent(ctx) or not llama_cpp.llama_memory_can_shift(memory):
        return False
    if not llama_cpp.llama_memory_seq_rm(memory, 0, start, end):
        return False
    llama_cpp.llama_memory_seq_add(memory, 0, end, -1, start - end)
    return True


def clear(ctx: int) -> None:
    """Forget all tokens, whatever the memory."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)


def state_size(ctx: int, *, partial: bool = False) -> int:
    """Compute the bytes of what :func:`save` gives."""
    return llama_cpp.llama_state_seq_get_size_ext(ctx, 0, _PARTIAL if partial else 0)


def save(ctx: int, *, partial: bool = False) -> np.ndarray:
    """Copy the state of the sequence, uint8 [n_bytes].

    Args:
        ctx: the context.
        partial: only of the memory that cannot forget a part of a sequence, sliding windows and recurrent states, if
            there is any.
    """
    state = np.empty(state_size(ctx, partial=partial), np.uint8)
    flags = _PARTIAL if partial else 0
    if llama_cpp.llama_state_seq_get_data_ext(ctx, _pointer(state), len(state), 0, flags) != len(state):
        raise FasaError("llama.cpp cannot save the state of a sequence: see its log")
    return state


def restore(ctx: int, state: np.ndarray) -> None:
    """Replace the sequence by a saved one, uint8 [n_bytes] as :func:`save` gives it.

    Raises:
        FasaError: the state is of another model, or the cache is too small for it.
    """
    if llama_cpp.llama_state_seq_set_data(ctx, _pointer(state), len(state), 0) != len(state):
        raise FasaError("llama.cpp cannot restore the state of a sequence: see its log")


def _pointer(state: np.ndarray) -> ctypes._Pointer:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
