"""The ``fasa.*`` metadata of a GGUF: key names, value types and the rules that a valid profile keeps.

A profile says, for every layer and KV head, which RoPE frequency chunks (FCs of arXiv 2602.03152) rank the cached
tokens best, and where their keys lie, for the tips of four bits. ``fasa.chunks``, ``fasa.agreement`` and
``fasa.tip.*`` are ragged, so they are stored flat: layer after layer, in each its KV heads, in each all its chunks,
best first, and in ``fasa.tip.centre`` the chunk's two dims. ``fasa.head_count_kv`` and ``fasa.chunk_count`` hold one
entry a layer and make the file describe itself. Any prefix of a ranking is a valid set, so ``n_tip`` can be changed at
load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any

from fasa_edge.config import SETTINGS, FasaConfig
from fasa_edge.errors import SchemaError

import numpy as np

VERSION = 2
PREFIX = "fasa."


class GGUFValueType(IntEnum):
    """Value types of GGUF metadata, numbered as ``enum gguf_type`` of ggml/include/gguf.h."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# element types of GGUF, little endian as in the file; strings have no fixed width
NUMPY_TYPES: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}

_PYTHON_TYPES = {GGUFValueType.BOOL: bool, GGUFValueType.STRING: str, GGUFValueType.FLOAT32: float}
_OF_SETTINGS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}

SCALARS = {  # every scalar key and its GGUF type
    "fasa.version": GGUFValueType.UINT32,
    **{PREFIX + name: _OF_SETTINGS[SETTINGS[name].type] for name in ("n_tip", *SETTINGS)},
    "fasa.calibration.text": GGUFValueType.STRING,
    "fasa.calibration.tokens": GGUFValueType.UINT32,
    "fasa.calibration.context": GGUFValueType.UINT32,
    "fasa.calibration.top_k": GGUFValueType.UINT32,
    "fasa.calibration.objective": GGUFValueType.STRING,
    "fasa.calibration.tool": GGUFValueType.STRING,
    "fasa.calibration.clipped": GGUFValueType.FLOAT32,
    "fasa.fingerprint": GGUFValueType.STRING,
}

OPTIONAL = {
    **{PREFIX + name: setting.default for name, setting in SETTINGS.items() if setting.is_optional},
    "fasa.calibration.clipped": None,
}
"""Scalars that came later than the version, and what holds where a file lacks them."""

ARRAYS = {  # every array key and its element type
    "fasa.head_count_kv": GGUFValueType.INT32,
    "fasa.chunk_count": GGUFValueType.INT32,
    "fasa.chunks": GGUFValueType.INT32,
    "fasa.agreement": GGUFValueType.FLOAT32,
    "fasa.tip.centre": GGUFValueType.FLOAT32,
    "fasa.tip.step": GGUFValueType.FLOAT32,
}


@dataclass(frozen=True)
class Calibration:
    """How a profile was made.

    Attributes:
        text: name of the calibration text.
        tokens: number of its tokens that were run.
        context: tokens of the longest context that they were stretched over.
        top_k: K of the contextual agreement, in tokens; 0 for an objective without one.
        objective: name in ``fasa_edge.convert.objectives.OBJECTIVES``.
        tool: program and version that wrote the profile.
        clipped: share of the values of held-out keys that lie outside of the range of their tips, 0 to 1, as the check
            found it; None where it was not run, or no layer has such keys.
    """

    text: str
    tokens: int
    context: int
    top_k: int
    objective: str
    tool: str
    clipped: float | None = None


@dataclass(frozen=True, eq=False)
class Profile:
    """The ranked chunks of every KV head of one model, with the runtime's defaults.

    Attributes:
        n_tip: chunks used per KV head unless overridden.
        chunks: one int32 array ``[n_head_kv, n_chunk]`` a layer, each row a permutation of ``0 .. n_chunk - 1``, best
            first; ``[0, 0]`` for a layer without KV heads.
        agreement: one float32 array a layer, shaped like ``chunks``: what the objective gave each chunk.
        centre: one float32 array ``[n_head_kv, n_chunk, 2]`` a layer: the keys that lie in the middle of a tip's range,
            of each chunk's two dims.
        step: one float32 array a layer, shaped like ``chunks``: from one of a tip's 16 levels to the next, in the unit
            of the keys; 0 for a chunk whose keys never move, which is never scored.
        config: defaults of the runtime.
        calibration: how the ranking was made.
        fingerprint: of architecture and layer, head and RoPE geometry; a profile fits only the model that has it.
    """

    n_tip: int
    chunks: list[np.ndarray]
    agreement: list[np.ndarray]
    centre: list[np.ndarray]
    step: list[np.ndarray]
    config: FasaConfig
    calibration: Calibration
    fingerprint: str


def to_metadata(profile: Profile) -> list[tuple[str, GGUFValueType, object]]:
    """Lists the GGUF key-value pairs of a profile, in the order in which they are written.

    Returns:
        ``(key, type, value)``; for an array the type is ARRAY and the value a numpy array of the element type.

    Raises:
        SchemaError: the profile is not valid; the message names key, value and limit.
    """
    layers = zip(profile.chunks, profile.agreement, profile.centre, profile.step, strict=True)
    for il, (chunks, agreement, centre, step) in enumerate(layers):
        whole = chunks.shape == agreement.shape == step.shape and centre.shape == (*chunks.shape, 2)
        if chunks.ndim != 2 or not whole:
            raise SchemaError(
                f"layer {il}: chunks have shape {list(chunks.shape)}, agreement {list(agreement.shape)}, step "
                f"{list(step.shape)} and centre {list(centre.shape)}: they must be [n_head_kv, n_chunk], and "
                "of the centre [n_head_kv, n_chunk, 2]"
            )
    values: dict[str, object] = {
        "fasa.version": VERSION,
        "fasa.n_tip": profile.n_tip,
        "fasa.head_count_kv": _array_of([chunks.shape[0] for chunks in profile.chunks], "fasa.head_count_kv"),
        "fasa.chunk_count": _array_of([chunks.shape[1] for chunks in profile.chunks], "fasa.chunk_count"),
        "fasa.chunks": _flat(profile.chunks, "fasa.chunks"),
        "fasa.agreement": _flat(profile.agreement, "fasa.agreement"),
        "fasa.tip.centre": _flat(profile.centre, "fasa.tip.centre"),
        "fasa.tip.step": _flat(profile.step, "fasa.tip.step"),
        **{PREFIX + name: value for name, value in asdict(profile.config).items()},
        **{PREFIX + "calibration." + name: value for name, value in asdict(profile.calibration).items()},
        "fasa.fingerprint": profile.fingerprint,
    }
    values = {key: value for key, value in values.items() if value is not None}
    from_metadata(values)  # what is written must be readable
    return [(key, SCALARS.get(key, GGUFValueType.ARRAY), value) for key, value in values.items()]


def from_metadata(metadata: Mapping[str, object]) -> Profile:
    """Reads and validates a profile.

    Args:
        metadata: key to value; keys that are not in the schema are ignored. Arrays are numpy arrays of the key's
            element type. Scalars are plain Python values, or numpy scalars of exactly the key's type.

    Raises:
        SchemaError: a key is missing, or a value has the wrong type, length or range.
    """
    version = _scalar(metadata, "fasa.version")
    if version != VERSION:
        remedy = "update fasa-edge or " if version > VERSION else "its tips have another layout, "
        raise SchemaError(f"fasa.version = {version}: only {VERSION} can be read, {remedy}convert the model again")

    scalars = OPTIONAL | {key: _scalar(metadata, key) for key in SCALARS if key in metadata or key not in OPTIONAL}
    arrays = {key: _array(metadata, key) for key in ARRAYS}
    shapes = _shapes(arrays["fasa.head_count_kv"], arrays["fasa.chunk_count"])
    chunks = _split("fasa.chunks", arrays["fasa.chunks"], shapes)
    agreement = _split("fasa.agreement", arrays["fasa.agreement"], shapes)
    centre = _split("fasa.tip.centre", arrays["fasa.tip.centre"], [(*shape, 2) for shape in shapes])
    step = _split("fasa.tip.step", arrays["fasa.tip.step"], shapes)
    _check_rankings(chunks)
    for key in ("fasa.agreement", "fasa.tip.centre", "fasa.tip.step"):
        if not np.isfinite(arrays[key]).all():
            raise SchemaError(f"{key} holds a value that is not finite: convert the model again")
    if (steps := arrays["fasa.tip.step"]).min() < 0:
        raise SchemaError(f"fasa.tip.step holds {steps.min()}, less than 0: convert the model again")

    n_chunk = min(n_chunk for n_head_kv, n_chunk in shapes if n_head_kv > 0)
    n_tip = scalars["fasa.n_tip"]
    if not 1 <= n_tip <= n_chunk:
        raise SchemaError(f"fasa.n_tip = {n_tip} is out of range: choose 1 to {n_chunk}, the chunks of a head")

    try:
        config = FasaConfig(**{field.name: scalars[PREFIX + field.name] for field in fields(FasaConfig)})
    except SchemaError as error:  # which begins with the field
        raise SchemaError(f"{PREFIX}{error}") from error

    return Profile(
        n_tip=n_tip,
        chunks=chunks,
        agreement=agreement,
        centre=centre,
        step=step,
        config=config,
        calibration=Calibration(
            **{field.name: scalars[PREFIX + "calibration." + field.name] for field in fields(Calibration)}
        ),
        fingerprint=scalars["fasa.fingerprint"],
    )


def _array_of(values: list[Any], key: str) -> np.ndarray:
    return np.array(values, NUMPY_TYPES[ARRAYS[key]])


def _flat(layers: list[np.ndarray], key: str) -> np.ndarray:
    return _array_of([x for layer in layers for x in layer.flat], key)


def _split(key: str, flat: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    sizes = [math.prod(shape) for shape in shapes]
    if len(flat) != sum(sizes):
        raise SchemaError(
            f"{key} has {len(flat)} entries: fasa.head_count_kv and fasa.chunk_count call for {sum(sizes)}"
        )
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _shapes(head_count_kv: np.ndarray, chunk_count: np.ndarray) -> list[tuple[int, int]]:
    if len(head_count_kv) != len(chunk_count):
        raise SchemaError(
            f"fasa.head_count_kv has {len(head_count_kv)} entries and fasa.chunk_count has {len(chunk_count)}: "
            "both need one a layer"
        )
    shapes = list(zip(head_count_kv.tolist(), chunk_count.tolist(), strict=True))
    for il, (n_head_kv, n_chunk) in enumerate(shapes):
        if n_head_kv < 0 or n_chunk < 0 or (n_head_kv == 0) != (n_chunk == 0):
            raise SchemaError(
                f"layer {il}: fasa.head_count_kv = {n_head_kv} with fasa.chunk_count = {n_chunk}: "
                "both must be positive, or both 0 for a layer without KV heads"
            )
    if not any(n_head_kv for n_head_kv, _ in shapes):
        raise SchemaError("fasa.head_count_kv names no layer with KV heads: at least 1 is needed")
    return shapes


def _check_rankings(layers: list[np.ndarray]) -> None:
    for il, chunks in enumerate(layers):
        n_chunk = chunks.shape[1]
        for head, ranking in enumerate(chunks):
            if not np.array_equal(np.sort(ranking), np.arange(n_chunk)):
                raise SchemaError(
                    f"fasa.chunks of layer {il}, KV head {head} = {ranking.tolist()}: "
                    f"not a permutation of 0 to {n_chunk - 1}"
                )


def _require(metadata: Mapping[str, object], key: str) -> Any:
    if key not in metadata:
        raise SchemaError(f"{key} is missing: convert the model again")
    return metadata[key]


def _scalar(metadata: Mapping[str, object], key: str) -> Any:
    value, type_ = _require(metadata, key), SCALARS[key]
    if isinstance(value, np.generic):
        if value.dtype != NUMPY_TYPES.get(type_):
            raise SchemaError(f"{key} has type {value.dtype}: expected {type_.name.lower()}")
        value = value.item()
    expected: Any = _PYTHON_TYPES.get(type_, int)
    if type(value) is not expected:
        raise SchemaError(f"{key} = {value!r} has type {type(value).__name__}: expected {type_.name.lower()}")
    if expected is str and "\0" in value:
        raise SchemaError(f"{key} = {value!r} holds a NUL, where llama.cpp would end it: leave that out")
    if expected is int and not 0 <= value < 2**32:
        raise SchemaError(f"{key} = {value} is out of range: choose 0 to {2**32 - 1}")
    if expected is float and not 0 <= value <= 1:  # a share
        raise SchemaError(f"{key} = {value} is out of range: choose 0 to 1")
    return value


def _array(metadata: Mapping[str, object], key: str) -> np.ndarray:
    value, dtype = _require(metadata, key), NUMPY_TYPES[ARRAYS[key]]
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != dtype:
        held = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise SchemaError(f"{key} is {held}: expected an array of {ARRAYS[key].name.lower()}")
    return value
