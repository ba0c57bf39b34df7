"""Is a frequency chunk really a RoPE plane of the model that runs? Shown on random-weight models, one per RoPE layout.

The same token at every position has the same query and key before RoPE in layer 0, so all that differs between
positions is the rotation: chunk ``i`` of the key at position ``p`` must be chunk ``i`` at position 0, turned by
``p * theta_i``.
"""

from __future__ import annotations

from dataclasses import replace

from fasa_edge.convert.capture import ModelRun
from fasa_edge.convert.rope import ROPE_IMROPE, ROPE_MROPE, ROPE_NEOX, ROPE_NONE, ROPE_NORM, ROPE_VISION, chunk_dims
from fasa_edge.errors import ConvertError
from fasa_edge.runtime import capi
from fasa_edge.runtime.capi import Capture
from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from runtime import decode_embeddings
from tiny_models import Shape, make_model
from tiny_recipes import MROPE_SECTIONS

pytestmark = pytest.mark.check

N_POSITIONS = 96
LAYOUTS = {  # name: architecture, shape, RoPE type, another pairing of the same dims
    "norm": ("llama", Shape(), ROPE_NORM, ROPE_NEOX),
    "neox": ("qwen2", Shape(rope_base=500.0), ROPE_NEOX, ROPE_NORM),
    "mrope": ("qwen2vl", Shape(), ROPE_MROPE, ROPE_NORM),
    "imrope": ("qwen3vl", Shape(), ROPE_IMROPE, ROPE_NORM),
    "partial norm": ("chatglm", Shape(n_rot=32), ROPE_NORM, ROPE_NEOX),
    "partial neox": ("stablelm", Shape(n_rot=16, n_embd_head=80), ROPE_NEOX, ROPE_NORM),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def captured(request, tmp_path_factory):
    """Shape, RoPE type, wrong type, and Q and K ``[n_tokens, n_head(_kv), n_embd_head]`` of a repeated token."""
    arch, shape, rope_type, wrong_type = LAYOUTS[request.param]
    path = make_model(tmp_path_factory.mktemp("rope") / f"{arch}.gguf", arch, shape)
    with ModelRun(path, 512) as model:
        layer = model.geometry[0]
        n_rot = shape.n_rot or shape.n_embd_head
        assert (layer.n_head, layer.n_head_kv, layer.n_embd_head) == (shape.n_head, shape.n_head_kv, shape.n_embd_head)
        assert (layer.n_rot, layer.rope_type) == (n_rot, rope_type)
        np.testing.assert_array_equal(capi.chunk_dims(layer), chunk_dims(shape.n_embd_head, n_rot, rope_type))
        blocks = list(model.capture([70] * N_POSITIONS, [0], n_block=40))
    q, k = (np.concatenate([block[i] for block in blocks]) for i in (2, 3))
    return shape, rope_type, wrong_type, q, k


def angles(shape: Shape) -> np.ndarray:
    """``theta_i`` of every chunk, radians per position; 0 for the unrotated ones."""
    n_rot = shape.n_rot or shape.n_embd_head
    theta = np.zeros(shape.n_embd_head // 2)
    theta[: n_rot // 2] = shape.rope_base ** (-2 * np.arange(n_rot // 2) / n_rot)
    return theta


def as_planes(x: np.ndarray, shape: Shape, rope_type: int) -> np.ndarray:
    """The chunks of heads ``[..., n_embd_head]`` as complex numbers ``[..., n_chunk]``."""
    dims = chunk_dims(shape.n_embd_head, shape.n_rot or shape.n_embd_head, rope_type)
    return x[..., dims[:, 0]] + 1j * x[..., dims[:, 1]]


def rotation_error(x: np.ndarray, shape: Shape, rope_type: int) -> float:
    """How far the chunks are from their own value at position 0 turned by their own angle, relative to their size."""
    planes = as_planes(x.astype(np.float64), shape, rope_type)
    turned = planes[:1] * np.exp(1j * np.arange(len(x))[:, None, None] * angles(shape))
    return float(np.abs(planes - turned).max() / np.abs(planes).mean())


@pytest.mark.parametrize("which", ["q", "k"])
def test_a_chunk_turns_by_its_own_angle(captured, which):
    shape, rope_type, wrong_type, q, k = captured
    x = q if which == "q" else k
    assert rotation_error(x, shape, rope_type) < 1e-3
    assert rotation_error(x, shape, wrong_type) > 0.5


def distance_error(q: np.ndarray, k: np.ndarray, shape: Shape, rope_type: int) -> float:
    """How far the chunks' partial scores are from ``|q_i| |k_i| cos(phase_i + distance * theta_i)``, relative."""
    group = shape.n_head // shape.n_head_kv
    planes_q = as_planes(q.astype(np.float64), shape, rope_type)
    planes_k = as_planes(k.astype(np.float64), shape, rope_type).repeat(group, axis=1)
    worst = 0.0
    for query, key in ((0, 0), (95, 1), (95, 60), (41, 40), (64, 3)):
        score = (planes_q[query] * planes_k[key].conj()).real
        product = planes_q[0] * planes_k[0].conj()  # carries both sizes and the phase
        expected = np.abs(product) * np.cos(np.angle(product) + (query - key) * angles(shape))
        worst = max(worst, float(np.abs(score - expected).max() / np.abs(product).mean()))
    return worst


def test_partial_scores_depend_on_the_distance_alone(captured):
    shape, rope_type, wrong_type, q, k = captured
    assert distance_error(q, k, shape, rope_type) < 1e-3
    assert distance_error(q, k, shape, wrong_type) > 0.5


def test_partial_scores_sum_to_the_full_score(captured):
    shape, rope_type, _, q, k = captured
    keys = k.repeat(shape.n_head // shape.n_head_kv, axis=1)
    partial = (as_planes(q, shape, rope_type) * as_planes(keys, shape, rope_type).conj()).real
    np.testing.assert_allclose(partial.sum(-1), (q * keys).sum(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("arch", "rope_type"), [("qwen2vl", ROPE_MROPE), ("qwen3vl", ROPE_IMROPE)])
def test_a_chunk_of_an_image_turns_by_one_of_its_positions(arch, rope_type, tmp_path):
    """The same embedding all over a grid: only the rotation differs, by time, height or width."""
    shape = Shape()
    i_plane, bounds = np.arange(shape.n_embd_head // 2), np.cumsum(MROPE_SECTIONS)[:2]
    section = i_plane % 3 if rope_type == ROPE_IMROPE else np.searchsorted(bounds, i_plane, side="right")
    rows, columns = np.divmod(np.arange(64), 8)
    pos = np.stack([np.full(64, 3), 3 + 16 * rows, 3 + 16 * columns, np.zeros(64, int)])

    model = make_model(tmp_path / "tiny.gguf", arch, shape)
    llm = llama_cpp.Llama(str(model), n_ctx=512, flash_attn=True, verbose=False)
    capi.set_capture(llm.ctx, Capture.Q, Capture.K)
    decode_embeddings(llm, np.ones((64, shape.n_embd), np.float32).cumsum(axis=1) / shape.n_embd, pos)
    for which in (Capture.Q, Capture.K):
        planes = as_planes(capi.captured(llm.ctx, 0, which).astype(np.float64), shape, rope_type)
        distance = (pos - pos[:, :1])[section].T * angles(shape)  # from the first token, [n_tokens, n_chunk]
        turned = planes[:1] * np.exp(1j * distance)[:, None, :]
        assert np.abs(planes - turned).max() < 1e-3 * np.abs(planes).mean()
        assert np.abs(planes - planes[:1]).max() > 0.5 * np.abs(planes).mean()
    llm.close()


@pytest.mark.parametrize("rope_type", [ROPE_NORM, ROPE_NEOX, ROPE_MROPE])
@pytest.mark.parametrize(("n_embd_head", "n_rot"), [(64, 64), (80, 20), (8, 2), (16, 0)])
def test_chunks_partition_the_head(n_embd_head, n_rot, rope_type):
    dims = chunk_dims(n_embd_head, n_rot, rope_type)
    assert dims.dtype == np.int32 and dims.shape == (n_embd_head // 2, 2)
    assert sorted(dims.ravel()) == list(range(n_embd_head))
    assert set(dims[: n_rot // 2].ravel()) == set(range(n_rot))


def test_chunks_of_a_small_head():
    assert chunk_dims(8, 8, ROPE_NORM).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert chunk_dims(8, 8, ROPE_NEOX).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert chunk_dims(8, 4, ROPE_NEOX).tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("rope_type", "message"),
    [
        (ROPE_NONE, "no rotary embedding"),
        (ROPE_VISION, "vision RoPE"),
        (7, "unknown"),
    ],
)
def test_other_rope_types_are_refused(rope_type, message):
    with pytest.raises(ConvertError, match=f"RoPE type {rope_type} cannot be converted.*{message}"):
        chunk_dims(64, 64, rope_type)


@pytest.mark.parametrize("rope_type", [ROPE_NORM, ROPE_NEOX, ROPE_MROPE, ROPE_IMROPE])
@pytest.mark.parametrize("n_rot", [66, 128, 63, -2])
def test_the_runtime_pairs_no_dims_where_n_rot_does_not_fit(n_rot, rope_type):
    layer = capi.LayerGeometry(4, 2, 64, n_rot, rope_type, False)
    assert not len(capi.chunk_dims(layer)) and len(capi.chunk_dims(replace(layer, n_rot=62))) == 32


@pytest.mark.parametrize(("n_embd_head", "n_rot"), [(63, 62), (0, 0), (64, 66), (64, 63), (64, -2)])
def test_impossible_sizes_are_refused(n_embd_head, n_rot):
    with pytest.raises(ConvertError, match=str(n_rot if n_embd_head == 64 else n_embd_head)):
        chunk_dims(n_embd_head, n_rot, ROPE_NORM)
