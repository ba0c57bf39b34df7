"""Until the first token: whoever reads a prompt says how far it is, and can be interrupted."""

from __future__ import annotations

import io
import itertools
import re
from functools import partial
from pathlib import Path

import fasa_edge
from fasa_edge.bench import measure
from fasa_edge.cli import common, main
from fasa_edge.convert import convert as convert_model
from fasa_edge.eval import evaluate
from fasa_edge.runtime.library import llama_cpp

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from runtime import TEXTS, check, last_logits, nmse
from tiny_models import Shape, make_model

TOKENS = TEXTS[0][:700]
READ = [(0, 700), (256, 700), (512, 700), (700, 700)]
KINDS = {"plain": "llama", "hybrid": "lfm2", "recurrent": "mamba"}


def load(path: Path, **kwargs) -> fasa_edge.Llama:
    threads = {"n_threads": 1, "n_threads_batch": 1}
    return fasa_edge.Llama(str(path), **({"n_ctx": 1024, "n_batch": 256, "verbose": False} | threads | kwargs))


def fresh_logits(path: Path, tokens: list[int]):
    llm = load(path)
    llm.eval(tokens)
    return last_logits(llm)


@pytest.fixture(params=KINDS.values(), ids=KINDS, scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("reading") / "tiny.gguf", request.param)


# The class


@pytest.mark.check
def test_progress_is_of_what_is_read(model: Path) -> None:
    calls: list[tuple[int, int]] = []
    llm = load(model, progress=lambda *call: calls.append(call))
    text = list(itertools.islice(llm.generate(TOKENS, temp=0), 4))
    assert calls == READ and llm.sampled == text  # not of decoded tokens
    calls.clear()
    longer = [*TOKENS, *text[:3], *TEXTS[1][:20]]
    next(llm.generate(longer, temp=0))
    assert calls == [(0, 20), (20, 20)]  # what the cache holds is not read, nor by a recurrent memory
    check(fresh_logits(model, longer), last_logits(llm), 1e-5)
    calls.clear()
    llm.progress = None
    llm.reset()
    llm.eval(TOKENS)
    assert not calls


@pytest.mark.check
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_reading_that_is_broken_off_goes_on(model: Path, error: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        if done == 512:
            raise error

    llm = load(model, progress=stop)
    with pytest.raises(error):
        next(llm.generate(TOKENS, temp=0))
    assert llm.n_tokens == 512
    llm.progress = None
    next(llm.generate(TOKENS, temp=0))
    check(fresh_logits(model, TOKENS), last_logits(llm), 1e-5)


@pytest.mark.check
def test_a_batch_during_which_a_signal_comes_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoded then, and not yet counted."""
    llm = load(model)
    decode = type(llm._ctx).decode

    def interrupted(self, batch) -> None:
        decode(self, batch)
        if llm.n_tokens == 256:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(llm._ctx), "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.eval(TOKENS)
    memory = llama_cpp.llama_get_memory(llm.ctx)
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == llm.n_tokens - 1
    assert llm.n_tokens == 512
    next(llm.generate(TOKENS, temp=0))
    check(fresh_logits(model, TOKENS), last_logits(llm), 1e-5)


@pytest.mark.check
def test_remove(tmp_path: Path) -> None:
    path = make_model(tmp_path / "tiny.gguf", shape=Shape(n_layer=1))
    llm = load(path, logits_all=True)
    llm.eval(TOKENS)
    scores = llm.scores[:700].copy()
    assert llm.remove(100, 350) and llm.n_tokens == 450
    kept = [*TOKENS[:100], *TOKENS[350:]]
    assert llm.input_ids[:450].tolist() == kept and (llm.scores[100:450] == scores[350:700]).all()
    llm.eval(TEXTS[1][:1])
    check(fresh_logits(path, [*kept, TEXTS[1][0]]), last_logits(llm), 1e-5)
    assert nmse(fresh_logits(path, [*TOKENS, TEXTS[1][0]]), last_logits(llm)) > 5e-3


@pytest.mark.check
@pytest.mark.parametrize("arch", ["lfm2", "mamba", "qwen2vl"])
def test_what_cannot_remove_does_not(tmp_path: Path, arch: str) -> None:
    llm = load(make_model(tmp_path / "tiny.gguf", arch))
    llm.eval(TOKENS)
    assert not llm.remove(100, 350) and llm.n_tokens == 700
    llm.eval(TEXTS[1][:1])
    check(fresh_logits(tmp_path / "tiny.gguf", [*TOKENS, TEXTS[1][0]]), last_logits(llm), 1e-5)


# The functions and the commands


def test_functions_report_it(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    steps: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        steps.setdefault(stage, []).append((done, total))

    source = make_model(tmp_path / "plain.gguf")
    convert_model(source, tmp_path / "fasa.gguf", tokens=512, n_threads=1, progress=progress)
    assert steps["reading"][-1] == (2048 - 512, 2048 - 512)  # of the check; what was calibrated on is not read again
    steps.clear()
    few = {"prefixes": [700], "n_blocks": 1, "n_tokens": 8, "budgets": [64], "n_threads": 1}
    evaluate(tmp_path / "fasa.gguf", **few, progress=progress)
    assert steps["reading"] == [(0, 700), (512, 700), (700, 700)]
    steps.clear()
    few = {"depths": [100, 600], "n_gen": 1, "n_repetitions": 1, "n_threads": 1, "fasa_min_ctx": 1, "fasa_budget": 40}
    measure(tmp_path / "fasa.gguf", **few, read_progress=partial(progress, "reading"))
    assert steps["reading"] == 3 * [(0, 100), (100, 100)] + 3 * [(0, 500), (500, 500)]  # stock twice, and ours
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain") / "plain.gguf")


def fasa(*args: object, code: int = 0, **kwargs) -> Result:
    result = CliRunner().invoke(main, list(map(str, args)), **kwargs)
    assert result.exit_code == code, result.output
    return result


def run_args(plain: Path, tmp_path: Path, command: str) -> tuple[object, ...]:
    (tmp_path / "long.txt").write_text("word " * 300)
    return (command, plain, "-c", 2048, "-t", 1, "-n", 2, "--temp", 0, "-f", tmp_path / "long.txt")


@pytest.mark.check
@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_line_now_and_then(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(common, "_LINE_AFTER", 0)
    error = fasa(*run_args(plain, tmp_path, command), input="").stderr
    found = re.findall(r"^reading (\d+) of (\d+) tokens, [\d.]+ tokens/s, \d:\d\d:\d\d left$", error, re.M)
    assert [int(done) for done, _ in found] == [512, 1024] and int(found[0][1]) > 1500
    monkeypatch.setattr(common, "_LINE_AFTER", 1e9)
    assert "reading" not in fasa(*run_args(plain, tmp_path, command), input="").stderr


@pytest.mark.check
@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_bar_on_a_terminal(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(common, "_stderr", console)
    fasa(*run_args(plain, tmp_path, command), input="")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"reading 15\d\d tokens .* 6\d% [\d.]+ tokens/s \d:\d\d:\d\d", shown)
    assert terminal.getvalue().endswith("\x1b[2K\x1b[?25h\r")  # nothing of it stays, nothing is drawn later


@pytest.mark.check
def test_interrupted_while_reading(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(common, "_stderr", Console(file=terminal, force_terminal=True, _environ={"TERM": "xterm"}))
    evaluate_batch = llama_cpp.Llama.eval
    n_more = 1

    def interrupted(self, tokens) -> None:
        nonlocal n_more
        evaluate_batch(self, tokens)
        if len(tokens) > 100 and (n_more := n_more - 1) < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp.Llama, "eval", interrupted)
    for command in ("run", "chat"):
        result = fasa(*run_args(plain, tmp_path, command), input="", code=1)
        assert result.stderr.splitlines()[-1] == "Aborted!" and result.stdout.strip() == ""
        assert terminal.getvalue().endswith("\x1b[1A\x1b[2K") and terminal.getvalue().count("\x1b[?25h") == 1
        terminal.truncate(0)
        n_more = 1
    # a question that takes long is broken off, and the chat goes on
    n_more = 0
    lines = f"{'word ' * 100}\nWhy?\n"
    result = fasa("chat", plain, "-c", 2048, "-t", 1, "-n", 2, "--temp", 0, input=lines)
    assert "to the first word" in result.stderr
