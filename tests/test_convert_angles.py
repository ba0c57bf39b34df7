"""The angles by which RoPE turns chunks: as ggml computes them against formulas, and against what models really do."""

from __future__ import annotations

from contextlib import contextmanager

from fasa_edge.convert.capture import ModelRun
from fasa_edge.convert.rope import chunk_dims
from fasa_edge.convert.stretch import planes, turn
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi
from fasa_edge.runtime.capi import Capture
from fasa_edge.runtime.library import llama_cpp

import gguf
import numpy as np
import pytest
from tiny_models import Shape, make_model
from tiny_recipes import SWA_WINDOW

pytestmark = pytest.mark.check

N_CTX = 512


@contextmanager
def context(path, **options):
    """A model and its context, in which keys were captured."""
    llm = llama_cpp.Llama(str(path), **({"n_ctx": N_CTX, "verbose": False} | options))
    capi.set_capture(llm.ctx, Capture.K)
    llm.eval([70, 71])
    yield llm
    llm.close()


def angles(llm, il: int = 0, n_ctx: int = 0) -> np.ndarray:
    layer = capi.layer_geometry(llm.model)[il]
    return capi.rope_angles(llm.ctx, il, layer.n_embd_head // 2, n_ctx)


def wrapped(angle: np.ndarray) -> np.ndarray:
    """From -pi to pi."""
    return np.angle(np.exp(1j * angle))


def plain(shape: Shape) -> np.ndarray:
    n_rot = shape.n_rot or shape.n_embd_head
    res = np.zeros(shape.n_embd_head // 2)
    res[: n_rot // 2] = shape.rope_base ** (-2 * np.arange(n_rot // 2) / n_rot)
    return res


def yarn(shape: Shape, factor: float, n_ctx_orig: int, beta_fast: float = 32, beta_slow: float = 1) -> np.ndarray:
    """Of arXiv 2309.00071: slow planes are interpolated, fast ones left, those between mixed."""
    n_rot = shape.n_rot or shape.n_embd_head

    def plane(n_turns: float) -> float:
        return n_rot * np.log(n_ctx_orig / (n_turns * 2 * np.pi)) / (2 * np.log(shape.rope_base))

    low, high = max(0, np.floor(plane(beta_fast))), min(n_rot - 1, np.ceil(plane(beta_slow)))
    ramp = np.clip((np.arange(shape.n_embd_head // 2) - low) / max(0.001, high - low), 0, 1)
    return plain(shape) * (1 - ramp + ramp / factor)


LINEAR = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
YARN = {
    "qwen2__rope__scaling__type": "yarn",
    "qwen2__rope__scaling__factor": 4.0,
    "qwen2__rope__scaling__original_context_length": 1024,
}
CASES = {  # architecture, shape, metadata, options of the context, and the angles
    "norm": ("llama", Shape(), {}, {}, plain(Shape())),
    "neox": ("qwen2", Shape(rope_base=1e6), {}, {}, plain(Shape(rope_base=1e6))),
    "heads of 256": ("llama", Shape(n_embd_head=256), {}, {}, plain(Shape(n_embd_head=256))),
    "mrope": ("qwen2vl", Shape(), {}, {}, plain(Shape())),
    "imrope": ("qwen3vl", Shape(), {}, {}, plain(Shape())),
    "partial norm": ("chatglm", Shape(n_rot=32), {}, {}, plain(Shape(n_rot=32))),
    "partial neox": ("stablelm", Shape(n_rot=16, n_embd_head=80), {}, {}, plain(Shape(n_rot=16, n_embd_head=80))),
    "linear": ("llama", Shape(), LINEAR, {}, plain(Shape()) / 4),
    "yarn": ("qwen2", Shape(), YARN, {}, yarn(Shape(), 4, 1024)),
    "scale of the context": ("llama", Shape(), {}, {"rope_freq_scale": 0.5}, plain(Shape()) / 2),
    "base of the context": ("qwen2", Shape(), {}, {"rope_freq_base": 5e5}, plain(Shape(rope_base=5e5))),
    "yarn of the context": (
        "llama",
        Shape(),
        {},
        {
            "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN,
            "rope_freq_scale": 0.125,
            "yarn_orig_ctx": 2048,
            "yarn_beta_fast": 16.0,
            "yarn_beta_slow": 2.0,
        },
        yarn(Shape(), 8, 2048, 16, 2),
    ),
    "scaling switched off": (
        "llama",
        Shape(),
        LINEAR,
        {"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_NONE},
        plain(Shape()),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_angles_are_those_of_the_formula(name, tmp_path):
    arch, shape, keys, options, expected = CASES[name]
    with context(make_model(tmp_path / "tiny.gguf", arch, shape, **keys), **options) as llm:
        found = [angles(llm, il) for il in range(2)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], expected, rtol=3e-6, atol=1e-12)  # ggml multiplies on and on in float32


def read_tensor(path, name: str) -> np.ndarray:
    return next(tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == name).astype(float)


def test_factors_can_depend_on_the_context(tmp_path):
    """Phi 3 divides frequencies by other factors where the context exceeds the original one, whatever the depth."""
    shape = Shape(n_rot=48)
    path = make_model(tmp_path / "tiny.gguf", "phi3", shape)  # an original context of 1,024
    short, long = (read_tensor(path, f"rope_factors_{name}.weight") for name in ("short", "long"))
    with context(path) as small, context(path, n_ctx=2048) as large:
        for factors, found in ((short, angles(small)), (long, angles(large)), (long, angles(small, n_ctx=2048))):
            np.testing.assert_allclose(found[:24], wrapped(plain(shape)[:24] / factors), rtol=1e-5)
            assert (found[24:] == 0).all()
        np.testing.assert_array_equal(angles(large, n_ctx=1024), angles(small))


def test_each_layer_has_its_own(tmp_path):
    """A sliding window has a base of its own in Gemma 3, some layers have no RoPE, factors are of full layers alone."""
    path = make_model(tmp_path / "gemma3.gguf", "gemma3", Shape(rope_base=1e6))
    with ModelRun(path, N_CTX) as model:
        for _ in model.capture([70], [0, 1]):
            break
        assert [model.window(il) for il in range(2)] == [SWA_WINDOW, 0]
        np.testing.assert_allclose(model.angles(0), plain(Shape()), rtol=3e-6)
        np.testing.assert_allclose(model.angles(1), plain(Shape(rope_base=1e6)), rtol=3e-6)
    with context(make_model(tmp_path / "smollm3.gguf", "smollm3", Shape(n_layer=4))) as llm:
        assert [bool(angles(llm, il).any()) for il in range(4)] == [True, True, True, False]


def test_chunks_that_do_not_turn_as_one_have_no_angle(tmp_path):
    """MiniCPM3 turns the last dims of a head, where our chunks are other pairs."""
    with context(make_model(tmp_path / "tiny.gguf", "minicpm3")) as llm:
        assert not angles(llm).any()


def test_no_such_layer_or_capture(tmp_path):
    with context(make_model(tmp_path / "tiny.gguf")) as llm:
        for il in (-1, 2):
            with pytest.raises(FasaError, match=f"angles of layer {il} could not be computed"):
                capi.rope_angles(llm.ctx, il, 32)
        capi.set_capture(llm.ctx)
        llm.eval([70])
        with pytest.raises(FasaError, match="angles of layer 0 could not be computed"):
            angles(llm)


MODELS = {
    "norm": ("llama", Shape(), {}),
    "linear": ("llama", Shape(), LINEAR),
    "yarn": ("qwen2", Shape(), YARN),
    "factors": ("phi3", Shape(n_rot=48), {}),
    "partial": ("stablelm", Shape(n_rot=16), {}),
    "mrope": ("qwen2vl", Shape(), {}),
    "imrope": ("qwen3vl", Shape(), {}),
    "window": ("gemma3", Shape(rope_base=1e6), {}),
    "window and factors": ("gemma4", Shape(n_layer=4), {}),
    "without": ("smollm3", Shape(n_layer=4), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_turn_by_these_angles(name, tmp_path):
    """The same token everywhere makes the same keys and queries everywhere, but for how they are turned."""
    arch, shape, keys = MODELS[name]
    path = make_model(tmp_path / "tiny.gguf", arch, shape, **keys)
    n, first = 1500, {}
    with ModelRun(path, n) as model:
        layers = [il for il, layer in enumerate(model.geometry) if layer.n_head_kv]
        for n_done, il, *qk in model.capture([70] * n, layers):
            layer = model.geometry[il]
            dims = chunk_dims(layer.n_embd_head, layer.n_rot, layer.rope_type)
            heads = np.concatenate([planes(x, dims) for x in qk], axis=1)
            heads = turn(heads, model.angles(il), -np.arange(n_done - len(heads), n_done))
            expected = first.setdefault(il, heads[0])
            assert np.abs(heads - expected).max() < 5e-3 * np.abs(expected).mean()
    assert len(first) == len(layers) >= 2
