"""``fasa-edge serve``: what it chooses, starts, says, refuses and ends. What the server does: ``test_programs.py``."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fasa_edge import convert
from fasa_edge.cli import main, serve
from fasa_edge.errors import FasaError
from fasa_edge.runtime import cpus, memory, serving, tied
from fasa_edge.runtime.library import lib_dir, llama_cpp
from fasa_edge.runtime.programs import find_program

import psutil
import pytest
from click.testing import CliRunner
from runtime import annotated_tiny

pytestmark = pytest.mark.programs

N_CTX_TRAIN = 4096  # of the model
NO_WAITING = ("--poll", "0", "--no-warmup")
PATIENCE = 120  # seconds; nothing takes so long


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"))


@contextlib.contextmanager
def served(*arguments: object, options: Sequence[object] = ()) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running command, what it says first, and the address that it says next."""
    # in the background, too, for which shells let some be ignored
    heeds_signals = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGQUIT, signal.SIG_DFL)"
    )
    start = f"{heeds_signals}; from fasa_edge.cli import main; main()"
    command = [sys.executable, "-c", start, "serve", "--port", "0", *arguments, "--", *NO_WAITING, *options]
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        # reading what it says has no limit of its own
        too_late = threading.Timer(PATIENCE, process.kill)
        too_late.start()
        try:
            first, second = process.stdout.readline(), process.stdout.readline()
            assert second.startswith("http"), first + second + process.stderr.read()
            yield process, first, second.split("/v1")[0]
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(PATIENCE)
            too_late.cancel()


def open_url(url: str, body: object = None, **headers: str) -> Any:
    """The answer, to be read; of a server that need not be known."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    return urllib.request.build_opener(*handlers).open(request, timeout=PATIENCE)


def ask(url: str, body: object = None, **headers: str) -> Any:
    with open_url(url, body, **headers) as answer:
        return json.load(answer)


def pids_of(url: str) -> list[int]:
    """Processes that were told to listen on the port of an address."""
    port = url.split(":")[2].partition("/")[0]
    found = subprocess.run(
        ["pgrep", "-f", f"fasa-llama-server.*--port {port}"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def drain(answer: Any) -> None:
    """Read to the end, or the server would wait for it in the middle."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while answer.read(1 << 16):
            pass


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# A running one


def test_it_says_what_runs_and_where_and_decodes_sparsely(model: Path) -> None:
    with served(model, "-t", 1) as (_, first, url):
        assert first == f"{model}: 4 slots of {N_CTX_TRAIN} cells, 1 thread ({cpus.n_cpus()} for prompts), budget 64\n"
        body = {"messages": [{"role": "user", "content": "word " * 40}], "max_tokens": 8, "ignore_eos": True}
        assert ask(f"{url}/v1/chat/completions", body)["timings"]["fasa_n_layers_sparse"] == 7 * 2
        properties = ask(f"{url}/props")
        assert properties["total_slots"] == 4 and properties["default_generation_settings"]["n_ctx"] == N_CTX_TRAIN


@pytest.mark.parametrize(
    "n_ctx, options, n_cells",
    [
        (1000, [], 1024),
        (2 * N_CTX_TRAIN, ["--rope-scaling", "yarn", "--rope-scale", "2"], 2 * N_CTX_TRAIN),
    ],
)
def test_slots_have_the_cells_that_it_says(model: Path, n_ctx: int, options: list[str], n_cells: int) -> None:
    with served(model, "-c", n_ctx, "--slots", 2, options=options) as (_, first, url):
        assert f": 2 slots of {n_cells} cells, " in first
        assert {slot["n_ctx"] for slot in ask(f"{url}/slots")} == {n_cells}


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]


@pytest.mark.parametrize(
    "number, busy", [*((number, False) for number in SIGNALS), *((number, True) for number in SIGNALS[:2])]
)
def test_signals_end_the_server_too(model: Path, number: int, busy: bool) -> None:
    endless = ["--context-shift"]
    with served(model, "-t", 1, options=endless) as (process, _, url), contextlib.ExitStack() as stack:
        assert len(pids_of(url)) == 1
        if busy:
            body = {"prompt": "x", "n_predict": 10**6, "ignore_eos": True, "stream": True}
            answer = stack.enter_context(open_url(f"{url}/completion", body))
            answer.readline()
            threading.Thread(target=drain, args=[answer], daemon=True).start()
        assert [slot["is_processing"] for slot in ask(f"{url}/slots")].count(True) == busy
        process.send_signal(number)
        assert process.wait(PATIENCE) == (0 if number == signal.SIGINT else -number)
        assert pids_of(url) == []
        assert "Traceback" not in process.stderr.read()


def test_nothing_outlives_it(model: Path) -> None:
    """It is killed, by the system, say, which is short of memory."""
    with served(model, "-t", 1) as (process, _, url):
        (pid,) = pids_of(url)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
        wait_until(lambda: not psutil.pid_exists(pid))


def test_nothing_outlives_it_elsewhere(tmp_path: Path) -> None:
    """Where no system call ties a process to another, one more process does."""
    tie = f"import sys; sys.platform = 'darwin'; sys.argv[0] = {tied.__file__!r}"
    run = f"{tie}; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    start = f"""
import os, subprocess, sys
command = [sys.executable, "-c", {run!r}, str(os.getpid()), "/bin/sh", "-c", "echo $$; read x; exec sleep 600"]
subprocess.Popen(command, stdin=subprocess.PIPE).wait()
"""
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        wait_until(lambda: psutil.Process(pid).name() == "sleep")  # it reads nothing of that pipe itself
        process.kill()
    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_server_that_dies(model: Path) -> None:
    with served(model, "-t", 1) as (process, _, url):
        os.kill(pids_of(url)[0], signal.SIGKILL)
        assert process.wait(PATIENCE) == 1
        assert "llama-server ended by itself, with status -9" in process.stderr.read()


def test_options_for_the_server(model: Path) -> None:
    NO_KEY = {"prompt": "x", "n_predict": 1}
    with served(model, options=["--api-key", "k"]) as (_, _, url):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/completion", NO_KEY)
        assert ask(f"{url}/completion", NO_KEY, Authorization="Bearer k")["tokens_predicted"] == 1
    command = [sys.executable, "-c", "from fasa_edge.cli import main; main()", "serve", "--port", "0", str(model), "--"]
    done = subprocess.run([*command, "--no-such-option"], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 1 and "--no-such-option" in done.stderr
    assert "llama-server ended with status 1 before it could answer" in done.stderr.splitlines()[-1]


def test_it_is_waited_for_below_a_prefix(model: Path) -> None:
    with served(model, options=["--api_prefix", "/below"]) as (_, _, url):
        assert url.startswith("http://127.0.0.1:") and url.endswith("/below")
        assert ask(f"{url}/v1/models")["data"]


def test_it_is_waited_for_behind_a_certificate_of_its_own(model: Path, tmp_path: Path) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("no openssl program, which makes the certificate")
    if b"built without SSL support" in find_program("server").read_bytes():
        pytest.skip("llama-server was built where there was no OpenSSL: it has no TLS")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    new = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*new, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with served(model, options=["--ssl-key-file", key, "--ssl-cert-file", certificate]) as (_, _, url):
        assert url.startswith("https://127.0.0.1:")
        assert ask(f"{url}/v1/models")["data"]


@pytest.mark.parametrize("host, url", [("::1", "http://[::1]:"), ("localhost", "http://localhost:")])
def test_the_address_that_it_says_is_a_url(model: Path, monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    class Server:
        def wait(self) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr(serve, "free_port", lambda host, port: 8081)  # of IPv6, which not every machine has
    monkeypatch.setattr(serve, "running", lambda *_: contextlib.nullcontext(Server()))
    result = CliRunner().invoke(main, ["serve", str(model), "--host", host])
    assert result.exit_code == 0 and f"\n{url}8081/v1 (OpenAI's API" in result.output, result.output


def test_a_folder_for_slots_is_made(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "slots"
    with served(model, options=["--slot-save-path", folder]) as (_, _, url):
        ask(f"{url}/completion", {"prompt": "x", "n_predict": 1, "id_slot": 0})
        assert ask(f"{url}/slots/0?action=save", {"filename": "a.bin"})["n_saved"] > 0
        assert (folder / "a.bin").is_file()
    (tmp_path / "file").touch()
    said = refused(model, "--port", 0, "--", "--slot-save-path", tmp_path / "file" / "slots")
    assert "slots cannot be made" in said and "--slot-save-path" in said


# What it refuses


def refused(*arguments: object) -> str:
    """The one line that it says; it must not come to starting a server, which would run on."""

    def start(*_: object) -> None:
        raise AssertionError("it was not refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "running", start)
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


@pytest.mark.parametrize("asked", [0, None])
def test_a_port_that_is_taken_while_a_model_is_annotated(
    model: Path, started: Started, monkeypatch: pytest.MonkeyPatch, asked: int | None
) -> None:
    """Of any that is free, another is taken; one that was asked for is refused, not left to llama-server."""
    asked = serving.free_port("127.0.0.1", 0) if asked is None else asked
    taken: list[int] = []
    first, call = serving.free_port, serve.call

    def free_port(host: str, port: int) -> int:
        taken.append(first(host, port))
        return taken[-1]

    with socket.socket() as other:

        def late(*arguments: Any, **named: Any) -> Any:
            other.bind(("127.0.0.1", taken[-1]))
            other.listen()
            return call(*arguments, **named)

        monkeypatch.setattr(serve, "free_port", free_port)
        monkeypatch.setattr(serve, "call", late)
        result = CliRunner().invoke(main, ["serve", str(model), "--port", str(asked)])
    if asked:
        assert result.exit_code == 1 and f"port {asked} of 127.0.0.1 cannot be taken" in result.output and not started
    else:
        assert result.exit_code == 0 and started.port == taken[-1] != taken[0]


@pytest.mark.parametrize(
    "option, ours",
    [
        ("--port", "--port"),
        ("--host=0.0.0.0", "--host"),
        ("--ctx_size", "-c"),
        ("-np", "--slots"),
        ("--n-gpu-layers", "-ngl"),
        ("--threads", "-t"),
        ("--model", "MODEL"),
        ("-hfr", "MODEL"),
        ("-mu", "MODEL"),
        ("--docker_repo", "MODEL"),
        ("--fim-qwen-3b-default", "MODEL"),
        ("--fasa", "--dense or --exact"),
        ("--fasa_budget", "--budget"),
        ("--fasa-profile", "--profile"),
        ("--override-kv=a.b=int:1,fasa.budget=int:32", "--budget"),
        ("--override-kv=fasa.enabled=bool:false", "--dense or --exact"),
    ],
)
def test_what_is_said_of_it_belongs_before_its_options(model: Path, started: Started, option: str, ours: str) -> None:
    words = option.split("=", 1) if option.startswith("--override-kv") else [option, "1"]
    result = CliRunner().invoke(main, ["serve", str(model), "--", *words])
    assert result.exit_code == 2 and f" belongs before --, as {ours}:" in result.output


@pytest.mark.parametrize("name", ["LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO"])
def test_another_model_in_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """llama-server would serve that one."""
    monkeypatch.setenv(name, "another")
    assert f"{name}=another names another model than {model}, which is to be served: unset it" in refused(model)


def test_more_context_than_the_model_was_trained_for(model: Path) -> None:
    said = refused(model, "--port", 0, "-c", N_CTX_TRAIN + 1)
    assert f"{N_CTX_TRAIN + 1} cells is more than the {N_CTX_TRAIN} that" in said
    assert f"lower -c to {N_CTX_TRAIN}" in said and "--rope-scaling yarn --rope-scale 2" in said


def test_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model at all")
    assert "x.gguf" in refused(tmp_path / "x.gguf", "--port", 0)


def test_too_little_memory(model: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limits", lambda: [memory.Available(1 << 20, "the machine's memory")])
    said = refused(model, "--port", 0)
    assert "memory does not hold" in said and "1048576 are left of the machine's memory" in said and "smaller" in said


def test_a_server_that_was_not_built(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasa_edge.runtime.programs.lib_dir", lambda: tmp_path)
    assert "make programs" in refused(model, "--port", 0)
    monkeypatch.setenv("FASA_LIB_PATH", str(tmp_path))
    assert f"FASA_LIB_PATH={tmp_path} says where: unset it" in refused(model, "--port", 0)


def test_programs_are_of_the_build_that_is_asked_for(tmp_path: Path) -> None:
    """With `FASA_LIB_PATH`: of another, by each of the two that start programs."""
    other = tmp_path / "lib"
    shutil.copytree(lib_dir(), other)
    (other / "fasa-llama-server").write_text("#!/bin/sh\necho another build: $@", encoding="utf-8")
    for command in (["fasa-llama-server"], ["fasa-edge", "llama", "server"]):
        words = [Path(sysconfig.get_path("scripts"), command[0]), *command[1:], "--help"]
        environment = os.environ | {"FASA_LIB_PATH": str(other)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE)
        assert done.stdout == "another build: --help\n"


# A model without a profile


class Started(list[str]):
    """Options of the server that would have been started, and its port."""

    port = 0


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process is asked for is done in this one, whose memory may be made up."""
    monkeypatch.setattr(serve, "call", lambda function, *arguments, **named: function(*arguments, **named))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, here: None) -> Started:
    """What would have been started; Ctrl-C is pressed at once."""
    seen = Started()

    @contextlib.contextmanager
    def running(host: str, port: int, arguments: Sequence[str]) -> Iterator[None]:
        seen[:], seen.port = arguments, port
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(serve, "running", running)
    return seen


@pytest.fixture
def plain(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plain.gguf"
    path.write_bytes(model.with_name("tiny.gguf").read_bytes())
    return path


def test_it_is_annotated_first(plain: Path, started: Started) -> None:
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


@pytest.mark.parametrize("arguments", [[], ["--convert"]])
@pytest.mark.parametrize(
    "state, said", [("stale", "is older"), ("plain", "has no FASA profile"), ("link", "is no file")]
)
def test_a_copy_that_cannot_be_served(
    plain: Path, model: Path, monkeypatch: pytest.MonkeyPatch, state: str, said: str, arguments: list[str]
) -> None:
    """It is said before anything is asked, with what `serve` and `convert` can do about it."""
    monkeypatch.setattr(serve, "_is_terminal", lambda: True)
    copy = plain.with_name("plain-fasa.gguf")
    if state == "link":
        copy.symlink_to(plain.with_name("nowhere.gguf"))
    else:
        copy.write_bytes((model if state == "stale" else plain).read_bytes())
        older = plain.stat().st_mtime_ns - 10**9 * (1 if state == "stale" else -1)
        os.utime(copy, ns=(older, older))
    message = refused(plain, "--port", 0, *arguments)
    assert f"{copy}, which would be served for {plain}, {said}: remove it, or" in message
    assert f"`fasa-edge convert --force {plain}`" in message and "--no-convert" in message


def test_it_takes_nothing_of_a_gpu_itself(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made a context there keeps memory until it ends: another process annotates and plans."""

    def here(*_: object, **__: object) -> None:
        raise AssertionError("it did that itself")

    @contextlib.contextmanager
    def running(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(convert, "convert", here)
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", here)
    monkeypatch.setattr(serve, "running", running)
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0", "--convert", "--slots", "1"])
    assert result.exit_code == 0 and f": 1 slot of {N_CTX_TRAIN} cells, " in result.output, result.output
    assert convert.inspect(plain.with_name("plain-fasa.gguf")).annotated


@pytest.mark.parametrize("arguments", [["--no-convert"], ["--dense"]])
def test_it_is_served_dense(plain: Path, started: Started, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0", *arguments])
    assert result.exit_code == 0 and "dense" in result.output
    assert started[started.index("--model") + 1] == str(plain)
    assert ("--fasa" in started) == (arguments == ["--dense"])


@pytest.mark.parametrize("answer", ["y", "n"])
def test_it_asks_on_a_terminal(plain: Path, started: Started, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(serve, "_is_terminal", lambda: True)
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0"], input=f"{answer}\n")
    assert result.exit_code == 0 and "Write an annotated copy" in result.output
    name = "plain-fasa.gguf" if answer == "y" else "plain.gguf"
    assert Path(started[started.index("--model") + 1]).name == name


def test_what_is_given_goes_to_the_server(model: Path, started: Started, free: Callable[..., None]) -> None:
    given = ["-c", "512", "--slots", "3", "-t", "7", "-ngl", "1"]
    result = CliRunner().invoke(main, ["serve", str(model), "--port", "0", *given, "--", "--cors_origins", "*"])
    assert result.exit_code == 0, result.output
    wanted = {"--ctx-size": 1536, "--parallel": 3, "--threads": 7, "--threads-batch": cpus.n_cpus(), "--gpu-layers": 1}
    assert {name: started[started.index(name) + 1] for name in wanted} == {k: str(v) for k, v in wanted.items()}
    assert "--cors-origins" not in started


def test_threads_are_of_the_cpus_that_it_may_use(
    model: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    result = CliRunner().invoke(main, ["serve", str(model), "--port", "0"])
    assert result.exit_code == 0 and ", 1 thread (1 for prompts), " in result.output
    assert [started[started.index(name) + 1] for name in ("--threads", "--threads-batch")] == ["1", "1"]


@pytest.mark.parametrize("n_mib, said", [(1 << 20, "all layers on the GPU"), (1, "1 of 3 layers on the GPU")])
def test_it_says_what_is_on_a_gpu(
    model: Path, started: Started, free: Callable[..., None], offload_device: int, n_mib: int, said: str
) -> None:
    free(on_device=n_mib << 20)
    result = CliRunner().invoke(main, ["serve", str(model), "--port", "0"])
    assert result.exit_code == 0 and f" of {N_CTX_TRAIN} cells, {said}, " in result.output
    assert started[started.index("--gpu-layers") + 1] == ("999" if said.startswith("all") else "1")


@pytest.mark.parametrize(
    "arguments, environment, how",
    [
        ([], {"FASA_BUDGET": "32"}, "budget 32"),
        (["--budget", "16"], {"FASA_BUDGET": "32"}, "budget 16"),
        ([], {"FASA": "off"}, "dense"),
        (["--budget", "16"], {"FASA": "off"}, "dense"),
        (["--exact"], {"FASA": "off"}, "budget 64"),
        (["--dense"], {"FASA": "on", "FASA_BUDGET": "32"}, "dense"),
        ([], {"FLASH_ATTN": "off"}, "dense"),
        (["--", "-fa", "off"], {}, "dense"),
        (["--", "-fa", "on"], {"FLASH_ATTN": "off"}, "budget 64"),
    ],
)
def test_it_says_what_the_server_does(
    model: Path, started: Started, arguments: list[str], environment: dict[str, str], how: str
) -> None:
    """The environment and llama-server's own options count, too."""
    variables = {f"LLAMA_ARG_{name}": value for name, value in environment.items()}
    result = CliRunner(env=variables).invoke(main, ["serve", str(model), "--port", "0", *arguments])
    assert result.exit_code == 0 and result.output.splitlines()[0].endswith(f" for prompts), {how}"), result.output


def test_a_profile_in_the_environment(model: Path, plain: Path, started: Started) -> None:
    runner = CliRunner(env={"LLAMA_ARG_FASA_PROFILE": str(model)})
    result = runner.invoke(main, ["serve", str(plain), "--port", "0"])
    assert result.exit_code == 0 and result.output.splitlines()[0].endswith(", budget 64"), result.output


def test_a_setting_in_the_environment_that_cannot_be(model: Path, started: Started) -> None:
    result = CliRunner(env={"LLAMA_ARG_FASA_BUDGET": "0"}).invoke(main, ["serve", str(model), "--port", "0"])
    assert result.exit_code == 2 and "LLAMA_ARG_FASA_BUDGET" in result.output and not started


def test_a_profile_beside_it(model: Path, plain: Path, tmp_path: Path, started: Started) -> None:
    result = CliRunner().invoke(main, ["serve", str(plain), "--port", "0", "--profile", str(model), "--budget", "32"])
    assert result.exit_code == 0 and "budget 32" in result.output
    assert started[started.index("--fasa-profile") + 1] == str(model)
    assert started[started.index("--fasa-budget") + 1] == "32"
