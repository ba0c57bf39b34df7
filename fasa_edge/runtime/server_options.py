"""Options of llama-server that what starts it has to know of, among the words of a command line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence

from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp

_ROPE_SCALINGS = ("none", "linear", "yarn")  # enum llama_rope_scaling_type, as common/arg.cpp names it

_FLASH_ATTN = {  # enum llama_flash_attn_type, likewise
    **dict.fromkeys(("on", "enabled", "true", "1"), llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
    **dict.fromkeys(("off", "disabled", "false", "0"), llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
    **dict.fromkeys(("auto", "-1"), llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO),
}


def _cache_type(name: str) -> int:
    return capi.cache_type(capi.CACHE_TYPES[capi.CACHE_TYPES.index(name)])


_OF_CONTEXT: tuple[tuple[str, tuple[str, ...], str, Callable[[str], float]], ...] = (
    ("rope_scaling_type", ("--rope-scaling",), "LLAMA_ARG_ROPE_SCALING_TYPE", _ROPE_SCALINGS.index),
    ("rope_freq_scale", ("--rope-scale",), "LLAMA_ARG_ROPE_SCALE", lambda text: 1 / float(text)),
    ("rope_freq_scale", ("--rope-freq-scale",), "LLAMA_ARG_ROPE_FREQ_SCALE", float),
    ("yarn_orig_ctx", ("--yarn-orig-ctx",), "LLAMA_ARG_YARN_ORIG_CTX", int),
    ("flash_attn_type", ("-fa", "--flash-attn"), "LLAMA_ARG_FLASH_ATTN", _FLASH_ATTN.__getitem__),
    ("type_k", ("-ctk", "--cache-type-k"), "LLAMA_ARG_CACHE_TYPE_K", _cache_type),
    ("type_v", ("-ctv", "--cache-type-v"), "LLAMA_ARG_CACHE_TYPE_V", _cache_type),
)
"""A field of ``llama_context_params``, the names of the option that sets it, its environment variable, its values."""


class ServerOptions:
    """Words of a command line, and the environment, which llama-server reads first.

    Args:
        words: of the command line.
        environ: the environment.
    """

    def __init__(self, words: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
        # llama-server takes underscores for dashes in the names of its options; those of values do not matter here
        self._words = [_name(word) for word in words]
        self._values = list(words)
        self._environ = dict(environ)

    def given(self, *names: str) -> list[str]:
        """List which of some options, or keys of ``--override-kv``, are among the words."""
        return [word for word in self._words if any(part.partition("=")[0] in names for part in word.split(","))]

    def environment(self, *names: str) -> dict[str, str]:
        """Return which of some environment variables are set, and their values."""
        return {name: self._environ[name] for name in names if self._environ.get(name)}

    def value(self, *names: str, env: str = "") -> str | None:
        """Return the value of an option, the last one if it is given again.

        Args:
            names: of the option.
            env: the environment variable that stands for it.
        """
        at = [i for i, word in enumerate(self._words[:-1]) if word in names]
        return self._values[at[-1] + 1] if at else self._environ.get(env) or None

    @property
    def fasa(self) -> str:
        """Whether FASA is ``off``, ``on`` or ``exact``, where they say."""
        return self.value("--fasa", env="LLAMA_ARG_FASA") or ""

    @property
    def flash_attention(self) -> bool:
        """Whether there may be flash attention, without which there is no FASA."""
        text = self.value("-fa", "--flash-attn", env="LLAMA_ARG_FLASH_ATTN") or "auto"
        return _FLASH_ATTN.get(text) != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED

    @property
    def scheme(self) -> str:
        """``https`` if the server gets a key and a certificate, else ``http``."""
        key = self.value("--ssl-key-file", env="LLAMA_ARG_SSL_KEY_FILE")
        certificate = self.value("--ssl-cert-file", env="LLAMA_ARG_SSL_CERT_FILE")
        return "https" if key and certificate else "http"

    @property
    def api_prefix(self) -> str:
        """What its paths begin with."""
        return self.value("--api-prefix", env="LLAMA_ARG_API_PREFIX") or ""

    def make_folders(self) -> None:
        """Make the folder where slots are saved, which llama-server expects.

        Raises:
            FasaError: it cannot be made.
        """
        if path := self.value("--slot-save-path"):
            try:
                os.makedirs(path, exist_ok=True)
            except OSError as error:
                raise FasaError(
                    f"the folder {path} for slots cannot be made ({error.strerror}): name another with --slot-save-path"
                ) from error

    def apply(self, params: llama_cpp.llama_context_params) -> None:
        """Set what they say of a context: how RoPE is scaled, flash attention, types of the cache.

        What llama-server refuses is let be.

        Args:
            params: of the context.
        """
        for field, names, env, read in _OF_CONTEXT:
            if (text := self.value(*names, env=env)) is not None:
                with contextlib.suppress(LookupError, ValueError, ZeroDivisionError):
                    setattr(params, field, read(text))


def _name(word: str) -> str:
    return word.replace("_", "-") if word.startswith("--") else word
