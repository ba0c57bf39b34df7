"""FASA (Frequency-Aware Sparse Attention, arXiv 2602.03152) for llama.cpp and GGUF.

Importing this package puts the patched llama.cpp under ``llama_cpp``, so it has to come first::

    import fasa_edge

    llm = fasa_edge.Llama("model-fasa.gguf")

A program that keeps using ``llama_cpp.Llama`` decodes sparsely as well, if the model carries a FASA profile and flash
attention is on.
"""

from pathlib import Path

from fasa_edge.config import FasaConfig
from fasa_edge.errors import (
    AdapterError,
    ChatError,
    ConvertError,
    EvalError,
    FasaError,
    LibraryError,
    ModelError,
    SchemaError,
)
from fasa_edge.runtime.llama import Fasa, FasaStats, Llama
from fasa_edge.runtime.store import DocumentCache, DocumentStore, StoreReport
from fasa_edge.version import __version__

if (
    not Path(__file__).with_name("convert").is_dir()
    and Path(__file__).parents[1].joinpath("convert/__init__.py").is_file()
):
    __path__.append(str(Path(__file__).parents[1]))  # a clone, where it lies beside this folder

__all__ = [
    "AdapterError",
    "ChatError",
    "ConvertError",
    "DocumentCache",
    "DocumentStore",
    "EvalError",
    "Fasa",
    "FasaConfig",
    "FasaError",
    "FasaStats",
    "LibraryError",
    "Llama",
    "ModelError",
    "SchemaError",
    "StoreReport",
    "__version__",
]
