"""A chat whose context is full goes on: the oldest turns leave, and the cache holds what ``input_ids`` say."""

from __future__ import annotations

from pathlib import Path

import fasa_edge
from fasa_edge.errors import ChatError
from fasa_edge.runtime.chat import Chat, MadeRoom
from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from runtime import kl_divergence, last_logits, nmse
from tiny_models import Shape, make_model

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
# each question changes all numbers
NUMBERED = "{% for message in messages %}<{{ loop.revindex }}>{{ message.content }}{% endfor %}<assistant>"
DOCUMENT = "The cat is called Wilhelmina. " * 5
SAME = 1e-5  # tokens one by one or in one batch, keys turned once or twice; another token at the end makes 1e-2
ASKING = {"max_tokens": 40, "temperature": 0.0, "seed": 0}

IDS = np.arange(Shape.n_vocab)
OTHERS = np.where((IDS >= 3 + 32) & (IDS < 3 + 127), 0, -np.inf).astype(np.float32)
PRINTABLE = llama_cpp.LogitsProcessorList([lambda ids, logits: logits + OTHERS])
"""A random model writes bytes that are no text: the history would not be what it wrote."""


class Case:
    """A chat with a tiny model, and what it reports."""

    def __init__(self, folder: Path, arch: str = "llama", template: str = TEMPLATE, n_ctx: int = 512, **chat) -> None:
        self.path = folder / f"{arch}.gguf"
        # one layer: K and V of a cell are those of its token and position, whatever was there when it was decoded
        shape = Shape(n_layer=2 if arch == "lfm2" else 1)
        make_model(self.path, arch, shape, tokenizer__chat_template=template)
        self.rooms: list[MadeRoom] = []
        self.reads: list[tuple[int, int]] = []
        self.llm = self.load(n_ctx, progress=lambda *step: self.reads.append(step))
        complete = self.llm.create_completion
        self.llm.create_completion = lambda *args, **kwargs: complete(
            *args, **(kwargs | {"logits_processor": PRINTABLE})
        )
        self.chat = Chat(self.llm, on_room=self.rooms.append, **chat)

    def load(self, n_ctx: int, **more) -> fasa_edge.Llama:
        return fasa_edge.Llama(str(self.path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, verbose=False, **more)

    def ask(self, question: str, **more) -> str:
        return "".join(self.chat.ask(question, **(ASKING | more)))

    @property
    def prompt(self) -> str:
        """What the cache is to hold."""
        return self.llm.detokenize(self.llm.input_ids[: self.llm.n_tokens].tolist(), special=True).decode(
            errors="replace"
        )

    def check_cache(self) -> None:
        """The cache must hold the tokens, each at its position: it goes on as a fresh one that reads them does."""
        memory = llama_cpp.llama_get_memory(self.llm.ctx)
        assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == self.llm.n_tokens - 1
        fresh = self.load(self.llm.n_ctx())
        fresh.eval(self.llm.input_ids[: self.llm.n_tokens].tolist())
        found = last_logits(self.llm)
        assert np.isfinite(found).all() and nmse(last_logits(fresh), found) <= SAME


def question(i: int) -> str:
    return f"{i}: what is it that the cat number {i} is called, and why is it called that?"


@pytest.mark.check
def test_the_oldest_turns_leave(tmp_path: Path) -> None:
    case = Case(tmp_path, system="Be kind.", document=DOCUMENT)
    for i in range(10):
        n_rooms = len(case.rooms)
        case.ask(question(i))
        case.check_cache()
        assert case.prompt.count(DOCUMENT) == 1 and case.prompt.count("<system>Be kind.<user>The cat") == 1
        assert question(i) in case.prompt
        kept = [message["content"] for message in case.chat.messages if message["role"] == "user"]
        assert kept[0].startswith(f"{DOCUMENT}\n\n") and kept[-1].endswith(question(i)) and not case.chat.is_cut
        asked = [no for no in range(i + 1) if question(no) in case.prompt]
        assert len(kept) == len(asked) and asked == list(range(i + 1 - len(kept), i + 1))
        for room in case.rooms[n_rooms:]:
            assert room.n_turns > 0 and room.n_tokens > 0
    assert len(case.rooms) >= 2 and any(room.is_moved for room in case.rooms)
    case.chat.clear()
    case.ask(question(0))
    assert len(case.chat.messages) == 3 and case.prompt.count(DOCUMENT) == 1
    case.check_cache()


@pytest.mark.check
def test_what_moves_up_is_not_read_again(tmp_path: Path) -> None:
    case = Case(tmp_path, document=DOCUMENT)
    i = 0
    while not any(room.is_moved for room in case.rooms):
        n_held = case.llm.n_tokens
        case.reads.clear()
        case.ask(question(i), max_tokens=20)
        i += 1
    ((_, n_read), *_) = case.reads
    assert n_read < 40 + len(question(i)) < n_held  # the question, what the format puts around it, the last token


def ask_much(case: Case) -> None:
    case.chat.read()
    for i in range(8):
        case.ask(question(i))
        case.check_cache()
        assert case.prompt.count(DOCUMENT) == 1 and question(i) in case.prompt
    assert case.rooms


@pytest.mark.parametrize("arch", ["lfm2", "mamba", "qwen2vl"], ids=["hybrid", "recurrent", "M-RoPE"])
def test_where_nothing_can_move_it_is_read_again(tmp_path: Path, arch: str) -> None:
    case = Case(tmp_path, arch, system="Be kind.", document=DOCUMENT)
    ask_much(case)
    assert not any(room.is_moved for room in case.rooms)


def test_what_a_format_writes_in_another_way_is_read_again(tmp_path: Path) -> None:
    ask_much(Case(tmp_path, template=NUMBERED, system="Be kind.", document=DOCUMENT))


@pytest.mark.parametrize("arch", ["llama", "lfm2", "qwen2vl"])
def test_an_answer_goes_on_when_room_was_made(tmp_path: Path, arch: str) -> None:
    case = Case(tmp_path, arch, document=DOCUMENT)
    case.ask(question(0))
    n_said = 0
    generate = case.llm.generate

    def counting(*args, **kwargs):
        nonlocal n_said
        for token in generate(*args, **kwargs):
            n_said += 1
            yield token

    case.llm.generate = counting
    case.ask(question(1), max_tokens=150)
    (room,) = case.rooms
    assert room.is_answering and room.n_turns == 1 and room.is_moved == (arch == "llama")
    assert n_said == 150 and not case.chat.is_cut
    assert question(1) in case.prompt and question(0) not in case.prompt and case.prompt.count(DOCUMENT) == 1
    case.check_cache()


def test_an_answer_that_nothing_makes_room_for_ends(tmp_path: Path) -> None:
    case = Case(tmp_path, n_ctx=256, document=DOCUMENT)
    case.ask(question(0), max_tokens=500)
    assert case.chat.is_cut and case.llm.n_tokens == 256 - 4 and not case.rooms
    case.ask("a")  # the long answer leaves
    assert not case.chat.is_cut and len(case.rooms) == 1
    case.check_cache()


@pytest.mark.parametrize("n_answer", [8, 500])
def test_a_character_that_does_not_end_ends_with_the_context(tmp_path: Path, n_answer: int) -> None:
    """The bindings' completion would go on to its end, beyond the context."""
    case = Case(tmp_path, n_ctx=256, document=DOCUMENT)
    if n_answer == 500:
        case.ask("a", max_tokens=20)  # which leaves
    case.llm.sample = lambda **_: 3 + 0xF0
    case.ask("b", max_tokens=n_answer)  # also beyond what was asked for
    assert case.chat.is_cut and case.llm.is_full and len(case.chat.messages) == 2
    assert case.llm.n_tokens == 256
    del case.llm.sample
    case.ask("c", max_tokens=20)
    assert not case.chat.is_cut and not case.llm.is_full
    case.check_cache()


@pytest.mark.check
def test_a_question_that_does_not_fit_alone_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, document=DOCUMENT)
    case.ask(question(0))
    before, held = case.chat.messages, case.prompt
    with pytest.raises(ChatError, match=r"Requested tokens \(\d+\) exceed context window of 512") as refused:
        case.ask("word " * 100)
    assert case.chat.messages == before and case.prompt == held and not case.rooms
    assert "raise the context to 768 tokens (-c 768): the model was trained for 4096" in str(refused.value)
    case.ask(question(1))
    case.check_cache()


@pytest.mark.check
def test_a_document_is_read_at_once(tmp_path: Path) -> None:
    case = Case(tmp_path, system="Be kind.", document=DOCUMENT)
    case.chat.read()
    n_read = case.llm.n_tokens
    assert case.prompt.endswith(f"{DOCUMENT}\n\n") and case.reads == [(0, n_read), (n_read, n_read)]
    case.reads.clear()
    case.ask("Why?")
    n_rest = len("Why?<assistant>")
    assert case.reads == [(0, n_rest), (n_rest, n_rest)]
    case.check_cache()


@pytest.mark.check
@pytest.mark.parametrize("n_words", [100, 2000])
def test_a_document_that_does_not_fit_is_not_read(tmp_path: Path, n_words: int) -> None:
    document = "word " * n_words
    case = Case(tmp_path, document=document)
    with pytest.raises(ChatError, match=r"exceed context window of 512: shorten the document to \d+ tokens") as refused:
        case.chat.read()
    assert not case.reads and not case.llm.n_tokens
    error = str(refused.value)
    if n_words == 100:
        assert "(-c 768): the model was trained for 4096" in error
    else:
        assert "raise the context to the 4096 tokens that the model was trained for (-c 4096), no further" in error
    n_fits = int(error.partition("shorten the document to ")[2].split()[0])
    fitting = Chat(case.llm, document=document[: n_fits - 1])  # a token more of the space before it
    fitting.read()
    assert 0 < case.llm.n_tokens <= 512 - 128


def test_a_chat_of_a_real_model(fasa_model_path: Path) -> None:
    """The document's facts are still there, and a context that moved up is near one that is read anew."""
    document = "The name of the cat is Wilhelmina, and she lives in Graz. " + "The garden has apple trees. " * 20
    rooms: list[MadeRoom] = []
    kwargs = {"n_ctx": 512, "fasa_min_ctx": 1, "fasa_budget": 128, "verbose": False}
    llm = fasa_edge.Llama(str(fasa_model_path), **kwargs)
    chat = Chat(llm, document=document, on_room=rooms.append)
    chat.read()
    for _ in range(6):
        list(chat.ask("Tell me something about the garden.", max_tokens=60, temperature=0, seed=0))
    n_rooms = len(rooms)
    answer = "".join(chat.ask("What is the name of the cat?", max_tokens=30, temperature=0, seed=0))
    assert "Wilhelmina" in answer and n_rooms >= 1 and any(room.is_moved for room in rooms)
    assert llm.fasa.stats().n_layers_sparse > 0
    llm.fasa.configure(enabled=False)
    fresh = fasa_edge.Llama(str(fasa_model_path), **kwargs, fasa_enabled=False)
    tokens = llm.input_ids[: llm.n_tokens].tolist()
    fresh.eval(tokens)
    for model in (llm, fresh):
        model.eval(tokens[-1:])
    assert kl_divergence(last_logits(fresh)[None], last_logits(llm)[None]) < 0.1
