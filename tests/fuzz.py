#!/usr/bin/env python3
"""Hostile inputs: whatever they are, the process lives, an error refuses what is refused, and ops keep their contract.

    python tests/fuzz.py [--seconds 60] [--cases 1000] [--seed 1] [KIND ...]

A case is made from one seed alone. Each kind runs in a process of its own; where that fails, the seed is printed with
the command that repeats it. Meant for libraries with sanitizers: `make fuzz`. In what llama.cpp reads, vocabularies and
tensors are left as they are: there upstream may abort by itself.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fasa_edge.convert import inspect
from fasa_edge.errors import FasaError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import error_log

import numpy as np
import reference
from op_cases import NMSE_REFERENCE, Shape, make_case
from runtime import TEXTS, Context, annotated_tiny, save
from test_ops import assert_same_cells, run_attend, run_select
from unchecked import convert

Case = Callable[[np.random.Generator], None]

PATTERNS = (b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x00" * 8, b"\x01" * 4, b"\x80")
PATTERNS += (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\xff")  # inf, NaN
HOW = ("flip", "pattern", "noise", "left out", "doubled", "end")
NUMBERS = (0, 1, 2, 16, 17, 63, 64, 65, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def damaged(rng: np.random.Generator, data: bytes, begin: int = 0, end: int | None = None) -> bytes:
    """Bytes overwritten, flipped, left out or doubled in a few places from ``begin`` to ``end``; or an early end."""
    end = len(data) if end is None else end
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(begin, max(begin + 1, min(end, len(data)))))
        n = int(rng.integers(1, 65))
        how = rng.choice(HOW, p=(0.4, 0.25, 0.2, 0.05, 0.05, 0.05))
        if how == "pattern":
            middle = PATTERNS[rng.integers(len(PATTERNS))]
        elif how == "noise":
            middle = rng.bytes(n)
        elif how == "flip":
            middle = bytes(byte ^ 1 << rng.integers(8) for byte in data[at : at + 1])
        else:
            middle = b""
        skipped = {"left out": n, "doubled": -n, "end": len(data)}.get(how, len(middle))
        data = data[:at] + middle + data[max(0, at + skipped) :]
    return data


def decode_some(ctx: Context) -> None:
    """A prompt and a token after it."""
    llama_cpp.llama_memory_clear(ctx.memory, True)
    ctx.read(TEXTS[0][:150])
    ctx.step(TEXTS[0][150], 150)


def profiles(folder: Path) -> Case:
    """Profiles in files of their own, given to a loaded model; Python and the library agree on which are valid."""
    path = folder / "damaged.gguf"
    annotated = annotated_tiny(folder)
    made = convert(folder / "tiny.gguf", profile=folder / "profile.gguf", tokens=512, check=True)  # writes all keys
    data = made.profile_path.read_bytes()
    model = Context(annotated)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.flash_attn_type = 512, 1, 1

    def case(rng: np.random.Generator) -> None:
        path.write_bytes(damaged(rng, data))
        is_refused = refused(lambda: inspect(path))
        with error_log() as errors:
            is_loaded = capi.load_profile(model.model, path)
        if not is_loaded:
            assert is_refused or re.search("another model|the model has|holds no FASA profile", errors[-1])
        else:
            assert not is_refused
            ctx = llama_cpp.llama_init_from_model(model.model, params)
            tokens = (llama_cpp.llama_token * 150)(*TEXTS[0][:150])
            assert llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(tokens, 150)) == 0
            assert llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(tokens, 1)) == 0
            llama_cpp.llama_free(ctx)

    return case


def headers(folder: Path) -> Case:
    """Headers of models: any byte for the converter, those of ``fasa.*`` for llama.cpp."""
    path = folder / "damaged.gguf"
    annotated = annotated_tiny(folder)
    data = annotated.read_bytes()
    raw = [entry.raw for key, entry in read_header(annotated).entries.items() if key.startswith("fasa.")]
    pairs = [(at, at + len(pair)) for pair in raw if (at := data.find(pair)) >= 0]
    end = max(pair[1] for pair in pairs)

    def case(rng: np.random.Generator) -> None:
        path.write_bytes(damaged(rng, data, 0, end)[: end + 4096])
        refused(lambda: inspect(path))
        begin, stop = pairs[rng.integers(len(pairs))]
        path.write_bytes(damaged(rng, data, begin, stop))
        refused(lambda: inspect(path))
        if model := llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params()):
            llama_cpp.llama_model_free(model)

    return case


def states(folder: Path) -> Case:
    """Saved states, of a context or of one sequence."""
    ctx = Context(annotated_tiny(folder), n_ctx=512, n_seq_max=2, kv_unified=True)
    ctx.read(TEXTS[0][:200])
    ctx.read(TEXTS[1][:100], 1)
    whole, sequence = bytes(save(ctx)), bytes(save(ctx, 0))

    def case(rng: np.random.Generator) -> None:
        data = damaged(rng, whole if (is_whole := rng.random() < 0.5) else sequence)
        buffer = (llama_cpp.ctypes.c_uint8 * max(len(data), 1)).from_buffer_copy(data or b"\0")
        if is_whole:
            n_read = llama_cpp.llama_state_set_data(ctx.ctx, buffer, len(data))
        else:
            n_read = llama_cpp.llama_state_seq_set_data(ctx.ctx, buffer, len(data), 1)
        if n_read:
            last = llama_cpp.llama_memory_seq_pos_max(ctx.memory, 1)
            if 0 <= last < 10000:
                ctx.step(TEXTS[0][0], last + 1, 1)
        decode_some(ctx)

    return case


def settings(folder: Path) -> Case:
    """Settings, captures and enumerators of any value, between decoded tokens."""
    ctx = Context(annotated_tiny(folder), n_ctx=512)
    decode_some(ctx)
    start = capi.get_params(ctx.ctx)
    what = [*map(int, capi.Capture), 0, 3, -1, 2**31 - 1]

    def case(rng: np.random.Generator) -> None:
        number = lambda: int(NUMBERS[rng.integers(len(NUMBERS))] if rng.random() < 0.7 else rng.integers(2**32))  # noqa: E731
        params = type(start).from_buffer_copy(start)
        for name, kind in rng.permutation(np.array(params._fields_, object))[: rng.integers(1, 5)]:
            value = number()
            setattr(params, name, bool(value & 1) if kind is llama_cpp.ctypes.c_bool else kind(value).value)
        refused(lambda: capi.set_params(ctx.ctx, params))
        capi._set_capture(ctx.ctx, number())
        layer = capi.layer_geometry(ctx.model)[0]
        assert layer.n_head_kv == 2
        capi.reset_stats(ctx.ctx)
        decode_some(ctx)
        stats = capi.get_stats(ctx.ctx)
        assert sum(stats.n_layers) == 2 * (stats.n_steps_prompt + stats.n_steps_decode)
        for il in (0, 1, 2, -1, number() - 2**31):
            refused(lambda il=il: capi.captured(ctx.ctx, il, what[rng.integers(len(what))]))
        capi.set_params(ctx.ctx, start)

    return case


def ops(_folder: Path) -> Case:
    """Shapes, sizes and values that nobody thought of, against the reference."""

    def case(rng: np.random.Generator) -> None:
        n_embd_head, n_head_kv = int(rng.choice([64, 80, 96, 128, 256])), int(rng.integers(1, 4))
        n_kv, n_tokens = 32 * int(rng.integers(1, 40)), int(rng.integers(1, 4))
        n_head, n_dim = n_head_kv * int(rng.integers(1, 10)), 2 * int(rng.integers(1, n_embd_head // 2 + 1))
        shape = Shape(n_embd_head, n_head, n_head_kv, n_kv, n_tokens, n_dim, int(rng.integers(0, n_kv - n_tokens)))
        case = make_case(shape, int(rng.integers(2**32)))
        n_threads, by_head = int(rng.integers(1, 9)), bool(rng.random() < 0.3)
        some = lambda: rng.random(n_kv) < rng.choice([0, 0, 0.1, 0.9])  # noqa: E731

        # attention before the query is made too large for its logits
        k = case.k.astype(rng.choice([np.float16, np.float32]))
        for value in (-np.inf, np.inf, np.nan)[: rng.choice([0, 1, 1, 3])]:
            k[some(), :, 0] = value
        sinks = rng.choice([-np.inf, -2, 3], n_head).astype(np.float32) if rng.random() < 0.5 else None
        softcap = float(rng.choice([0, 0, 5]))
        visible = np.where(np.isfinite(case.mask), np.arange(n_kv, dtype=np.int32), -1)[:, None]
        listed = np.where(rng.random((n_tokens, n_head if by_head else n_head_kv, n_kv)) < 0.5, visible, -1)
        for cells in (None, np.ascontiguousarray(listed)):
            seen = visible.repeat(n_head_kv, axis=1) if cells is None else cells
            with np.errstate(invalid="ignore"):
                truth = reference.attend(case.q, k, case.v, seen, case.scale, softcap, sinks)
            out = run_attend(case, cells, k, softcap, sinks, n_threads)
            assert (np.isnan(out) == np.isnan(truth)).all()
            assert np.nansum((out - truth) ** 2) <= NMSE_REFERENCE * np.nansum(truth**2)

        case.k[some()] = rng.choice([np.nan, np.inf, 1e9, 0])
        case.q = np.ldexp(case.q, rng.choice([-140, -60, 0, 0, 80, 120], (n_tokens, n_head, 1)))
        forced = rng.integers(-1, n_kv, (n_tokens, int(rng.integers(0, 5))), dtype=np.int32)
        n_fac = int(rng.integers(max(1, forced.shape[1]), n_kv + 1))
        with np.errstate(invalid="ignore", over="ignore"):
            tips = reference.store(case.k, case.dims, case.ranges)
        scores = reference.score(case.q, tips, case.dims, case.ranges, case.mask, case.scale, by_head)
        tolerance = 1e-4 + 1e-5 * np.abs(scores[np.isfinite(scores)]).max(initial=0)
        for it, cells in enumerate(forced):
            cells = cells[cells >= 0]
            scores[it][:, cells] = np.where(np.isfinite(scores[it][:, cells]), np.inf, -np.inf)
        idx = run_select(case, n_fac, forced if forced.size else None, n_threads, by_head)
        with np.errstate(invalid="ignore"):
            assert_same_cells(idx, reference.select(scores, n_fac), scores, tolerance)

    return case


KINDS = {kind.__name__: kind for kind in (profiles, headers, states, settings, ops)}


def refused(call: Callable[[], object]) -> bool:
    """By nothing but errors of our own, if it is."""
    try:
        call()
    except (FasaError, ValueError):
        return True
    return False


def run(kind: str, seed: int, seconds: float, cases: int) -> None:
    """Cases one after the other, each announced by its seed."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, error_log():
        case = KINDS[kind](Path(folder))
        for n in range(cases):
            if time.monotonic() > end:
                return
            print(seed + n, flush=True)
            case(np.random.default_rng(seed + n))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="of each kind")
    parser.add_argument("--cases", type=int, default=1_000_000, help="of each kind")
    parser.add_argument("--seed", type=int, help="of the first case; default: drawn")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(KINDS)}")

    seed = np.random.SeedSequence().entropy % 2**31 if args.seed is None else args.seed
    limits = ["--seconds", str(args.seconds), "--cases", str(args.cases)]
    failed = 0
    for kind in args.kinds or KINDS:
        if args.here:
            run(kind, seed, args.seconds, args.cases)
            continue
        command = [sys.executable, __file__, "--here", "--seed", str(seed), *limits, kind]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        seeds = done.stdout.split()
        if done.returncode == 0:
            print(f"{kind}: {len(seeds)} cases from seed {seed} on", flush=True)
            continue
        failed += 1
        last = seeds[-1] if seeds else seed
        print(done.stderr[-8000:])
        print(f"{kind}: seed {last} ends with status {done.returncode}, after {len(seeds)} cases")
        print(f"  again: python tests/fuzz.py --here --seed {last} --cases 1 {kind}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
