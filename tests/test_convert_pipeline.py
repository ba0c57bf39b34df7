"""Conversion from end to end on random-weight models, and every bad input that it must refuse cleanly."""

import errno
import itertools
import os
import sys
import tempfile

from fasa_edge.cli import main
from fasa_edge.config import FasaConfig
from fasa_edge.convert import OBJECTIVES, capture, inspect, pipeline
from fasa_edge.errors import ConvertError, SchemaError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.gguf_splice import splice
from fasa_edge.io.text import read_text
from fasa_edge.schema import VERSION, GGUFValueType

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import Shape, make_model
from unchecked import convert

TOKENS = 1029  # enough for agreement with top_k = 128, and a last block as small as a decode step


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "tiny.gguf")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.check
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_convert_writes_a_profile_that_inspect_reads(model, objective):
    config = FasaConfig(budget=64, n_recent=8)
    result = convert(model, objective=objective, tokens=TOKENS, top_k=128, config=config)
    assert result.path == model.with_name("tiny-fasa.gguf")
    assert names(model.parent) == ["tiny-fasa.gguf", "tiny.gguf"]
    assert result.n_bytes == result.path.stat().st_size

    report = inspect(result.path)
    profile = report.profile
    assert report.annotated and report.architecture == "llama" and report.n_bytes == result.n_bytes
    assert profile.config == config and profile.n_tip == 24
    assert profile.calibration == result.profile.calibration
    assert (profile.calibration.text, profile.calibration.tokens) == ("pydoc_data.topics", TOKENS)
    assert profile.calibration.objective == objective
    assert profile.calibration.top_k == (128 if objective in ("agreement", "mass") else 0)
    assert [chunks.shape for chunks in profile.chunks] == [(2, 32), (2, 32)]
    for written, read in zip(result.profile.chunks, profile.chunks, strict=True):
        np.testing.assert_array_equal(written, read)

    plain = report.to_dict()
    assert plain["layers"][1]["chunks"] == profile.chunks[1][:, :24].tolist()
    assert plain["calibration"]["objective"] == objective and plain["config"]["budget"] == 64


@pytest.mark.check
def test_plain_model_is_not_annotated(model):
    report = inspect(model)
    assert not report.annotated and report.profile is None
    assert report.to_dict()["annotated"] is False and report.n_tensors == 21


@pytest.mark.check
def test_tensors_and_old_keys_are_byte_identical(model):
    out = convert(model, tokens=TOKENS).path
    before, after = read_header(model), read_header(out)
    for key, entry in before.entries.items():
        assert after.entries[key].raw == entry.raw
    assert {key for key in after.entries if key not in before.entries} == {
        key for key in after.entries if key.startswith("fasa.")
    }
    assert after.tensor_infos == before.tensor_infos
    assert out.read_bytes()[after.data_offset :] == model.read_bytes()[before.data_offset :]


def test_converting_twice_gives_the_same_bytes(model, tmp_path):
    first = convert(model, tmp_path / "first.gguf", tokens=TOKENS)
    second = convert(model, tmp_path / "second.gguf", tokens=TOKENS)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_annotated_model_needs_force_and_gives_the_same_again(model, tmp_path):
    first = convert(model, tokens=TOKENS).path
    with pytest.raises(ConvertError, match="already annotated"):
        convert(first, tokens=TOKENS)
    with pytest.raises(ConvertError, match="exists"):
        convert(model, tokens=TOKENS)
    again = convert(first, tmp_path / "again.gguf", tokens=TOKENS, force=True).path
    assert again.read_bytes() == first.read_bytes()


def test_progress_counts_tokens_then_bytes(model):
    seen = []
    result = convert(model, tokens=TOKENS, progress=lambda *at: seen.append(at))
    assert [at for at in dict.fromkeys(seen) if at[0] == "calibrate"] == [
        ("calibrate", n, TOKENS) for n in (0, 512, 1024, TOKENS)
    ]
    assert seen[-1] == ("write", result.n_bytes, result.n_bytes)


def test_text_of_the_user(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbf" + "Ein Käfer läuft. ".encode() * 40)
    profile = convert(model, text=text, tokens=TOKENS).profile
    assert profile.calibration.text == "text.txt"
    assert 700 < profile.calibration.tokens < TOKENS  # all that the text has


def test_context_limits_the_calibration(tmp_path):
    model = make_model(tmp_path / "short.gguf", shape=Shape(n_ctx=700))
    calibration = convert(model).profile.calibration
    assert (calibration.tokens, calibration.context) == (700, 700)


def test_context_to_stretch_over(model):
    """Its default is the model's; steps grow with it, where slow chunks turn further."""
    short, long = (convert(model, context=n, force=True, tokens=TOKENS).profile for n in (512, None))
    assert (short.calibration.context, long.calibration.context) == (512, 4096)
    by_chunk = []
    for profile in (short, long):
        step = np.empty_like(profile.step[0])
        np.put_along_axis(step, profile.chunks[0], profile.step[0], 1)
        by_chunk.append(step)
    ratio = (by_chunk[1] / by_chunk[0]).mean(0)
    np.testing.assert_allclose(ratio[:8], 1, atol=0.02)  # many turns either way
    assert ratio[20:28].max() > 1.04


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_whose_keys_never_move_come_last(tmp_path, objective):
    """Chunk 20 of the first KV head is zero, chunk 3 of the second one."""
    path = make_model(tmp_path / "dead.gguf", "qwen2")
    reader = gguf.GGUFReader(path, "r+")
    dead = [(0, 20), (1, 3)]
    for tensor in reader.tensors:
        if ".attn_k." in tensor.name:
            heads = tensor.data.reshape(2, 64, *tensor.data.shape[1:])
            for ih, chunk in dead:
                heads[ih, [chunk, chunk + 32]] = 0
    reader.data.flush()
    profile = convert(path, objective=objective, tokens=TOKENS).profile
    for il in range(2):
        assert [(ih, chunk) for ih, chunk in enumerate(profile.chunks[il][:, -1])] == dead
        assert (profile.step[il][:, -1] == 0).all() and (profile.step[il][:, :-1] > 0).all()
        assert (profile.centre[il][:, -1] == 0).all() and np.sort(profile.chunks[il]).tolist() == 2 * [[*range(32)]]


def test_an_annotation_of_version_1_is_replaced(model, tmp_path):
    old = tmp_path / "old.gguf"
    splice(read_header(model), old, [("fasa.version", GGUFValueType.UINT32, 1)])
    with pytest.raises(SchemaError, match=r"old\.gguf: fasa\.version = 1: .* convert the model again"):
        inspect(old)
    with pytest.raises(ConvertError, match="already annotated"):
        convert(old, tokens=TOKENS)
    again, fresh = (convert(path, path.with_name("new.gguf"), tokens=TOKENS, force=True).path for path in (old, model))
    assert inspect(again).profile.calibration.context == 4096 and again.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize(("n_embd_head", "n_tip"), [(32, 12), (128, 32)])
def test_tip_size_follows_the_head(tmp_path, n_embd_head, n_tip):
    model = make_model(tmp_path / "heads.gguf", "qwen2", Shape(n_embd_head=n_embd_head))
    assert convert(model, tokens=512).profile.n_tip == n_tip
    assert convert(model, tokens=512, n_tip=3, force=True).profile.n_tip == 3


@pytest.mark.check
def test_chunks_that_matter_are_found(tmp_path):
    """Only the planes of chunks 3 and 20 of Q and K have weights, in each layer and head: they must rank first."""
    path = make_model(tmp_path / "planted.gguf", "qwen2")
    reader = gguf.GGUFReader(path, "r+")
    keep = np.isin(np.arange(64) % 32, [3, 20])
    for tensor in reader.tensors:
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            tensor.data.reshape(-1, 64, *tensor.data.shape[1:])[:, ~keep] = 0
    reader.data.flush()
    for objective in OBJECTIVES:
        out = tmp_path / f"{objective}.gguf"
        for chunks in convert(path, out, objective=objective, tokens=TOKENS).profile.chunks:
            assert np.sort(chunks[:, :2], axis=1).tolist() == [[3, 20], [3, 20]]


# Bad input


@pytest.fixture
def refuses(tmp_path):
    """Converts and expects an error; afterwards the folder holds what it held before."""

    def check(src, message, **arguments):
        before = names(src.parent)
        with pytest.raises(ConvertError, match=message) as caught:
            convert(src, **({"tokens": TOKENS} | arguments))
        assert names(src.parent) == before
        return str(caught.value)

    return check


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("bloom", "no rotary embedding"),
        ("deepseek2", r"latent attention \(MLA\)"),
        ("mamba", "none of the 2 layers keeps keys .*recurrent"),
    ],
)
def test_models_without_chunks(tmp_path, refuses, arch, message):
    refuses(make_model(tmp_path / f"{arch}.gguf", arch), message)


@pytest.mark.check
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "magic"}, "objective 'magic' is unknown: choose one of agreement, energy, lsq, mass"),
        ({"tokens": 511}, "tokens = 511 is too few .* 512"),
        ({"top_k": 0}, "top_k = 0"),
        ({"context": 511}, "context = 511 is out of range: choose 512 to 2147483647 tokens"),
        ({"context": 2**31}, "context = 2147483648 is out of range"),
        ({"top_k": 258, "objective": "agreement"}, "needs 1032 tokens but the calibration has 1029"),
        ({"n_tip": 33}, "n_tip = 33 is out of range: choose 1 to 32"),
        ({"n_tip": 0}, "n_tip = 0"),
        ({"text": "missing.txt"}, r"text missing\.txt cannot be read: No such file"),
    ],
)
def test_bad_arguments(model, refuses, arguments, message):
    refuses(model, message, **arguments)


def test_text_too_short_or_not_utf8(model, refuses, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("too short")
    refuses(model, r"text text\.txt has \d+ tokens but 512 are needed", text=text)
    text.write_bytes(b"caf\xe9")
    refuses(model, "not UTF-8: byte 0xe9 at offset 3", text=text)


@pytest.mark.check
def test_damaged_models(model, refuses, tmp_path):
    data = model.read_bytes()
    model.write_bytes(data[:-1000])
    refuses(model, "truncated: tensor")
    model.write_bytes(data[:1000])
    refuses(model, "damaged")
    model.write_bytes(b"not a model")
    refuses(model, "not a GGUF file")
    model.write_bytes(data.replace(b"llama", b"lloma", 1))
    refuses(model, "cannot be run by llama.cpp: .*unknown model architecture: 'lloma'")
    start = read_header_of(data, tmp_path).data_offset
    model.write_bytes(data[:start] + b"\xff" * 4096 + data[start + 4096 :])  # NaN for the first tokens
    refuses(model, "of layer 0 is not finite; the weights are damaged")


def read_header_of(data: bytes, folder):
    path = folder / "whole.gguf"
    path.write_bytes(data)
    header = read_header(path)
    path.unlink()
    return header


def test_files_that_are_no_whole_model(tmp_path, refuses):
    refuses(make_model(tmp_path / "part.gguf", split__count=3), "one of 3 files of a split model")
    refuses(make_model(tmp_path / "none.gguf", shape=Shape(n_layer=0)), "llama.block_count = 0, so no layers")
    refuses(make_model(tmp_path / "short.gguf", shape=Shape(n_ctx=256)), "context of 256 tokens")
    text = make_model(tmp_path / "text.gguf").read_bytes()
    (tmp_path / "text.gguf").write_bytes(text.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.madel"))
    refuses(tmp_path / "text.gguf", "has no tokenizer")
    (tmp_path / "text.gguf").write_bytes(text.replace(b"general.architecture", b"general.orchitecture"))
    refuses(tmp_path / "text.gguf", "no general.architecture")


def test_damaged_profile_is_named_by_inspect(model, monkeypatch, tmp_path):
    metadata = [("fasa.version", GGUFValueType.UINT32, VERSION)]
    monkeypatch.setattr(pipeline, "to_metadata", lambda profile: metadata)
    out = convert(model, tokens=512).path
    with pytest.raises(SchemaError, match=r"tiny-fasa\.gguf: fasa\.n_tip is missing"):
        inspect(out)


@pytest.mark.check
def test_interruption_leaves_nothing_behind(model):
    def interrupt(stage, done, total):
        if stage == "write" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tokens=512, progress=interrupt)
    assert names(model.parent) == ["tiny.gguf"]


@pytest.mark.parametrize(("module", "call"), [(tempfile, "mkdtemp"), (os, "fsync"), (os, "link")])
@pytest.mark.parametrize("n_before", [0, 1])
def test_copy_and_profile_are_written_both_or_neither(model, refuses, monkeypatch, module, call, n_before):
    original, n_calls = getattr(module, call), itertools.count()

    def fail(*args, **kwargs):
        if next(n_calls) == n_before:
            raise OSError(errno.EIO, "Input/output error")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, call, fail)
    refuses(model, "Input/output error", out=model.with_name("copy.gguf"), profile=model.with_name("profile.gguf"))


def test_layers_that_decoding_leaves_out_have_no_chunks(model, refuses, monkeypatch):
    captured = capture.capi.captured
    monkeypatch.setattr(capture.capi, "captured", lambda ctx, il, *rest: captured(ctx, il, *rest) if il == 0 else None)
    profile = convert(model, tokens=TOKENS).profile
    assert [chunks.shape for chunks in profile.chunks] == [(2, 32), (0, 0)]
    monkeypatch.setattr(capture.capi, "captured", lambda *_: None)
    refuses(model, "ran none of the 2 attention layers", force=True)


def test_rows_missing_from_a_capture(model, refuses, monkeypatch):
    captured = capture.capi.captured
    monkeypatch.setattr(capture.capi, "captured", lambda *args: captured(*args)[:-1])
    refuses(model, r"Q of layer 0 has shape \(511, 4, 64\) where the model's geometry says \(512, 4, 64\)")


def test_default_text_is_the_documentation_of_python():
    name, text = read_text()
    assert name == "pydoc_data.topics"
    assert len(text) > 300_000 and read_text() == (name, text)


def test_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConvertError, match=r"no pydoc_data\.topics: give a text file with --text"):
        read_text()


def test_rope_of_run_time_is_calibrated(tmp_path):
    """What the options say counts as if the model said it."""
    own, other = (make_model(tmp_path / f"{base:.0f}.gguf", "llama", Shape(rope_base=base)) for base in (1e4, 500.0))
    made = {
        name: convert(path, profile=tmp_path / f"{name}-fasa.gguf", rope=rope).profile
        for name, path, rope in (
            ("own", own, None),
            ("told", own, {"rope_freq_base": 500.0}),
            ("other", other, None),
            ("yarn", own, {"rope_scaling_type": 2, "rope_freq_scale": 0.25}),
        )
    }
    for told, other in zip(made["told"].centre, made["other"].centre, strict=True):
        np.testing.assert_array_equal(told, other)
    for name in ("own", "yarn"):
        assert any((a != b).any() for a, b in zip(made[name].centre, made["told"].centre, strict=True))
    with pytest.raises(ConvertError, match=r"rope = n_ctx: unknown; choose of rope_scaling_type, .*yarn_orig_ctx"):
        convert(own, profile=tmp_path / "x.gguf", rope={"n_ctx": 1})


def test_rope_options_reach_the_model(monkeypatch):
    seen = []
    monkeypatch.setattr("fasa_edge.convert.convert", lambda *_, **options: seen.append(options["rope"]) or 1 / 0)
    scaling = ["--rope-scaling", "yarn", "--rope-freq-scale", "0.25", "--yarn-orig-ctx", "8192"]
    CliRunner().invoke(main, ["convert", "model.gguf", "--rope-freq-base", "1e6", *scaling])
    assert seen == [{"rope_scaling_type": 2, "rope_freq_base": 1e6, "rope_freq_scale": 0.25, "yarn_orig_ctx": 8192}]
