"""llama-server with FASA: what of it fits this machine, and a running one."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fasa_edge.errors import FasaError, ModelError
from fasa_edge.runtime import memory
from fasa_edge.runtime.fit import automatic_n_ctx, without_weights
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.programs import find_program

_N_BATCH, _N_UBATCH = 2048, 512  # of llama-server
_MAX_SLOTS = 4  # as llama-server has them unless told otherwise
_ALL_LAYERS = 999
_CACHE_SHARE = 4  # contexts leave half of the memory: half of that for prompts that no slot holds any more
_MAX_CACHE_MIB = 8192  # of llama-server
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens there is found here
_POLL = 0.05  # seconds
_GRACE = 10  # seconds for what the server is computing when it is to end


@dataclass(frozen=True)
class Plan:
    """What a server takes of the machine.

    Attributes:
        n_ctx: cells of each slot.
        n_slots: requests that are answered at once.
        n_threads: of decoding.
        n_threads_batch: of prompts.
        n_gpu_layers: layers on the GPU, all if as many as 999; None where llama-server is to fit them.
        cache_mib: memory for prompts that no slot holds any more.
    """

    n_ctx: int
    n_slots: int
    n_threads: int
    n_threads_batch: int
    n_gpu_layers: int | None
    cache_mib: int

    def arguments(self) -> list[str]:
        """Return the options of llama-server that say so."""
        options = {
            "--ctx-size": self.n_ctx * self.n_slots,
            "--parallel": self.n_slots,
            "--threads": self.n_threads,
            "--threads-batch": self.n_threads_batch,
            "--gpu-layers": self.n_gpu_layers,
            "--cache-ram": self.cache_mib,
        }
        return [word for name, value in options.items() if value is not None for word in (name, str(value))]


def plan(
    model_path: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    *,
    n_ctx: int = 0,
    n_slots: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
) -> Plan:
    """Choose what was not chosen: the longest context that memory holds, then slots of it, up to 4.

    Args:
        model_path: a GGUF file.
        profile: FASA profile that replaces the model's own.
        n_ctx: cells of each slot; 0: what the model was trained for, or less where memory does not hold it.
        n_slots: requests that are answered at once; 0: as many as fit.
        n_threads: of decoding; None: half of the CPUs.
        n_gpu_layers: layers on the GPU, -1 for all; None: all if they fit there.

    Raises:
        ModelError: the model cannot be loaded, or memory does not hold it, or not with such a context.
    """
    n_cpus = os.cpu_count() or 1
    n_threads = n_threads or max(n_cpus // 2, 1)

    def longest(n_slots: int, n_layers: int) -> int:
        model_params, context_params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
        model_params.n_gpu_layers = n_layers
        context_params.n_threads, context_params.n_threads_batch = n_threads, n_cpus
        context_params.swa_full = False  # as llama-server has it
        params = model_path, profile, model_params, context_params, _N_BATCH, _N_UBATCH, False
        return automatic_n_ctx(*params, n_slots=n_slots, is_loaded=False)

    n_layers = _ALL_LAYERS if n_gpu_layers == -1 else n_gpu_layers
    if n_layers is None and llama_cpp.llama_supports_gpu_offload():
        with contextlib.suppress(ModelError):
            longest(n_slots or 1, _ALL_LAYERS)
            n_layers = _ALL_LAYERS
    most = longest(n_slots or 1, n_layers or 0)
    with without_weights(model_path) as model:
        is_memory_short = most < llama_cpp.llama_model_n_ctx_train(model)
    if n_ctx > most and is_memory_short:
        raise ModelError(
            f"memory does not hold {n_ctx} cells for each of {n_slots or 1} slots: {memory.available()}, which is room "
            f"for {most}; lower the context or the slots"
        )
    if not n_slots:
        wanted = min(n_ctx or most, most)

        def fits(n: int) -> bool:
            try:
                return longest(n, n_layers or 0) >= wanted
            except ModelError:  # not even a few cells each
                return False

        n_slots = next((n for n in range(_MAX_SLOTS, 1, -1) if fits(n)), 1)
    free_mib = memory.available().n_bytes >> 20
    return Plan(
        n_ctx=n_ctx or most,
        n_slots=n_slots,
        n_threads=n_threads,
        n_threads_batch=n_cpus,
        n_gpu_layers=n_layers,
        cache_mib=min(free_mib // _CACHE_SHARE, _MAX_CACHE_MIB),
    )


def free_port(host: str, port: int) -> int:
    """Return the port, if nothing listens on it; for 0 one that is free.

    Raises:
        FasaError: it cannot be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":  # elsewhere it lets two listen at once
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise FasaError(
            f"port {port} of {host} cannot be taken ({getattr(error, 'strerror', None) or error}): choose another with "
            "--port, 0 for any that is free, or end what listens there"
        ) from None


@contextlib.contextmanager
def running(host: str, port: int, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start llama-server, wait until it answers, and end it with the block.

    What it logs goes to standard error. Signals of the terminal do not reach it: it ends when it is told to, once.

    Args:
        host: address to listen on.
        port: to listen on.
        arguments: all other options.

    Raises:
        LibraryError: the program was not built.
        FasaError: it ended before it answered.
    """
    command = [str(find_program("server")), "--host", host, "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while not _answers(host, port):
            try:
                status = process.wait(_POLL)
            except subprocess.TimeoutExpired:
                continue
            raise FasaError(
                f"llama-server ended with status {status} before it could answer: see what it says above, -v shows all "
                "of it; where memory is short, lower -c or --slots"
            )
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_GRACE)
        except BaseException as error:  # or it would outlive a second Ctrl-C
            process.kill()
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_ANY.get(host, host), port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200  # 503: it loads the model
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
