"""A chat that keeps its history: what ``fasa-edge chat`` holds with a model."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from fasa_edge.errors import ChatError
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.llama import Llama
from fasa_edge.runtime.room import remedies
from fasa_edge.runtime.sequence import n_common

import numpy as np
from jinja2 import TemplateError

_ROOM = 32
"""Tokens that an answer has before it at least, or the oldest turns leave; a document leaves as many for a question."""

_ROOM_WISHED = 512
"""Tokens that a document is told to leave, or a quarter of the context if that is less."""

_CHARACTER = 4
"""Tokens of a character: the bindings' completion goes on to its end, and beyond where others follow at once."""

_MOVED = 16
"""Tokens worth moving up: fewer are as soon read again."""

_BEGINNINGS = ("a", "A", "1", "(", "é", "字")
"""What questions may begin with: the tokens before them must not depend on it."""

_GREEDY: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "seed": 0}


@dataclass(frozen=True)
class MadeRoom:
    """What a chat did when its context was full.

    Attributes:
        n_turns: questions that left with their answers, the oldest ones.
        n_tokens: tokens that the prompt is shorter by.
        is_moved: whether the tokens that stay moved up in the cache (context shift). Otherwise what comes after those
            that left is read again.
        is_answering: whether an answer was being written, which goes on.
    """

    n_turns: int
    n_tokens: int
    is_moved: bool
    is_answering: bool


class Chat:
    """Questions and answers so far, in the chat format of the model.

    The KV cache keeps what is unchanged from one question to the next, so that only the new question is read. When the
    context is full, the oldest turns leave; the system message and the document stay.

    Args:
        llm: the model; its chat format as in ``llama_cpp.Llama``, ``llama-2`` where the model has none.
        system: system message.
        document: text put before the first question.
        on_room: called when turns have left to make room.

    Attributes:
        is_cut: whether the last answer ended because the context was full of what has to stay.
    """

    def __init__(
        self,
        llm: Llama,
        *,
        system: str | None = None,
        document: str | None = None,
        on_room: Callable[[MadeRoom], None] = lambda room: None,
    ) -> None:
        self._llm = llm
        self._system = system
        self._document = document
        self._on_room = on_room
        self._turns: list[tuple[str, str]] = []
        self.is_cut = False

    def clear(self) -> None:
        """Forget all questions and answers; the document comes before the next question again."""
        self._turns = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """System message, questions and answers, as ``llama_cpp.Llama.create_chat_completion`` takes them."""
        return self._messages(self._turns)

    def n_document(self) -> int:
        """Count the tokens of the document."""
        return len(self._llm.tokenize((self._document or "").encode(), add_bos=False))

    def read(self) -> None:
        """Read what comes before the first question, system message and document, so that it need not wait for that.

        Raises:
            ChatError: it leaves no room for a question, or the chat format refuses it; nothing was read.
        """
        prompts = [np.array(self._request([], question, _GREEDY)["prompt"]) for question in _BEGINNINGS]
        tokens = prompts[0][: min(n_common(prompts[0], prompt) for prompt in prompts[1:])].tolist()
        if not tokens:
            return
        if len(tokens) + _ROOM > self._llm.n_ctx():
            n_wished = min(_ROOM_WISHED, self._llm.n_ctx() // 4)
            raise self._no_room("the document", self.n_document(), len(tokens), n_wished)
        self._llm.create_completion(tokens, **_GREEDY)

    def ask(self, question: str, *, max_tokens: int, temperature: float, seed: int) -> Generator[str, None, None]:
        """Ask a question and stream the answer; both join the history, an answer broken off as far as it came.

        Args:
            question: what the user says.
            max_tokens: of the answer; less where the context is full of what has to stay, see :attr:`is_cut`.
            temperature: of the sampling; 0: greedy.
            seed: of the sampling.

        Yields:
            Pieces of the answer.

        Raises:
            ChatError: the question exceeds the context beside system message and document alone, or the chat format
                of the model refuses them; the history is as before.
        """
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        turns = self._turns
        said: list[int] = []
        pieces: list[str] = []
        self.is_cut = is_asked = False
        try:
            while True:
                request, turns = self._fitting(turns, question, said, sampling)
                is_asked = True
                for chunk in self._llm.create_completion(**request):
                    choice = chunk["choices"][0]
                    if choice["text"]:
                        pieces.append(choice["text"])
                        yield choice["text"]
                said += self._llm.sampled
                is_over = choice["finish_reason"] != "length" or len(said) >= max_tokens
                self.is_cut = not turns and (self._llm.is_full or not is_over)
                if is_over or self.is_cut:
                    return
                said = _whole(self._llm, said)
        except (ValueError, TemplateError) as error:
            is_asked = False
            raise self._refused(error) from error
        finally:
            if is_asked:
                self._turns = [*turns, (question, "".join(pieces))]

    def _fitting(
        self, turns: Sequence[tuple[str, str]], question: str, said: list[int], sampling: dict[str, Any]
    ) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """Arguments of the completion that goes on with an answer, and the turns that it has room for beside it."""
        n_ctx, n_wanted = self._llm.n_ctx() - (_CHARACTER - 1), sampling["max_tokens"] - len(said)

        def request(n_gone: int) -> dict[str, Any]:
            arguments = self._request(turns[n_gone:], question, sampling)
            prompt = [*arguments["prompt"], *said]
            return arguments | {"prompt": prompt, "max_tokens": min(n_wanted, n_ctx - len(prompt))}

        before = request(0)
        if len(before["prompt"]) + min(n_wanted, _ROOM) <= n_ctx:
            return before, list(turns)
        n_stays = len(request(len(turns))["prompt"])
        n_free = n_ctx - n_stays
        if n_free < 1:
            text = "document and question" if self._document else "the question"
            n_question = len(self._llm.tokenize(question.encode(), add_bos=False))
            raise self._no_room(text, self.n_document() + n_question, n_stays, _CHARACTER)
        if not turns:
            return before, []
        n_wanted_now = min(n_wanted, max(n_free // 2, 1))  # the other half is for the turns that stay
        fits = lambda n_gone: len(request(n_gone)["prompt"]) + n_wanted_now <= n_ctx  # noqa: E731
        n_gone = 1 + bisect_left(range(1, len(turns)), True, key=fits)
        after = request(n_gone)
        is_moved = self._move(np.array(after["prompt"]))
        n_tokens = len(before["prompt"]) - len(after["prompt"])
        self._on_room(MadeRoom(n_gone, n_tokens, is_moved, is_answering=bool(said)))
        return after, list(turns[n_gone:])

    def _move(self, prompt: np.ndarray) -> bool:
        """Have the cache forget the tokens that a prompt, int [n], lacks, and move up what follows them in both.

        A chat format writes the whole history anew: what it writes in another way is read again, as is all after it.
        """
        held = self._llm.input_ids[: self._llm.n_tokens].copy()
        start = n_common(held, prompt)
        lengths = {
            int(end): n_common(held[end:], prompt[start:])
            for end in (np.flatnonzero(held[start:] == prompt[start]) + start if start < len(prompt) else ())
        }
        end = max(lengths, key=lambda end: (lengths[end], end), default=start)
        return lengths.get(end, 0) >= _MOVED and self._llm.remove(start, end)

    def _messages(self, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for no, (question, answer) in enumerate(turns):
            content = f"{self._document}\n\n{question}" if self._document and not no else question
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return messages

    def _request(self, turns: Sequence[tuple[str, str]], question: str, sampling: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the completion that the chat format asks for, the prompt as a list of tokens."""
        messages: Any = self._messages([*turns, (question, "")])[:-1]
        chat = _Completed(self._llm)
        try:
            Llama.create_chat_completion(chat, messages, stream=True, **sampling)
        except (ValueError, TemplateError) as error:
            raise self._refused(error) from error
        prompt = chat.arguments["prompt"]
        if isinstance(prompt, str):
            prompt = self._llm.tokenize(prompt.encode(), special=True)
        return chat.arguments | {"prompt": list(prompt)}

    def _no_room(self, text: str, n_text: int, n_stays: int, n_wished: int) -> ChatError:
        """The error of a prompt without any turns.

        Args:
            text: what of it is too long.
            n_text: tokens of that.
            n_stays: of the whole prompt.
            n_wished: that should have room beside it.
        """
        ways = ", or ".join(remedies(self._llm, text, n_text, n_stays - n_text + n_wished))
        return ChatError(f"Requested tokens ({n_stays}) exceed context window of {self._llm.n_ctx()}: {ways}")

    def _refused(self, error: Exception) -> ChatError:
        if isinstance(error, ChatError):
            return error
        return ChatError(f"the chat format of {self._llm.model_path} refuses the messages: {error}")


class _Completed:
    """Stands in for a model before its chat format, and keeps what it is asked to complete."""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        self._llm = llm
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: Any, **arguments: Any) -> Any:
        self.arguments = {"prompt": prompt, **arguments}
        return iter(())


def _whole(llm: llama_cpp.Llama, tokens: list[int]) -> list[int]:
    """Tokens without the last ones if these begin a character: the bindings' completion printed nothing of it."""
    for n in range(len(tokens), max(len(tokens) - _CHARACTER, 0), -1):
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        decoder.decode(llm.detokenize(tokens[:n]))
        if not decoder.getstate()[0]:
            return tokens[:n]
    return tokens  # no text
