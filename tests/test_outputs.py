"""Outputs: never over what another wrote meanwhile or over an input, and no leftovers of runs that were ended."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from fasa_edge.errors import ConvertError
from fasa_edge.io import output
from fasa_edge.io.output import check_outputs, refuse_inputs, staged

import pytest
from test_cli import fasa
from tiny_models import make_model
from unchecked import convert


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Two at once


@pytest.mark.check
@pytest.mark.parametrize("links", [True, False])
def test_what_somebody_else_wrote_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def no_link(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_link)
    profile, copy = tmp_path / "profile.gguf", tmp_path / "copy.gguf"
    with pytest.raises(ConvertError, match=r"copy\.gguf exists: .*--force"), staged([profile, copy], 3) as temporaries:
        for temporary in temporaries:
            temporary.write_bytes(b"ours")
        copy.write_bytes(b"theirs")
    assert names(tmp_path) == ["copy.gguf"] and copy.read_bytes() == b"theirs"
    with staged([profile, copy], 3, force=True) as temporaries:
        for temporary in temporaries:
            temporary.write_bytes(b"ours")
    assert names(tmp_path) == ["copy.gguf", "profile.gguf"] and copy.read_bytes() == b"ours"
    with staged([tmp_path / "new"], 3) as (temporary,):
        temporary.write_bytes(b"ours")
    assert (tmp_path / "new").read_bytes() == b"ours"


@pytest.mark.parametrize("kind", ["out", "profile"])
def test_the_second_of_two_converters_is_refused(tmp_path: Path, kind: str) -> None:
    model, out = make_model(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"

    def other_is_faster(stage: str, done: int, total: int) -> None:
        if stage == "rank" and not out.exists():
            convert(model, tokens=512, **{kind: out})

    with pytest.raises(ConvertError, match=r"out\.gguf exists"):
        convert(model, tokens=512, n_tip=3, progress=other_is_faster, **{kind: out})
    assert names(tmp_path) == ["out.gguf", "tiny.gguf"]


def test_a_plot_replaces_nothing_that_came_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = tmp_path / "plot.png"
    monkeypatch.setattr(output, "fill", lambda temporary, *_: (temporary.write_bytes(b"x"), png.write_bytes(b"theirs")))
    with pytest.raises(ConvertError, match="exists"):
        output.write_bytes(png, [], b"ours")
    assert png.read_bytes() == b"theirs" and names(tmp_path) == ["plot.png"]


# Ended runs

HANG = """
import ctypes, os, signal, sys, time
from pathlib import Path
from fasa_edge.cli import main
from fasa_edge.io.output import staged
from fasa_edge.io.temporary import work_folder

@main.command("hang")
def hang():
    with staged([Path(sys.argv[1])], 1) as (temporary,), work_folder("model", Path(sys.argv[1]).parent):
        temporary.write_bytes(b"as large as the model")
        print("ready", flush=True)
        if len(sys.argv) > 2:
            ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), int(sys.argv[2])))()  # as llama.cpp's log is called
        time.sleep(60)

main(["hang"])
"""


def hang(out: Path, *args: object, **kwargs: object) -> subprocess.Popen:
    argv = [sys.executable, "-c", HANG, out, *map(str, args)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=out.parent.parent, **kwargs)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("in_callback", [False, True])
def test_signals_leave_nothing_behind(tmp_path: Path, number: int, in_callback: bool) -> None:
    heeded = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  shells let what runs in the background ignore some
    with hang(tmp_path / "out.gguf", *([int(number)] if in_callback else []), preexec_fn=heeded) as process:
        if not in_callback:
            assert len(names(tmp_path)) == 2
            process.send_signal(number)
        assert process.wait() == -number
    assert names(tmp_path) == []


def test_nohup_is_heeded(tmp_path: Path) -> None:
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with hang(tmp_path / "out.gguf", preexec_fn=ignored) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


@pytest.mark.check
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with hang(out) as process:
        before = names(tmp_path)
        assert len(before) == 2 and before[1].startswith(".out.gguf.")
        check_outputs([out])
        assert names(tmp_path) == before  # the process lives
        process.kill()
    assert names(tmp_path) == before
    check_outputs([tmp_path / "out.gguf.other", tmp_path / "out"])
    assert names(tmp_path) == before  # of another output
    check_outputs([out])
    assert names(tmp_path) == before[:1]


# Known at once


def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = make_model(tmp_path / "tiny.gguf"), tmp_path / "folder"
    folder.mkdir()
    mkdtemp = tempfile.mkdtemp

    def refuse(dir: Path, **kwargs: str) -> str:
        if dir == folder:
            raise OSError(errno.EROFS, "Read-only file system")
        return mkdtemp(dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    stages: list[str] = []
    for kind in ("out", "profile"):
        with pytest.raises(ConvertError, match=r"x\.gguf cannot be written: Read-only file system"):
            convert(model, **{kind: folder / "x.gguf"}, progress=lambda stage, *_: stages.append(stage))
    assert not stages
    error = fasa("bench", model, "--plot", folder / "x.png", code=1).stderr
    assert "x.png cannot be written: Read-only file system" in error


def test_no_output_is_an_input(tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "tiny.gguf"), tmp_path / "book.txt"
    text.write_text("word " * 400)
    (tmp_path / "link.txt").symlink_to(text)
    os.link(text, tmp_path / "hard.txt")
    for name in ("book.txt", "link.txt", "hard.txt"):
        for kind in ("out", "profile"):
            with pytest.raises(ConvertError, match=rf"{name} cannot be written: it is the input .*book\.txt itself"):
                convert(model, text=text, force=True, **{kind: tmp_path / name})
    before = model.read_bytes()
    profile = convert(model, profile=tmp_path / "profile.gguf", tokens=512).profile_path
    with pytest.raises(ConvertError, match="is the input"):
        refuse_inputs(text, [model, text])
    for command, path in (("bench", model), ("bench", profile), ("eval", model), ("eval", text), ("inspect", profile)):
        args = [profile] if command == "inspect" else [model, "--profile", profile]
        args += ["--text", text] if command == "eval" else []
        assert "is the input" in fasa(command, *args, "--plot", path, "--force", code=1).stderr
    args = ("eval", model, "--profile", profile, "--text", text)
    for path in (model, profile, text):
        assert "is the input" in fasa(*args, "--resume", path, code=1).stderr
    assert "is the input" in fasa(*args, "--plot", tmp_path / "x", "--resume", tmp_path / "x", code=1).stderr
    assert model.read_bytes() == before and text.read_text() == "word " * 400


def test_a_link_to_nowhere_exists(tmp_path: Path) -> None:
    model, link = make_model(tmp_path / "tiny.gguf"), tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "target.gguf")
    with pytest.raises(ConvertError, match=r"exists as a link to .*target\.gguf, where nothing is: .*--force"):
        convert(model, link, tokens=512)
    assert convert(model, link, tokens=512, force=True).path == link
    assert link.is_symlink() and names(tmp_path) == ["link.gguf", "target.gguf", "tiny.gguf"]
    link.unlink()
    link.symlink_to(tmp_path / "missing" / "target.gguf")
    with pytest.raises(ConvertError, match="missing is not a folder; create it first"):
        convert(model, link, tokens=512, force=True)


def test_results_are_a_file(tmp_path: Path) -> None:
    from fasa_edge.errors import FasaError
    from fasa_edge.eval.results import Results

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FasaError, match="fifo is a folder, a device or the like"):
        Results(tmp_path / "fifo")
