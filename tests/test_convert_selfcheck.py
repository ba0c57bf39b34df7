"""The check that ends a conversion: what it measures, what it warns of, and that it never costs the result."""

import json
import re
from dataclasses import replace

from fasa_edge.cli import main
from fasa_edge.config import FasaConfig
from fasa_edge.convert import convert, inspect, pipeline, selfcheck
from fasa_edge.convert.selfcheck import Check, check_profile, smallest_passing
from fasa_edge.errors import ConvertError, FasaError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.text import read_text

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import make_model

PLANTED = [3, 20]
CONFIG = FasaConfig(n_dense_layers=0)
GOOD = Check("text", 2048, 128, 512, 12, 32, 1, 0.006, 0.001, 0.003, 0.0005, [None, 0.9, 0.8], [None, 0.01, 0.03])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its attention is narrow, and two chunks make all of it."""
    path = make_model(tmp_path_factory.mktemp("model") / "planted.gguf", "qwen2")
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            heads = tensor.data.reshape(-1, 64, *tensor.data.shape[1:])
            heads[:, ~np.isin(np.arange(64) % 32, PLANTED)] = 0
            heads *= 4
    reader.data.flush()
    return path


@pytest.fixture(scope="module")
def profile(model, tmp_path_factory):
    made = convert(model, profile=tmp_path_factory.mktemp("profile") / "p.gguf", config=CONFIG, check=False)
    assert made.check is None and made.unchecked is None and made.profile.calibration.clipped is None
    return made.profile


def check(model, profile, n_ctx: int = 4096, **options) -> Check:
    return check_profile(read_header(model), profile, read_text()[1], n_ctx, **options)


@pytest.mark.check
def test_good_chunks_pass(model, profile):
    found = check(model, replace(profile, n_tip=2))
    assert (found.text, found.n_prefix, found.n_tokens, found.budget) == ("pydoc_data.topics", 2048, 128, 512)
    assert (found.n_tip, found.n_chunk, found.n_dense_layers) == (2, 32, 0)
    assert found.passed and found.warning is None and 0 < found.kl_error < found.kl
    assert len(found.mass) == 2 and all(0.9 < mass <= 1 + 1e-5 for mass in found.mass)
    assert len(found.clipped) == 2 and all(0 < share < 0.02 for share in found.clipped)
    halved = check(model, replace(profile, n_tip=2, step=[step / 2 for step in profile.step]))
    assert halved.clipped_share > 10 * found.clipped_share


@pytest.mark.check
def test_bad_chunks_warn_and_name_a_layer(model, profile):
    chunks = [layer[:, ::-1].copy() for layer in profile.chunks]
    found = check(model, replace(profile, chunks=chunks, n_tip=2))
    assert not found.passed and found.kl > 0.022
    assert f"layer {found.worst_layer} recalls {min(found.mass):.2f} of the attention mass" in found.warning
    assert "nats at budget 512: convert again with a larger --n-tip (now 2 of 32) or" in found.warning


def test_auto_finds_the_fewest_chunks(model):
    stages = []
    made = convert(
        model,
        n_tip="auto",
        config=CONFIG,
        force=True,
        progress=lambda stage, done, total: stages.append((stage, done == total)),
    )
    written = inspect(made.path).profile
    assert made.check.passed and made.check.n_tip == made.profile.n_tip == written.n_tip == 2
    assert written.calibration == made.profile.calibration
    assert written.calibration.clipped == pytest.approx(made.check.clipped_share) and made.check.clipped_share > 0
    assert [stage for stage in dict.fromkeys(stages) if stage[1]] == [
        (stage, True) for stage in ("calibrate", "rank", "check", "write")
    ]


@pytest.mark.check
def test_the_clipped_share_is_of_the_layers_that_have_one():
    assert GOOD.clipped_share == pytest.approx(0.02)
    assert replace(GOOD, clipped=[None, None, None]).clipped_share is None


@pytest.mark.check
@pytest.mark.parametrize("n_tips", [[12], list(range(2, 33, 2)), [2, 4, 5]])
def test_bisection_finds_the_smallest_or_ends_with_the_largest(n_tips):
    for smallest in (*n_tips, None):
        measured = []

        def measure(n_tip, smallest=smallest, measured=measured):
            measured.append(n_tip)
            return replace(GOOD, n_tip=n_tip, kl=0.0 if smallest and n_tip >= smallest else 1.0)

        found = smallest_passing(n_tips, measure)
        assert found.n_tip == (smallest or n_tips[-1]) and found.passed == bool(smallest)
        assert measured[0] == n_tips[len(n_tips) // 2] and len(measured) <= len(n_tips).bit_length()


@pytest.mark.check
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"mass": [None, 0.74, 0.8]}, r"^layer 1 recalls 0\.74 of the attention mass, less than 0\.75 at budget 512:"),
        ({"mass": [None, float("nan")]}, "layer 1 recalls nan"),
        ({"kl": 0.010, "noise": 0.003}, None),
        ({"kl": 0.012, "budget": 511}, None),
        ({"kl": 0.012}, r"^KL 0\.009 above the noise exceeds 0\.008 nats"),
        ({"kl": 0.026, "budget": 256}, r"^KL 0\.023 above .* 0\.022 nats .* larger --n-tip \(now 12 of 32\) or more"),
        ({"kl": float("nan")}, "KL nan"),
        ({"kl": 1.0, "n_tip": 32}, r"again with more --n-dense-layers \(now 1\), or run with a larger --budget"),
    ],
)
def test_gates(change, message):
    found = replace(GOOD, **change)
    assert found.passed == (found.warning is None) == (message is None)
    if message:
        assert re.search(message, found.warning)


@pytest.mark.check
@pytest.mark.parametrize(
    ("kl_error", "noise_error", "clearly"),
    [(0.002, 0, True), (0.002, 0.002, True), (0.002, 0.003, False), (0.004, 0, False), (float("nan"), 0, False)],
)
def test_auto_wants_a_standard_error_to_spare(kl_error, noise_error, clearly):
    found = replace(GOOD, kl=0.008, kl_error=kl_error, noise_error=noise_error)
    assert found.passed and found.warning is None and found.passed_clearly == clearly
    assert smallest_passing([12, 14], lambda n_tip: replace(found, n_tip=n_tip)).n_tip == (12 if clearly else 14)


@pytest.mark.parametrize(
    ("n_ctx", "settings", "n_prefix", "budget"),
    [(8192, {"budget": 1024}, 2048, 1024), (8192, {"budget": 1025}, 2048, 256), (512, {}, 384, 48)]
    + [(512, {"n_sink": 100}, 384, 132)],
)
def test_budget_is_no_more_than_half_of_the_prefix(model, profile, n_ctx, settings, n_prefix, budget):
    found = check(model, replace(profile, config=replace(CONFIG, **settings)), n_ctx)
    assert (found.n_prefix, found.budget) == (n_prefix, budget)


def test_a_short_text_leaves_the_check_to_the_documentation(model, profile):
    calibrated = replace(profile, calibration=replace(profile.calibration, text="text.txt", tokens=512))
    for n, name in ((1000, "pydoc_data.topics"), (6000, "text.txt")):
        content = "All work and no play. " * (n // 22)
        assert check_profile(read_header(model), calibrated, content, 1024).text == name


@pytest.mark.parametrize("error", [ConvertError("no room"), OSError("no room"), MemoryError("no room")])
def test_what_cannot_be_checked_is_written_and_told(model, profile, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(selfcheck, "Runner", fail)
    monkeypatch.setattr(pipeline, "_make_profile", lambda *_: (profile, None))
    made = convert(model, tmp_path / "copy.gguf", n_tip="auto")
    assert made.check is None and made.unchecked == "no room"
    assert inspect(made.path).profile.n_tip == 24  # the default


def test_a_mistake_in_the_check_is_no_result_of_it(model, profile, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(selfcheck, "Runner", fail)
    monkeypatch.setattr(pipeline, "_make_profile", lambda *_: (profile, None))
    with pytest.raises(TypeError, match="a bug"):
        convert(model, tmp_path / "copy.gguf")
    assert not (tmp_path / "copy.gguf").exists()


def test_auto_takes_the_check(model, tmp_path):
    with pytest.raises(ConvertError, match="n_tip = 'auto' is chosen by the check"):
        convert(model, tmp_path / "copy.gguf", n_tip="auto", check=False)


def test_command_line(model, tmp_path):
    def run(*arguments):
        args = ["convert", str(model), "--force", "-o", str(tmp_path / "copy.gguf"), *arguments]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        return result

    good = run("--n-dense-layers", "0", "--n-tip", "auto")
    assert re.search(r"(?m)^check: worst layer [01] recalls (0\.9|1\.0)\d of the attention, KL to d", good.stdout)
    assert "warning" not in good.stderr
    bad = run("--n-tip", "1", "--budget", "37", "--json")
    report = json.loads(bad.stdout)
    assert not report["check"]["passed"] and report["check"]["worst_layer"] == 1
    assert "warning: layer 1 recalls 0." in bad.stderr and "(now 1 of 32)" in bad.stderr
    dense = "fasa ran dense in all layers (dense_layer), so there is nothing to compare"
    assert f"warning: not checked: {dense}" in run("--n-dense-layers", "2").stderr
    undecided = run("--n-dense-layers", "2", "--n-tip", "auto").stderr
    assert f"warning: n_tip auto could not be decided: {dense}; 24, the default, was written" in undecided
    assert "budget 256 in place of 1025" in run("--budget", "1025", "--n-dense-layers", "0").stdout
    assert "check" not in run("--no-check").output


def test_what_the_calibration_read_is_not_read_again(model, monkeypatch):
    decoded = []
    decode = selfcheck.sequence.decode

    def count(ctx, tokens, *args, **options):
        decoded.append(len(tokens))
        decode(ctx, tokens, *args, **options)

    monkeypatch.setattr(selfcheck.sequence, "decode", count)
    made = convert(model, profile=model.with_name("p.gguf"), config=CONFIG, force=True)
    assert sum(decoded) == 2048 + 2 * 128 + 32 + 128  # read; keys for the clipped share, dense, noise, sparse

    anew = check(model, made.profile)
    assert anew.kl == pytest.approx(made.check.kl, rel=0.05) and anew.mass == pytest.approx(made.check.mass, rel=1e-3)


def test_what_cannot_be_saved_is_read_again(model, tmp_path, monkeypatch):
    """The calibration is not lost for it."""

    def fail(*_):
        raise FasaError("llama.cpp cannot save the state of a sequence")

    monkeypatch.setattr("fasa_edge.convert.capture.sequence.save", fail)
    made = convert(model, profile=tmp_path / "p.gguf", config=CONFIG)
    assert made.check and made.check.n_prefix == 2048 and made.unchecked is None
