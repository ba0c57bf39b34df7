"""Control groups of Linux that this process is in, as a container has them, version 1 or 2: cgroups(7), proc(5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""Of the files of the kernel."""


def groups(controller: str) -> Iterator[tuple[bool, Path]]:
    """List the groups of a controller that the process is in, up to the topmost that it can see.

    Args:
        controller: ``memory``, ``cpu``.

    Yields:
        Whether it is of version 2, and the folder of its files.
    """
    mounts = list(_mounts(controller))
    for line in text(ROOT / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3 or (fields[1] and controller not in fields[1].split(",")):
            continue
        is_v2, path = not fields[1], Path(fields[2])
        for mounted, root, point in mounts:
            if mounted != is_v2:
                continue
            # a path outside of what is mounted, as in a container that shares the names of its host: all that is seen
            below = path.relative_to(root).parts if path.is_relative_to(root) and ".." not in path.parts else ()
            for n in range(len(below), -1, -1):
                yield is_v2, point.joinpath(*below[:n])


def _mounts(controller: str) -> Iterator[tuple[bool, Path, Path]]:
    """Hierarchies of groups with a controller: whether of version 2, the group at the top, where it is mounted."""
    for line in text(ROOT / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in fields[3:5])
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and controller in kind[2].split(",")):
            yield kind[0] == "cgroup2", Path(root), ROOT / point.lstrip("/")


def text(path: Path) -> str:
    """Return what a file of the kernel says; empty if it cannot be read."""
    try:
        return path.read_text("utf-8", "replace")
    except (OSError, ValueError):  # a path with a NUL
        return ""


def number(text: str) -> int | None:
    """Return the number that a text is; None if it is none."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None
