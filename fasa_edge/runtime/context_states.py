"""What the sequence of a context holds, taken from the states of a store and given to them."""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasa_edge.errors import FasaError
from fasa_edge.runtime import memory, sequence, state_layout
from fasa_edge.runtime.identity import identity, profile_fingerprint, prompt_settings
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.stored_states import N_BLOCK, Found, StoredStates

import numpy as np

if TYPE_CHECKING:
    import os

    from fasa_edge.io.block_folder import Name
    from fasa_edge.runtime.store import DocumentStore

_SECONDS = 10.0
"""Between two times that what was read so far of a prompt is stored."""

_SHARE = 50
"""Of that time, this part at most goes into storing: a state is taken as a whole, however little of it is new."""


@dataclass
class StoreReport:
    """What came of a prompt.

    Attributes:
        n_prompt: its tokens.
        n_held: tokens of it that memory held, and the model went on from.
        n_restored: tokens that came from the store instead.
        bytes_read: of the state that was restored.
        seconds_restoring: to find, read and hand over.
        bytes_written: of new files.
        seconds_storing: to take the state and write it.
        problems: what could not be used or stored, and why.
    """

    n_prompt: int = 0
    n_held: int = 0
    n_restored: int = 0
    bytes_read: int = 0
    seconds_restoring: float = 0.0
    bytes_written: int = 0
    seconds_storing: float = 0.0
    problems: list[str] = field(default_factory=list)


class ContextStates:
    """Sequence 0 of a model's context, and what a store has of it.

    Args:
        store: where, how much, and who is told.
        llm: the model.
        profile: the file of its FASA profile, if that is not its own.
        reading: what else K and V depend on, as values for JSON.
        batch: see :class:`fasa_edge.runtime.stored_states.StoredStates`.

    Attributes:
        store: as given.
        report: what came of the latest prompt.
        has_tail: whether there is memory that cannot forget a part of a sequence.
        n_rows: tokens of the latest prompt that the store has the rows of.
        n_stored: tokens of it that the store can restore.

    Raises:
        FasaError: a file of the model cannot be read, or its context has V in an order that is not stored.
    """

    def __init__(
        self,
        store: DocumentStore,
        llm: llama_cpp.Llama,
        profile: str | os.PathLike[str] | None = None,
        reading: dict[str, Any] | None = None,
        batch: int | None = None,
    ) -> None:
        self.store = store
        self.report = StoreReport()
        self._model = weakref.ref(llm)  # which may hold this
        self._profile_path = Path(profile or llm.model_path)
        self._profile: str | None = None  # told from others, once that is asked for
        self._batch = batch
        self._has_rows = not llama_cpp.llama_model_is_recurrent(llm.model)
        if self._has_rows and llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED:
            raise FasaError(
                f"{llm.model_path} is loaded without flash attention, and so has V transposed, of which nothing can be "
                "stored: load it with flash_attn=True"
            )
        try:
            self._identity = identity(llm) | (reading or {})
        except OSError as error:
            raise FasaError(
                f"{error.filename} cannot be read, and so not be told from others: {error.strerror}"
            ) from error
        self.has_tail = not self._has_rows or sequence.state_size(llm.ctx) != sequence.state_size(llm.ctx, partial=True)
        self._states = self._open(prompt_settings(llm))
        self.n_rows = self.n_stored = 0
        self._due = 0.0  # when what was read so far is to be stored
        self._warned = False
        self._passing: Name | None = None  # a tail that the next one makes needless

    @property
    def llm(self) -> llama_cpp.Llama:
        """The model."""
        llm = self._model()
        if llm is None:
            raise FasaError("the model of this cache is gone: make another one with DocumentCache(store, llm)")
        return llm

    def _open(self, settings: dict[str, Any] | None) -> StoredStates:
        """Open what was read with the settings of prompts, as :func:`prompt_settings` gives them."""
        self._settings = settings
        if settings is not None and self._profile is None:
            self._profile = profile_fingerprint(self._profile_path)
        return StoredStates(
            self.store.folder,
            self._identity | {"prompt": settings and settings | {"profile": self._profile}},
            has_rows=self._has_rows,
            has_tail=self.has_tail,
            progress=lambda *report: self.store.progress(*report),  # as it is then
            batch=self._batch,
        )

    def start(self, n_prompt: int) -> bool:
        """Begin with another prompt; whether it is read with the settings of the one before."""
        settings = prompt_settings(self.llm)
        if is_other := settings != self._settings:
            self._states = self._open(settings)
        self._states.start()
        self.report = StoreReport(n_prompt=n_prompt, problems=self._states.problems)
        self.n_rows = self.n_stored = 0
        self._due, self._passing = time.monotonic() + _SECONDS, None
        return not is_other

    def n_available(self, tokens: np.ndarray) -> int:
        """Count the tokens, but for the last, that could be restored."""
        return self._states.choose(self._states.find(tokens), len(tokens) - 1)[1]

    def restore(self, tokens: np.ndarray, n_max: int, n_min: int) -> int:
        """Let the sequence hold up to ``n_max`` tokens of a prompt if at least ``n_min`` are stored.

        What it holds now is gone if something is restored, or that fails.

        Returns:
            How many were restored.
        """
        llm, started, state = self.llm, time.perf_counter(), None
        try:
            while state is None:
                found, tail, n = self._find(tokens, n_max)
                if n < max(n_min, 1):
                    self._states.touch(found, n)  # which memory has, too
                    return 0
                if llm._logits_all and llm.draft_model is None:
                    raise FasaError(
                        f"logits_all=True wants the logits of all tokens, which are not stored: {n} are read anew"
                    )
                state = self._states.read(found, tail, n)
            try:
                sequence.restore(llm.ctx, state)
            except FasaError:
                sequence.clear(llm.ctx)
                raise
        except FasaError as error:
            self._problem(error)
            return 0
        finally:
            self.report.seconds_restoring += time.perf_counter() - started
        self.report.n_restored, self.report.bytes_read = n, len(state)
        return n

    def touch(self, tokens: np.ndarray) -> None:
        """Note that what is stored of a prompt is used."""
        found, *_ = self._find(tokens, len(tokens) - 1)
        self._states.touch(found, len(tokens))

    def _find(self, tokens: np.ndarray, n_max: int) -> tuple[Found, Name | None, int]:
        """Find what is stored of a prompt, after which tail it can be restored if one is needed, and how much."""
        found = self._states.find(tokens)
        tail, n = self._states.choose(found, n_max)
        self.n_rows, self.n_stored = found.n_rows, n + (n == n_max < len(tokens))
        return found, tail, n

    def pays(self, n: int) -> bool:
        """Whether the first ``n`` tokens of the prompt are worth storing."""
        return n - self.n_stored >= self.store.min_tokens

    def checkpoint(self, tokens: np.ndarray, n_prompt: int) -> None:
        """Store now and then what was read so far of a prompt, so that who is broken off goes on from there.

        Args:
            tokens: int32 [n_tokens], all that the sequence holds.
            n_prompt: tokens of it that are to be stored in the end.
        """
        started = time.monotonic()
        if started < self._due:
            return
        n_block = self._batch or N_BLOCK  # of a file that is not full yet all would be written again
        own = tokens if self.has_tail else tokens[: len(tokens) // n_block * n_block]
        if len(own) <= self.n_stored:
            return
        n_problems = len(self.report.problems)
        failed = lambda: len(self.report.problems) > n_problems  # noqa: E731
        self.store_rows(own, n_prompt)
        if self.has_tail and not failed():
            # the one before goes when this one has all that it needs, whatever happens meanwhile
            tail = self.store_tail(tokens)
            if not failed():
                self._drop_passing()
                self._passing = tail
        now = time.monotonic()
        self._due = sys.maxsize if failed() else now + max(_SECONDS, (now - started) * _SHARE)

    def finish(self, tokens: np.ndarray) -> None:
        """Store the tokens that the sequence begins with; tails are in the caller's hands."""
        self.store_rows(tokens, len(tokens))
        self._drop_passing()

    def _drop_passing(self) -> None:
        if self._passing is not None:
            self._states.remove(self._passing)
            self._passing = None

    def break_off(self, tokens: np.ndarray) -> None:
        """Store all tokens that the sequence holds, if that pays: the reading of a prompt has ended early."""
        if self.pays(len(tokens)):
            self.store_rows(tokens, len(tokens))
            if self.has_tail:
                self.store_tail(tokens)
            self._drop_passing()

    def store_tail(self, tokens: np.ndarray) -> Name | None:
        """Store what memory holds, but for the rows, after the tokens, which are all that the sequence holds.

        Returns:
            The file, if it was not there before.
        """

        name: Name | None = None

        def write() -> int:
            nonlocal name
            name, n_bytes = self._states.write_tail(tokens, lambda: self._save(partial=True), self.store.capacity_bytes)
            if name == self._passing:
                self._passing = None  # now it is to stay
            return n_bytes

        return name if self._store(write) else None

    def store_rows(self, tokens: np.ndarray, n_prompt: int) -> None:
        """Store the rows of tokens that the sequence begins with; see :meth:`checkpoint`."""
        if not self._has_rows or self._store(lambda: self._write_rows(tokens, n_prompt)) is not None:
            self.n_stored = max(self.n_stored, len(tokens))

    def _store(self, write: Callable[[], int]) -> int | None:
        """Write something; what fails is a problem, but ends nothing."""
        started = time.perf_counter()
        try:
            n_bytes = write()
        except FasaError as error:
            self._problem(error)
            return None
        except BaseException:
            self.n_stored = sys.maxsize  # who breaks that off does not want it tried again
            raise
        finally:
            self.report.seconds_storing += time.perf_counter() - started
        self.report.bytes_written += n_bytes
        return n_bytes

    def _problem(self, error: FasaError) -> None:
        if str(error) not in self._states.problems:
            self._states.problems.append(str(error))

    def _write_rows(self, tokens: np.ndarray, n_prompt: int) -> int:
        llm = self.llm
        n_tail = sequence.state_size(llm.ctx, partial=True) - state_layout.HEAD if self.has_tail else 0
        state = self._save()
        parsed = state_layout.parse(state, n_tail, (llm.context_params.type_k, llm.context_params.type_v))
        if parsed is None:
            reason = f"the memory of {llm.model_path} is of a kind whose rows are not known: nothing is stored"
            if not self._warned:  # of no prompt ever
                warnings.warn(reason, stacklevel=2)
                self._warned = True
            raise FasaError(reason)
        layout, n_cells = parsed
        sections = layout.sections(state, n_cells)
        positions = state_layout.positions(sections[0])
        order = np.argsort(positions)
        if n_cells < len(tokens) or not np.array_equal(positions[order], np.arange(n_cells)):
            raise FasaError(f"the {n_cells} cells in memory are not those of {len(tokens)} tokens: nothing is stored")
        if not np.array_equal(order, np.arange(n_cells)):
            sections = [section[order] for section in sections]
        return self._states.write_rows(tokens, layout, sections, n_prompt, self.store.capacity_bytes)

    def _save(self, *, partial: bool = False) -> np.ndarray:
        size = sequence.state_size(self.llm.ctx, partial=partial)
        if size > (available := memory.available()).n_bytes:
            raise FasaError(f"the state takes {size} bytes, of which {available}: nothing is stored")
        return sequence.save(self.llm.ctx, partial=partial)
