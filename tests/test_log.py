"""What loading a model does to the process around it: nothing. Its file descriptors and log callback are its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import fasa_edge
from fasa_edge.errors import ModelError
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import error_log, quiet_log, unheard

import pytest
from runtime import annotated_tiny

pytestmark = pytest.mark.check


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"))


class Application:
    """A program with a log callback of its own, and data that it gives it."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.data = ctypes.c_int(42)
        self.callback = llama_cpp.llama_log_callback(self._hear)
        self.set()

    def _hear(self, level: int, text: bytes, user_data: int) -> None:
        self.lines.append((text.decode(), ctypes.c_int.from_address(user_data).value))

    def set(self) -> None:
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(ctypes.addressof(self.data)))

    @property
    def is_set(self) -> bool:
        return installed() == (ctypes.cast(self.callback, ctypes.c_void_p).value, ctypes.addressof(self.data))


def installed() -> tuple[int | None, int | None]:
    """The log callback and its user data."""
    callback, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    return ctypes.cast(callback, ctypes.c_void_p).value, user_data.value


@pytest.fixture
def application() -> Iterator[Application]:
    yield Application()
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


def load_missing(name: str) -> None:
    assert not llama_cpp.llama_model_load_from_file(name.encode(), llama_cpp.llama_model_default_params())


# File descriptors


@pytest.mark.parametrize("verbose", [False, True])
def test_loading_leaves_file_descriptors_alone(model: Path, verbose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int) -> int:
        raise AssertionError(f"a file descriptor was duplicated: {args}")

    with monkeypatch.context() as patch:  # pytest duplicates some in the end
        patch.setattr(os, "dup", refuse)
        patch.setattr(os, "dup2", refuse)
        patch.setattr(llama_cpp.Llama, "_Llama__backend_initialized", False)
        fasa_edge.Llama(str(model), verbose=verbose)
        fasa_edge.Llama(str(model), fasa_profile=model, verbose=verbose)
        llama_cpp.Llama(str(model), verbose=verbose)
        with pytest.raises(ModelError):
            fasa_edge.Llama(__file__, verbose=verbose)


_CLOSED = """
import os, sys
import fasa_edge
for fd in 0, 1, 2:
    os.close(fd)
llm = fasa_edge.Llama(sys.argv[1], verbose=False)
with open(sys.argv[2], "w") as file:
    file.write(str(llm.n_ctx()))
"""


def test_a_process_without_standard_streams_loads(model: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _CLOSED, model, tmp_path / "n_ctx"], cwd=tmp_path, check=True)
    assert (tmp_path / "n_ctx").read_text() == str(fasa_edge.Llama(str(model), verbose=False).n_ctx())


def test_a_quiet_load_prints_nothing(model: Path, capfd: pytest.CaptureFixture) -> None:
    for cls in (fasa_edge.Llama, llama_cpp.Llama):
        cls(str(model), n_ctx=512, verbose=False)
        with pytest.raises(ValueError):
            cls(__file__, n_ctx=512, verbose=False)
    fasa_edge.Llama(str(model), verbose=False)
    assert capfd.readouterr() == ("", "")
    fasa_edge.Llama(str(model), verbose=True)
    assert "llama_model_loader" in capfd.readouterr().err


# The log callback


@pytest.mark.parametrize("verbose", [False, True])
def test_the_applications_callback_hears_all_and_stays(model: Path, application: Application, verbose: bool) -> None:
    for load in (fasa_edge.Llama, llama_cpp.Llama):
        application.lines.clear()
        load(str(model), n_ctx=512, verbose=verbose)
        assert application.is_set
        assert any("llama_model_loader" in line for line, _ in application.lines)
    with pytest.raises(ModelError):
        fasa_edge.Llama(__file__, verbose=verbose)
    assert application.is_set
    assert {data for _, data in application.lines} == {42}


def test_a_callback_set_during_a_load_stays(application: Application) -> None:
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    with quiet_log():
        application.set()
    assert application.is_set
    with error_log() as lines:
        load_missing("a.gguf")
    assert application.is_set and "a.gguf" in lines[0] and any("a.gguf" in line for line, _ in application.lines)


def test_errors_of_what_is_only_tried_are_not_collected(application: Application) -> None:
    with error_log() as lines:
        with unheard():
            load_missing("a.gguf")
        assert not lines
        load_missing("b.gguf")
    assert "b.gguf" in lines[0] and any("a.gguf" in line for line, _ in application.lines)


def test_threads_that_load_at_once_keep_their_errors_apart(application: Application) -> None:
    both = Barrier(2, timeout=60)

    def fail(name: str) -> list[str]:
        with error_log() as lines:
            both.wait()
            load_missing(name)
            both.wait()
        return lines

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(fail, ("a.gguf", "b.gguf"))
    assert a and b and not any("b.gguf" in line for line in a) and not any("a.gguf" in line for line in b)
    assert any("a.gguf" in line for line in a) and any("b.gguf" in line for line in b)
    assert application.is_set
    load_missing("c.gguf")
    assert len(a) == len(b) and any("c.gguf" in line for line, _ in application.lines)


def test_threads_end_their_loads_in_any_order(application: Application) -> None:
    first, second = error_log(), error_log()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    load_missing("a.gguf")
    second.__exit__(None, None, None)
    assert application.is_set and application.lines


def test_a_quiet_load_mutes_its_own_thread_only(capfd: pytest.CaptureFixture) -> None:
    llama_cpp._logger.set_verbose(True)
    with ThreadPoolExecutor(1) as pool, quiet_log():
        load_missing("a.gguf")
        pool.submit(load_missing, "b.gguf").result()
    llama_cpp._logger.set_verbose(False)
    err = capfd.readouterr().err
    assert "b.gguf" in err and "a.gguf" not in err
