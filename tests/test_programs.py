"""llama.cpp's programs with FASA: options, counters, and what a server does for many."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fasa_edge import convert
from fasa_edge.errors import LibraryError
from fasa_edge.runtime import programs

import pytest
from click.testing import CliRunner
from llama_server import PATIENCE, QUIET, Server, fasa, is_same, program, wait_until
from runtime import TEXTS, annotated_tiny

pytestmark = pytest.mark.programs

N_LAYER = 2
PROMPT, OTHER = TEXTS[0][:300], TEXTS[1][:250]  # tokens
TEXT = bytes(token - 3 for token in TEXTS[2]).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its profile keeps a few cells in every layer of any context."""
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_layer=N_LAYER)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server(model, "--parallel", 4, "--ctx-size", 4 * 4096) as server:
        yield server


# Programs


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_every_program_runs(name: str) -> None:
    done = program(name, "--help")
    assert done.returncode in (0, 1) and "usage" in (done.stdout + done.stderr).lower()  # 1: quantize


def test_the_command_runs_them(model: Path) -> None:
    command = [sys.executable, "-m", "fasa_edge.cli", "llama", "gguf-split", "--help"]
    main = [sys.executable, "-c", "from fasa_edge.cli import main; main()", *command[3:]]
    run = partial(subprocess.run, main, capture_output=True, text=True, check=False, timeout=PATIENCE)
    done = run()
    assert done.returncode == 0 and "--split" in done.stdout
    main[-2:] = ["quantize", "no-such.gguf", "out.gguf", "Q4_0"]
    done = run()
    assert done.returncode == 1 and "no-such.gguf" in done.stdout + done.stderr


def test_a_program_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "lib_dir", lambda: tmp_path)
    with pytest.raises(LibraryError, match="fasa-llama-cli is not at .*make programs.*FASA_PROGRAMS=ON"):
        programs.find_program("cli")
    from fasa_edge.cli import main

    result = CliRunner().invoke(main, ["llama", "cli"])
    assert result.exit_code == 1 and "make programs" in result.output


# Options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fasa", "maybe"], "--fasa maybe: choose off, on or exact"),
        (["--fasa-budget", "0"], "--fasa-budget 0: choose 1 or more"),
        (["--fasa-profile", "no-such.gguf"], "no-such.gguf is no profile of this model"),
    ],
)
def test_bad_options(model: Path, arguments: list[str], message: str) -> None:
    done = program("server", *QUIET, "--port", 0, "--model", model, *arguments)
    assert done.returncode == 1 and message in done.stdout + done.stderr


def test_a_profile_of_another_model(model: Path, tmp_path: Path) -> None:
    other = annotated_tiny(tmp_path, n_layer=N_LAYER + 1)
    done = program("server", *QUIET, "--port", 0, "--model", model, "--fasa-profile", other)
    assert done.returncode == 1 and f"{other} is no profile of this model" in done.stdout + done.stderr


def test_a_profile_beside_the_model_and_options(model: Path, tmp_path: Path) -> None:
    plain, profile = model.with_name("tiny.gguf"), tmp_path / ("long" * 40 + ".gguf")  # an override holds 127 bytes
    convert.convert(model, profile=profile, tokens=512, force=True, check=False)
    override = ("--override-kv", "fasa.min_ctx=int:1,fasa.n_dense_layers=int:0,fasa.n_recent=int:8")
    with Server(plain, "--fasa-profile", profile, "--fasa-budget", 40, *override) as server:
        assert server.ask("/props")["fasa"]["budget"] == 40
        assert fasa(server.complete(PROMPT))["n_layers_sparse"] == 15 * N_LAYER
    with Server(plain, "--fasa-profile", profile, *override, "--fasa", "off") as server:
        assert set(fasa(server.complete(PROMPT))["n_layers_dense"]) == {"disabled"}
    with Server(plain, "--fasa", "exact", "--fasa-budget", 40) as server:
        assert fasa(server.complete(PROMPT))["n_layers_exact"] > 15 * N_LAYER


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("tiny.gguf", ["--fasa-budget", "64"], "fasa.budget has no effect: the model has no FASA profile"),
        ("annotated.gguf", ["--flash-attn", "off"], "will run dense: FASA needs flash attention"),
        ("annotated.gguf", ["--override-kv", "fasa.bugdet=int:64"], "overrides without effect: fasa.bugdet"),
    ],
)
def test_what_has_no_effect_is_said(model: Path, name: str, arguments: list[str], message: str) -> None:
    done = program(
        "perplexity", "--model", model.with_name(name), "--prompt", TEXT, "-c", 256, "--chunks", 1, *arguments
    )
    assert done.returncode == 0 and message in done.stdout + done.stderr


BENCH = ("-p", 0, "-n", 4, "-d", 256, "-r", 1, "-t", 1, "--poll", 0)


def bench(model: Path, *arguments: object) -> list[tuple[str, int]]:
    """What the rows of llama-bench say of FASA."""
    rows = json.loads(program("bench", "--model", model, *BENCH, *arguments, "-o", "json").stdout)
    return [(row["fasa"], row["fasa_budget"]) for row in rows]


def test_bench_has_columns(model: Path) -> None:
    (mode, own), *others = bench(model, "--fasa-budget", "-1,0,64")
    assert mode == "on" and own > 0 and others == [("off", 0), ("on", 64)]
    assert bench(model, "--fasa", "off,on,exact", "--fasa-budget", "0,64,128") == [
        ("off", 0),  # once
        *(("on", 64), ("on", 128)),
        *(("exact", 64), ("exact", 128)),
    ]
    assert bench(model, "--fasa", "exact") == [("exact", own)]
    table = program("bench", "--model", model, *BENCH, "--fasa", "off,exact").stdout
    assert re.search(r"\| fasa +\| fasa_budget +\|", table) and re.search(r"\| off +\| +0 \|", table)
    assert "fasa" not in program("bench", "--model", model, *BENCH).stdout.splitlines()[0]  # as its other columns


def test_bench_takes_a_profile(model: Path, tmp_path: Path) -> None:
    plain, profile = model.with_name("tiny.gguf"), tmp_path / "profile.gguf"
    convert.convert(model, profile=profile, tokens=512, force=True, check=False)
    assert bench(plain) == bench(plain, "--fasa", "on") == [("off", 0)]
    assert bench(plain, "--fasa", "off,exact") == [("off", 0), ("exact", 0)]
    own = convert.inspect(profile).profile.config.budget
    assert bench(plain, "--fasa-profile", profile, "--fasa", "off,on,exact") == [
        ("off", 0),
        ("on", own),
        ("exact", own),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fasa", "maybe"], "invalid parameter for argument: --fasa\n"),
        (["--fasa-budget", "-2"], "invalid parameter for argument: --fasa-budget"),
        (["--fasa-budget", "1"], "--fasa-budget 1 is refused for model"),
        (["--fasa-profile", "no-such.gguf"], "--fasa-profile no-such.gguf is no profile of model"),
    ],
)
def test_bad_options_of_bench(model: Path, arguments: list[str], message: str) -> None:
    done = program("bench", "--model", model, *BENCH, *arguments)
    assert done.returncode == 1 and message in done.stderr


# The server


def test_chat_decodes_sparsely_and_says_so(server: Server) -> None:
    before = server.metrics()
    body = {"messages": [{"role": "user", "content": TEXT[:200]}], "max_tokens": 12, "ignore_eos": True}
    answer = server.ask("/v1/chat/completions", body | {"temperature": 0})
    assert answer["usage"]["completion_tokens"] == 12
    found = fasa(answer)
    assert found["n_steps_decode"] == 11 and found["n_layers_sparse"] == 11 * N_LAYER
    assert found["n_layers_dense"] == {"prompt": found["n_steps_prompt"] * N_LAYER}
    assert found["bytes_kv"] < found["bytes_kv_dense"] and found["bytes_tips"] > 0
    assert found["read_ratio"] == pytest.approx((found["bytes_kv"] + found["bytes_tips"]) / found["bytes_kv_dense"])

    after = server.metrics()
    added = {name: after[name] - before.get(name, 0) for name in after if "fasa" in name}
    assert added["llamacpp:fasa_layers_sparse_total"] == found["n_layers_sparse"]
    assert added['llamacpp:fasa_layers_dense_total{reason="prompt"}'] == found["n_layers_dense"]["prompt"]
    assert added['llamacpp:fasa_layers_dense_total{reason="disabled"}'] == 0
    assert added['llamacpp:fasa_steps_total{kind="decode"}'] == 11
    assert added['llamacpp:fasa_read_bytes_total{of="kv"}'] == found["bytes_kv"]
    assert added["llamacpp:fasa_dense_bytes_total"] == found["bytes_kv_dense"]


def test_streamed_timings(server: Server) -> None:
    body = {"prompt": PROMPT, "n_predict": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    events = [line for line in server.ask("/completion", body).splitlines() if line.startswith("data: {")]
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["stop"] and fasa(last)["n_layers_sparse"] == 3 * N_LAYER
    assert all(isinstance(value, int | float) for value in last["timings"].values())  # as clients take them


def test_properties(server: Server, model: Path) -> None:
    found, profile = server.ask("/props")["fasa"], convert.inspect(model).profile
    assert found["profile"] and found["enabled"] and not found["exact"]
    for name in ("budget", "budget_ctx", "n_sink", "n_recent", "min_ctx", "max_batch", "n_dense_layers", "select"):
        assert found[name] == getattr(profile.config, name)
    assert found["n_tip"] == profile.n_tip and found["tips_size"] > 0


def test_settings_of_a_request(server: Server) -> None:
    own, wide, dense = (
        server.complete(PROMPT, **fields) for fields in ({}, {"fasa_budget": 256}, {"fasa_enabled": False})
    )
    assert fasa(dense)["n_layers_sparse"] == 0 and set(fasa(dense)["n_layers_dense"]) == {"disabled"}
    assert fasa(dense)["read_ratio"] == 1
    own_budget = server.ask("/props")["fasa"]["budget"]
    assert [fasa(answer)["budget"] for answer in (own, wide, dense)] == [own_budget, 256, 0]
    assert fasa(own)["bytes_kv"] < fasa(wide)["bytes_kv"] < fasa(dense)["bytes_kv"]
    assert not is_same(own, dense) and not is_same(own, wide)  # attention of the random model is wide
    again = server.complete(PROMPT, fasa_budget=None, fasa_enabled=True)
    assert again["tokens"] == own["tokens"] and fasa(again)["bytes_kv"] == fasa(own)["bytes_kv"]
    assert server.ask("/props")["fasa"]["budget"] < 256  # the server's own stay


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fasa_budget": 0}, "fasa_budget"),
        ({"fasa_budget": "much"}, "fasa_budget"),
        ({"fasa_enabled": "yes"}, "fasa_enabled"),
        ({"fasa_budget": 11}, "fasa_budget = 11 is below the 4 first and 8 last tokens .* choose 12 or more"),
    ],
)
def test_bad_settings_of_a_request(server: Server, fields: dict[str, object], message: str) -> None:
    assert re.search(message, server.refusal(**fields))
    assert fasa(server.complete(PROMPT, 2))["n_layers_sparse"] == N_LAYER


def test_a_model_without_a_profile(model: Path) -> None:
    with Server(model.with_name("tiny.gguf")) as server:
        answer = server.complete(PROMPT, fasa_enabled=False)
        assert not any("fasa" in name for name in answer["timings"])
        assert server.ask("/props")["fasa"] is None and not any("fasa" in name for name in server.metrics())
        assert "no FASA profile" in server.refusal(fasa_budget=64) and "no FASA" in server.refusal(fasa_enabled=True)


def test_requests_with_other_settings_take_turns(server: Server) -> None:
    """None waits until another ends, and each gets what it gets alone."""
    settings = [{}, {"fasa_budget": 128}, {"fasa_enabled": False}]
    alone = [server.complete(OTHER, 24, **fields) for fields in settings]
    with ThreadPoolExecutor() as pool:
        long = pool.submit(server.complete, PROMPT, 3700)
        wait_until(
            lambda: long.done() or any(slot.get("fasa", {}).get("n_layers_sparse") for slot in server.ask("/slots")),
            "the long one decodes",
        )
        together = list(pool.map(lambda fields: server.complete(OTHER, 24, **fields), settings))
        assert not long.done()
        answer = long.result()
    assert all(map(is_same, together, alone))
    assert fasa(answer)["n_layers_sparse"] >= 3699 * N_LAYER  # also while others' prompts were read


def test_slots_decode_sparsely_at_once(server: Server) -> None:
    prompts = [PROMPT[i:] + OTHER[: 10 * i] for i in range(4)]
    alone = [server.complete(prompt, 32) for prompt in prompts]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: server.complete(prompt, 32), prompts))
    assert all(map(is_same, answers, alone))
    assert {answer["id_slot"] for answer in answers} == set(range(4))
    for answer in answers:
        assert fasa(answer)["n_layers_sparse"] >= 31 * N_LAYER  # a batch may take several micro-batches


def test_slots_that_share_one_cache(model: Path, server: Server) -> None:
    prompts = [PROMPT[i:] + OTHER[: 10 * i] for i in range(4)]
    with Server(model, "--parallel", 4, "--kv-unified") as unified, ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: unified.complete(prompt, 32), prompts))
    assert all(map(is_same, answers, [server.complete(prompt, 32) for prompt in prompts]))
    assert all(fasa(answer)["n_layers_sparse"] > 0 for answer in answers)


def test_an_answer_does_not_depend_on_what_was_cached(server: Server) -> None:
    """The end of a prompt is read as a part of it, though it is as short as a draft."""
    fresh = server.complete(PROMPT, cache_prompt=False)
    server.complete(PROMPT[:-5], 1, id_slot=0)
    cached = server.complete(PROMPT, id_slot=0)
    assert cached["timings"]["cache_n"] >= len(PROMPT) - 6
    assert is_same(cached, fresh)
    assert set(fasa(cached)["n_layers_dense"]) == {"prompt"}


def test_slots_are_saved_and_restored_in_another_process(model: Path, tmp_path: Path) -> None:
    options = ("--slot-save-path", f"{tmp_path}/", "--parallel", 2)
    with Server(model, *options) as server:
        first = server.complete(PROMPT, 32, id_slot=0)
        assert server.ask("/slots/0?action=save", {"filename": "slot"})["n_saved"] >= len(PROMPT)
        more = [*PROMPT, *first["tokens"], *OTHER[:20]]
        wanted = server.complete(more, 32, id_slot=0)
    with Server(model, *options) as server:
        assert server.ask("/slots/1?action=restore", {"filename": "slot"})["n_restored"] >= len(PROMPT)
        found = server.complete(more, 32, id_slot=1)
    assert found["timings"]["cache_n"] == wanted["timings"]["cache_n"] > len(PROMPT)
    assert found["tokens"] == wanted["tokens"]
    assert fasa(found) == fasa(wanted) and fasa(found)["n_layers_sparse"] == 31 * N_LAYER


def test_a_prompt_that_left_its_slot_comes_back_with_its_tips(model: Path) -> None:
    with Server(model, "--cache-ram", 64, "--ctx-size", 1024) as server:
        first = server.complete(PROMPT)
        server.complete(OTHER)
        again = server.complete(PROMPT)
    assert again["timings"]["cache_n"] > 0 and is_same(again, first)
    assert set(fasa(again)["n_layers_dense"]) == {"prompt"}


def test_context_shift(model: Path) -> None:
    with Server(model, "--ctx-size", 512, "--context-shift") as server:
        answer = server.complete(PROMPT, 400)
    assert answer["truncated"] and len(answer["tokens"]) == 400
    assert fasa(answer)["n_layers_sparse"] == 399 * N_LAYER and set(fasa(answer)["n_layers_dense"]) == {"prompt"}


def test_drafts_are_checked_sparsely(model: Path, server: Server) -> None:
    with Server(model, "--spec-draft-model", model, "--spec-type", "draft-simple") as drafting:
        answer = drafting.complete(PROMPT, 200)
    assert answer["timings"]["draft_n"] > 0 and answer["timings"]["draft_n_accepted"] > 0
    assert answer["tokens"][:8] == server.complete(PROMPT, 8)["tokens"]
    assert set(fasa(answer)["n_layers_dense"]) == {"prompt"} and fasa(answer)["n_steps_decode"] < 199


def test_embeddings(model: Path) -> None:
    vectors = []
    for name in ("annotated.gguf", "tiny.gguf"):
        with Server(model.with_name(name), "--embeddings", "--pooling", "mean", "--batch-size", 512) as server:
            vectors.append(server.ask("/v1/embeddings", {"input": TEXT[:200]})["data"][0]["embedding"])
    assert vectors[0] == vectors[1]


def test_grammars(server: Server) -> None:
    answer = server.complete(PROMPT, 12, grammar='root ::= ("yes" | "no")+')
    assert answer["content"] and not answer["content"].replace("yes", "").replace("no", "").strip("yen")
    assert fasa(answer)["n_layers_sparse"] > 0
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    body = {"messages": [{"role": "user", "content": TEXT[:200]}], "max_tokens": 600}
    answer = server.ask("/v1/chat/completions", body | {"response_format": {"type": "json_object", "schema": schema}})
    assert json.loads(answer["choices"][0]["message"]["content"])["n"] in (1, 2)
    assert fasa(answer)["n_layers_sparse"] > 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_slot(model: Path, stream: bool) -> None:
    """Its answer would have no end, contexts shift; also while others, here /slots, are answered all the time."""
    body = json.dumps({"prompt": PROMPT, "n_predict": 10**8, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with Server(model, "--ctx-size", 512, "--context-shift") as server:
        n_steps = lambda: server.metrics()['llamacpp:fasa_steps_total{kind="decode"}']  # noqa: E731
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
            client.sendall(head.encode() + body)
            wait_until(lambda: n_steps() > 512, "a context is full")
            assert server.ask("/slots")[0]["is_processing"]
        wait_until(lambda: not server.ask("/slots")[0]["is_processing"], "the slot is free again")
        stopped = n_steps()
        assert stopped < 10**7  # well before its end
        assert len(server.complete(PROMPT, 5)["tokens"]) == 5
        assert n_steps() == stopped + 4
