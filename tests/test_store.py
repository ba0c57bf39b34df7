"""The document store: what was read is restored as it was, and nothing else ever is."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fasa_edge
from fasa_edge import DocumentCache, DocumentStore, FasaError
from fasa_edge.io import block_file, block_folder
from fasa_edge.runtime import sequence, state_layout, store, stored_states
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.stored_states import N_BLOCK

import numpy as np
import pytest
from runtime import GGML_TYPES, TEXTS, annotated_tiny, check, last_logits
from tiny_models import Shape, make_model

N_DOCUMENT = 700
N_TAIL = 640
DOCUMENT = TEXTS[0][:N_DOCUMENT]
QUESTION, OTHER = TEXTS[1][:20], TEXTS[2][:30]
PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

ARCHITECTURES = ["llama", "gemma3", "lfm2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Annotated random models by architecture."""
    made: dict[str, Path] = {}

    def model(arch: str) -> Path:
        if arch not in made:
            made[arch] = annotated_tiny(tmp_path_factory.mktemp(arch), arch, n_layer=4)
        return made[arch]

    return model


@pytest.fixture
def model(models: Callable[[str], Path]) -> Path:
    return models("llama")


def load(model: Path, cache: Any = None, **arguments: Any) -> fasa_edge.Llama:
    return fasa_edge.Llama(str(model), **({"n_ctx": 2048, "verbose": False, "cache": cache} | arguments))


def answer(llm: fasa_edge.Llama, prompt: list[int], n: int = 8) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))


def first_logits(llm: fasa_edge.Llama, prompt: list[int]) -> np.ndarray:
    answer(llm, prompt, 1)
    return last_logits(llm)


def files(folder: Path, *kinds: str) -> list[Path]:
    return sorted(path for kind in kinds or ("rows", "tail") for path in folder.glob(f"*/*-*.{kind}"))


def fill(model: Path, folder: Path, prompt: list[int] = DOCUMENT, **arguments: Any) -> None:
    """Store a prompt."""
    llm = load(model, folder, **arguments)
    answer(llm, prompt, 1)
    assert not llm.documents.report.problems
    llm.close()


# What is restored


@pytest.mark.check
def test_a_question_after_a_restart_has_the_answer_that_it_had_without(model: Path, tmp_path: Path) -> None:
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT + QUESTION)
    wanted = answer(llm, DOCUMENT + OTHER), last_logits(llm)
    assert llm.documents.report.n_held == N_DOCUMENT
    llm.fasa.reset_stats()
    llm.close()

    llm = load(model, tmp_path)
    found = answer(llm, DOCUMENT + OTHER), last_logits(llm)
    report = llm.documents.report
    assert (report.n_restored, report.problems) == (N_DOCUMENT, [])
    assert found[0] == wanted[0]
    assert np.array_equal(found[1], wanted[1])
    assert llm.fasa.stats().n_layers_sparse == 4 * 7  # of the tokens that follow the first


@pytest.mark.parametrize("type_kv", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gemma3 without swa_full"])
def test_a_prefix_is_restored_in_every_memory(models, arch: str, type_kv: str, tmp_path: Path) -> None:
    """With the tips: the tokens that follow are decoded sparsely."""
    arch, _, small = arch.partition(" ")
    arguments = {name: GGML_TYPES[type_kv] for name in ("type_k", "type_v")} | {"swa_full": not small}
    fill(models(arch), tmp_path, DOCUMENT + QUESTION, **arguments)

    llm = load(models(arch), tmp_path, **arguments)
    found = [first_logits(llm, DOCUMENT + OTHER)]
    report = llm.documents.report
    assert report.problems == []
    # of a memory that forgets nothing a tail, here the last one before the document's end
    n = report.n_restored
    assert n == (N_DOCUMENT if arch == "llama" else N_TAIL)
    llm.fasa.reset_stats()
    for token in QUESTION[:4]:
        llm.eval([token])
        found.append(last_logits(llm))
    assert llm.fasa.stats().n_layers_sparse > 0

    fresh = load(models(arch), **arguments)
    for part in (DOCUMENT[:n], DOCUMENT[n:], OTHER):  # where the prompts part, a tail is taken
        fresh._starts_prompt = True
        fresh.eval(part)
    wanted = [last_logits(fresh)]
    for token in QUESTION[:4]:
        fresh.eval([token])
        wanted.append(last_logits(fresh))
    # sliding windows are restored to other cells, by stock too, and what that rounds puts some keys at other levels
    check(np.stack(wanted), np.stack(found), 2e-3 if arch == "gemma3" else 1e-6)


def test_a_recurrent_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "mamba.gguf", "mamba")
    fill(model, tmp_path / "store", DOCUMENT + QUESTION)
    assert not files(tmp_path / "store", "rows")
    llm = load(model, tmp_path / "store")
    found = first_logits(llm, DOCUMENT + QUESTION)
    assert llm.documents.report.n_restored == N_DOCUMENT + len(QUESTION) - 1
    check(first_logits(load(model), DOCUMENT + QUESTION), found)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_prompt_takes_one_token(models, arch: str, tmp_path: Path) -> None:
    """And has the logits that it had when it was read, to the bit."""
    llm = load(models(arch), tmp_path)
    wanted = first_logits(llm, DOCUMENT)
    llm.close()
    llm = load(models(arch), tmp_path)
    assert np.array_equal(first_logits(llm, DOCUMENT), wanted)
    assert llm.documents.report.n_restored == N_DOCUMENT - 1
    answer(llm, DOCUMENT)
    answer(llm, DOCUMENT)
    assert llm.documents.report.n_restored == N_DOCUMENT - 1 if arch == "lfm2" else llm.documents.report.n_held


def test_a_conversation_goes_on_from_memory(models, tmp_path: Path) -> None:
    """A hybrid model, too, which llama_cpp.Llama lets read everything again."""
    llm = load(models("lfm2"), tmp_path)
    said = answer(llm, DOCUMENT)
    prompt = [*DOCUMENT, *said[:-1], *QUESTION]
    answer(llm, prompt)
    assert llm.documents.report.n_held == N_DOCUMENT + len(said) - 1
    assert llm.documents.report.n_restored == 0


def test_where_prompts_part_a_tail_is_kept(models, tmp_path: Path) -> None:
    """So that a third question has nothing of the document to read."""
    fill(models("lfm2"), tmp_path, DOCUMENT + QUESTION)
    for n in (N_TAIL, N_DOCUMENT):
        llm = load(models("lfm2"), tmp_path)
        answer(llm, [*DOCUMENT, *TEXTS[2][n - 500 : n - 400]])
        assert llm.documents.report.n_restored == n
        llm.close()


def test_sliding_windows_are_not_cut_back_further_than_they_reach(models, tmp_path: Path) -> None:
    """Of a restored state llama.cpp would go on without what it has forgotten."""
    fill(models("gemma3"), tmp_path)
    shorter = DOCUMENT[:300] + QUESTION
    wanted = first_logits(load(models("gemma3")), shorter)
    llm = load(models("gemma3"), tmp_path)
    answer(llm, DOCUMENT)
    found = first_logits(llm, shorter)
    assert llm.documents.report.n_held == 0
    check(wanted, found, 2e-3)


def test_prompts_share_what_they_have_in_common(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path)
    size = DocumentStore(tmp_path).size
    fill(model, tmp_path, DOCUMENT + TEXTS[1][:600])
    # the last file of the first prompt has become a part of a longer one
    assert [len(block_file.BlockReader(path).block.tokens) for path in files(tmp_path)].count(N_DOCUMENT % N_BLOCK) == 0
    assert DocumentStore(tmp_path).size < 2 * size
    fill(model, tmp_path, DOCUMENT[:300] + TEXTS[2][:600])
    llm = load(model, tmp_path)
    for prompt, n in ((DOCUMENT[:450] + OTHER, 450), (DOCUMENT[:300] + TEXTS[2][:400], 699), (TEXTS[2][:400], 0)):
        llm.reset()
        sequence.clear(llm.ctx)
        answer(llm, prompt, 1)
        assert llm.documents.report.n_restored == n


def test_what_a_context_shift_has_moved_is_not_stored(model: Path, tmp_path: Path) -> None:
    """It has seen tokens that have left, so nobody who reads the tokens gets the same."""
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT[:200], 1)
    answer(llm, DOCUMENT[:400], 1)
    llm.documents.spoil(390)
    answer(llm, DOCUMENT + QUESTION, 1)
    assert llm.documents.report.n_held == 400
    llm.close()
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT + QUESTION, 1)
    assert llm.documents.report.n_restored == 400
    llm.documents.spoil(500)
    answer(llm, DOCUMENT[:450] + TEXTS[1][:500], 1)  # of which nothing has moved
    llm.close()
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT[:450] + TEXTS[1][:500], 1)
    assert llm.documents.report.n_restored == 949


def test_what_was_decoded_sparsely_is_not_stored(model: Path, tmp_path: Path) -> None:
    """Another budget, and none, would get it from there."""
    llm = load(model, tmp_path)
    said = answer(llm, DOCUMENT, 300)
    assert llm.fasa.stats().n_layers_sparse
    goes_on = [*DOCUMENT, *said[:-1], *QUESTION]
    answer(llm, goes_on)
    llm.close()
    llm = load(model, tmp_path, fasa_enabled=False)
    found = first_logits(llm, goes_on)
    assert llm.documents.report.n_restored == N_DOCUMENT
    check(first_logits(load(model, fasa_enabled=False), goes_on), found, 1e-4)  # batches of other shapes round


def test_what_was_read_with_other_settings_is_not_stored(model: Path, tmp_path: Path) -> None:
    llm = load(model, tmp_path, fasa_prompt_mass=1)
    answer(llm, DOCUMENT, 1)
    llm.fasa.configure(prompt_mass=1000)
    answer(llm, DOCUMENT + OTHER * 20, 1)
    llm.close()
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT + OTHER * 20, 1)
    assert llm.documents.report.n_restored == 0


def test_short_prompts_are_not_stored(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path, DOCUMENT[:200])
    assert files(tmp_path) == []
    fill(model, DocumentStore(tmp_path, min_tokens=200), DOCUMENT[:200])
    assert len(files(tmp_path)) == 1


def test_logits_of_all_tokens_are_not_made_up(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path)
    llm = load(model, tmp_path, logits_all=True)
    answer(llm, DOCUMENT + QUESTION, 1)
    report = llm.documents.report
    assert report.n_restored == 0
    assert "logits_all=True" in report.problems[0]


def test_drafts(model: Path, tmp_path: Path) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    wanted = answer(load(model, tmp_path), DOCUMENT, 20)
    llm = load(model, tmp_path, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    assert answer(llm, DOCUMENT, 20) == wanted
    assert llm.documents.report.n_restored == N_DOCUMENT - 1


def test_completions_and_chats(model_path: Path, tmp_path: Path) -> None:
    """The small real model: the text of a second process is that of the first."""
    text = "The answer is four. " * 60
    ask = lambda llm, question: llm.create_chat_completion(  # noqa: E731
        [{"role": "user", "content": f"{text}\n\n{question}"}], max_tokens=12, temperature=0.0
    )["choices"][0]["message"]["content"]
    llm = load(model_path, tmp_path)
    ask(llm, "What is it?")
    wanted = ask(llm, "How much is it?")
    llm.close()
    llm = load(model_path, tmp_path)
    assert ask(llm, "How much is it?") == wanted
    assert llm.documents.report.n_restored > 256
    assert llm.create_completion(text, max_tokens=4, temperature=0.0)["choices"][0]["text"]


# The interface of llama-cpp-python's caches


def test_set_cache(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path)
    llm = load(model)
    assert llm.documents is None
    llm.set_cache(DocumentStore(tmp_path))
    answer(llm, DOCUMENT)
    assert llm.documents.report.n_restored == N_DOCUMENT - 1
    llm.set_cache(cache := llama_cpp.LlamaRAMCache())
    assert (llm.documents, llm.cache) == (None, cache)


def test_the_class_of_the_bindings(model: Path, tmp_path: Path) -> None:
    arguments = {"n_ctx": 2048, "flash_attn": True, "verbose": False}
    llm = llama_cpp.Llama(str(model), **arguments)
    llm.set_cache(DocumentCache(DocumentStore(tmp_path), llm))
    assert DOCUMENT not in llm.cache
    with pytest.raises(KeyError):
        llm.cache[DOCUMENT]
    llm.create_completion(DOCUMENT, max_tokens=4, temperature=0.0)
    wanted = llm.create_completion(DOCUMENT + OTHER, max_tokens=4, temperature=0.0)["choices"]
    assert files(tmp_path)
    llm = llama_cpp.Llama(str(model), **arguments)
    llm.set_cache(DocumentCache(DocumentStore(tmp_path), llm))
    assert DOCUMENT in llm.cache
    assert llm.create_completion(DOCUMENT + OTHER, max_tokens=4, temperature=0.0)["choices"] == wanted
    assert llm.cache.report.n_restored == N_DOCUMENT
    assert llm.cache.cache_size == sum(path.stat().st_size for path in files(tmp_path))


def test_a_copy_shares_the_store(model: Path, tmp_path: Path) -> None:
    import pickle

    llm = load(model, DocumentStore(tmp_path, capacity_bytes=10_000_000, min_tokens=100, progress=lambda *report: None))
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.documents.store.folder.path == tmp_path
    assert (copy.documents.store.capacity_bytes, copy.documents.store.min_tokens) == (10_000_000, 100)
    assert copy.documents is not llm.documents


# What is not


def refused(model: Path, folder: Path, n: int, *reasons: str, **arguments: Any) -> None:
    """The store gives ``n`` tokens of a document and says why no more; the answer is right, and it is whole again."""
    documents = DocumentStore(folder, min_tokens=100)
    wanted = answer(load(model, **arguments), DOCUMENT)
    llm = load(model, documents, **arguments)
    assert answer(llm, DOCUMENT) == wanted
    report = llm.documents.report
    assert report.n_restored == n
    assert len(report.problems) == len(reasons)
    for reason, problem in zip(reasons, report.problems, strict=True):
        assert reason in problem
    llm.close()
    llm = load(model, documents, **arguments)
    answer(llm, DOCUMENT)
    assert (llm.documents.report.n_restored, llm.documents.report.problems) == (N_DOCUMENT - 1, [])


def in_order(folder: Path) -> list[Path]:
    """The files of a prompt."""
    by_parent = {path.name.split("-")[0]: path for path in files(folder, "rows")}
    res, parent = [], next(path.name for path in folder.iterdir())
    while parent in by_parent:
        res.append(by_parent[parent])
        parent = res[-1].stem.split("-")[1]
    return res


@pytest.mark.check
@pytest.mark.parametrize("no", [0, 1, 2])
@pytest.mark.parametrize("how", ["cut", "longer", "data", "header", "tokens", "empty", "no number"])
def test_damaged_files(model: Path, tmp_path: Path, no: int, how: str) -> None:
    fill(model, tmp_path)
    path = in_order(tmp_path)[no]
    content = bytearray(path.read_bytes())
    at = {
        "data": len(content) // 2,
        "header": 100,
        "tokens": content.index(b"}", content.index(b'"layout"')) + 20,
        "no number": 0,
    }
    if how in at:
        content[at[how]] ^= 4
    changed = {"cut": content[:-1], "longer": content + b"\0", "empty": b""}.get(how, content)
    path.write_bytes(changed)
    refused(model, tmp_path, no * N_BLOCK if no else 0, "damaged")


def test_files_cut_anywhere(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path)
    path = in_order(tmp_path)[0]
    content = path.read_bytes()
    with block_file.BlockReader(path) as reader:
        layout = state_layout.Layout.from_dict(reader.block.header["layout"])
        start = len(content) - 4 - reader.block.n_bytes
    sizes = [0, 1, 7, 8, 11, 12, 13, start - 1, start, len(content) - 4, len(content) - 1]
    sizes += [start + size for size in itertools.accumulate(n * N_BLOCK for n in layout.row_sizes)]
    for size in sizes:
        path.write_bytes(content[:size])
        with pytest.raises(block_file.BlockError, match="damaged"), block_file.BlockReader(path) as reader:
            reader.read([np.empty(reader.block.n_bytes, np.uint8)])


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path, data = tmp_path / "file", np.arange(40, dtype=np.uint8)
    block_file.write_block(path, {"a": 1}, [1, 2, 3], [data])
    content = path.read_bytes()
    for i in range(8 * len(content)):
        changed = bytearray(content)
        changed[i // 8] ^= 1 << i % 8
        path.write_bytes(changed)
        with pytest.raises(block_file.BlockError), block_file.BlockReader(path) as reader:
            reader.read([np.empty(reader.block.n_bytes, np.uint8)])


@pytest.mark.parametrize("arch", ["gemma3", "lfm2"])
def test_a_damaged_tail(models, arch: str, tmp_path: Path) -> None:
    fill(models(arch), tmp_path)
    for path in files(tmp_path, "tail"):
        with block_file.BlockReader(path) as reader:
            is_last = len(reader.block.tokens) == (N_DOCUMENT - 1) % N_BLOCK
        if is_last:
            path.write_bytes(path.read_bytes()[:-100])
    llm = load(models(arch), tmp_path)
    answer(llm, DOCUMENT)
    assert llm.documents.report.n_restored == 576  # the tail before
    assert "damaged" in llm.documents.report.problems[0]


def test_an_older_format_and_library(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stored_states, "LLAMA_COMMIT", "0123456789")
        fill(model, tmp_path)
    refused(model, tmp_path, 0, *3 * ["is of llama.cpp 0123456789, expected"])
    path = in_order(tmp_path)[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(block_file.MAGIC, block_file.MAGIC[:-1] + b"\0"))
    refused(model, tmp_path, 0, "is of version 0 of its format, expected 1")


def test_files_of_another_model(model: Path, tmp_path: Path) -> None:
    """Which have another name, unless somebody renames them."""
    other = make_model(tmp_path / "other.gguf", "llama", Shape(n_layer=4), seed=1)
    fill(other, tmp_path / "store")
    llm = load(model, tmp_path / "store")
    answer(llm, DOCUMENT)
    assert (llm.documents.report.n_restored, llm.documents.report.problems) == (0, [])
    llm.close()
    theirs, ours = in_order(tmp_path / "store"), {path.name: path for path in files(tmp_path / "store")}
    assert len(theirs) == 3
    assert len(ours) == 6
    keys = {path.parent for path in ours.values()}
    (own,) = [
        path for path in ours.values() if path.parent != theirs[0].parent and path.name.startswith(path.parent.name)
    ]
    assert len(keys) == 2
    own.write_bytes(theirs[0].read_bytes())
    refused(model, tmp_path / "store", 0, "is of another model, or made in another way: model")


def test_files_of_other_tokens(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path)
    first, second, _ = in_order(tmp_path)
    second.write_bytes(first.read_bytes())
    refused(model, tmp_path, N_BLOCK, "is of other tokens than its name says")


@pytest.mark.parametrize(
    "arguments",
    [
        {"type_k": 8},
        {"rope_freq_base": 20000.0},
        {"rope_freq_scale": 0.5},
        {"kv_overrides": {"llama.rope.freq_base": 5000.0}},
    ],
    ids=str,
)
def test_what_keys_depend_on(model: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    fill(model, tmp_path)
    llm = load(model, tmp_path, **arguments)
    wanted = answer(load(model, **arguments), DOCUMENT)
    assert answer(llm, DOCUMENT) == wanted
    assert llm.documents.report.n_restored == 0


def test_prompts_read_by_blocks_are_others(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path)
    llm = load(model, tmp_path)
    for prompt_mass, n_restored in ((900, 0), (1000, N_DOCUMENT - 1), (900, N_DOCUMENT - 1), (950, 0)):
        llm.fasa.configure(prompt_mass=prompt_mass)
        llm.reset()
        sequence.clear(llm.ctx)
        answer(llm, DOCUMENT, 1)
        assert llm.documents.report.n_restored == n_restored


def test_a_shifted_context_stores_what_it_has_read(model: Path, tmp_path: Path) -> None:
    """And nothing that moved up, which has seen tokens that have left."""
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT, 1)
    assert llm.remove(300, 400)
    shifted = DOCUMENT[:300] + DOCUMENT[400:]
    answer(llm, shifted + TEXTS[1][:500], 1)
    assert llm.documents.report.n_held == N_DOCUMENT - 100
    assert llm.documents.report.problems == []
    llm.close()
    llm = load(model, tmp_path)
    answer(llm, shifted, 1)
    assert llm.documents.report.n_restored == 300


def test_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasa_edge.runtime import identity

    monkeypatch.setattr(identity, "_N_START", 1000)
    path = tmp_path / "weights"
    content = np.random.default_rng(0).bytes(10_000_000)
    path.write_bytes(content)
    prints = {identity.fingerprint(path)}
    for changed in (content[:-1], content + b"\0", b"\0" + content[1:], content[:-1] + b"\0", content[::-1]):
        path.write_bytes(changed)
        prints.add(identity.fingerprint(path))
    assert len(prints) == 6


def test_a_profile_and_an_adapter_tell_models_apart(model: Path, tmp_path: Path) -> None:
    from fasa_edge.runtime.identity import identity

    llm = load(model)
    plain = identity(llm)
    assert identity(llm, model)["profile"] != plain["profile"]
    llm.lora_path, llm.lora_scale = str(model), 0.5
    assert identity(llm)["lora"] != plain["lora"]


def test_a_context_that_is_too_small(model: Path, tmp_path: Path) -> None:
    """Takes as much of a longer document as it has room for."""
    fill(model, tmp_path)
    llm = load(model, tmp_path, n_ctx=512)
    answer(llm, DOCUMENT[:400] + QUESTION, 1)
    assert llm.documents.report.n_restored == 400


def test_memory_that_does_not_suffice(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasa_edge.runtime import memory

    fill(model, tmp_path)
    llm = load(model, tmp_path)
    monkeypatch.setattr(memory, "available", lambda: memory.Available(1000, "the machine's memory"))
    answer(llm, DOCUMENT + TEXTS[1][:600])
    read, stored = llm.documents.report.problems
    assert "1000 are left of the machine's memory: they are read anew" in read
    assert "1000 are left of the machine's memory: nothing is stored" in stored


def test_a_state_that_the_library_refuses(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answer(load(model), DOCUMENT)
    fill(model, tmp_path)
    llm = load(model, tmp_path)
    read = stored_states.StoredStates.read
    monkeypatch.setattr(stored_states.StoredStates, "read", lambda *arguments: read(*arguments)[:-1])
    assert answer(llm, DOCUMENT) == wanted
    assert "cannot restore" in llm.documents.report.problems[0]


def test_memory_of_an_unknown_kind(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_layout, "parse", lambda *arguments: None)
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT)
    assert "a kind whose rows are not known" in llm.documents.report.problems[0]


# Writing


def write_documents(model: Path, folder: Path) -> subprocess.Popen:
    """Another process that stores prompts for ever."""
    code = """
import itertools, sys
import fasa_edge
llm = fasa_edge.Llama(sys.argv[1], n_ctx=1024, verbose=False, cache=sys.argv[2])
document = list(map(int, sys.argv[3].split()))
for i in itertools.count():
    next(llm.generate([*document[: 300 + i % 7], *document[: i % 3], *document[:300]], temp=0.0))
    print(i, flush=True)
"""
    arguments = [sys.executable, "-c", code, str(model), str(folder), " ".join(map(str, DOCUMENT))]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_two_writers_of_whom_one_is_killed(model: Path, tmp_path: Path) -> None:
    writers = [write_documents(model, tmp_path) for _ in range(2)]
    try:
        for _ in range(3):
            for writer in writers:
                assert writer.stdout.readline()
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert writers[1].stdout.readline()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    assert files(tmp_path)
    for path in files(tmp_path):
        with block_file.BlockReader(path) as reader:
            reader.read([np.empty(reader.block.n_bytes, np.uint8)])
    fill(model, tmp_path)  # removes what they have left
    assert {path.suffix for path in tmp_path.rglob("*") if not path.is_dir()} == {".rows"}
    assert not list(tmp_path.glob("*/.*"))


def test_an_interrupted_write(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, n_writes = stored_states.write_block, itertools.count()

    def interrupted(path: Path, *arguments: Any) -> int:
        if next(n_writes) == 1:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        return write(path, *arguments)

    monkeypatch.setattr(stored_states, "write_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(load(model, tmp_path), DOCUMENT)
    assert [path.suffix for path in tmp_path.rglob("*") if not path.is_dir()] == [".rows"]
    refused(model, tmp_path, N_BLOCK)


def full(monkeypatch: pytest.MonkeyPatch, n_bytes: int, number: int = errno.ENOSPC) -> None:
    """Let all files of the store have so many bytes together."""
    write = stored_states.write_block

    def fails(path: Path, *arguments: Any) -> int:
        size = write(path, *arguments)
        if sum(file.stat().st_size for file in path.parents[2].rglob("*") if file.is_file()) > n_bytes:
            raise OSError(number, os.strerror(number))
        return size

    monkeypatch.setattr(stored_states, "write_block", fails)


def test_a_full_disk_has_room_for_what_was_not_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(model, tmp_path / "store", TEXTS[1][:700])
    size = DocumentStore(tmp_path / "store").size
    full(monkeypatch, size + size // 2)
    fill(model, tmp_path / "store")
    llm = load(model, tmp_path / "store")
    answer(llm, DOCUMENT)
    assert llm.documents.report.n_restored == N_DOCUMENT - 1


def test_a_disk_full_of_other_things(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answer(load(model), DOCUMENT)
    with monkeypatch.context() as patch:
        full(patch, 0)
        llm = load(model, tmp_path)
        assert answer(llm, DOCUMENT) == wanted
        assert os.strerror(errno.ENOSPC) in llm.documents.report.problems[0]
        assert not files(tmp_path)
        # nothing is removed in vain where it is a file's size that is limited
        patch.undo()
        fill(model, tmp_path, TEXTS[1][:700])
        full(patch, 0, errno.EFBIG)
        answer(llm, TEXTS[2][:700])
        assert os.strerror(errno.EFBIG) in llm.documents.report.problems[0]
    assert len(files(tmp_path)) == 3


def test_a_limit_on_the_size_of_files(model: Path, tmp_path: Path) -> None:
    import resource

    llm = load(model, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        tokens = answer(llm, DOCUMENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(tokens) == 8
    assert os.strerror(errno.EFBIG) in llm.documents.report.problems[0]
    assert not files(tmp_path)


def test_a_folder_that_may_not_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But read, by root, too, if the whole file system is read-only."""

    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    fill(model, tmp_path)
    for name in ("tempfile.mkdtemp", "os.unlink", "os.utime"):
        monkeypatch.setattr(name, refuse)
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT + TEXTS[1][:300])
    assert llm.documents.report.n_restored == N_DOCUMENT
    assert os.strerror(errno.EROFS) in llm.documents.report.problems[0]


def test_folders_that_cannot_be(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(FasaError, match="cannot be made"):
            load(model, path)
    for name in ("capacity_bytes", "min_tokens"):
        with pytest.raises(FasaError, match=f"{name} = 0: choose 1 or more"):
            DocumentStore(tmp_path, **{name: 0})


# Room


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


def test_a_prompt_larger_than_the_store(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path, TEXTS[1][:300])
    n_files = len(files(tmp_path))
    llm = load(model, DocumentStore(tmp_path, capacity_bytes=1_000_000))
    answer(llm, DOCUMENT)
    assert "exceed the 1000000 of" in llm.documents.report.problems[0]
    assert len(files(tmp_path)) == n_files


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


# States


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
    llm.documents._store(np.array(DOCUMENT, np.int32), llm.documents._store_rows)
    assert llm.documents.report.problems == []
    assert {path.name: path.read_bytes() for path in files(tmp_path)} == contents
    llm = load(model, tmp_path)
    assert answer(llm, DOCUMENT) == wanted


def test_positions_that_are_not_those_of_a_text(model: Path, tmp_path: Path) -> None:
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT)
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 10, 20)
    llm.documents._n_stored = 0
    llm.documents._store(llm._input_ids, llm.documents._store_rows)
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
    cache.store, cache._has_tail, cache._n_rows = DocumentStore(tmp_path), True, 5000
    assert cache._stops(0, 6000) == [1856, 5000, 5440, 5888, 5999]
    assert cache._stops(5888, 6000) == [5999]
    assert cache._parting(4960, 6000) == [5000]
    assert cache._parting(4990, 6000) == []
    cache._has_tail = False
    assert (cache._stops(0, 6000), cache._parting(0, 6000)) == ([5999], [])
