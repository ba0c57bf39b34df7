"""The exceptions of fasa-edge. Every message names the value, the limit and the remedy."""


class FasaError(Exception):
    """Base of everything that fasa-edge raises on purpose; catch this one at the outermost level."""


class ConvertError(FasaError):
    """A model cannot be converted: its file is damaged, it has no usable RoPE, or the output cannot be written."""


class SchemaError(FasaError, ValueError):
    """A ``fasa.*`` value is missing, of the wrong type or out of range."""


class ModelError(FasaError, ValueError):
    """llama.cpp cannot load a model; a ``ValueError`` as ``llama_cpp.Llama`` raises."""


class AdapterError(FasaError, RuntimeError):
    """llama.cpp cannot load a LoRA adapter; a ``RuntimeError`` as ``llama_cpp.Llama`` raises."""


class ChatError(FasaError, ValueError):
    """A chat cannot go on: its context is full, or the model's chat format refuses it."""


class ContextFullError(FasaError, RuntimeError):
    """There are more tokens than the context has cells; a ``RuntimeError`` as ``llama_cpp.Llama`` raises."""


class LibraryError(FasaError):
    """The patched llama.cpp library is missing, or it is not the one that these Python files were made for."""


class EvalError(FasaError, ValueError):
    """A task cannot be made: too short a length or text, an unknown task, a file of prompts with a mistake."""
