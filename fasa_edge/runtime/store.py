"""A store of documents on disk: what a model has read once is taken from there, also by a later process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fasa_edge.errors import FasaError
from fasa_edge.io.block_folder import BlockFolder
from fasa_edge.runtime import capi, sequence
from fasa_edge.runtime.context_states import ContextStates, StoreReport
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.stored_states import Progress

import numpy as np
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

CAPACITY = 8 << 30
MIN_TOKENS = 256

_N_CELLS = 256
"""A graph attends to so many cells, or a multiple: what llama.cpp rounds up to, before FASA looks at ``min_ctx``."""

_N_NEAREST, _RATIO = 64, 8
"""Tails are some _N_NEAREST * _RATIO**i tokens before the end of a prompt: of another one, at most about _RATIO times
as many tokens are read again as differ."""


class DocumentStore:
    """A folder of what models have read, for ``fasa_edge.Llama(cache=...)`` and ``llm.set_cache``.

    Several processes may share it.

    Args:
        folder: made if it does not exist, for this user alone: what was read can be told from it.
        capacity_bytes: what it may take; the files least recently used are removed first.
        min_tokens: a prompt is stored if so many of its tokens are not yet, and restored if so many need not be read;
            those that have fewer than 64 in common share nothing.
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
    once. Every prompt must come by way of it there: what else is evaluated, it does not know how.

    Args:
        store: where.
        llm: the model.
        profile: the file of its FASA profile, if that is not its own.

    Attributes:
        store: as given.

    Raises:
        FasaError: a file of the model cannot be read, or it is loaded without flash attention.
    """

    def __init__(
        self, store: DocumentStore, llm: llama_cpp.Llama, profile: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__(store.capacity_bytes)
        self.store = store
        self._states = ContextStates(store, llm, profile)
        self._n_own = sys.maxsize  # first tokens in memory whose K and V are those of a prompt that is read now

    @property
    def report(self) -> StoreReport:
        """What came of the latest prompt."""
        return self._states.report

    def restore(self, prompt: Sequence[int]) -> int:
        """Let the model hold of a prompt what it does already, or what the store has if that is more.

        Args:
            prompt: int [n_prompt]; its last token is always left to be evaluated, for the logits.

        Returns:
            How many tokens it holds from now on, and no others.
        """
        llm = self._states.llm
        tokens = np.asarray(prompt, np.int32)
        n_max = max(len(tokens) - 1, 0)
        n_held = min(sequence.n_common(llm._input_ids, tokens), n_max)
        if not n_held or not sequence.holds(llm.ctx, n_held):
            n_held = 0
        self._start(len(tokens))
        n_restored = self._states.restore(tokens, n_max, n_held + self.store.min_tokens)
        llm.input_ids[:n_restored] = tokens[:n_restored]
        self.report.n_held = 0 if n_restored or not sequence.holds(llm.ctx, n_held) else n_held
        n = n_restored or self.report.n_held
        if not n or not sequence.cut(llm.ctx, n):
            n = 0
            sequence.clear(llm.ctx)
        if n_restored or not n or n <= self._n_own:
            self._n_own = sys.maxsize
        llm.n_tokens = n
        llm._requires_eval = True
        return n

    def _start(self, n_prompt: int) -> None:
        if not self._states.start(n_prompt):
            self._n_own = 0  # what memory holds was read otherwise

    def touch(self, prompt: Sequence[int]) -> None:
        """Note that a prompt is used which memory holds with its logits, so that others give way to it."""
        self._start(len(prompt))
        self.report.n_held = len(prompt)
        self._states.touch(np.asarray(prompt, np.int32))

    def spoil(self, start: int) -> None:
        """Take note that tokens from ``start`` on are not stored: a shift left them with other tokens before them than
        they have seen, or they were decoded sparsely."""
        self._n_own = min(self._n_own, start)

    def decoded(self, n: int) -> None:
        """Take note that ``n`` tokens are decoded now, after those that the model holds, not read as a prompt."""
        self._decoded(self._states.llm.n_tokens, n)

    def _decoded(self, start: int, n: int) -> None:
        if start + n > self._n_dense():
            self.spoil(start)

    def _read_by_parent(self, start: int, n_prompt: int) -> None:
        """Take note that ``llama_cpp.Llama`` evaluates a prompt from ``start`` on, and then goes on from it.

        To FASA, which it does not tell what a prompt is, a micro-batch of a few tokens is none.
        """
        llm, params = self._states.llm, capi.get_params(self._states.llm.ctx)
        n_ubatch, max_batch = llm.context_params.n_ubatch, params.max_batch if params else 0
        for batch in range(start, n_prompt, llm.n_batch):
            end = min(batch + llm.n_batch, n_prompt)
            for ubatch in range(batch, end, n_ubatch):
                if (n := min(n_ubatch, end - ubatch)) <= max_batch:
                    self._decoded(ubatch, n)
        self._decoded(n_prompt, sys.maxsize)

    def _n_dense(self) -> int:
        """How many tokens are there at most when a token is decoded densely."""
        ctx = self._states.llm.ctx
        params, min_ctx = capi.get_params(ctx), capi.min_ctx(ctx)
        if not (params and params.enabled and min_ctx):
            return sys.maxsize
        return (min_ctx - 1) // _N_CELLS * _N_CELLS

    def read(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield what the model lacks of a prompt, batch by batch, and store what it has read when it comes back for
        more.

        Args:
            tokens: what follows the tokens that the model holds.
        """
        llm, states = self._states.llm, self._states
        start = llm.n_tokens
        prompt = np.concatenate([llm.input_ids[:start], np.asarray(tokens, np.int32)])
        own = prompt[: self._n_own]
        pays = states.pays(len(own))
        stops = self._stops(start, len(own)) if pays else self._parting(start, len(own))
        done = start
        for stop in [*stops, len(prompt)]:
            for end in [*range(done + llm.n_batch, stop, llm.n_batch), stop]:
                yield tokens[done - start : end - start]
                done = end
                if pays and done < min(stop, len(own)):
                    states.checkpoint(prompt[:done], len(own))
            if stop < len(prompt) and states.has_tail:
                states.store_tail(prompt[:stop])
        if pays:
            states.finish(own)

    def break_off(self) -> None:
        """Store what the model has read of a prompt whose reading has ended early."""
        llm = self._states.llm
        n = min(llm.n_tokens, self._n_own)
        if n == llm.n_tokens or not self._states.has_tail:
            self._states.break_off(llm.input_ids[:n].copy())

    def _parting(self, start: int, n: int) -> list[int]:
        """Where a prompt parts from what was stored before, if a tail there saves others reading.

        There a document ends and a question begins.
        """
        n_rows, worth = self._states.n_rows, max(start + _N_NEAREST // 2, self.store.min_tokens)
        return [n_rows] if self._states.has_tail and worth <= n_rows < n else []

    def _stops(self, start: int, n: int) -> list[int]:
        """After which tokens of a prompt that is stored reading stops; where there are tails, they are taken there.

        Before its last token in any case: restored, it is read by itself, too, and has the same logits to the bit.
        Tails also where it parts, and ever fewer between.
        """
        wanted, distance = {*self._parting(start, n), n - 1}, _N_NEAREST
        while distance < n and self._states.has_tail:
            wanted.add((n - distance) // _N_NEAREST * _N_NEAREST)
            distance *= _RATIO
        return sorted(stop for stop in wanted if start < stop < n)

    # As llama_cpp.Llama asks a cache

    @property
    def cache_size(self) -> int:
        """Bytes of the whole store."""
        return self.store.size

    def __contains__(self, key: Sequence[int]) -> bool:
        """Whether the store has a beginning of these tokens that is worth restoring."""
        self._start(len(key))
        return self._states.n_available(np.asarray(key, np.int32)) >= self.store.min_tokens

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Let the model hold the longest beginning of these tokens at once; what is returned tells how long it is.

        Raises:
            KeyError: there is none that is worth it.
        """
        llm = self._states.llm
        n = self.restore(key)
        self._read_by_parent(n, len(key))
        if not n:
            raise KeyError("no beginning of these tokens is stored")
        return LlamaState(llm.input_ids.copy(), np.empty((0, 0), np.single), llm.n_tokens, b"", 0, llm._seed)

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Store what the model has read, if that pays; the value, which has it once more, is not looked at.

        Of a memory that cannot be cut back nothing, if the answer was decoded sparsely.
        """
        self.break_off()
