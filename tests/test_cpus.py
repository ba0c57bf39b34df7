"""CPUs that there are for threads, by what the kernel says in made-up files."""

from __future__ import annotations

import os
from pathlib import Path

from fasa_edge.runtime import cgroups, cpus

import pytest

pytestmark = pytest.mark.check

_V1 = "36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def v1(quota: str, period: str = "100000") -> dict[str, str]:
    folder = "sys/fs/cgroup/cpu/a"
    return {
        "proc/self/mountinfo": _V1,
        "proc/self/cgroup": "4:memory:/b\n1:cpu,cpuacct:/a\n0::/",
        f"{folder}/cpu.cfs_quota_us": quota,
        f"{folder}/cpu.cfs_period_us": period,
    }


def v2(limit: str, above: str = "max 100000") -> dict[str, str]:
    groups = {"sys/fs/cgroup/a/cpu.max": above, "sys/fs/cgroup/a/b/cpu.max": limit}
    return {"proc/self/mountinfo": _V2, "proc/self/cgroup": "0::/a/b"} | groups


@pytest.mark.parametrize(
    "files, n_bound, n_cpus",
    [
        ({}, 8, 8),
        (v2("max 100000"), 8, 8),
        (v2("300000 100000"), 8, 3),
        (v2("250000 100000"), 8, 2),
        (v2("50000 100000"), 8, 1),
        (v2("300000 100000"), 2, 2),
        (v2("300000 100000", above="100000 50000"), 8, 2),
        (v2("max 100000", above="100000 50000"), 8, 2),
        (v1("-1"), 8, 8),
        (v1("400000"), 8, 4),
        (v1("400000", period="0"), 8, 8),
        *((v2(text), 8, 8) for text in ("", "1", "1 2 3", "x y", "100000 0", "-1 -1")),
    ],
)
def test_bound_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], n_bound: int, n_cpus: int
) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n_bound)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    assert cpus.n_cpus() == n_cpus
    monkeypatch.delattr(os, "sched_getaffinity")
    if not files:
        assert cpus.n_cpus() == 16
