"""A store of documents on disk: what a model has read once is taken from there, also by a later process."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fasa_edge.errors import FasaError
from fasa_edge.io.block_folder import BlockFolder
from fasa_edge.runtime import memory, sequence, state_layout
from fasa_edge.runtime.identity import identity, prompt_settings
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.stored_states import Progress, StoredStates, n_common

import numpy as np
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

CAPACITY = 8 << 30
MIN_TOKENS = 256

_N_NEAREST, _RATIO = 64, 8
"""Tails are some _N_NEAREST * _RATIO**i tokens before the end of a prompt: of another one, at most about _RATIO times
as many tokens are read again as differ."""


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


class DocumentStore:
    """A folder of what models have read, for ``fasa_edge.Llama(cache=...)`` and ``llm.set_cache``.

    Several processes may share it.

    Args:
        folder: made if it does not exist, for this user alone: what was read can be told from it.
        capacity_bytes: what it may take; the files least recently used are removed first.
        min_tokens: a prompt is stored if so many of its tokens are not yet, and restored if so many need not be read.
        progress: called with "restoring" or "storing", the bytes done and the bytes to do.

    Raises:
        FasaError: the folder cannot be made, or a number is below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        capacity_bytes: int = CAPACITY,
        min_tokens: int = MIN_TOKENS,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        for name, value in (("capacity_bytes", capacity_bytes), ("min_tokens", min_tokens)):
            if value < 1:
                raise FasaError(f"{name} = {value}: choose 1 or more")
        self.folder = BlockFolder(folder)
        self.capacity_bytes = capacity_bytes
        self.min_tokens = min_tokens
        self.progress = progress

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also in other processes, have no progress."""
        copy = partial(DocumentStore, self.folder.path, capacity_bytes=self.capacity_bytes, min_tokens=self.min_tokens)
        return copy, ()

    @property
    def size(self) -> int:
        """Bytes of its files, of all models."""
        return self.folder.size()


class DocumentCache(BaseLlamaCache):
    """A model's part of a store: :class:`fasa_edge.Llama` asks it for what it is about to read, and gives what it read.

    It has the interface of llama-cpp-python's caches, too, for ``llama_cpp.Llama`` itself:
    ``llm.set_cache(DocumentCache(store, llm))``. ``cache[tokens]`` lets the model hold the longest stored prefix at
    once.

    Args:
        store: where.
        llm: the model.
        profile: the file of its FASA profile, if that is not its own.

    Attributes:
        store: as given.
        report: what came of the latest prompt.

    Raises:
        FasaError: a file of the model cannot be read.
    """

    def __init__(
        self, store: DocumentStore, llm: llama_cpp.Llama, profile: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__(store.capacity_bytes)
        self.store = store
        self.report = StoreReport()
        self._model = weakref.ref(llm)  # which holds this
        try:
            self._identity = identity(llm, profile)
        except OSError as error:
            raise FasaError(
                f"{error.filename} cannot be read, and so not be told from others: {error.strerror}"
            ) from error
        self._has_rows = not llama_cpp.llama_model_is_recurrent(llm.model)
        self._has_tail = not self._has_rows or sequence.state_size(llm.ctx) != sequence.state_size(
            llm.ctx, partial=True
        )
        self._states = self._open(prompt_settings(llm))
        self._n_rows = 0  # tokens of the latest prompt that the store has the rows of
        self._n_stored = 0  # tokens of it that the store can restore
        self._n_own = sys.maxsize  # first tokens in memory whose K and V are those of a prompt that is read now

    def _open(self, settings: dict[str, Any] | None) -> StoredStates:
        """Open what was read with the settings of prompts, as :func:`prompt_settings` gives them."""
        self._settings = settings
        return StoredStates(
            self.store.folder,
            self._identity | {"prompt": settings},
            has_rows=self._has_rows,
            has_tail=self._has_tail,
            progress=lambda *report: self.store.progress(*report),  # as it is then
        )

    def _start(self) -> None:
        """Begin with another prompt."""
        settings = prompt_settings(self._llm)
        if settings != self._settings:
            self._states = self._open(settings)
            self._n_own = 0  # what memory holds was read otherwise
        self._states.start()

    @property
    def _llm(self) -> llama_cpp.Llama:
        llm = self._model()
        if llm is None:
            raise FasaError("the model of this cache is gone: make another one with DocumentCache(store, llm)")
        return llm

    def restore(self, prompt: Sequence[int]) -> int:
        """Let the model hold of a prompt what it does already, or what the store has if that is more.

        Args:
            prompt: int [n_prompt]; its last token is always left to be evaluated, for the logits.

        Returns:
            How many tokens it holds from now on, and no others.
        """
        llm, started = self._llm, time.perf_counter()
        tokens = np.asarray(prompt, np.int32)
        n_max = max(len(tokens) - 1, 0)
        n_held = min(n_common(llm._input_ids, tokens), n_max)
        if not n_held or not sequence.holds(llm.ctx, n_held):
            n_held = 0
        self._start()
        self.report = report = StoreReport(n_prompt=len(tokens), problems=self._states.problems)
        report.n_restored = self._restore(tokens, n_max, n_held + self.store.min_tokens)
        report.n_held = 0 if report.n_restored or not sequence.holds(llm.ctx, n_held) else n_held
        n = report.n_restored or report.n_held
        if not n or not sequence.cut(llm.ctx, n):
            n = 0
            sequence.clear(llm.ctx)
        if report.n_restored or not n or n <= self._n_own:
            self._n_own = sys.maxsize
        llm.n_tokens = n
        llm._requires_eval = True
        report.seconds_restoring = time.perf_counter() - started
        return n

    def _restore(self, tokens: np.ndarray, n_max: int, n_min: int) -> int:
        """Restore up to ``n_max`` tokens if at least ``n_min`` are stored; how many."""
        llm, problems = self._llm, self._states.problems
        state = None
        while state is None:
            found = self._states.find(tokens)
            tail, n = self._states.choose(found, n_max)
            self._n_rows, self._n_stored = found.n_rows, n + (n == n_max)
            if n < max(n_min, 1):
                return 0
            if llm._logits_all and llm.draft_model is None:
                problems.append(
                    f"logits_all=True wants the logits of all tokens, which are not stored: {n} are read anew"
                )
                return 0
            try:
                state = self._states.read(found, tail, n)
            except FasaError as error:
                problems.append(str(error))
                return 0
        try:
            sequence.restore(llm.ctx, state)
        except FasaError as error:
            problems.append(str(error))
            sequence.clear(llm.ctx)
            return 0
        llm.input_ids[:n] = tokens[:n]
        self.report.bytes_read = len(state)
        return n

    def spoil(self, start: int) -> None:
        """Take note that tokens from ``start`` on are not stored: a shift left them with other tokens before them than
        they have seen, or they were decoded sparsely."""
        self._n_own = min(self._n_own, start)

    def read(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield what the model lacks of a prompt, part by part, and store what it has read when it comes back for more.

        Args:
            tokens: what follows the tokens that the model holds.
        """
        llm = self._llm
        start = llm.n_tokens
        prompt = np.concatenate([llm.input_ids[:start], np.asarray(tokens, np.int32)])
        own = prompt[: self._n_own]
        pays = self._pays(len(own))
        stops = self._stops(start, len(own)) if pays else self._parting(start, len(own))
        done = start
        for stop in [*stops, len(prompt)]:
            yield tokens[done - start : stop - start]
            done = stop
            if stop < len(prompt) and self._has_tail:
                self._store(prompt[:stop], self._store_tail)
        if pays:
            self._store(own, self._store_rows)
            self._n_stored = len(own)

    def _pays(self, n: int) -> bool:
        return n - self._n_stored >= self.store.min_tokens

    def _parting(self, start: int, n: int) -> list[int]:
        """Where a prompt parts from what was stored before, if a tail there saves others reading.

        There a document ends and a question begins.
        """
        worth = max(start + _N_NEAREST // 2, self.store.min_tokens)
        return [self._n_rows] if self._has_tail and worth <= self._n_rows < n else []

    def _stops(self, start: int, n: int) -> list[int]:
        """After which tokens of a prompt that is stored reading stops; where there are tails, they are taken there.

        Before its last token in any case: restored, it is read by itself, too, and has the same logits to the bit.
        Tails also where it parts, and ever fewer between.
        """
        wanted, distance = {*self._parting(start, n), n - 1}, _N_NEAREST
        while distance < n and self._has_tail:
            wanted.add((n - distance) // _N_NEAREST * _N_NEAREST)
            distance *= _RATIO
        return sorted(stop for stop in wanted if start < stop < n)

    def _store(self, tokens: np.ndarray, store: Callable[[np.ndarray], int]) -> None:
        """Store something of tokens that the model holds; what fails is a problem, but ends nothing."""
        started = time.perf_counter()
        try:
            self.report.bytes_written += store(tokens)
        except FasaError as error:
            self._states.problems.append(str(error))
        self.report.seconds_storing += time.perf_counter() - started

    def _store_tail(self, tokens: np.ndarray) -> int:
        return self._states.write_tail(tokens, self._save(partial=True), self.store.capacity_bytes)

    def _store_rows(self, tokens: np.ndarray) -> int:
        if not self._has_rows:
            return 0
        llm = self._llm
        n_tail = sequence.state_size(llm.ctx, partial=True) - state_layout.HEAD if self._has_tail else 0
        state = self._save()
        parsed = state_layout.parse(state, n_tail, (llm.context_params.type_k, llm.context_params.type_v))
        if parsed is None:
            raise FasaError(f"the memory of {llm.model_path} is of a kind whose rows are not known: nothing is stored")
        layout, n_cells = parsed
        sections = layout.sections(state, n_cells)
        positions = state_layout.positions(sections[0])
        order = np.argsort(positions)
        if n_cells < len(tokens) or not np.array_equal(positions[order], np.arange(n_cells)):
            raise FasaError(f"the {n_cells} cells in memory are not those of {len(tokens)} tokens: nothing is stored")
        if not np.array_equal(order, np.arange(n_cells)):
            sections = [section[order] for section in sections]
        return self._states.write_rows(tokens, layout, sections, self.store.capacity_bytes)

    def _save(self, *, partial: bool = False) -> np.ndarray:
        size = sequence.state_size(self._llm.ctx, partial=partial)
        if size > (available := memory.available()).n_bytes:
            raise FasaError(f"the state takes {size} bytes, of which {available}: nothing is stored")
        return sequence.save(self._llm.ctx, partial=partial)

    # As llama_cpp.Llama asks a cache

    @property
    def cache_size(self) -> int:
        """Bytes of the whole store."""
        return self.store.size

    def __contains__(self, key: Sequence[int]) -> bool:
        """Whether the store has a beginning of these tokens that is worth restoring."""
        self._start()
        tokens = np.asarray(key, np.int32)
        return self._states.choose(self._states.find(tokens), len(tokens) - 1)[1] >= self.store.min_tokens

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Let the model hold the longest beginning of these tokens at once; what is returned tells how long it is.

        Raises:
            KeyError: there is none that is worth it.
        """
        llm = self._llm
        if not self.restore(key):
            raise KeyError("no beginning of these tokens is stored")
        return LlamaState(llm.input_ids.copy(), np.empty((0, 0), np.single), llm.n_tokens, b"", 0, llm._seed)

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Store what the model holds, if that pays; the value, which has it once more, is not looked at."""
        if self._pays(min(self._llm.n_tokens, self._n_own)) and self._llm.n_tokens <= self._n_own:
            for store in (*([self._store_tail] if self._has_tail else []), self._store_rows):
                self._store(self._llm._input_ids, store)
