"""States of a sequence, taken apart into rows and tails and put together again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from fasa_edge import DocumentStore
from fasa_edge.runtime import sequence, state_layout, store
from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from documents import (
    DOCUMENT,
    N_DOCUMENT,
    QUESTION,
    answer,
    files,
    fill,
    load,
)
from runtime import GGML_TYPES
from tiny_models import Shape, make_model


@pytest.mark.parametrize("arch", ["llama", "qwen2vl", "deepseek2", "gemma3", "gpt-oss", "granite_swa", "lfm2"])
@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_layouts(arch: str, type_kv: str, tmp_path: Path) -> None:
    """A state is made up of its sections and its tail, and that of a prefix of the same rows is the prefix' own."""
    model = make_model(tmp_path / "tiny.gguf", arch, Shape(n_layer=4))
    ggml_type = GGML_TYPES[type_kv]
    llm = load(model, type_k=ggml_type, type_v=ggml_type)
    for n in (300, 700):
        llm.eval(DOCUMENT[llm.n_tokens : n])
        whole, partial = sequence.save(llm.ctx), sequence.save(llm.ctx, partial=True)
        n_tail = 0 if len(whole) == len(partial) else len(partial) - state_layout.HEAD
        assert whole[len(whole) - n_tail :].tobytes() == partial[len(partial) - n_tail :].tobytes()
        layout, n_cells = state_layout.parse(whole, n_tail, (ggml_type, ggml_type))
        assert n_cells == n
        assert layout == state_layout.Layout.from_dict(layout.as_dict())
        sections = layout.sections(whole, n)
        assert state_layout.positions(sections[0]).tolist() == list(range(n))
        again = layout.empty(n, n_tail)
        for mine, section in zip(layout.sections(again, n), sections, strict=True):
            mine[:] = section
        again[len(again) - n_tail :] = whole[len(whole) - n_tail :]
        assert again.tobytes() == whole.tobytes()
    assert state_layout.parse(whole[:-1], n_tail, (ggml_type, ggml_type)) is None
    assert state_layout.parse(whole, n_tail, (ggml_type + 1, ggml_type)) is None
    assert state_layout.parse(whole[:10], 0, (ggml_type, ggml_type)) is None


def test_rows_lie_in_the_order_of_the_tokens(model: Path, tmp_path: Path) -> None:
    """Whatever the order of the cells."""
    llm = load(model, tmp_path)
    wanted = answer(llm, DOCUMENT)
    contents = {path.name: path.read_bytes() for path in files(tmp_path)}
    for path in files(tmp_path):
        path.unlink()
    layout, n = state_layout.parse(state := sequence.save(llm.ctx), 0, (1, 1))
    sections = layout.sections(state, n)
    order = np.random.default_rng(0).permutation(n)
    for section in sections:
        section[:] = section[order]
    sequence.clear(llm.ctx)
    sequence.restore(llm.ctx, state)
    sequence.cut(llm.ctx, N_DOCUMENT)
    llm.documents._states.store_rows(np.array(DOCUMENT, np.int32), N_DOCUMENT)
    assert llm.documents.report.problems == []
    assert {path.name: path.read_bytes() for path in files(tmp_path)} == contents
    llm = load(model, tmp_path)
    assert answer(llm, DOCUMENT) == wanted


def test_positions_that_are_not_those_of_a_text(model: Path, tmp_path: Path) -> None:
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT)
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 10, 20)
    llm.documents._states.store_rows(llm._input_ids, llm.n_tokens)
    assert "are not those of 707 tokens" in llm.documents.report.problems[0]


def test_progress(model: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    documents = DocumentStore(tmp_path, progress=lambda *report: reports.append(report))
    fill(model, documents)
    fill(model, documents, DOCUMENT + QUESTION)
    for stage in ("storing", "restoring"):
        done = [report[1:] for report in reports if report[0] == stage]
        assert [n for n, _ in done] == sorted(n for n, _ in done)
        assert done[-1][0] == done[-1][1]


def test_tails_are_few(tmp_path: Path) -> None:
    cache = store.DocumentCache.__new__(store.DocumentCache)
    cache.store, cache._states = DocumentStore(tmp_path), SimpleNamespace(has_tail=True, n_rows=5000)
    assert cache._stops(0, 6000) == [1856, 5000, 5440, 5888, 5999]
    assert cache._stops(5888, 6000) == [5999]
    assert cache._parting(4960, 6000) == [5000]
    assert cache._parting(4990, 6000) == []
    cache._states.has_tail = False
    assert (cache._stops(0, 6000), cache._parting(0, 6000)) == ([5999], [])
