"""Checkpoints through llama.cpp's own converter; the logits of what it makes against those of transformers.

These tests need the extra `hf`: `make test-torch` runs them, plain pytest does not collect this folder.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import fasa_edge
from fasa_edge.convert import inspect
from fasa_edge.errors import ConvertError

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from hub_server import hub_server
from runtime import teacher_forced
from test_convert_source import downloads, environment_of
from unchecked import convert

FASA = Path(sys.executable).with_name("fasa-edge")
N_VOCAB = 512
TEXT = "\n".join(topics[key] for key in sorted(topics))[:100_000]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Llama with random weights and a tokenizer trained on the documentation of Python."""
    folder = tmp_path_factory.mktemp("checkpoints") / "Tiny-Llama-1.5"
    config = transformers.LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,  # attention is far from uniform
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=tokenizer,
        vocab_size=N_VOCAB,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as Llama's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def nmse(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.square(found - expected).sum() / np.square(expected).sum())


def by_command(checkpoint: Path, tmp_path: Path) -> Path:
    """With what a user may choose; as 32-bit floats."""
    command = [FASA, "convert", checkpoint, "-o", "out.gguf", "--no-check", "--outtype=f32", "--tokens=512", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["path"] == "out.gguf" and done.stderr == ""
    assert names(tmp_path) == ["out.gguf"]
    return tmp_path / "out.gguf"


def by_default(checkpoint: Path, tmp_path: Path) -> Path:
    """Beside the checkpoint; as 16-bit floats."""
    seen: list[tuple[str, int, int]] = []
    out = convert(checkpoint, tokens=512, progress=lambda *at: seen.append(at)).path
    assert out == checkpoint.with_name("Tiny-Llama-1.5-fasa.gguf") and names(out.parent) == [checkpoint.name, out.name]
    assert seen[0] == ("convert", 0, 100) and ("convert", 100, 100) in seen and seen[-1][0] == "write"
    return out


@pytest.mark.parametrize("make", [by_command, by_default])
def test_logits_are_those_of_transformers(checkpoint, tmp_path, make):
    out = make(checkpoint, tmp_path)
    llm = fasa_edge.Llama(str(out), n_ctx=512, fasa_budget=320, fasa_min_ctx=1, verbose=False)
    assert llm.fasa.available
    tokens = llm.tokenize(TEXT[:1000].encode())[:300]
    processor = sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer.model"))
    assert tokens[1:] == processor.encode(TEXT[:1000])[: len(tokens) - 1]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -11:].numpy()
    for settings in ({"enabled": False}, {"budget": 320}):  # dense, and sparse on all tokens
        assert nmse(expected, teacher_forced(llm, tokens, len(tokens) - 10, **settings)) < 1e-4
    assert llm.fasa.stats().n_layers_sparse == 10
    assert nmse(expected, teacher_forced(llm, tokens, len(tokens) - 10, budget=40)) > 1e-2  # attention does matter


def test_checkpoint_of_a_hub(checkpoint, tmp_path):
    """Downloads what the conversion reads, and names the model after the repository."""
    repo = tmp_path / "repo"
    shutil.copytree(checkpoint, repo)
    for name in ("code.py", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("not wanted")
    with hub_server() as hub:
        hub.repos["user/Nice-Llama-1.5"] = repo
        done = subprocess.run(
            [FASA, "convert", "user/Nice-Llama-1.5", "--tokens", "512", "--no-check", "--json"],
            env=environment_of(hub, tmp_path),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["path"] == "Nice-Llama-1.5-fasa.gguf"
        assert sorted(downloads(hub)) == names(checkpoint)
    assert names(tmp_path) == ["Nice-Llama-1.5-fasa.gguf", "hf", "repo"]
    assert inspect(tmp_path / "Nice-Llama-1.5-fasa.gguf").name == "Nice Llama 1.5"


def break_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "Model NoSuchModel is not supported"),
        (lambda folder: os.truncate(folder / "model.safetensors", 100_000), "mmap length is greater than file size"),
    ],
    ids=["architecture", "weights"],
)
def test_failures_say_what_the_converter_said(checkpoint, tmp_path, damage, message):
    broken = tmp_path / "in" / "broken"
    shutil.copytree(checkpoint, broken)
    damage(broken)
    before = names(broken)
    with pytest.raises(ConvertError, match=rf"(?s)cannot convert {broken} \(exit status 1\); it said:.*{message}"):
        convert(broken)
    assert names(broken.parent) == ["broken"] and names(broken) == before
