"""``fasa.exact``: what attends to all cells takes FASA's kernels (all kinds of models: ``test_architectures.py``)."""

from __future__ import annotations

from pathlib import Path

import fasa_edge
from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from runtime import TEXTS, Context, annotated_tiny, last_logits, nmse, teacher_forced
from tiny_models import Shape, make_model

pytestmark = pytest.mark.check

N_PROMPT, N_DECODE, N_LAYER = 300, 4, 2
TOKENS = TEXTS[0][: N_PROMPT + N_DECODE]
SAME_ATTENTION = 3e-5  # of the NMSE: stock rounds to f16 on the way


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def load():
    opened = []

    def open_model(path: Path, **settings) -> fasa_edge.Llama:
        opened.append(fasa_edge.Llama(str(path), n_ctx=512, n_threads=2, n_batch=512, verbose=False, **settings))
        return opened[-1]

    yield open_model
    for llm in opened:
        llm.close()


def steps(llm: fasa_edge.Llama) -> np.ndarray:
    """Logits after a prompt and after each token that follows it; the counters are those of these."""
    llm.reset()
    llm.eval(TOKENS[:N_PROMPT])
    rows = [last_logits(llm)]
    llm.fasa.reset_stats()
    for token in TOKENS[N_PROMPT:]:
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.stack(rows)


def test_a_model_without_profile(tmp_path, load, recwarn) -> None:
    model = make_model(tmp_path / "tiny.gguf", "llama", Shape())
    stock, exact = load(model), load(model, fasa_exact=True)
    assert not recwarn.list and not exact.fasa.available and exact.fasa.settings["exact"]
    wanted, found = steps(stock), steps(exact)
    assert 0 < nmse(wanted[0], found[0]) <= SAME_ATTENTION and 0 < nmse(wanted[1:], found[1:]) <= SAME_ATTENTION
    stats = exact.fasa.stats()
    assert stats.n_layers_exact == N_LAYER * N_DECODE and stats.n_layers_sparse == 0 and stats.read_ratio == 1

    exact.fasa.configure(exact=False)
    assert (steps(exact) == wanted).all()
    exact.fasa.configure(exact=True)
    assert (steps(exact) == found).all()
    with pytest.raises(fasa_edge.FasaError, match="has no FASA profile: make one with `fasa-edge convert`"):
        exact.fasa.configure(enabled=True)
    with pytest.raises(fasa_edge.FasaError, match="has no FASA profile: load it with fasa_exact=True"):
        stock.fasa.configure(exact=True)


def test_other_overrides_without_profile_still_have_no_effect(tmp_path, load) -> None:
    model = make_model(tmp_path / "tiny.gguf", "llama", Shape())
    with pytest.warns(UserWarning, match="no FASA profile, so fasa.budget has no effect"):
        assert load(model, fasa_exact=True, fasa_budget=9).fasa.settings["exact"]


def test_a_profile_that_is_ignored(annotated, load) -> None:
    llm = load(annotated, fasa_exact=True, kv_overrides={"fasa.version": 0})
    steps(llm)
    assert not llm.fasa.available and llm.fasa.stats().n_layers_exact == N_LAYER * N_DECODE


@pytest.mark.parametrize(
    ("settings", "reason", "n_exact"),
    [
        ({"fasa_enabled": False}, "disabled", N_LAYER),
        ({"fasa_min_ctx": 1024}, "short_context", N_LAYER),
        ({"fasa_n_dense_layers": 1}, "dense_layer", 1),
        ({}, None, 0),
    ],
    ids=str,
)
def test_what_stays_dense_is_exact(annotated, load, settings, reason, n_exact) -> None:
    wanted, llm = steps(load(annotated, **settings)), load(annotated, fasa_exact=True, **settings)
    assert nmse(wanted, steps(llm)) <= (SAME_ATTENTION if n_exact == N_LAYER else 1e-2)  # else other cells are chosen
    stats = llm.fasa.stats()
    assert stats.n_layers_dense == ({reason: n_exact * N_DECODE} if reason else {})
    assert (stats.n_layers_exact, stats.n_layers_sparse) == (n_exact * N_DECODE, (N_LAYER - n_exact) * N_DECODE)


def test_settings_change_between_steps(annotated, load) -> None:
    llm = load(annotated, fasa_enabled=False)
    whole = {exact: teacher_forced(llm, TOKENS, N_PROMPT, enabled=False, exact=exact) for exact in (False, True)}
    llm.reset()
    llm.eval(TOKENS[:N_PROMPT])
    llm.fasa.reset_stats()
    for i, token in enumerate(TOKENS[N_PROMPT:]):
        llm.fasa.configure(exact=i % 2 == 1)
        llm.eval([token])
        assert nmse(whole[i % 2 == 1][i + 1], last_logits(llm)) <= SAME_ATTENTION
    assert llm.fasa.stats().n_layers_exact == N_LAYER * N_DECODE // 2


@pytest.mark.parametrize("annotated_or_not", [True, False])
def test_an_override_of_another_type_is_reported(annotated, tmp_path, load, annotated_or_not) -> None:
    model = annotated if annotated_or_not else make_model(tmp_path / "tiny.gguf", "llama", Shape())
    with pytest.warns(UserWarning, match="fasa.exact(: must be of type bool| has no effect)"):
        load(model, kv_overrides={"fasa.exact": 1})


@pytest.mark.parametrize("kv_unified", [True, False])
def test_several_sequences_and_tokens(annotated, kv_unified) -> None:
    batch = [(TEXTS[seq][200 + i], 200 + i, (seq,)) for seq in range(3) for i in range(2)]
    with Context(annotated, n_seq_max=3, kv_unified=kv_unified) as ctx:
        for seq in range(3):
            ctx.read(TEXTS[seq][:200], seq)
        found = {}
        for exact in (False, True):
            ctx.configure(enabled=False, exact=exact)
            ctx.stats()
            found[exact] = ctx.decode(batch)
            assert ctx.stats().n_layers_exact == N_LAYER * exact
            for seq in range(3):
                llama_cpp.llama_memory_seq_rm(ctx.memory, seq, 200, -1)
        assert 0 < nmse(found[False], found[True]) <= SAME_ATTENTION


@pytest.mark.parametrize(
    ("arch", "params"), [("bloom", {}), ("llama", {"flash_attn_type": 0})], ids=["alibi", "no flash attention"]
)
def test_elsewhere_stock_attends(tmp_path, arch, params) -> None:
    model = make_model(tmp_path / "tiny.gguf", arch, Shape())
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    overrides[0].key, overrides[0].tag = b"fasa.exact", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL
    rows = []
    for exact in (False, True):
        overrides[0].value.val_bool = exact
        with Context(model, {"kv_overrides": overrides}, **params) as ctx:
            ctx.read(TOKENS[:N_PROMPT])
            rows.append([ctx.step(token, N_PROMPT + i) for i, token in enumerate(TOKENS[N_PROMPT:])])
            assert ctx.stats().n_layers_exact == 0
    assert (np.array(rows[0]) == np.array(rows[1])).all()
