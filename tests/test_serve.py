"""``fasa-edge serve``: what it chooses, starts, says, refuses and ends. What the server does: ``test_programs.py``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fasa_edge import convert
from fasa_edge.cli import main, serve
from fasa_edge.errors import FasaError, ModelError
from fasa_edge.runtime import memory, serving

import pytest
from click.testing import CliRunner
from runtime import annotated_tiny
from tiny_models import Shape, make_model

pytestmark = pytest.mark.programs

N_CTX_TRAIN = 4096  # of the model
NO_WAITING = ("--poll", "0", "--no-warmup")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"))


@contextlib.contextmanager
def served(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running command, what it says first, and the address that it says next."""
    # in the background, too, where shells let Ctrl-C be ignored
    heeds_interrupts = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{heeds_interrupts}; from fasa_edge.cli import main; main()"
    command = [sys.executable, "-c", start, "serve", "--port", "0", *arguments]
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, [*command, "--", *NO_WAITING])), **pipes) as process:
        try:
            first, second = process.stdout.readline(), process.stdout.readline()
            assert second.startswith("http://127.0.0.1:"), first + process.stderr.read()
            yield process, first, second.split("/v1")[0]
        finally:
            if process.poll() is None:
                process.terminate()


def ask(url: str, body: object = None, **headers: str) -> Any:
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
        return json.load(answer)


def pids_of(url: str) -> list[int]:
    """Processes that were told to listen on the port of an address."""
    port = url.rsplit(":", 1)[1]
    found = subprocess.run(
        ["pgrep", "-f", f"fasa-llama-server.*--port {port}"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


# A running one


def test_it_says_what_runs_and_where_and_decodes_sparsely(model: Path) -> None:
    with served(model, "-t", 1) as (_, first, url):
        assert first == f"{model}: 4 slots of {N_CTX_TRAIN} cells, 1 thread ({os.cpu_count()} for prompts), budget 64\n"
        body = {"messages": [{"role": "user", "content": "word " * 40}], "max_tokens": 8, "ignore_eos": True}
        assert ask(f"{url}/v1/chat/completions", body)["timings"]["fasa_n_layers_sparse"] == 7 * 2
        properties = ask(f"{url}/props")
        assert properties["total_slots"] == 4 and properties["default_generation_settings"]["n_ctx"] == N_CTX_TRAIN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_signals_end_the_server_too(model: Path, number: int, busy: bool) -> None:
    with served(model, "-t", 1) as (process, _, url):
        assert len(pids_of(url)) == 1
        if busy:
            body = {"prompt": "x", "n_predict": 10**6, "ignore_eos": True, "stream": True}
            request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).readline()
        process.send_signal(number)
        assert process.wait() == (0 if number == signal.SIGINT else -number)
        assert pids_of(url) == []
        assert "Traceback" not in process.stderr.read()


def test_a_server_that_dies(model: Path) -> None:
    with served(model, "-t", 1) as (process, _, url):
        os.kill(pids_of(url)[0], signal.SIGKILL)
        assert process.wait() == 1
        assert "llama-server ended by itself, with status -9" in process.stderr.read()


def test_options_for_the_server(model: Path) -> None:
    NO_KEY = {"prompt": "x", "n_predict": 1}
    command = [sys.executable, "-c", "from fasa_edge.cli import main; main()", "serve", "--port", "0", str(model), "--"]
    with subprocess.Popen([*command, "--api-key", "k", *NO_WAITING], stdout=subprocess.PIPE, text=True) as process:
        url = [process.stdout.readline() for _ in range(2)][1].split("/v1")[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/completion", NO_KEY)
        assert ask(f"{url}/completion", NO_KEY, Authorization="Bearer k")["tokens_predicted"] == 1
        process.terminate()
    done = subprocess.run([*command, "--no-such-option"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "--no-such-option" in done.stderr
    assert "llama-server ended with status 1 before it could answer" in done.stderr.splitlines()[-1]


# What it refuses


def refused(*arguments: object) -> str:
    """The one line that it says."""
    result = CliRunner().invoke(main, ["serve", *map(str, arguments)])
    assert result.exit_code == 1 and result.output.count("\n") == 1, result.output
    return result.output


def test_a_port_in_use(model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be taken" in refused(model, "--port", port)
    with pytest.raises(FasaError, match="--port"):
        serving.free_port("203.0.113.1", 8080)  # not of this machine
    assert serving.free_port("127.0.0.1", port) == port and serving.free_port("127.0.0.1", 0) > 0


def test_a_port_where_nobody_looks_for_it(model: Path) -> None:
    for option in ("--port", "--host=0.0.0.0"):
        result = CliRunner().invoke(main, ["serve", str(model), "--", option, "1"])
        assert result.exit_code == 2 and f"{option.partition('=')[0]} belongs before --" in result.output


def test_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model at all")
    assert "x.gguf" in refused(tmp_path / "x.gguf", "--port", 0)


def test_too_little_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limits", lambda: [memory.Available(1 << 20, "the machine's memory")])
    said = refused(model, "--port", 0)
    assert "memory does not hold" in said and "1048576 are left of the machine's memory" in said and "smaller" in said


def test_a_server_that_was_not_built(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasa_edge.runtime.programs.lib_dir", lambda: tmp_path)
    assert "make programs" in refused(model, "--port", 0)


# What it chooses


def limit(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(memory, "limits", lambda: [memory.Available(n_bytes, "the machine's memory")])


def test_slots_and_context_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many slots of the whole context as fit, then one of what fits."""
    n_ctx = 1 << 16
    model = make_model(tmp_path / "long.gguf", shape=Shape(n_ctx=n_ctx))
    found = []
    for n_bytes in (1 << 40, *range(2000 << 20, 200 << 20, -(100 << 20)), 160 << 20):
        limit(monkeypatch, n_bytes)
        found.append(serving.plan(model))
    assert (found[0].n_slots, found[0].n_ctx, found[0].cache_mib) == (4, n_ctx, 8192)
    assert [plan.n_slots for plan in found] == sorted((plan.n_slots for plan in found), reverse=True)
    assert {plan.n_slots for plan in found} == {1, 2, 3, 4}
    assert all(plan.n_ctx == n_ctx for plan in found if plan.n_slots > 1) and found[-1].n_ctx < n_ctx
    assert found[-1].cache_mib < 100

    assert serving.plan(model, n_slots=8).n_ctx < found[-1].n_ctx
    with pytest.raises(ModelError, match=r"65536 cells for each of 8 slots: .* room for \d+; lower the context or the"):
        serving.plan(model, n_ctx=n_ctx, n_slots=8)


def test_what_is_given_stays(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 1 << 40)
    plan = serving.plan(model, n_ctx=512, n_slots=3, n_threads=7, n_gpu_layers=-1)
    words = plan.arguments()
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--ctx-size"] == "1536" and given["--parallel"] == "3"
    assert given["--threads"] == "7" and given["--gpu-layers"] == "999"
    assert serving.plan(model, n_ctx=2 * N_CTX_TRAIN).n_ctx == 2 * N_CTX_TRAIN  # RoPE may be scaled
    assert "--gpu-layers" not in serving.plan(model).arguments() or serving.plan(model).n_gpu_layers == 999


# A model without a profile


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of the server that would have been started; Ctrl-C is pressed at once."""
    seen: list[str] = []

    @contextlib.contextmanager
    def running(host: str, port: int, arguments: Sequence[str]) -> Iterator[None]:
        seen[:] = arguments
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(serve, "running", running)
    return seen


@pytest.fixture
def plain(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plain.gguf"
    path.write_bytes(model.with_name("tiny.gguf").read_bytes())
    return path


def test_it_is_annotated_first(plain: Path, started: list[str]) -> None:
    copy = plain.with_name("plain-fasa.gguf")
    said = refused(plain, "--port", 0)
    assert "no FASA profile: give --convert" in said and "--no-convert" in said and not copy.exists()

    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0", "--convert"])
    assert result.exit_code == 0 and convert.inspect(copy).annotated
    assert started[started.index("--model") + 1] == str(copy)

    started.clear()
    written = copy.stat().st_mtime_ns
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0"])
    assert result.exit_code == 0 and "its annotated copy is served" in result.output
    assert started[started.index("--model") + 1] == str(copy) and copy.stat().st_mtime_ns == written

    os.utime(plain, ns=(written + 10**9,) * 2)  # another model by now
    assert "plain-fasa.gguf exists" in refused(plain, "--port", 0, "--convert")


@pytest.mark.parametrize("arguments", [["--no-convert"], ["--dense"]])
def test_it_is_served_dense(plain: Path, started: list[str], arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0", *arguments])
    assert result.exit_code == 0 and "dense" in result.output
    assert started[started.index("--model") + 1] == str(plain)
    assert ("--fasa" in started) == (arguments == ["--dense"])


@pytest.mark.parametrize("answer", ["y", "n"])
def test_it_asks_on_a_terminal(plain: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(serve, "_is_terminal", lambda: True)
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0"], input=f"{answer}\n")
    assert result.exit_code == 0 and "Write an annotated copy" in result.output
    name = "plain-fasa.gguf" if answer == "y" else "plain.gguf"
    assert Path(started[started.index("--model") + 1]).name == name


def test_a_profile_beside_it(model: Path, plain: Path, tmp_path: Path, started: list[str]) -> None:
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0", "--profile", str(model), "--budget", "32"])
    assert result.exit_code == 0 and "budget 32" in result.output
    assert started[started.index("--fasa-profile") + 1] == str(model)
    assert started[started.index("--fasa-budget") + 1] == "32"
