"""FASA's fields of a request, and what of them an answer says, at every endpoint of llama-server; images."""

from __future__ import annotations

import base64
import json
import struct
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_server import Server, fasa, wait_until
from server_suite.models import (
    FIM_IDS,
    IMAGES,
    INFILL,
    SHAPE,
    SPARSE,
    write_decoder,
    write_ears,
    write_encoder,
    write_mmproj,
    write_png,
)

pytestmark = pytest.mark.programs

N_PREDICT = 12
TEXT = "I believe the meaning of life is a book about rain and from the star to a bonfire, and how the fox ran. " * 2
MESSAGES = [{"role": "user", "content": TEXT}]

BODIES: dict[str, dict[str, Any]] = {
    "/completion": {"prompt": TEXT, "n_predict": N_PREDICT},
    "/v1/completions": {"prompt": TEXT, "max_tokens": N_PREDICT},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": N_PREDICT},
    "/v1/responses": {"input": TEXT, "max_output_tokens": N_PREDICT},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": N_PREDICT},
    "/infill": {"input_prefix": TEXT, "input_suffix": "and so on", "n_predict": N_PREDICT},
}
"""Of every endpoint that generates text of text. The model says no end."""

TIMED = {path for path in BODIES if path not in ("/v1/responses", "/v1/messages")}
"""Answers have timings, as upstream has them."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "model.gguf"
    write_decoder(path, INFILL, **FIM_IDS)
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server(model) as server:
        yield server


def asked(server: Server, path: str, **fields: object) -> tuple[Any, dict[str, float]]:
    """An answer, and by how much it raised FASA's counters of all requests."""
    before = server.metrics()
    answer = server.ask(path, BODIES[path] | fields)
    after = server.metrics()
    prefix = "llamacpp:fasa_"
    return answer, {name.removeprefix(prefix): after[name] - before[name] for name in after if name.startswith(prefix)}


@pytest.mark.parametrize("path", BODIES)
def test_the_fields_of_a_request_reach_its_slot(server: Server, path: str) -> None:
    (_, own), (_, wide), (_, dense) = (
        asked(server, path, **fields) for fields in ({}, {"fasa_budget": 16}, {"fasa_enabled": False})
    )
    n_layers = (N_PREDICT - 1) * SHAPE.n_layer
    assert own["layers_sparse_total"] == wide["layers_sparse_total"] == n_layers
    assert dense["layers_sparse_total"] == 0 and dense['layers_dense_total{reason="disabled"}'] >= n_layers
    read = 'read_bytes_total{of="kv"}'
    assert own[read] < wide[read] < dense[read] == dense["dense_bytes_total"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("fields", [{"fasa_budget": 2}, {"fasa_budget": "much"}, {"fasa_enabled": "no"}])
def test_what_is_refused_everywhere(server: Server, path: str, fields: dict[str, object]) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        asked(server, path, **fields)
    (name,) = fields
    assert raised.value.code == 400 and name in json.loads(raised.value.read())["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
def test_timings_where_an_answer_has_them(server: Server, path: str) -> None:
    answer, _ = asked(server, path, fasa_budget=16)
    assert ("timings" in answer) == (path in TIMED)
    if path in TIMED:
        assert fasa(answer)["n_layers_sparse"] == (N_PREDICT - 1) * SHAPE.n_layer

    stream, _ = asked(server, path, stream=True)
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    timed = [event for event in events if "timings" in event]
    assert bool(timed) == (path != "/v1/messages")
    if timed:
        assert fasa(timed[-1])["n_layers_sparse"] == (N_PREDICT - 1) * SHAPE.n_layer


def test_settings_in_force_are_said(server: Server) -> None:
    own = {"fasa_budget": SPARSE.budget, "fasa_enabled": True}
    for fields in ({}, {"fasa_budget": 16}, {"fasa_enabled": False}, {"fasa_budget": 20, "fasa_enabled": None}):
        answer, _ = asked(server, "/completion", **fields)
        wanted = own | {name: value for name, value in fields.items() if value is not None}
        assert wanted.items() <= answer["generation_settings"].items()
        assert wanted.items() <= server.ask("/slots")[0]["params"].items()
    assert own.items() <= server.ask("/props")["default_generation_settings"]["params"].items()


def test_settings_in_force_with_options(model: Path) -> None:
    with Server(model, "--fasa", "off", "--fasa-budget", 24) as server:
        answer, _ = asked(server, "/completion")
        assert {"fasa_budget": 24, "fasa_enabled": False}.items() <= answer["generation_settings"].items()


def test_metrics_have_all_series_before_the_first_step(model: Path) -> None:
    with Server(model) as server:
        before = server.metrics()
        asked(server, "/completion")
        after = server.metrics()
    mine = {name: value for name, value in before.items() if "fasa" in name}
    assert mine and not any(mine.values()) and mine.keys() == {name for name in after if "fasa" in name}


FIELDS = {"fasa_budget": "much", "fasa_enabled": "no", "nothing": "known"}
"""Fields that no endpoint takes which generates nothing."""


def test_embeddings_ignore_the_fields(model: Path) -> None:
    with Server(model, "--embeddings", "--pooling", "mean", "--batch-size", 512) as server:
        for path, body in (("/v1/embeddings", {"input": TEXT}), ("/embedding", {"content": TEXT})):
            answers = [server.ask(path, body | fields) for fields in ({}, FIELDS)]
            assert answers[0] == answers[1]


def test_reranking_ignores_the_fields(tmp_path: Path) -> None:
    write_encoder(tmp_path / "ranks.gguf", ranks=True)
    body = {"query": "machine learning", "documents": ["a machine", "paris"]}
    with Server(tmp_path / "ranks.gguf", "--rerank", "--ctx-size", 512) as server:
        answers = [server.ask("/v1/rerank", body | fields) for fields in ({}, FIELDS)]
    assert answers[0] == answers[1] and len(answers[0]["results"]) == 2


# Images


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server with eyes, and what asks it to look; the last of an image's 36 tokens is decoded by itself."""
    folder = tmp_path_factory.mktemp("images")
    model, eyes, image = folder / "model.gguf", folder / "eyes.gguf", folder / "image.png"
    write_decoder(
        model, IMAGES, arch="gemma3", tokenizer__ggml__add_space_prefix=False, tokenizer__ggml__add_bos_token=False
    )
    write_mmproj(eyes)
    write_png(image, 0)
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "text", "text": "What is"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": N_PREDICT, "cache_prompt": False}
    with Server(
        model, "--mmproj", eyes, "--batch-size", 35, "--parallel", 2, "--ctx-size", 16384, "--ctx-checkpoints", 0
    ) as server:
        yield server, body


def test_images_are_counted_as_prompts(picture: tuple[Server, dict[str, Any]]) -> None:
    server, body = picture
    before = server.metrics()
    answer = server.ask("/v1/chat/completions", body)
    found, after = fasa(answer), server.metrics()
    assert found["n_steps_prompt"] == 4  # text, two of an image, text
    assert found["n_steps_decode"] == N_PREDICT - 1 and found["n_layers_sparse"] > 0
    for kind in ("prompt", "decode"):
        name = f'llamacpp:fasa_steps_total{{kind="{kind}"}}'
        assert after[name] - before[name] == found[f"n_steps_{kind}"]


def test_images_are_read_with_the_settings_of_their_request(picture: tuple[Server, dict[str, Any]]) -> None:
    """Also where another request has others: both take turns, and the image is decoded before the batch of its turn."""
    server, body = picture
    other = {"prompt": TEXT, "n_predict": 6000}
    with ThreadPoolExecutor() as pool:
        for mine, its in ({}, {"fasa_enabled": False}), ({"fasa_enabled": False}, {}):
            long = pool.submit(server.ask, "/completion", other | its)
            wait_until(
                lambda long=long: (
                    long.done() or any(slot.get("fasa", {}).get("n_steps_decode") for slot in server.ask("/slots"))
                ),
                "it decodes",
            )
            found = fasa(server.ask("/v1/chat/completions", body | mine))
            assert not long.done()
            assert found["n_steps_prompt"] == 4 and ("disabled" in found["n_layers_dense"]) == bool(mine)
            assert (found["n_layers_sparse"] == 0) == bool(mine)
            long.result()


# Sounds


@pytest.fixture(scope="module")
def ears(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that hears; the last of a sound's 150 tokens is decoded by itself, causally."""
    path = tmp_path_factory.mktemp("sounds") / "ears.gguf"
    write_ears(path)
    with Server(model, "--mmproj", path, "--batch-size", 149) as server:
        yield server


def transcribed(server: Server, **fields: object) -> dict[str, float]:
    """By how much the transcription of a second of noise raised FASA's counters; the answer has no timings."""
    samples = np.random.default_rng(0).integers(-9999, 9999, 16000, dtype=np.int16).tobytes()
    sizes = 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", len(samples)
    sound = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", *sizes) + samples
    parts = [(f'name="{name}"', str(value).encode()) for name, value in ({"max_tokens": N_PREDICT} | fields).items()]
    parts.append(('name="file"; filename="noise.wav"', sound))
    body = b"".join(b"--x\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (p[0].encode(), p[1]) for p in parts)
    before = server.metrics()
    server.post("/v1/audio/transcriptions", body + b"--x--\r\n", "multipart/form-data; boundary=x")
    after = server.metrics()
    return {name.removeprefix("llamacpp:fasa_"): after[name] - before[name] for name in after if "fasa" in name}


def test_transcriptions(ears: Server) -> None:
    own, wide, dense = (transcribed(ears, **fields) for fields in ({}, {"fasa_budget": 16}, {"fasa_enabled": "false"}))
    assert own['steps_total{kind="decode"}'] == N_PREDICT - 1
    assert own["layers_sparse_total"] == (N_PREDICT - 1) * SHAPE.n_layer and dense["layers_sparse_total"] == 0
    read = 'read_bytes_total{of="kv"}'
    assert own[read] < wide[read] < dense[read]


@pytest.mark.parametrize("fields", [{"fasa_budget": "much"}, {"fasa_enabled": "perhaps"}, {"fasa_budget": 2}])
def test_what_transcriptions_refuse(ears: Server, fields: dict[str, object]) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        transcribed(ears, **fields)
    (name,) = fields
    assert raised.value.code == 400 and name in json.loads(raised.value.read())["error"]["message"]
