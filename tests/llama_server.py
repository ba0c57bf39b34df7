"""A llama-server of a test, and what it answers."""

from __future__ import annotations

import json
import math
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
# Of log probabilities. Products of several rows differ from those of one, by 0.0002 as seen; and by that another of two
# cells that score alike is chosen now and then, one of a budget of 64: 0.015.
TIE = 0.03


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
        return self.post(path, None if body is None else json.dumps(body).encode())

    def post(self, path: str, body: bytes | None, content_type: str = "application/json") -> Any:
        """As `ask`, with a body as it is."""
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": content_type} if body else {}
        request = urllib.request.Request(url, body, headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE) as answer:
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


def n_agreed(answer: dict[str, Any], other: dict[str, Any]) -> int:
    """How many tokens two greedy answers have in common.

    That is all of them, or those before one that was all but a tie in both: from there on each goes on from a text of
    its own, and nothing can be said. Of the tokens in common the log probabilities are the same as well.

    Returns:
        -1 where they part at a token that was no tie, or that has no probabilities, or where these differ before.
    """
    mine, its = answer["tokens"], other["tokens"]
    assert len(mine) == len(its)
    n = next((i for i, pair in enumerate(zip(mine, its, strict=True)) if pair[0] != pair[1]), len(mine))
    # tokens that end within a character have no probabilities
    for a, b in zip(answer["completion_probabilities"], other["completion_probabilities"], strict=False):
        if a["id"] != b["id"]:
            is_tie = (a["id"], b["id"]) == (mine[n], its[n]) and max(_loss(a, b["id"]), _loss(b, a["id"])) < TIE
            return n if is_tie else -1
        if abs(a["logprob"] - b["logprob"]) > TIE:
            return -1
    return n if n == len(mine) else -1


def _loss(token: dict[str, Any], other: int) -> float:
    """By how much another token was less likely than the one that was chosen."""
    logprobs = {top["id"]: top["logprob"] for top in token["top_logprobs"]}
    return token["logprob"] - logprobs.get(other, -math.inf)


def is_same(answer: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two greedy answers have at least the first half in common, and part, if at all, at a tie: `n_agreed`."""
    return n_agreed(answer, other) >= len(answer["tokens"]) / 2


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
