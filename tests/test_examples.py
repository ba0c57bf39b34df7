"""The examples run as their heads say, from any folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(tmp_path: Path):
    """Runs an example in a folder of its own: what it prints."""

    def run_example(name: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, input="")

    return run_example


def test_demo(run, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny.gguf")
    out = run("demo", model, "--n-prompt", 1500, "--n-predict", 4, "--budget", 64).stdout
    assert (tmp_path / "tiny-fasa.gguf").is_file()
    assert re.search(r"budget 64 of \d+ cells", " ".join(out.split()))
    assert all(re.search(rf"{name} +│ [\d.]+ s +│ [\d.]+ s", out) for name in ("stock", "FASA"))


def test_chat_document(run, fasa_model_path: Path, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("The name of the cat is Wilhelmina. " * 100)
    args = (fasa_model_path, "--document", document, "--n-ctx", 512, "--max-tokens", 16, "--budget", 128)
    done = run("chat_document", *args, "What is the name of the cat?", "Say it again.")
    assert done.stdout.count("Wilhelmina") >= 2
    assert re.search(r"document cut to \d+ of \d+ tokens", done.stderr) and done.stderr.count("of dense]") == 2
    assert run("chat_document", *args).stdout.strip() == ">"  # nobody asks


def test_plain_llama_cpp(run, fasa_model_path: Path) -> None:
    assert "Paris" in run("plain_llama_cpp", fasa_model_path, "The capital of France is").stdout
