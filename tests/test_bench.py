"""Measurements: what is measured, counted and drawn; never how long it took."""

from __future__ import annotations

import ctypes
import json
import warnings
from dataclasses import replace
from pathlib import Path

import fasa_edge
from fasa_edge.bench import bandwidth, matmul, models, ops, prompt_ops
from fasa_edge.bench.cache_fill import StateLayout
from fasa_edge.bench.geometry import GEOMETRIES, Geometry, Heads, find_heads
from fasa_edge.bench.plot import draw_models, draw_ops
from fasa_edge.bench.random_data import RandomFiller, random_data
from fasa_edge.bench.random_model import write_random_model
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi, ggml, sequence
from fasa_edge.runtime.ggml import Graph

import gguf
import numpy as np
import pytest
from runtime import SAME, TEXTS, Context, annotated_tiny, check, nmse
from test_cli import fasa

HEADS = Heads(4, 2, 64)
TINY = Geometry("llama", 2, 256, 512, HEADS, 300, 1e4, True)


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "N_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"))


def random_llama(folder: Path, geometry: Geometry = TINY, **kwargs) -> fasa_edge.Llama:
    path, profile = write_random_model(folder, "tiny", geometry, "q4_0")
    return fasa_edge.Llama(str(path), fasa_profile=profile, verbose=False, **{"n_ctx": 2048, **kwargs})


@pytest.mark.check
def test_bench_of_ops(tmp_path: Path) -> None:
    png = tmp_path / "ops.png"
    args = ("bench", "--op", "--geometry", "4/2x64,smollm2-135m", "-d", "600,300", "--layers", 2, "-t", 2, "-r", 3)
    result = fasa(*args, "--budget", "64,40", "--n-tip", 10, "--plot", png, "--json")
    rows = json.loads(result.stdout)
    ops = [("flash_attn_ext", 0), ("exact", 0)]
    ops += [(op, budget) for budget in (40, 64) for op in ("fasa", "fasa_select", "fasa_attend")]
    assert [(row["n_head"], row["n_depth"], row["op"], row["budget"]) for row in rows] == [
        (n_head, depth, *op) for n_head in (4, 9) for depth in (300, 600) for op in ops
    ]
    for row in rows:
        assert len(row["samples_ns"]) == 3 and row["n_layers"] == row["n_threads"] == 2
        assert row["min_ns"] <= row["median_ns"] <= row["max_ns"]
        assert row["floor_ratio"] * row["n_bytes"] / row["bandwidth"] == pytest.approx(1e-9 * row["median_ns"])
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]

    n_bytes = {(row["op"], row["budget"]): row["n_bytes"] for row in rows[: len(ops)]}
    row_bytes, mask, ids = 2 * 2 * 64 * 2, 512 * 2, 40 * 2 * 4  # K and V of a cell, 300 cells padded, of two KV heads
    assert n_bytes["flash_attn_ext", 0] == n_bytes["exact", 0] == 300 * row_bytes + mask
    assert n_bytes["fasa_attend", 40] == 40 * row_bytes + ids
    assert n_bytes["fasa_select", 40] == 512 * 2 * 24 // 2 + mask + ids  # 20 values are filled up to 24
    assert n_bytes["fasa", 40] == n_bytes["fasa_select", 40] + 40 * row_bytes

    assert png.read_bytes().startswith(b"\x89PNG") and "ops.png" in result.stderr
    assert "ops.png exists" in fasa(*args, "--plot", png, code=1).stderr
    table = fasa(*args, "--budget", 64, "--plot", png, "--force", "-ctk", "q8_0", "-ctv", "q4_0").stdout.splitlines()
    assert table[0].startswith("| op") and "x floor" in table[0] and len(table) == 2 + 2 * 2 * 5


@pytest.fixture(params=["CPU", "SIMT-CUDA", "SIMT-METAL"])
def on_gpu(request: pytest.FixtureRequest) -> bool:
    """Whether ops run on a GPU: an emulated one, whose times mean nothing."""
    if request.param != "CPU":
        request.getfixturevalue("gpu")(request.param)
    return request.param != "CPU"


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "f32")])
def test_all_ops_attend_to_the_same_caches(types: tuple[str, str], on_gpu: bool) -> None:
    """With a budget of all cells FASA is dense attention, in every layer and whatever is padding."""
    with Graph(on_gpu=on_gpu) as graph:
        layers = ops._Layers(graph, HEADS, 9000, *types, n_tip=None, n_layers=2)
        assert layers.n_kv == 9216
        outputs, firsts = {}, []
        ggml.base.ggml_graph_node.restype = ctypes.c_void_p
        for op in ops._ops(layers, [9000], 2):
            graph.compute(op.plan)
            dtype = np.int32 if op.row.op == "fasa_select" else np.float32
            first, second = (graph.read(result, dtype) for result in op.results)
            assert (first == second).all()
            outputs[op.row.op] = first
            firsts.append(ggml.base.ggml_graph_node(ctypes.c_void_p(op.plan), 0))
    assert len(set(firsts)) == len(firsts)  # or ggml-cuda takes them for one that changes each time
    assert (outputs.pop("fasa_select").reshape(2, -1) == np.arange(9000)).all()
    stock = outputs.pop("flash_attn_ext")
    assert sorted(outputs) == ["exact", "fasa", "fasa_attend"]
    assert all(nmse(stock, output) <= 5e-4 for output in outputs.values())


@pytest.mark.check
def test_bench_of_ops_on_a_gpu(on_gpu: bool) -> None:
    rows = list(ops.run([HEADS], [300], [40], 2, 2, n_layers=2, on_gpu=on_gpu))
    assert [row.op for row in rows] == ["flash_attn_ext", "exact", "fasa", "fasa_select", "fasa_attend"]
    for row in rows:
        assert len(row.samples_ns) == 2 and row.bandwidth > 0
        assert (row.n_threads, "emulated" in row.device) == ((0, True) if on_gpu else (2, False))


def test_bench_of_ops_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml._registry, "ggml_backend_init_by_type", lambda *_: None)
    with pytest.raises(FasaError, match="no GPU.*GGML_CUDA=ON"):
        list(ops.run([HEADS], [300], [40], 2, 2, on_gpu=True))


@pytest.mark.check
def test_bench_of_ops_of_prompts(tmp_path: Path) -> None:
    png = tmp_path / "ops.png"
    args = ("bench", "--op", "--geometry", "4/2x64,2/2x32", "-p", "40,1", "-d", "600,300", "-t", 2, "-r", 3)
    rows = json.loads(fasa(*args, "--layers", 2, "--plot", png, "--json").stdout)
    ops = ["flash_attn_ext", "mul_mat+soft_max_ext", "exact"]
    assert [(row["n_head"], row["n_depth"], row["n_prompt"], row["op"]) for row in rows] == [
        (n_head, depth, n, op) for n_head in (4, 2) for depth in (300, 600) for n in (1, 40) for op in ops
    ]
    for row in rows:
        n, depth = row["n_prompt"], row["n_depth"]
        pairs = sum(depth - n + 1 + i for i in range(n))  # the last token sees all cells
        assert row["n_flops"] == 2 * 2 * row["n_embd_head"] * row["n_head"] * pairs
        assert len(row["samples_ns"]) == 3 and row["n_layers"] == row["n_threads"] == 2
        assert row["flops"] == pytest.approx(1e9 * row["n_flops"] / row["median_ns"])
        assert row["matmul_share"] == pytest.approx(row["flops"] / row["matmul_flops"])
        assert list(row["ratios"]) == ops[:2]
        for ratio in row["ratios"].values():
            assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert rows[1]["ratios"]["mul_mat+soft_max_ext"] == {"median": 1, "min": 1, "max": 1}
    assert png.read_bytes().startswith(b"\x89PNG")

    head, _, *lines = fasa(*args, "-ctk", "q8_0", "-ctv", "q4_0").stdout.splitlines()  # V is not transposed
    assert head.startswith("| op") and "GFLOP/s" in head and "x flash_attn_ext" in head and len(lines) == 8 * 2
    assert all("mul_mat" not in line and line.rstrip(" |").endswith(")") for line in lines)


@pytest.mark.parametrize("types", [("f16", "f16"), ("f32", "bf16"), ("q8_0", "f16"), ("q8_0", "q4_0")])
@pytest.mark.parametrize(("depth", "n_prompt"), [(300, 37), (300, 300), (512, 1), (1, 1)])
def test_all_ops_attend_causally(types: tuple[str, str], depth: int, n_prompt: int) -> None:
    """Each token of the last cells to those before it and its own, in every layer, whatever is padding: see numpy."""
    with Graph() as graph:
        layers = prompt_ops._Layers(graph, HEADS, depth, *types, n_prompt, n_layers=2)
        outputs = {}
        for op, results in prompt_ops._ops(layers).items():
            graph.run(*results)
            first, second = (graph.read(result, np.float32, (n_prompt, 4, 64)) for result in results)
            assert (first == second).all()
            outputs[op] = first
        q = graph.read(layers.q, np.float32, (n_prompt, 4, 64)).astype(np.float64)
        k, v = (
            gguf.quants.dequantize(graph.read(cache, np.uint8), gguf.GGMLQuantizationType(type_))
            .reshape(layers.n_kv, 2, 64)
            .astype(np.float64)
            for cache, type_ in ((layers.k[0], layers.types[0]), (layers.v[0], layers.types[1]))
        )
    wanted = np.empty_like(q)
    for i, token in enumerate(q):
        seen = depth - n_prompt + 1 + i
        for head in range(4):
            weights = np.exp(k[:seen, head // 2] @ token[head] / 8)
            wanted[i, head] = weights @ v[:seen, head // 2] / weights.sum()
    assert list(outputs) == ["flash_attn_ext", *["mul_mat+soft_max_ext"] * (types[1] != "q4_0"), "exact"]
    assert all(nmse(wanted, output) <= 5e-4 for output in outputs.values())


def test_logits_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for those of stock without flash attention, it is left out."""
    n_bytes = 512 * (2 * 2 * 64 * 2 + 100 * 6)  # K, V and masks, of one layer

    def limit(n: int) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": n})())

    limit(n_bytes)
    with pytest.warns(UserWarning, match="without flash attention is left out at 300 cells: .* 100 tokens, and V"):
        rows = list(prompt_ops.run([HEADS], [100], [300], 1, 1))
    assert [row.op for row in rows] == ["flash_attn_ext", "exact"] and list(rows[1].ratios) == ["flash_attn_ext"]
    limit(n_bytes - 1)
    with pytest.raises(FasaError, match=f"{n_bytes} bytes of memory.*measure fewer"):
        list(prompt_ops.run([HEADS], [100], [300], 1, 1))


def test_layers_of_a_micro_batch() -> None:
    """As many tokens as many times fewer layers, at least one."""
    with Graph() as graph:
        counts = [prompt_ops._Layers(graph, HEADS, 512, "f16", "f16", n, None).n for n in (1, 4, 40)]
    assert counts == [32, 8, 1]


def test_matrices_are_multiplied_by_as_many_threads_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has no settings of the caller's BLAS."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    ask = "import os; print(float(len(np.ones(1)) and int('OPENBLAS_CORETYPE' not in os.environ)))"
    assert matmul.matmul_flops(2) > 0
    monkeypatch.setattr(matmul, "_PROGRAM", f"import numpy as np; {ask}")
    assert matmul.matmul_flops(1) == 1
    monkeypatch.setattr(matmul, "_PROGRAM", "raise SystemExit('no numpy')")
    with pytest.raises(FasaError, match="could not multiply matrices with numpy: no numpy"):
        matmul.matmul_flops(1)


@pytest.mark.check
def test_bench_of_prompts(tmp_path: Path) -> None:
    """Rows as of llama-bench, before those of decoding."""
    png = tmp_path / "models.png"
    args = ("bench", "--geometry", "smollm2-135m", "--layers", 2, "-p", "40,1", "-d", "300,0", "-r", 3, "-t", 1)
    rows = json.loads(fasa(*args, "-n", 2, "--budget", "64,100", "--plot", png, "--json").stdout)
    dense = [("dense", True, 0), ("dense", False, 0), ("exact", True, 0)]
    wanted = [
        (f"{work} @ d{depth}" if depth else work, *method)
        for depth in (0, 300)
        for work, sparse in (("pp1", (0,)), ("pp40", (0,)), ("tg2", (64, 100)))
        for method in (*dense, *(("fasa", True, budget) for budget in sparse))
    ]
    assert [(row["test"], row["method"], row["flash_attn"], row["budget"]) for row in rows] == wanted
    for row in rows:
        assert (row["n_prompt"] == 0) == (row["n_gen"] > 0) and row["n_threads"] == 1 and row["fill"] == "random"
        assert len(row["samples_ts"]) == 3 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        n_tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([1e9 * n_tokens / ns for ns in row["samples_ns"]])
    prompts = [row for row in rows if row["n_prompt"]]
    assert {row["layers_sparse"] for row in prompts} == {0}  # one token that is a prompt, too
    assert {row["layers_sparse"] for row in rows if row["n_gen"] and row["budget"]} == {0.5}
    assert {row["layers_exact"] for row in prompts if row["method"] == "exact"} == {1}
    assert {row["prompt_mass"] for row in rows} == {1000}
    rivals = [row["ratio"] for row in prompts if row["method"] == "dense"]
    assert rivals.count(1) == len(rivals) // 2  # the faster one of each test
    assert png.read_bytes().startswith(b"\x89PNG")

    table = fasa(*args, "-n", 0).stdout.splitlines()
    assert len(table) == 2 + 2 * 2 * 4 and "| pp40 @ d300 |" in table[-1] and "tg" not in "".join(table)


def test_prompts_are_read_in_batches(tmp_path: Path) -> None:
    """Of the model's size, each with the logits of its last token; all of them are prompts."""
    llm = random_llama(tmp_path, fasa_min_ctx=1, fasa_budget=64, n_batch=32, n_threads=1, n_threads_batch=2)
    (*_, row) = models.run(llm, [1000], 0, 1, n_prompts=[70], fill="random")
    assert (row.test, row.method, row.layers_sparse, row.n_threads) == ("pp70 @ d1000", "fasa", 0, 2)
    assert llm.fasa.stats().n_steps_prompt == 3 and llm.fasa.stats().n_steps_decode == 0
    sequence.decode(llm.ctx, [1], n_logits=1)
    assert llm.fasa.stats().n_steps_decode == 1  # what follows is none
    llm.close()


def test_prompts_are_read_by_blocks(tmp_path: Path) -> None:
    llm = random_llama(tmp_path, fasa_min_ctx=1, fasa_budget=64, fasa_prompt_mass=900)
    rows = list(models.run(llm, [1000], 1, 1, n_prompts=[70], fill="random"))
    found = [(row.label, row.layers_sparse) for row in rows if row.method in ("exact", "fasa")]
    assert found == [("exact", 0), ("fasa, mass 900", 0.5), ("exact", 0), ("fasa, budget 64", 0.5)]
    llm.close()


@pytest.mark.check
@pytest.mark.parametrize("fill", ["random", "prefill"])
def test_bench_of_a_geometry(fill: str, tmp_path: Path) -> None:
    png = tmp_path / "models.png"
    args = ("bench", "--geometry", "smollm2-135m", "--layers", 2, "-d", "300,40", "-n", 2, "-r", 3, "--fill", fill)
    rows = json.loads(fasa(*args, "--budget", "64,100", "--plot", png, "--json").stdout)
    methods = [("dense", True, 0), ("dense", False, 0), ("exact", True, 0), ("fasa", True, 64), ("fasa", True, 100)]
    assert [(row["n_depth"], row["method"], row["flash_attn"], row["budget"]) for row in rows] == [
        (depth, *method) for depth in (40, 300) for method in methods
    ]
    assert {row["fill"] for row in rows} == {fill} and {len(row["samples_ts"]) for row in rows} == {3}
    assert rows[0]["model_filename"] == "smollm2-135m-2L-q4_0.gguf"
    assert [row["layers_sparse"] for row in rows] == 2 * [0, 0, 0, 0.5, 0.5]  # depth is rounded up to 256
    assert [row["layers_exact"] for row in rows] == 2 * [0, 0, 1, 0, 0]
    assert [row["exact"] for row in rows] == 2 * [False, False, True, False, False]
    assert all(row["read_ratio"] < 1 for row in rows[-2:])
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_random_models_decode_from_random_caches(arch: str, tied: bool, tmp_path: Path) -> None:
    """Where all cells are attended to, FASA and dense attention agree; the model is no mere noise amplifier."""
    llm = random_llama(tmp_path, replace(TINY, arch=arch, tied=tied), fasa_min_ctx=1, fasa_budget=1024)
    logits = []
    for settings in ({"enabled": False}, {"budget": 1024, "enabled": True}, {"budget": 64}):
        models._fill([llm], 1000, [5])
        llm.fasa.configure(**settings)
        llm.fasa.reset_stats()
        sequence.decode(llm.ctx, [7], n_logits=1)
        assert bool(llm.fasa.stats().n_layers_sparse) == (settings.get("enabled") is not False)
        logits.append(sequence.logits(llm.ctx, 1)[0])
    check(logits[0], logits[1], 5e-4)
    assert np.isfinite(logits[2]).all() and nmse(logits[0], logits[2]) > 1e-3
    llm.close()


@pytest.mark.check
@pytest.mark.parametrize(
    ("types", "flash_attn"), [(("f16", "f16"), 1), (("f16", "f16"), 0), (("f32", "bf16"), 0), (("q8_0", "q4_0"), 1)]
)
def test_a_state_is_written_as_llama_cpp_does(model: Path, types: tuple[str, str], flash_attn: int) -> None:
    """What a state's layout says makes the same bytes again, and random cells in their place are cells."""
    type_k, type_v = map(capi.cache_type, types)
    params = {"type_k": type_k, "type_v": type_v, "flash_attn_type": flash_attn}
    tokens = TEXTS[0][:601]
    with Context(model, **params) as ctx:
        ctx.read(tokens[:1])
        layout = StateLayout.of(ctx.ctx)
        assert layout.v_trans == 1 - flash_attn and len(layout.sections) == 4
        ctx.read(tokens[1:600], start=1)
        state = sequence.save(ctx.ctx)
        wanted = ctx.step(tokens[600], 600)
        mine = state.copy()
        layout.adopt(mine, 600)
        assert (mine == state).all()
        with pytest.raises(FasaError, match="is not of 599 cells"):
            layout.adopt(mine, 599)
    with Context(model, **params) as ctx:
        sequence.restore(ctx.ctx, state)
        tolerance = SAME if type_k < 2 or type_k == 30 else 1e-2
        check(wanted, ctx.step(tokens[600], 600), tolerance)
        sequence.restore(ctx.ctx, layout.random_state(900))
        found = ctx.step(tokens[600], 900)
        assert np.isfinite(found).all() and nmse(wanted, found) > 0.01
        assert bool(ctx.stats().n_layers[0]) == bool(flash_attn)
        with pytest.raises(FasaError, match="cannot restore"):
            sequence.restore(ctx.ctx, layout.random_state(5000))


def test_one_random_state_serves_all_contexts(tmp_path: Path) -> None:
    """Flash attention or not: the same keys, so only what V became differs."""
    llm = random_llama(tmp_path)
    stocks = [models._stock(llm, flash_attn).llm for flash_attn in (True, False)]
    models._fill([llm, *stocks], 500, [5])
    states = [sequence.save(one.ctx) for one in (llm, *stocks)]
    assert (states[0] == states[1]).all() and len(states[2]) == len(states[0])
    assert 0 < np.count_nonzero(states[0] != states[2]) < 200
    for one in (llm, *stocks):
        one.close()


@pytest.mark.parametrize("arch", ["gemma3", "qwen2vl"])
def test_other_memories_are_prefilled(arch: str, tmp_path: Path) -> None:
    llm = fasa_edge.Llama(str(annotated_tiny(tmp_path, arch)), n_ctx=1024, verbose=False)
    with pytest.warns(UserWarning, match="not one plain KV cache"):
        rows = list(models.run(llm, [100], 1, 1, fill="random"))
    assert {row.fill for row in rows} == {"prefill"} and rows[-1].layers_sparse > 0
    llm.close()


def test_the_figures_show_the_rows() -> None:
    rows = list(ops.run([HEADS], [300, 600], [40], 1, 2, n_layers=1))
    (axes,) = draw_ops(rows).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["flash_attn_ext", "exact", "fasa, budget 40"]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    drawn = {tuple(line.get_ydata()) for line in lines}
    for op in ("flash_attn_ext", "exact", "fasa"):
        mine = [row for row in rows if row.op == op]
        assert tuple(1e-6 * row.median_ns for row in mine) in drawn
        assert tuple(1e-6 * row.floor_ns for row in mine) in drawn

    row = models.BenchRow("m.gguf", 1, 1, 2, "f16", "f16", True, 0, 4, 100, "random", "fasa", False, 64)
    row.samples_ts = [3.0, 1.0, 2.0]
    (axes,) = draw_models([row]).axes
    assert (
        axes.get_title() == "m.gguf, 2 threads, tg4"
        and axes.get_legend().get_texts()[0].get_text() == "fasa, budget 64"
    )
    assert (100, 2.0) in {tuple(point) for line in axes.get_lines() for point in line.get_xydata().tolist()}


def test_what_a_state_is_not() -> None:
    assert StateLayout.parse(np.zeros(0, np.uint8)) is None
    assert StateLayout.parse(np.zeros(200, np.uint8)) is None
    assert StateLayout.parse(np.full(200, 255, np.uint8)) is None


@pytest.mark.parametrize("type_name", capi.CACHE_TYPES)
def test_random_data(type_name: str) -> None:
    n, std = 1 << 16, 0.25
    data = random_data(np.random.default_rng(0), type_name, n, std)
    ggml_type = capi.cache_type(type_name)
    assert len(data) == n * capi.bytes_per_element(ggml_type)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(ggml_type)).reshape(-1)
    assert len(values) == n and np.isfinite(values).all()
    assert abs(values.mean()) < 0.02 * std and values.std() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("type_name", capi.CACHE_TYPES)
def test_large_memory_is_filled_from_little(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasa_edge.bench.random_data._N_DIRECT", 1 << 10)
    monkeypatch.setattr("fasa_edge.bench.random_data._N_DRAWN", 1 << 15)
    ggml_type, rng = capi.cache_type(type_name), np.random.default_rng(0)
    filler, outs = RandomFiller(rng), []
    for n in (32, 1 << 17, 1 << 17):  # directly; from the same numbers, but otherwise
        outs.append(np.full(int(n * capi.bytes_per_element(ggml_type)), 255, np.uint8))
        filler.fill(type_name, outs[-1], 0.25)
    assert (outs[1] != outs[2]).mean() > 0.1
    for out in outs[1:]:
        values = gguf.quants.dequantize(out, gguf.GGMLQuantizationType(ggml_type)).reshape(-1)
        assert np.isfinite(values).all() and abs(values.mean()) < 0.01
        assert values.std() == pytest.approx(0.25, rel=0.04)


def test_rivals_take_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = random_llama(tmp_path)
    own = llm.n_ctx() * 2 * HEADS.n_head_kv * HEADS.n_embd_head * 2 * 2  # layers, K and V, f16

    def limit(n: int) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": n})())

    limit(own)
    too_little = f"for 1 contexts of 2048 cells.* and {own} are left of the machine's memory: lower"
    with pytest.raises(FasaError, match=too_little):
        list(models.run(llm, [100], 1, 1, fill="random"))
    args = ("bench", "--geometry", "smollm2-135m", "--layers", 1, "-d", 2000, "-n", 48)
    assert "for 2 contexts of 2048 cells" in fasa(*args, code=1).stderr
    limit(3 * own)
    with pytest.warns(UserWarning, match="without flash attention is left out"):
        rows = list(models.run(llm, [100], 1, 1, fill="random"))
    assert [row.label for row in rows] == ["dense, flash attention", "exact", "fasa, budget 512"]
    llm.close()
    limit(1000)
    with pytest.raises(FasaError, match="1000 are left of the machine's memory: measure fewer"):
        list(ops.run([HEADS], [300], [40], 1, 1))


def test_settings_are_as_before(tmp_path: Path) -> None:
    llm = random_llama(tmp_path, fasa_budget=100)
    settings = llm.fasa.settings
    with warnings.catch_warnings(action="error"):
        list(models.run(llm, [0], 1, 1, budgets=[64, 80], fill="random"))
    assert llm.fasa.settings == settings
    llm.close()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--op",), 2, "takes no MODEL but a --geometry"),
        (("--op", "--geometry", "1/2x64"), 1, "multiple of the KV heads"),
        (("--op", "--geometry", "2/2x40"), 1, "multiple of 16"),
        (("--op", "--geometry", "2/2x80", "-ctk", "q8_0"), 1, "multiple of 32"),
        (("--op", "--geometry", "llama"), 1, "as 32/8x64, or one of llama-3.1-8b"),
        (("--op", "--geometry", "2/2x32", "--n-tip", 17), 1, "choose 1 to 16"),
        (("--op", "--geometry", "2/2x32", "-d", 0), 1, "at least 1 of each"),
        (("--op", "--geometry", "2/2x32", "--layers", 65), 1, "choose 1 to 64"),
        (("--op", "--geometry", "2/2x32", "-p", 0), 1, "at least 1 of each"),
        (("--op", "--geometry", "2/2x32", "-p", "8,600", "-d", "512,9000"), 1, "600 tokens of a prompt do not fit 512"),
        (("--op", "--geometry", "2/2x32", "-p", 8, "--budget", 64), 2, "--budget has no effect with --op -p"),
        (("--op", "--geometry", "2/2x32", "-p", 8, "--n-tip", 8), 2, "--n-tip has no effect with --op -p"),
        (("--op", "--geometry", "2/2x32", "-p", 8, "-ngl", 1), 2, "--n-gpu-layers has no effect with --op -p"),
        (("--op", "--geometry", "2/2x80", "-p", 8, "-ctk", "q8_0"), 1, "multiple of 32"),
        (("--geometry", "smollm2-135m", "--layers", 1, "-n", 0), 1, "no tokens to decode and no prompts"),
        (("--geometry", "smollm2-135m", "--layers", 1, "-p", "8,-1"), 1, "prompts of [8, -1]"),
        (
            ("--geometry", "smollm2-135m", "--layers", 1, "-p", 900, "-d", 0, "-c", 256),
            1,
            "900 tokens exceed the context",
        ),
        ((), 2, "either a MODEL or a --geometry"),
        (("--geometry", "32/8x64"), 1, "choose from llama-3.1-8b"),
        (("--geometry", "smollm2-135m", "-d", "1,x"), 2, "expected numbers separated by commas"),
        (("--geometry", "smollm2-135m", "--plot", "none/x.png"), 1, "is not a folder"),
    ],
)
def test_errors(args: tuple, code: int, message: str) -> None:
    assert message in fasa("bench", *args, code=code).stderr.replace("\n", " ")


def test_geometries() -> None:
    assert str(find_heads("llama-3.2-1b")) == "32/8x64" and find_heads("32/8x64") == GEOMETRIES["llama-3.2-1b"].heads
    for geometry in GEOMETRIES.values():
        assert geometry.n_embd % 32 == geometry.n_ff % 32 == 0
