"""Layers on two devices: tips live where a layer's K lives.

The second device is the CPU of another process behind ggml's RPC backend: to llama.cpp it is a GPU like any other.
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fasa_edge import _lib

import numpy as np
import pytest
from runtime import TEXTS, Context, annotated_tiny, check, fresh_steps

N_LAYER = 4
N_PROMPT = 700
STEPS = TEXTS[0][N_PROMPT : N_PROMPT + 3]

# Runs in a child process: offers the CPU.
_SERVER = """
import ctypes, sys
import fasa_edge
from fasa_edge._lib import llama_cpp
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
def device(rpc_lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """``ggml_backend_dev_t`` of the second device."""
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
            rpc, lib = ctypes.CDLL(str(rpc_lib)), _lib.llama_cpp.llama_cpp._lib
            rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
            lib.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
            reg = ctypes.c_void_p(rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode()))
            yield lib.ggml_backend_reg_dev_get(reg, ctypes.c_size_t(0))
        finally:
            server.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_layer=N_LAYER)


def steps_on(model: Path, device: int, n_gpu_layers: int) -> tuple[np.ndarray, dict[str, int]]:
    """Logits of :data:`STEPS` and what the layers did, with so many layers on the device."""
    devices = (ctypes.c_void_p * 2)(device, None)
    model_params = {"devices": ctypes.cast(devices, ctypes.c_void_p), "n_gpu_layers": n_gpu_layers}
    with Context(model, model_params) as ctx:
        ctx.read(TEXTS[0][:N_PROMPT])
        ctx.reasons()
        logits = np.stack([ctx.step(token, N_PROMPT + i) for i, token in enumerate(STEPS)])
        return logits, ctx.reasons()


@pytest.mark.parametrize("n_gpu_layers", [2, N_LAYER + 1])
def test_layers_on_a_device_decode_as_on_the_cpu(model: Path, device: int, n_gpu_layers: int) -> None:
    logits, reasons = steps_on(model, device, n_gpu_layers)
    assert reasons == {"none": N_LAYER * len(STEPS)}
    check(fresh_steps(model, TEXTS[0][:N_PROMPT], *STEPS), logits)


def test_layers_on_a_device_without_the_ops_run_dense(model: Path, device: int) -> None:
    lib = _lib.llama_cpp.llama_cpp._lib
    lib.ggml_op_desc.restype = ctypes.c_char_p
    supports_op_type = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)

    def supports_op(_: int, op: int) -> bool:
        return not lib.ggml_op_desc(ctypes.c_void_p(op)).startswith(b"FASA_")

    # struct ggml_backend_device begins with its functions; supports_op is the tenth (ggml-backend-impl.h)
    slot = ctypes.cast(device, ctypes.POINTER(ctypes.c_void_p))
    callback, original = supports_op_type(supports_op), slot[9]
    slot[9] = ctypes.cast(callback, ctypes.c_void_p)
    try:
        _, reasons = steps_on(model, device, 3)  # two layers and the output
    finally:
        slot[9] = original
    assert reasons == {"none": 2 * len(STEPS), "backend": 2 * len(STEPS)}
