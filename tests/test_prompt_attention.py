"""FASA_ATTEND over all cells for the tokens of a prompt, against the numpy reference."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from ggml_graph import CACHE_TYPES, F32, Graph
from op_cases import NMSE_REFERENCE

SIZES = [  # n_embd_head_k, n_embd_head_v, n_head, n_head_kv, n_tokens, n_kv
    (64, 64, 9, 3, 40, 300),
    (64, 64, 9, 3, 130, 192),  # several tiles of tokens
    (128, 128, 8, 2, 33, 513),
    (192, 128, 6, 2, 20, 130),
    (80, 96, 4, 4, 60, 70),
    (256, 256, 4, 1, 12, 100),
    (72, 40, 14, 2, 9, 65),  # no whole vectors
    (64, 64, 160, 1, 3, 90),  # a group that no tile of one token holds
    (64, 64, 7, 1, 5, 3000),  # cells are shared out
    (64, 64, 1, 1, 24, 24),
]
MASKS = ["causal", "sequences", "holes", "all"]


def make_mask(kind: str, n_tokens: int, n_kv: int, rng: np.random.Generator) -> np.ndarray:
    """float16 [n_tokens, n_kv]. The last tokens of the cache, or of several sequences that share it."""
    cells, tokens = np.arange(n_kv), np.arange(n_tokens)[:, None]
    visible = cells <= n_kv - n_tokens + tokens
    if kind == "sequences":
        visible &= (cells // 37 % 3 == tokens // 7 % 3) | (cells == 0)
    if kind == "holes":
        visible &= rng.random((n_tokens, n_kv)) > 0.3
        visible[n_tokens // 2] = False  # sees nothing
    if kind == "all":
        visible[:] = True
    return np.where(visible, 0, -np.inf).astype(np.float16)


class Prompt:
    """Random queries, keys and values under a mask."""

    def __init__(self, size: tuple[int, ...], kind: str) -> None:
        rng = np.random.default_rng(sum(size))
        n_k, n_v, n_head, n_head_kv, n_tokens, n_kv = size
        self.q = (3 * rng.standard_normal((n_tokens, n_head, n_k))).astype(np.float32)
        self.k = rng.standard_normal((n_kv, n_head_kv, n_k)).astype(np.float16)
        self.v = rng.standard_normal((n_kv, n_head_kv, n_v)).astype(np.float16)
        self.mask = make_mask(kind, n_tokens, n_kv, rng)
        self.scale = n_k**-0.5

    def run(self, softcap: float = 0.0, sinks: np.ndarray | None = None, n_threads: int = 2) -> np.ndarray:
        with Graph() as g:
            tensors = [g.tensor(x) for x in (self.q, self.k, self.v)]
            given = None if sinks is None else g.tensor(sinks)
            out = g.ggml_fasa_attend(*tensors, None, g.tensor(self.mask), given, self.scale, softcap)
            g.run(out, n_threads=n_threads)
            return g.read(out, np.float32, (*self.q.shape[:2], self.v.shape[2]))

    def truth(self, softcap: float = 0.0, sinks: np.ndarray | None = None) -> np.ndarray:
        visible = np.where(np.isfinite(self.mask), np.arange(self.k.shape[0], dtype=np.int32), -1)
        idx = visible[:, None].repeat(self.k.shape[1], axis=1)
        return reference.attend(self.q, self.k, self.v, idx, self.scale, softcap, sinks)


def assert_near(out: np.ndarray, truth: np.ndarray) -> None:
    assert (np.isnan(out) == np.isnan(truth)).all()
    assert np.nansum((out - truth) ** 2) <= NMSE_REFERENCE * np.nansum(truth**2)


@pytest.mark.check
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_prompts_match_the_reference(size: tuple[int, ...], kind: str) -> None:
    prompt = Prompt(size, kind)
    assert_near(prompt.run(), prompt.truth())


@pytest.mark.parametrize("softcap", [0.0, 0.7, 5.0, 50.0])
@pytest.mark.parametrize("sink", [None, -np.inf, -2.0, 4.0])
@pytest.mark.parametrize("size", SIZES[:3])
def test_softcap_and_sinks(size: tuple[int, ...], softcap: float, sink: float | None) -> None:
    prompt = Prompt(size, "holes")
    sinks = None if sink is None else (sink + np.linspace(0, 1, size[2])).astype(np.float32)
    assert_near(prompt.run(softcap, sinks), prompt.truth(softcap, sinks))


@pytest.mark.parametrize("size", [SIZES[1], SIZES[8]])
def test_prompts_are_the_same_for_any_number_of_threads(size: tuple[int, ...]) -> None:
    prompt = Prompt(size, "causal")
    alone = prompt.run(n_threads=1)
    assert all((prompt.run(n_threads=n) == alone).all() for n in (2, 3, 5, 16))


@pytest.mark.parametrize("type_v", CACHE_TYPES)
@pytest.mark.parametrize("type_k", CACHE_TYPES)
def test_prompts_read_every_cache_type(type_k: str, type_v: str) -> None:
    prompt = Prompt((96, 64, 6, 2, 30, 90), "causal")
    with Graph() as g:
        k, v = (
            g.ggml_cast(g.tensor(x.astype(np.float32)), CACHE_TYPES[name])
            for x, name in ((prompt.k, type_k), (prompt.v, type_v))
        )
        k_f32, v_f32 = g.ggml_cast(k, F32), g.ggml_cast(v, F32)
        out = g.ggml_fasa_attend(g.tensor(prompt.q), k, v, None, g.tensor(prompt.mask), None, prompt.scale, 0.0)
        g.run(k_f32, v_f32, out)
        prompt.k, prompt.v = (g.read(x, np.float32, y.shape) for x, y in ((k_f32, prompt.k), (v_f32, prompt.v)))
        out = g.read(out, np.float32, (*prompt.q.shape[:2], 64))
    assert_near(out, prompt.truth())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["causal", "sequences"])
def test_what_a_hidden_cell_holds_does_not_matter(kind: str, value: float) -> None:
    """Neither to those who see none of a tile, nor to those whose neighbours see the cell: only these get it."""
    prompt = Prompt((64, 64, 6, 2, 50, 200), kind)
    prompt.k[[175, 180]] = prompt.v[[175, 180]] = value
    sees = np.isfinite(prompt.mask[:, [175, 180]]).any(axis=1)
    out = prompt.run()
    assert (~sees).any()
    for array in (prompt.k, prompt.v):
        array[[175, 180]] = 0
    assert_near(out[~sees], prompt.truth()[~sees])


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("infinite", [slice(0, 64), slice(100, None), slice(None), slice(1, None), slice(7, 8)])
def test_logits_of_minus_infinity_have_no_weight(infinite: slice, softcap: float) -> None:
    prompt = Prompt((64, 64, 6, 2, 30, 200), "causal")
    prompt.q[..., 0] = 1
    prompt.k[infinite, :, 0] = -np.inf
    assert_near(prompt.run(softcap), prompt.truth(softcap))


def test_logits_that_are_not_numbers_show() -> None:
    prompt = Prompt((64, 64, 6, 2, 30, 200), "causal")
    prompt.q[..., 0] = 1
    prompt.k[180, 0, 0] = np.inf
    prompt.q[3, 5] = np.nan
    out = prompt.run()
    truth = prompt.truth()
    assert np.isnan(truth[10:, :3]).all() and np.isnan(truth[3, 5]).all() and not np.isnan(truth[:10, 3:5]).any()
    assert_near(out, truth)


def test_prompts_of_two_streams() -> None:
    prompts = [Prompt((64, 64, 6, 2, 30, 200), kind) for kind in ("causal", "holes")]
    prompts[1].q *= 0.5
    with Graph() as g:

        def stack(name: str) -> int:
            return g.tensor(np.stack([getattr(prompt, name) for prompt in prompts]))

        mask = g.tensor(np.stack([prompt.mask[None] for prompt in prompts]))
        out = g.ggml_fasa_attend(stack("q"), stack("k"), stack("v"), None, mask, None, prompts[0].scale, 0.0)
        g.run(out)
        out = g.read(out, np.float32, (2, 30, 6, 64))
    for prompt, mine in zip(prompts, out, strict=True):
        assert (mine == prompt.run()).all()
