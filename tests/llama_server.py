"""A llama-server of a test, and what it answers."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasa_edge.runtime.programs import find_program
from fasa_edge.runtime.serving import free_port, running

import pytest

# one thread, which does not spin: the machine is shared
QUIET = ("--threads", "1", "--poll", "0", "--no-warmup", "--log-verbosity", "2", "--metrics", "--slots")

PATIENCE = 600  # seconds, of what else would be waited for without end

N_PROBS = 4
TIE = 0.05  # of log probabilities: products of several rows differ from those of one, and cells are chosen by them


class Server:
    """Runs while its context is open.

    Args:
        model: a GGUF file.
        arguments: further options of llama-server.
    """

    def __init__(self, model: Path, *arguments: object) -> None:
        try:
            find_program("server")
        except Exception as error:  # noqa: BLE001
            pytest.fail(str(error), pytrace=False)
        self.port = free_port("127.0.0.1", 0)
        options = [*QUIET, "--ctx-size", "4096", "--parallel", "1", "--model", str(model), *map(str, arguments)]
        self._running = running("127.0.0.1", self.port, options)

    def __enter__(self) -> Server:
        self.process: subprocess.Popen[bytes] = self._running.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._running.__exit__(*raised)

    def ask(self, path: str, body: object = None) -> Any:
        """Post a body, or get; the answer, decoded if it is JSON. Raises what it refuses as ``HTTPError``."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body).encode()
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
            content = answer.read().decode()
            return json.loads(content) if answer.headers.get_content_type() == "application/json" else content

    def complete(self, prompt: list[int] | str, n_predict: int = 16, **fields: object) -> dict[str, Any]:
        """Complete a prompt greedily, with exactly so many tokens."""
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        body |= {"n_probs": N_PROBS}
        return self.ask("/completion", body | fields)

    def refusal(self, **fields: object) -> str:
        """What it says to a completion that it refuses as a mistake of the client."""
        with pytest.raises(urllib.error.HTTPError) as raised:
            self.complete([5, 6, 7], **fields)
        assert raised.value.code == 400
        return json.loads(raised.value.read())["error"]["message"]

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels."""
        lines = self.ask("/metrics").splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def is_same(answer: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two greedy answers are the same, up to a token that was all but a tie: from there they part."""
    assert len(answer["tokens"]) == len(other["tokens"])
    # of a character that is not whole in the end, the server leaves out the probabilities
    for mine, its in zip(answer["completion_probabilities"], other["completion_probabilities"], strict=False):
        if mine["id"] != its["id"]:
            logprobs = {token["id"]: token["logprob"] for token in mine["top_logprobs"]}
            return abs(logprobs[mine["id"]] - logprobs.get(its["id"], -float("inf"))) < TIE
    return True


def fasa(answer: dict[str, Any]) -> dict[str, Any]:
    """FASA's counters of an answer, dense layers by reason."""
    prefix, dense = "fasa_", "n_layers_dense_"
    flat = {name.removeprefix(prefix): n for name, n in answer["timings"].items() if name.startswith(prefix)}
    counters: dict[str, Any] = {name: n for name, n in flat.items() if not name.startswith(dense)}
    counters["n_layers_dense"] = {name.removeprefix(dense): n for name, n in flat.items() if name.startswith(dense)}
    return counters


def program(name: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one of llama.cpp's programs to its end, which a server has only where it refuses to run."""
    command = [find_program(name), *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": PATIENCE} | options
    return subprocess.run(command, check=False, **options)


def wait_until(happens: Callable[[], object], what: str) -> None:
    """Fails where it has not happened after PATIENCE, of which only the pauses count: the machine may be stopped."""
    pause = 0.02
    for _ in range(int(PATIENCE / pause)):
        if happens():
            return
        time.sleep(pause)
    pytest.fail(f"{what}: not within {PATIENCE} seconds")
