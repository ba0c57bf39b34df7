"""Layers on two devices: tips live where a layer's K lives.

To llama.cpp the second device is a GPU like any other. It is another process' CPU behind ggml's RPC backend, which
shares no memory with this one, or an emulated GPU, which runs the kernels of a GPU.
"""

from __future__ import annotations

import ctypes
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasa_edge.convert import convert
from fasa_edge.runtime import library
from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from launches import ROWS_STORE, SELECT_ATTEND, launches
from runtime import GGML_TYPES, TEXTS, Context, annotated_tiny, check, fresh_steps, load, save

N_LAYER = 4
N_PROMPT = 700
STEPS = TEXTS[0][N_PROMPT : N_PROMPT + 3]

# Runs in a child process: offers the CPU.
_SERVER = """
import ctypes, sys
import fasa_edge
from fasa_edge.runtime.library import llama_cpp
lib, rpc = llama_cpp.llama_cpp._lib, ctypes.CDLL(sys.argv[1])
lib.ggml_backend_dev_get.restype = ctypes.c_void_p
devices = (ctypes.c_void_p * 1)(lib.ggml_backend_dev_get(ctypes.c_size_t(0)))
rpc.ggml_backend_rpc_start_server(sys.argv[2].encode(), None, ctypes.c_size_t(1), ctypes.c_size_t(1), devices)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def rpc_device(rpc_lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """``ggml_backend_dev_t`` of another process' CPU."""
    port = _free_port()
    command = [sys.executable, "-c", _SERVER, rpc_lib, f"127.0.0.1:{port}"]
    folder = tmp_path_factory.mktemp("server")
    with (folder / "log").open("wb") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + 30
            while server.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert time.monotonic() < deadline, f"no server on port {port}: {(folder / 'log').read_text()}"
                time.sleep(0.1)
            assert server.poll() is None, (folder / "log").read_text()
            rpc, lib = ctypes.CDLL(str(rpc_lib)), library.llama_cpp.llama_cpp._lib
            rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
            lib.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
            reg = ctypes.c_void_p(rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode()))
            yield lib.ggml_backend_reg_dev_get(reg, ctypes.c_size_t(0))
        finally:
            server.kill()


@pytest.fixture(scope="module", params=["RPC0", "SIMT-CUDA", "SIMT-METAL"])
def device(request: pytest.FixtureRequest) -> int:
    """``ggml_backend_dev_t`` of the second device."""
    if request.param == "RPC0":
        return request.getfixturevalue("rpc_device")
    return request.getfixturevalue("simt_devices")[request.param]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_layer=N_LAYER)


@contextmanager
def called(device: int, name: bytes) -> Iterator[None]:
    """Gives the device's backend another name: FASA leaves RPC alone, whose servers may know nothing of its ops."""
    lib = library.llama_cpp.llama_cpp._lib
    lib.ggml_backend_dev_backend_reg.restype = ctypes.c_void_p
    # struct ggml_backend_reg: api_version, then its functions, get_name the first (ggml-backend-impl.h)
    slots = ctypes.cast(lib.ggml_backend_dev_backend_reg(ctypes.c_void_p(device)), ctypes.POINTER(ctypes.c_void_p))
    text, original = ctypes.create_string_buffer(name), slots[1]
    get_name = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: ctypes.addressof(text))
    slots[1] = ctypes.cast(get_name, ctypes.c_void_p)
    try:
        yield
    finally:
        slots[1] = original


def on_device(model: Path, device: int, n_gpu_layers: int, **params) -> Context:
    """A context with so many layers on the device, the output counting as one."""
    devices = (ctypes.c_void_p * 2)(device, None)
    return Context(model, {"devices": ctypes.cast(devices, ctypes.c_void_p), "n_gpu_layers": n_gpu_layers}, **params)


def steps(ctx: Context) -> np.ndarray:
    ctx.reasons()
    return np.stack([ctx.step(token, N_PROMPT + i) for i, token in enumerate(STEPS)])


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
@pytest.mark.parametrize("n_gpu_layers", [2, N_LAYER + 1])
def test_layers_on_a_device_decode_as_on_the_cpu(model: Path, device: int, n_gpu_layers: int, type_k: str) -> None:
    types = {"type_k": GGML_TYPES[type_k]}
    wanted = fresh_steps(model, TEXTS[0][:N_PROMPT], *STEPS, **types)
    with called(device, b"GPU"), on_device(model, device, n_gpu_layers, **types) as ctx:
        ctx.read(TEXTS[0][:N_PROMPT])
        state = save(ctx)
        check(wanted, steps(ctx))
        assert ctx.reasons() == {"none": N_LAYER * len(STEPS)}
        load(ctx, state)  # makes the tips again, on the device
        check(wanted, steps(ctx))
        assert ctx.reasons() == {"none": N_LAYER * len(STEPS)}


@contextmanager
def logged() -> Iterator[list[str]]:
    """What llama.cpp logs."""
    lines: list[str] = []
    callback, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    ours = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    llama_cpp.llama_log_set(ours, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(callback, user_data)


@pytest.mark.parametrize("n_gpu_layers", [0, 2])
def test_prompts_that_are_not_read_by_blocks_say_so_once(model: Path, device: int, n_gpu_layers: int) -> None:
    with called(device, b"GPU"), on_device(model, device, n_gpu_layers) as ctx, logged() as lines:
        ctx.read(TEXTS[0][:300])
        ctx.configure(prompt_mass=900)
        for start in (300, 400):
            ctx.read(TEXTS[0][start : start + 100], start=start)
        n_there = max(n_gpu_layers - 1, 0)
        assert ctx.reasons() == {"prompt": N_LAYER + 2 * n_there, "none": 2 * (N_LAYER - n_there)}
    said = [line for line in lines if "fasa.prompt_mass has no effect on layer" in line]
    assert len(said) == bool(n_gpu_layers)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "bf16"), ("f16", "q8_0")])
@pytest.mark.parametrize("n_gpu_layers", [3, N_LAYER + 1])
def test_cuda_launches_of_a_decode_step(
    model: Path, simt_devices: dict[str, int], n_gpu_layers: int, types: tuple[str, str]
) -> None:
    """One for the rows of V and the tips, if neither K nor V is quantized, and one for all of sparse attention."""
    n_layer = n_gpu_layers - 1
    params = {"type_k": GGML_TYPES[types[0]], "type_v": GGML_TYPES[types[1]]}
    stored = {"FASA_STORE" if "q8_0" in types else ROWS_STORE: n_layer}
    tokens = enumerate(TEXTS[0][N_PROMPT:], N_PROMPT)

    with on_device(model, simt_devices["SIMT-CUDA"], n_gpu_layers, **params) as ctx:

        def step() -> tuple[dict[str, int], dict[str, int]]:
            pos, token = next(tokens)
            with launches() as launched:
                ctx.step(token, pos)
            return launched, ctx.reasons()

        with launches() as launched:
            ctx.read(TEXTS[0][:N_PROMPT])
        assert launched == {"FASA_STORE": 2 * n_layer}  # of two batches, too many rows for one launch
        ctx.reasons()
        for _ in range(3):
            launched, reasons = step()
            assert (launched, reasons) == (stored | {SELECT_ATTEND: n_layer}, {"none": N_LAYER})
        ctx.configure(min_ctx=4096)
        assert step() == (stored, {"short_context": N_LAYER})
        ctx.configure(enabled=False)
        assert step() == (stored, {"disabled": N_LAYER})


def test_tips_live_where_k_lives(model: Path, device: int, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["device"]
    lines: list[str] = []
    collect = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        with called(device, b"GPU"), on_device(model, device, 3):  # two layers and the output
            pass
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    found = {}
    for line in lines:
        if match := re.search(r"([\w-]+)\S* (tip|KV) buffer size = +([\d.]+) MiB", line):
            found[match[1], match[2]] = match[3]
    assert found.keys() == {("CPU", "tip"), (name, "tip"), ("CPU", "KV"), (name, "KV")}
    assert found["CPU", "tip"] == found[name, "tip"] and found["CPU", "KV"] == found[name, "KV"]


def test_layers_on_a_device_without_the_ops_run_dense(model: Path, rpc_device: int) -> None:
    with on_device(model, rpc_device, 3) as ctx:
        ctx.read(TEXTS[0][:N_PROMPT])
        steps(ctx)
        assert ctx.reasons() == {"none": 2 * len(STEPS), "backend": 2 * len(STEPS)}


def test_a_model_on_a_device_is_converted_as_on_the_cpu(
    model: Path, simt_devices: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured comes from there; the check, too, runs there."""
    device = simt_devices["SIMT-CUDA"]  # a renamed RPC device claims ops that are functions of this process
    devices = (ctypes.c_void_p * 2)(device, None)
    loaded: list[int] = []
    load_model = llama_cpp.llama_cpp.llama_model_load_from_file

    def on_the_device(path: bytes, params: llama_cpp.llama_model_params) -> int:
        loaded.append(params.n_gpu_layers)
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        return load_model(path, params)

    wanted = convert(model, profile=tmp_path / "cpu.gguf", tokens=512, force=True)
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_load_from_file", on_the_device)
    with called(device, b"GPU"):
        found = convert(model, profile=tmp_path / "gpu.gguf", tokens=512, force=True, n_gpu_layers=N_LAYER + 1)
    assert loaded.count(N_LAYER + 1) == 2 and found.check and wanted.check
    assert found.check.kl == pytest.approx(wanted.check.kl, abs=1e-3)
    for mine, other in zip(found.profile.chunks, wanted.profile.chunks, strict=True):
        assert (mine == other).mean() > 0.9
    for mine, other in zip(found.profile.centre, wanted.profile.centre, strict=True):
        assert np.abs(mine - other).max() < 0.02 * np.abs(other).max()
