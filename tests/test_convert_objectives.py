"""The objectives against plain loops, brute force and planted structure, on synthetic queries and keys."""

import itertools

from fasa_edge.convert.objectives import OBJECTIVES
from fasa_edge.convert.rope import ROPE_NEOX, ROPE_NORM, chunk_dims
from fasa_edge.convert.second_moments import _rank_least_squares
from fasa_edge.convert.stretch import Depth, planes
from fasa_edge.convert.top_tokens import N_QUERIES, _top_k_mask
from fasa_edge.errors import ConvertError

import numpy as np
import pytest

pytestmark = pytest.mark.check

N_HEAD, N_HEAD_KV, N_EMBD_HEAD = 4, 2, 16
N_CHUNK = N_EMBD_HEAD // 2
BLOCK = 64


def random_qk(n_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated queries and keys with means that are not zero."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((N_EMBD_HEAD, N_EMBD_HEAD))
    q = rng.standard_normal((n_tokens, N_HEAD, N_EMBD_HEAD)) @ mix + 1
    k = rng.standard_normal((n_tokens, N_HEAD_KV, N_EMBD_HEAD)) @ mix - 2
    return q.astype(np.float32), k.astype(np.float32)


def still(n: int) -> list[Depth]:
    """Nothing turns."""
    return [Depth(n, np.zeros(N_CHUNK))]


def run(name: str, q, k, *, top_k: int = 16, block: int = BLOCK, rope_type: int = ROPE_NORM, depths=None):
    """Queries and keys at position 0."""
    dims = chunk_dims(N_EMBD_HEAD, N_EMBD_HEAD, rope_type)
    objective = OBJECTIVES[name](N_HEAD_KV, N_CHUNK, len(q), top_k, depths or still(len(q)))
    for start in range(0, len(q), block):
        objective.update(*(planes(x[start : start + block], dims) for x in (q, k)))
    return objective.rank()


def partial_scores(q, k, dims) -> np.ndarray:
    """Scores of every chunk, ``[n_queries, n_keys, n_chunk]``, for the queries and keys of one head."""
    return np.stack([q[:, pair].astype(float) @ k[:, pair].astype(float).T for pair in dims], axis=-1)


def turned(x, dims, angles, position) -> np.ndarray:
    """Heads of queries or keys ``[..., n_embd_head]`` as RoPE turns them from position 0, in float64."""
    x = x.astype(float)
    res = np.empty_like(x)
    for (a, b), angle in zip(dims, angles * position, strict=True):
        res[..., a] = x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)
        res[..., b] = x[..., a] * np.sin(angle) + x[..., b] * np.cos(angle)
    return res


def covariance_by_loops(q, k, dims, depth: Depth) -> np.ndarray:
    """``A`` from the definition: per query, the covariance of the chunks' partial scores over keys at all positions."""
    a = np.zeros((N_HEAD_KV, N_CHUNK, N_CHUNK))
    positions = range(depth.n) if depth.angles.any() else [0]
    for head in range(N_HEAD_KV):
        keys = np.concatenate([turned(k[:, head], dims, depth.angles, position) for position in positions])
        for query_head in range(head * 2, head * 2 + 2):
            queries = turned(q[BLOCK:, query_head], dims, depth.angles, depth.n)
            for of_query in partial_scores(queries, keys, dims):
                a[head] += np.cov(of_query.T, bias=True) / len(queries) / 2
    return a


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("n_tokens", [256, 250])
def test_every_chunk_is_ranked_and_values_fit(name, n_tokens):
    chunks, values = run(name, *random_qk(n_tokens))
    assert chunks.dtype == np.int32 and values.dtype == np.float32
    assert chunks.shape == values.shape == (N_HEAD_KV, N_CHUNK)
    assert (np.sort(chunks, axis=1) == np.arange(N_CHUNK)).all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rope_type", [ROPE_NORM, ROPE_NEOX])
def test_planted_chunks_come_first(name, rope_type):
    """Three chunks carry the score, others only noise; each KV head has its own three."""
    rng = np.random.default_rng(1)
    q, k = (0.05 * rng.standard_normal((256, n, N_EMBD_HEAD)).astype(np.float32) for n in (N_HEAD, N_HEAD_KV))
    dims = chunk_dims(N_EMBD_HEAD, N_EMBD_HEAD, rope_type)
    planted = [[1, 4, 6], [0, 5, 7]]
    for head, chunks in enumerate(planted):
        for chunk, size in zip(chunks, (4, 3, 2), strict=True):
            for dim in dims[chunk]:
                q[:, 2 * head : 2 * head + 2, dim] += size
                k[:, head, dim] += size * rng.standard_normal(256).astype(np.float32)
    ranked, _ = run(name, q, k, rope_type=rope_type)
    assert ranked[:, 0].tolist() == [1, 0]  # the strongest of each head
    assert np.sort(ranked[:, :3], axis=1).tolist() == planted


@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_input_same_output(name):
    first, second = (run(name, *random_qk(256)) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_chunks_are_ranked_by_index(name):
    constant = np.ones((256, N_HEAD, N_EMBD_HEAD), np.float32), np.ones((256, N_HEAD_KV, N_EMBD_HEAD), np.float32)
    chunks, values = run(name, *constant)
    assert (chunks == np.arange(N_CHUNK)).all()
    assert np.isfinite(values).all()


ANGLES = np.array([2.5, 1.0, 0.4, 0.1, 0.03, 0.004, 0.0, -0.2])
DEPTHS = {
    "still": still(256),
    "one depth": [Depth(37, ANGLES)],
    "all turn alike": [Depth(20, np.full(N_CHUNK, 0.3))],
    "two depths, whose angles differ": [Depth(16, ANGLES), Depth(64, ANGLES / 2)],
}


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
def test_energy_is_the_variance_of_the_partial_score(depths):
    q, k = random_qk(96)
    dims = chunk_dims(N_EMBD_HEAD, N_EMBD_HEAD, ROPE_NORM)
    share = 0
    for depth in depths:
        a = covariance_by_loops(q, k, dims, depth)
        share = share + np.einsum("hii->hi", a) / a.sum((1, 2))[:, None]
    share /= share.sum(1, keepdims=True)
    chunks, values = run("energy", q, k, depths=depths)
    np.testing.assert_array_equal(chunks, np.argsort(-share, axis=1))
    np.testing.assert_allclose(values, -np.sort(-share, axis=1), rtol=1e-5)


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
def test_least_squares_values_are_the_variance_each_chunk_removes(depths):
    q, k = random_qk(96)
    dims = chunk_dims(N_EMBD_HEAD, N_EMBD_HEAD, ROPE_NORM)
    by_depth = [covariance_by_loops(q, k, dims, depth) for depth in depths]
    chunks, values = run("lsq", q, k, depths=depths)
    for head, (order, gains) in enumerate(zip(chunks, values, strict=True)):
        cov = np.mean([a[head] / a[head].sum() for a in by_depth], axis=0)
        left = [cov[np.ix_(order[n:], order[n:])].sum() for n in range(N_CHUNK + 1)]
        np.testing.assert_allclose(gains, -np.diff(left), rtol=1e-4, atol=1e-5)
        assert gains.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_slow_chunk_matters_at_long_distances_alone(name):
    """All keys of chunks 1 and 2 are alike before RoPE, so nothing but distance tells them apart; chunk 0 is content.

    The slow chunk 2 is the largest, but turns by a 50th of a radian over the text and by 3 over the context.
    """
    n_text, n_context = 256, 32768
    angles = np.array([0.0, 0.7, 1e-4, 0, 0, 0, 0, 0])
    rng = np.random.default_rng(2)
    q, k = (0.01 * rng.standard_normal((n_text, n, N_EMBD_HEAD)) for n in (N_HEAD, N_HEAD_KV))
    for x in (q, k):
        x[..., 2] += 1
        x[..., 4] += 3
    q[..., 0] += 1
    k[..., 0] += 0.3 * rng.standard_normal((n_text, N_HEAD_KV))
    first = {n: run(name, q, k, depths=[Depth(n, angles)])[0][:, 0].tolist() for n in (n_text, n_context)}
    assert first[n_text] != [2, 2] and first[n_context] == [2, 2]


def test_least_squares_each_step_is_the_best_one_and_sets_are_near_optimal():
    """Every step against all alternatives; the greedy set of 4 of 8 against the best of all 70 sets."""
    excess = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        factor = rng.standard_normal((N_CHUNK, 3 * N_CHUNK)) * rng.lognormal(0, 1, (N_CHUNK, 1))
        cov = factor @ factor.T
        order, _ = _rank_least_squares(cov)

        def left_by(chosen, cov=cov):
            rest = [i for i in range(N_CHUNK) if i not in chosen]
            return cov[np.ix_(rest, rest)].sum()

        for n in range(N_CHUNK):
            candidates = [left_by([*order[:n], i]) for i in order[n:]]
            assert left_by(order[: n + 1]) <= min(candidates) + 1e-9
        best = min(left_by(chosen) for chosen in itertools.combinations(range(N_CHUNK), 4))
        excess.append((left_by(order[:4]) - best) / cov.sum())
    assert min(excess) > -1e-9
    assert np.median(excess) < 0.02


def test_second_moments_do_not_depend_on_the_size_of_the_mean():
    """A constant added to the keys moves all scores of a query alike, so no ranking may change."""
    q, k = random_qk(256)
    for name in ("energy", "lsq"):
        plain, shifted = run(name, q, k), run(name, q, k + np.float32(100))
        np.testing.assert_array_equal(plain[0], shifted[0])
        np.testing.assert_allclose(plain[1], shifted[1], rtol=1e-3)


def test_agreement_is_the_overlap_of_the_top_tokens():
    n_tokens, top_k = 200, 12
    q, k = random_qk(n_tokens)
    dims = chunk_dims(N_EMBD_HEAD, N_EMBD_HEAD, ROPE_NORM)
    positions = sorted({int(p) for p in np.linspace(2 * top_k - 1, n_tokens - 1, N_QUERIES)})
    expected = np.zeros((N_HEAD_KV, N_CHUNK))
    for head in range(N_HEAD_KV):
        for position in positions:
            for query_head in range(2 * head, 2 * head + 2):
                scores = partial_scores(q[position : position + 1, query_head], k[: position + 1, head], dims)[0]
                full = set(np.argsort(-scores.sum(1))[:top_k])
                for chunk in range(N_CHUNK):
                    own = set(np.argsort(-scores[:, chunk])[:top_k])
                    expected[head, chunk] += len(full & own) / top_k / len(positions) / 2
    chunks, values = run("agreement", q, k, top_k=top_k)
    np.testing.assert_allclose(values, np.take_along_axis(expected, chunks, axis=1), atol=2e-3)
    assert (np.diff(values, axis=1) <= 0).all()


def test_mass_is_what_the_top_tokens_hold_and_each_step_is_the_best_one():
    n_tokens, top_k = 200, 12
    q, k = random_qk(n_tokens)
    q *= np.float32(0.05)  # attention neither even nor on one token
    dims = chunk_dims(N_EMBD_HEAD, N_EMBD_HEAD, ROPE_NORM)
    positions = sorted({int(p) for p in np.linspace(2 * top_k - 1, n_tokens - 1, N_QUERIES)})
    scores = {  # of the queries of each KV head, [n_keys, n_chunk]
        head: [
            partial_scores(q[position : position + 1, query_head], k[: position + 1, head], dims)[0]
            for position in positions
            for query_head in range(2 * head, 2 * head + 2)
        ]
        for head in range(N_HEAD_KV)
    }

    def recall(head, chosen):
        held = []
        for partial in scores[head]:
            attention = np.exp(partial.sum(1) / np.sqrt(N_EMBD_HEAD))
            top = np.argsort(-partial[:, list(chosen)].sum(1))[:top_k]
            held.append(attention[top].sum() / attention.sum())
        return np.mean(held)

    chunks, values = run("mass", q, k, top_k=top_k)
    for head, order in enumerate(chunks):
        recalls = [recall(head, order[:n]) for n in range(1, N_CHUNK + 1)]
        np.testing.assert_allclose(np.cumsum(values[head]), recalls, atol=2e-3)
        for n in range(N_CHUNK):
            assert recalls[n] >= max(recall(head, [*order[:n], i]) for i in order[n:]) - 2e-3
    assert values.sum(1) == pytest.approx([0.6, 0.6], abs=0.3)


@pytest.mark.parametrize("name", ["agreement", "mass"])
def test_top_tokens_need_tokens_enough_for_their_k(name):
    with pytest.raises(ConvertError, match="top_k = 256 needs 1024 tokens but the calibration has 600.*top_k = 150"):
        run(name, *random_qk(600), top_k=256)


def test_top_k_mask_breaks_ties_by_index():
    scores = np.array([[1, 3, 3, 0, 3], [2, 2, 2, 2, 2], [5, 1, 4, 1, 1]], np.float32)
    expected = [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]
    assert _top_k_mask(scores, 2).astype(int).tolist() == expected
