"""Profiles that stand alone, and quantization: one profile serves every file of a model, and no damage crashes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import fasa_edge
from fasa_edge import _capi, bench
from fasa_edge._lib import llama_cpp
from fasa_edge._log import error_log
from fasa_edge.config import FasaConfig
from fasa_edge.convert import inspect
from fasa_edge.convert.gguf_header import read_header
from fasa_edge.convert.gguf_splice import splice
from fasa_edge.convert.profile import encode_profile
from fasa_edge.errors import ConvertError, ModelError
from fasa_edge.schema import GGUFValueType, to_metadata

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
        runner = bench._stock(llm, flash_attn=True)
        assert not _capi.has_profile(runner.llm.model)
        runner.llm.close()
        rows = list(bench.run(llm, [300], n_gen=1, n_repetitions=1))
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


def test_a_refused_profile_leaves_the_model_as_it_was(bare_model, model, profile, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("no GGUF at all")
    for path in (tmp_path / "missing.gguf", tmp_path / "text.txt", tmp_path, model):
        with error_log() as errors:
            assert not _capi.load_profile(bare_model, path)
        assert str(path) in errors[-1] and ("no FASA profile" if path == model else "as GGUF") in errors[-1]
        with pytest.raises(ModelError, match="Failed to load FASA profile: .*fasa-edge convert --profile"):
            load(model, path)
    assert not _capi.has_profile(bare_model)
    assert _capi.load_profile(bare_model, profile)
    assert not _capi.load_profile(bare_model, tmp_path) and _capi.has_profile(bare_model)


def test_a_context_keeps_the_profile_it_was_made_with(model, annotated, tokens, tmp_path) -> None:
    llm = load(annotated)
    wanted = decode(llm, tokens)
    fewer = convert(model, profile=tmp_path / "fewer.gguf", tokens=512, n_tip=1, objective="energy").profile_path
    assert _capi.load_profile(llm.model, fewer)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    assert (decode(llm, tokens) == wanted).all()
    assert llm.fasa.settings["n_tip"] == load(annotated).fasa.settings["n_tip"]


# Damage


def rewrite(path: Path, data: bytes) -> None:
    """Replaces a file; removing it first spares the flush that ext4 makes when a file is truncated and rewritten."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def test_every_truncation_is_refused(bare_model, profile, tmp_path) -> None:
    data, path = profile.read_bytes(), tmp_path / "cut.gguf"
    for n in range(len(data)):
        rewrite(path, data[:n])
        assert not _capi.load_profile(bare_model, path), n
    rewrite(path, data)
    assert _capi.load_profile(bare_model, path)


@pytest.mark.parametrize("patch", [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x00" * 8, b"\x01" * 4, b"\x80"])
def test_overwritten_bytes_never_crash(bare_model, profile, tmp_path, patch) -> None:
    """Some are taken: a text, a value of the objective, a setting within its limits."""
    data, path = profile.read_bytes(), tmp_path / "damaged.gguf"
    n_taken = 0
    for at in range(len(data) - len(patch)):
        rewrite(path, data[:at] + patch + data[at + len(patch) :])
        n_taken += _capi.load_profile(bare_model, path)
    assert 0 < n_taken < len(data)


def changed(key: str, value: object, type_: GGUFValueType | None = None):
    """Metadata with one value, and its type if given, replaced; None leaves the key out."""

    def change(metadata: list) -> list:
        pairs = [(k, t if type_ is None else type_, value) if k == key else (k, t, v) for k, t, v in metadata]
        return [pair for pair in pairs if pair[2] is not None]

    return change


def altered(key: str, at: int, value: object):
    """Metadata with one element of an array replaced."""

    def change(metadata: list) -> list:
        array = next(v for k, _, v in metadata if k == key).copy()
        array[at] = value
        return changed(key, array)(metadata)

    return change


def shortened(key: str):
    """Metadata with the last element of an array left out."""
    return lambda metadata: [(k, t, v[:-1] if k == key else v) for k, t, v in metadata]


DAMAGE = [
    (changed("fasa.version", 2), "fasa.version = 2 is not supported"),
    (changed("fasa.version", "1", T.STRING), "fasa.version has type str, expected u32"),
    (changed("fasa.n_tip", 0), "fasa.n_tip = 0 is out of range"),
    (changed("fasa.n_tip", 33), "fasa.n_tip = 33 is out of range: a head of layer 0 has 32 chunks"),
    (changed("fasa.n_tip", None), "fasa.n_tip is missing"),
    (changed("fasa.budget", 64.0, T.FLOAT32), "fasa.budget has type f32, expected u32"),
    (changed("fasa.enabled", 1, T.UINT8), "fasa.enabled has type u8, expected bool"),
    (altered("fasa.chunks", 5, 32), "layer 0, KV head 0 lists chunk 32, which is out of range"),
    (altered("fasa.chunks", 5, -1), "layer 0, KV head 0 lists chunk -1, which is out of range"),
    (lambda metadata: altered("fasa.chunks", 5, array_of(metadata)[4])(metadata), "or listed before"),
    (shortened("fasa.chunks"), "fasa.chunks has 127 entries, layer 1 needs more"),
    (lambda metadata: changed("fasa.chunks", np.append(array_of(metadata), np.int32(0)))(metadata), "expected 128"),
    (lambda metadata: changed("fasa.chunks", array_of(metadata).astype(np.int64))(metadata), "not an array of i32"),
    (changed("fasa.chunks", "0 1 2", T.STRING), "fasa.chunks has type str, expected arr"),
    (shortened("fasa.head_count_kv"), "fasa.head_count_kv has 1 entries and fasa.chunk_count 2, the model has 2"),
    (altered("fasa.head_count_kv", 1, 3), "layer 1 has 3 KV heads of 32 chunks, the model has 2 of 32"),
    (altered("fasa.head_count_kv", 1, -2), "layer 1 has -2 KV heads"),
    (altered("fasa.chunk_count", 0, 1 << 30), "layer 0 has 2 KV heads of 1073741824 chunks"),
    (shortened("fasa.agreement"), "fasa.agreement has 127 entries, expected 128"),
    (altered("fasa.agreement", 3, np.nan), "fasa.agreement holds a value that is not finite"),
    (altered("fasa.agreement", 3, -np.inf), "fasa.agreement holds a value that is not finite"),
    (changed("fasa.agreement", np.zeros(128, np.int32)), "fasa.agreement is not an array of f32"),
    (changed("fasa.fingerprint", "llama"), "made for another model: fasa.fingerprint is 'llama'"),
]


def array_of(metadata: list) -> np.ndarray:
    return next(value for key, _, value in metadata if key == "fasa.chunks")


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damage_is_named_and_a_sound_profile_replaces_it(model, profile, tmp_path, damage, message) -> None:
    """In the profile and in the model; both are read by the same code."""
    metadata = damage(to_metadata(inspect(profile).profile))
    path, whole = tmp_path / "profile.gguf", tmp_path / "model.gguf"
    path.write_bytes(encode_profile(read_header(model), metadata))
    with pytest.raises(ModelError, match=f"profile.gguf: .*{message}"):
        load(model, path)
    splice(read_header(model), whole, metadata)
    with pytest.raises(ModelError, match=message):
        load(whole)
    assert load(whole, profile, n_ctx=0, fasa_budget=99).fasa.settings["budget"] == 99


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
