"""The document store: what is damaged, or of another model or text, is never restored, and is said."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from fasa_edge import DocumentCache, DocumentStore, FasaConfig, FasaError
from fasa_edge.io import block_file
from fasa_edge.runtime import sequence, state_layout, stored_states
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.stored_states import N_BLOCK

import numpy as np
import pytest
from documents import (
    DOCUMENT,
    N_DOCUMENT,
    QUESTION,
    answer,
    files,
    fill,
    in_order,
    load,
    refused,
)
from runtime import TEXTS, TINY_BUDGET, annotated_tiny, check, last_logits
from tiny_models import Shape, make_model
from unchecked import convert


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


def test_what_is_no_file(model: Path, tmp_path: Path) -> None:
    """A pipe would be waited for."""
    fill(model, tmp_path)
    path = in_order(tmp_path)[1]
    path.unlink()
    os.mkfifo(path)
    refused(model, tmp_path, N_BLOCK, "is no file but a pipe")


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


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
def test_an_older_format_and_library(models, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stored_states, "LLAMA_COMMIT", "0123456789")
        fill(models(arch), tmp_path)
    # tails, too, though nobody asks for one without rows
    refused(models(arch), tmp_path, 0, *len(files(tmp_path)) * ["is of llama.cpp 0123456789, expected"])
    path = in_order(tmp_path)[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(block_file.MAGIC, block_file.MAGIC[:-1] + b"\0"))
    refused(models(arch), tmp_path, 0, "is of version 0 of its format, expected 1")


def test_files_of_another_model(model: Path, tmp_path: Path) -> None:
    """Which have another name, unless somebody renames them."""
    other = make_model(tmp_path / "other.gguf", "llama", Shape(n_layer=4), seed=1)
    fill(other, tmp_path / "store")
    theirs = in_order(tmp_path / "store")
    llm = load(model, tmp_path / "store")
    answer(llm, DOCUMENT)
    assert (llm.documents.report.n_restored, llm.documents.report.problems) == (0, [])
    llm.close()
    ours = {path.name: path for path in files(tmp_path / "store")}
    assert len(theirs) == 3
    assert len(ours) == 6
    keys = {path.parent for path in ours.values()}
    assert len(keys) == 2
    mine = [path for path in ours.values() if path.parent != theirs[0].parent]
    (own,) = [path for path in mine if path.name.split("-")[0] not in {other.stem.split("-")[1] for other in mine}]
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


BY_BLOCKS = {"prompt_mass": 900, "min_ctx": 1}


@pytest.mark.parametrize(
    ("other", "is_another"),
    [
        ({"prompt_mass": 950}, True),
        ({"prompt_mass": 1000}, True),
        ({"min_ctx": 300}, True),
        ({"min_ctx": 0}, True),  # twice the budget
        ({"enabled": False}, True),
        ({"budget": 300, "n_sink": 7, "n_recent": 70, "select": "head", "max_batch": 8, "exact": True}, False),
    ],
    ids=str,
)
def test_only_what_shapes_prompts_read_by_blocks_tells_them_apart(
    model: Path, tmp_path: Path, other: dict[str, Any], is_another: bool
) -> None:
    settings = {f"fasa_{name}": value for name, value in BY_BLOCKS.items()}
    fill(model, tmp_path, **settings)
    llm = load(model, tmp_path, **settings)
    llm.fasa.configure(**other)
    answer(llm, DOCUMENT, 1)
    assert llm.documents.report.n_restored == (0 if is_another else N_DOCUMENT - 1)
    llm.close()
    if "enabled" in other or "prompt_mass" in other and other["prompt_mass"] == 1000:  # of all who read densely
        llm = load(model, tmp_path, fasa_enabled=False, fasa_prompt_mass=700)
        answer(llm, DOCUMENT, 1)
        assert llm.documents.report.n_restored == N_DOCUMENT - 1
    else:
        llm = load(model, tmp_path)
        answer(llm, DOCUMENT, 1)
        assert llm.documents.report.n_restored == 0


def test_settings_that_change_find_their_own(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path)
    llm = load(model, tmp_path, fasa_min_ctx=1)
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


def test_models_that_differ_in_their_profile_share_what_is_read_densely(model: Path, tmp_path: Path) -> None:
    """Their tips are made of K again."""
    plain, other = model.with_name("tiny.gguf"), annotated_tiny(tmp_path, "llama", n_tip=2, n_layer=4)
    wanted = []
    for path in (model, other):
        llm = load(path, fasa_budget=70)
        answer(llm, DOCUMENT[:-1], 1)
        llm.eval(DOCUMENT[-1:])
        wanted.append(last_logits(llm))
        llm.close()
    assert not np.array_equal(*wanted)  # by other chunks
    fill(plain, tmp_path / "store", DOCUMENT[:-1])
    for path, logits in zip((model, other), wanted, strict=True):
        llm = load(path, tmp_path / "store", fasa_budget=70)
        answer(llm, DOCUMENT[:-1], 1)
        assert llm.documents.report.n_restored == N_DOCUMENT - 2
        llm.eval(DOCUMENT[-1:])
        check(logits, last_logits(llm))
        llm.close()
    # but not what was read by blocks, which they choose
    settings = {f"fasa_{name}": value for name, value in BY_BLOCKS.items()}
    config = FasaConfig(budget=TINY_BUDGET, n_sink=4, n_recent=8, n_dense_layers=0, min_ctx=1)
    third = convert(plain, tmp_path / "third.gguf", tokens=600, config=config).path
    fill(model, tmp_path / "store", **settings)
    for path, n_restored in ((other, 0), (third, 0), (model, N_DOCUMENT - 1)):
        llm = load(path, tmp_path / "store", **settings)
        answer(llm, DOCUMENT, 1)
        assert llm.documents.report.n_restored == n_restored
        llm.close()


def test_profiles_are_told_apart(models) -> None:
    from fasa_edge.runtime.identity import profile_fingerprint

    assert profile_fingerprint(models("llama")) != profile_fingerprint(models("gemma3"))
    assert profile_fingerprint(models("llama")) == profile_fingerprint(models("llama"))


def test_an_adapter_tells_models_apart(model: Path) -> None:
    from fasa_edge.runtime.identity import identity

    llm = load(model)
    plain = identity(llm)
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
    with pytest.warns(UserWarning, match="a kind whose rows are not known") as warned:
        answer(llm, DOCUMENT)
        answer(llm, TEXTS[1][:600])
    assert "a kind whose rows are not known" in llm.documents.report.problems[0]
    assert len(warned) == 1


def test_transposed_values_are_refused(model: Path, tmp_path: Path) -> None:
    llm = llama_cpp.Llama(str(model), n_ctx=512, verbose=False)
    with pytest.raises(FasaError, match="without flash attention.*flash_attn=True"):
        DocumentCache(DocumentStore(tmp_path), llm)
    recurrent = make_model(tmp_path / "mamba.gguf", "mamba")
    DocumentCache(DocumentStore(tmp_path), llama_cpp.Llama(str(recurrent), n_ctx=512, verbose=False))
