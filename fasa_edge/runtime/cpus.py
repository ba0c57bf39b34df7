"""CPUs that this process may use: those that it is bound to, and no more than the quota of its control groups."""

from __future__ import annotations

import os

from fasa_edge.runtime import cgroups


def n_cpus() -> int:
    """Count them.

    Of a quota that is no whole number of CPUs the rest is left alone: threads that wait for each other, as llama.cpp's
    do, all stand still when one of them is stopped.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([bound, *_quotas()]), 1)


def _quotas() -> list[int]:
    """Whole CPUs of each quota; what cannot be read or understood is none, as where there are no control groups."""
    res = []
    for is_v2, folder in cgroups.groups("cpu"):
        if is_v2:
            words = cgroups.text(folder / "cpu.max").split()
        else:
            words = [cgroups.text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = map(cgroups.number, words if len(words) == 2 else ("", ""))
        if quota is not None and period:  # "max", -1: none
            res.append(quota // period)
    return res
