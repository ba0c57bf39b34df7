"""Profiles that stand alone, what a valid one is, and quantization: one profile serves every file of a model."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from pydoc_data.topics import topics

import fasa_edge
from fasa_edge.bench import models
from fasa_edge.config import FasaConfig
from fasa_edge.convert import inspect
from fasa_edge.errors import ConvertError, ModelError, SchemaError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.gguf_splice import splice
from fasa_edge.io.profile import encode_profile
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import error_log
from fasa_edge.schema import ARRAYS, OPTIONAL, SCALARS, GGUFValueType, to_metadata

import gguf
import numpy as np
import pytest
from runtime import teacher_forced
from tiny_models import Shape, make_model
from unchecked import convert

T = GGUFValueType
N_PROMPT, N_DECODE = 600, 4
CONFIG = FasaConfig(budget=64, min_ctx=1, n_dense_layers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return make_model(folder / "tiny.gguf", general__name="Tiny")


@pytest.fixture(scope="module")
def annotated(model: Path, folder: Path) -> Path:
    return convert(model, folder / "annotated.gguf", tokens=512, config=CONFIG).path


@pytest.fixture(scope="module")
def profile(model: Path, folder: Path) -> Path:
    return convert(model, profile=folder / "profile.gguf", tokens=512, config=CONFIG).profile_path


@pytest.fixture(scope="module")
def tokens(annotated: Path) -> list[int]:
    return load(annotated).tokenize(topics["typesseq"].encode())[: N_PROMPT + N_DECODE]


def load(path: Path, profile: Path | None = None, **kwargs) -> fasa_edge.Llama:
    return fasa_edge.Llama(str(path), fasa_profile=profile, **({"n_ctx": 1024, "verbose": False} | kwargs))


def decode(llm: fasa_edge.Llama, tokens: list[int]) -> np.ndarray:
    """Logits of sparse steps after a dense prompt."""
    logits = teacher_forced(llm, tokens, N_PROMPT)
    assert llm.fasa.stats().n_layers_sparse == 2 * N_DECODE
    return logits


def fasa_pairs(path: Path) -> dict[str, bytes]:
    """The ``fasa.*`` pairs of a file, byte for byte."""
    return {key: entry.raw for key, entry in read_header(path).entries.items() if key.startswith("fasa.")}


# Writing


@pytest.mark.parametrize("with_copy", [False, True])
def test_a_profile_holds_the_keys_alone(model, annotated, tmp_path, with_copy) -> None:
    out = tmp_path / "copy.gguf" if with_copy else None
    result = convert(model, out, profile=tmp_path / "profile.gguf", tokens=512, config=CONFIG)
    assert (result.path, result.profile_path) == (out, tmp_path / "profile.gguf")
    written = sorted(tmp_path.iterdir())
    assert written == ([out] if out else []) + [tmp_path / "profile.gguf"]
    assert result.n_bytes == sum(path.stat().st_size for path in written)
    for path in written:
        assert fasa_pairs(path) == fasa_pairs(annotated)

    fields = gguf.GGUFReader(result.profile_path).fields
    general = {key: fields[key].contents() for key in fields if key.startswith("general.")}
    assert general == {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.type": "fasa-profile",
    }
    report = inspect(result.profile_path)
    assert (report.architecture, report.name, report.n_tensors) == ("llama", "Tiny", 0)
    assert report.profile.config == CONFIG and result.profile_path.stat().st_size < 4096


def test_outputs_are_not_overwritten_and_differ(model, annotated, tmp_path) -> None:
    path = tmp_path / "profile.gguf"
    path.write_text("precious")
    with pytest.raises(ConvertError, match=r"profile\.gguf exists: .*--force"):
        convert(model, profile=path, tokens=512)
    with pytest.raises(ConvertError, match="is the input .* itself"):
        convert(model, profile=model, tokens=512, force=True)
    with pytest.raises(ConvertError, match="is named for two outputs: choose two files"):
        convert(model, tmp_path / "x.gguf", profile=tmp_path / "x.gguf", tokens=512)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]
    convert(annotated, profile=path, tokens=512, config=CONFIG, force=True)
    assert fasa_pairs(path) == fasa_pairs(annotated)
    with pytest.raises(ConvertError, match="holds no tensors: it is a vocabulary or a profile"):
        convert(path, tmp_path / "y.gguf")


# Loading


@pytest.mark.check
def test_a_profile_does_what_an_annotation_does(model, annotated, profile, tokens) -> None:
    llm, reference = load(model, profile), load(annotated)
    assert llm.fasa.available and llm.fasa.settings == reference.fasa.settings
    assert llm.fasa.stats().tips_size == reference.fasa.stats().tips_size > 0
    assert (decode(llm, tokens) == decode(reference, tokens)).all()
    assert not load(model).fasa.available


def test_settings_apply_to_a_profile(model, profile) -> None:
    overrides = {"fasa.n_sink": 2, "fasa.n_recnet": 5, "fasa.n_recent": 5.0}
    with pytest.warns(UserWarning, match="without effect") as warned:
        llm = load(model, profile, kv_overrides=overrides, fasa_budget=77, fasa_n_tip=8)
    stats = llm.fasa.stats()
    assert [stats.settings[name] for name in ("budget", "n_sink", "n_tip", "n_recent")] == [77, 2, 8, 32]
    assert sorted(stats.ineffective_overrides) == [
        "fasa.n_recent: must be of type int",
        "fasa.n_recnet: no such setting",
    ]
    assert len(warned) == 2
    with pytest.raises(ModelError, match="fasa.n_tip = 33 is out of range"):
        load(model, profile, fasa_n_tip=33)


def test_a_profile_survives_pickling(model, profile, tokens) -> None:
    llm = load(model, profile, fasa_budget=100)
    again = pickle.loads(pickle.dumps(llm))
    assert again.fasa.settings == llm.fasa.settings and again.fasa.settings["budget"] == 100


def test_bench_compares_a_profile_with_true_stock(model, annotated, profile) -> None:
    for llm in (load(model, profile), load(annotated)):
        runner = models._stock(llm, flash_attn=True)
        assert not capi.has_profile(runner.llm.model)
        runner.llm.close()
        rows = list(models.run(llm, [300], n_gen=1, n_repetitions=1))
        assert [(row.method, row.layers_sparse) for row in rows] == [
            ("dense", 0), ("dense", 0), ("exact", 0), ("fasa", 1)
        ]  # fmt: skip


def test_a_profile_of_another_model_names_both(model, folder, tmp_path) -> None:
    other = make_model(tmp_path / "other.gguf", shape=Shape(n_head_kv=4))
    foreign = convert(other, profile=tmp_path / "foreign.gguf", tokens=512).profile_path
    with pytest.raises(ModelError, match="made for another model: .* 'llama rope=0 0-1:4/4x64r64', .*0-1:4/2x64r64'"):
        load(model, foreign)


@pytest.fixture(scope="module")
def bare_model(model: Path) -> Iterator[int]:
    """``llama_model *`` without a context."""
    llama_cpp._logger.set_verbose(False)
    handle = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    yield handle
    llama_cpp.llama_model_free(handle)


@pytest.mark.check
def test_a_refused_profile_leaves_the_model_as_it_was(bare_model, model, profile, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("no GGUF at all")
    for path in (tmp_path / "missing.gguf", tmp_path / "text.txt", tmp_path, model):
        with error_log() as errors:
            assert not capi.load_profile(bare_model, path)
        assert str(path) in errors[-1] and ("no FASA profile" if path == model else "as GGUF") in errors[-1]
        with pytest.raises(ModelError, match="Failed to load FASA profile: .*fasa-edge convert --profile"):
            load(model, path)
    assert not capi.has_profile(bare_model)
    assert capi.load_profile(bare_model, profile)
    assert not capi.load_profile(bare_model, tmp_path) and capi.has_profile(bare_model)


def test_a_context_keeps_the_profile_it_was_made_with(model, annotated, tokens, tmp_path) -> None:
    llm = load(annotated)
    wanted = decode(llm, tokens)
    fewer = convert(model, profile=tmp_path / "fewer.gguf", tokens=512, n_tip=1, objective="energy").profile_path
    assert capi.load_profile(llm.model, fewer)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    assert (decode(llm, tokens) == wanted).all()
    assert llm.fasa.settings["n_tip"] == load(annotated).fasa.settings["n_tip"]


# What a valid profile is: Python and the library must agree


def rewrite(path: Path, data: bytes) -> None:
    """Replaces a file; removing it first spares the flush that ext4 makes when a file is truncated and rewritten."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@pytest.mark.check
def test_every_truncation_is_refused(bare_model, profile, tmp_path) -> None:
    data, path = profile.read_bytes(), tmp_path / "cut.gguf"
    for n in range(len(data)):
        rewrite(path, data[:n])
        assert not capi.load_profile(bare_model, path), n
    rewrite(path, data)
    assert capi.load_profile(bare_model, path)


@pytest.mark.check
@pytest.mark.parametrize("patch", [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x00" * 8, b"\x01" * 4, b"\x80"])
def test_overwritten_bytes_never_crash(bare_model, profile, tmp_path, patch) -> None:
    """Some are taken: a text, a value of the objective, a setting within its limits."""
    data, path = profile.read_bytes(), tmp_path / "damaged.gguf"
    n_taken = 0
    for at in range(len(data) - len(patch)):
        rewrite(path, data[:at] + patch + data[at + len(patch) :])
        n_taken += capi.load_profile(bare_model, path)
    assert 0 < n_taken < len(data)


Pairs = list[tuple[str, GGUFValueType, object]]
Change = Callable[[Pairs], Pairs]


def changed(key: str, value: object, type_: GGUFValueType | None = None) -> Change:
    """Metadata with one value, and its type if given, replaced; None leaves the key out."""

    def change(metadata: Pairs) -> Pairs:
        pairs = [(k, t if type_ is None else type_, value) if k == key else (k, t, v) for k, t, v in metadata]
        return [pair for pair in pairs if pair[2] is not None]

    return change


def all_of(*changes: Change) -> Change:
    return lambda metadata: reduce(lambda pairs, change: change(pairs), changes, metadata)


def with_array(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Metadata with an array changed."""
    return lambda metadata: [(k, t, change(v) if k == key else v) for k, t, v in metadata]


def altered(key: str, at: int, value: object) -> Change:
    """Metadata with one element of an array replaced."""
    return with_array(key, lambda a: np.where(np.arange(len(a)) == at, value, a).astype(a.dtype))


def shortened(key: str) -> Change:
    """Metadata with the last element of an array left out."""
    return with_array(key, lambda a: a[:-1])


def appended(key: str, value: object) -> Change:
    """Metadata with one more element of an array."""
    return with_array(key, lambda a: np.append(a, np.array(value, a.dtype)))


def padded(key: str) -> Change:
    return appended(key, 0)


def continued(key: str, more: str) -> Change:
    """Metadata with a text that goes on."""
    return lambda metadata: [(k, t, v + more if k == key else v) for k, t, v in metadata]


def renamed(key: str, name: str) -> Change:
    return lambda metadata: [(name if k == key else k, t, v) for k, t, v in metadata]


def with_first(*pair: object) -> Change:
    return lambda metadata: [pair, *metadata]


def with_last(*pair: object) -> Change:
    return lambda metadata: [*metadata, pair]


N_LAYER, LAYER_SIZE = 2, 2 * 32  # of the tiny model: KV heads by chunks


def without_layer(il: int) -> Change:
    """Metadata without the chunks of one layer."""

    def left_out(n: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda a: np.delete(a, slice(il * n, (il + 1) * n))

    sizes = {CHUNKS: LAYER_SIZE, AGREEMENT: LAYER_SIZE, CENTRE: 2 * LAYER_SIZE, STEP: LAYER_SIZE}
    ranked = (with_array(key, left_out(n)) for key, n in sizes.items())
    return all_of(altered("fasa.head_count_kv", il, 0), altered("fasa.chunk_count", il, 0), *ranked)


def with_layers(n: int) -> Change:
    """Metadata with chunks for another number of layers."""
    return all_of(*(with_array(key, lambda a: np.resize(a, n * len(a) // N_LAYER)) for key in ARRAYS))


@dataclass(frozen=True)
class Case:
    """A changed profile, and what is to be said of it.

    ``verdict`` "valid": by Python and the library; ``settings`` then hold. "refused": by both, which name ``key``.
    "another model's": by the library alone, for it is sound in itself. ``message`` is the library's, a pattern.
    """

    verdict: str
    name: str
    change: Change
    settings: dict[str, object] = field(default_factory=dict)
    key: str = ""
    message: str = ""


def valid(name: str, change: Change, **settings: object) -> Case:
    return Case("valid", name, change, settings)


def refused(key: str, change: Change, message: str) -> Case:
    return Case("refused", f"{key}: {message}", change, key=key, message=message)


def foreign(message: str, *changes: Change) -> Case:
    return Case("another model's", message, all_of(*changes), message=message)


MAX = 2**31 - 1
COUNTS = ("budget", "min_ctx", "n_dense_layers")
U32 = [key for key, type_ in SCALARS.items() if type_ == T.UINT32]
TEXTS = [key for key, type_ in SCALARS.items() if type_ == T.STRING]
KEYS = (*SCALARS, *ARRAYS)
CLIPPED = "fasa.calibration.clipped"
COUNT, HEADS, CHUNKS, AGREEMENT = "fasa.chunk_count", "fasa.head_count_kv", "fasa.chunks", "fasa.agreement"
CENTRE, STEP = "fasa.tip.centre", "fasa.tip.step"

CASES = [
    valid("as written", all_of(), **asdict(CONFIG)),
    # types
    *(refused(key, changed(key, 1.5, T.FLOAT64), f"{key} has type f64, expected") for key in KEYS),
    *(refused(key, changed(key, 1, T.INT32), f"{key} has type i32, expected u32") for key in U32),
    *(refused(key, changed(key, np.zeros(3, np.uint32), T.ARRAY), f"{key} has type arr, expected") for key in SCALARS),
    *(refused(key, changed(key, np.zeros(3, np.int64)), f"{key} is not an array of [if]32") for key in ARRAYS),
    refused("fasa.enabled", changed("fasa.enabled", 1, T.UINT8), "fasa.enabled has type u8, expected bool"),
    # keys
    *(refused(key, changed(key, None), f"{key} is missing") for key in KEYS if key not in OPTIONAL),
    *(valid(f"no {key}", changed(key, None), **{key[5:]: OPTIONAL[key]}) for key in OPTIONAL if key != CLIPPED),
    valid(f"no {CLIPPED}", changed(CLIPPED, None)),
    valid("a key of the future", with_first("fasa.future", T.FLOAT64, 1.5)),
    # a NUL ends a key or a text, and the first of equal keys counts
    *(valid(f"{key}, NUL, more", renamed(key, key + "\0junk")) for key in KEYS),
    *(refused(key, renamed(key, key.replace(".", "\0.")), f"{key} is missing") for key in KEYS if key not in OPTIONAL),
    *(valid(f"{key} = text, NUL, more", continued(key, "\0junk")) for key in TEXTS),
    *(valid(f"{key} = text, NUL", continued(key, "\0")) for key in TEXTS),
    valid("select = head, NUL, more", changed("fasa.select", "head\0junk"), select="head"),
    refused("fasa.select", changed("fasa.select", "\0head"), "fasa.select = '' is unknown"),
    valid("budget again", with_last("fasa.budget\0junk", T.UINT32, 0), budget=64),
    valid("budget before", with_first("fasa.budget\0", T.UINT32, 99), budget=99),
    refused("fasa.n_tip", with_first("fasa.n_tip\0junk", T.UINT32, 0), "fasa.n_tip = 0 is out of range"),
    refused("fasa.chunks", with_first("fasa.chunks\0junk", T.STRING, "0"), "fasa.chunks has type str, expected arr"),
    valid("budget after a NUL", with_first("\0fasa.budget", T.UINT32, 0), budget=64),
    # settings
    refused("fasa.version", changed("fasa.version", 0), "fasa.version = 0 is not supported"),
    refused("fasa.version", changed("fasa.version", 1), "fasa.version = 1 is not supported.*: convert the model again"),
    refused("fasa.version", changed("fasa.version", 3), "fasa.version = 3 is not supported"),
    *(valid(f"n_tip = {n}", changed("fasa.n_tip", n), n_tip=n) for n in (1, 32)),
    *(
        refused("fasa.n_tip", changed("fasa.n_tip", n), f"fasa.n_tip = {n} is out of range")
        for n in (0, 33, 2**31, 2**32 - 1)
    ),
    *(valid(f"max_batch = {n}", changed("fasa.max_batch", n), max_batch=n) for n in (1, 64)),
    *(
        refused("fasa.max_batch", changed("fasa.max_batch", n), f"fasa.max_batch = {n} is out of range")
        for n in (0, 65, 2**32 - 1)
    ),
    *(valid(f"{name} = {MAX}", changed("fasa." + name, MAX), **{name: MAX}) for name in COUNTS),
    *(
        refused("fasa." + name, changed("fasa." + name, n), f"fasa.{name} = {n} is out of range")
        for name in COUNTS
        for n in (MAX + 1, 2**32 - 1)
    ),
    refused("fasa.budget", changed("fasa.budget", 0), "fasa.budget = 0 is out of range"),
    valid("all sinks", all_of(changed("fasa.n_sink", 64), changed("fasa.n_recent", 0)), n_sink=64, n_recent=0),
    refused("fasa.n_sink", changed("fasa.n_sink", 33), "fasa.n_sink = 33 and .* do not fit into fasa.budget = 64"),
    refused("fasa.n_sink", changed("fasa.n_sink", 2**32 - 1), "fasa.n_sink = 4294967295 and .* do not fit"),
    refused("fasa.n_recent", changed("fasa.n_recent", 2**32 - 1), "fasa.n_recent = 4294967295 do not fit"),
    valid("select = head", changed("fasa.select", "head"), select="head"),
    refused("fasa.select", changed("fasa.select", "heads"), "fasa.select = 'heads' is unknown"),
    # calibration
    *(valid(f"{key} = ''", changed(key, "")) for key in TEXTS if "calibration" in key),
    *(valid(f"{key} = 2^32 - 1", changed(key, 2**32 - 1)) for key in U32 if "calibration" in key),
    *(valid(f"{CLIPPED} = {x}", changed(CLIPPED, x)) for x in (0, 1, 1e-45)),
    *(
        refused(CLIPPED, changed(CLIPPED, x), f"{CLIPPED} = {x} is out of range")
        for x in (-0.5, 1.5, np.inf, -np.inf, np.nan)
    ),
    # arrays
    refused(CHUNKS, altered(CHUNKS, 5, 32), "layer 0, KV head 0 lists chunk 32, which is out of range"),
    refused(CHUNKS, altered(CHUNKS, 5, -1), "layer 0, KV head 0 lists chunk -1, which is out of range"),
    refused(CHUNKS, with_array(CHUNKS, lambda a: a[[*range(5), 4, *range(6, 128)]]), "or listed before"),
    refused(CHUNKS, shortened(CHUNKS), "fasa.chunks has 127 entries, layer 1 needs more"),
    refused(CHUNKS, appended(CHUNKS, 0), "fasa.chunks has 129 entries, expected 128"),
    refused(CHUNKS, with_array(CHUNKS, lambda a: a[:0]), "fasa.chunks has 0 entries, layer 0 needs more"),
    refused(AGREEMENT, shortened(AGREEMENT), "fasa.agreement has 127 entries, expected 128"),
    refused(AGREEMENT, appended(AGREEMENT, 0), "fasa.agreement has 129 entries, expected 128"),
    *(
        refused(CENTRE, change(CENTRE), "fasa.tip.centre has .* entries, expected 256")
        for change in (shortened, padded)
    ),
    *(refused(STEP, change(STEP), "fasa.tip.step has .* entries, expected 128") for change in (shortened, padded)),
    *(
        refused(key, altered(key, 3, x), "holds a value that is .*not finite")
        for key in (AGREEMENT, CENTRE, STEP)
        for x in (np.nan, np.inf, -np.inf)
    ),
    refused(STEP, altered(STEP, 3, -1e-30), "holds a value that is negative"),
    valid("a chunk that never moves", all_of(altered(STEP, 0, 0), altered(STEP, 127, 0))),
    valid("keys of any size", all_of(altered(STEP, 0, 3e38), altered(CENTRE, 0, -3e38))),
    # layers
    *(valid(f"no chunks in layer {il}", without_layer(il)) for il in (0, 1)),
    refused(HEADS, all_of(without_layer(1), without_layer(0)), "fasa.head_count_kv is 0 in all layers"),
    *(
        refused(COUNT, all_of(without_layer(1), altered(COUNT, 1, n)), f"fasa.chunk_count = {n} of layer 1, whose")
        for n in (32, -1)
    ),
    refused(HEADS, shortened(HEADS), "fasa.head_count_kv has 1 entries and fasa.chunk_count 2, the model has 2"),
    refused(COUNT, appended(COUNT, 0), "fasa.chunk_count 3, the model has 2"),
    refused(HEADS, with_layers(0), "fasa.head_count_kv has 0 entries and fasa.chunk_count 0, the model has 2"),
    *(refused(HEADS, altered(HEADS, 1, n), f"fasa.head_count_kv = {n} .* of layer 1: .* 2 KV heads") for n in (3, -2)),
    *(refused(COUNT, altered(COUNT, 0, n), f"fasa.chunk_count = {n} of layer 0") for n in (0, -32, 1 << 30)),
    # what only who knows the model can tell
    foreign("made for another model: fasa.fingerprint is 'llama'", changed("fasa.fingerprint", "llama")),
    foreign("made for another model: fasa.fingerprint is ''", changed("fasa.fingerprint", "\0llama")),
    foreign("fasa.head_count_kv has 1 entries and fasa.chunk_count 1, the model has 2 layers", with_layers(1)),
    foreign("fasa.head_count_kv has 3 entries and fasa.chunk_count 3, the model has 2 layers", with_layers(3)),
    foreign("fasa.head_count_kv = 1 .* of layer 0: .* 2 KV heads", altered(HEADS, 0, 1), altered(HEADS, 1, 3)),
]


@pytest.mark.check
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_python_and_the_library_agree_on_what_is_valid(bare_model, model, profile, tmp_path, case) -> None:
    written = inspect(profile).profile
    metadata = case.change(to_metadata(replace(written, calibration=replace(written.calibration, clipped=0.25))))
    path, whole = tmp_path / "profile.gguf", tmp_path / "model.gguf"
    path.write_bytes(encode_profile(read_header(model), metadata))
    splice(read_header(model), whole, metadata)

    if case.verdict == "refused":
        for file in (path, whole):
            with pytest.raises(SchemaError, match=rf"{file.name}: .*\b{case.key}\b"):
                inspect(file)
    else:
        read = inspect(path).profile
        assert "junk" not in repr(read)
        assert inspect(whole).profile.config == read.config

    with error_log() as errors:
        assert capi.load_profile(bare_model, path) == (case.verdict == "valid")
    if case.verdict == "valid":
        found = load(whole, n_ctx=256).fasa.settings
        wanted = asdict(read.config) | {"n_tip": read.n_tip} | case.settings
        assert {name: found[name] for name in wanted} == wanted
        return
    named = rf"profile.gguf: (?=.*\b{case.key}\b).*{case.message}" if case.key else case.message
    assert re.search(named, errors[-1])
    with pytest.raises(ModelError, match=case.message):
        load(whole, n_ctx=256)
    assert load(whole, profile, n_ctx=256, fasa_budget=99).fasa.settings["budget"] == 99


# Quantization


def quantize(src: Path, dst: Path, ftype: int) -> Path:
    """As llama-quantize does."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = ftype, True, 2
    assert llama_cpp.llama_model_quantize(str(src).encode(), str(dst).encode(), params) == 0
    return dst


TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


@pytest.mark.parametrize("name", TYPES)
def test_quantization_keeps_the_profile(model, annotated, profile, tokens, tmp_path, name) -> None:
    quantized = quantize(annotated, tmp_path / f"{name}.gguf", TYPES[name])
    assert quantized.stat().st_size < annotated.stat().st_size / 2
    assert fasa_pairs(quantized) == fasa_pairs(annotated)
    llm = load(quantized)
    assert llm.fasa.settings == load(annotated).fasa.settings
    logits = decode(llm, tokens)

    plain = load(quantize(model, tmp_path / "plain.gguf", TYPES[name]), profile)
    assert plain.fasa.settings == llm.fasa.settings
    assert (decode(plain, tokens) == logits).all()  # the same cells


def test_a_profile_of_one_quantization_serves_the_others(model, tokens, tmp_path) -> None:
    q8_0, q4_k_m = (quantize(model, tmp_path / f"{name}.gguf", ftype) for name, ftype in TYPES.items())
    made = convert(q8_0, tmp_path / "q8_0-fasa.gguf", profile=tmp_path / "profile.gguf", tokens=512, config=CONFIG)
    requantized = quantize(made.path, tmp_path / "q4_k_m-fasa.gguf", TYPES["q4_k_m"])  # other weights than q4_k_m
    assert fasa_pairs(requantized) == fasa_pairs(made.profile_path)
    first = decode(load(q4_k_m, made.profile_path), tokens)
    assert (decode(load(q4_k_m, made.path), tokens) == first).all()  # an annotated model serves as a profile, too
    assert (decode(load(requantized, made.profile_path), tokens) == decode(load(requantized), tokens)).all()
