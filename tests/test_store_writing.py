"""The document store: writing that is interrupted, fails, or is done by several processes at once."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fasa_edge import DocumentStore, FasaError
from fasa_edge.io import block_file
from fasa_edge.runtime import context_states, state_layout, stored_states
from fasa_edge.runtime.stored_states import N_BLOCK

import numpy as np
import pytest
from documents import DOCUMENT, N_DOCUMENT, answer, files, fill, first_logits, in_order, interrupt, load, refused
from runtime import TEXTS, check
from tiny_models import make_model


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


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store what was read after each batch."""
    monkeypatch.setattr(context_states, "_SECONDS", 0)
    monkeypatch.setattr(context_states, "_SHARE", 0)


BATCHES = {"n_batch": 128}
N_BROKEN = 384


def read_on(model: Path, folder: Path, n_restored: int, tolerance: float, **arguments: Any) -> None:
    """Another start reads only the rest, and has the logits that it would have had."""
    arguments = BATCHES | arguments
    fill(model, folder.with_name("whole"), **arguments)
    wanted = first_logits(load(model, folder.with_name("whole"), **arguments), DOCUMENT)
    reads: list[tuple[int, int]] = []
    llm = load(model, folder, progress=lambda *step: reads.append(step), **arguments)
    found = first_logits(llm, DOCUMENT)
    assert (llm.documents.report.n_restored, llm.documents.report.problems) == (n_restored, [])
    assert reads[0] == (0, N_DOCUMENT - n_restored)
    check(wanted, found, tolerance)
    llm.close()
    # and what is stored is what would have been, but for a tail where it ended
    names, wanted_names = ({path.name for path in files(path)} for path in (folder, folder.with_name("whole")))
    assert wanted_names <= names
    assert len(names - wanted_names) <= (n_restored > 0)


@pytest.mark.check
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
def test_a_reading_that_ends_early_goes_on(models, arch: str, error: type[BaseException], tmp_path: Path) -> None:
    def end(done: int, total: int) -> None:
        if done >= N_BROKEN:
            raise error

    llm = load(models(arch), tmp_path / "store", progress=end, **BATCHES)
    with pytest.raises(error):
        answer(llm, DOCUMENT)
    if error is RuntimeError:  # the same process goes on from memory
        llm.progress = None
        answer(llm, DOCUMENT, 1)
        assert llm.documents.report.n_held == N_BROKEN
        return
    llm.close()
    names = {path.name for path in files(tmp_path / "store", "tail")}
    read_on(models(arch), tmp_path / "store", N_BROKEN, 2e-3 if arch == "gemma3" else 0)
    assert names <= {path.name for path in files(tmp_path / "store", "tail")}


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma3 without swa_full", "lfm2", "mamba"])
def test_a_reading_that_ends_while_a_batch_is_decoded_goes_on(
    models, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After that batch."""
    arch, _, small = arch.partition(" ")
    arguments = {"swa_full": not small}
    model = make_model(tmp_path / "mamba.gguf", "mamba") if arch == "mamba" else models(arch)
    llm = load(model, tmp_path / "store", **BATCHES, **arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, N_BROKEN // 128)
        answer(llm, DOCUMENT)
    assert llm._input_ids.tolist() == DOCUMENT[:N_BROKEN]
    llm.close()
    read_on(model, tmp_path / "store", N_BROKEN, 2e-3 if arch == "gemma3" else 1e-6, **arguments)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma3 without swa_full", "lfm2"])
def test_what_is_lost_of_a_batch_that_fails_is_read_again(
    models, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of their own size may have been overwritten, though llama.cpp goes back to where they were."""
    arch, _, small = arch.partition(" ")
    arguments = {"swa_full": not small, "n_batch": 256, "n_ubatch": 128}
    documents = DocumentStore(tmp_path, min_tokens=64)
    llm = load(models(arch), documents, **arguments)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        interrupt(patch, 2, RuntimeError)
        answer(llm, DOCUMENT)
    n = 256 if arch == "llama" else 0 if small or arch == "lfm2" else 128
    assert llm.n_tokens == n
    llm.close()
    wanted = first_logits(load(models(arch), **arguments), DOCUMENT)
    llm = load(models(arch), documents, **arguments)
    check(wanted, first_logits(llm, DOCUMENT), 2e-3 if arch == "gemma3" else 1e-4)
    assert llm.documents.report.n_restored == n


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_a_reading_that_is_killed_goes_on(models, arch: str, tmp_path: Path) -> None:
    code = f"""
import sys, time
import fasa_edge
from fasa_edge.runtime import context_states
context_states._SECONDS = context_states._SHARE = 0
def progress(done, total):
    if done >= {N_BROKEN}:
        print("there", flush=True)
        time.sleep(600)
llm = fasa_edge.Llama(sys.argv[1], n_ctx=2048, verbose=False, cache=sys.argv[2], progress=progress, n_batch=128)
next(llm.generate(list(map(int, sys.argv[3].split())), temp=0.0))
"""
    arguments = [sys.executable, "-c", code, models(arch), tmp_path / "store", " ".join(map(str, DOCUMENT))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "there\n"
        reader.kill()
    read_on(models(arch), tmp_path / "store", N_BLOCK, 0)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
def test_what_is_stored_on_the_way_leaves_nothing_behind(
    models, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(models(arch), tmp_path / "whole", **BATCHES)
    always(monkeypatch)
    read_on(models(arch), tmp_path / "store", 0, 0)


@pytest.mark.parametrize("no", range(3, 8))
def test_storing_on_the_way_that_is_interrupted_leaves_one_tail(
    models, no: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That whose rows are there, for others to go on from."""
    always(monkeypatch)
    n_stored = itertools.count(1)

    def end(stage: str, done: int, total: int) -> None:
        if stage == "storing" and next(n_stored) == no:
            raise KeyboardInterrupt

    llm = load(models("lfm2"), DocumentStore(tmp_path / "store", progress=end), **BATCHES)
    with pytest.raises(KeyboardInterrupt):
        answer(llm, DOCUMENT)
    llm.close()
    # there is a tail after 128 tokens in any case; rows and a tail come after 256, 384 and 512
    assert len(files(tmp_path / "store", "tail")) == (1 if no == 3 else 2)
    llm = load(models("lfm2"), DocumentStore(tmp_path / "store", min_tokens=1), **BATCHES)
    answer(llm, DOCUMENT, 1)
    assert llm.documents.report.n_restored == {3: 128, 4: 256, 5: 256, 6: 384, 7: 384}[no]


def test_what_cannot_be_stored_on_the_way_is_not_tried_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    n_saved = itertools.count()
    monkeypatch.setattr(state_layout, "parse", lambda *arguments: None if next(n_saved) >= 0 else ())
    llm = load(model, tmp_path, **BATCHES)
    with pytest.warns(UserWarning, match="a kind whose rows are not known"):
        answer(llm, DOCUMENT)
    assert len(llm.documents.report.problems) == 1
    assert next(n_saved) == 2  # on the way, and in the end


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


def test_a_disk_too_full_for_a_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In which files are made: there is room for it once others have left."""
    fill(model, tmp_path, TEXTS[1][:700])
    make, size = tempfile.mkdtemp, DocumentStore(tmp_path).size

    def fails(*arguments: Any, **more: Any) -> str:
        if DocumentStore(tmp_path).size >= size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(*arguments, **more)

    monkeypatch.setattr(tempfile, "mkdtemp", fails)
    fill(model, tmp_path)
    llm = load(model, tmp_path)
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
    llm.close()
    path = in_order(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-1])
    llm = load(model, tmp_path)
    answer(llm, DOCUMENT)
    assert llm.documents.report.n_restored == N_BLOCK
    assert "damaged: it has" in llm.documents.report.problems[0]
    assert "it cannot be removed, and is passed over" in llm.documents.report.problems[0]


def test_folders_that_cannot_be(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(FasaError, match="cannot be made"):
            load(model, path)
    for name in ("capacity_bytes", "min_tokens"):
        with pytest.raises(FasaError, match=f"{name} = 0: choose 1 or more"):
            DocumentStore(tmp_path, **{name: 0})
