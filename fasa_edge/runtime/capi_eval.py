"""ctypes mirror of ``llama-fasa-eval.h``: who chooses the cells in place of FASA, of a library that few builds have."""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import count, takewhile
from pathlib import Path

from fasa_edge.errors import LibraryError, SchemaError
from fasa_edge.runtime.library import lib_dir, llama_cpp

FASA = "fasa"
"""The policy that needs no such library: number 0."""


@cache
def policies() -> tuple[str, ...]:
    """List ``enum llama_fasa_policy_type``: which cells a head attends to; first FASA, the others are for evaluation.

    Loads the library; contexts and models of this process may be given its policies from then on.

    Raises:
        LibraryError: it is not there, or does not load.
    """
    try:
        lib = llama_cpp.llama_cpp.load_shared_library("llama-fasa-eval", lib_dir())
    except FileNotFoundError:
        raise LibraryError(
            f"all policies but {FASA} are of the library llama-fasa-eval, which {lib_dir()} lacks, as packages do: "
            "build fasa-edge with `make install`, or from its sources with pip and CMAKE_ARGS=-DFASA_EVAL=ON"
        ) from None
    except RuntimeError as error:
        raise LibraryError(f"the library llama-fasa-eval does not load: {error}; reinstall fasa-edge") from error
    try:
        init, name_of = lib.llama_fasa_eval_init, lib.llama_fasa_policy_name
    except AttributeError as error:
        raise LibraryError(f"the library llama-fasa-eval is none of ours: {error}; reinstall fasa-edge") from error
    init.restype, init.argtypes = ctypes.c_bool, ()
    if not init():
        raise LibraryError("the library llama-fasa-eval is of another build than libllama: reinstall fasa-edge")
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.c_int,)
    return tuple(name.decode() for name in takewhile(lambda name: name is not None, map(name_of, count())))


def library() -> list[Path]:
    """Find the library for evaluation; an empty list if this build has none."""
    return sorted(lib_dir().glob("*llama-fasa-eval*"))


def policy_name(number: int) -> str:
    """Return the name of a policy; the number itself where there is none, which the library refuses.

    Raises:
        LibraryError: as :func:`policies`, but for FASA.
    """
    if number == 0:
        return FASA
    return policies()[number] if 0 < number < len(policies()) else str(number)


def policy_number(name: str) -> int:
    """Return the number of a policy.

    Raises:
        LibraryError: as :func:`policies`, but for FASA.
        SchemaError: there is none of that name.
    """
    if name == FASA:
        return 0
    if name not in policies():
        raise SchemaError(f"policy = {name!r} is unknown: choose from {', '.join(policies())}")
    return policies().index(name)
