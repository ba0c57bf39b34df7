"""``fasa_edge.Llama``: the class of llama-cpp-python, decoding sparsely where the model carries a FASA profile."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any, NoReturn

from fasa_edge.config import INT32_MAX, SETTINGS, FasaConfig, Setting
from fasa_edge.errors import AdapterError, ContextFullError, FasaError, ModelError, SchemaError
from fasa_edge.runtime import capi, capi_eval, memory, sequence
from fasa_edge.runtime.fit import N_CTX_STEP, automatic_n_ctx
from fasa_edge.runtime.identity import ROPE_ARGUMENTS as ROPE_ARGUMENTS
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import error_log, quiet_log
from fasa_edge.runtime.store import DocumentCache, DocumentStore

import numpy as np
from llama_cpp.llama_cache import BaseLlamaCache
from llama_cpp.llama_speculative import LlamaDraftModel

_ARGUMENTS = {**SETTINGS, "policy": Setting("policy", str, "Who chooses, for evaluation.")}
_N_BATCH = 512  # of llama_cpp.Llama
_CONFIGURING = Lock()  # settings are read, changed and written: two threads would undo one another's


@dataclass(frozen=True)
class FasaStats:
    """Counters of a context since it was made or since :meth:`Fasa.reset_stats`.

    Attributes:
        n_steps_prompt: micro-batches that were prompts, dense unless ``prompt_mass`` says otherwise.
        n_steps_decode: all others, of at most ``max_batch`` tokens per sequence.
        n_layers_sparse: layers that ran sparse, summed over the steps.
        n_layers_dense: the same for all other layers, by reason (:data:`fasa_edge.runtime.capi.REASONS`).
        n_layers_exact: of these, the layers that attended with FASA's kernel (``exact``).
        bytes_kv: bytes of K and V that the attention of decoded tokens read, in sparse and dense layers.
        bytes_tips: bytes of the tip cache that they read.
        bytes_kv_dense: bytes of K and V that they would have read, had every layer run dense.
        tips_size: bytes of memory that the tip cache takes.
        min_ctx: cells from which on layers run sparse: as set, or what 0 means for this model where it runs; 0: none.
        settings: settings in force; empty without a profile or ``exact``.
        ineffective_overrides: ``fasa.*`` overrides that no setting took, and why.
    """

    n_steps_prompt: int
    n_steps_decode: int
    n_layers_sparse: int
    n_layers_dense: dict[str, int]
    n_layers_exact: int
    bytes_kv: int
    bytes_tips: int
    bytes_kv_dense: int
    tips_size: int
    min_ctx: int
    settings: dict[str, int | bool | str]
    ineffective_overrides: list[str]

    @property
    def read_ratio(self) -> float:
        """Bytes read by attention over the bytes that dense attention would have read; 1 before any decode step."""
        return (self.bytes_kv + self.bytes_tips) / self.bytes_kv_dense if self.bytes_kv_dense else 1.0


class Fasa:
    """The FASA side of one loaded model: settings that can change between steps, and counters.

    Any thread may use it while another one generates. Every member raises :class:`FasaError` once the model is closed.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    @property
    def available(self) -> bool:
        """Whether the model carries a profile; without one everything runs dense."""
        return capi.has_profile(self._llm.model)

    @property
    def settings(self) -> dict[str, int | bool | str]:
        """Settings in force from the next step on, by name; empty without a profile or ``fasa_exact=True`` at load."""
        params = capi.get_params(self._llm.ctx)
        return params.as_dict() if params else {}

    def configure(self, **settings: int | bool | str) -> None:
        """Change settings from the next step on: ``llm.fasa.configure(budget=1024)``, ``configure(enabled=False)``.

        Args:
            settings: fields of :class:`fasa_edge.config.FasaConfig`, but for ``n_dense_layers``, which like ``n_tip``
                is fixed when the model is loaded; and ``policy``, who is to choose the cells in place of FASA, for
                evaluation: one of :func:`fasa_edge.runtime.capi_eval.policies`.

        Raises:
            FasaError: the model has no profile (``exact`` alone does with ``fasa_exact=True`` at load), or a field is
                unknown or fixed.
            SchemaError: a value is out of range.
            LibraryError: the policy is of the library for evaluation, which is not there.
        """
        with _CONFIGURING:
            params = capi.get_params(self._llm.ctx)
            alone = settings.keys() == {"exact"}
            if params is None or not (self.available or alone):
                remedy = "load it with fasa_exact=True" if alone else "make one with `fasa-edge convert`"
                raise FasaError(f"{self._llm.model_path} has no FASA profile: {remedy}")
            for name, value in settings.items():
                if name not in _ARGUMENTS:
                    raise FasaError(f"{name} is no setting of FASA: choose from {', '.join(_ARGUMENTS)}")
                if _ARGUMENTS[name].is_fixed:
                    raise FasaError(f"{name} is fixed when the model is loaded: pass fasa_{name}= to fasa_edge.Llama")
                _ARGUMENTS[name].check(value)
            wanted: dict[str, Any] = {**params.as_dict(), **settings}
            FasaConfig(**{field.name: wanted[field.name] for field in fields(FasaConfig)})
            capi.set_params(self._llm.ctx, capi.Params(**wanted))
            if isinstance(self._llm, Llama):
                self._llm._fasa_configured |= settings

    def stats(self) -> FasaStats:
        """Return the counters and the settings in force."""
        stats = capi.get_stats(self._llm.ctx)
        n_layers = dict(zip((name for name, _ in capi.REASONS), stats.n_layers, strict=True))
        return FasaStats(
            n_steps_prompt=stats.n_steps_prompt,
            n_steps_decode=stats.n_steps_decode,
            n_layers_sparse=n_layers.pop("none"),
            n_layers_dense={name: n for name, n in n_layers.items() if n},
            n_layers_exact=stats.n_layers_exact,
            bytes_kv=stats.bytes_kv,
            bytes_tips=stats.bytes_tips,
            bytes_kv_dense=stats.bytes_kv_dense,
            tips_size=capi.tips_size(self._llm.ctx),
            min_ctx=capi.min_ctx(self._llm.ctx),
            settings=self.settings,
            ineffective_overrides=capi.override_report(self._llm.model),
        )

    def reset_stats(self) -> None:
        """Set the counters to zero."""
        capi.reset_stats(self._llm.ctx)


class _Closed:
    """What stands in place of the model and the context of a ``Llama`` that is closed."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path

    def __getattr__(self, name: str) -> NoReturn:
        raise FasaError(f"{self._model_path} is closed: load it again")


class _Drafts(LlamaDraftModel):
    """Drafts that fit into a batch beside the token before them: of what a batch more holds, logits are not kept."""

    def __init__(self, model: LlamaDraftModel, n_batch: int) -> None:
        self.model = model
        self._n_max = n_batch - 1

    def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
        return self.model(input_ids, **kwargs)[: self._n_max]


def _exceeded(error: Exception, lines: Sequence[str]) -> list[str]:
    """What of memory was too little for a model, if that is why it did not load.

    Args:
        error: that ended it.
        lines: errors that llama.cpp logged.
    """
    limit = memory.limit_of_failure()
    is_refused = limit.is_virtual and any("alloc" in line for line in lines)  # bad_alloc, "failed to allocate ..."
    return [f"{limit}, in bytes"] if is_refused or isinstance(error, MemoryError) else []


class Llama(llama_cpp.Llama):
    """``llama_cpp.Llama`` with FASA: the same constructor and methods, plus ``fasa_*`` settings and :attr:`fasa`.

    Two defaults differ: flash attention is on, because FASA needs it, and ``n_ctx`` is the model's own.

    Args:
        model_path: a GGUF file; one without a FASA profile runs dense.
        n_ctx: cells of the KV cache, rounded up to a multiple of 256 as llama.cpp does; 0: what the model was trained
            for, or less where memory does not hold its KV cache: half of what is free beside the weights on the host,
            be it the machine's or what a container's limit or ``ulimit`` leaves, and a GPU's where layers are on it.
        flash_attn: must stay on.
        kv_overrides: as in ``llama_cpp.Llama``; ``fasa.*`` keys are settings too, and ``fasa_*`` arguments win.
        logits_all: keep the logits of all tokens, for logprobs; n_ctx x n_vocab floats, which an automatic ``n_ctx``
            counts. On with a draft model.
        draft_model: proposes tokens, as ``LlamaPromptLookupDecoding``; up to ``max_batch`` - 1 at a time are checked
            sparsely, and more than ``n_batch`` - 1 are cut off.
        type_k: ``enum ggml_type`` of cached keys; None for f16.
        type_v: the same for values.
        progress: called while a prompt is read with the tokens evaluated and those to evaluate, what the cache holds
            not among them: before the first batch and after each. What it raises ends the evaluation. Kept as
            :attr:`progress`, which may change; copies have none.
        fasa_profile: a file made by ``fasa-edge convert --profile``, or another quantization that is annotated; its
            profile replaces that of the model, even a damaged one.
        cache: what was read is kept there, also for a later process, see :meth:`set_cache`.
        kwargs: ``fasa_budget``, ``fasa_n_sink`` and so on, a setting each of :data:`fasa_edge.config.SETTINGS`, in
            place of the default stored in the model; ``fasa_exact`` is the one that needs no profile. ``fasa_policy``,
            see :meth:`Fasa.configure`. And every other argument of ``llama_cpp.Llama``.

    Raises:
        FasaError: flash attention is off, or a ``fasa_*`` argument is unknown.
        SchemaError: a ``fasa_*`` argument has the wrong type or is out of range, or ``n_ctx`` is negative or too large.
        LibraryError: ``fasa_policy`` is of the library for evaluation, which is not there.
        AdapterError: the adapter of ``lora_path`` cannot be loaded.
        ModelError: llama.cpp cannot load the model, memory does not suffice, or the profile is damaged or of another
            model; the message holds what it logged.
    """

    progress: Callable[[int, int], None] | None = None
    n_tokens: int
    is_full = False
    """Whether the latest :meth:`generate` ended because the context was full."""
    _starts_prompt = False  # what is evaluated next
    documents: DocumentCache | None = None
    """The model's part of the store that was given as its cache; its ``report`` tells what came of a prompt."""

    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int = 0,
        flash_attn: bool = True,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        logits_all: bool = False,
        draft_model: LlamaDraftModel | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        fasa_profile: str | os.PathLike[str] | None = None,
        cache: BaseLlamaCache | DocumentStore | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # the parent's __del__ closes it, also if construction ends here
        if not flash_attn:
            raise FasaError(
                "flash_attn=False: FASA reads V row by row, which only the flash attention layout allows; leave "
                "flash_attn on (fasa_enabled=False switches FASA off), or use llama_cpp.Llama"
            )
        if not 0 <= n_ctx <= INT32_MAX - N_CTX_STEP:
            raise SchemaError(
                f"n_ctx = {n_ctx} is out of range: choose 0, the model's own, to {INT32_MAX - N_CTX_STEP}"
            )
        settings = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("fasa_")}
        for name, value in settings.items():
            setting = _ARGUMENTS.get(name.removeprefix("fasa_"))
            if setting is None:
                raise FasaError(
                    f"{name} is no argument of fasa_edge.Llama: choose from fasa_profile, "
                    f"{', '.join('fasa_' + s for s in _ARGUMENTS)}"
                )
            if value is not None:
                setting.check(value, name)
                if name == "fasa_policy":
                    capi_eval.policy_number(value)
        if kwargs.get("lora_base") is not None:
            warnings.warn("lora_base has no effect: llama.cpp adds adapters to the model as it is", stacklevel=2)
        # The parent keeps the logits of all tokens for drafts, but without this makes room for one batch of them only.
        logits_all = logits_all or draft_model is not None
        self.progress = progress
        self.sampled: list[int] = []
        self._fasa_profile = fasa_profile
        self._fasa_configured: dict[str, int | bool | str] = {}  # since then, for copies
        self._fasa_sizes = kwargs.get("n_batch", _N_BATCH), kwargs.get("n_ubatch", _N_BATCH), logits_all
        overrides = dict(kv_overrides or {})
        overrides |= {
            f"fasa.{name.removeprefix('fasa_')}": value for name, value in settings.items() if value is not None
        }
        if fasa_profile is not None:
            overrides["fasa.version"] = 0  # the model's own is ignored, whatever its state
        if overrides.get("fasa.policy", capi_eval.FASA) != capi_eval.FASA:
            capi_eval.policies()  # before the model: without their library, the override would have no effect

        with error_log() as errors:
            try:
                super().__init__(
                    model_path,
                    n_ctx=-(-n_ctx // N_CTX_STEP) * N_CTX_STEP,
                    flash_attn=True,
                    kv_overrides=overrides or None,
                    logits_all=logits_all,
                    draft_model=draft_model,
                    type_k=type_k,
                    type_v=type_v,
                    **kwargs,
                )
                vars(self._model).pop("n_ctx_train", None)
                if self.lora_path and not self._lora_adapter:  # the parent compares a null pointer with None
                    raise RuntimeError(f"Failed to load LoRA adapter: {self.lora_path}")
            except (ValueError, RuntimeError, MemoryError) as error:
                is_adapter = isinstance(error, RuntimeError) and "LoRA" in str(error)
                reason = "; ".join([str(error), *dict.fromkeys(errors), *_exceeded(error, errors)])
                raise (AdapterError if is_adapter else ModelError)(reason) from error

        if draft_model is not None:
            self.draft_model = _Drafts(draft_model, self.n_batch)

        alone = ("fasa.exact",) if isinstance(overrides.get("fasa.exact"), bool) else ()  # needs no profile
        ignored = [key for key in overrides if key.startswith("fasa.") and key not in alone]
        reason = f"{model_path} has no FASA profile"
        if overrides.get("fasa.version") == 0:  # as documented, whether there was something to switch off or not
            ignored.remove("fasa.version")
            reason = "fasa.version = 0 switches FASA off"
        if not self.fasa.available and ignored:
            warnings.warn(f"{reason}, so {', '.join(ignored)} has no effect", stacklevel=2)
        for line in capi.override_report(self.model) if self.fasa.available else ():
            warnings.warn(f"override without effect: {line}", stacklevel=2)
        self.set_cache(cache)

    def set_cache(self, cache: BaseLlamaCache | DocumentStore | str | os.PathLike[str] | None) -> None:
        """Keep what is read, for prompts that begin alike.

        Args:
            cache: a folder, or a :class:`DocumentStore` with settings: on disk, for other processes, too, see
                :attr:`documents`. Or a cache of llama-cpp-python, which keeps whole contexts after each answer. None:
                neither.

        Raises:
            FasaError: the folder cannot be made, or a file of the model not be read.
        """
        if isinstance(cache, str | os.PathLike):
            cache = DocumentStore(cache)
        self.documents = DocumentCache(cache, self, self._fasa_profile) if isinstance(cache, DocumentStore) else None
        super().set_cache(None if self.documents else cache)

    @property
    def fasa(self) -> Fasa:
        """The settings that can change between steps, and the counters."""
        return Fasa(self)  # kept, it would be a cycle, and the model stay in memory until that is collected

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """Generate as the parent does. What the cache lacks of a prompt is read as one, however short it is.

        Where the context is full it ends with the token that ends a text, see :attr:`is_full`: completions go on beyond
        ``max_tokens`` to the end of a character.
        """
        bound = inspect.signature(super().generate).bind(tokens, *args, **kwargs)
        self._starts_prompt = bound.arguments.get("reset", True)
        n_held = self.n_tokens
        if self._starts_prompt and self.documents is not None:
            prompt = bound.arguments["tokens"] = list(tokens)
            if self._has_logits_of(prompt):
                self.documents.touch(prompt)
            else:
                n_held = self.documents.restore(prompt)
                bound.arguments |= {"tokens": prompt[n_held:], "reset": False}
        elif self._starts_prompt and sequence.is_recurrent(self.ctx) and 0 < n_held < len(tokens):
            # the parent would have it forget nothing, take the refusal for a loss, and read all again
            if list(tokens[:n_held]) == self.input_ids[:n_held].tolist():
                bound.arguments |= {"tokens": list(tokens[n_held:]), "reset": False}
        self.sampled, self.is_full = [], False
        generator, sent = super().generate(*bound.args, **bound.kwargs), None
        try:
            while True:
                self.sampled.append(token := generator.send(sent))
                sent = yield token
        except StopIteration:
            return
        except ContextFullError:
            if not self.sampled:  # the prompt has no room
                raise
        self.is_full = True
        if (end := self.token_eos()) >= 0:
            yield end

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Complete as the parent does, which takes for the model's end what is the context's."""
        for part in super()._create_completion(*args, **kwargs):
            for choice in part["choices"] if self.is_full else ():
                choice["finish_reason"] = choice["finish_reason"] and "length"
            yield part

    def _has_logits_of(self, prompt: list[int]) -> bool:
        """Whether the prompt is what was evaluated last."""
        return not self._requires_eval and self._input_ids.tolist() == prompt

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate as the parent does. More than ``max_batch`` tokens are a prompt in all of their batches.

        If it ends before all are evaluated, by whatever exception, :attr:`n_tokens` are those that the memory holds,
        with the batch that was being decoded (but for ``logits_all``: its logits would be missing).

        Raises:
            ContextFullError: they exceed the context; none is evaluated.
        """
        if (n_tokens := self.n_tokens + len(tokens)) > self._n_ctx:
            raise ContextFullError(f"{n_tokens} tokens exceed the context of {self._n_ctx}: use fewer, or raise n_ctx")
        starts_prompt, self._starts_prompt = self._starts_prompt, False
        params = capi.get_params(self.ctx)
        n_decoded = params.max_batch if params else FasaConfig.max_batch
        is_prompt = starts_prompt or len(tokens) > n_decoded
        report = self.progress if is_prompt and len(tokens) and self.progress else lambda done, total: None
        capi.set_prompt(self.ctx, is_prompt)
        if self.documents is not None and not is_prompt:
            self.documents.decoded(len(tokens))
        batch: Sequence[int] = []
        try:
            done = 0
            report(done, len(tokens))
            for part in self.documents.read(tokens) if starts_prompt and self.documents is not None else [tokens]:
                for start in range(0, max(len(part), 1), self.n_batch):
                    batch = part[start : start + self.n_batch]
                    super().eval(batch)
                    done += len(batch)
                    report(done, len(tokens))
        except BaseException as error:
            self._requires_eval = True
            is_lost = self._logits_all or isinstance(error, RuntimeError)  # as the parent has what llama_decode returns
            held, self.n_tokens = self.n_tokens, sequence.settle(self.ctx, self.n_tokens, 0 if is_lost else len(batch))
            if self.n_tokens > held:
                self.input_ids[held : self.n_tokens] = batch
            if starts_prompt and self.documents is not None:
                self.documents.break_off()
            raise
        finally:
            capi.set_prompt(self.ctx, False)

    def remove(self, start: int, end: int) -> bool:
        """Forget the tokens from ``start`` to before ``end`` of those evaluated, and move up what follows them.

        Returns:
            False: a memory that cannot (recurrent, hybrid, M-RoPE, sliding windows of their own size), and did not.
        """
        if not sequence.remove(self.ctx, start, end):
            return False
        held, self.n_tokens = self.n_tokens, self.n_tokens - (end - start)
        for rows in (self.input_ids, self.scores) if self._logits_all else (self.input_ids,):
            rows[start : self.n_tokens] = rows[end:held].copy()
        self._requires_eval = True
        if self.documents is not None:
            self.documents.spoil(start)
        return True

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Hold what a saved state does, as the parent does; nobody knows how that was computed, so it is not stored."""
        super().load_state(state)
        if self.documents is not None:
            self.documents.spoil(0)

    def close(self) -> None:
        """Free the model; what needs it raises :class:`FasaError` from then on."""
        super().close()
        if "_ctx" not in vars(self):  # construction ended before
            return
        # The parent would go on to give the library null pointers and a vocabulary that is freed.
        closed = _Closed(self.model_path)
        if getattr(self.tokenizer_, "_model", None) is self._model:
            self.tokenizer_._model = closed
        self.__dict__.update(_model=closed, _ctx=closed)  # not through the setter, which loads the profile

    @property
    def _model(self) -> llama_cpp._internals.LlamaModel:
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: llama_cpp._internals.LlamaModel) -> None:
        """The parent assigns it when the model is loaded and has no context yet: time for a profile and for n_ctx."""
        self.__dict__["_model"] = model
        if self._fasa_profile is not None:
            with contextlib.nullcontext() if self.verbose else quiet_log():
                loaded = capi.load_profile(model.model, self._fasa_profile, self.model_params.kv_overrides)
            if not loaded:
                raise ValueError(f"Failed to load FASA profile: {self._fasa_profile}")
        if self.context_params.n_ctx == 0:
            params = self.model_params, self.context_params
            n_ctx = automatic_n_ctx(self.model_path, self._fasa_profile, *params, *self._fasa_sizes)
            model.n_ctx_train = lambda: n_ctx  # which the parent asks for next

    def __getstate__(self) -> dict[str, Any]:
        drafts = self.draft_model.model if isinstance(self.draft_model, _Drafts) else self.draft_model
        ours = {"fasa_profile": self._fasa_profile, "draft_model": drafts, "fasa_configured": self._fasa_configured}
        ours["cache"] = self.documents and self.documents.store
        return super().__getstate__() | ours

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        configured = state.pop("fasa_configured")
        super().__setstate__(state)
        if configured:
            self.fasa.configure(**configured)


def kv_bytes_per_cell(model: int, type_k: int, type_v: int) -> float:
    """Compute the bytes of a cell of a model's (``llama_model *``) KV cache, given ``enum ggml_type`` of K and V."""
    # a layer without KV heads may keep one row for all of them (MLA)
    width = sum(max(layer.n_head_kv, 1) * layer.n_embd_head for layer in capi.layer_geometry(model))
    return width * (capi.bytes_per_element(type_k) + capi.bytes_per_element(type_v))
