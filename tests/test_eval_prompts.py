"""The tasks of `fasa-edge eval`: prompts that fit, hide what they ask for where they say, and know the right answer."""

import itertools
import json
import os.path
import re
from collections import Counter

import fasa_edge  # noqa: F401, before llama_cpp
from fasa_edge.errors import EvalError
from fasa_edge.eval.jsonl import read_jsonl
from fasa_edge.eval.prompt import Prompt
from fasa_edge.eval.tasks import GROUPS, TASKS, expand
from fasa_edge.io.text import read_text

import llama_cpp
import pytest

pytestmark = pytest.mark.check

TEXT = read_text()[1]
WITH_DEPTH = [name for name, task in TASKS.items() if task.has_depth]
NEEDLES = [name for name in WITH_DEPTH if name != "passage_retrieval"]
PIECE = {"passkey": 10, "vt": 30, "fwe": 10, "cwe": 15, "passage_count": 110, "passage_retrieval": 110}  # bytes / 4


def count_bytes(text: str) -> int:
    return -(-len(text.encode()) // 4)


def make(name: str, length: int = 1500, depth: float | None = None, seed: int = 0, **options) -> Prompt:
    return TASKS[name].make(length, depth, seed, **{"text": TEXT, "count_tokens": count_bytes, **options})


def size(prompt: Prompt, count_tokens) -> int:
    return sum(map(count_tokens, (prompt.context, prompt.question, prompt.answer_prefix))) + prompt.n_predict


@pytest.fixture(scope="module")
def count_model(model_path):
    llm = llama_cpp.Llama(str(model_path), vocab_only=True, verbose=False)
    yield lambda text: len(llm.tokenize(text.encode(), add_bos=False))
    llm.close()


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_fills_its_length(name, count_model):
    for length, seed in [(600, 0), (1024, 1), (5000, 2)]:
        prompt = make(name, length, seed=seed)
        missing = length - size(prompt, count_bytes)
        assert 0 <= missing <= length // 50 + PIECE.get(name, 65)
        assert prompt.tags["length"] == length and prompt.tags["seed"] == seed
    counted = []
    prompt = make(name, 2000, count_tokens=lambda text: counted.append(text) or count_model(text))
    assert 1800 < size(prompt, count_model) <= 2000
    assert sum(map(len, counted)) < 12 * len(prompt.context)


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_is_a_function_of_its_arguments(name):
    depth = 0.25 if TASKS[name].has_depth else None
    assert make(name, depth=depth, seed=3) == make(name, depth=depth, seed=3)
    assert make(name, depth=depth, seed=3).references != make(name, depth=depth, seed=4).references


@pytest.mark.parametrize("name", GROUPS["ruler"])
def test_only_the_context_holds_the_answer(name):
    prompt = make(name)
    asked = prompt.question + prompt.answer_prefix
    assert all(reference in prompt.context and reference not in asked for reference in prompt.references)
    assert prompt.question not in prompt.context and prompt.answer_prefix == prompt.answer_prefix.rstrip()
    assert prompt.score(", ".join(prompt.references)) == 1 and prompt.score("none") == 0
    assert len(set(prompt.references)) == len(prompt.references)


@pytest.mark.parametrize("name", NEEDLES)
def test_a_needle_moves_through_the_same_filler(name):
    prompts = {depth: make(name, 3000, depth, seed=7) for depth in (0, 0.3, 0.5, 1)}
    for depth, prompt in prompts.items():
        (key,) = prompt.references
        assert prompt.context.index(key) / len(prompt.context) == pytest.approx(depth, abs=0.06)
        assert prompt.tags["depth"] == depth
    assert len({(prompt.question, prompt.references) for prompt in prompts.values()}) == 1
    needle = re.match(r"(The pass key.*?pass key\.|One of .*?\.) ", prompts[0].context)[1]
    assert len({prompt.context.replace(needle, "").replace("  ", " ").strip() for prompt in prompts.values()}) == 1
    for (low, a), (_, b) in itertools.combinations(prompts.items(), 2):
        shared = len(os.path.commonprefix([a.context, b.context]))
        assert shared / len(a.context) == pytest.approx(low, abs=0.06)


def test_the_pass_keys_of_all_seeds_share_their_noise():
    contexts = {make("passkey", 3000, 1, seed).context for seed in range(5)}
    assert len(contexts) == 5 and len({re.sub(r"\d+", "", context) for context in contexts}) == 1


@pytest.mark.parametrize(
    "name, n_values, n_wanted", [("niah_multikey", 4, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)]
)
def test_numbers_and_their_keys(name, n_values, n_wanted):
    prompt = make(name)
    found = re.findall(r"special magic numbers for (\S+) is: (\d{7})\.", prompt.context)
    asked = re.findall(r"[a-z]+-[a-z]+", prompt.question)
    assert len(found) == n_values and len(prompt.references) == n_wanted
    assert {value for key, value in found if key in asked} == set(prompt.references)
    assert all(key in prompt.answer_prefix for key in asked)


def test_variables():
    prompt = make("vt")
    values = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt.context):
        values[name] = values.get(source, source)
    (value,) = set(values.values())
    assert set(values) == set(prompt.references) and f"value {value} in" in prompt.question


@pytest.mark.parametrize("length, times", [(2000, (6, 1)), (5000, (30, 3))])
def test_common_words(length, times):
    prompt = make("cwe", length)
    listed = Counter(re.findall(r"\d+\. (\w+)", prompt.context))
    assert {word for word, n in listed.items() if n == times[0]} == set(prompt.references)
    assert set(listed.values()) == set(times) and len(prompt.references) == 10


def test_frequent_words():
    prompt = make("fwe")
    ranked = Counter(prompt.context.split()).most_common(5)
    assert [word for word, _ in ranked[:4]] == ["...", *prompt.references]
    assert ranked[3][1] > ranked[4][1]


def passages(prompt: Prompt) -> list[str]:
    numbered = re.findall(r"^Paragraph (\d+): (.+)$", prompt.context, re.MULTILINE)
    assert [int(i) for i, _ in numbered] == list(range(1, len(numbered) + 1))
    return [passage for _, passage in numbered]


@pytest.mark.parametrize("seed", range(3))
def test_passage_count(seed):
    prompt = make("passage_count", 4000, seed=seed)
    found = passages(prompt)
    assert 1 < len(set(found)) < len(found)
    assert prompt.references == (str(len(set(found))),)


def test_passage_retrieval():
    prompts = [make("passage_retrieval", 4000, depth) for depth in (0, 0.5, 1)]
    found = passages(prompts[0])
    assert len({prompt.context for prompt in prompts}) == 1 and len(found) > 20
    for prompt, i in zip(prompts, (1, round((len(found) - 1) / 2) + 1, len(found)), strict=True):
        excerpt = re.search(r'"(.+)"\n\nPlease', prompt.question)[1]
        assert [i for i, passage in enumerate(found, 1) if excerpt in passage] == [i]
        assert prompt.references == (str(i),) and prompt.score(f" {i}.") == 1 and prompt.score(f" {i}0") == 0


@pytest.mark.parametrize(
    "match, answer, score",
    [
        ("all", "ONE, then two", 1),
        ("all", "two", 0.5),
        ("any", "two", 1),
        ("any", "three", 0),
        ("number", " 12. Or 3", 1),
        ("number", "3, not 12", 0),
        ("number", "none", 0),
    ],
)
def test_scores(match, answer, score):
    references = ("12",) if match == "number" else ("one", "Two")
    assert Prompt("", "", "", references, match).score(answer) == score


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_is_refused(name):
    for length in (1, 20):
        with pytest.raises(EvalError, match="choose a larger length"):
            make(name, length)


def test_a_short_text_is_repeated_where_that_does_not_change_the_answer():
    prompt = make("niah_single", text="All of it. Again and again.")
    assert prompt.context.count("Again and again.") > 50 and prompt.context.count(prompt.references[0]) == 1


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("niah_single", {"text": " \n"}, "the text for the filler is empty: give one"),
        ("cwe", {"text": "a few other terms here"}, "3 different words .* too few for 1500 tokens: give a longer text"),
        ("passage_count", {"text": TEXT[:3000]}, "too few paragraphs for 1500 tokens .*: give a longer text"),
        ("passage_retrieval", {"text": "short"}, "too few paragraphs for 1500 tokens .*: give a longer text"),
        ("passkey", {"depth": 1.5}, r"depth = 1.5 is out of range: choose 0 .* to 1"),
        ("vt", {"depth": 0.5}, r"depth = 0.5: .* takes no depth"),
    ],
)
def test_what_a_task_refuses(name, options, message):
    with pytest.raises(EvalError, match=message):
        make(name, **options)


def test_groups():
    assert expand(["passkey", "ruler"]) == list(GROUPS["ruler"])
    assert set(expand(["longbench-synthetic", "ruler"])) == set(TASKS)
    with pytest.raises(EvalError, match="qa is no task: choose from passkey, .*, longbench-synthetic"):
        expand(["qa"])


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


@pytest.mark.parametrize(
    "line, fields",
    [
        (
            {"references": ["a"], "context": "c", "question": "q", "answer_prefix": "p ", "match": "any"},
            ("c", "q", "p", ("a",), "any", 32),
        ),
        ({"references": ["a", "b"]}, ("", "", "", ("a", "b"), "all", 32)),
        (
            {"context": "c", "input": "q?", "answers": ["a", "b"], "dataset": "qasper", "length": 1},
            ("c", "\n\nq?", "\nAnswer:", ("a", "b"), "any", 64),
        ),
        (
            {"index": 0, "input": "c\nc\nWhat?", "outputs": ["a", "b"], "answer_prefix": " They are: "},
            ("c\nc", "\nWhat?", " They are:", ("a", "b"), "all", 128),
        ),
        ({"input": "c\nq\n", "outputs": ["a"], "match": "any"}, ("c", "\nq", "", ("a",), "any", 128)),
        *[
            (
                {key: "c", "answer": answer, "n_predict": 9},
                ("c", r"\boxed{}", "", (r"\boxed{033}", r"\boxed{33}")[-n:], "any", 9),
            )
            for key, answer, n in [("problem", "033", 2), ("question", 33, 1), ("prompt", " 33", 1)]
        ],
    ],
)
def test_jsonl_formats(line, fields, tmp_path):
    (prompt,) = read_jsonl(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf", line, b" \r"))
    context, question, answer_prefix, references, match, n_predict = fields
    if "answer" in line:
        assert question in prompt.question
        question = prompt.question
    assert prompt == Prompt(context, question, answer_prefix, references, match, n_predict, {"line": 2})


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", r"no JSON \(.*\): give one object a line"),
        (b"[" * 100_000, r"no JSON \(.*\): give one object a line"),
        (b'["a"]', "a JSON list: give one object a line"),
        (b'{"references": ["\xe4"]}', "byte 0xe4 at offset 17 is not UTF-8: save the file as UTF-8"),
        (b'{"references": ["\\ud800"]}', "references holds half of a surrogate pair at character 0: remove it"),
        ({"context": "c"}, "none of the keys references, outputs, answers, answer is there"),
        ({"references": []}, r"references = \[\]: give a list of at least one string"),
        ({"references": "a"}, "references = 'a': give a list of at least one string"),
        ({"references": ["a", " "]}, "references holds an empty string, .*: remove it"),
        ({"references": [1]}, "references holds 1, a int: give a string"),
        ({"references": ["a"], "context": 3}, "context holds 3, a int: give a string"),
        ({"references": ["a"], "match": "none"}, "match = 'none': choose from all, any, number"),
        ({"references": ["a"], "n_predict": 0}, "n_predict = 0: give a whole number of tokens from 1 on"),
        ({"answers": ["a"], "input": "q"}, "key context is missing"),
        ({"outputs": ["a"]}, "key input is missing"),
        ({"outputs": ["a"], "input": "one line"}, "input is a single line: put the question on the last line"),
        ({"answer": "1"}, "answer without a question: add one of the keys problem, question, prompt"),
        ({"answer": "", "problem": "p"}, "answer is empty"),
        ({"answer": "1", "question": "q", "context": "c"}, "answer beside context: .* references, a list"),
    ],
)
def test_jsonl_errors(line, message, tmp_path):
    with pytest.raises(EvalError, match=r"a\.jsonl, line 3: " + message):
        read_jsonl(write(tmp_path / "a.jsonl", {"references": ["a"]}, b"", line))


def test_jsonl_without_prompts(tmp_path):
    with pytest.raises(EvalError, match="none.jsonl cannot be read: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(EvalError, match="holds no prompt: give it a JSON object a line"):
        read_jsonl(write(tmp_path / "empty.jsonl", b"\n"))
