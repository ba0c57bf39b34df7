"""The fasa.* metadata: what is written is read back, and what is not valid is refused by key, value and limit."""

import dataclasses

from fasa_edge import schema
from fasa_edge.config import FasaConfig, default_n_tip, tip_bytes
from fasa_edge.errors import SchemaError

import gguf
import numpy as np
import pytest

pytestmark = pytest.mark.check

SHAPES = [(2, 8), (0, 0), (1, 16)]


def make_profile(**changes) -> schema.Profile:
    rng = np.random.default_rng(0)
    chunks = [np.argsort(rng.random(shape), axis=1).astype(np.int32).reshape(shape) for shape in SHAPES]
    profile = schema.Profile(
        n_tip=6,
        chunks=chunks,
        agreement=[rng.random(shape).astype(np.float32) for shape in SHAPES],
        centre=[rng.standard_normal((*shape, 2)).astype(np.float32) for shape in SHAPES],
        step=[rng.random(shape).astype(np.float32) for shape in SHAPES],
        config=FasaConfig(budget=128, min_ctx=300),
        calibration=schema.Calibration("some text", 4096, 32768, 0, "lsq", "fasa-edge test", 0.25),
        fingerprint="llama:3:2:16",
    )
    return dataclasses.replace(profile, **changes)


def as_mapping(profile: schema.Profile) -> dict[str, object]:
    return {key: value for key, _, value in schema.to_metadata(profile)}


def test_round_trip():
    profile = make_profile()
    read = schema.from_metadata(as_mapping(profile))
    for name in ("n_tip", "config", "calibration", "fingerprint"):
        assert getattr(read, name) == getattr(profile, name)
    for il, shape in enumerate(SHAPES):
        assert read.chunks[il].shape == shape
        np.testing.assert_array_equal(read.chunks[il], profile.chunks[il])
        for name in ("agreement", "centre", "step"):
            np.testing.assert_array_equal(getattr(read, name)[il], getattr(profile, name)[il])


def test_metadata_names_every_key_with_its_type():
    items = schema.to_metadata(make_profile())
    assert {key for key, _, _ in items} == schema.SCALARS.keys() | schema.ARRAYS.keys()
    for key, type_, value in items:
        if key in schema.ARRAYS:
            assert type_ == schema.GGUFValueType.ARRAY
            assert value.dtype == schema.NUMPY_TYPES[schema.ARRAYS[key]]
        else:
            assert type_ == schema.SCALARS[key]


def test_what_the_check_did_not_measure_is_not_written():
    calibration = dataclasses.replace(make_profile().calibration, clipped=None)
    written = as_mapping(make_profile(calibration=calibration))
    assert "fasa.calibration.clipped" not in written and schema.from_metadata(written).calibration == calibration


def test_types_are_those_of_gguf():
    assert {t.name: t.value for t in schema.GGUFValueType} == {t.name: t.value for t in gguf.GGUFValueType}


def test_foreign_keys_are_ignored():
    mapping = as_mapping(make_profile()) | {"general.name": "x", "fasa.from_the_future": 1}
    assert schema.from_metadata(mapping).n_tip == 6


def test_numpy_scalars_must_have_the_right_width():
    mapping = as_mapping(make_profile())
    assert schema.from_metadata(mapping | {"fasa.n_tip": np.uint32(5)}).n_tip == 5
    with pytest.raises(SchemaError, match=r"fasa\.n_tip has type int64: expected uint32"):
        schema.from_metadata(mapping | {"fasa.n_tip": np.int64(5)})


@pytest.mark.parametrize("key", [*schema.SCALARS, *schema.ARRAYS])
@pytest.mark.parametrize("value", [None, 1.5, [1], np.zeros((2, 2), np.int32)])
def test_wrong_type(key, value):
    with pytest.raises(SchemaError, match=key):
        schema.from_metadata(as_mapping(make_profile()) | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fasa.version": 1}, r"fasa\.version = 1: .* another layout, convert the model again"),
        ({"fasa.n_tip": -1}, r"fasa\.n_tip = -1"),
        ({"fasa.budget": 2**32}, r"fasa\.budget = 4294967296"),
        ({"fasa.enabled": 1}, r"fasa\.enabled = 1 has type int: expected bool"),
        ({"fasa.budget": True}, r"fasa\.budget = True has type bool: expected uint32"),
        ({"fasa.calibration.text": "a\0b"}, r"fasa\.calibration\.text = 'a\\x00b' holds a NUL"),
        ({"fasa.calibration.clipped": float("nan")}, r"calibration\.clipped = nan is out of range: choose 0 to 1"),
        ({"fasa.calibration.clipped": np.float64(0.5)}, r"calibration\.clipped has type float64: expected float32"),
        ({"fasa.head_count_kv": np.array([2, 0, 2], np.int32)}, r"fasa\.chunks has 32 entries.* 48"),
        ({"fasa.tip.step": np.zeros(31, np.float32)}, r"fasa\.tip\.step has 31 entries.* 32"),
        ({"fasa.tip.step": np.full(32, np.inf, np.float32)}, r"fasa\.tip\.step holds a value that is not finite"),
        ({"fasa.tip.step": np.full(32, -1, np.float32)}, r"fasa\.tip\.step holds -1\.0, less than 0"),
        ({"fasa.tip.centre": np.zeros(32, np.float32)}, r"fasa\.tip\.centre has 32 entries.* 64"),
        ({"fasa.tip.centre": np.full(64, np.nan, np.float32)}, r"fasa\.tip\.centre holds a value that is not finite"),
    ],
)
def test_invalid_value(changes, message):
    """Beyond what a file can hold, for which see the tables of ``test_profile.py``."""
    with pytest.raises(SchemaError, match=message):
        schema.from_metadata(as_mapping(make_profile()) | changes)


def test_invalid_profile_is_not_written():
    with pytest.raises(SchemaError, match="n_tip = 17"):
        schema.to_metadata(make_profile(n_tip=17))
    for name in ("centre", "step"):
        layers = getattr(make_profile(), name)
        with pytest.raises(SchemaError, match=rf"layer 2: .*\[1, 16\].* {name} \[0, 16"):
            schema.to_metadata(make_profile(**{name: [*layers[:2], layers[2][:0]]}))
    with pytest.raises(SchemaError, match="layer 0: chunks have shape"):
        schema.to_metadata(make_profile(agreement=[np.zeros((8, 2), np.float32), *make_profile().agreement[1:]]))


@pytest.mark.parametrize(
    ("field", "value"), [("budget", 0), ("n_sink", -1), ("max_batch", 0), ("min_ctx", 2**31), ("n_recent", 1.0)]
)
def test_config_limits(field, value):
    with pytest.raises(SchemaError, match=f"{field} = {value}"):
        FasaConfig(**{field: value})


@pytest.mark.parametrize(
    ("n_embd_head", "n_tip"),
    [(2, 1), (8, 4), (10, 4), (16, 8), (32, 12), (48, 20), (64, 24), (80, 24), (96, 24), (128, 32), (256, 64)],
)
def test_default_n_tip(n_embd_head, n_tip):
    assert default_n_tip(n_embd_head) == n_tip


@pytest.mark.parametrize(("n_tip", "n_bytes"), [(1, 4), (4, 4), (5, 8), (24, 24), (25, 28), (64, 64)])
def test_tips_are_packed_by_eight_dims(n_tip, n_bytes):
    assert tip_bytes(n_tip) == n_bytes
