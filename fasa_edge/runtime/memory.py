"""Memory that this process may still take: the least of what the machine has and of what its limits leave.

A limit is a control group's, as a container has, of version 1 or 2, or the process' own (``ulimit``); Linux alone has
them, elsewhere the machine decides. A group's ``memory.high`` refuses nothing, but whoever exceeds it is slowed down
until nothing goes on. See cgroups(7), proc(5), getrlimit(2).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fasa_edge.runtime import cgroups

import psutil

_UNKNOWN = sys.maxsize  # bytes of memory, where the system does not say
_STACK, _ARENA = 8 << 20, 64 << 20  # bytes of a thread: its stack, and address space that glibc's malloc sets aside


@dataclass(frozen=True)
class Available:
    """Bytes that are left, and of what; in a message "1000 are left of the machine's memory".

    Attributes:
        n_bytes: so many; 0 where more is in use than allowed.
        of: what sets the limit.
        is_virtual: what is allocated counts as soon as it is. Otherwise what is written to does, and files that are
            mapped are as good as free: the kernel reads them again.
        by_thread: bytes that each thread takes of it, where what is allocated counts.
    """

    n_bytes: int
    of: str
    is_virtual: bool = False
    by_thread: int = 0

    def __str__(self) -> str:
        return f"{self.n_bytes} are left of {self.of}"


@dataclass(frozen=True)
class _Version:
    """Names of the files of one version of control groups."""

    limits: tuple[str, ...]
    usage: str
    caches: tuple[str, ...]  # in memory.stat: pages of files, which the kernel takes back before it says no

    def available(self, folder: Path) -> Iterator[Available]:
        """What the limits of one group leave; what cannot be read or understood is no limit."""
        stat = dict(line.split(" ", 1) for line in cgroups.text(folder / "memory.stat").splitlines() if " " in line)
        cached = sum(cgroups.number(stat.get(name, "")) or 0 for name in self.caches)
        used = max((cgroups.number(cgroups.text(folder / self.usage)) or 0) - cached, 0)
        for name in self.limits:
            if (limit := cgroups.number(cgroups.text(folder / name))) is not None:  # "max": none
                yield Available(max(limit - used, 0), f"the container's limit ({name})")


# Without a limit, a group of version 1 has a number that no machine reaches.
_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))


def available() -> Available:
    """Return the least that is left."""
    return _least(limits())


def limit_of_failure() -> Available:
    """Guess what an allocation that failed exceeded: a limit of the process, if it has any."""
    every = limits()
    return _least([limit for limit in every if limit.is_virtual] or every)


def _least(every: list[Available]) -> Available:
    return min(every, key=lambda limit: limit.n_bytes)


def limits() -> list[Available]:
    """List what is left of each limit, the machine's memory the first; what cannot be read is no limit."""
    try:
        n_bytes = psutil.virtual_memory().available
    except (OSError, psutil.Error):  # no /proc, no file descriptor left
        n_bytes = _UNKNOWN
    res = [Available(n_bytes, "the machine's memory")]
    return [*res, *_of_groups(), *_of_process()] if sys.platform == "linux" else res


def _of_groups() -> Iterator[Available]:
    """What is left to the groups that the process is in, up to the topmost that it can see."""
    for is_v2, folder in cgroups.groups("memory"):
        yield from (_V2 if is_v2 else _V1).available(folder)


def _of_process() -> Iterator[Available]:
    """What is left to the process of its own limits."""
    import resource  # not on Windows

    try:
        memory = psutil.Process().memory_info()
    except (OSError, psutil.Error):
        return
    for kind, used, of, by_thread in (
        (resource.RLIMIT_AS, memory.vms, "the address space limit (ulimit -v)", _STACK + _ARENA),
        (resource.RLIMIT_DATA, memory.data, "the data limit (ulimit -d)", _STACK),  # an arena counts as it is used
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield Available(max(limit - used, 0), of, is_virtual=True, by_thread=by_thread)
