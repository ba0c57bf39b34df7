"""Runs a model from one prefix with many methods: the prefix is read once, by dense attention, and then decoded from.

Methods that differ in what is fixed when a context is made (``n_tip``) run in contexts of their own, which get the
prefix as a saved state.

A prefix is read in batches that begin at multiples of their size, whatever of it is there already: what a method makes
of it does not depend, to the bit, on what was read before, nor on what a store had of it. But for sliding windows:
llama.cpp restores them to other cells, in whose order sums are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fasa_edge.errors import FasaError
from fasa_edge.eval.engine import engine
from fasa_edge.eval.methods import DENSE, Method
from fasa_edge.runtime import capi, memory, sequence
from fasa_edge.runtime.capi import Capture
from fasa_edge.runtime.context_states import ContextStates
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.llama import Llama, kv_bytes_per_cell
from fasa_edge.runtime.sequence import n_common
from fasa_edge.runtime.store import DocumentStore

import numpy as np


@dataclass(frozen=True)
class Steps:
    """What a method made of some tokens.

    Attributes:
        logits: after each token, float32 [n_tokens, n_vocab].
        kept: cells attended to, mean over the sparse layers, the heads that choose, and the tokens; None if all layers
            ran dense.
        mass: for each layer the share of the softmax over all visible cells that the chosen cells hold, float32
            [n_tokens, n_head]; None for a layer that ran dense. Empty if it was not asked for.
    """

    logits: np.ndarray
    kept: float | None
    mass: list[np.ndarray | None]


@dataclass(frozen=True)
class Generated:
    """What a method went on with.

    Attributes:
        tokens: without that of the end.
        kept: as of :class:`Steps`, over all tokens that were decoded.
    """

    tokens: list[int]
    kept: float | None


@dataclass
class _Context:
    """A context, and the settings with which it was made."""

    llm: Llama
    base: dict[str, Any]
    tokens: list[int]
    """Prefix in its cache."""
    states: ContextStates | None = None
    """What a store has of prefixes, if there is one for this context."""


class Runner:
    """A model that decodes from one prefix with any method.

    Args:
        model_path: as in :class:`fasa_edge.Llama`.
        n_ctx: cells of a context.
        read_progress: called with the tokens of a prefix that are read and those to read.
        store: has prefixes, and gets those that are read.
        options: other arguments of :class:`fasa_edge.Llama`.

    Attributes:
        n_read: tokens of prefixes that were read.
        n_restored: tokens of prefixes that came from the store instead.
        problems: what of the store could not be used, or stored, and why.

    Raises:
        FasaError: as :class:`fasa_edge.Llama`.
    """

    def __init__(
        self,
        model_path: str,
        n_ctx: int = 0,
        *,
        read_progress: Callable[[int, int], None] = lambda done, total: None,
        store: DocumentStore | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("verbose", False)
        self._store = store
        self._profile = options.get("fasa_profile")
        self.n_read = self.n_restored = 0
        self.problems: list[str] = []
        self._load: Callable[..., Llama] = lambda **more: Llama(model_path, n_ctx=n_ctx, **options, **more)
        self._read_progress = read_progress
        self._main = self._open_reader()
        self._others: dict[int, _Context] = {}  # by n_tip, the latest used last
        self._reader: _Context | None = None  # of the method "prompt"
        self._read_mass: int | None = None  # with which it read its prefix
        self._observed = False
        self._state: np.ndarray | None = None  # of the prefix, once another context needed it

    def _open(self, **options: Any) -> _Context:
        llm = self._load(**options)
        return _Context(llm, llm.fasa.settings, [])

    def _open_reader(self) -> _Context:
        """Open a context that reads prefixes."""
        context = self._open()
        if self._store is not None:
            batch, ubatch = context.llm.n_batch, context.llm.context_params.n_ubatch
            reading = engine(context.llm) | {"n_batch": batch, "n_ubatch": ubatch}
            context.states = ContextStates(self._store, context.llm, self._profile, {"reading": reading}, batch)
        return context

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free all contexts."""
        for context in (self._main, *self._others.values(), *([self._reader] if self._reader else [])):
            context.llm.close()
        self._others.clear()
        self._reader = None

    @property
    def llm(self) -> Llama:
        """The model with the settings that it has by itself."""
        return self._main.llm

    @property
    def tokens(self) -> list[int]:
        """The prefix."""
        return list(self._main.tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings in force but for what a method changes; empty without a profile and without ``exact``."""
        return dict(self._main.base)

    @property
    def max_batch(self) -> int:
        """Tokens that can be decoded at once."""
        return self._main.base.get("max_batch", 16)

    def check(self, methods: Sequence[Method], batch: int = 1) -> None:
        """Refuse what could not run, before any long work.

        Raises:
            FasaError: the model has no profile, or a number is out of range.
        """
        llm = self._main.llm
        if not 1 <= batch <= self.max_batch:
            raise FasaError(
                f"batch {batch}: choose 1 to {self.max_batch}, the model's max_batch; more tokens are a prompt, which "
                "runs dense"
            )
        sparse = [method.name for method in methods if method.sparse or method.prompt_mass]
        if sparse and not llm.fasa.available:
            raise FasaError(
                f"{llm.model_path} has no FASA profile, which {', '.join(dict.fromkeys(sparse))} take: make one with "
                "`fasa-edge convert`, or choose the methods dense and noise"
            )
        n_chunks = [len(capi.chunk_dims(layer)) for layer in capi.layer_geometry(llm.model) if layer.n_head_kv]
        n_chunk = min(filter(None, n_chunks), default=0)  # a layer without RoPE has none, and runs dense
        for method in methods:
            if method.n_tip and method.n_tip > n_chunk:
                raise FasaError(f"n_tip {method.n_tip}: a head of {llm.model_path} has {n_chunk} chunks; lower it")
            if method.budget and method.budget > llm.n_ctx():
                raise FasaError(
                    f"budget {method.budget} exceeds the context of {llm.n_ctx()} tokens: lower it, or raise n_ctx"
                )
            self._configure(self._main, method)

    def prefill(self, tokens: Sequence[int], observe: bool = False) -> None:
        """Make the tokens the prefix, read by dense attention; what it shares with the prefix before is not read anew.

        Args:
            tokens: int [n_tokens].
            observe: for methods that choose by the attention of the prompt: read it whole, and keep that attention.

        Raises:
            FasaError: the context is too small, or llama.cpp failed.
        """
        context, tokens = self._main, list(tokens)
        if context.tokens == tokens and (self._observed or not observe):
            return
        self._require(len(tokens))
        self._state = None
        if observe != self._observed:
            context.tokens = []  # read with other attention
        self._configure(context, DENSE, **({"policy": "h2o"} if observe else {}))
        self._read(context, tokens, observe=observe)
        self._observed = observe
        if sequence.is_recurrent(context.llm.ctx):
            self._state = sequence.save(context.llm.ctx)

    def resume(self, tokens: Sequence[int], state: np.ndarray) -> None:
        """Make the tokens the prefix, as another context of the model has read them, with full attention.

        Args:
            tokens: int [n_tokens].
            state: uint8 [n_bytes], of that context, see :func:`fasa_edge.runtime.sequence.save`.

        Raises:
            FasaError: the context is too small, or the state is of another model.
        """
        self._require(len(tokens))
        self._main.tokens = []
        sequence.restore(self._main.llm.ctx, state)
        self._main.tokens, self._state, self._observed = list(tokens), state, False

    def decode(self, tokens: Sequence[int], method: Method, batch: int | None = None, mass: bool = False) -> Steps:
        """Decode tokens that follow the prefix, which stays as it is.

        Args:
            tokens: int [n_tokens].
            method: how.
            batch: tokens decoded at once; None for as many as are decoded sparsely. "noise" decodes one by one, and
                where this is 1 with another number of threads.
            mass: whether to measure attention mass, which takes long.

        Raises:
            FasaError: the context is too small, the method needs a prefix that was observed, or llama.cpp failed.
        """
        self._require(len(self._main.tokens) + len(tokens))
        context = self._prepare(method)
        return self._run(context, list(tokens), method, batch or self.max_batch, mass)

    def generate(
        self, tokens: Sequence[int], method: Method, n: int, stop: Callable[[list[int]], bool] = lambda tokens: False
    ) -> Generated:
        """Decode tokens that follow the prefix, then go on greedily, token by token.

        Args:
            tokens: int [n_tokens], at least one.
            method: how.
            n: tokens to generate at most; fewer if the model ends the text.
            stop: called with the tokens so far after each; whether these are enough.

        Raises:
            FasaError: as :meth:`decode`.
        """
        self._require(len(self._main.tokens) + len(tokens) + n)
        context = self._prepare(method)
        llm = context.llm
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        steps = self._run(context, list(tokens), method, self.max_batch)
        kept = [steps.kept or 0.0] * len(tokens)
        res: list[int] = []
        while len(res) < n:
            token = int(steps.logits[-1].argmax())
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                break
            res.append(token)
            if stop(res) or len(res) == n:
                break
            steps = self._run(context, [token], method, 1)
            kept.append(steps.kept or 0.0)
        return Generated(res, float(np.mean(kept)) if method.sparse else None)

    def _require(self, n_tokens: int) -> None:
        if n_tokens > (n_ctx := self._main.llm.n_ctx()):
            raise FasaError(f"{n_tokens} tokens exceed the context of {n_ctx}: use fewer, or raise n_ctx")

    def _prepare(self, method: Method) -> _Context:
        """Return the context of a method, holding the prefix and nothing else."""
        if method.prompt_mass:
            return self._read_by_blocks(method)
        context = self._context(method)
        if method.observes and not (self._observed and context is self._main):
            raise FasaError(
                f"{method.label} chooses by the attention of the prefix, which was not observed: call prefill with "
                "observe=True, and leave n_tip to the model"
            )
        if context is not self._main and context.tokens != self._main.tokens:
            if self._state is None:
                sequence.cut(self._main.llm.ctx, len(self._main.tokens))
                self._state = sequence.save(self._main.llm.ctx)
            context.tokens = []
            sequence.restore(context.llm.ctx, self._state)
            context.tokens = list(self._main.tokens)
        elif not sequence.cut(context.llm.ctx, len(context.tokens)):
            assert self._state is not None  # prefill saves it of a memory that forgets nothing
            sequence.restore(context.llm.ctx, self._state)
        self._configure(context, method)
        return context

    def _read_by_blocks(self, method: Method) -> _Context:
        """Return a context that has read the prefix with the mass of a method."""
        context = self._reader = self._reader or self._open_reader()
        tokens = self._main.tokens
        known = context.tokens == tokens and self._read_mass == method.prompt_mass
        if not (known and sequence.cut(context.llm.ctx, len(tokens))):
            self._configure(context, method, enabled=True, prompt_mass=method.prompt_mass)
            context.tokens = []
            self._read(context, tokens)
            self._read_mass = method.prompt_mass
        self._configure(context, method)
        return context

    def _read(self, context: _Context, tokens: list[int], *, observe: bool = False) -> None:
        """Let a context hold a prefix: what it holds of it already, what the store has, and the rest read.

        Args:
            context: one that reads prefixes.
            tokens: the prefix.
            observe: read it whole, with attention that is not that of other readers.
        """
        ctx, n_batch = context.llm.ctx, context.llm.n_batch
        states = None if observe else context.states
        n_held = 0 if observe else n_common(context.tokens, tokens) // n_batch * n_batch
        if not (n_held and sequence.holds(ctx, n_held)):
            n_held = 0
        context.tokens, start = [], 0  # whatever happens now
        if states is not None:
            states.start(len(tokens))
            start = states.restore(np.array(tokens, np.int32), len(tokens), n_held + 1)
            self.n_restored += start
        # where nothing was restored, for whatever reason, what is held may be gone
        start = start or (n_held if sequence.holds(ctx, n_held) else 0)
        if not sequence.cut(ctx, start):
            start = 0
            sequence.clear(ctx)
        try:
            self._decode(context, tokens, start, states)
        finally:
            if states is not None:
                self.problems += [problem for problem in states.report.problems if problem not in self.problems]

    @staticmethod
    def _keep(states: ContextStates, tokens: np.ndarray, done: int) -> None:
        """Store what was read of a prefix: all in the end, and on the way what others may go on from."""
        n = len(tokens)
        if n < states.store.min_tokens or n <= states.n_stored:
            return
        if done == n or (states.has_tail and done == states.n_rows):
            if states.has_tail:
                states.store_tail(tokens[:done])
        if done == n:
            states.finish(tokens)
        else:
            states.checkpoint(tokens[:done], n)

    def _decode(self, context: _Context, tokens: list[int], start: int, states: ContextStates | None) -> None:
        """Read the tokens of a prefix from ``start`` on, and store them, if there is where."""
        ctx, done, array = context.llm.ctx, start, np.array(tokens, np.int32)
        context.tokens = tokens[:start]

        def progress(n: int, total: int) -> None:
            nonlocal done
            done = start + n
            context.tokens = tokens[:done]
            if n and states is not None:
                self._keep(states, array, done)
            self._read_progress(n, total)

        capi.set_prompt(ctx, True)  # its end, too, however short
        try:
            sequence.decode(ctx, tokens[start:], context.llm.n_batch, progress=progress)
        except BaseException as error:
            n_batch = 0 if isinstance(error, FasaError) else min(context.llm.n_batch, len(tokens) - done)
            n_held = sequence.settle(ctx, done, n_batch)
            done, context.tokens = max(done, n_held), tokens[:n_held]
            if states is not None:
                states.break_off(array[:n_held])
            raise
        finally:
            capi.set_prompt(ctx, False)
            self.n_read += done - start

    def _context(self, method: Method) -> _Context:
        """Contexts stay open as long as there is memory for the next one."""
        n_tip = method.n_tip
        if n_tip is None or n_tip == self._main.base.get("n_tip"):
            return self._main
        context = self._others.pop(n_tip, None)
        if context is None:
            llm = self._main.llm
            types = llm.context_params.type_k, llm.context_params.type_v
            needed = llama_cpp.llama_model_size(llm.model) + llm.n_ctx() * kv_bytes_per_cell(llm.model, *types)
            while self._others and memory.available().n_bytes < 1.5 * needed:
                self._others.pop(next(iter(self._others))).llm.close()
            context = self._open(fasa_n_tip=n_tip)
        self._others[n_tip] = context
        return context

    def _configure(self, context: _Context, method: Method, **more: Any) -> None:
        if not context.llm.fasa.available:
            if context.base:
                context.llm.fasa.configure(exact=False)
            return  # dense in any case
        base = {name: value for name, value in context.base.items() if name not in ("n_tip", "n_dense_layers")}
        context.llm.fasa.configure(**(base | method.run_time_settings(context.llm.n_ctx()) | more))

    def _run(self, context: _Context, tokens: list[int], method: Method, batch: int, mass: bool = False) -> Steps:
        llm = context.llm
        captures = (Capture.CELLS, *([Capture.MASS] if mass else [])) if method.sparse else ()
        n_layer = len(capi.layer_geometry(llm.model))
        logits = np.empty((len(tokens), llm.n_vocab()), np.float32)
        n_cells = n_lists = 0
        masses: list[list[np.ndarray]] = [[] for _ in range(n_layer)]
        threads = llm.n_threads, llm.n_threads_batch
        if method.name == "noise":
            # flash attention shares the cells of a single token out among the threads, not those of a batch
            n_threads = (llm.n_threads - 1 or 2) if batch == 1 else max(llm.n_threads, 2)
            llama_cpp.llama_set_n_threads(llm.ctx, n_threads, n_threads)
            batch = 1
        capi.set_capture(llm.ctx, *captures)
        llm.fasa.reset_stats()
        try:
            for start in range(0, len(tokens), batch):
                part = tokens[start : start + batch]
                sequence.decode(llm.ctx, part, n_logits=len(part))
                logits[start : start + len(part)] = sequence.logits(llm.ctx, len(part))
                for il in range(n_layer if captures else 0):
                    cells = capi.captured(llm.ctx, il, Capture.CELLS)
                    if cells is None:
                        continue
                    n_cells += int((cells >= 0).sum())
                    n_lists += cells.shape[0] * cells.shape[1]
                    if mass and (held := capi.captured(llm.ctx, il, Capture.MASS)) is not None:
                        masses[il].append(held)
        finally:
            capi.set_capture(llm.ctx)
            llama_cpp.llama_set_n_threads(llm.ctx, *threads)
        if method.sparse and not n_lists:
            reasons = ", ".join(llm.fasa.stats().n_layers_dense)
            raise FasaError(f"{method.name} ran dense in all layers ({reasons}), so there is nothing to compare")
        by_layer = [np.concatenate(parts) if parts else None for parts in masses] if mass and method.sparse else []
        return Steps(logits, n_cells / n_lists if n_lists else None, by_layer)
