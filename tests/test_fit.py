"""How large a context is without ``n_ctx``: what it takes fits into what the host and each device have.

Devices are emulated GPUs, whose free memory is made up, and so is the host's; under real limits: ``test_memory.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fasa_edge
from fasa_edge.runtime import capi, fit

import pytest
from runtime import annotated_tiny
from tiny_models import Shape, make_model

pytestmark = pytest.mark.check

N_LAYER = 4
N_CTX_TRAIN = 1 << 16
_IGPU = 2  # GGML_BACKEND_DEVICE_TYPE_IGPU


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_layer=N_LAYER, n_ctx=N_CTX_TRAIN)


def load(path: Path, **kwargs) -> fasa_edge.Llama:
    return fasa_edge.Llama(str(path), n_threads=2, n_threads_batch=2, verbose=False, **kwargs)


@pytest.fixture
def device(offload_device: int) -> int:
    """``ggml_backend_dev_t`` on which models are loaded."""
    return offload_device


@contextmanager
def integrated(device: int) -> Iterator[None]:
    """The device's memory is the host's."""
    # struct ggml_backend_device_i: get_name, get_description, get_memory, get_type, get_props (ggml-backend-impl.h)
    slots = ctypes.cast(device, ctypes.POINTER(ctypes.c_void_p))
    original = slots[4]
    props_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)

    @props_type
    def get_props(device: int, props: int) -> None:
        props_type(original)(device, props)
        # struct ggml_backend_dev_props: two strings and two sizes, then the type
        ctypes.c_int.from_address(props + 4 * ctypes.sizeof(ctypes.c_void_p)).value = _IGPU

    slots[4] = ctypes.cast(get_props, ctypes.c_void_p).value
    try:
        yield
    finally:
        slots[4] = original


def taken(llm: fasa_edge.Llama, device: int | None) -> tuple[int, int]:
    """Bytes of a context and for computing, on a device, or None: on the host."""
    kinds = [kind for kind in capi.memory(llm.ctx) if kind.device == device]
    return sum(kind.context for kind in kinds), sum(kind.compute for kind in kinds)


def test_what_a_context_takes(model: Path) -> None:
    llm = load(model, n_ctx=4096)
    context, compute = taken(llm, None)
    assert context == 4096 * N_LAYER * 2 * 2 * 64 * 2 + llm.fasa.stats().tips_size  # 2 KV heads, K and V, f16
    assert compute > 0
    llm.close()
    with pytest.raises(fasa_edge.FasaError, match="closed"):
        capi.memory(None)


def test_the_models_own_where_there_is_room(model: Path, free) -> None:
    llm = load(model)
    assert llm.n_ctx() == llm._n_ctx == len(llm.input_ids) == N_CTX_TRAIN
    assert llm._model.n_ctx_train() == N_CTX_TRAIN


SETTINGS = [{}, {"type_k": 8, "type_v": 8}, {"fasa_n_tip": 24}, {"n_batch": 64}, {"use_mmap": False}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_on_the_host(model: Path, free, settings: dict[str, object]) -> None:
    """The largest context that takes half of what is free beside the weights and for computing; tips count."""
    wanted = load(model, n_ctx=10240, **settings)
    context, compute = taken(wanted, None)
    mapped = sum(kind.model for kind in capi.memory(wanted.ctx)) if settings.get("use_mmap", True) else 0
    free(host=mapped + 2 * context + compute)
    llm = load(model, **settings)
    assert llm.n_ctx() == len(llm.input_ids) == 10240 and llm._model.n_ctx_train() == N_CTX_TRAIN
    assert llm.n_batch == wanted.n_batch and llm("a", max_tokens=2)["usage"]["completion_tokens"] > 0
    free(host=mapped + 2 * context + compute - 64)
    assert load(model, **settings).n_ctx() == 10240 - 256
    free(host=0)
    assert load(model, **settings).n_ctx() == 256
    # weights are in it already; not so logits, and a batch, whose tokens have room for n_ctx sequences each
    own = 4 * settings.get("n_batch", 512) * (llm.n_vocab() + 10240) + (72 << 20)  # and a thread
    free(address_space=own + 2 * context + compute)
    assert load(model, **settings).n_ctx() == 10240
    free(address_space=own + 2 * context + compute - 64)
    assert load(model, **settings).n_ctx() == 10240 - 256


def test_the_profile_beside_a_model_counts(tmp_path: Path, model: Path, free) -> None:
    bare = make_model(tmp_path / "bare.gguf", "llama", Shape(n_layer=N_LAYER, n_ctx=N_CTX_TRAIN))
    llm = load(bare, n_ctx=8192)
    context, compute = taken(llm, None)
    free(host=sum(kind.model for kind in capi.memory(llm.ctx)) + 2 * context + compute)
    llm.close()
    assert load(bare).n_ctx() == 8192 > load(bare, fasa_profile=model).n_ctx() > 4096


@pytest.mark.parametrize("n_gpu_layers, offload_kqv", [(3, True), (N_LAYER + 1, True), (-1, True), (-1, False)])
def test_on_a_device(model: Path, device: int, free, n_gpu_layers: int, offload_kqv: bool) -> None:
    """Each has what its layers take; the smaller context wins."""
    settings = {"n_gpu_layers": n_gpu_layers, "offload_kqv": offload_kqv}
    wanted = load(model, n_ctx=10240, **settings)
    (context, compute), (host, host_compute) = taken(wanted, device), taken(wanted, None)
    mapped = sum(kind.model for kind in capi.memory(wanted.ctx) if not kind.device)
    assert (context > 0) == offload_kqv and (host > 0) == (not offload_kqv or n_gpu_layers == 3)

    needed = -(-(context + compute) * 4 // 3)  # a quarter stays free
    free(on_device=needed)
    n_ctx = load(model, **settings).n_ctx()
    assert n_ctx == 10240 if offload_kqv else n_ctx >= 10240
    free(on_device=needed - 1024)
    assert load(model, **settings).n_ctx() < n_ctx
    free(host=mapped + (host_compute + 2 * host if host else 32 * host_compute))
    n_ctx = load(model, **settings).n_ctx()
    assert n_ctx == 10240 if host else n_ctx == N_CTX_TRAIN


def test_a_device_that_shares_the_hosts_memory(model: Path, device: int, free) -> None:
    """It counts on both sides: memory is there once."""
    llm = load(model, n_ctx=10240, n_gpu_layers=-1)
    kinds = capi.memory(llm.ctx)
    context, compute = sum(kind.context for kind in kinds), sum(kind.compute for kind in kinds)
    mapped = sum(kind.model for kind in kinds if not kind.device)
    with integrated(device):
        free(host=mapped + 2 * context + compute)
        assert load(model, n_gpu_layers=-1).n_ctx() == 10240
        free(on_device=(context + compute) * 2 // 3)
        assert load(model, n_gpu_layers=-1).n_ctx() < 10240
    free(host=mapped + 2 * context + compute)
    assert load(model, n_gpu_layers=-1).n_ctx() > 10240


GIB = 1 << 30


@pytest.mark.parametrize("n_free, n_left", [(8 * GIB, GIB), (4 * GIB, GIB), (2 * GIB, GIB // 2), (0, 0)])
def test_what_a_device_keeps(n_free: int, n_left: int) -> None:
    """A gigabyte, or a quarter, for what ggml takes while it computes."""
    room = fit.Room([], lambda device: n_free, maps=True, n_threads=0, is_loaded=True)

    def kind(context: int) -> capi.Memory:
        return capi.Memory(device=1, is_host=False, can_map=False, model=0, context=context, compute=0)

    assert room.holds([kind(n_free - n_left)])
    assert not room.holds([kind(n_free - n_left + 1)])
