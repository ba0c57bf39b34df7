"""What memory a process may take: files of the kernel are made up, limits of a process are its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fasa_edge
from fasa_edge.runtime import cgroups, memory

import psutil
import pytest
from runtime import annotated_tiny

if sys.platform != "linux":
    pytest.skip("limits are Linux'", allow_module_level=True)

MACHINE = 1 << 40
NO_LIMIT_V1 = 0x7FFFFFFFFFFFF000

_V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
_CPU_V1 = "36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
_V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
_UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., memory.Available]:
    """What is available where the kernel has these files: text by path, or a number; None for what cannot be read."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(memory, "_of_process", lambda: iter(()))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": MACHINE})())

    def available(files: dict[str, str | int | bytes | None]) -> memory.Available:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            else:
                path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
        return memory.available()

    return available


def v1(group: str, limit: object, usage: object = 0, stat: object = "", root: str = "/") -> dict[str, object]:
    """Files of a group of version 1, its hierarchy mounted where it usually is."""
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        "proc/self/mountinfo": _CPU_V1 + _V1.format(root=root),
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": stat,
    }


def v2(group: str, limit: object, usage: object = 0, stat: object = "", name: str = "max") -> dict[str, object]:
    """The same of version 2."""
    folder = f"sys/fs/cgroup{group}"
    return {
        "proc/self/mountinfo": _V2.format(root="/"),
        f"{folder}/memory.{name}": limit,
        f"{folder}/memory.current": usage,
        f"{folder}/memory.stat": stat,
    }


def of_v1(group: str) -> dict[str, str]:
    return {"proc/self/cgroup": f"9:name=systemd:/\n4:memory:{group}\n1:cpu,cpuacct:/other\n0::/"}


def of_v2(group: str) -> dict[str, str]:
    return {"proc/self/cgroup": f"0::{group}"}


_CACHE_V1 = "cache 7\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 30"
_CACHE_V2 = "anon 600\nfile 999\ninactive_file 300\nactive_file 30\nshmem 5"
_MAX, _HIGH = "the container's limit (memory.max)", "the container's limit (memory.high)"
_LIMIT_V1 = "the container's limit (memory.limit_in_bytes)"

LIMITS = {
    "v1": (of_v1("/a") | v1("/a", 1000, 600), 400, _LIMIT_V1),
    "v1, cache": (of_v1("/a") | v1("/a", 1000, 900, _CACHE_V1), 430, _LIMIT_V1),
    "v1, parent": (of_v1("/a/b") | v1("/a", 1000, 900) | v1("/a/b", 5000, 1), 100, _LIMIT_V1),
    "v1, top": (of_v1("/a") | v1("", 1000, 10) | v1("/a", NO_LIMIT_V1), 990, _LIMIT_V1),
    "v1, container with names of its host": (of_v1("/docker/x") | v1("", 1000, 1, root="/docker/x"), 999, _LIMIT_V1),
    "v1, container below": (of_v1("/docker/x/a") | v1("/a", 1000, 2, root="/docker/x"), 998, _LIMIT_V1),
    "v1, names of another place": (of_v1("/../x") | v1("", 1000, 3), 997, _LIMIT_V1),
    "v2": (of_v2("/a") | v2("/a", 1000, 600), 400, _MAX),
    "v2, cache": (of_v2("/a") | v2("/a", 1000, 900, _CACHE_V2), 430, _MAX),
    "v2, high": (of_v2("/a") | v2("/a", 5000, 600) | v2("/a", 1000, 600, name="high"), 400, _HIGH),
    "v2, parent": (of_v2("/a/b") | v2("/a", 1000, 900) | v2("/a/b", "max", 1), 100, _MAX),
    "v2, own names": (of_v2("/") | v2("", 1000, 600), 400, _MAX),
    "full": (of_v2("/a") | v2("/a", 1000, 1200), 0, _MAX),
    "usage unknown": (of_v2("/a") | v2("/a", 1000, None, None), 1000, _MAX),
    "more cache than usage": (of_v2("/a") | v2("/a", 1000, 10, _CACHE_V2), 1000, _MAX),
    "hybrid": (
        of_v1("/a")
        | v1("/a", 1000, 600)
        | {"proc/self/mountinfo": _UNIFIED + _V1.format(root="/"), "sys/fs/cgroup/unified/memory.max": 800},
        400,
        _LIMIT_V1,
    ),
    "a folder with a blank": (
        {
            "proc/self/cgroup": "0::/a b",
            "proc/self/mountinfo": r"30 23 0:26 / /my\040groups rw - cgroup2 cgroup2 rw",
            "my groups/a b/memory.max": 50,
        },
        50,
        _MAX,
    ),
}
NO_LIMITS = {
    "no files": {},
    "v1, none": of_v1("/a") | v1("/a", NO_LIMIT_V1, 600),
    "v2, none": of_v2("/a") | v2("/a", "max", 600),
    "of another group": of_v2("/a") | v2("/b", 1000, 600),
    "limit cannot be read": of_v2("/a") | v2("/a", None, 600),
    "group cannot be read": v2("/a", 1000) | {"proc/self/cgroup": None},
    "mounts cannot be read": of_v2("/a") | v2("/a", 1000) | {"proc/self/mountinfo": None},
    "not mounted": of_v2("/a") | v2("/a", 1000) | {"proc/self/mountinfo": _CPU_V1},
    **{f"limit {n!r}": of_v2("/a") | v2("/a", n) for n in ("", "-1", "1e3", "10 20", "²", b"\xff\xfe", b"1\x00")},
    **{f"group {line!r}": v2("/a", 1000) | {"proc/self/cgroup": line} for line in ("", "0:", "::", "0:/a", b"0::/\0")},
    **{f"mounts {t!r}": of_v2("/a") | v2("/a", 1000) | {"proc/self/mountinfo": t} for t in ("", "- cgroup2", "a - b")},
}


@pytest.mark.check
@pytest.mark.parametrize("files, n_bytes, of", LIMITS.values(), ids=LIMITS)
def test_limits_of_groups(kernel, files, n_bytes: int, of: str) -> None:
    assert kernel(files) == memory.Available(n_bytes, of)


@pytest.mark.check
@pytest.mark.parametrize("files", NO_LIMITS.values(), ids=NO_LIMITS)
def test_what_is_no_limit(kernel, files) -> None:
    assert kernel(files) == memory.Available(MACHINE, "the machine's memory")


@pytest.mark.check
def test_the_least_is_named(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = memory.Available(390, "the address space limit (ulimit -v)", is_virtual=True)
    monkeypatch.setattr(memory, "_of_process", lambda: iter([own, memory.Available(500, "data", is_virtual=True)]))
    assert str(kernel(of_v2("/a") | v2("/a", 1000, 600))) == "390 are left of the address space limit (ulimit -v)"
    assert [limit.n_bytes for limit in memory.limits()] == [MACHINE, 400, 390, 500]
    assert memory.limit_of_failure() == own
    monkeypatch.setattr(memory, "_of_process", lambda: iter([replace(own, n_bytes=450)]))
    assert memory.limit_of_failure().n_bytes == 450 > memory.available().n_bytes  # a group refuses no allocation


_LIMITED = """
import resource, sys
import psutil
from fasa_edge.runtime import cgroups, memory
used = getattr(psutil.Process().memory_info(), sys.argv[2])
resource.setrlimit(getattr(resource, sys.argv[1]), (used + (100 << 20), resource.RLIM_INFINITY))
before = memory.available()
block = bytearray(40 << 20)
print(before.of)
print(before.n_bytes >> 20, before.n_bytes - memory.available().n_bytes >> 20)
"""


@pytest.mark.parametrize(
    "limit, used, of",
    [
        ("RLIMIT_AS", "vms", "the address space limit (ulimit -v)"),
        ("RLIMIT_DATA", "data", "the data limit (ulimit -d)"),
    ],
)
def test_limits_of_the_process(limit: str, used: str, of: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, limit, used]
    lines = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    left, taken = map(int, lines[1].split())
    assert lines[0] == of and 90 <= left <= 100 and 39 <= taken <= 50


@pytest.mark.parametrize("error", [OSError(24, "too many open files"), psutil.NoSuchProcess(1)], ids=repr)
def test_what_the_system_does_not_tell_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("psutil.virtual_memory", fail)
    monkeypatch.setattr("psutil.Process", fail)
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    assert memory.limits() == [memory.Available(sys.maxsize, "the machine's memory")]
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(fasa_edge.ModelError, match="damaged.gguf"):
        fasa_edge.Llama(str(tmp_path / "damaged.gguf"), verbose=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The context that it was trained for takes 2 GiB."""
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_layer=4, n_ctx=1 << 21)


_IN_A_LIMIT = """
import resource, sys
import psutil
import fasa_edge
limit = psutil.Process().memory_info().vms + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
n_threads = int(sys.argv[4])
try:
    llm = fasa_edge.Llama(
        sys.argv[1], n_ctx=int(sys.argv[3]), n_threads=n_threads, n_threads_batch=n_threads, verbose=False
    )
    print(llm.n_ctx(), len(llm("Hello", max_tokens=4, temperature=0)["choices"][0]["text"]))
except fasa_edge.FasaError as error:
    print(type(error).__name__, error)
"""


def in_a_limit(folder: Path, model: Path, mib: int, n_ctx: int, n_threads: int) -> str:
    """What a child prints that loads a model with so much address space beyond what it has."""
    command = [sys.executable, "-c", _IN_A_LIMIT, model, *map(str, (mib, n_ctx, n_threads))]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("mib, least", [(1000, 1 << 15), (400, 1 << 9)])
def test_an_automatic_context_fits_into_the_address_space(tmp_path: Path, model: Path, mib: int, least: int) -> None:
    n_ctx, n_text = map(int, in_a_limit(tmp_path, model, mib, 0, 2).split())
    assert least <= n_ctx < 1 << 20 and n_text > 0


ADDRESS_SPACE = "are left of the address space limit (ulimit -v)"


@pytest.mark.parametrize("n_ctx", [1 << 18, 1 << 14])
def test_the_error_names_the_limit(tmp_path: Path, model: Path, n_ctx: int) -> None:
    """The greater is refused by llama.cpp, of the smaller an array of the bindings does not fit."""
    said = in_a_limit(tmp_path, model, 64, n_ctx, 1)
    assert said.startswith("ModelError ") and ADDRESS_SPACE in said


def test_other_errors_do_not(tmp_path: Path) -> None:
    said = in_a_limit(tmp_path, tmp_path / "missing.gguf", 400, 512, 1)
    assert said.startswith("ModelError ") and "missing.gguf" in said and "ulimit" not in said


@pytest.mark.check
def test_memory_is_asked_for_in_one_place() -> None:
    package = Path(memory.__file__).parents[1]
    assert [path.name for path in package.rglob("*.py") if "virtual_memory" in path.read_text()] == ["memory.py"]
