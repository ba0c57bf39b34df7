"""The patched llama.cpp on a real model: nothing changes without metadata, and with it decoding is right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import fasa_edge
from fasa_edge.convert import inspect
from fasa_edge.errors import LibraryError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.gguf_splice import splice
from fasa_edge.runtime import capi, library
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.schema import to_metadata

import numpy as np
import pytest
from runtime import kl_divergence, last_logits, logits_on, teacher_forced
from tiny_models import Shape, make_model
from unchecked import convert

N_PROMPT = 1500
N_DECODE = 48


@pytest.fixture(scope="module")
def llm(fasa_model_path: Path) -> Iterator[fasa_edge.Llama]:
    llm = fasa_edge.Llama(str(fasa_model_path), n_ctx=4096, n_threads=2, n_threads_batch=2, verbose=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def tokens(llm: fasa_edge.Llama) -> list[int]:
    """Text that the calibration has not seen."""
    return llm.tokenize(topics["typesseq"].encode())[: N_PROMPT + N_DECODE]


@pytest.fixture(scope="module")
def dense(llm: fasa_edge.Llama, tokens: list[int]) -> np.ndarray:
    return teacher_forced(llm, tokens, N_PROMPT, enabled=False)


@pytest.fixture(scope="module")
def stock_logits(
    stock_lib: Path, model_path: Path, tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, np.ndarray]:
    """By number of threads, of the unpatched library on the model without metadata."""
    tmp_path = tmp_path_factory.mktemp("stock")
    return {n: logits_on(stock_lib, model_path, tokens, N_PROMPT, n, tmp_path) for n in (1, 2)}


def test_without_metadata_logits_are_those_of_stock_to_the_bit(model_path, tokens, stock_logits, tmp_path) -> None:
    patched = logits_on(library.lib_dir(), model_path, tokens, N_PROMPT, 2, tmp_path)
    assert (patched == stock_logits[2]).all()


def test_stock_runs_the_annotated_model_as_before(stock_lib, fasa_model_path, tokens, stock_logits, tmp_path) -> None:
    annotated = logits_on(stock_lib, fasa_model_path, tokens, N_PROMPT, 2, tmp_path)
    assert (annotated == stock_logits[2]).all()


def test_switched_off_logits_are_those_of_stock_to_the_bit(dense, stock_logits) -> None:
    assert (dense == stock_logits[2]).all()


def test_attending_to_all_cells_is_as_close_to_stock_as_stock_to_itself(llm, tokens, stock_logits) -> None:
    def distance(logits: np.ndarray) -> float:
        return float(np.sqrt(((logits[1:] - stock_logits[2][1:]).astype(np.float64) ** 2).mean()))

    noise = distance(stock_logits[1])
    everything = teacher_forced(llm, tokens, N_PROMPT, budget=4096, min_ctx=1)
    stats = llm.fasa.stats()
    assert stats.n_layers_sparse == 29 * N_DECODE and stats.n_layers_dense == {"dense_layer": N_DECODE}
    assert distance(everything) <= 1.5 * noise
    assert kl_divergence(stock_logits[2][1:], everything[1:]) <= 1.5 * kl_divergence(
        stock_logits[2][1:], stock_logits[1][1:]
    )


def test_a_small_budget_stays_close_to_dense(llm, tokens, dense) -> None:
    sparse = teacher_forced(llm, tokens, N_PROMPT, budget=256)
    assert llm.fasa.stats().read_ratio < 0.4
    assert kl_divergence(dense[1:], sparse[1:]) < 0.05


def test_it_is_the_dominant_chunks_that_keep_it_close(llm, fasa_model_path, tokens, dense, tmp_path) -> None:
    """The same budget chosen by each head's least dominant chunks does far worse."""
    header = read_header(fasa_model_path)
    profile = inspect(fasa_model_path).profile
    worst = replace(profile, chunks=[np.ascontiguousarray(layer[:, ::-1]) for layer in profile.chunks])
    splice(header, tmp_path / "worst.gguf", to_metadata(worst), force=True, progress=lambda done, total: None)
    upside_down = fasa_edge.Llama(str(tmp_path / "worst.gguf"), n_ctx=4096, n_threads=2, verbose=False)

    best = kl_divergence(dense[1:], teacher_forced(llm, tokens, N_PROMPT, budget=256)[1:])
    assert kl_divergence(dense[1:], teacher_forced(upside_down, tokens, N_PROMPT, budget=256)[1:]) > 5 * best


def test_graphs_are_reused(llm, tokens) -> None:
    llm.reset()
    llm.fasa.configure(enabled=True, budget=128, min_ctx=1)
    llm.eval(tokens[:N_PROMPT])
    llama_cpp.llama_perf_context_reset(llm.ctx)
    for token in tokens[N_PROMPT : N_PROMPT + 20]:  # up to 1,520 cells, all in the graph of 1,536
        llm.eval([token])
    assert llama_cpp.llama_perf_context(llm.ctx).n_reused == 19


def test_settings_change_between_steps(llm, tokens, dense) -> None:
    """A graph built for one setting is not reused for another."""
    llm.reset()
    llm.fasa.configure(enabled=False)
    llm.eval(tokens[:N_PROMPT])
    seen = {}
    for i, settings in enumerate(({"budget": 128}, {"budget": 1024}, {"enabled": False}, {"enabled": True})):
        llm.fasa.configure(**{"enabled": True, "min_ctx": 1, **settings})
        llm.fasa.reset_stats()
        llm.eval([tokens[N_PROMPT + i]])
        seen[i] = llm.fasa.stats()
    row_bytes = seen[0].bytes_kv_dense // (30 * (N_PROMPT + 1))
    assert row_bytes == 2 * 3 * 64 * 2
    assert [seen[i].bytes_kv for i in range(4)] == [
        row_bytes * (29 * 128 + N_PROMPT + 1),
        row_bytes * (29 * 1024 + N_PROMPT + 2),
        row_bytes * 30 * (N_PROMPT + 3),
        row_bytes * (29 * 1024 + N_PROMPT + 4),
    ]
    assert seen[2].n_layers_dense == {"disabled": 30}


def test_counters(llm, tokens) -> None:
    llm.reset()
    llm.fasa.configure(enabled=True, budget=256, min_ctx=0)
    llm.fasa.reset_stats()
    llm.eval(tokens[:600])  # prompts of 512 and 88 tokens
    llm.eval(tokens[600:605])  # decode-shaped
    stats = llm.fasa.stats()
    assert (stats.n_steps_prompt, stats.n_steps_decode) == (2, 1)
    assert stats.n_layers_sparse == 29
    assert stats.n_layers_dense == {"prompt": 2 * 29, "dense_layer": 3}
    row_bytes = 2 * 3 * 64 * 2
    visible = sum(range(601, 606))
    assert stats.bytes_kv_dense == 30 * visible * row_bytes
    assert stats.bytes_kv == row_bytes * (29 * 5 * 256 + visible)
    assert stats.bytes_tips == 29 * 5 * 768 * 3 * 24
    assert stats.tips_size >= 29 * 4096 * 3 * 24


@pytest.mark.parametrize(
    ("budget", "budget_ctx", "min_ctx"), [(512, 4096, 1024), (8192, 4096, 65536), (512, 128, 8192), (8192, 0, 16384)]
)
def test_a_step_is_sparse_from_where_its_budget_is_half_of_the_cells(llm, budget, budget_ctx, min_ctx) -> None:
    llm.fasa.configure(enabled=True, budget=budget, budget_ctx=budget_ctx, min_ctx=0)
    assert llm.fasa.stats().min_ctx == min_ctx
    assert budget * max(1, min_ctx / (budget_ctx or min_ctx)) ** 0.5 == min_ctx / 2
    llm.fasa.configure(budget_ctx=4096)


def test_short_contexts_and_prompts_run_dense(llm, tokens) -> None:
    llm.reset()
    llm.fasa.configure(enabled=True, budget=512, min_ctx=0, max_batch=8)
    llm.fasa.reset_stats()
    llm.eval(tokens[:300])
    llm.eval(tokens[300:301])
    assert llm.fasa.stats().n_layers_dense == {"prompt": 29, "short_context": 29, "dense_layer": 2}
    llm.fasa.configure(min_ctx=1, max_batch=2)
    llm.fasa.reset_stats()
    llm.eval(tokens[301:303])
    llm.eval(tokens[303:306])
    assert llm.fasa.stats().n_layers_dense == {"prompt": 29, "dense_layer": 2}
    llm.fasa.configure(max_batch=8)


def test_several_tokens_at_once_decode_as_one_by_one(llm, tokens) -> None:
    """To the noise of the engine: the matrix products of a batch round differently."""
    one_by_one = teacher_forced(llm, tokens[: N_PROMPT + 8], N_PROMPT, budget=256)
    llm.reset()
    llm.fasa.configure(enabled=False)
    llm.eval(tokens[:N_PROMPT])
    llm.fasa.configure(enabled=True)
    llm.fasa.reset_stats()
    llm.eval(tokens[N_PROMPT : N_PROMPT + 8])
    assert llm.fasa.stats().n_layers_sparse == 29
    assert kl_divergence(one_by_one[-1], last_logits(llm)) < 0.05


def test_tips_survive_what_happens_to_the_cache(llm, tokens) -> None:
    """Restored, truncated or refilled, the cache decodes as before to the bit: tips follow K."""
    expected = teacher_forced(llm, tokens, N_PROMPT, budget=256)

    def decode_again() -> np.ndarray:
        llm.fasa.configure(enabled=True)
        for token in tokens[N_PROMPT:]:
            llm.eval([token])
        return last_logits(llm)

    llm.n_tokens = N_PROMPT  # eval() removes what lies after n_tokens
    assert (decode_again() == expected[-1]).all()

    llm.n_tokens = N_PROMPT
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, N_PROMPT, -1)
    state = llm.save_state()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    llm.load_state(state)
    assert (decode_again() == expected[-1]).all()


def test_context_shift_rebuilds_the_tips(llm, tokens) -> None:
    """K turned in place: decoding goes on as from a state that was saved after it, whose tips come from K alone."""
    memory = llama_cpp.llama_get_memory(llm.ctx)
    llm.reset()
    llm.fasa.configure(enabled=False)
    llm.eval(tokens[:N_PROMPT])
    llama_cpp.llama_memory_seq_rm(memory, 0, 4, 600)
    llama_cpp.llama_memory_seq_add(memory, 0, 600, -1, -596)
    llm.n_tokens = N_PROMPT - 596
    llm.eval(tokens[N_PROMPT : N_PROMPT + 1])  # applies the shift
    state = llm.save_state()

    def decode() -> np.ndarray:
        llm.fasa.configure(enabled=True, budget=256)
        llm.fasa.reset_stats()
        for token in tokens[N_PROMPT + 1 : N_PROMPT + 8]:
            llm.eval([token])
        assert llm.fasa.stats().n_layers_sparse == 7 * 29
        return last_logits(llm)

    shifted = decode()
    llama_cpp.llama_memory_clear(memory, True)
    llm.load_state(state)
    # the restored cells lie in another order, so sums round differently
    assert kl_divergence(shifted, decode()) < 0.01


def test_overrides_are_taken_or_reported(fasa_model_path) -> None:
    overrides = {"fasa.budget": 77, "fasa.n_sink": 2, "fasa.n_recnet": 5, "fasa.n_recent": 5.0}
    with pytest.warns(UserWarning, match="without effect") as warned:
        llm = fasa_edge.Llama(str(fasa_model_path), n_ctx=512, kv_overrides=overrides, fasa_n_tip=8, verbose=False)
    stats = llm.fasa.stats()
    assert (stats.settings["budget"], stats.settings["n_sink"], stats.settings["n_tip"]) == (77, 2, 8)
    assert stats.settings["n_recent"] == 32
    assert sorted(stats.ineffective_overrides) == [
        "fasa.n_recent: must be of type int",
        "fasa.n_recnet: no such setting",
    ]
    assert len(warned) == 2
    assert stats.tips_size < 29 * 512 * 3 * 8 * 1.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fasa_budget": 20}, "n_sink = 4 and fasa.n_recent = 32 do not fit into fasa.budget = 20"),
        ({"fasa_n_tip": 33}, "fasa.n_tip = 33 is out of range: a head of layer 0 has 32 chunks"),
        ({"kv_overrides": {"fasa.budget": -1}}, "fasa.budget = -1 is out of range"),
    ],
)
def test_values_out_of_range_are_refused_at_load(fasa_model_path, settings, message) -> None:
    with pytest.raises(fasa_edge.ModelError, match=message):
        fasa_edge.Llama(str(fasa_model_path), n_ctx=512, verbose=False, **settings)


def test_settings_out_of_range_are_refused_between_steps(llm) -> None:
    before = llm.fasa.settings
    with pytest.raises(fasa_edge.SchemaError, match="exceeds budget = 10"):
        llm.fasa.configure(budget=10)
    with pytest.raises(fasa_edge.FasaError, match="n_tip is fixed when the model is loaded"):
        llm.fasa.configure(n_tip=3)
    with pytest.raises(fasa_edge.FasaError, match="budgte is no setting"):
        llm.fasa.configure(budgte=3)
    assert llm.fasa.settings == before


def test_a_model_without_profile_runs_dense_and_says_so(model_path) -> None:
    with pytest.warns(UserWarning, match="has no FASA profile, so fasa.budget has no effect"):
        llm = fasa_edge.Llama(str(model_path), n_ctx=512, fasa_budget=64, verbose=False)
    assert not llm.fasa.available and llm.fasa.settings == {}
    with pytest.raises(fasa_edge.FasaError, match="has no FASA profile: make one"):
        llm.fasa.configure(budget=64)


def test_flash_attention_off_is_refused_by_ours_and_dense_in_the_library(fasa_model_path, tokens) -> None:
    with pytest.raises(fasa_edge.FasaError, match="flash_attn=False"):
        fasa_edge.Llama(str(fasa_model_path), flash_attn=False)
    llm = llama_cpp.Llama(str(fasa_model_path), n_ctx=512, flash_attn=False, verbose=False)
    llm.eval(tokens[:20])
    llm.eval(tokens[20:21])
    stats = fasa_edge.Fasa(llm).stats()
    assert stats.n_layers_dense == {"flash_attn_off": 2 * 29, "dense_layer": 2}
    assert stats.bytes_kv == 30 * 21 * 2 * 3 * 64 * 2  # V is transposed, its rows are no longer for that


def test_the_stock_class_decodes_sparsely_after_one_import(fasa_model_path, tokens) -> None:
    llm = llama_cpp.Llama(str(fasa_model_path), n_ctx=2048, flash_attn=True, verbose=False)
    llm.eval(tokens[:N_PROMPT])
    llm.eval(tokens[N_PROMPT : N_PROMPT + 1])
    assert fasa_edge.Fasa(llm).stats().n_layers_sparse == 29


def test_streaming_and_chat(llm) -> None:
    llm.fasa.configure(enabled=True, budget=64, min_ctx=1)
    pieces = [
        c["choices"][0]["text"] for c in llm("The capital of France is", max_tokens=8, temperature=0, stream=True)
    ]
    assert "Paris" in "".join(pieces)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answers = []
    for enabled in (True, False):
        llm.fasa.configure(enabled=enabled)
        llm.reset()
        reply = llm.create_chat_completion(question, max_tokens=8, temperature=0)
        answers.append(reply["choices"][0]["message"]["content"])
    assert answers[0] == answers[1]
    llm.fasa.configure(budget=512, min_ctx=0)


def test_context_is_the_models_own_unless_given(model_path, monkeypatch) -> None:
    llm = fasa_edge.Llama(str(model_path), verbose=False)
    assert llm.n_ctx() == 8192
    # 30 layers, 3 KV heads, K and V of 64 dims in f16; what computing takes beside it hardly depends on n_ctx
    kinds = capi.memory(llm.ctx)
    mapped = sum(kind.model for kind in kinds)
    free = mapped + sum(kind.compute for kind in kinds) + 2 * 1000 * 30 * 3 * 2 * 64 * 2
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free})())
    assert fasa_edge.Llama(str(model_path), verbose=False).n_ctx() == 768
    q8_0 = llama_cpp.GGML_TYPE_Q8_0  # 34 bytes for 32 elements
    assert fasa_edge.Llama(str(model_path), type_k=q8_0, type_v=q8_0, verbose=False).n_ctx() == 1792


def test_context_of_a_model_without_kv_heads(tmp_path, monkeypatch) -> None:
    """Latent attention keeps one row of 96 dims for all heads, and no V."""
    model = make_model(tmp_path / "tiny.gguf", "deepseek2", Shape(n_ctx=1 << 20))
    llm = fasa_edge.Llama(str(model), n_ctx=1024, verbose=False)
    free = model.stat().st_size + 2 * 1024 * 2 * 96 * 2 + sum(kind.compute for kind in capi.memory(llm.ctx))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free})())
    assert fasa_edge.Llama(str(model), verbose=False).n_ctx() == 1024


@pytest.mark.parametrize("setting", [{"fasa_budget": "512"}, {"fasa_budget": True}, {"fasa_enabled": 1}])
def test_settings_of_the_wrong_type_are_refused(model_path, setting) -> None:
    with pytest.raises(fasa_edge.SchemaError, match=f"{next(iter(setting))} = .*: expected"):
        fasa_edge.Llama(str(model_path), **setting)


def test_a_vocabulary_alone(model_path) -> None:
    llm = fasa_edge.Llama(str(model_path), vocab_only=True, verbose=False)
    assert llm.detokenize(llm.tokenize(b"Hello")) == b"Hello"


def test_damaged_metadata_is_refused(fasa_model_path, tmp_path) -> None:
    data = bytearray(fasa_model_path.read_bytes())
    chunks = data.index(b"fasa.chunks") + len(b"fasa.chunks") + 4 + 4 + 8
    data[chunks : chunks + 4] = (99).to_bytes(4, "little")
    (tmp_path / "chunk.gguf").write_bytes(data)
    with pytest.raises(fasa_edge.ModelError, match="layer 0, KV head 0 lists chunk 99, which is out of range"):
        fasa_edge.Llama(str(tmp_path / "chunk.gguf"), verbose=False)

    data = fasa_model_path.read_bytes().replace(b"0-29:9/3x64r64", b"0-29:8/4x64r64")
    (tmp_path / "foreign.gguf").write_bytes(data)
    with pytest.raises(
        fasa_edge.ModelError, match="made for another model: fasa.fingerprint is 'llama rope=0 0-29:8/4x64r64'"
    ):
        fasa_edge.Llama(str(tmp_path / "foreign.gguf"), verbose=False)


def _import_error(tmp_path: Path, code: str, **env: str) -> str:
    # elsewhere, so that Python finds the installed package and not the source tree
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0
    return result.stderr


def test_a_foreign_library_that_came_first_is_named(stock_lib, tmp_path) -> None:
    error = _import_error(tmp_path, "import llama_cpp; import fasa_edge", LLAMA_CPP_LIB_PATH=str(stock_lib))
    assert "LibraryError" in error and str(stock_lib) in error and "import fasa_edge before llama_cpp" in error


def test_a_foreign_ggml_that_came_first_is_named(stock_lib, tmp_path) -> None:
    ggml = next(stock_lib.glob("libggml-base.*"))
    error = _import_error(tmp_path, f"import ctypes; ctypes.CDLL({str(ggml)!r}, ctypes.RTLD_GLOBAL); import fasa_edge")
    assert "LibraryError" in error
    assert "import fasa_edge before llama_cpp" in error


def test_a_missing_library_is_an_error_with_a_remedy(tmp_path) -> None:
    error = _import_error(tmp_path, "import fasa_edge", FASA_LIB_PATH=str(tmp_path / "none"))
    assert "LibraryError" in error and "make install" in error


def test_an_annotated_model_can_be_converted_again(fasa_model_path, tmp_path) -> None:
    again = convert(fasa_model_path, tmp_path / "again.gguf", tokens=512, force=True)
    assert fasa_edge.Llama(str(again.path), n_ctx=512, verbose=False).fasa.available


def test_a_library_of_other_sources_is_refused():
    """Its structs may have other fields; a library from before their sizes were told says 0."""
    build = llama_cpp.llama_cpp._lib.llama_fasa_get_build()
    capi.check_sizes(build)
    build.sizeof_fasa_stats = 0
    with pytest.raises(LibraryError, match=r"llama_fasa_stats has \d+ bytes in these sources .* 0 in the library"):
        capi.check_sizes(build)
