"""A chat that keeps its history: what ``fasa-edge chat`` holds with a model."""

from __future__ import annotations

from collections.abc import Generator

from fasa_edge.errors import ChatError
from fasa_edge.runtime.library import llama_cpp

from jinja2 import TemplateError


class Chat:
    """Questions and answers so far, in the chat format of the model.

    The KV cache keeps what is unchanged from one question to the next, so that only the new question is read.

    Args:
        llm: the model; its chat format as in ``llama_cpp.Llama``, ``llama-2`` where the model has none.
        system: system message.
        document: text put before the first question.

    Attributes:
        messages: as ``llama_cpp.Llama.create_chat_completion`` takes them.
    """

    def __init__(self, llm: llama_cpp.Llama, *, system: str | None = None, document: str | None = None) -> None:
        self._llm = llm
        self._system = system
        self._document = document
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Forget all questions and answers; the document comes before the next question again."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for another token."""
        return self._llm.n_tokens + 1 >= self._llm.n_ctx()

    def ask(self, question: str, *, max_tokens: int, temperature: float, seed: int) -> Generator[str, None, None]:
        """Ask a question and stream the answer; both join the history, an answer broken off as far as it came.

        Args:
            question: what the user says.
            max_tokens: of the answer, less where the context ends before.
            temperature: of the sampling; 0: greedy.
            seed: of the sampling.

        Yields:
            Pieces of the answer.

        Raises:
            ChatError: question and history exceed the context, or the chat format of the model refuses them; the
                history is as before.
        """
        is_first = not any(message["role"] == "user" for message in self.messages)
        content = f"{self._document}\n\n{question}" if self._document and is_first else question
        asked = [*self.messages, {"role": "user", "content": content}]
        pieces: list[str] = []
        try:
            for chunk in self._llm.create_chat_completion(
                asked, max_tokens=max_tokens, temperature=temperature, seed=seed, stream=True
            ):
                if piece := chunk["choices"][0]["delta"].get("content"):
                    pieces.append(piece)
                    yield piece
        except (ValueError, TemplateError) as error:
            asked = []
            raise ChatError(self._reason(error)) from error
        finally:
            if asked:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _reason(self, error: Exception) -> str:
        if "context window" in str(error):  # llama_cpp.Llama.create_completion
            return f"{error}: clear the chat (/clear), shorten the document or the question, or raise n_ctx (-c)"
        return f"the chat format of {self._llm.model_path} refuses the messages: {error}"
