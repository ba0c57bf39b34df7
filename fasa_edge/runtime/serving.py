"""A running llama-server: its address, its start, its end."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence

from fasa_edge.errors import FasaError
from fasa_edge.runtime import child
from fasa_edge.runtime.programs import find_program
from fasa_edge.runtime.server_options import ServerOptions

import psutil

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens there is found here
_POLL, _POLL_SHARE = 0.05, 0.1  # seconds, and of the time in which nothing moved: asking costs the server CPU time
_PATIENCE = 120  # seconds in which a server that does not answer yet has to get on with something
_STRIDE_SECONDS, _STRIDE_BYTES = 1.0, 1 << 20  # of CPU time, and of files or of memory: less than that is no progress


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

    What it logs goes to standard error. How it ends: :func:`fasa_edge.runtime.child.tied`.

    Args:
        host: address to listen on.
        port: to listen on.
        arguments: all other options.

    Raises:
        LibraryError: the program was not built.
        FasaError: it ended before it answered, or it does not get there.
    """
    command = [str(find_program("server")), "--host", host, "--port", str(port), *arguments]
    with child.tied(command) as process:
        _wait_for(process, host, port, ServerOptions(arguments))
        yield process


def _wait_for(process: subprocess.Popen[bytes], host: str, port: int, options: ServerOptions) -> None:
    """Wait until the server answers, for as long as it lives and gets on."""
    moved, last = time.monotonic(), (0.0, 0, 0)
    while not (_answers(host, port, options) and _listens(process, port)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(max(_POLL, _POLL_SHARE * (time.monotonic() - moved)))
            raise FasaError(
                f"llama-server ended with status {status} before it could answer: see what it says above, -v shows all "
                "of it; where memory is short, lower -c or --slots"
            )
        now = _work(process)
        if any(
            abs(a - b) >= step for a, b, step in zip(now, last, (_STRIDE_SECONDS, *2 * [_STRIDE_BYTES]), strict=True)
        ):
            moved, last = time.monotonic(), now
        elif time.monotonic() - moved > _PATIENCE:
            raise FasaError(
                f"llama-server neither answers on port {port} of {host} nor does anything since {_PATIENCE} seconds: "
                "see what it says above, -v shows all of it"
            )


def _work(process: subprocess.Popen[bytes]) -> tuple[float, int, int]:
    """What grows while a process gets on: seconds of CPU time, bytes read and written, bytes of memory."""
    try:
        seen = psutil.Process(process.pid)
        times = seen.cpu_times()
        on_disk = seen.io_counters() if hasattr(seen, "io_counters") else None  # not on macOS
        n_bytes = on_disk.read_bytes + on_disk.write_bytes if on_disk else 0  # of the model, of one that it downloads
        return times.user + times.system, n_bytes, seen.memory_info().rss
    except (OSError, psutil.Error):  # it has just ended
        return 0.0, 0, 0


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it is this process that listens: who came first may answer while it is about to find the port taken."""
    try:
        listening = psutil.Process(process.pid).net_connections("tcp")
    except (OSError, psutil.Error):
        return process.poll() is None  # the system does not say
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in listening)


def _answers(host: str, port: int, options: ServerOptions) -> bool:
    address = _ANY.get(host, host), port
    if options.scheme == "https":
        context = ssl.create_default_context()  # of a certificate that this machine may not know, and that it made
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(*address, timeout=5, context=context)
    else:
        connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("GET", f"{options.api_prefix}/health")
        return connection.getresponse().status == 200  # 503: it loads the model
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
