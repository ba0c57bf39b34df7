"""The document store: what was read is restored as it was."""

from __future__ import annotations

from pathlib import Path

from fasa_edge import DocumentCache, DocumentStore
from fasa_edge.io import block_file
from fasa_edge.runtime import sequence
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.stored_states import N_BLOCK

import numpy as np
import pytest
from documents import (
    DOCUMENT,
    N_DOCUMENT,
    N_TAIL,
    OTHER,
    QUESTION,
    answer,
    files,
    fill,
    first_logits,
    load,
)
from runtime import GGML_TYPES, TEXTS, check, last_logits
from tiny_models import make_model

ARCHITECTURES = ["llama", "gemma3", "lfm2"]


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
    answer(llm, DOCUMENT)  # from memory, where that can be cut back
    report = llm.documents.report
    assert (report.n_held, report.n_restored) == ((0, N_DOCUMENT - 1) if arch == "lfm2" else (N_DOCUMENT - 1, 0))


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


def test_cells_count_in_blocks(model: Path, tmp_path: Path) -> None:
    """A layer runs sparse from so many cells on, rounded up: some tokens before that many are there."""
    documents = DocumentStore(tmp_path, min_tokens=64)
    llm = load(model, documents, fasa_min_ctx=4 * N_BLOCK)
    said = answer(llm, DOCUMENT, 100)
    assert llm.fasa.stats().n_layers_sparse == 4 * (N_DOCUMENT + 99 - 3 * N_BLOCK)
    goes_on = [*DOCUMENT, *said[:-1], *QUESTION * 20]
    answer(llm, goes_on, 1)
    llm.close()
    llm = load(model, documents)
    answer(llm, goes_on, 1)
    assert llm.documents.report.n_restored == 3 * N_BLOCK  # those before were decoded densely


def test_what_was_loaded_is_not_stored(model: Path, tmp_path: Path) -> None:
    """A saved state may have been decoded sparsely."""
    llm = load(model)
    said = answer(llm, DOCUMENT, 300)
    state = llm.save_state()
    llm.close()
    llm = load(model, tmp_path)
    llm.load_state(state)
    goes_on = [*DOCUMENT, *said[:-1], *TEXTS[1][:300]]
    answer(llm, goes_on, 1)
    assert llm.documents.report.n_held > N_DOCUMENT
    assert files(tmp_path) == []


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


@pytest.mark.parametrize(
    ("sizes", "n_dense"),
    [({}, N_DOCUMENT), ({"n_batch": 345}, 690), ({"n_batch": 520}, 512), ({"n_batch": 696, "n_ubatch": 348}, 696)],
    ids=str,
)
def test_the_class_of_the_bindings_stores_what_it_has_read_densely(
    model: Path, sizes: dict[str, int], n_dense: int, tmp_path: Path
) -> None:
    """It tells nobody what a prompt is: an answer is decoded sparsely, and so are a few tokens that a batch leaves."""
    documents = DocumentStore(tmp_path, min_tokens=64)
    llm = llama_cpp.Llama(str(model), n_ctx=2048, flash_attn=True, verbose=False, **sizes)
    llm.set_cache(DocumentCache(documents, llm))
    llm.create_completion(DOCUMENT, max_tokens=200, temperature=0.0)
    goes_on = [*llm._input_ids.tolist(), *QUESTION]
    assert len(goes_on) > N_DOCUMENT + 60
    llm.create_completion(goes_on, max_tokens=4, temperature=0.0)
    llm.close()
    llm = load(model, documents, fasa_enabled=False)
    found = first_logits(llm, goes_on)
    assert llm.documents.report.n_restored == n_dense
    check(first_logits(load(model, fasa_enabled=False), goes_on), found, 1e-4)


def test_the_class_of_the_bindings_decodes_a_short_rest(model: Path, tmp_path: Path) -> None:
    """Of a prompt of which it holds the beginning, or restores it."""
    documents = DocumentStore(tmp_path, min_tokens=1)
    fill(model, documents)
    for _ in range(2):
        llm = llama_cpp.Llama(str(model), n_ctx=2048, flash_attn=True, verbose=False)
        llm.set_cache(DocumentCache(documents, llm))
        llm.create_completion(DOCUMENT + QUESTION[:8], max_tokens=4, temperature=0.0)
        assert llm.cache.report.n_restored == N_DOCUMENT
    llm = load(model, documents)
    answer(llm, DOCUMENT + QUESTION, 1)
    assert llm.documents.report.n_restored == N_DOCUMENT


def test_a_copy_shares_the_store(model: Path, tmp_path: Path) -> None:
    import pickle

    llm = load(model, DocumentStore(tmp_path, capacity_bytes=10_000_000, min_tokens=100, progress=lambda *report: None))
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.documents.store.folder.path == tmp_path
    assert (copy.documents.store.capacity_bytes, copy.documents.store.min_tokens) == (10_000_000, 100)
    assert copy.documents is not llm.documents
