"""What the commands read: prompts with special tokens or a byte order mark, no standard input, other encodings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fasa_edge

import pytest
from test_cli import fasa

CHATML = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def command(*args: object, closed: bool = False, **kwargs: object) -> subprocess.CompletedProcess:
    """In a process of its own, perhaps without standard input."""
    argv = [Path(sys.executable).with_name("fasa-edge"), *(a if isinstance(a, bytes) else str(a) for a in args)]
    if closed:
        argv = ["sh", "-c", 'exec "$@" <&-', "sh", *argv]
    return subprocess.run(argv, capture_output=True, check=False, **kwargs)


def test_special_tokens_of_a_prompt_count(model_path: Path, tmp_path: Path) -> None:
    llm = fasa_edge.Llama(str(model_path), n_ctx=256, vocab_only=True, verbose=False)
    n_special, n_text = (len(llm.tokenize(CHATML.encode(), special=special)) for special in (True, False))
    assert n_special < n_text
    file = tmp_path / "prompt.txt"
    file.write_text(CHATML)
    args = ("-n", 8, "-c", 256, "--json")
    for source in (("-p", CHATML), ("-f", file)):
        report = json.loads(fasa("run", model_path, *source, *args).stdout)
        assert report["prompt_tokens"] == n_special and "Paris" in report["text"]
        report = json.loads(fasa("run", model_path, *source, *args, "--no-parse-special").stdout)
        assert report["prompt_tokens"] == n_text


def test_a_byte_order_mark_is_no_prompt(model_path: Path, tmp_path: Path) -> None:
    files = [tmp_path / "plain.txt", tmp_path / "bom.txt"]
    question = b"What is the capital of France?\n"
    for file, mark in zip(files, (b"", b"\xef\xbb\xbf"), strict=True):
        file.write_bytes(mark + question)
    args = ("-n", 4, "-c", 256)
    results = [fasa("run", model_path, "-f", file, *args, "--json") for file in files]
    results.append(fasa("run", model_path, "-f", "-", *args, "--json", input=files[1].read_bytes()))
    assert len({json.loads(result.stdout)["prompt_tokens"] for result in results}) == 1
    chats = [fasa("chat", model_path, "--temp", 0, *args, input=file.read_bytes()).stdout for file in files]
    assert chats[0] == chats[1]


def test_closed_standard_input_is_named(model_path: Path) -> None:
    result = command("chat", model_path, "-c", 256, closed=True)
    assert result.returncode == 1 and b"Error: standard input is closed" in result.stderr
    result = command("run", model_path, "-f", "-", closed=True)
    assert result.returncode == 2 and b"standard input is closed" in result.stderr
    result = command("run", model_path, "-p", "The", "-n", 1, "-c", 256, closed=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_what_is_not_utf8_is_named(model_path: Path, locale: str) -> None:
    env = os.environ | {"LC_ALL": locale}
    result = command("chat", model_path, "-c", 256, "-n", 2, input=b"Hello\ncaf\xe9\n", env=env)
    assert result.returncode == 1 and result.stdout.strip()
    assert b"Error: line 2 of standard input is not UTF-8 at byte 3" in result.stderr
    result = command("run", model_path, "-c", 256, "-f", "-", input=b"caf\xe9", env=env)
    assert result.returncode == 1 and b"is not UTF-8 at byte 3" in result.stderr
    result = command("run", model_path, "-c", 256, "-p", b"caf\xe9", env=env)
    assert result.returncode == 1 and b"Error: -p is not UTF-8 at character 3" in result.stderr
    result = command("chat", model_path, "-c", 256, "--system", b"caf\xe9", input=b"Hi", env=env)
    assert result.returncode == 1 and b"Error: --system is not UTF-8 at character 3" in result.stderr


def test_utf8_is_read_whatever_the_locale(model_path: Path) -> None:
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = command("chat", model_path, "-c", 256, "-n", 2, input="Wo ist das Café?\n".encode(), env=env)
    assert result.returncode == 0, result.stderr


def test_a_name_that_is_not_utf8_is_printed(model_path: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.gguf"
    os.symlink(model_path, path)
    result = command("inspect", path, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert result.returncode == 0 and b"/caf" in result.stdout, result.stderr
