"""A pytest plugin that runs llama.cpp's own tests of llama-server on ours: `make test-server`.

Each test runs twice, with FASA off and with FASA on, where contexts are sparse from their first cells on. The hub that
the tests download their models from is one on this machine (tests/hub_server.py), with stand-ins of the same names.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlretrieve

from fasa_edge.runtime.programs import find_program

import pytest
import requests

from server_suite.unlike import EXCLUDED, TEXTS

HUGGING_FACE = "https://huggingface.co/"


def pytest_configure(config: pytest.Config) -> None:
    """Stand in for the hub, in all processes; the first of them runs it."""
    if not hasattr(config, "workerinput"):
        from hub_server import hub_server

        from server_suite.models import write_repositories

        stack = ExitStack()
        config.add_cleanup(stack.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(hub_server())
        hub.repos |= write_repositories(folder / "hub")
        os.environ |= {
            "MODEL_ENDPOINT": f"{hub.endpoint}/",
            "LLAMA_CACHE": str(folder / "cache"),
            "LLAMA_SERVER_BIN_PATH": str(find_program("server")),
        }
        shutil.rmtree("tmp", ignore_errors=True)  # where the tests look for what they have downloaded
        os.mkdir("tmp")
    _redirect_requests()


def _at_hand(text: str) -> str:
    return text.replace(HUGGING_FACE, os.environ["MODEL_ENDPOINT"])


# of the package that the tests download with no more is used
wget = types.ModuleType("wget")
wget.download = lambda url, out: urlretrieve(_at_hand(url), out)
sys.modules["wget"] = wget


def _redirect_requests() -> None:
    """Where a request names the hub, as its address or in what a server is told to fetch, the one at hand is meant."""
    request = requests.Session.request

    def redirected(self: requests.Session, method: str, url: str, **arguments: Any) -> requests.Response:
        if arguments.get("json") is not None:
            arguments["json"] = json.loads(_at_hand(json.dumps(arguments["json"])))
        return request(self, method, _at_hand(url), **arguments)

    requests.Session.request = redirected


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out EXCLUDED; what is listed must exist in the files that are run."""
    names = {name: _named(name, items) for name in (*EXCLUDED, *TEXTS)}
    if not any("::" in argument for argument in config.args):
        files = {item.path.name for item in items}
        all_files = any(Path(argument).is_dir() for argument in config.args)
        gone = [name for name, found in names.items() if not found and (all_files or name.partition("::")[0] in files)]
        assert not gone, f"upstream's tests were renamed: correct tests/server_suite/unlike.py: {', '.join(gone)}"
    out = {item for name in EXCLUDED for item in names[name]}
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]


def _named(name: str, items: list[pytest.Item]) -> list[pytest.Item]:
    """``file::function`` names it with all its parameters, ``file::function[some]`` those whose id has these in it."""
    function, _, parameters = name.rstrip("]").partition("[")
    return [
        item
        for item in items
        if item.nodeid.partition("[")[0].endswith(f"/{function}") and parameters in item.nodeid.partition("[")[2]
    ]


@pytest.fixture(params=["off", "on"], autouse=True)
def fasa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the servers of a test are told, those that a router starts as well; and that their answers tell the same."""
    from utils import ServerProcess

    monkeypatch.setenv("LLAMA_ARG_FASA", request.param)
    make_request, make_stream_request, start = (
        getattr(ServerProcess, name) for name in ("make_request", "make_stream_request", "start")
    )
    counters: list[dict[str, Any]] = []

    def count(body: Any) -> None:
        """What an answer, a part of a stream, or each of several answers says."""
        for answer in body if isinstance(body, list) else [body]:
            if isinstance(answer, dict) and isinstance(answer.get("timings"), dict):
                counters.append(answer["timings"])

    def counted(self: ServerProcess, *arguments: Any, **named: Any) -> Any:
        response = make_request(self, *arguments, **named)
        count(response.body)
        return response

    def counted_stream(self: ServerProcess, *arguments: Any, **named: Any) -> Iterator[Any]:
        for part in make_stream_request(self, *arguments, **named):
            count(part)
            yield part

    def start_with_flash_attention(self: ServerProcess, *arguments: Any, **named: Any) -> None:
        self.fa = None  # FASA needs it, where upstream's tests have it off
        start(self, *arguments, **named)

    monkeypatch.setattr(ServerProcess, "make_request", counted)
    monkeypatch.setattr(ServerProcess, "make_stream_request", counted_stream)
    if request.param == "on":
        monkeypatch.setattr(ServerProcess, "start", start_with_flash_attention)
    yield
    for counter in counters:
        n_steps, n_sparse = (counter.get(name, 0) for name in ("fasa_n_steps_decode", "fasa_n_layers_sparse"))
        assert (n_sparse > 0) == (request.param == "on" and n_steps > 0), counter
        if counter.get("predicted_n", 0) > 1:  # the first token comes of the prompt
            assert n_steps > 0, counter


@pytest.fixture(autouse=True)
def free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server takes a port that upstream chose."""
    from utils import ServerProcess

    init = ServerProcess.__init__

    def on_free_port(self: ServerProcess) -> None:
        init(self)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.server_port = probe.getsockname()[1]

    monkeypatch.setattr(ServerProcess, "__init__", on_free_port)


@pytest.fixture(autouse=True)
def any_text(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that only upstream's weights would write, no more is asked than that there is one."""
    if any(_named(name, [request.node]) for name in TEXTS):
        matches: Callable[[str, str], bool] = lambda regex, text: isinstance(text, str) and len(text) > 0  # noqa: E731
        monkeypatch.setattr(request.module, "match_regex", matches)
