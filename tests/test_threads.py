"""Settings, counters and captures from other threads than the one that decodes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import fasa_edge
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi
from fasa_edge.runtime.capi import Capture
from fasa_edge.runtime.library import llama_cpp

import pytest
from conftest import _built
from runtime import TEXTS, Context, annotated_tiny

N_LAYER, N_PROMPT = 2, 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_layer=N_LAYER)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_four_threads_under_a_sanitizer(model: Path, sanitizer: str) -> None:
    """See threads.cpp: a data race, a use after free or undefined behaviour ends the program."""
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_container_overflow=0"}
    command = [_built(f"fasa-threads-{sanitizer}"), model]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "captures" in done.stdout


class Meanwhile:
    """Calls a function in another thread while llama_decode computes, once at the first node of a graph."""

    def __init__(self) -> None:
        self._function: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    def _on_node(self, _tensor: int | None, _ask: bool, _data: int | None) -> bool:
        if self._function:
            thread = Thread(target=self._run, args=(self._function,))
            self._function = None
            thread.start()
            thread.join()
        return False

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001, raised again in the test's own thread
            self._error = error

    def during(self, ctx: Context, pos: int, function: Callable[[], None]) -> dict[str, int]:
        """Decode a token; the layers that it ran, as :meth:`Context.reasons`."""
        self._function = function
        ctx.step(TEXTS[0][pos], pos)
        assert self._function is None, "no node was computed"
        if self._error:
            raise self._error
        return ctx.reasons()


@pytest.mark.check
def test_what_is_set_while_a_token_is_decoded_waits_for_the_next(model: Path) -> None:
    meanwhile = Meanwhile()

    with Context(model, cb_eval=meanwhile.callback) as ctx:
        ctx.read(TEXTS[0][:N_PROMPT])
        ctx.reasons()
        assert meanwhile.during(ctx, N_PROMPT, lambda: ctx.configure(enabled=False)) == {"none": N_LAYER}
        assert meanwhile.during(ctx, N_PROMPT + 1, lambda: ctx.configure(enabled=True)) == {"disabled": N_LAYER}
        assert meanwhile.during(ctx, N_PROMPT + 2, lambda: ctx.configure(policy="oracle")) == {"none": N_LAYER}
        assert capi.get_params(ctx.ctx).policy == "oracle"
        assert meanwhile.during(ctx, N_PROMPT + 3, lambda: None) == {"none": N_LAYER}


@pytest.mark.check
def test_counters_and_settings_are_read_and_captures_refused_meanwhile(model: Path) -> None:
    meanwhile, found = Meanwhile(), []

    def look() -> None:
        found.append((capi.get_stats(ctx.ctx).n_steps_decode, capi.get_params(ctx.ctx).budget))
        capi.reset_stats(ctx.ctx)
        for what in Capture:
            with pytest.raises(FasaError, match="another thread decodes"):
                capi.captured(ctx.ctx, 0, what)
        capi.set_capture(ctx.ctx)

    with Context(model, cb_eval=meanwhile.callback) as ctx:
        ctx.read(TEXTS[0][:N_PROMPT])
        ctx.reasons()
        capi.set_capture(ctx.ctx, *Capture)
        assert meanwhile.during(ctx, N_PROMPT, look) == {}  # counted before the first node, and reset
        assert found == [(1, capi.get_params(ctx.ctx).budget)]
        assert capi.captured(ctx.ctx, 0, Capture.Q).shape == (1, 4, 64)
        assert meanwhile.during(ctx, N_PROMPT + 1, lambda: None) == {"none": N_LAYER}
        assert capi.captured(ctx.ctx, 0, Capture.Q) is None


def test_a_shape_that_is_another_by_now_is_not_written(model: Path) -> None:
    ne, other = (ctypes.c_int64 * 3)(), (ctypes.c_int64 * 3)()
    data = (ctypes.c_float * (4 * 64 * 2))(*[-1.0] * (4 * 64 * 2))
    with Context(model) as ctx:
        capi.set_capture(ctx.ctx, Capture.Q)
        ctx.read(TEXTS[0][:1])
        assert capi._get_capture(ctx.ctx, 0, Capture.Q, ne, None) == 1
        ctx.read(TEXTS[0][1:3], start=1)
        assert capi._get_capture(ctx.ctx, 0, Capture.Q, ne, ctypes.addressof(data)) == -1
        assert set(data) == {-1.0}
        assert capi._get_capture(ctx.ctx, 0, Capture.Q, other, None) == 1
        assert (ne[2], other[2]) == (1, 2)
        assert capi._get_capture(ctx.ctx, 0, Capture.Q, other, ctypes.addressof(data)) == 1
        assert -1.0 not in data


def test_settings_of_two_threads_are_both_kept(model: Path) -> None:
    llm = fasa_edge.Llama(str(model), n_ctx=512, verbose=False)

    def count(name: str) -> None:
        for value in range(1, 301):
            llm.fasa.configure(**{name: value})
            assert llm.fasa.settings[name] == value

    threads = [Thread(target=count, args=(name,)) for name in ("min_ctx", "n_recent", "n_sink")]
    llm.fasa.configure(budget=1000)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settings = llm.fasa.settings
    assert [settings[name] for name in ("min_ctx", "n_recent", "n_sink", "budget")] == [300, 300, 300, 1000]
