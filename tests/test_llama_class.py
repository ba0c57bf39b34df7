"""What ``fasa_edge.Llama`` inherits: everything works as in ``llama_cpp.Llama``, or says why not.

Saved states, prompt caches and drafts that are partly rejected: test_state.py. Pickling: test_profile.py.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import fasa_edge
from fasa_edge.bench import models
from fasa_edge.errors import AdapterError, FasaError
from fasa_edge.eval.answers import encode
from fasa_edge.eval.methods import DENSE
from fasa_edge.eval.prompt import Prompt
from fasa_edge.eval.runner import Runner
from fasa_edge.runtime import capi
from fasa_edge.runtime.chat import Chat
from fasa_edge.runtime.library import lib_dir, llama_cpp

import gguf
import numpy as np
import pytest
from hub_server import hub_server
from llama_cpp import LlamaGrammar, LogitsProcessorList, llama_chat_format, mtmd_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from runtime import TEXTS, TINY_BUDGET, annotated_tiny, check, last_logits, nmse, teacher_forced
from test_convert_source import environment_of
from tiny_models import Shape, make_model
from unchecked import convert

N_PROMPT = 700
TOKENS = TEXTS[0][: N_PROMPT + 3]
N_LAYER = 2
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
QUESTION = [{"role": "user", "content": "Why? " * 100}]
PROMPT = "<user>" + "Why? " * 100 + "<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"))


def load(path: Path, cls: type[llama_cpp.Llama] = fasa_edge.Llama, **kwargs):
    defaults = {"n_ctx": 2048, "n_threads": 2, "n_threads_batch": 2, "flash_attn": True, "verbose": False}
    return cls(str(path), **defaults | kwargs)


# from_pretrained

_CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")  # huggingface_hub warns of arguments that llama-cpp-python still gives it
import fasa_edge
for arguments in json.loads(sys.argv[1]):
    try:
        llm = fasa_edge.Llama.from_pretrained(**arguments, n_ctx=512, verbose=False)
        print(json.dumps([type(llm).__module__, llm.fasa.settings.get("budget"), llm.model_path]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_from_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "repo"
    (repo / "F32").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=8))
        make_model(tmp_path / "tiny.gguf")
    annotated = convert(tmp_path / "tiny-00001-of-00003.gguf", repo / "F32/a-00001-of-00003.gguf", tokens=512).path
    whole = convert(make_model(tmp_path / "whole.gguf"), repo / "whole.gguf", tokens=512).path
    shards = [f"F32/*-0000{no}-of-00003.gguf" for no in (1, 2, 3)]
    calls = [
        {"filename": shards[0], "additional_files": shards[1:], "fasa_budget": 77},
        {"filename": "whole*", "local_dir": str(tmp_path / "here")},
        {"filename": "none*"},
        {"filename": "whole.gguf", "fasa_budget": 3},
    ]
    with hub_server() as hub:
        hub.repos["user/tiny"] = repo
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps([{"repo_id": "user/tiny", **call} for call in calls])],
            env=environment_of(hub, tmp_path),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    split, local, missing, refused = map(json.loads, done.stdout.splitlines())
    assert split[:2] == ["fasa_edge.runtime.llama", 77] and Path(split[2]).read_bytes() == annotated.read_bytes()
    assert local == ["fasa_edge.runtime.llama", 512, str(tmp_path / "here/whole.gguf")]
    assert Path(local[2]).read_bytes() == whole.read_bytes()
    assert "No file found in user/tiny that match none*" in missing
    assert "do not fit into fasa.budget = 3" in refused


# The cache


@pytest.mark.check
def test_types_of_the_cache(model: Path) -> None:
    sizes = {}
    for type_k, type_v in ((None, None), (llama_cpp.GGML_TYPE_Q8_0, llama_cpp.GGML_TYPE_Q4_0)):
        llm = load(model, type_k=type_k, type_v=type_v)
        dense = teacher_forced(llm, TOKENS, N_PROMPT, enabled=False)
        check(dense, teacher_forced(llm, TOKENS, N_PROMPT, budget=2048), 5e-5)
        assert llm.fasa.stats().n_layers_sparse == 3 * N_LAYER
        sizes[type_k] = llm.save_state().llama_state_size
    assert sizes[llm.context_params.type_k] < 0.5 * sizes[None]


@pytest.mark.check
def test_a_prompt_cache_on_disk(model: Path, tmp_path: Path) -> None:
    texts = []
    for n_prompt, n_cached in ((N_PROMPT, 0), (N_PROMPT + 3, N_PROMPT)):  # the second as another process would
        llm = load(model, n_batch=512)
        llm.set_cache(llama_cpp.LlamaDiskCache(str(tmp_path)))
        texts.append(llm.create_completion(TOKENS[:n_prompt], max_tokens=8, temperature=0)["choices"][0]["text"])
        stats = llm.fasa.stats()
        assert stats.n_steps_prompt == (1 if n_cached else 2)
        assert stats.n_layers_sparse == N_LAYER * stats.n_steps_decode > 0
    fresh = load(model)
    assert fresh.create_completion(TOKENS, max_tokens=8, temperature=0)["choices"][0]["text"] == texts[1]


# Prompts


def first_logits(llm: fasa_edge.Llama, tokens: list[int]) -> np.ndarray:
    """After a prompt, those from which ``generate`` samples its first token: float32 [n_vocab]."""
    seen = []

    def keep(_tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(logits.copy())
        return logits

    next(llm.generate(tokens, temp=0, logits_processor=LogitsProcessorList([keep])))
    return seen[0]


@pytest.mark.check
@pytest.mark.parametrize("n_new", [0, 1, 7], ids=["same", "one token more", "a short question more"])
def test_what_the_cache_lacks_of_a_prompt_is_read_as_a_prompt(model: Path, n_new: int) -> None:
    rows = []
    for enabled in (False, True):  # dense attention of batches of the same sizes, to the bit
        llm = load(model, fasa_enabled=enabled)
        rows.append([first_logits(llm, TOKENS[: N_PROMPT - 7])])
        llm._requires_eval = True  # as after a restored state: even the same prompt is not there whole
        llm.fasa.reset_stats()
        rows[-1].append(first_logits(llm, TOKENS[: N_PROMPT - 7 + n_new]))
    np.testing.assert_array_equal(*rows)
    assert llm.fasa.stats().n_steps_prompt == 1 and llm.fasa.stats().n_layers_sparse == 0
    list(itertools.islice(llm.generate(TOKENS[:N_PROMPT], temp=0), 3))
    assert llm.fasa.stats().n_layers_sparse == 2 * N_LAYER  # the tokens that follow are decoded


@pytest.mark.check
@pytest.mark.parametrize("sizes", [{"n_batch": 8}, {"n_ubatch": 8}, {"n_batch": 16, "n_ubatch": 16}])
def test_small_batches_read_prompts_densely(model: Path, sizes: dict[str, int]) -> None:
    wanted, llm = first_logits(load(model, fasa_enabled=False, **sizes), TOKENS), load(model, **sizes)
    np.testing.assert_array_equal(wanted, first_logits(llm, TOKENS))
    assert llm.fasa.stats().n_steps_decode == 0
    assert llm.fasa.stats().n_steps_prompt == -(-len(TOKENS) // min(sizes.values()))


def test_tokens_of_a_caller_are_decoded(model: Path) -> None:
    """``eval`` and ``generate(reset=False)`` go on from what is there."""
    llm = load(model)
    llm.eval(TOKENS[:N_PROMPT])
    llm.fasa.reset_stats()
    llm.eval(TOKENS[N_PROMPT : N_PROMPT + 2])
    next(llm.generate(TOKENS[N_PROMPT + 2 :], temp=0, reset=False))
    assert llm.fasa.stats().n_layers_sparse == 2 * N_LAYER and llm.fasa.stats().n_steps_prompt == 0


# The context


@pytest.mark.check
@pytest.mark.parametrize("logits_all", [False, True])
@pytest.mark.parametrize(("ending", "n_total"), [("aa", 512), ("é", 512), ("aé", 513)])
def test_all_of_the_context_can_be_used(model: Path, logits_all: bool, ending: str, n_total: int) -> None:
    """A completion ends with a whole character: a second token of it comes after the last cell, and is never read."""
    prompt, text = TOKENS[:290], "a" * 220 + ending
    tokens = [byte + 3 for byte in text.encode()]

    def dictate(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logits)) == tokens[len(ids) - len(prompt)], 0, -np.inf).astype(np.float32)

    llm = load(model, n_ctx=300, logits_all=logits_all)
    assert llm.n_ctx() == 512 == len(llm.input_ids)
    only = LogitsProcessorList([dictate])
    made = llm.create_completion(prompt, max_tokens=None, temperature=0, logits_processor=only)
    assert (made["choices"][0]["text"], made["usage"]["total_tokens"], llm.n_tokens) == (text, n_total, n_total - 1)
    with pytest.raises(ValueError, match="exceed context window of 512"):
        llm.create_completion(TOKENS[:512])
    assert pickle.loads(pickle.dumps(llm)).n_ctx() == 512


def test_text_ends_where_the_context_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a character: the parent goes on to its end, and fails where no cell is left for it."""
    smile = "🙂".encode()
    llm = load(model, n_ctx=256)
    prompt = TEXTS[0][: 256 - 4 * 9 - 1]  # tokens are bytes
    monkeypatch.setattr(
        fasa_edge.Llama, "sample", lambda self, **_: 3 + smile[(self.n_tokens - len(prompt)) % len(smile)]
    )
    for stream in (False, True):
        found = llm.create_completion(prompt, max_tokens=None, stream=stream)
        choices = [chunk["choices"][0] for chunk in (found if stream else [found])]
        assert "".join(choice["text"] for choice in choices) == "🙂" * 9
        assert choices[-1]["finish_reason"] == "length"
        assert llm.is_full and llm.n_tokens == 256
    tokens = list(llm.generate(prompt[:-100]))
    assert len(tokens) == 256 - len(prompt) + 100 + 2 and tokens == [*llm.sampled, llm.token_eos()]
    llm.create_completion(prompt, max_tokens=8)
    assert not llm.is_full
    for error in (fasa_edge.FasaError, RuntimeError):
        with pytest.raises(error, match="257 tokens exceed the context of 256: use fewer, or raise n_ctx"):
            llm.eval(TEXTS[0][: 257 - llm.n_tokens])
        with pytest.raises(error, match="300 tokens exceed"):
            next(llm.generate(TEXTS[1][:300]))


@pytest.mark.parametrize("n_ctx", [-1, 2**31, 2**32 + 512])
def test_a_context_out_of_range_is_refused(model: Path, n_ctx: int) -> None:
    with pytest.raises(fasa_edge.SchemaError, match=f"n_ctx = {n_ctx} is out of range: choose 0"):
        load(model, n_ctx=n_ctx)


def test_a_context_that_the_model_was_trained_for_is_rounded_up(tmp_path: Path) -> None:
    llm = load(make_model(tmp_path / "odd.gguf", shape=Shape(n_ctx=1000)), n_ctx=0)
    assert llm.n_ctx() == 1024 == len(llm.input_ids)


# Copies, and FASA switched off


@pytest.mark.check
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda llm: pickle.loads(pickle.dumps(llm))])
def test_a_copy_has_the_settings_in_force(model: Path, tmp_path: Path, copy_of: Callable) -> None:
    llm = load(model, fasa_budget=100, fasa_n_tip=10)
    llm.fasa.configure(budget=80, n_recent=5)
    llm.fasa.configure(enabled=False, select="head", policy="streaming")
    again = copy_of(copy_of(llm))
    assert again.fasa.settings == llm.fasa.settings != load(model).fasa.settings
    llm.close()
    assert copy_of(llm).fasa.settings == again.fasa.settings
    exact = load(make_model(tmp_path / "plain.gguf"), fasa_exact=True)
    exact.fasa.configure(exact=False)
    again = copy_of(exact)
    assert again.fasa.settings == exact.fasa.settings and not again.fasa.settings["exact"]
    again.fasa.configure(exact=True)


def test_switching_off_is_no_mistake(model: Path, tmp_path: Path) -> None:
    off = {"fasa.version": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load(model, kv_overrides=off).fasa.available
        assert not load(make_model(tmp_path / "plain.gguf"), kv_overrides=off).fasa.available
        assert load(model, kv_overrides=off, fasa_profile=model).fasa.available
        assert load(model, kv_overrides=off, fasa_exact=True).fasa.settings["exact"]
    with pytest.warns(UserWarning, match="^fasa.version = 0 switches FASA off, so fasa.budget has no effect$"):
        load(model, kv_overrides=off, fasa_budget=100)
    with pytest.warns(UserWarning, match="plain.gguf has no FASA profile, so fasa.budget has no effect$"):
        load(tmp_path / "plain.gguf", fasa_budget=100)


# Embeddings

EMBEDDED = [bytes(token - 3 for token in text[:n]).decode() for text in TEXTS for n in (9, 400)]


@pytest.mark.check
@pytest.mark.parametrize("pooling", ["NONE", "MEAN", "LAST"])
def test_embeddings(model: Path, pooling: str) -> None:
    """Whole texts are prompts; those of at most ``max_batch`` tokens decode, but see fewer cells than the budget."""
    kwargs = {"embedding": True, "pooling_type": getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{pooling}")}
    kwargs |= {"n_batch": 2048, "n_ubatch": 2048}
    stock, llm = load(model, llama_cpp.Llama, kv_overrides={"fasa.version": 0}, **kwargs), load(model, **kwargs)
    for texts, layers in ((EMBEDDED, {"prompt": N_LAYER}), (EMBEDDED[::2], {})):
        llm.fasa.reset_stats()
        wanted, found = ([each["embedding"] for each in m.create_embedding(texts)["data"]] for m in (stock, llm))
        assert llm.fasa.stats().n_layers_dense == layers
        for one, other in zip(wanted, found, strict=True):
            check(np.array(one), np.array(other), 0 if layers else 1e-6)  # the same kernels, or ours
        assert nmse(np.array(wanted[0]).ravel()[:256], np.array(wanted[1]).ravel()[:256]) > 1e-3
    with pytest.raises(RuntimeError, match="embedding=True"):
        load(model).create_embedding("text")


# Chat


@pytest.mark.check
@pytest.mark.parametrize("source", ["metadata", "registered format", "handler"])
def test_chat_formats(model: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    formatter = llama_chat_format.Jinja2ChatFormatter(TEMPLATE, eos_token="</s>", bos_token="<s>")
    kwargs = {}
    if source == "metadata":
        plain = make_model(tmp_path / "chat.gguf", tokenizer__chat_template=TEMPLATE)
        model = convert(plain, tmp_path / "chat-fasa.gguf", tokens=512).path
    elif source == "registered format":
        registry = llama_chat_format.LlamaChatCompletionHandlerRegistry()
        monkeypatch.setattr(registry, "_chat_handlers", dict(registry._chat_handlers))
        llama_chat_format.register_chat_format("why")(formatter)
        kwargs = {"chat_format": "why"}
    else:
        kwargs = {"chat_handler": formatter.to_chat_handler()}
    llm = load(model, fasa_min_ctx=1, fasa_budget=TINY_BUDGET, fasa_n_dense_layers=0, **kwargs)
    llm.create_chat_completion(QUESTION, max_tokens=4, temperature=0)
    prompt = llm.tokenize(PROMPT.encode(), add_bos=False, special=True)
    assert llm.input_ids[: len(prompt)].tolist() == prompt and llm.n_tokens > len(prompt)
    stats = llm.fasa.stats()
    assert stats.n_layers_sparse == N_LAYER * stats.n_steps_decode > 0


def test_logprobs(model: Path) -> None:
    llm = load(model, logits_all=True)
    choice = llm.create_completion(TOKENS[:N_PROMPT], max_tokens=4, temperature=0, logprobs=2)["choices"][0]
    assert llm.fasa.stats().n_layers_sparse > 0
    assert [max(top.values()) for top in choice["logprobs"]["top_logprobs"]] == choice["logprobs"]["token_logprobs"]


def test_what_constrains_sampling(model: Path) -> None:
    llm = load(model)
    prompt = TOKENS[:N_PROMPT]

    def text(**kwargs) -> str:
        return llm.create_completion(prompt, max_tokens=8, temperature=0, **kwargs)["choices"][0]["text"]

    assert text(grammar=LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)) in ("yes", "no")
    x = np.eye(llm.n_vocab(), dtype=np.float32)[3 + ord("x")]
    only_x = llama_cpp.LogitsProcessorList([lambda ids, logits: x])
    assert text(logits_processor=only_x) == 8 * "x" and text(logits_processor=only_x, stop=["xx"]) == ""
    three = llama_cpp.StoppingCriteriaList([lambda ids, logits: len(ids) >= N_PROMPT + 3])
    assert text(logits_processor=only_x, stopping_criteria=three) == 3 * "x"
    assert llm.fasa.stats().n_layers_sparse > 0


def test_the_library_of_vision_models_is_ours() -> None:
    assert Path(mtmd_cpp._libmtmd._name).parent == lib_dir()


# LoRA


def make_adapter(path: Path, arch: str = "llama", rank: int = 4) -> Path:
    """A random adapter of the queries and keys of a tiny model."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", rank)
    for il, (name, width) in itertools.product(range(N_LAYER), (("attn_q", 256), ("attn_k", 128))):
        for part, shape in (("lora_a", (rank, 256)), ("lora_b", (width, rank))):
            values = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
            writer.add_tensor(f"blk.{il}.{name}.weight.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.check
def test_lora(model: Path, tmp_path: Path) -> None:
    adapter = str(make_adapter(tmp_path / "adapter.gguf"))
    plain = teacher_forced(load(model), TOKENS, N_PROMPT, enabled=False)
    for scale in (0.5, 1.0):
        llm = load(model, lora_path=adapter, lora_scale=scale)
        dense = teacher_forced(llm, TOKENS, N_PROMPT, enabled=False)
        stock = load(model, llama_cpp.Llama, kv_overrides={"fasa.version": 0}, lora_path=adapter, lora_scale=scale)
        stock.eval(TOKENS[:N_PROMPT])
        assert (last_logits(stock) == dense[0]).all()
        check(dense, teacher_forced(llm, TOKENS, N_PROMPT, budget=2048), 5e-5)
        assert llm.fasa.stats().n_layers_sparse == 3 * N_LAYER
        assert nmse(plain, dense) > 1e-2
        plain = dense  # the scale counts


@pytest.mark.parametrize(
    ("content", "message"), [(None, "adapter.gguf"), (b"GGUF" + bytes(40), "adapter"), ("qwen2", "arch mismatch")]
)
def test_an_adapter_that_does_not_load(model: Path, tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "adapter.gguf"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        make_adapter(path, content)
    with pytest.raises(AdapterError, match=f"Failed to load LoRA adapter: .*; .*{message}"):
        load(model, lora_path=str(path))
    with pytest.raises(RuntimeError):  # as the parent's users expect
        load(model, lora_path=str(path))


def test_an_argument_without_effect_is_named(model: Path) -> None:
    with pytest.warns(UserWarning, match="lora_base has no effect"):
        load(model, lora_base="base.gguf")


# Drafts


def test_prompt_lookup_after_a_prompt_beyond_a_batch(fasa_model_path: Path) -> None:
    plain = load(fasa_model_path, fasa_budget=256, fasa_min_ctx=1)
    line = b"The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
    prompt, n = plain.tokenize(40 * line)[:400], 40
    text = list(itertools.islice(plain.generate(prompt, temp=0), n))
    draft_model = LlamaPromptLookupDecoding(num_pred_tokens=10)
    llm = load(fasa_model_path, fasa_budget=256, fasa_min_ctx=1, n_batch=256, draft_model=draft_model)
    assert list(itertools.islice(llm.generate(prompt, temp=0), n)) == text
    stats = llm.fasa.stats()
    assert stats.n_layers_sparse == 29 * stats.n_steps_decode and 0 < stats.n_steps_decode < n / 4


@pytest.mark.parametrize("n_batch", [512, 8, 1])
def test_drafts_until_the_context_is_full(fasa_model_path: Path, n_batch: int) -> None:
    """Also where a batch holds fewer tokens than are drafted: logits are those of the last batch only."""
    line = b"The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
    draft_model = LlamaPromptLookupDecoding(num_pred_tokens=10)
    settings = {"fasa_max_batch": 1} if n_batch == 8 else {}
    llm = load(fasa_model_path, n_ctx=300, n_batch=n_batch, draft_model=draft_model, **settings)
    prompt = llm.tokenize(40 * line)[:400]
    usage = llm.create_completion(prompt, max_tokens=None, temperature=0)["usage"]
    assert usage["total_tokens"] in (512, 513)  # one more where a character of several tokens begins at the end
    again = pickle.loads(pickle.dumps(llm))
    assert again.draft_model.model.num_pred_tokens == 10 and not hasattr(again.draft_model.model, "model")


def test_kept_logits_count_in_an_automatic_context(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = load(model, n_ctx=1024)
    kinds = capi.memory(probe.ctx)
    kept = sum(kind.context for kind in kinds) + 4 * (1024 + 512) * probe.n_vocab()  # of all cells, and of a batch
    free = sum(kind.model + kind.compute for kind in kinds) + 2 * kept
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free})())
    assert load(model, n_ctx=0, logits_all=True).n_ctx() == 1024
    assert load(model, n_ctx=0, draft_model=LlamaPromptLookupDecoding()).n_ctx() == 1024
    alone = load(model, n_ctx=0).n_ctx()

    def fits(n_ctx: int) -> bool:
        llm = load(model, n_ctx=n_ctx)
        return sum(2 * kind.context + kind.model + kind.compute for kind in capi.memory(llm.ctx)) <= free

    assert alone > 1024 and fits(alone) and not fits(alone + 256)


# The end

_NEED_FASA = {
    "available": lambda fasa: fasa.available,
    "settings": lambda fasa: fasa.settings,
    "configure": lambda fasa: fasa.configure(budget=100),
    "stats": lambda fasa: fasa.stats(),
    "reset_stats": lambda fasa: fasa.reset_stats(),
}
_NEED_MODEL = {
    "n_ctx": lambda llm: llm.n_ctx(),
    "n_vocab": lambda llm: llm.n_vocab(),
    "tokenize": lambda llm: llm.tokenize(b"a"),
    "detokenize": lambda llm: llm.detokenize([70]),
    "tokenizer": lambda llm: llm.tokenizer().encode("a"),
    "eval": lambda llm: llm.eval([70]),
    "completion": lambda llm: llm("a", max_tokens=1),
    "tokens": lambda llm: llm([70], max_tokens=1),
    "generate": lambda llm: next(llm.generate([70])),
    "sample": lambda llm: llm.sample(),
    "embed": lambda llm: llm.embed("a"),
    "save_state": lambda llm: llm.save_state(),
    "ctx": lambda llm: llm.ctx,
    "model": lambda llm: llm.model,
    "chat": lambda llm: list(Chat(llm).ask("a", max_tokens=1, temperature=0, seed=0)),
    "document": lambda llm: Chat(llm, document="a").read(),
    "bench": lambda llm: list(models.run(llm, [0], 1, 1)),
    "encode": lambda llm: encode("task", Prompt("a", "b", "", ()), llm),
}


@pytest.fixture
def closed(model: Path) -> fasa_edge.Llama:
    llm = load(model)
    llm.eval(TOKENS[:4])
    llm.close()
    return llm


@pytest.mark.check
@pytest.mark.parametrize("call", _NEED_FASA.values(), ids=_NEED_FASA)
def test_a_closed_model_says_so(closed: fasa_edge.Llama, model: Path, call: Callable) -> None:
    with pytest.raises(FasaError, match="annotated.gguf is closed"):
        call(closed.fasa)
    stock = load(model, llama_cpp.Llama)
    fasa = fasa_edge.Fasa(stock)
    stock.close()
    with pytest.raises(FasaError, match="the model is closed"):
        call(fasa)


@pytest.mark.parametrize("call", _NEED_MODEL.values(), ids=_NEED_MODEL)
def test_what_needs_a_closed_model_says_so(closed: fasa_edge.Llama, call: Callable) -> None:
    with pytest.raises(FasaError, match="annotated.gguf is closed"):
        call(closed)


def test_a_closed_model_can_be_closed_and_pickled(closed: fasa_edge.Llama) -> None:
    closed.close()
    assert pickle.loads(pickle.dumps(closed)).fasa.settings["budget"] == TINY_BUDGET


def test_a_closed_runner_says_so(model: Path) -> None:
    with Runner(str(model), 512) as runner:
        pass
    for call in (lambda: runner.check([DENSE]), lambda: runner.prefill([70]), lambda: runner.decode([70], DENSE)):
        with pytest.raises(FasaError, match="is closed"):
            call()


@pytest.mark.parametrize("cls", [llama_cpp.Llama, fasa_edge.Llama])
def test_a_model_goes_with_its_last_reference(model: Path, cls: type[llama_cpp.Llama]) -> None:
    gc.collect()
    gc.disable()
    try:
        llm = load(model, cls)
        llm.create_completion(TOKENS[:4], max_tokens=1)
        fasa_edge.Fasa(llm).stats()
        if cls is fasa_edge.Llama:
            llm.fasa.stats()
        gone = weakref.ref(llm)
        del llm
        assert gone() is None
    finally:
        gc.enable()
