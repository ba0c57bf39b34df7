"""A pytest plugin that runs llama-cpp-python's own tests on our library: `make test-bindings`.

Those tests download the models they run. Here every one is stood in for by a model at hand, annotated where it has
attention, and run by `fasa_edge.Llama` with settings that make contexts as short as theirs sparse.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import fasa_edge  # before llama_cpp, which the tests import

import huggingface_hub
import llama_cpp
import pytest
from conftest import model_path  # noqa: F401  the small model of `make model`
from tiny_models import Shape, make_model
from unchecked import convert

SPARSE = {"fasa_budget": 8, "fasa_min_ctx": 1, "fasa_n_sink": 1, "fasa_n_recent": 2, "fasa_n_dense_layers": 0}

# What only the weights that upstream names can answer. The unpatched library fails them with our models as well.
DESELECTED = {
    "test_llama.py::test_real_model": "token ids of Qwen3.5's vocabulary",
    "test_llama.py::test_real_llama": "a sentence as Qwen3.5 goes on with it",
    "test_llama.py::test_real_llama_repeated_prompt_cache": "the same sentence",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out DESELECTED, each of which must exist."""
    out = {item for item in items for name in DESELECTED if item.nodeid.endswith(name)}
    assert len(out) == len(DESELECTED), "upstream's tests were renamed: correct DESELECTED"
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="session", autouse=True)
def models(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """The model for each repository that upstream's fixtures ask for."""
    folder = tmp_path_factory.mktemp("models")
    shape = Shape(n_embd_head=32, n_ctx=1024)

    def tiny(arch: str, **keys: object) -> Path:
        return make_model(folder / f"{arch}.gguf", arch, shape, **keys)

    def annotated(path: Path) -> Path:
        return convert(path, folder / f"{path.stem}-fasa.gguf", tokens=512).path

    mean_pooling = 1
    return {
        "ggml-org/models": annotated(model_path),
        "QuantFactory/mamba-130m-hf-GGUF": tiny("mamba"),
        "tiiuae/Falcon-H1-Tiny-90M-Instruct-GGUF": annotated(tiny("lfm2")),
        "CompendiumLabs/bge-small-en-v1.5-gguf": annotated(tiny("llama", llama__pooling_type=mean_pooling)),
    }


@pytest.fixture(autouse=True)
def hub(models: dict[str, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the download, which a test module has imported by name, and for the class that runs the model."""

    def download(repo_id: str, filename: str) -> str:
        monkeypatch.setattr(llama_cpp, "Llama", partial(fasa_edge.Llama, **SPARSE))
        return str(models[repo_id])

    for module in (huggingface_hub, request.module):
        monkeypatch.setattr(module, "hf_hub_download", download, raising=False)
