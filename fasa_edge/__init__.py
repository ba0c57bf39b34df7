"""FASA (Frequency-Aware Sparse Attention, arXiv 2602.03152) for llama.cpp and GGUF.

Importing this package puts the patched llama.cpp under ``llama_cpp``, so it has to come first::

    import fasa_edge

    llm = fasa_edge.Llama("model-fasa.gguf")

A program that keeps using ``llama_cpp.Llama`` decodes sparsely as well, if the model carries a FASA profile and flash
attention is on.
"""

from importlib.metadata import PackageNotFoundError, version

from fasa_edge import _lib  # noqa: F401  first: it decides which libllama the process gets
from fasa_edge.config import FasaConfig
from fasa_edge.errors import AdapterError, ChatError, ConvertError, FasaError, LibraryError, ModelError, SchemaError
from fasa_edge.model import Fasa, FasaStats, Llama

try:
    __version__ = version("fasa-edge")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "AdapterError",
    "ChatError",
    "ConvertError",
    "Fasa",
    "FasaConfig",
    "FasaError",
    "FasaStats",
    "LibraryError",
    "Llama",
    "ModelError",
    "SchemaError",
    "__version__",
]
