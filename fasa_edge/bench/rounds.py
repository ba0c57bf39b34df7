"""Rounds of measurements: every method once in each, so that a machine that slows down for a while slows all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


def rounds(items: Sequence[_Item], n_warm_up: int, n_repetitions: int) -> Iterator[tuple[bool, list[_Item]]]:
    """Yield for each round whether it counts, which the first ``n_warm_up`` do not, and the items in its order.

    Each round begins with another item.
    """
    for repetition in range(-n_warm_up, n_repetitions):
        first = repetition % len(items)
        yield repetition >= 0, [*items[first:], *items[:first]]


def ratios(rival: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and greatest of the rival's times over one's own of the same rounds: above 1 is faster."""
    found = [theirs / mine for theirs, mine in zip(rival, own, strict=True)]
    return statistics.median(found), min(found), max(found)
