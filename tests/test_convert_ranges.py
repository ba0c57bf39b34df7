"""Centre and step of the tips: against keys that are turned to every position, and where keys never move."""

from fasa_edge.convert.ranges import KeyRanges, clipped
from fasa_edge.convert.report import farthest, picture
from fasa_edge.convert.stretch import Depth, depths, turn

import numpy as np
import pytest

pytestmark = pytest.mark.check

ANGLES = np.array([2.0, 0.3, 0.01, 0.0, 0.0])
N = 60


def keys(seed: int = 0) -> np.ndarray:
    """Planes ``[n_tokens, n_head_kv, n_chunk]``, far from 0 and of several sizes."""
    rng = np.random.default_rng(seed)
    shape = (80, 2, len(ANGLES))
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) * [1, 2, 3, 4, 5] + [3, -2j, 9, 10 + 10j, -20]


def measure(k: np.ndarray, depth: Depth) -> tuple[np.ndarray, np.ndarray]:
    ranges = KeyRanges(*k.shape[1:])
    for block in np.array_split(k, 3):
        ranges.update(block)
    return ranges.measure(depth)


def test_centre_and_step_are_those_of_the_keys_at_every_position():
    k = keys()
    everywhere = np.concatenate([turn(k, ANGLES, np.full(len(k), position)) for position in range(N)])
    values = np.stack([everywhere.real, everywhere.imag], -1)
    centre, step = measure(k, Depth(N, ANGLES))
    assert centre.dtype == step.dtype == np.float32
    np.testing.assert_allclose(centre, values.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(step, 2 * 2.8 * np.sqrt(values.var(0).mean(-1)) / 16, rtol=1e-5)
    outside = np.abs(values - centre) > 2.8 * np.sqrt(values.var(0).mean(-1))[..., None]
    np.testing.assert_array_equal(clipped(values, centre, step), outside)
    assert 0 < outside.mean() < 0.02


@pytest.mark.parametrize("constant", [0, 1e-30, 7 + 3j, 1e20])
def test_keys_that_never_move_have_no_step(constant):
    k = keys()
    k[..., 3] = constant  # of a plane that RoPE leaves alone, as float32 and turning back leave it
    k[..., 3] *= np.exp(1e-9j * np.arange(len(k)))[:, None]
    centre, step = measure(k, Depth(N, ANGLES))
    assert (step[:, 3] == 0).all() and (step[:, [0, 1, 2, 4]] > 0).all()
    np.testing.assert_allclose(centre[:, 3, 0], np.real(constant), rtol=1e-6)
    k[..., 1] = constant  # a plane that turns
    assert (measure(k, Depth(N, ANGLES))[1][:, 1] > 0).all() == (abs(constant) > 0)


def test_nothing_is_far_from_a_chunk_without_a_range():
    chunks, step = np.array([2, 0, 3, 1]), np.array([1.0, 0.5, 0.09, 0.0], np.float32)
    centre = np.array([[0, 0], [3, -6], [0.1, 0], [99, 99]], np.float32)
    assert picture(chunks, step) == "5-90"
    assert farthest(chunks, centre, step) == (0, 1.5)
    assert picture(chunks, 0 * step) == "----" and farthest(chunks, centre, 0 * step)[1] == 0


@pytest.mark.parametrize(
    ("n_ctx", "expected"),
    [(512, [512]), (2048, [2048]), (2049, [2048, 2049]), (8192, [2048, 4096, 8192]), (9000, [2048, 4096, 8192, 9000])],
)
def test_depths_double_up_to_the_context(n_ctx, expected):
    assert depths(n_ctx) == expected


@pytest.mark.parametrize("angle", [0, 1e-9, 1e-3, 1, np.pi, -2.5, 2 * np.pi, 2 * np.pi - 1e-6])
def test_the_mean_turn_is_that_over_all_positions(angle):
    for n in (1, 2, 777):
        expected = np.exp(1j * angle * np.arange(n)).mean()
        assert Depth(n, np.zeros(1)).mean_turn(np.array([angle]))[0] == pytest.approx(expected, abs=1e-8)


def test_tokens_are_spread_in_their_order_and_alike_each_time():
    depth = Depth(100_000, np.zeros(1))
    spread = depth.spread(2048)
    assert (np.diff(spread) >= 0).all() and 0 <= spread[0] < 500 and 99_500 < spread[-1] < 100_000
    np.testing.assert_array_equal(spread, depth.spread(2048))
