"""Ops behind one another, as a graph has them, which a GPU may compute in one launch: as one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fasa_edge.runtime import ggml

import numpy as np
import pytest
from ggml_graph import CACHE_TYPES, F32, Graph
from launches import ROWS_STORE, SELECT_ATTEND, launches
from op_cases import NMSE_REFERENCE, Shape, make_case

pytestmark = pytest.mark.usefixtures("device")

ggml.declare({"ggml_set_output": (None, ggml.ptr)})


@pytest.mark.check
@pytest.mark.parametrize("type_v", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("n_tokens", [1, 3, 32, 33])
@pytest.mark.parametrize("shape", [Shape(), Shape(n_embd_head=128, n_head=8, n_head_kv=4, n_dim=32)])
def test_rows_of_v_and_tips_in_one_graph(shape: Shape, n_tokens: int, type_v: str, device: str) -> None:
    """On CUDA one launch writes both; equal to the bit what the ops write one by one."""
    case = make_case(shape)
    n_kv, n_head_kv, n_embd_head = case.k.shape
    n_embd = n_head_kv * n_embd_head
    rng = np.random.default_rng(2)
    cells_k, cells_v = (rng.permutation(2 * n_kv)[:n_tokens].astype(np.int64) for _ in range(2))
    rows_v = rng.standard_normal((n_tokens, n_embd + 32), dtype=np.float32)
    if type_v != "q8_0":
        rows_v *= np.float32(10) ** rng.uniform(-9, 6, rows_v.shape).astype(np.float32)
        rows_v[:, :6] = 0, -0.0, 65519, 65520, -np.inf, 1 + 2**-11
    with Graph() as g:
        k, dims, ranges, idxs_k, idxs_v = (
            g.tensor(x) for x in (case.k[:n_tokens], case.dims, case.ranges, cells_k, cells_v)
        )
        rows_k = g.ggml_reshape_3d(k, n_embd, n_tokens, 1)
        size = 4 * (n_embd + 32)
        rows_v = g.ggml_view_4d(g.tensor(rows_v), n_embd, n_tokens, 1, 1, size, size * n_tokens, size * n_tokens, 0)

        def ops() -> tuple[list[int], list[int]]:
            """The ops in their order, and what they write to."""
            k, v = (g.new(CACHE_TYPES[name], 2 * n_kv, n_embd) for name in ("f16", type_v))
            tips = g.ggml_fasa_new_tips(n_kv, case.dims.shape[1], n_head_kv, 2)
            for written in (k, v, tips):
                g.write(written, np.full(g.n_bytes(written), 0xFF, np.uint8))
            k_heads = g.ggml_reshape_3d(k, n_embd_head, n_head_kv, 2 * n_kv)
            stored = g.ggml_fasa_store_cached(tips, k_heads, dims, ranges, idxs_k)
            return [g.ggml_set_rows(k, rows_k, idxs_k), g.ggml_set_rows(v, rows_v, idxs_v), stored], [k, v, tips]

        apart, wanted = ops()
        with launches() as launched:
            for op in apart:
                g.run(op)
        assert launched == ({"FASA_STORE": 1} if device != "CPU" else {})
        together, found = ops()
        with launches() as launched:
            g.run(*together)
        is_fused = device == "SIMT-CUDA" and type_v != "q8_0" and n_tokens <= 32
        assert launched == ({ROWS_STORE if is_fused else "FASA_STORE": 1} if device != "CPU" else {})
        for x, y in zip(wanted, found, strict=True):
            written = g.read(x, np.uint8)
            assert (g.read(y, np.uint8) == written).all() and (written != 0xFF).any()


@pytest.mark.parametrize("reads", ["k", "idxs", "dims", "ranges"])
def test_tips_are_made_behind_what_they_read(reads: str, device: str) -> None:
    """Of rows that were written right before, at indices and of dims and ranges that were: in launches of their own."""
    case = make_case(Shape())
    n_kv, n_head_kv, n_embd_head = case.k.shape
    n_embd = n_head_kv * n_embd_head
    cell = np.array([200], np.int64)
    with Graph() as g:

        def run(reads: str, tips: int) -> dict[str, int]:
            k, v = (g.new(F32, n_kv, n_embd) for _ in range(2))
            for cache in (k, v):
                g.clear(cache)
            dims, ranges, idxs = g.tensor(case.dims), g.tensor(case.ranges), g.tensor(cell)
            read_dims = g.ggml_cont(dims) if reads == "dims" else dims
            read_ranges = g.ggml_cont(ranges) if reads == "ranges" else ranges
            read_idxs = g.ggml_cont(idxs) if reads == "idxs" else idxs
            row = g.ggml_reshape_3d(g.tensor(case.k[0]), n_embd, 1, 1)
            k_heads = g.ggml_reshape_3d(k, n_embd_head, n_head_kv, n_kv)
            rows = [g.ggml_set_rows(k, row, idxs)]
            if reads != "k":
                rows = [read_dims, read_ranges, read_idxs, *rows, g.ggml_set_rows(v, row, idxs)]
            with launches() as launched:
                g.run(*rows, g.ggml_fasa_store_cached(tips, k_heads, read_dims, read_ranges, read_idxs))
            return launched

        wanted, found = (g.ggml_fasa_new_tips(n_kv, case.dims.shape[1], n_head_kv, 1) for _ in range(2))
        for tips in (wanted, found):
            g.clear(tips)
        assert run("", wanted) == {"CPU": {}, "SIMT-CUDA": {ROWS_STORE: 1}, "SIMT-METAL": {"FASA_STORE": 1}}[device]
        assert run(reads, found) == ({"FASA_STORE": 1} if device != "CPU" else {})
        tips = g.read(wanted, np.int8)
        assert (g.read(found, np.int8) == tips).all() and tips.any()


@dataclass(frozen=True)
class Both:
    """A case for select and attend, one behind the other."""

    shape: Shape
    n_fac: int = 64
    n_stream: int = 1
    by_head: bool = False
    n_forced: int = 0
    types: tuple[str, str] = ("f16", "f16")
    softcap: float = 0.0
    with_sinks: bool = False
    all_masked: bool = False
    n_infinite: int = 0  # cells from the first on whose logit is -inf
    fits: bool = True  # on the emulated device, all blocks at once


BOTH = [
    Both(Shape()),
    Both(Shape(n_kv=2080), n_fac=256, n_forced=12),
    Both(Shape(n_head=7, n_head_kv=1, n_kv=1056), n_forced=3),
    Both(Shape(n_head=7, n_head_kv=1, n_kv=1056), by_head=True),
    Both(Shape(n_embd_head=128, n_head=14, n_head_kv=2, n_kv=1568, n_dim=32, n_hidden=400), n_fac=300, softcap=5.0),
    Both(Shape(n_embd_head=256, n_head=2, n_head_kv=1, n_kv=512, n_dim=48), with_sinks=True),
    Both(Shape(n_embd_head=80, n_head=8, n_head_kv=2, n_kv=1056, n_dim=26, n_tokens=3), n_forced=7),
    Both(Shape(n_head=12, n_head_kv=3, n_kv=1280, n_tokens=3), by_head=True, fits=False),
    Both(Shape(n_head=6, n_head_kv=2, n_kv=1024, n_tokens=1), n_stream=2, n_forced=5, with_sinks=True),
    Both(Shape(n_head=6, n_head_kv=2, n_kv=512, n_tokens=3), n_stream=2, by_head=True, fits=False),
    Both(Shape(n_kv=1024), types=("q8_0", "q8_0")),
    Both(Shape(n_kv=1024), types=("q8_0", "f16")),
    Both(Shape(n_kv=1024), types=("bf16", "f32"), n_forced=1),
    Both(Shape(n_kv=544), n_fac=544),
    Both(Shape(n_kv=1024), n_fac=1),
    Both(Shape(n_kv=1024), all_masked=True, n_forced=12),
    Both(Shape(n_kv=1024, n_hidden=1000)),
    Both(Shape(n_kv=1024), n_infinite=700),
    Both(Shape(n_kv=1024), n_infinite=700, by_head=True, with_sinks=True),
]


@pytest.mark.parametrize("both", BOTH)
def test_select_and_attend_in_one_graph(both: Both, device: str) -> None:
    """On CUDA one launch does both, if nobody else wants the list: the same rows, added up in another order.

    Two do where the list is an output or another op reads it, or where dims or ranges are computed.
    """
    shape = both.shape
    cases = [make_case(shape, seed) for seed in range(both.n_stream)]
    rng = np.random.default_rng(3)
    n_head_sel = shape.n_head if both.by_head else shape.n_head_kv
    if both.all_masked:
        for case in cases:
            case.mask[:] = -np.inf
    with Graph() as g:
        stack = lambda name: g.tensor(np.stack([getattr(case, name) for case in cases]))  # noqa: E731
        tips = g.ggml_fasa_new_tips(shape.n_kv, shape.n_dim, shape.n_head_kv, both.n_stream)
        dims, ranges = g.tensor(cases[0].dims), g.tensor(cases[0].ranges)
        cells = g.tensor(np.arange(shape.n_kv * both.n_stream, dtype=np.int64))
        g.run(g.ggml_fasa_store(tips, g.tensor(np.concatenate([case.k for case in cases])), dims, ranges, cells, F32))

        cases = [replace(case, v=case.v.astype(np.float32), mask=case.mask[None]) for case in cases]
        for case in cases if both.n_infinite else ():  # tips are there already
            case.q[..., 0], case.k[: both.n_infinite, :, 0] = 1, -np.inf
        q, mask = stack("q"), stack("mask")
        k, v = (g.ggml_cast(stack(name), CACHE_TYPES[type_]) for name, type_ in zip("kv", both.types, strict=True))
        sinks = g.tensor(np.linspace(-2, 3, shape.n_head, dtype=np.float32)) if both.with_sinks else None
        forced = rng.integers(-1, shape.n_kv, (both.n_stream, shape.n_tokens, both.n_forced), dtype=np.int32)
        forced = g.tensor(forced) if both.n_forced else None
        scale = cases[0].scale

        def select(dims: int = dims, ranges: int = ranges) -> int:
            return g.ggml_fasa_select(q, tips, dims, ranges, mask, forced, n_head_sel, both.n_fac, scale)

        def attend(idx: int) -> int:
            return g.ggml_fasa_attend(q, k, v, idx, None, sinks, scale, both.softcap)

        def run(*results: int) -> dict[str, int]:
            with launches() as launched:
                g.run(*results)
            return launched

        idx = select()
        assert run(idx) == ({"FASA_SELECT": 1} if device != "CPU" else {})
        wanted_idx = g.read(idx, np.int32)
        out = attend(g.tensor(wanted_idx.reshape(both.n_stream, shape.n_tokens, n_head_sel, both.n_fac)))
        assert run(out) == ({"FASA_ATTEND": 1} if device != "CPU" else {})
        wanted = g.read(out, np.float32)
        assert np.isfinite(wanted).all() and wanted.any() == (not both.all_masked)

        together = {SELECT_ATTEND: 1} if device == "SIMT-CUDA" and both.fits else {"FASA_SELECT": 1, "FASA_ATTEND": 1}
        out = attend(select())
        assert run(out) == (together if device != "CPU" else {})
        found = g.read(out, np.float32)
        assert ((found - wanted) ** 2).sum() <= NMSE_REFERENCE * (wanted**2).sum()

        apart = {"FASA_SELECT": 1, "FASA_ATTEND": 1} if device != "CPU" else {}
        output, read = select(), select()
        computed = [select(dims=g.ggml_cont(dims)), select(ranges=g.ggml_cont(ranges))]
        ggml.base.ggml_set_output(output)
        for idx, copy in ((output, []), (read, [g.ggml_cont(read)]), *((idx, []) for idx in computed)):
            out = attend(idx)
            assert run(out, *copy) == apart
            assert (g.read(out, np.float32) == wanted).all()
            for listed in (idx, *copy):
                assert (g.read(listed, np.int32) == wanted_idx).all()
