"""The mask of one sequence, filled by ranges of cells: held to what llama.cpp fills for a model without a profile."""

from __future__ import annotations

from pathlib import Path

from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from runtime import TEXTS, Context, annotated_tiny

pytestmark = pytest.mark.check

N_PROMPT = 300


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """With a profile, and without."""
    folder = tmp_path_factory.mktemp("mask")
    return annotated_tiny(folder), folder / "tiny.gguf"


def read_in_parts(ctx: Context) -> list[np.ndarray]:
    """Tokens of a micro-batch do not see each other's successors, nor the last one those cells that are empty."""
    tokens = TEXTS[0]
    several = ctx.read(tokens[:N_PROMPT]), ctx.read(tokens[N_PROMPT : N_PROMPT + 7], start=N_PROMPT)
    return [*several, ctx.step(3, N_PROMPT + 7)]


def cut_and_go_on(ctx: Context) -> list[np.ndarray]:
    """Cells become empty at the end, then hold other tokens."""
    ctx.read(TEXTS[0][:N_PROMPT])
    llama_cpp.llama_memory_seq_rm(ctx.memory, 0, 100, -1)
    return [ctx.step(5, 100), ctx.read(TEXTS[1][:50], start=101)]


def fill_holes(ctx: Context) -> list[np.ndarray]:
    """Cells become empty in the middle, and later tokens go there: position and cell are not in the same order."""
    ctx.read(TEXTS[0][:N_PROMPT])
    llama_cpp.llama_memory_seq_rm(ctx.memory, 0, 50, 60)
    with_holes = ctx.step(5, N_PROMPT)
    return [with_holes, *(ctx.read(TEXTS[1][4 * i : 4 * i + 4], start=N_PROMPT + 1 + 4 * i) for i in range(4))]


def shift(ctx: Context) -> list[np.ndarray]:
    """The first tokens go, the others move forward, as context shift does."""
    ctx.read(TEXTS[0][:N_PROMPT])
    llama_cpp.llama_memory_seq_rm(ctx.memory, 0, 0, 20)
    llama_cpp.llama_memory_seq_add(ctx.memory, 0, 20, -1, -20)
    return [ctx.read(TEXTS[1][:31], start=N_PROMPT - 20), ctx.step(5, N_PROMPT + 11)]


def two_sequences(ctx: Context) -> list[np.ndarray]:
    """In one stream or in two; then the first is alone again."""
    for seq in range(2):
        ctx.read(TEXTS[seq][:100], seq)
    both = ctx.decode([(7, 100, (0,)), (8, 100, (1,)), (9, 101, (0,)), (10, 101, (1,))])
    llama_cpp.llama_memory_seq_rm(ctx.memory, 1, -1, -1)
    return [both, ctx.step(11, 102)]


def shared_tokens(ctx: Context) -> list[np.ndarray]:
    """A sequence that another one begins with."""
    ctx.read(TEXTS[0][:100])
    llama_cpp.llama_memory_seq_cp(ctx.memory, 0, 1, 0, -1)
    return [ctx.step(7, 100, 1), ctx.step(8, 100, 0)]


@pytest.mark.parametrize("flash_attn_type", [0, 1], ids=["f32", "f16"])
@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("act", [read_in_parts, cut_and_go_on, fill_holes, shift, two_sequences, shared_tokens])
def test_logits_are_those_of_llama_cpp(models: tuple[Path, Path], act, kv_unified: bool, flash_attn_type: int) -> None:
    found = []
    for path in models:
        with Context(path, n_seq_max=2, kv_unified=kv_unified, flash_attn_type=flash_attn_type) as ctx:
            if path == models[0]:
                ctx.configure(enabled=False)
            found.append(act(ctx))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
