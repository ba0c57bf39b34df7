"""`fasa-edge eval`: what it measures, runs, keeps and draws."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from fasa_edge.errors import FasaError, SchemaError
from fasa_edge.eval import answers, text
from fasa_edge.eval.methods import DENSE, METHODS, OBSERVERS, Method, expand
from fasa_edge.eval.prompt import Prompt
from fasa_edge.eval.results import Results, identity
from fasa_edge.eval.runner import Runner
from fasa_edge.io.split import model_files
from fasa_edge.io.text import read_text
from fasa_edge.runtime import capi
from fasa_edge.runtime.capi_eval import policies
from fasa_edge.runtime.library import lib_dir, llama_cpp

import numpy as np
import pytest
from runtime import SAME, TEXTS, TINY_BUDGET, annotated_tiny, check, kl_divergence
from test_cli import fasa
from tiny_models import make_model

N_PREFIX, N_TOKENS = 400, 16
TINY = ("--budgets", TINY_BUDGET, "-t", 1)
PREFIX, NEXT = TEXTS[0][:N_PREFIX], TEXTS[0][N_PREFIX : N_PREFIX + N_TOKENS]
FASA = Method("fasa", TINY_BUDGET)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_runner(tiny: Path):
    with Runner(str(tiny), 1024, n_threads=2, n_batch=100) as opened:  # in which prefixes are shared
        yield opened


@pytest.fixture(scope="module")
def real_runner(fasa_model_path: Path):
    with Runner(str(fasa_model_path), 600, n_threads=2, n_batch=64) as opened:
        yield opened


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of llama_decode had."""
    counts: list[int] = []
    decode = llama_cpp.llama_decode

    def counting(ctx, batch):
        counts.append(batch.n_tokens)
        return decode(ctx, batch)

    monkeypatch.setattr(llama_cpp, "llama_decode", counting)
    return counts


@pytest.mark.check
def test_methods() -> None:
    methods = expand(["noise", "fasa", "all", "oracle", "fasa"], [64, 32], [8, 12], {"n_sink": 0})
    more = (("n_sink", 0),)
    assert methods == [
        DENSE,
        Method("noise"),
        *(Method("fasa", budget, n_tip, more) for n_tip in (8, 12) for budget in (64, 32)),
        *(Method("all", None, n_tip, more) for n_tip in (8, 12)),
        *(Method("oracle", budget, None, more) for budget in (64, 32)),
    ]
    assert [method.sparse for method in methods] == [False] * 2 + [True] * 8
    assert [method.label for method in methods[1:3]] == ["noise", "fasa, n_tip 8, n_sink 0"]
    for error, args in {
        "method 'fassa' is unknown": (["fassa"], [64]),
        "budget 0: choose 1 or more": (["fasa"], [64, 0]),
        "n_tip -1": (["fasa"], [64], [-1]),
    }.items():
        with pytest.raises(FasaError, match=error):
            expand(*args)


def test_measures_of_a_text(real_runner: Runner) -> None:
    tokens = real_runner.llm.tokenize(read_text()[1][200_000:240_000].encode(), add_bos=False)
    blocks = text.blocks_of("topics", tokens, [512], 2, 16)
    methods = expand(["noise", "all", "fasa"], [40, 256])
    cells = list(text.run(real_runner, blocks, methods, 16))
    assert [(cell.block, cell.method) for cell in cells] == [(block, method) for block in blocks for method in methods]
    dense, noise, every, tiny_budget, budget = text.summarize(cells)
    assert [row.kept for row in (dense, noise, tiny_budget, budget)] == [None, None, 40, 256]
    assert dense.kl == 0 and dense.top1 == dense.ppl_ratio == 1 and 2 < dense.ppl < 100
    assert 0 < noise.kl < 0.02 and every.kl < 3 * noise.kl and noise.kl < tiny_budget.kl
    assert budget.kl < tiny_budget.kl / 2 and budget.kl < budget.kl_p99 and 0 < budget.kl_stderr < budget.kl
    assert (dense.n_prefix, dense.n_blocks, dense.n_tokens) == (512, 2, 32)

    nll = np.concatenate([cell.nll for cell in cells if cell.method == DENSE])
    assert dense.ppl == pytest.approx(np.exp(nll.mean()))
    real_runner.prefill(blocks[0].tokens[:512])
    one_by_one, at_once = (real_runner.decode(blocks[0].tokens[512:-1], methods[-1], batch).logits for batch in (1, 16))
    assert kl_divergence(one_by_one, at_once) < 0.02
    logits = real_runner.decode(blocks[0].tokens[512:-1], DENSE, 16).logits
    assert cells[0].nll[3] == pytest.approx(-text.log_softmax(logits)[3, blocks[0].tokens[512 + 4]], abs=1e-5)
    assert cells[4].kl.mean() == pytest.approx(kl_divergence(logits, at_once), rel=1e-4)


@pytest.mark.check
def test_blocks() -> None:
    blocks = text.blocks_of("a", list(range(100)), [10, 20], 3, 5, bos=7)
    starts = [(10, 0), (10, 42), (10, 85), (20, 0), (20, 37), (20, 75)]
    assert [(block.n_prefix, block.start) for block in blocks] == starts
    assert blocks[2].tokens == (7, *range(85, 100)) and len(blocks[-1].tokens) == 26
    with pytest.raises(FasaError, match="a has 100 tokens, and a prefix of 100 with 5 after it takes 106"):
        text.blocks_of("a", list(range(100)), [10, 100], 3, 5)
    starts = [block.start for block in text.blocks_of("a", list(range(100)), [10], 17, 5)]
    assert min(np.diff(starts)) == 5
    with pytest.raises(FasaError, match="18 blocks of the text a, .* decode tokens twice: lower --blocks to 17"):
        text.blocks_of("a", list(range(100)), [10], 18, 5)


@pytest.mark.check
def test_the_prefix_is_shared(tiny: Path, tiny_runner: Runner, fed: list[int]) -> None:
    """With a method of other chunks, in a context of its own, and with the prefix before."""
    tiny_runner.prefill(TEXTS[1][:500])
    tiny_runner.prefill([*PREFIX[:300], *TEXTS[1][:50]])
    fed.clear()
    tiny_runner.prefill(PREFIX)
    assert sum(fed) == N_PREFIX - 300
    other = replace(FASA, n_tip=6)
    found = {method: tiny_runner.decode(NEXT, method).logits for method in (FASA, other, DENSE)}
    for method in (DENSE, other, FASA):  # whatever ran before
        check(found[method], tiny_runner.decode(NEXT, method).logits)
    assert sum(fed) == N_PREFIX - 300 + 6 * N_TOKENS and tiny_runner.tokens == PREFIX
    for method, n_tip in ((FASA, None), (other, 6)):
        with Runner(str(tiny), 1024, n_threads=2, fasa_n_tip=n_tip) as direct:
            direct.prefill(PREFIX)
            check(direct.decode(NEXT, method).logits, found[method])
    assert kl_divergence(found[FASA], found[other]) > 100 * SAME
    tiny_runner.prefill(TEXTS[1][:500])  # the other context gets this prefix, too
    assert kl_divergence(tiny_runner.decode(NEXT, other).logits, found[other]) > 100 * SAME


def test_a_prefix_that_is_read_by_blocks(tiny: Path, tiny_runner: Runner, fed: list[int]) -> None:
    """Once for each mass, in a context of its own; decoding is dense."""
    assert [m.label for m in expand(["prompt"], [], prompt_masses=[990, 500])[1:]] == [
        "prompt, prompt_mass 990",
        "prompt, prompt_mass 500",
    ]
    with pytest.raises(SchemaError, match="prompt_mass = 0 is out of range: choose 1 to 1000"):
        expand(["prompt"], [], prompt_masses=[0])
    tiny_runner.prefill(PREFIX)
    found = {}
    for mass, n_read in ((1, N_PREFIX), (999, N_PREFIX), (999, 0), (1000, N_PREFIX)):
        fed.clear()
        found[mass] = tiny_runner.decode(NEXT, Method("prompt", settings=(("prompt_mass", mass),)))
        assert sum(fed) == n_read + N_TOKENS
    dense = tiny_runner.decode(NEXT, DENSE).logits
    check(dense, found[1000].logits, 1e-5)
    tiny_runner.prefill(TEXTS[0][:520])  # its end of 8 tokens is of a prompt, too
    tiny_runner.decode(NEXT, Method("prompt", settings=(("prompt_mass", 1000),)))
    check(
        tiny_runner.decode(NEXT, DENSE).logits,
        tiny_runner.decode(NEXT, Method("prompt", settings=(("prompt_mass", 1000),))).logits,
        1e-5,
    )
    tiny_runner.prefill(PREFIX)
    assert kl_divergence(dense, found[1].logits) > 100 * SAME and found[1].kept is None
    with Runner(str(make_model(tiny.with_name("no-profile.gguf"))), 1024) as plain:
        with pytest.raises(FasaError, match="no FASA profile, which prompt take"):
            plain.check(expand(["prompt"], [], prompt_masses=[990]))


@pytest.mark.check
def test_every_policy_is_a_method() -> None:
    assert set(policies()) < METHODS.keys()


@pytest.mark.check
def test_policies(tiny_runner: Runner) -> None:
    """All from one prefix, in any order; each counted by the cells that it attends to."""
    methods = [method for method in expand(policies(), [TINY_BUDGET]) if method.sparse]
    tiny_runner.prefill(TEXTS[1][:200])
    tiny_runner.prefill(PREFIX, observe=True)
    dense = tiny_runner.decode(NEXT, DENSE)
    generated = tiny_runner.generate(NEXT, FASA, 3)
    assert 0 < generated.kept <= TINY_BUDGET and tiny_runner.generate(NEXT, DENSE, 3).kept is None
    found = {method.name: tiny_runner.decode(NEXT, method, mass=True) for method in methods}
    for method in reversed(methods):
        again = tiny_runner.decode(NEXT, method)
        check(found[method.name].logits, again.logits)
        assert again.kept == found[method.name].kept and not again.mass
    assert dense.kept is None and not dense.mass
    for name, steps in found.items():
        assert [layer.shape for layer in steps.mass] == [(N_TOKENS, 4)] * 2
        assert TINY_BUDGET * 0.7 < steps.kept <= TINY_BUDGET + (N_TOKENS if name == "snapkv" else 0)
        assert all((layer > 0).all() and (layer < 1 + 1e-5).all() for layer in steps.mass)
    mass = {name: np.mean(steps.mass) for name, steps in found.items()}
    assert max(mass, key=mass.__getitem__) == "oracle" and mass["fasa"] > mass["streaming"]
    every = tiny_runner.decode(NEXT, Method("all"), mass=True)
    assert every.kept == N_PREFIX + (N_TOKENS + 1) / 2 and np.allclose(every.mass, 1, atol=1e-4)
    heads = tiny_runner.decode(NEXT, replace(FASA, settings=(("select", "head"),)), mass=True)
    assert heads.kept == TINY_BUDGET and np.mean(heads.mass) > mass["fasa"]


def test_the_layer_with_the_fewest_chunks_limits_n_tip(tiny_runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter((12, 8))
    monkeypatch.setattr(capi, "chunk_dims", lambda layer: [None] * next(counts))
    with pytest.raises(FasaError, match="n_tip 10: a head of .* has 8 chunks"):
        tiny_runner.check([replace(FASA, n_tip=10)])


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_needs_an_observed_prefix(tiny_runner: Runner, name: str) -> None:
    tiny_runner.prefill(TEXTS[1][:90])
    tiny_runner.prefill(TEXTS[1][:100])
    for run in (tiny_runner.decode, partial(tiny_runner.generate, n=2)):
        with pytest.raises(FasaError, match=f"{name} .* was not observed: call prefill with observe=True"):
            run(NEXT, method=Method(name, TINY_BUDGET))
    tiny_runner.prefill(TEXTS[1][:100], observe=True)
    with pytest.raises(FasaError, match="leave n_tip to the model"):
        tiny_runner.decode(NEXT, Method(name, TINY_BUDGET, 6))
    tiny_runner.decode(NEXT, Method(name, TINY_BUDGET))


def test_a_memory_that_cannot_be_cut_back(tmp_path: Path) -> None:
    with Runner(str(make_model(tmp_path / "lfm2.gguf", "lfm2")), 1024, n_threads=2) as hybrid:
        hybrid.prefill(TEXTS[1][:100])
        hybrid.prefill(PREFIX)
        wanted = hybrid.decode(NEXT, DENSE).logits
        check(wanted, hybrid.decode(NEXT, DENSE).logits)
        hybrid.prefill([])
        check(wanted, hybrid.decode([*PREFIX, *NEXT], DENSE, batch=512).logits[-N_TOKENS:], 1e-5)


@pytest.mark.check
def test_results_last(tiny_runner: Runner, tmp_path: Path, fed: list[int]) -> None:
    file = tmp_path / "results.jsonl"
    blocks = text.blocks_of("random", TEXTS[2], [200, 100], 1, 8)
    methods = expand(["noise", "fasa"], [TINY_BUDGET])
    key = identity(tiny_runner, [])

    def run(methods, key=key):
        fed.clear()
        return text.summarize(list(text.run(tiny_runner, blocks, methods, 8, results=Results(file), key=key)))

    first = run(methods[:2])
    assert sum(fed) == 200 + 2 * 8 + 8 + 8  # the shorter prefix is part of the longer one
    rows = run(methods)
    assert [row for row in rows if row.method != "fasa"] == first and len(fed) == 1 + 2 * 2
    assert run(methods) == rows and not fed
    assert len(file.read_text().splitlines()) == 6
    with file.open("a") as broken:
        broken.write('{"key": {"fasa')
    with pytest.warns(UserWarning, match="1 damaged line"):
        assert run(methods) == rows and not fed
    with pytest.warns(UserWarning, match="1 damaged line"):
        run(methods, key | {"fingerprint": "another model"})
    assert fed and len(file.read_text().splitlines()) == 13
    lines = [json.loads(line) for line in file.read_text().splitlines()[:6]]
    del lines[1]["value"]["kl"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(run(methods)) == 6 and sum(fed) < 300  # that one alone is measured again
    file.write_text('{"key": {"fa')  # broken off in its first line
    with pytest.warns(UserWarning, match="1 damaged line"):
        Results(file)
    other = tmp_path / "model.gguf"
    other.write_text("GGUF")
    for path in (other, tmp_path):
        with pytest.raises(FasaError, match=str(path)):
            Results(path)
    assert other.read_text() == "GGUF"


@pytest.mark.check
def test_identity(tiny: Path, tmp_path: Path) -> None:
    names = [f"m-{no:05}-of-00002.gguf" for no in (1, 2)]
    for name in names:
        (tmp_path / name).write_text(name)
    overrides = {"fasa.n_sink": 2, "fasa.budget": 64}
    with Runner(str(tiny), 64, n_threads=2, n_threads_batch=1, kv_overrides=overrides, n_gpu_layers=0) as opened:
        key = json.loads(json.dumps(identity(opened, model_files(tmp_path / names[0]))))
        assert key["base"] == opened.settings
    sha256 = lambda content: hashlib.sha256(content).hexdigest()  # noqa: E731
    assert key["files"] == [sha256(name.encode()) for name in names]
    libraries = [sha256(path.read_bytes()) for path in lib_dir().iterdir()]
    assert len(key["library"]) == 4 and set(key["library"]) <= set(libraries)
    assert key["overrides"] == overrides and key["model"]["n_gpu_layers"] == 0
    assert (key["n_threads"], key["n_threads_batch"], key["type_k"]) == (2, 1, "f16")


def test_what_changes_the_model_at_run_time_is_another_identity(tiny: Path) -> None:
    keys = []
    for options in (
        {},
        {"rope_freq_base": 500.0},
        {"rope_scaling_type": 2},
        {"yarn_orig_ctx": 64},
        {"swa_full": False},
    ):
        with Runner(str(tiny), 64, **options) as opened:
            keys.append(json.dumps(identity(opened, []), sort_keys=True))
    assert len(set(keys)) == len(keys)


_LIBRARIES = """
import ctypes, json, sys
from fasa_edge.eval.results import identity
from fasa_edge.eval.runner import Runner
for path in sys.argv[2:]:
    ctypes.CDLL(path)
with Runner(sys.argv[1], 64) as runner:
    print(json.dumps(identity(runner, [])["library"]))
"""


def test_another_backend_of_a_device_is_another_identity(tiny: Path, tmp_path: Path, rpc_lib: Path) -> None:
    """It computes, too; so what was measured with it is not what another one would find."""

    def libraries(*more: Path, **environment: str) -> list[str]:
        command = [sys.executable, "-c", _LIBRARIES, tiny, *more]
        done = subprocess.run(command, check=True, capture_output=True, env=os.environ | environment, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    names = [tmp_path / "libggml-cuda.so", tmp_path / "mine.so"]
    for name in names:
        shutil.copy(rpc_lib, name)
    alone = libraries()
    assert len(alone) == 4 == len(libraries(names[1]))
    sha256 = hashlib.sha256(rpc_lib.read_bytes()).hexdigest()
    for found in (libraries(names[0]), libraries(names[1], GGML_BACKEND_PATH=str(names[1]))):
        assert sorted(found) == sorted([*alone, sha256])
    with names[0].open("ab") as changed:
        changed.write(b"another build")
    assert sorted(libraries(names[0])) != sorted([*alone, sha256])


@pytest.mark.check
def test_the_question_goes_on_after_the_context(tiny: Path) -> None:
    """A SentencePiece vocabulary puts a space before, and may want an end after, what is tokenized by itself."""
    prompt = Prompt("ab", "cd", " e", ("f",))
    with llama_vocabulary(tiny, {"tokenizer.ggml.add_eos_token": True}) as llm:
        whole = llm.tokenize(b"abcd e f")[:-1]
        item = answers.encode("t", prompt, llm)
        assert [*item.context, *item.question, *item.answer] == whole and llm.token_eos() not in whole
        item = answers.encode("t", replace(prompt, context=""), llm)
        assert [*item.context, *item.question] == llm.tokenize(b"cd e")[:-1]


@contextlib.contextmanager
def llama_vocabulary(path: Path, overrides: dict):
    llm = llama_cpp.Llama(str(path), vocab_only=True, kv_overrides={"fasa.version": 0, **overrides}, verbose=False)
    yield llm
    llm.close()


def prompts(n: int) -> list[Prompt]:
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 6
    return [
        Prompt(
            f"{filler}The pass key is {10101 * (i + 1)}. Remember it. {filler}",
            "\nWhat is the pass key?",
            " The pass key is",
            (f"{10101 * (i + 1)}",),
            n_predict=8,
            tags={"length": 350, "depth": 0.5},
        )
        for i in range(n)
    ]


def test_answers(real_runner: Runner, fed: list[int]) -> None:
    right = prompts(2)
    wrong = replace(right[0], references=("99887",))
    several = replace(right[0], references=("10101", "99887"), tags={})
    items = [answers.encode("key", prompt, real_runner.llm) for prompt in (right[1], wrong, right[0])]
    items.append(answers.encode("several", several, real_runner.llm))
    assert [bool(item.answer) for item in items] == [True, True, True, False]
    assert real_runner.llm.detokenize(items[0].answer) == b" 20202"
    methods = expand(["all", "fasa"], [128])

    def run(**options) -> list[answers.AnswerCell]:
        cells = list(answers.run(real_runner, items, methods, **options))
        return sorted(cells, key=lambda cell: [item is cell.item for item in items].index(True))

    generated, forced = run(), run(teacher_forced=True, only_if_dense=True)
    assert sum(n for n in fed if n > 60) < 3 * 350  # contexts are shared
    assert [cell.score for cell in generated] == [1] * 3 + [0] * 3 + [1] * 3 + [0.5] * 3
    assert [(cell.item, cell.method) for cell in generated] == [(item, method) for item in items for method in methods]
    assert all("20202" in cell.answer for cell in generated[:3])
    assert [cell.answer for cell in forced if cell.item.answer] == [None] * 7  # dense alone answers the wrong one
    row = answers.summarize(generated)[2]
    assert (row.task, row.length, row.method, row.n_prompts) == ("key", 350, "fasa", 3)
    assert row.kept == 128
    assert (row.n_answered, row.of_dense) == (2, 1) and row.score == pytest.approx(2 / 3)
    row = answers.summarize(forced, by_depth=True)[2]
    assert (row.depth, row.score, row.n_prompts, row.of_dense) == (0.5, None, 2, 1)


def test_greedy_is_teacher_forced_by_itself(real_runner: Runner) -> None:
    tail = real_runner.llm.tokenize(b"\nQ: What is the capital of France?\nA: The capital of France is", add_bos=False)
    real_runner.prefill(real_runner.llm.tokenize(read_text()[1][:1000].encode()))
    method = Method("fasa", 256)
    found = real_runner.generate(tail, method, 6).tokens
    steps = real_runner.decode([*tail, *found[:-1]], method, batch=1)
    assert steps.logits[len(tail) - 1 :].argmax(axis=-1).tolist() == found and len(found) == 6
    assert real_runner.generate(tail, method, 6, stop=lambda tokens: len(tokens) == 2).tokens == found[:2]


def test_command(fasa_model_path: Path, tmp_path: Path) -> None:
    png, resume = tmp_path / "plot.png", tmp_path / "results.jsonl"
    args = ["eval", fasa_model_path, "--task", "ppl,kld", "--task", "passkey", "--prefix", "300,200", "--blocks", 1]
    args += ["--n-tokens", 8, "--budgets", "64,128", "--lengths", 200, "--depths", "0,1", "-t", 1, "--resume", resume]
    report = json.loads(fasa(*args, "--json", "--plot", png).stdout)
    assert [(row["n_prefix"], row["method"], row["budget"]) for row in report["text"]] == [
        (n_prefix, *method)
        for n_prefix in (300, 200)
        for method in (("dense", None), ("noise", None), ("fasa", 64), ("fasa", 128))
    ]
    assert [row["method"] for row in report["answers"]] == ["dense", "fasa", "fasa"]
    assert len(report["by_depth"]) == 6 and png.read_bytes().startswith(b"\x89PNG")
    assert (report["texts"], report["batch"], report["n_threads"]) == (["pydoc_data.topics"], 16, 1)
    assert report["settings"]["max_batch"] == 16 and report["answers"][1]["kept"] == 64
    n_bytes = resume.stat().st_size
    result = fasa(*args)
    assert resume.stat().st_size == n_bytes
    assert "| prefix   | method   | budget" in result.stdout and "of those that dense answers" in result.stdout
    kl = [line.split("|")[7].split()[0] for line in result.stdout.splitlines()[2:6]]
    assert kl == [f"{row['kl']:.4f}" for row in report["text"][:4]]
    assert "plot.png exists" in fasa(*args, "--plot", png, code=1).stderr


@pytest.mark.parametrize(
    "error, args, code",
    [
        ("method 'nonsense' is unknown: choose from dense", ("--methods", "nonsense"), 1),
        ("task 'nonsense' is unknown: choose from ppl", ("--task", "nonsense"), 1),
        ("topics has .* tokens, and a prefix of 9999999 with 128", ("--prefix", 9999999), 1),
        ("4224 tokens exceed the 4096 that the model was trained for", ("--prefix", 4096), 1),
        ("2176 tokens exceed the context of 1024: give -c 2176, or lower", ("-c", 1024), 1),
        ("budget 999999 exceeds the context", ("--budgets", 999999), 1),
        (r"n_sink \+ n_recent .* exceeds budget = 3", ("--budgets", 3), 1),
        ("n_tip 99: a head of .* has 32 chunks", ("--n-tip", 99), 1),
        ("batch 17: choose 1 to 16", ("--batch", 17), 1),
        ("expected NAME=VALUE with a name of", ("--set", "budget=3"), 2),
        ("'n_sink=²': expected a whole number", ("--set", "n_sink=²"), 2),
        ("'n_sink=--5': expected a whole number", ("--set", "n_sink=--5"), 2),
        ("'exact=1': expected true or false", ("--set", "exact=1"), 2),
        ("n_sink = 4000000000 is out of range", ("--set", "n_sink=4000000000"), 1),
        ("--task jsonl and --file go together", ("--task", "jsonl"), 2),
        ("depth = 2.0 is out of range", ("--task", "passkey", "--depths", 2), 1),
        ("p.png cannot be written", ("--plot", "no folder/p.png"), 1),
    ],
)
def test_errors(tiny: Path, tmp_path: Path, fed: list[int], error: str, args: tuple, code: int) -> None:
    message = " ".join(fasa("eval", tiny, *args, code=code).stderr.split())
    assert re.search(error, message), message
    assert not fed


def test_without_a_profile(tmp_path: Path) -> None:
    model = make_model(tmp_path / "plain.gguf")
    args = ("eval", model, "--prefix", 100, "--blocks", 1, "--n-tokens", 8, "-t", 1)
    assert "has no FASA profile, which fasa take" in fasa(*args, "--budgets", 64, code=1).stderr
    rows = json.loads(fasa(*args, "--methods", "noise", "--json").stdout)["text"]
    assert [row["method"] for row in rows] == ["dense", "noise"] and rows[1]["kept"] is None


def test_a_small_max_batch_and_a_full_context(tiny: Path) -> None:
    """Of a window's tokens the last is only a target."""
    args = ("--prefix", 56, "--blocks", 1, "--n-tokens", 8, "-c", 64, "--override-kv", "fasa.max_batch=int:4")
    args += ("--set", "n_sink=0", "--set", "n_dense_layers=1", "--budgets", 32, "-t", 1)
    report = json.loads(fasa("eval", tiny, *args, "--json").stdout)
    assert report["batch"] == 4 and report["settings"]["n_dense_layers"] == 1
    assert "| fasa, n_dense_layers 1, n_sink 0 |" in fasa("eval", tiny, *args).stdout
