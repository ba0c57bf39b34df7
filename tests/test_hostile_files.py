"""Files that would hang a command, end it with a core dump, fill the memory or speak to the terminal."""

from __future__ import annotations

import os
import struct
import sys
import tracemalloc
from pathlib import Path

from fasa_edge.cli.common import printable
from fasa_edge.convert import inspect
from fasa_edge.errors import ConvertError, ModelError, SchemaError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.runtime import child
from fasa_edge.runtime.trial import try_model
from fasa_edge.schema import GGUFValueType as T

import pytest
from test_architectures import CASES
from test_cli import fasa
from test_convert_splice import array, gguf_bytes, header_of, pair, string
from tiny_models import Shape, make_model
from tiny_recipes import RECIPES
from unchecked import convert

COMMANDS = {"convert": (), "run": ("-p", "x"), "chat": (), "bench": (), "eval": ()}


@pytest.mark.check
@pytest.mark.parametrize("command", [*COMMANDS, "inspect"])
def test_a_pipe_is_refused(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    args = (tmp_path / "fifo.gguf", *COMMANDS.get(command, ()))
    result = fasa(command, *args, code=1 if command in ("convert", "inspect") else 2)
    assert "is a pipe, a device or the like" in result.stderr


@pytest.mark.check
@pytest.mark.parametrize("command", COMMANDS)
def test_what_crashes_llama_cpp_is_refused(tmp_path: Path, command: str) -> None:
    """A token that stands twice fails an assertion of llama-vocab.cpp."""
    model = make_model(tmp_path / "tiny.gguf")
    data = model.read_bytes()
    assert data.count(b"<0x41>") == 1
    model.write_bytes(data.replace(b"<0x41>", b"<0x42>"))
    error = fasa(command, model, *COMMANDS[command], code=1).stderr
    assert error.startswith("Error: ") and "tiny.gguf is refused by llama.cpp" in error
    assert "SIGABRT" in error and "llama-vocab.cpp:" in error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_metadata_of_which_no_graph_can_be_made_are_refused(tmp_path: Path) -> None:
    """The model loads, but this architecture needs more layers than it says to have."""
    with pytest.raises(ModelError, match=r"SIGABRT on it, saying .*llama-model\.cpp:\d+: GGML_ASSERT"):
        try_model(make_model(tmp_path / "model.gguf", "gemma4", Shape(n_layer=2)))


# Besides those that test_architectures.py converts: each conversion begins with the trial.
@pytest.mark.parametrize("arch", sorted({*RECIPES} - {case.arch for case in CASES}))
def test_whole_models_pass_the_trial(tmp_path: Path, arch: str) -> None:
    try_model(make_model(tmp_path / "model.gguf", arch, Shape(n_layer=4)))


def test_the_trial_leaves_other_errors_to_the_loader(tmp_path: Path, model_path: Path) -> None:
    try_model(model_path)
    try_model(tmp_path / "missing.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    try_model(tmp_path / "x.gguf")


def test_a_crash_names_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    monkeypatch.setattr(child, "python", lambda *_: crash)
    with pytest.raises(ModelError, match=r"m\.gguf is refused by llama\.cpp, which ends with SIGSEGV on it: the file"):
        try_model(tmp_path / "m.gguf")


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny.gguf", general__name="T\x1bc\x07")
    data, text = model.read_bytes(), tmp_path / "a\x1b[31m.txt"
    text.write_text("word " * 400)
    result = fasa("convert", model, "--text", text, "--tokens", 512, "--no-check")
    results = [result, fasa("inspect", tmp_path / "tiny-fasa.gguf")]
    assert "T\\x1bc\\x07" in results[1].stdout and "a\\x1b[31m.txt" in results[1].stdout
    model.write_bytes(data.replace(b"llama", b"l\x1b[31", 1))
    results.append(fasa("run", model, "-p", "x", code=1))
    results.append(fasa("convert", model, "-o", tmp_path / "x.gguf", code=1))
    assert "l\\x1b[31" in results[-1].stderr
    for result in results:
        assert "\x1b" not in result.output and "\x07" not in result.output


def test_printable() -> None:
    assert printable("a\tb\nc é 世 \x1b[0m\r\x9b\u202e") == "a\tb\nc é 世 \\x1b[0m\\r\\x9b\\u202e"


def peak(path: Path) -> int:
    """Bytes of memory that reading a header takes at most."""
    tracemalloc.start()
    try:
        read_header(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        gguf_bytes([pair(b"texts", T.ARRAY, array(T.STRING, 200_000, bytes(8 * 200_000)))]),
        header_of(60_000, 0, 60_000 * (string(b"") + struct.pack("<IIQ", 0, 0, 0)) + bytes(64)),
    ],
    ids=["texts", "tensors"],
)
def test_a_header_takes_little_more_memory_than_its_size(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(data)
    assert peak(path) < 4 * len(data)


def test_there_is_a_limit_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.gguf"
    path.write_bytes(header_of(0, 70_000, b"".join(pair(b"%05d" % i, T.BOOL, b"\1") for i in range(70_000))))
    with pytest.raises(ConvertError, match="a header of 70000 keys, at most 65536"):
        read_header(path)


def test_a_long_array_in_place_of_a_text_is_not_decoded(tmp_path: Path) -> None:
    path, texts = tmp_path / "long.gguf", array(T.STRING, 100_000, 100_000 * string(b"x"))
    path.write_bytes(gguf_bytes([pair(b"general.name", T.ARRAY, texts)]))
    with pytest.raises(ConvertError, match=r"general\.name = an array of 100000 is not a string"):
        inspect(path)
    profile = convert(make_model(tmp_path / "tiny.gguf"), profile=tmp_path / "p.gguf", tokens=512).profile_path
    entries = read_header(profile).entries
    entries = [e.raw for key, e in entries.items() if key != "fasa.calibration.text"]
    entries.append(pair(b"fasa.calibration.text", T.ARRAY, texts))
    path.write_bytes(header_of(0, len(entries), b"".join(entries)))
    with pytest.raises(SchemaError, match=r"fasa\.calibration\.text = \[\] has type list: expected string"):
        inspect(path)
