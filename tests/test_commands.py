"""Every command is a function of the library, its options mean what they do in the other commands, none is ignored."""

import json
import warnings
from pathlib import Path

import fasa_edge
from fasa_edge.bench import BenchRow, OpRow, PromptOpRow, measure, measure_ops, measure_prompt_ops
from fasa_edge.bench.geometry import Geometry, Heads
from fasa_edge.cli import main
from fasa_edge.convert import FileReport, inspect
from fasa_edge.convert import convert as convert_model
from fasa_edge.errors import FasaError
from fasa_edge.eval import Evaluation, evaluate
from fasa_edge.runtime.capi import cache_type
from fasa_edge.runtime.doctor import Installation, examine

import click
import llama_cpp
import pytest
from click.testing import CliRunner
from tiny_models import make_model
from unchecked import convert

GEOMETRY = Geometry("llama", 2, 256, 512, Heads(4, 2, 64), 300, 1e4, True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    return convert(make_model(folder / "plain.gguf"), folder / "fasa.gguf", tokens=512).path


def run(*arguments: object, code: int = 0) -> click.testing.Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


# Functions


@pytest.mark.check
def test_measure(model: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    few = {"depths": [0, 100], "n_gen": 2, "n_repetitions": 1, "n_threads": 1, "verbose": False}
    with pytest.warns(UserWarning, match="FASA ran dense at depth 100, below its min_ctx"):
        rows = measure(model, **few, progress=lambda *step: steps.append(step))
    assert {type(row) for row in rows} == {BenchRow} and steps[-1][0] == steps[-1][1]
    assert [(row.n_depth, row.method) for row in rows] == [
        (depth, method) for depth in (0, 100) for method in ("dense", "dense", "exact", "fasa")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        random = measure(geometry=GEOMETRY, n_layers=1, weight_type="f16", type_k=cache_type("q8_0"), **few)
    assert {row.model_filename for row in random} == {"llama-1L-f16.gguf"} and random[0].type_k == "q8_0"
    assert {row.fill for row in random} == {"random"}
    read = measure(model, n_prompts=[8], **few | {"n_gen": 0, "depths": [50]})
    assert [(row.test, row.fill, row.n_threads) for row in read] == 4 * [("pp8 @ d50", "random", 1)]
    for wrong, message in (
        ({}, "either a model or a geometry"),
        ({"model": model, "geometry": GEOMETRY}, "either a model or a geometry"),
        ({"model": model, "n_layers": 1}, "are of a geometry"),
        ({"geometry": GEOMETRY, "fasa_profile": model}, "goes with a model"),
        ({"model": model, "depths": [-1]}, "depth -1: choose 0 or more"),
        ({"geometry": "none"}, "geometry none is unknown"),
    ):
        with pytest.raises(FasaError, match=message):
            measure(**wrong)


def test_measure_ops() -> None:
    few = {"depths": [300], "budgets": [40], "n_repetitions": 1, "n_threads": 1, "n_layers": 1}
    rows = measure_ops(["4/2x64", Heads(2, 2, 32)], **few)
    assert {type(row) for row in rows} == {OpRow}
    with pytest.raises(FasaError, match="at least 1 of each"):
        measure_ops(["4/2x64"], depths=[])
    assert [(row.heads, row.op) for row in rows][::5] == [("4/2x64", "flash_attn_ext"), ("2/2x32", "flash_attn_ext")]


def test_measure_prompt_ops() -> None:
    few = {"depths": [300], "n_repetitions": 1, "n_threads": 1}
    rows = measure_prompt_ops(["4/2x64", Heads(2, 2, 32)], [20], **few)
    assert {type(row) for row in rows} == {PromptOpRow}
    assert [(row.heads, row.op) for row in rows][::3] == [("4/2x64", "flash_attn_ext"), ("2/2x32", "flash_attn_ext")]
    with pytest.raises(FasaError, match="at least 1 of each"):
        measure_prompt_ops(["4/2x64"], [])
    with pytest.raises(FasaError, match="20 tokens of a prompt do not fit 16 cells"):
        measure_prompt_ops(["4/2x64"], [20], depths=[16])


@pytest.mark.check
def test_evaluate(model: Path, tmp_path: Path) -> None:
    few = {"prefixes": [200], "n_blocks": 1, "n_tokens": 8, "budgets": [64], "n_threads": 1}
    found = evaluate(model, **few, settings={"n_sink": 0, "n_dense_layers": 0}, resume=tmp_path / "r.jsonl")
    assert isinstance(found, Evaluation) and found.answers == found.by_depth == []
    assert [row.method for row in found.text] == ["dense", "noise", "fasa"] and found.settings["n_dense_layers"] == 0
    args = ("--prefix", 200, "--blocks", 1, "--n-tokens", 8, "--budgets", 64, "-t", 1, "--set", "n_sink=0")
    args += ("--set", "n_dense_layers=0", "--resume", tmp_path / "r.jsonl")
    n_bytes = (tmp_path / "r.jsonl").stat().st_size
    again = json.loads(run("eval", model, *args, "--json").stdout)
    assert (found.n_read, again["n_read"]) == (200, 0)
    assert again | {"n_read": 200} == json.loads(json.dumps(found.as_dict()))
    assert (tmp_path / "r.jsonl").stat().st_size == n_bytes
    with pytest.raises(FasaError, match="jsonl and a file of prompts .* go together"):
        evaluate(model, tasks=["jsonl"])
    for nothing in ({"tasks": []}, {"prefixes": []}, {"tasks": ["passkey"], "lengths": []}):
        with pytest.raises(FasaError, match="nothing to measure"):
            evaluate(model, **nothing)
    with pytest.raises(FasaError, match="task 'x' is unknown"):
        evaluate(model, tasks=["x"])


def test_eval_keeps_what_it_reads(model: Path, tmp_path: Path) -> None:
    args = ("eval", model, "--prefix", 300, "--blocks", 1, "--n-tokens", 8, "-t", 1, "--json")
    found = [run(*args, "--budgets", budget, "--cache", tmp_path / "store") for budget in (64, 64, 128)]
    for result, n_restored in zip(found, (0, 300, 300), strict=True):
        assert f"{n_restored} of 300 tokens of prefixes from the cache" in result.stderr
        assert json.loads(result.stdout)["n_restored"] == n_restored
    figures = [json.loads(result.stdout)["text"] for result in found]
    assert figures[0] == figures[1] and figures[2] == json.loads(run(*args, "--budgets", 128).stdout)["text"]
    assert "--cache-size has no effect with no --cache" in run(*args, "--cache-size", 1, code=2).stderr


@pytest.mark.check
def test_inspect_and_examine(model: Path) -> None:
    assert isinstance(inspect(model), FileReport)
    report = examine()
    assert isinstance(report, Installation)
    assert json.loads(run("doctor", "--json").stdout) == json.loads(json.dumps(vars(report)))


def test_convert_runs_the_model_as_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both for the calibration and for the check."""
    given: list[dict] = []
    init = llama_cpp.Llama.__init__

    def noting(self, *args, **kwargs) -> None:
        given.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(llama_cpp.Llama, "__init__", noting)
    source = make_model(tmp_path / "plain.gguf")
    run("convert", source, "-o", tmp_path / "copy.gguf", "--tokens", 512, "-t", 1, "-ngl", 1, "--json")
    convert_model(source, tmp_path / "again.gguf", tokens=512, n_threads=1, n_gpu_layers=1)
    assert len(given) >= 4
    for kwargs in given:
        assert (kwargs["n_threads"], kwargs["n_threads_batch"], kwargs["n_gpu_layers"]) == (1, 1, 1)
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


# Options


@pytest.mark.check
def test_commands_are_listed_in_the_order_of_use() -> None:
    lines = run("--help").stdout.partition("Commands:")[2].splitlines()
    names = [line.split()[0] for line in lines if line[2:3].strip()]
    assert names == ["convert", "inspect", "run", "chat", "serve", "bench", "eval", "doctor", "llama"]


@pytest.mark.check
def test_an_option_means_one_thing() -> None:
    """By its short name."""
    meanings: dict[str, set[tuple]] = {}
    for command in main.commands.values():
        for option in command.params:
            for name in option.opts if isinstance(option, click.Option) else ():
                if name.count("-") == 1 or not name.startswith("--"):
                    longest = max(option.opts, key=len)
                    meanings.setdefault(name, set()).add((longest, type(option.type).__name__))
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {
        # as in llama-cli and llama-bench
        "-n": {("--n-predict", "IntRange"), ("--n-gen", "IntRange")},
        "-p": {("--prompt", "StringParamType"), ("--n-prompt", "List")},
    }
    assert meanings["-f"] == {("--file", "TextFile")} and meanings["-o"] == {("--output", "Path")}


@pytest.mark.parametrize(
    ("option", "args"),
    [
        *((option, ("bench", "--op", "--geometry", "4/2x64", *option)) for option in (
            ("-n", 4), ("--fill", "random"), ("--type", "f16"), ("-c", 512), ("--exact",), ("-v",),
            ("--override-kv", "fasa.n_sink=int:1"), ("--rope-freq-base", 1e6), ("--rope-scaling", "yarn"),
        )),
        *((option, ("bench", "MODEL", *option)) for option in (("--layers", 1), ("--type", "f16"))),
        (("--profile",), ("bench", "--geometry", "smollm2-135m", "--profile", "MODEL")),
        *((option, ("eval", "MODEL", "--task", "passkey", *option)) for option in (
            ("--prefix", 9), ("--blocks", 1), ("--n-tokens", 9), ("--batch", 1)
        )),
        *((option, ("eval", "MODEL", *option)) for option in (
            ("--lengths", 9), ("--depths", 0), ("--seed", 1), ("--seeds", 1), ("--teacher-forced",),
            ("--only-if-dense",),
        )),
        *((option, ("eval", "MODEL", "--task", "jsonl", "--file", "MODEL", *option)) for option in (
            ("--lengths", 9), ("--depths", 0), ("--seed", 2), ("--seeds", 2), ("--text", "MODEL"),
        )),
        (("--depths",), ("eval", "MODEL", "--task", "fwe", "--depths", 0)),
        *((option, ("eval", "MODEL", "--methods", "dense", *option)) for option in (
            ("--budgets", 9), ("--n-tip", 9), ("--set", "n_sink=1"),
        )),
        (("--top-k",), ("convert", "MODEL", "--top-k", 9)),
        (("--budget",), ("run", "MODEL", "--dense", "--budget", 9, "-p", "x")),
        (("--budget",), ("chat", "MODEL", "--dense", "--budget", 9)),
    ],
)  # fmt: skip
def test_options_that_are_ignored_are_refused(model: Path, option: tuple, args: tuple) -> None:
    error = " ".join(run(*(model if arg == "MODEL" else arg for arg in args), code=2).stderr.split())
    assert option[0] in error and "has no effect with" in error and "leave it out" in error


def test_a_result_goes_into_a_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    args = ("bench", "--op", "--geometry", "4/2x64", "-d", 300, "--budget", 40, "-r", 1, "--layers", 1, "-t", 1)
    assert run(*args, "--json", "-o", out).stdout == "" and len(json.loads(out.read_text())) == 5
    assert f"{out} exists" in run(*args, "-o", out, code=1).stderr
    run(*args, "-o", out, "--force")
    assert out.read_text().startswith("| op")
    for name in ("json", "md"):
        assert "it names a file" in run(*args, "-o", name, code=2).stderr
    assert "is the input" in run("eval", model, "-o", model, "--force", code=1).stderr


def test_measuring_prints_nothing(capfd: pytest.CaptureFixture) -> None:
    rows = measure(geometry=GEOMETRY, depths=[0], n_gen=1, n_repetitions=1)
    assert rows and capfd.readouterr() == ("", "")


def test_a_result_that_cannot_be_written_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FasaError("no space left on device")

    monkeypatch.setattr("fasa_edge.cli.common.write_bytes", fail)
    args = ("bench", "--op", "--geometry", "2/1x64", "-d", 256, "-r", 1, "--layers", 1, "-o", tmp_path / "ops.txt")
    done = run(*args, code=1)
    assert "fasa_select" in done.stdout and "no space left" in done.stderr


def test_run_says_where_the_context_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, smile = make_model(tmp_path / "tiny.gguf"), "🙂".encode()
    monkeypatch.setattr(fasa_edge.Llama, "sample", lambda self, **_: 3 + smile[(self.n_tokens - 220) % len(smile)])
    prompt = "a" * (220 - 2)  # and what begins a text
    arguments = ("run", model, "-c", 256, "-p", prompt, "-n")
    result = run(*arguments, 256 - 220)
    assert result.stdout == "🙂" * 9 + "\n" and "context of 256" not in result.stderr
    result = run(*arguments, 256 - 221)
    assert result.stdout == "🙂" * 9 + "\n" and "context of 256" not in result.stderr  # the last one was finished
    monkeypatch.setattr(fasa_edge.Llama, "sample", lambda self, **_: 3 + smile[(self.n_tokens - 219) % len(smile)])
    result = run(*arguments, 256 - 220)
    assert "the text ends where the context of 256 tokens does, within a character" in result.stderr
    assert json.loads(run(*arguments, 256 - 220, "--json").stdout)["context_full"]
