#!/usr/bin/env python3
"""Two sequences live long in one context: decoded, shifted, cut, saved, restored, under settings that change.

    python tests/soak.py [--seconds 600] [--steps 100000] [--seed 1]

Logits stay finite, every layer of every step is counted once, and memory does not grow.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fasa_edge.runtime.library import llama_cpp

import numpy as np
import psutil
from runtime import TEXTS, Context, annotated_tiny, load, save

N_LAYER = 2
N_MAX = 900  # tokens of a sequence, which then forgets its second quarter
MAX_GROWTH = 32 << 20  # bytes, from the first third on: what allocators keep


class Soak:
    """What happens to the two sequences; ``lengths`` in tokens."""

    def __init__(self, path: Path, rng: np.random.Generator) -> None:
        self.ctx = Context(path, n_ctx=4096, n_seq_max=2, kv_unified=bool(rng.integers(2)))
        self.rng = rng
        self.lengths = [0, 0]
        self.n_layers = 0  # that ran sparse
        self.actions = [self.decode] * 20 + [self.read, self.cut, self.save_sequence, self.save_all, self.configure]

    def turn(self) -> None:
        action = self.actions[self.rng.integers(len(self.actions))]
        action(int(self.rng.integers(2)))
        for seq, n in enumerate(self.lengths):
            if n > N_MAX:
                self.shift(seq)

    def checked(self, entries: list[tuple[int, int, tuple[int, ...]]]) -> None:
        logits = self.ctx.decode(entries)
        assert np.isfinite(logits).all(), "logits are not finite"
        stats = self.ctx.stats()
        n_steps = stats.n_steps_prompt + stats.n_steps_decode
        assert n_steps > 0 and sum(stats.n_layers) == N_LAYER * n_steps, f"{list(stats.n_layers)} in {n_steps} steps"
        self.n_layers += stats.n_layers[0]

    def token(self) -> int:
        return TEXTS[0][self.rng.integers(1500)]

    def decode(self, seq: int) -> None:
        """A token of one sequence or of both."""
        both = [seq] if self.rng.integers(2) else [0, 1]
        self.checked([(self.token(), self.lengths[seq], (seq,)) for seq in both])
        for seq in both:
            self.lengths[seq] += 1

    def read(self, seq: int) -> None:
        n = int(self.rng.integers(1, 300))
        self.checked([(self.token(), self.lengths[seq] + i, (seq,)) for i in range(n)])
        self.lengths[seq] += n

    def cut(self, seq: int) -> None:
        self.lengths[seq] = int(self.rng.integers(0, self.lengths[seq] + 1))
        assert llama_cpp.llama_memory_seq_rm(self.ctx.memory, seq, self.lengths[seq], -1)

    def shift(self, seq: int) -> None:
        n = self.lengths[seq] // 4
        assert llama_cpp.llama_memory_seq_rm(self.ctx.memory, seq, n, 2 * n)
        llama_cpp.llama_memory_seq_add(self.ctx.memory, seq, 2 * n, -1, -n)
        self.lengths[seq] -= n

    def save_sequence(self, seq: int) -> None:
        if self.lengths[seq]:
            state = save(self.ctx, seq)
            llama_cpp.llama_memory_seq_rm(self.ctx.memory, seq, -1, -1)
            load(self.ctx, state, seq)

    def save_all(self, _seq: int) -> None:
        state = save(self.ctx)
        llama_cpp.llama_memory_clear(self.ctx.memory, True)
        load(self.ctx, state)

    def configure(self, _seq: int) -> None:
        pick = lambda *values: values[self.rng.integers(len(values))]  # noqa: E731
        self.ctx.configure(
            enabled=pick(True, True, True, False),
            exact=pick(True, False),
            select=pick("group", "head"),
            policy=pick("fasa", "fasa", "fasa", "oracle", "streaming"),
            budget=pick(48, 64, 500),
            min_ctx=pick(1, 200),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, help="default: drawn")
    args = parser.parse_args()
    seed = np.random.SeedSequence().entropy % 2**31 if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)

    process, rss = psutil.Process(), None
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(annotated_tiny(Path(folder), n_layer=N_LAYER), np.random.default_rng(seed))
        for n in range(args.steps):
            passed = time.monotonic() - begin
            if passed > args.seconds:
                break
            if rss is None and (passed > args.seconds / 3 or n > args.steps / 3):
                rss = process.memory_info().rss
            soak.turn()
    growth = process.memory_info().rss - (rss or 0)
    print(f"{n + 1} turns, {soak.n_layers} layers sparse, memory grew by {growth / 2**20:.1f} MiB")
    assert soak.n_layers > 0, "nothing ran sparse"
    assert growth <= MAX_GROWTH, f"memory grew by {growth} bytes"
    return 0


if __name__ == "__main__":
    sys.exit(main())
