"""FASA in each kind of architecture: with every cell in the budget, it must decode what dense attention decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pydoc_data.topics import topics

import fasa_edge
from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from runtime import decode_embeddings, last_logits, teacher_forced
from tiny_models import Shape, make_model
from unchecked import convert

N_PROMPT = 900
N_DECODE = 8  # all steps but the first run the graph of the step before
N_CTX = 2048
TOLERANCE = 3e-5  # of the NMSE: both attentions round to f16, which gave 1e-5 at most


@dataclass(frozen=True)
class Case:
    """An architecture, how many layers of its model run sparse, and how many of the others for which reason."""

    arch: str
    n_sparse: int = 2
    dense: dict[str, int] = field(default_factory=dict)
    n_rot: int | None = None
    n_tip: int = 32
    swa_full: bool = True

    @property
    def n_layer(self) -> int:
        return self.n_sparse + sum(self.dense.values())

    @property
    def n_reads_all(self) -> int:
        """Layers in which dense attention reads the whole context."""
        return self.n_sparse + self.dense.get("no_chunks", 0)

    @property
    def name(self) -> str:
        return self.arch if self.swa_full else f"{self.arch}-small-swa-cache"


CASES = (
    Case("llama"),
    Case("qwen2"),
    Case("qwen2vl"),
    Case("qwen3"),
    Case("qwen3vl"),
    Case("phi3", n_rot=48),  # partial rotary
    Case("stablelm", n_rot=16),
    Case("smollm3", n_sparse=4),
    Case("minicpm3"),
    Case("openelm"),
    Case("deci", dense={"no_kv_heads": 2}),
    Case("gemma2", dense={"sliding_window": 2}),
    Case("gemma3", dense={"sliding_window": 2}),
    Case("gemma3", dense={"sliding_window": 2}, swa_full=False),  # 768 cells, which the prompt wraps
    Case("gemma4", dense={"sliding_window": 3, "no_chunks": 1}, n_tip=16),  # the last layer reads another's cache
    Case("gpt-oss", dense={"sliding_window": 2}),
    Case("granite_swa", dense={"sliding_window": 2}),
    Case("lfm2", dense={"no_kv_heads": 2}),
)


# `make check`: both ways to turn, a part of the dims turned, windows, sinks, recurrent layers
CHECKED = {"llama", "qwen2", "phi3", "gemma3", "gpt-oss", "lfm2"}
PARAMS = [pytest.param(case, marks=[pytest.mark.check] if case.name in CHECKED else []) for case in CASES]


@pytest.fixture(scope="module", params=PARAMS, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def llm(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fasa_edge.Llama]:
    folder = tmp_path_factory.mktemp(case.name)
    model = make_model(folder / "tiny.gguf", case.arch, Shape(n_layer=case.n_layer, n_rot=case.n_rot))
    llm = fasa_edge.Llama(
        str(convert(model, folder / "annotated.gguf", tokens=512).path),
        n_ctx=N_CTX,
        n_threads=2,
        n_threads_batch=2,
        swa_full=case.swa_full,
        fasa_min_ctx=1,
        fasa_budget=N_CTX,
        fasa_n_dense_layers=0,
        fasa_n_tip=case.n_tip,
        verbose=False,
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def tokens(llm: fasa_edge.Llama) -> list[int]:
    return llm.tokenize(topics["typesseq"].encode())[: N_PROMPT + N_DECODE]


@pytest.fixture(scope="module")
def dense(llm: fasa_edge.Llama, tokens: list[int]) -> np.ndarray:
    return teacher_forced(llm, tokens, N_PROMPT, enabled=False)


def nmse(dense: np.ndarray, other: np.ndarray) -> float:
    """Of the decode steps, relative to the energy of the dense logits."""
    wanted = dense[1:].astype(np.float64)
    return float(((other[1:] - wanted) ** 2).sum() / (wanted**2).sum())


def check_layers(llm: fasa_edge.Llama, case: Case) -> None:
    stats = llm.fasa.stats()
    assert (stats.n_steps_prompt, stats.n_steps_decode) == (0, N_DECODE)
    assert stats.n_layers_sparse == N_DECODE * case.n_sparse
    assert stats.n_layers_dense == {reason: N_DECODE * n for reason, n in case.dense.items()}


def test_exact_decodes_as_dense_does(case, llm, tokens, dense) -> None:
    exact = teacher_forced(llm, tokens, N_PROMPT, enabled=False, exact=True)
    llm.fasa.configure(exact=False)
    n_attend = case.n_layer - case.dense.get("no_kv_heads", 0)
    assert llm.fasa.stats().n_layers_exact == N_DECODE * n_attend
    assert 0 < nmse(dense, exact) <= TOLERANCE


def test_exact_reads_prompts_as_dense_does(case, llm, tokens, dense) -> None:
    llm.reset()
    llm.fasa.configure(enabled=False, exact=True)
    llm.fasa.reset_stats()
    llm.eval(tokens[:N_PROMPT])
    llm.fasa.configure(exact=False)
    stats = llm.fasa.stats()
    assert stats.n_layers_exact == stats.n_steps_prompt * (case.n_layer - case.dense.get("no_kv_heads", 0)) > 0
    assert 0 < ((last_logits(llm) - dense[0]) ** 2).sum() <= TOLERANCE * (dense[0] ** 2).sum()


def test_prompts_by_blocks_are_near_dense_ones(case, llm, tokens, dense) -> None:
    """Random weights attend to everything a little, so hardly a block is left out."""
    llm.reset()
    llm.fasa.configure(enabled=True, prompt_mass=999)
    llm.fasa.reset_stats()
    llm.eval(tokens[:N_PROMPT])
    llm.fasa.configure(prompt_mass=1000)
    stats = llm.fasa.stats()
    assert stats.n_layers_sparse == stats.n_steps_prompt * case.n_sparse > 0
    assert stats.n_layers_dense == {reason: stats.n_steps_prompt * n for reason, n in case.dense.items()}
    assert 0 < ((last_logits(llm) - dense[0]) ** 2).sum() <= 1e-2 * (dense[0] ** 2).sum()


def test_attending_to_all_cells_decodes_as_dense_does(case, llm, tokens, dense) -> None:
    everything = teacher_forced(llm, tokens, N_PROMPT, budget=N_CTX)
    check_layers(llm, case)
    assert llm.fasa.stats().bytes_kv == llm.fasa.stats().bytes_kv_dense
    assert (everything[0] == dense[0]).all()  # the prompt ran dense
    assert nmse(dense, everything) <= TOLERANCE


def test_a_small_budget_reads_less_and_stays_finite(case, llm, tokens, dense) -> None:
    sparse = teacher_forced(llm, tokens, N_PROMPT, budget=64)
    check_layers(llm, case)
    stats = llm.fasa.stats()
    n_cells = sum(range(N_PROMPT + 1, N_PROMPT + N_DECODE + 1))
    n_read = case.n_sparse * 64 * N_DECODE + case.dense.get("no_chunks", 0) * n_cells
    assert stats.bytes_kv * case.n_reads_all * n_cells == stats.bytes_kv_dense * n_read
    assert np.isfinite(sparse).all()
    assert nmse(dense, sparse) > 1000 * TOLERANCE  # so a wrong attention would show


def test_the_chosen_cells_are_worth_more_than_the_last_ones(case, llm, tokens, dense) -> None:
    """With all chunks as tips (gemma4: half of them), half of the cells; tips of wrong keys would choose at random."""
    budget = N_PROMPT // 2
    chosen = nmse(dense, teacher_forced(llm, tokens, N_PROMPT, budget=budget))
    last = nmse(dense, teacher_forced(llm, tokens, N_PROMPT, budget=budget, n_recent=budget - 4))
    llm.fasa.configure(n_recent=32)
    assert chosen < last / 2


@pytest.mark.parametrize("arch", ["qwen2vl", "qwen3vl"])
def test_text_after_an_image(arch, tmp_path) -> None:
    """All tokens of an image share one position in the sequence, and more of them than ``n_recent``."""
    model = make_model(tmp_path / "tiny.gguf", arch)
    path = convert(model, tmp_path / "annotated.gguf", tokens=512).path
    llm = fasa_edge.Llama(str(path), n_ctx=1024, n_threads=2, fasa_min_ctx=1, fasa_n_dense_layers=0, verbose=False)
    tokens = llm.tokenize(topics["typesseq"].encode())[: 300 + N_DECODE]
    rows, columns = np.divmod(np.arange(64), 8)
    image = np.random.default_rng(0).standard_normal((64, llm.n_embd()), np.float32)

    def after_the_image(**settings) -> np.ndarray:
        llm.reset()
        llm.fasa.configure(enabled=False)
        llm.eval(tokens[:300])
        decode_embeddings(llm, image, np.stack([np.full(64, 300), 300 + rows, 300 + columns, np.zeros(64, int)]))
        llm.n_tokens = 308  # a text token stands after the image's height and width
        llm.fasa.configure(**{"enabled": True, **settings})
        llm.fasa.reset_stats()
        logits = []
        for token in tokens[300:]:
            llm.eval([token])
            logits.append(last_logits(llm))
        return np.stack(logits)

    dense = after_the_image(enabled=False)
    n_cells = sum(range(365, 365 + N_DECODE))
    assert llm.fasa.stats().bytes_kv == llm.fasa.stats().bytes_kv_dense == n_cells * 2 * 2 * 2 * 128
    assert nmse(dense, after_the_image(budget=1024)) <= TOLERANCE
    assert nmse(dense, after_the_image(budget=64)) > 1000 * TOLERANCE
    assert llm.fasa.stats().n_layers_sparse == 2 * N_DECODE
    llm.close()


@pytest.mark.parametrize("budget", [64, N_CTX])
def test_decoding_goes_on_in_a_reused_graph(case, llm, tokens, budget) -> None:
    llm.reset()
    llm.fasa.configure(enabled=True, budget=budget)
    llm.eval(tokens[:N_PROMPT])
    llama_cpp.llama_perf_context_reset(llm.ctx)
    for token in tokens[N_PROMPT:]:
        llm.eval([token])
    assert llama_cpp.llama_perf_context(llm.ctx).n_reused == N_DECODE - 1
