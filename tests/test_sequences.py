"""Several sequences, and all that changes the cells of a cache: held to a fresh context given the same tokens."""

from __future__ import annotations

from pathlib import Path

from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from runtime import GGML_TYPES, TEXTS, Context, annotated_tiny, check, fresh_steps, nmse

pytestmark = pytest.mark.check

N_PROMPT = 700
OTHER = 1e-3  # NMSE of attending to other cells

STREAMS = pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("two-layers"))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory) -> Path:
    """Its keys depend on a token and its position alone, so what tokens were removed leaves no trace."""
    return annotated_tiny(tmp_path_factory.mktemp("one-layer"), n_layer=1)


@STREAMS
def test_sequences_in_one_batch_decode_as_each_alone(model: Path, kv_unified: bool) -> None:
    lengths = [N_PROMPT, 300, 30]  # the last has fewer cells than the budget
    with Context(model, n_seq_max=3, kv_unified=kv_unified) as ctx:
        for seq, n in enumerate(lengths):
            ctx.read(TEXTS[seq][:n], seq)
        ctx.stats()
        rows = [ctx.decode([(TEXTS[s][n + i], n + i, (s,)) for s, n in enumerate(lengths)]) for i in range(3)]
        stats = ctx.stats()
        assert stats.n_layers[0] == stats.n_steps_decode * 2 and stats.n_steps_prompt == 0
    for seq, n in enumerate(lengths):
        wanted = fresh_steps(model, TEXTS[seq][:n], *TEXTS[seq][n : n + 3])
        check(wanted, np.stack([row[seq] for row in rows]))
    assert nmse(wanted, np.stack([row[0] for row in rows])) > OTHER


@STREAMS
def test_a_batch_is_a_prompt_by_its_longest_sequence(model: Path, kv_unified: bool) -> None:
    with Context(model, n_seq_max=2, kv_unified=kv_unified) as ctx:
        for seq in range(2):
            ctx.read(TEXTS[seq][:N_PROMPT], seq)
        for n_tokens, is_prompt in (((16, 16), False), ((18, 1), True), ((1, 1), False), ((17, 17), True)):
            ctx.stats()
            ctx.decode([(TEXTS[s][i], N_PROMPT + i, (s,)) for s in range(2) for i in range(n_tokens[s])])
            for seq in range(2):
                llama_cpp.llama_memory_seq_rm(ctx.memory, seq, N_PROMPT, -1)
            # streams of unequal length are split: what both have, then the rest
            assert bool(ctx.stats().n_steps_prompt) == is_prompt, n_tokens


def test_a_token_of_several_sequences(model: Path) -> None:  # one stream: llama.cpp keeps streams apart
    with Context(model, n_seq_max=2, kv_unified=True) as ctx:
        ctx.decode([(token, i, (0, 1)) for i, token in enumerate(TEXTS[0][:N_PROMPT])])
        rows = ctx.decode([(TEXTS[0][N_PROMPT], N_PROMPT, (0,)), (TEXTS[1][0], N_PROMPT, (1,))])
    check(fresh_steps(model, TEXTS[0][:N_PROMPT], TEXTS[0][N_PROMPT]), rows[:1])
    check(fresh_steps(model, TEXTS[0][:N_PROMPT], TEXTS[1][0]), rows[1:])


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
@STREAMS
def test_copy_and_keep(model: Path, kv_unified: bool, type_kv: str) -> None:
    types = {"type_k": GGML_TYPES[type_kv], "type_v": GGML_TYPES[type_kv]}
    with Context(model, n_seq_max=3, kv_unified=kv_unified, **types) as ctx:
        for seq in (2, 0):
            ctx.read(TEXTS[seq][:N_PROMPT], seq)
        llama_cpp.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
        check(fresh_steps(model, TEXTS[0][:N_PROMPT], TEXTS[1][0], **types)[0], ctx.step(TEXTS[1][0], N_PROMPT, 1))
        check(
            fresh_steps(model, TEXTS[0][:N_PROMPT], TEXTS[0][N_PROMPT], **types)[0],
            ctx.step(TEXTS[0][N_PROMPT], N_PROMPT, 0),
        )
        llama_cpp.llama_memory_seq_keep(ctx.memory, 1)
        llama_cpp.llama_memory_seq_rm(ctx.memory, 0, -1, -1)  # seq_keep looks at one stream only
        wanted = fresh_steps(model, TEXTS[0][:N_PROMPT], *TEXTS[1][:2], **types)[1]
        check(wanted, ctx.step(TEXTS[1][1], N_PROMPT + 1, 1))
        ctx.read(TEXTS[2][:N_PROMPT], 0)  # into the cells that became free
        check(
            fresh_steps(model, TEXTS[2][:N_PROMPT], TEXTS[2][N_PROMPT], **types)[0],
            ctx.step(TEXTS[2][N_PROMPT], N_PROMPT, 0),
        )


def test_removed_tokens_leave_no_trace(model: Path) -> None:
    with Context(model) as ctx:
        ctx.read(TEXTS[1][:N_PROMPT])
        llama_cpp.llama_memory_seq_rm(ctx.memory, 0, 100, -1)
        ctx.read(TEXTS[0][:300], start=100)
        check(fresh_steps(model, TEXTS[1][:100] + TEXTS[0][:300], TEXTS[0][300])[0], ctx.step(TEXTS[0][300], 400))
        llama_cpp.llama_memory_clear(ctx.memory, True)
        ctx.read(TEXTS[2][:N_PROMPT])
        wanted = fresh_steps(model, TEXTS[2][:N_PROMPT], TEXTS[2][N_PROMPT])[0]
        check(wanted, ctx.step(TEXTS[2][N_PROMPT], N_PROMPT))
        llama_cpp.llama_memory_clear(ctx.memory, False)
        ctx.read(TEXTS[2][:N_PROMPT])
        check(wanted, ctx.step(TEXTS[2][N_PROMPT], N_PROMPT))


@pytest.mark.parametrize("type_kv", ["F16", "Q8_0"])
def test_context_shift(one_layer: Path, type_kv: str) -> None:
    n_keep, n_discard = 10, 300
    type_kv = getattr(llama_cpp, f"GGML_TYPE_{type_kv}")
    kept = TEXTS[0][:n_keep] + TEXTS[0][n_keep + n_discard : N_PROMPT]
    with Context(one_layer, type_k=type_kv, type_v=type_kv) as ctx:
        ctx.read(TEXTS[0][:N_PROMPT])
        llama_cpp.llama_memory_seq_rm(ctx.memory, 0, n_keep, n_keep + n_discard)
        llama_cpp.llama_memory_seq_add(ctx.memory, 0, n_keep + n_discard, -1, -n_discard)
        found = [ctx.step(token, len(kept) + i) for i, token in enumerate(TEXTS[1][:4])]
        assert ctx.stats().n_layers[0] == 4
    with Context(one_layer, type_k=type_kv, type_v=type_kv) as ctx:
        ctx.read(kept)
        wanted = [ctx.step(token, len(kept) + i) for i, token in enumerate(TEXTS[1][:4])]
    check(np.stack(wanted), np.stack(found), 2e-3)  # shifted keys are rounded twice; with the tips of before it is .1
