"""``eval`` with a document store: prefixes are read once, and what is measured is the same to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasa_edge import DocumentStore
from fasa_edge.eval import Evaluation, evaluate
from fasa_edge.eval.methods import DENSE
from fasa_edge.eval.runner import Runner
from fasa_edge.runtime import context_states, library

import numpy as np
import pytest
from documents import interrupt
from runtime import TEXTS, check
from tiny_models import make_model

N_BATCH = 128


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = np.random.default_rng(0).choice(list("abcdefghij. "), 6000)
    path.write_text("".join(letters))
    return path


def run(model: Path, text: Path, cache: Any = None, **options: Any) -> Evaluation:
    fixed = {"tasks": ["kld"], "prefixes": [500, 700], "n_blocks": 2, "n_tokens": 16, "budgets": [64], "texts": [text]}
    return evaluate(model, cache=cache, **({"n_batch": N_BATCH} | fixed | options))


def figures(found: Evaluation) -> Sequence[Any]:
    rows = found.as_dict()
    return [rows[name] for name in ("text", "by_text", "answers", "by_depth")]


N_ALL = 2 * (500 + 700)


@pytest.mark.check
@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_prefixes_are_read_once(models, arch: str, text: Path, tmp_path: Path) -> None:
    model = models(arch)
    wanted = run(model, text)
    assert (wanted.n_read, wanted.n_restored) == (N_ALL, 0)
    first = run(model, text, tmp_path)
    assert figures(first) == figures(wanted)
    second = run(model, text, tmp_path)
    assert (second.n_read, second.n_restored) == (0, N_ALL)
    assert figures(second) == figures(wanted)


@pytest.mark.parametrize("arch", ["gemma3", "lfm2", "mamba"])
def test_prefixes_of_whole_batches(models, arch: str, text: Path, tmp_path: Path) -> None:
    """Their tail follows the last file, and none begins there."""
    model = make_model(tmp_path / "mamba.gguf", "mamba") if arch == "mamba" else models(arch)
    options = {"prefixes": [5 * N_BATCH], "methods": ["dense"]}
    run(model, text, tmp_path / "store", **options)
    found = run(model, text, tmp_path / "store", **options)
    assert (found.n_read, found.n_restored) == (0, 2 * 5 * N_BATCH)


def test_other_settings_have_the_same_prefixes(model: Path, text: Path, tmp_path: Path) -> None:
    run(model, text, tmp_path, prefixes=[700])
    for options in (
        {"budgets": [32, 128]},
        {"n_tips": [2, 8]},
        {"settings": {"n_sink": 8, "n_recent": 16, "n_dense_layers": 2}},
        {"tasks": ["mass"], "batch": 4},
    ):
        found = run(model, text, tmp_path, prefixes=[700], **options)
        assert (found.n_read, found.n_restored) == (0, 2 * 700)
        assert figures(found) == figures(run(model, text, prefixes=[700], **options))


@pytest.mark.parametrize(
    "arguments", [{"n_gpu_layers": 2}, {"main_gpu": 1}, {"split_mode": 2}, {"tensor_split": [0.5, 0.5]}], ids=str
)
def test_other_places_have_prefixes_of_their_own(model: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    """Of layers: each device rounds in its own way."""
    for options, n_restored in ({}, 0), (arguments, 0), (arguments, 300):
        with Runner(str(model), 512, store=DocumentStore(tmp_path), **options) as runner:
            runner.prefill(TEXTS[0][:300])
            assert runner.n_restored == n_restored


def test_other_devices_have_prefixes_of_their_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors, too."""
    for devices, n_restored in (["CPU: A"], 0), (["CPU: B"], 0), (["CUDA0: C", "CPU: B"], 0), (["CPU: A"], 300):
        monkeypatch.setattr(library, "devices", lambda found=devices: [(None, about) for about in found])
        with Runner(str(model), 512, store=DocumentStore(tmp_path)) as runner:
            runner.prefill(TEXTS[0][:300])
            assert runner.n_restored == n_restored


def test_what_a_store_has_of_other_texts_changes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    """A part of a batch is rounded in another way than the whole."""
    wanted = run(model, text, prefixes=[700])
    run(model, text, tmp_path, prefixes=[650, 690])
    run(model, text, tmp_path, prefixes=[1000])
    found = run(model, text, tmp_path, prefixes=[700])
    assert figures(found) == figures(wanted)
    assert found.n_restored >= 700 // N_BATCH * N_BATCH


def test_what_was_read_before_changes_nothing(model: Path) -> None:
    """Nor what memory has of it."""
    tokens = TEXTS[0][:720]
    with Runner(str(model), 1024, n_batch=N_BATCH) as runner:
        runner.prefill(tokens[:700])
        wanted = runner.decode(tokens[700:], DENSE).logits
        for before in (tokens[:500], tokens[:690] + TEXTS[1][:100], TEXTS[1][:300]):
            n_read = runner.n_read
            runner.prefill(before)
            runner.prefill(tokens[:700])
            assert np.array_equal(runner.decode(tokens[700:], DENSE).logits, wanted)
        runner.prefill(tokens[:690], observe=True)  # with other attention
        runner.prefill(tokens[:700])
        assert np.array_equal(runner.decode(tokens[700:], DENSE).logits, wanted)
        assert runner.n_read - n_read == 300 + 700 + 690 + 700
        runner.prefill(tokens[:690])
        n_read = runner.n_read
        runner.prefill(tokens[:700])
        assert runner.n_read - n_read == 700 % N_BATCH  # the last batch


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_prompts_share_a_haystack(models, arch: str, text: Path, tmp_path: Path) -> None:
    options = {"tasks": ["passkey"], "lengths": [1500], "depths": [0.4, 0.8, 1.0], "teacher_forced": True}
    model = models(arch)
    wanted = run(model, text, **options)
    first = run(model, text, tmp_path, **options)
    assert figures(first) == figures(wanted)
    assert first.n_read <= wanted.n_read
    # another key in the same haystack
    more = options | {"seeds": [2]}
    other = run(model, text, tmp_path, **more)
    assert other.n_restored > 2 * 400
    assert figures(other) == figures(run(model, text, **more))
    second = run(model, text, tmp_path, **options)
    assert (second.n_read, figures(second)) == (0, figures(wanted))


@pytest.mark.parametrize("swa_full", [True, False])
def test_sliding_windows(models, swa_full: bool, tmp_path: Path) -> None:
    """They are restored to other cells, which rounds otherwise; all of a window is there."""
    tokens, found = TEXTS[0][:720], []
    for store in (None, DocumentStore(tmp_path), DocumentStore(tmp_path)):
        with Runner(str(models("gemma3")), 1024, n_batch=N_BATCH, swa_full=swa_full, store=store) as runner:
            runner.prefill(tokens[:700])
            found.append(runner.decode(tokens[700:], DENSE).logits)
            n_tokens = runner.n_read, runner.n_restored
    assert n_tokens == (0, 700)
    assert np.array_equal(found[0], found[1])
    check(found[0], found[2], 1e-5)


def test_prefixes_that_are_read_by_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    options = {"methods": ["prompt"], "prefixes": [700], "prompt_masses": [500, 900]}
    wanted = run(model, text, **options)
    run(model, text, tmp_path, **options)
    found = run(model, text, tmp_path, **options)
    assert (found.n_read, figures(found)) == (0, figures(wanted))
    assert found.n_restored == 2 * 3 * 700


def test_methods_that_observe_the_prompt_read_it(model: Path, text: Path, tmp_path: Path) -> None:
    options = {"methods": ["fasa", "snapkv"], "prefixes": [700]}
    wanted = run(model, text, **options)
    run(model, text, tmp_path, prefixes=[700])
    found = run(model, text, tmp_path, **options)
    assert (found.n_read, figures(found)) == (2 * 700, figures(wanted))
    with pytest.raises(KeyboardInterrupt):
        run(model, text, tmp_path / "another", **options, progress=end)
    assert not list((tmp_path / "another").glob("*/*"))


def end(stage: str, done: int, total: int) -> None:
    if stage == "reading" and done >= 3 * N_BATCH:
        raise KeyboardInterrupt


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_a_reading_that_ends_early_goes_on(models, arch: str, text: Path, tmp_path: Path) -> None:
    model = models(arch)
    wanted = run(model, text, prefixes=[700])
    with pytest.raises(KeyboardInterrupt):
        run(model, text, tmp_path, prefixes=[700], progress=end)
    found = run(model, text, tmp_path, prefixes=[700])
    assert (found.n_restored, figures(found)) == (3 * N_BATCH, figures(wanted))


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_a_reading_that_ends_while_a_batch_is_decoded_goes_on(
    models, arch: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(arch)
    wanted = run(model, text, prefixes=[700])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        run(model, text, tmp_path, prefixes=[700])
    found = run(model, text, tmp_path, prefixes=[700])
    assert (found.n_restored, figures(found)) == (3 * N_BATCH, figures(wanted))


def test_what_was_read_with_other_attention_is_not_stored(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        run(model, text, tmp_path, prefixes=[700], methods=["snapkv"])
    assert not list(tmp_path.glob("*/*"))


def test_what_was_wrong_is_said(model: Path, text: Path, tmp_path: Path) -> None:
    run(model, text, tmp_path, prefixes=[700])
    for path in tmp_path.glob("*/*.rows"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        found = run(model, text, tmp_path, prefixes=[700])
    assert found.n_read == 2 * 700
    with pytest.warns(UserWarning, match="exceed the 1000 of"):
        run(model, text, DocumentStore(tmp_path, capacity_bytes=1000), prefixes=[600])


def test_what_was_wrong_is_said_of_a_run_that_ends_early(model: Path, text: Path, tmp_path: Path) -> None:
    def end(stage: str, done: int, total: int) -> None:
        if stage == "reading" and done:
            raise KeyboardInterrupt

    run(model, text, tmp_path, prefixes=[700])
    for path in tmp_path.glob("*/*.rows"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(KeyboardInterrupt):
        run(model, text, tmp_path, prefixes=[700], progress=end)


def test_what_is_stored_on_the_way(models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_states, "_SECONDS", 0)
    monkeypatch.setattr(context_states, "_SHARE", 0)
    run(models("lfm2"), text, tmp_path / "often")
    monkeypatch.undo()
    run(models("lfm2"), text, tmp_path / "once")
    names = [{path.name for path in (tmp_path / name).glob("*/*")} for name in ("often", "once")]
    assert names[0] == names[1]
