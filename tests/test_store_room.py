"""The document store: who has to make room, and what of that is noticed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasa_edge import DocumentStore
from fasa_edge.io import block_file, block_folder
from fasa_edge.runtime import context_states, sequence
from fasa_edge.runtime.context_states import StoreReport
from fasa_edge.runtime.stored_states import N_BLOCK

import pytest
from documents import DOCUMENT, N_DOCUMENT, OTHER, QUESTION, answer, files, fill, load
from runtime import TEXTS


def test_what_was_used_last_stays(model: Path, tmp_path: Path) -> None:
    prompts = [text[:600] for text in TEXTS]
    fill(model, tmp_path, prompts[0])
    size = DocumentStore(tmp_path).size
    limited = DocumentStore(tmp_path, capacity_bytes=5 * size // 2)
    fill(model, limited, prompts[1])
    answer(load(model, limited), prompts[0])
    fill(model, limited, prompts[2])
    assert limited.size <= limited.capacity_bytes
    llm = load(model, limited)
    found = []
    for no in (0, 2, 1):
        answer(llm, prompts[no], 1)
        found.append(llm.documents.report.n_restored)
    assert found == [599, 599, N_BLOCK]  # of the second, what comes last went first


def test_what_memory_has_is_used_too(model: Path, tmp_path: Path) -> None:
    prompts = [text[:600] for text in TEXTS]
    fill(model, tmp_path, prompts[1])
    llm = load(model, tmp_path)
    for prompt, n_answer in ((prompts[0], 1), (prompts[0] + OTHER, 4), (prompts[0] + QUESTION, 4)):
        answer(llm, prompt, n_answer)
        for path in files(tmp_path):
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**10,) * 2)
        before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
        answer(llm, prompt, n_answer)  # from memory, the first one with its logits
        assert llm.documents.report.n_restored == 0
        used = {path for path, time in before.items() if path.stat().st_mtime_ns > time + 5 * 10**9}
        assert len(used) == 3


def test_what_memory_has_with_its_logits_has_a_report_of_its_own(model: Path, tmp_path: Path) -> None:
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT, 1)
    first = llm.documents.report
    assert first.bytes_written
    answer(llm, DOCUMENT, 1)
    assert llm.documents.report == StoreReport(n_prompt=N_DOCUMENT, n_held=N_DOCUMENT)
    for path in files(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    answer(llm, DOCUMENT, 1)
    assert first.problems == []
    report = llm.documents.report
    assert "damaged" in report.problems[0]
    assert report.bytes_written == first.bytes_written  # once more


def test_a_prompt_larger_than_the_store(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_states, "_SECONDS", 0)
    fill(model, tmp_path, TEXTS[1][:300])
    n_files = len(files(tmp_path))
    llm = load(model, DocumentStore(tmp_path, capacity_bytes=1_000_000), n_batch=128)
    answer(llm, DOCUMENT)
    assert "exceed the 1000000 of" in llm.documents.report.problems[0]
    assert len(files(tmp_path)) == n_files


@pytest.mark.parametrize("arch", ["gemma3", "lfm2"])
def test_a_prompt_does_not_push_out_its_own_tails(models, arch: str, tmp_path: Path) -> None:
    """Without them its rows would be of no use."""
    fill(models(arch), tmp_path / "whole")
    size = DocumentStore(tmp_path / "whole").size
    fill(models(arch), DocumentStore(tmp_path / "store"), TEXTS[1][:700])
    fill(models(arch), limited := DocumentStore(tmp_path / "store", capacity_bytes=size))
    llm = load(models(arch), limited)
    answer(llm, DOCUMENT)
    assert llm.documents.report.n_restored == N_DOCUMENT - 1
    llm.close()
    llm = load(models(arch), DocumentStore(tmp_path / "small", capacity_bytes=size - 1))
    answer(llm, DOCUMENT)
    assert f"exceed the {size - 1} of" in llm.documents.report.problems[0]


def test_nothing_else_is_removed(model: Path, tmp_path: Path) -> None:
    others = [tmp_path / "letter.txt", tmp_path / ("0" * 32) / "letter.rows", tmp_path / "folder/x.rows"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (1, 1))
    block_folder.BlockFolder(tmp_path).evict(0, "0" * 32, ())
    fill(model, DocumentStore(tmp_path, capacity_bytes=3_000_000), DOCUMENT)
    assert all(path.exists() for path in others)


def test_a_file_that_is_removed_while_it_is_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(model, tmp_path)
    llm = load(model, tmp_path)
    wanted = answer(load(model), DOCUMENT)
    read = block_file.BlockReader.read

    def evicting(*arguments: Any) -> None:
        for path in files(tmp_path):
            path.unlink(missing_ok=True)
        read(*arguments)

    monkeypatch.setattr(block_file.BlockReader, "read", evicting)
    assert answer(llm, DOCUMENT) == wanted
    assert llm.documents.report.problems == []


def test_eviction_while_in_use(model: Path, tmp_path: Path) -> None:
    """Whatever is there at the moment, answers are right, and nothing is a problem."""
    wanted = answer(load(model), DOCUMENT)
    llm = load(model, tmp_path)
    ended = threading.Event()

    def evict() -> Iterator[None]:
        folder = block_folder.BlockFolder(tmp_path)
        while not ended.is_set():
            folder.evict(folder.size() // 2, "", ())
            time.sleep(0.002)

    thread = threading.Thread(target=evict)
    thread.start()
    try:
        for _ in range(4):
            assert answer(llm, DOCUMENT) == wanted
            assert llm.documents.report.problems == []
            llm.reset()
            sequence.clear(llm.ctx)
    finally:
        ended.set()
        thread.join()
