"""The commands as a user types them, on the real model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fasa_edge
from fasa_edge.cli import main

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_models import make_model

PROMPT = "The capital of France is"


def fasa(*args: object, code: int = 0, **kwargs) -> Result:
    result = CliRunner().invoke(main, list(map(str, args)), **kwargs)
    assert result.exit_code == code, result.output
    return result


def test_convert_then_inspect(model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = json.loads(fasa("convert", model_path, "-o", out, "--n-tip", 10, "--tokens", 512, "--json").stdout)
    assert (report["path"], report["n_tip"]) == (str(out), 10)
    assert report["check"]["n_tip"] == 10 and report["unchecked"] is None
    assert 0 < np.mean(report["check"]["clipped"]) < 0.02
    clipped = report["calibration"]["clipped"]
    assert clipped == pytest.approx(np.mean(report["check"]["clipped"]))
    assert out.stat().st_size == report["n_bytes"]

    report = json.loads(fasa("inspect", out, "--json").stdout)
    assert report["annotated"] and report["calibration"]["tokens"] == 512
    assert report["calibration"]["clipped"] == clipped
    assert report["calibration"]["context"] == 8192 and report["tip_bytes"] == 12
    assert np.shape(report["layers"][29]["centre"]) == (3, 10, 2) and np.min(report["layers"][29]["step"]) > 0
    text = fasa("inspect", out).stdout
    assert "layer    KV head  chunks, best first" in text and "llama rope=0 0-29:9/3x64r64" in text
    assert "10, 12 bytes per cell and KV head" in text and re.search(rf"(?m)^clipped +{clipped:.2%} of", text)
    ranges = r"(?m)^ +\d+ +[012] +\d{32} +[\d.]+ +[\d.]+ \(chunk \d+\)$"
    assert len(re.findall(ranges, text)) == 90  # heads
    assert "no FASA profile: make one with" in fasa("inspect", model_path).stdout

    error = fasa("convert", model_path, "-o", out, code=1).stderr
    assert error.startswith("Error: ") and str(out) in error and "--force" in error


@pytest.mark.check
def test_profile(tmp_path: Path) -> None:
    model, profile, png = make_model(tmp_path / "tiny.gguf"), tmp_path / "profile.gguf", tmp_path / "heat.png"
    assert str(profile) in fasa("convert", model, "--profile", profile, "--tokens", 512, "--no-check").stdout
    assert not (tmp_path / "tiny-fasa.gguf").exists()
    error = fasa("convert", model, "--profile", profile, code=1).stderr
    assert error.startswith("Error: ") and str(profile) in error and "--force" in error

    text = fasa("inspect", profile, "--plot", png).stdout
    assert "a profile alone" in text and "layer    KV head  chunks, best first" in text
    assert re.search("(?m)^clipped +unknown$", text)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "heat.png exists" in fasa("inspect", profile, "--plot", png, code=1).stderr
    fasa("inspect", profile, "--plot", png, "--force")

    options = ("--profile", profile, "--override-kv", "fasa.min_ctx=int:1", "--json")
    report = json.loads(fasa("run", model, "-p", PROMPT, "-n", 4, "-c", 512, *options).stdout)
    assert report["layers_sparse"] > 0 and report["settings"]["min_ctx"] == 1
    rows = json.loads(fasa("bench", model, "-d", 100, "-n", 1, "-r", 1, *options).stdout)
    assert [row["layers_sparse"] for row in rows] == [0, 0, 0, 0.5]
    assert "does not exist" in fasa("run", model, "-p", PROMPT, "--profile", tmp_path / "none", code=2).stderr


def test_an_empty_prompt_is_refused(model_path: Path) -> None:
    assert "the prompt is empty" in fasa("run", model_path, "-p", "", "-c", 512, code=1).stderr


def test_run(fasa_model_path: Path, model_path: Path, tmp_path: Path) -> None:
    result = fasa("run", fasa_model_path, "-p", PROMPT, "-n", 8, "-c", 512)
    assert "Paris" in result.stdout
    assert "tokens/s" in result.stderr and "short_context" in result.stderr

    (tmp_path / "prompt.txt").write_text(PROMPT)
    args = ("run", fasa_model_path, "-f", tmp_path / "prompt.txt", "-n", 8, "-c", 512, "--json")
    report = json.loads(fasa(*args, "--override-kv", "fasa.min_ctx=int:1").stdout)
    assert "Paris" in report["text"] and report["layers_sparse"] > 0 and report["bytes_tips"] > 0
    report = json.loads(fasa(*args, "--dense").stdout)
    assert report["layers_sparse"] == 0 and report["settings"]["enabled"] is False

    assert "has no FASA profile" in fasa("run", model_path, "-p", PROMPT, "-n", 2, "-c", 512).stderr


@pytest.mark.check
def test_what_was_read_is_kept(tmp_path: Path) -> None:
    model, text, cache = make_model(tmp_path / "tiny.gguf"), tmp_path / "text.txt", tmp_path / "cache"
    text.write_text("It was a dark and stormy night. " * 12)
    options = ("-f", text, "-c", 1024, "-n", 4)

    first = fasa("run", model, *options, "--cache", cache)
    assert "kept, " in first.stderr and "from the cache" not in first.stderr
    second = fasa("run", model, *options, "--cache", cache)
    assert re.search(r"(\d+) of (?!\1)\d+ tokens from the cache", second.stderr) and "kept, " not in second.stderr
    assert second.stdout == first.stdout == fasa("run", model, *options).stdout
    report = json.loads(fasa("run", model, *options, "--cache", cache, "--json").stdout)
    assert report["cache"]["n_restored"] == report["cache"]["n_prompt"] - 1
    assert json.loads(fasa("run", model, *options, "--json").stdout)["cache"] is None

    for path in cache.glob("*/*.rows"):
        path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged: it has" in (third := fasa("run", model, *options, "--cache", cache)).stderr
    assert third.stdout == first.stdout

    for question, is_kept in (("Where?\n", False), ("When was that?\n", True)):
        chat = fasa("chat", model, *options, "--cache", cache, input=question)
        assert ("tokens from the cache" in chat.stderr) == is_kept

    small = fasa("run", model, *options, "--cache", tmp_path / "small", "--cache-size", 1e-5)
    assert "Warning: " in small.stderr and "raise its size" in small.stderr
    assert (
        "--cache-size has no effect with no --cache" in fasa("run", model, *options, "--cache-size", 1, code=2).stderr
    )
    assert "is a file" in fasa("run", model, *options, "--cache", text, code=2).stderr


def test_run_says_what_is_wrong(fasa_model_path: Path, tmp_path: Path) -> None:
    assert "either -p TEXT or -f FILE" in fasa("run", fasa_model_path, code=2).stderr
    assert "expected KEY=TYPE:VALUE" in fasa("run", fasa_model_path, "-p", "x", "--override-kv", "a=b", code=1).stderr
    error = fasa("run", fasa_model_path, "-p", "x", "-c", 256, "-n", 500, code=1).stderr
    assert "exceed the context of 256: generate 255 (-n 255), or" in error and "(-c 512)" in error
    error = fasa("run", fasa_model_path, "-p", "word " * 400, "-c", 256, "-n", 56, code=1).stderr
    assert "shorten the prompt to 200 tokens, or split it into 3 parts" in error and "(-c 512)" in error
    error = fasa("run", fasa_model_path, "-p", "word " * 9000, "-c", 256, "-n", 192, code=1).stderr
    assert "shorten it to 8000" in error and "-c 8192), no further" in error
    error = fasa("run", fasa_model_path, "-p", "x", "--budget", 3, code=1).stderr
    assert "do not fit into fasa.budget = 3" in error
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    assert fasa("run", tmp_path / "broken.gguf", "-p", "x", code=1).stderr.startswith("Error: Failed to load model")


def test_chat(fasa_model_path: Path, model_path: Path, tmp_path: Path) -> None:
    sparse = ("--override-kv", "fasa.min_ctx=int:1", "--budget", 64)
    args = ("chat", fasa_model_path, "-c", 1024, "-n", 24, "--temp", 0)
    questions = "What is the capital of France?\n\nWhat did I ask about?\n/exit\nWhat is left?\n"
    result = fasa(*args, *sparse, "--system", "You are a helpful assistant.", input=questions)
    answers, numbers = result.stdout.splitlines(), result.stderr.splitlines()
    assert "Paris" in answers[0] and "France" in "".join(answers[1:])  # the history was kept
    assert len(numbers) == 2 and all("tokens/s" in line and "layers sparse" in line for line in numbers)
    assert "layers sparse 0" not in numbers[0] and "layers sparse 0" in fasa(*args, "--dense", input="Hi").stderr
    assert fasa(*args, input="").stdout == ""

    (tmp_path / "document.txt").write_text("The name of the cat is Wilhelmina.")
    question = "What is the name of the cat?\n"
    document = ("-f", tmp_path / "document.txt")
    assert fasa(*args, *document, input=f"{question}/clear\n{question}").stdout.count("Wilhelmina") >= 2
    assert "has no FASA profile" in fasa("chat", model_path, "-c", 512, "-n", 1, input="Hi").stderr


def test_chat_says_what_does_not_fit(fasa_model_path: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("word " * 400)
    error = fasa("chat", fasa_model_path, "-c", 256, "-f", long, input="Hi\n", code=1).stderr
    counted, refused = error.splitlines()
    assert re.fullmatch(r".*long.txt: 40\d tokens, the context holds 256", counted)
    assert refused.startswith("Error: Requested tokens (") and "exceed context window of 256: shorten" in refused
    assert "into 3 parts" in refused and "-c 512" in refused and "trained for 8192" in refused

    lines = f"Hello\n{'word ' * 300}\n/clear\nHello\n"  # the second is refused and leaves the chat as it was
    result = fasa("chat", fasa_model_path, "-c", 256, "-n", 4, "--temp", 0, input=lines, code=1)
    first, second = result.stdout.splitlines()
    assert first == second and result.stderr.count("Error: ") == 1

    long.write_bytes(b"caf\xe9")
    assert "is not UTF-8 at byte 3" in fasa("chat", fasa_model_path, "-f", long, code=1).stderr


def test_chat_goes_on_when_its_context_is_full(fasa_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text("The name of the cat is Wilhelmina. " * 10)
    story, question = "Tell a long story about a garden.", "What is the name of the cat?"
    args = ("chat", fasa_model_path, "-c", 512, "-n", 150, "--temp", 0, "-f", tmp_path / "document.txt")
    result = fasa(*args, input=f"{story}\n{story}\n{story}\n{question}\n")
    assert "Wilhelmina" in result.stdout.splitlines()[-1] and "Error" not in result.stderr
    said = re.findall(r"\[context full: the .*oldest questions? leaves? .*, \d+ tokens; the rest .*\]", result.stderr)
    assert said and len(said) == result.stderr.count("context full")
    assert "nothing is left" in fasa("chat", fasa_model_path, "-c", 256, input="Tell a long story.\n").stderr


def test_bench(fasa_model_path: Path, model_path: Path) -> None:
    args = ("bench", fasa_model_path, "-d", "0,300", "-n", 2, "-r", 2, "--override-kv", "fasa.min_ctx=int:512")
    rows = json.loads(fasa(*args, "--json").stdout)
    assert [(row["method"], row["flash_attn"], row["n_depth"]) for row in rows] == [
        (method, flash_attn, depth)
        for depth in (0, 300)
        for method, flash_attn in (("dense", True), ("dense", False), ("exact", True), ("fasa", True))
    ]
    assert [row["layers_sparse"] > 0 for row in rows] == [False] * 7 + [True]
    assert all(len(row["samples_ts"]) == 2 and row["avg_ts"] > 0 and row["stddev_ts"] >= 0 for row in rows)
    table = fasa(*args[:3], "0", *args[4:]).stdout.splitlines()
    assert table[0].startswith("| model") and len(table) == 2 + 4

    quantized = ("-d", "0", "-n", 1, "-r", 1, "-ctk", "q8_0", "-ctv", "q4_0", "--json")
    rows = json.loads(fasa("bench", fasa_model_path, *quantized).stdout)
    assert [(row["type_k"], row["type_v"], row["flash_attn"]) for row in rows] == 3 * [("q8_0", "q4_0", True)]

    assert "has no FASA profile to measure" in fasa("bench", model_path, code=1).stderr
    assert "expected numbers separated by commas" in fasa("bench", fasa_model_path, "-d", "x", code=2).stderr


@pytest.mark.check
def test_doctor() -> None:
    report = json.loads(fasa("doctor", "--json").stdout)
    assert report["llama_commit"] == "0c1e57098" and report["fasa"] == "compiled in"
    assert Path(report["libllama"]).parent == Path(report["libggml_base"]).parent
    assert fasa_edge.__version__ in fasa("doctor").stdout


@pytest.mark.check
@pytest.mark.parametrize("command", ["convert", "inspect", "run", "chat", "bench", "eval", "doctor"])
def test_help_is_complete(command: str) -> None:
    assert "Usage:" in fasa(command, "--help").stdout


def test_a_context_that_is_no_multiple_of_256(fasa_model_path: Path) -> None:
    report = json.loads(fasa("run", fasa_model_path, "-c", 300, "-p", "word " * 320, "-n", 100, "--json").stdout)
    assert report["prompt_tokens"] + report["n_tokens"] > 300
    chat = fasa("chat", fasa_model_path, "-c", 300, "-n", 64, input="word " * 320 + "\n")
    assert "Error" not in chat.stderr
