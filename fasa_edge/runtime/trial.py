"""Loads a model in a process of its own first: on some damaged files llama.cpp ends the process that loads them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess

from fasa_edge.errors import ModelError
from fasa_edge.runtime import child
from fasa_edge.runtime.library import llama_cpp

_CRASHES = {
    -getattr(signal, name): name
    for name in ("SIGABRT", "SIGSEGV", "SIGFPE", "SIGBUS", "SIGILL")
    if hasattr(signal, name)
}


def try_model(path: str | os.PathLike[str]) -> None:
    """Refuses a model on which llama.cpp crashes; takes a third of a second.

    What is tried needs no weights: metadata, vocabulary, the graphs. Any other end says nothing here, since loading the
    model says it better.

    Raises:
        ModelError: it crashed; the message holds its last words.
    """
    done = subprocess.run(
        child.python(load, os.fspath(path)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # no debugger
        check=False,
    )
    if (name := _CRASHES.get(done.returncode)) is None:
        return
    said = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    words = f", saying {said[-1].strip()}" if said else ""
    raise ModelError(
        f"{path} is refused by llama.cpp, which ends with {name} on it{words}: the file is damaged, "
        "download or convert it again"
    )


def load(path: str) -> None:
    """Load a model without its weights, tokenize, and make the graphs of a context; in the child."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows
        pass
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    no_devices = (ctypes.c_void_p * 1)()
    params.devices = ctypes.addressof(no_devices)
    overrides = (llama_cpp.llama_model_kv_override * 2)()  # fasa.version = 0, and an empty one at the end
    overrides[0].key, overrides[0].tag = b"fasa.version", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    params.kv_overrides = overrides
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        return
    tokens, text = (llama_cpp.llama_token * 64)(), b"Hello, \xe4\xb8\x96! 12\n"
    vocab = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        llama_cpp.llama_tokenize(vocab, text, len(text), tokens, len(tokens), True, True)
    context = llama_cpp.llama_context_default_params()
    context.n_ctx = context.n_batch = context.n_ubatch = 256
    llama_cpp.llama_init_from_model(model, context)
