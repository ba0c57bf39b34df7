"""Who chooses the cells: every policy in a running model against its definition in numpy, on the Q and K captured."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fasa_edge
from fasa_edge.config import SELECTS
from fasa_edge.convert import inspect
from fasa_edge.runtime import capi
from fasa_edge.runtime.capi import Capture
from fasa_edge.runtime.capi_eval import policies
from fasa_edge.runtime.library import lib_dir, llama_cpp

import numpy as np
import pytest
import reference
from runtime import GGML_TYPES, TEXTS, TINY_BUDGET, Context, annotated_tiny

N_PROMPT, N_STEPS = 300, 6
N_SINK, N_RECENT = 4, 8  # of annotated_tiny
N_HEAD, N_HEAD_KV, N_LAYER = 6, 2, 2
WINDOW, POOL, PAGE = 32, 7, 16


@dataclass
class Layer:
    """What one layer attends with, of a number of tokens."""

    q: np.ndarray  # float32 [n_tokens, n_head, n_embd_head]
    k: np.ndarray  # float32 [n_tokens, n_head_kv, n_embd_head], rounded as the cache does

    def logits(self, token: int, head: int) -> np.ndarray:
        """Of a query head, over the cells up to the token."""
        k = self.k[: token + 1, head * self.k.shape[1] // self.q.shape[1]]
        return k @ self.q[token, head] / np.sqrt(k.shape[-1])

    def weights(self, token: int, head: int, cells: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The softmax of some of these."""
        logits = self.logits(token, head)[cells]
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_tip=8, n_head=N_HEAD, n_head_kv=N_HEAD_KV)


@pytest.fixture(scope="module")
def ctx(model: Path) -> Iterator[Context]:
    with Context(model, n_ubatch=128) as ctx:
        ctx.prompt, ctx.bytes_kv = read_prompt(ctx), 0
        yield ctx


def read_prompt(
    ctx: Context, tokens: list[int] = TEXTS[0][:N_PROMPT], n_layer: int = N_LAYER, policy: str = "h2o"
) -> list[Layer]:
    """The layers of a prompt that was read densely and, with this policy, observed."""
    ctx.configure(enabled=False, policy=policy)
    capi.set_capture(ctx.ctx, Capture.Q, Capture.K)
    blocks = []
    for start in range(0, len(tokens), 128):
        ctx.read(tokens[start : start + 128], start=start)
        blocks.append(captured_layers(ctx, n_layer))
    return [join(parts) for parts in zip(*blocks, strict=True)]


def captured_layers(ctx: Context, n_layer: int = N_LAYER) -> list[Layer]:
    layers = []
    for il in range(n_layer):
        q, k = (capi.captured(ctx.ctx, il, what) for what in (Capture.Q, Capture.K))
        layers.append(Layer(q, k.astype(np.float16).astype(np.float32)))
    return layers


def join(parts: tuple[Layer, ...]) -> Layer:
    return Layer(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("q", "k")))


def decode(ctx: Context, batch: int, **settings) -> list[tuple[Layer, list[np.ndarray], np.ndarray]]:
    """Decode a few tokens after the prompt.

    Returns:
        For each layer what all tokens attended with, the cells chosen for each of the new ones,
        int32 [n_head_sel, n_list], and their attention mass, float32 [N_STEPS, n_head].
    """
    llama_cpp.llama_memory_seq_rm(ctx.memory, 0, N_PROMPT, -1)
    ctx.configure(**{"enabled": True, "select": "group", "budget": TINY_BUDGET, **settings})
    capi.set_capture(ctx.ctx, *Capture)
    ctx.stats()
    layers, cells, mass = [[layer] for layer in ctx.prompt], [[], []], [[], []]
    for start in range(0, N_STEPS, batch):
        ctx.read(TEXTS[1][start : start + batch], start=N_PROMPT + start)
        stats = ctx.stats()
        assert stats.n_layers[0] == N_LAYER
        ctx.bytes_kv += stats.bytes_kv
        for il, layer in enumerate(captured_layers(ctx)):
            layers[il].append(layer)
            cells[il].extend(capi.captured(ctx.ctx, il, Capture.CELLS))
            mass[il].append(capi.captured(ctx.ctx, il, Capture.MASS))
    joined = map(join, map(tuple, layers))
    return [(layer, chosen, np.concatenate(m)) for layer, chosen, m in zip(joined, cells, mass, strict=True)]


def heads_of(selector: int, n_sel: int) -> range:
    """The query heads that share the choice of a selecting head."""
    return range(selector * N_HEAD // n_sel, (selector + 1) * N_HEAD // n_sel)


def group_scores(logits: list[np.ndarray], how: str = "max") -> np.ndarray:
    """One score for each cell, or page."""
    if len(logits) == 1:
        return logits[0]
    scores = [row - np.logaddexp.reduce(row.astype(np.float64)) for row in logits]
    return np.max(scores, axis=0) if how == "max" else np.logaddexp.reduce(scores, axis=0)


def forced_cells(token: int) -> np.ndarray:
    return np.r_[:N_SINK, token + 1 - N_RECENT : token + 1]


def best_cells(scores: np.ndarray, token: int) -> np.ndarray:
    scores = scores.copy()
    scores[forced_cells(token)] = np.inf
    return np.argsort(-scores, kind="stable")[:TINY_BUDGET]


def oracle(layer: Layer, heads: range, tokens: range) -> list[np.ndarray]:
    return [best_cells(group_scores([layer.logits(token, head) for head in heads]), token) for token in tokens]


def streaming(layer: Layer, heads: range, tokens: range) -> list[np.ndarray]:
    return [np.r_[:N_SINK, token + 1 - TINY_BUDGET + N_SINK : token + 1] for token in tokens]


def by_pages(
    layer: Layer, heads: range, tokens: range, score: Callable[[np.ndarray, np.ndarray], float]
) -> list[np.ndarray]:
    """Whole pages by the score of a query, [n_embd_head], and a page's keys, [n_cells, n_embd_head]."""
    chosen = []
    for token in tokens:
        k = layer.k[: token + 1, heads[0] // (N_HEAD // N_HEAD_KV)]
        pages = np.array_split(k, range(PAGE, len(k), PAGE))
        scores = [np.array([score(q, page) for page in pages]) / len(q) ** 0.5 for q in layer.q[token, heads]]
        order = np.argsort(-group_scores(scores), kind="stable")
        by_page = np.concatenate([np.arange(len(k))[page * PAGE : (page + 1) * PAGE] for page in order])
        forced = forced_cells(token)
        chosen.append(np.r_[forced, by_page[~np.isin(by_page, forced)]][:TINY_BUDGET])
    return chosen


def quest(layer: Layer, heads: range, tokens: range) -> list[np.ndarray]:
    return by_pages(layer, heads, tokens, lambda q, page: np.maximum(q * page.min(axis=0), q * page.max(axis=0)).sum())


def unique(layer: Layer, heads: range, tokens: range) -> list[np.ndarray]:
    return by_pages(
        layer,
        heads,
        tokens,
        lambda q, page: page.mean(axis=0) @ q + np.linalg.norm(q) * np.sqrt(page.var(axis=0).sum()) / 2,
    )


def snapkv(layer: Layer, heads: range, tokens: range) -> list[np.ndarray]:
    n_before = N_PROMPT - WINDOW
    votes = np.zeros(n_before)
    for head in heads:
        for token in range(n_before, N_PROMPT):
            votes += layer.weights(token, head)[:n_before]
    padded = np.pad(votes, POOL // 2)
    pooled = np.lib.stride_tricks.sliding_window_view(padded, POOL).max(axis=1)
    best = np.argsort(-pooled, kind="stable")[: TINY_BUDGET - WINDOW]
    return [np.r_[best, n_before : token + 1] for token in tokens]


def h2o(layer: Layer, heads: range, tokens: range) -> list[np.ndarray]:
    sums = np.zeros(len(layer.k))
    for token in range(N_PROMPT):
        for head in heads:
            sums[: token + 1] += layer.weights(token, head)
    recent = np.arange(N_PROMPT - TINY_BUDGET // 2, N_PROMPT)
    heavy = np.argsort(-sums[: recent[0]], kind="stable")[: TINY_BUDGET - len(recent)]
    kept, chosen = np.sort(np.r_[heavy, recent]), []
    for token in tokens:
        kept = np.r_[kept, token]
        kept = np.delete(kept, sums[kept[: -TINY_BUDGET // 2]].argmin())
        for head in heads:
            sums[kept] += layer.weights(token, head, kept)
        chosen.append(kept)
    return chosen


@pytest.mark.check
@pytest.mark.parametrize("batch", [1, N_STEPS])
@pytest.mark.parametrize("select", ["group", "head"])
@pytest.mark.parametrize("twin", [oracle, streaming, quest, unique, snapkv, h2o])
def test_policy_is_its_definition(twin, select: str, batch: int, ctx: Context) -> None:
    n_sel = N_HEAD if select == "head" else N_HEAD_KV
    tokens = range(N_PROMPT, N_PROMPT + N_STEPS)
    for layer, chosen, _ in decode(ctx, batch, policy=twin.__name__, select=select):
        for selector in range(n_sel):
            wanted = twin(layer, heads_of(selector, n_sel), tokens)
            for cells, expected in zip(chosen, wanted, strict=True):
                assert cells[selector][cells[selector] >= 0].tolist() == sorted(expected.tolist())


@pytest.mark.check
@pytest.mark.parametrize("budget_ctx", [0, 128, 300, 1024])
def test_the_budget_grows_by_the_root_of_the_cells(budget_ctx: int, ctx: Context) -> None:
    n_kv = 512  # what is in use, as llama.cpp counts it: by 256
    growth = max(1, n_kv / budget_ctx) ** 0.5 if budget_ctx else 1
    for _, chosen, _ in decode(ctx, 1, budget_ctx=budget_ctx):
        assert {(cells >= 0).sum() for token in chosen for cells in token} == {int(TINY_BUDGET * growth)}


def tips_of(model: Path, n_layer: int = N_LAYER) -> list[tuple[np.ndarray, np.ndarray]]:
    """By layer, the dims of the dominant chunks, int32 [n_head_kv, n_dim], and their ranges [n_head_kv, 2, n_dim]."""
    profile = inspect(model).profile
    llm = fasa_edge.Llama(str(model), n_ctx=256, verbose=False)
    planes = [capi.chunk_dims(layer) for layer in capi.layer_geometry(llm.model)]
    llm.close()
    res = []
    for il, dims in enumerate(planes[:n_layer]):
        chunks, centre, step = (part[il][:, : profile.n_tip] for part in (profile.chunks, profile.centre, profile.step))
        steps = np.broadcast_to(step[..., None], centre.shape)
        ranges = np.stack([part.reshape(len(chunks), -1) for part in (centre, steps)], 1)
        res.append((dims[chunks].reshape(len(chunks), -1), ranges))
    return res


def assert_reference(
    layer: Layer, chosen: list[np.ndarray], tips: tuple[np.ndarray, np.ndarray], select: str, forced: np.ndarray
) -> None:
    """The cells chosen for the last tokens are those of the reference, but for such as tie with the last one taken."""
    n_new, n_kv = len(chosen), len(layer.k)
    mask = np.triu(np.full((n_kv, n_kv), -np.inf), 1)[-n_new:]
    levels, scale = reference.store(layer.k, *tips), layer.q.shape[-1] ** -0.5
    scores = reference.score(layer.q[-n_new:], levels, *tips, mask, scale, by_head=select == "head")
    wanted = reference.select(scores, TINY_BUDGET, forced)
    for it, selector in np.ndindex(wanted.shape[:2]):
        cells, expected = set(chosen[it][selector].tolist()), set(wanted[it, selector].tolist())
        row = scores[it, selector]
        last = min(row[cell] for cell in expected - set(forced[it].tolist()))
        assert len(cells) == len(expected) and all(abs(row[cell] - last) < 1e-5 for cell in cells ^ expected)


@pytest.mark.check
@pytest.mark.parametrize("select", ["group", "head"])
def test_fasa_chooses_what_the_reference_does(select: str, ctx: Context, model: Path) -> None:
    forced = np.stack([forced_cells(token) for token in range(N_PROMPT, N_PROMPT + N_STEPS)]).astype(np.int32)
    for (layer, chosen, _), tips in zip(decode(ctx, 1, policy="fasa", select=select), tips_of(model), strict=True):
        assert_reference(layer, chosen, tips, select, forced)


@pytest.mark.parametrize("select", ["group", "head"])
def test_so_it_does_in_a_real_model(select: str, fasa_model_path: Path) -> None:
    profile = inspect(fasa_model_path).profile
    n_layer, n_dense = len(profile.chunks), profile.config.n_dense_layers
    with Context(fasa_model_path, n_ubatch=128) as ctx:
        prompt = read_prompt(ctx, list(range(1000, 1400)), n_layer, policy="fasa")
        settings = {"budget": TINY_BUDGET, "min_ctx": 1, "n_sink": N_SINK, "n_recent": N_RECENT, "select": select}
        ctx.configure(enabled=True, policy="fasa", **settings)
        capi.set_capture(ctx.ctx, *Capture)
        ctx.read([2000, 2001, 2002], start=400)
        steps = captured_layers(ctx, n_layer)
        forced = np.stack([forced_cells(token) for token in range(400, 403)]).astype(np.int32)
        for il, tips in list(enumerate(tips_of(fasa_model_path, n_layer)))[n_dense:]:
            chosen = list(capi.captured(ctx.ctx, il, Capture.CELLS))
            assert_reference(join((prompt[il], steps[il])), chosen, tips, select, forced)


def test_variants_on_the_dominant_chunks(ctx: Context, model: Path) -> None:
    """The sum of a group's softmax, unrounded; and other chunks than the dominant ones."""
    for (layer, chosen, _), (dims, _) in zip(decode(ctx, 1, policy="fasa_sum"), tips_of(model), strict=True):
        masked = [np.isin(np.arange(layer.q.shape[-1]), row) for row in dims]
        for selector in range(N_HEAD_KV):
            kept = Layer(layer.q * masked[selector], layer.k)
            for it, token in enumerate(range(N_PROMPT, N_PROMPT + N_STEPS)):
                logits = [kept.logits(token, head) for head in heads_of(selector, N_HEAD_KV)]
                expected = best_cells(group_scores(logits, "sum"), token)
                assert chosen[it][selector].tolist() == sorted(expected.tolist())
    mass = {policy: np.mean([m for *_, m in decode(ctx, 1, policy=policy)]) for policy in ("random", "fasa", "oracle")}
    assert mass["random"] < mass["fasa"] < mass["oracle"] < 1
    assert all((np.array(a[1]) == b[1]).all() for a, b in zip(*[decode(ctx, 1, policy="random")] * 2, strict=True))


@pytest.mark.check
@pytest.mark.parametrize("select", ["group", "head"])
@pytest.mark.parametrize("policy", policies())
def test_mass_and_bytes_are_those_of_the_cells(policy: str, select: str, ctx: Context) -> None:
    ctx.bytes_kv = n_rows = 0
    for layer, chosen, mass in decode(ctx, 1, policy=policy, select=select):
        n_rows += sum((cells >= 0).sum() for cells in chosen)
        for it, head in np.ndindex(N_STEPS, N_HEAD):
            cells = chosen[it][head * len(chosen[it]) // N_HEAD]
            weight = layer.weights(N_PROMPT + it, head)[cells[cells >= 0]].sum()
            assert mass[it, head] == pytest.approx(weight, abs=2e-3)
    assert ctx.bytes_kv == n_rows * 2 * 2 * ctx.prompt[0].k.shape[-1]  # f16, of K and of V


@pytest.mark.check
@pytest.mark.parametrize(
    ("policy", "type_k", "settings"),
    [
        ("snapkv", "f16", {}),  # the prompt was read before anybody observed it
        ("h2o", "f16", {}),
        ("random", "q8_0", {}),  # rotated
        ("fasa_sum", "q8_0", {}),
        ("quest", "q8_0", {}),
        ("h2o", "f16", {"n_seq_max": 2, "kv_unified": False}),
    ],
)
def test_policy_that_cannot_choose_leaves_the_layer_dense(policy, type_k, settings, model: Path) -> None:
    with Context(model, type_k=GGML_TYPES[type_k], type_v=GGML_TYPES[type_k], **settings) as ctx:
        for seq in range(settings.get("n_seq_max", 1)):
            if seq:
                ctx.configure(policy=policy)  # observes the second sequence
            ctx.read(TEXTS[0][:200], seq)
        ctx.configure(policy=policy)
        ctx.stats()
        ctx.decode([(TEXTS[1][0], 200, (seq,)) for seq in range(settings.get("n_seq_max", 1))])
        assert ctx.reasons() == {"policy": N_LAYER}


@pytest.mark.check
def test_policy_and_select_are_settings(model: Path) -> None:
    load = lambda **settings: fasa_edge.Llama(str(model), n_ctx=512, verbose=False, **settings)  # noqa: E731
    llm = load(kv_overrides={"fasa.policy": "quest"}, fasa_select="head")
    assert {"policy": "quest", "select": "head"}.items() <= llm.fasa.settings.items()
    llm.fasa.configure(policy="fasa", select="group")
    assert llm.fasa.settings["policy"] == "fasa"
    for name, value in (("policy", "best"), ("select", "layer")):
        message = f"{name} = '{value}' is unknown: choose from (fasa|group), "
        with pytest.raises(fasa_edge.SchemaError, match=message):
            llm.fasa.configure(**{name: value})
        with pytest.raises(fasa_edge.ModelError, match=message):
            load(kv_overrides={f"fasa.{name}": value})
    llm.close()


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries without the one for evaluation, as packages have them."""
    folder = tmp_path_factory.mktemp("packaged") / "lib"
    shutil.copytree(lib_dir(), folder, ignore=shutil.ignore_patterns("*llama-fasa-eval*"))
    return folder


# Runs in a child process: FASA is all there is, and whatever else is asked for is told where it is to be had.
_PACKAGED_SCRIPT = """
import sys, warnings
import fasa_edge, llama_cpp
from fasa_edge.runtime import capi
warnings.simplefilter("error")
path = sys.argv[1]
remedy = "CMAKE_ARGS=-DFASA_EVAL=ON"
def refused(call, error=fasa_edge.LibraryError, text=remedy):
    try:
        call()
    except error as refusal:
        assert text in str(refusal), refusal
    else:
        raise AssertionError(f"not refused: {text}")
refused(lambda: fasa_edge.Llama(path, n_ctx=256, fasa_policy="oracle", verbose=False))
llm = fasa_edge.Llama(path, n_ctx=256, fasa_policy="fasa", verbose=False)
refused(lambda: llm.fasa.configure(policy="oracle"))
llm.fasa.configure(policy="fasa", budget=32)
assert llm.fasa.settings["policy"] == "fasa"
params = capi.get_params(llm.ctx)
params._policy = 2
refused(lambda: capi.set_params(llm.ctx, params))
assert llm.fasa.settings["policy"] == "fasa"
report = "fasa.policy: other policies than fasa take libllama-fasa-eval, which is not loaded (llama-fasa-eval.h)"
for policy, lines in (("oracle", [report]), ("fasa", [])):
    stock = llama_cpp.Llama(path, n_ctx=256, flash_attn=True, kv_overrides={"fasa.policy": policy}, verbose=False)
    assert capi.override_report(stock.model) == lines
    assert capi.get_params(stock.ctx).policy == "fasa"
"""


def run_packaged(packaged: Path, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"FASA_LIB_PATH": str(packaged)}
    return subprocess.run(
        [sys.executable, "-c", *map(str, arguments)],
        env=environment,
        cwd=packaged.parent,
        capture_output=True,
        text=True,
    )


def test_without_the_library_there_is_fasa_alone(packaged: Path, model: Path) -> None:
    done = run_packaged(packaged, _PACKAGED_SCRIPT, model)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["oracle", "snapkv"])
def test_eval_without_the_library(method: str, packaged: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text to be decoded. " * 40)
    sizes = ["--prefix", 200, "--n-tokens", 8, "--blocks", 1, "--budgets", 32, "--text", tmp_path / "text.txt"]
    command = ["from fasa_edge.cli import main; main()", "eval", model, *sizes, "--methods"]
    done = run_packaged(packaged, *command, "all,fasa")
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in ("dense", "noise", "all", "fasa"))
    done = run_packaged(packaged, *command, f"fasa,{method}")
    assert done.returncode != 0 and not done.stdout
    assert "llama-fasa-eval" in done.stderr and "make install" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [-1, 2, 8, 99, -(1 << 31), (1 << 31) - 1])
def test_numbers_without_a_name_are_refused(number: int, model: Path) -> None:
    llm = fasa_edge.Llama(str(model), n_ctx=512, verbose=False)
    llm.eval(TEXTS[0][:8])
    settings = llm.fasa.settings
    for name, names in (("select", SELECTS), ("policy", policies())):
        if 0 <= number < len(names):
            continue
        params = capi.get_params(llm.ctx)
        setattr(params, f"_{name}", number)
        with pytest.raises(fasa_edge.FasaError, match=f"refused the settings .*'{name}': '{number}'"):
            capi.set_params(llm.ctx, params)
    capi.set_capture(llm.ctx, *Capture)
    llm.eval(TEXTS[0][8:9])
    assert capi.captured(llm.ctx, 0, Capture.Q) is not None
    if number not in list(Capture):
        assert capi.captured(llm.ctx, 0, number) is None
    assert llm.fasa.settings == settings
    llm.close()


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_what_was_observed_of_another_prompt_is_not_used(policy: str, model: Path) -> None:
    with Context(model) as ctx:
        read_prompt(ctx)
        ctx.configure(enabled=True, policy=policy, budget=TINY_BUDGET)
        ctx.reasons()
        ctx.step(TEXTS[1][0], N_PROMPT)
        assert ctx.reasons() == {"none": N_LAYER}
        llama_cpp.llama_memory_seq_rm(ctx.memory, 0, 20, -1)  # of the prompt only a part is left
        ctx.step(TEXTS[1][0], 20)
        assert ctx.reasons() == {"none": N_LAYER}
        llama_cpp.llama_memory_clear(ctx.memory, True)
        ctx.configure(policy="fasa")
        ctx.read(TEXTS[2][:40])
        ctx.configure(policy=policy)
        ctx.reasons()
        ctx.step(TEXTS[1][0], 40)
        assert ctx.reasons() == {"policy": N_LAYER}


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_another_sequence_than_the_observed_one(policy: str, model: Path) -> None:
    with Context(model, n_seq_max=2, kv_unified=True) as ctx:
        ctx.read(TEXTS[1][:100], seq=1)
        ctx.configure(policy=policy)
        ctx.read(TEXTS[0][:200], seq=0)
        ctx.reasons()
        for seq, pos, reason in ((0, 200, "none"), (1, 100, "policy"), (0, 201, "none")):
            ctx.step(TEXTS[2][0], pos, seq)
            assert ctx.reasons() == {reason: N_LAYER}
        ctx.configure(enabled=False)
        llama_cpp.llama_memory_seq_rm(ctx.memory, 0, 150, -1)
        ctx.read(TEXTS[2][:30], start=150)  # the tokens that were cut off had been observed, too
        ctx.configure(enabled=True)
        ctx.reasons()
        ctx.step(TEXTS[2][0], 180)
        assert ctx.reasons() == {"policy": N_LAYER}


def test_streams_are_captured_one_after_the_other(model: Path) -> None:
    with Context(model, n_seq_max=2, kv_unified=False) as ctx:
        alone = []
        for seq in (0, 1):
            ctx.read(TEXTS[seq][:200], seq)
        capi.set_capture(ctx.ctx, *Capture)
        for seq in (0, 1):
            ctx.step(TEXTS[2][seq], 200, seq)
            alone.append([capi.captured(ctx.ctx, 1, what) for what in (Capture.CELLS, Capture.MASS)])
            llama_cpp.llama_memory_seq_rm(ctx.memory, seq, 200, -1)
        ctx.decode([(TEXTS[2][seq], 200, (seq,)) for seq in (0, 1)])
        for what, parts in zip((Capture.CELLS, Capture.MASS), zip(*alone, strict=True), strict=True):
            both = capi.captured(ctx.ctx, 1, what)
            assert both.shape == (2, *parts[0].shape[1:])
            np.testing.assert_allclose(both, np.concatenate(parts), atol=1e-3)
