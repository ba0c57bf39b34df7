"""The check that ends a conversion: what a profile is worth on text that it was not calibrated on.

The text that was calibrated on is the prefix, for the model has read it already and its keys are no easier to choose
from than others; the tokens after it are decoded as they stand there, densely and sparsely
(:mod:`fasa_edge.eval.runner`). Two figures judge the profile: the distance of the predictions to those of dense
attention, above what decoding token by token does to those (the engine adds in another order), and in the worst layer,
which a mean would hide, the attention that the chosen cells hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fasa_edge.errors import ConvertError
from fasa_edge.eval.methods import DENSE, Method
from fasa_edge.eval.runner import Runner, Steps
from fasa_edge.eval.text import log_softmax
from fasa_edge.io.gguf_header import GgufHeader
from fasa_edge.io.profile import encode_profile
from fasa_edge.io.temporary import work_folder
from fasa_edge.io.text import DEFAULT_NAME, read_text
from fasa_edge.runtime import capi, sequence
from fasa_edge.runtime.capi import Capture
from fasa_edge.runtime.llama import Llama
from fasa_edge.schema import Profile, to_metadata

import numpy as np

from .capture import Reading, first_tokens
from .ranges import clipped
from .rope import chunk_dims
from .stretch import Depth, planes, turn

MIN_MASS = 0.75
"""What the worst layer must recall of the attention. On the small real model at a budget of 256 the worst layer of the
paper's objective recalls .58, that of `lsq` .87."""

MAX_KL = {512: 0.008, 0: 0.022}
"""From which budget on a profile may cost how much, in nats above the noise: about twice what choosing by all chunks
costs the small real model, .010 at 256 and .003 at 512."""

N_PREFIX = 2048
N_TOKENS = 128
N_NOISE = 32
"""Tokens decoded one by one: a whole window of them would take longer than all else that the check decodes."""


@dataclass(frozen=True)
class Check:
    """What a profile was found to be worth.

    Attributes:
        text: name of the held-out text.
        n_prefix: its tokens before those decoded.
        n_tokens: decoded.
        budget: cells attended to: that of the profile, or an eighth of the prefix where twice the budget exceeds the
            prefix, since nearly all cells would show nothing.
        n_tip: chunks scored per KV head.
        n_chunk: the most that could be.
        n_dense_layers: first layers that stayed dense.
        kl: mean KL divergence to dense attention, in nats.
        kl_error: its standard error over the tokens, taken as if they were independent, which tokens of one window are
            not: the true one may be larger.
        noise: mean KL divergence of dense attention, its first tokens decoded one by one, to the same decoded at once,
            in nats.
        noise_error: its standard error, likewise.
        mass: by layer, the mean share of the attention that the chosen cells hold; None for a layer that ran dense.
        clipped: by layer, the share of the values of keys, turned to positions all over the calibrated context, that
            lie outside of the range of their tips; None for a layer without chunks or with a sliding window.
    """

    text: str
    n_prefix: int
    n_tokens: int
    budget: int
    n_tip: int
    n_chunk: int
    n_dense_layers: int
    kl: float
    kl_error: float
    noise: float
    noise_error: float
    mass: list[float | None]
    clipped: list[float | None]

    @property
    def clipped_share(self) -> float | None:
        """The mean of ``clipped`` over the layers that have one; None if none has."""
        shares = [share for share in self.clipped if share is not None]
        return float(np.float32(np.mean(shares))) if shares else None  # as a profile holds it

    @property
    def worst_layer(self) -> int:
        """The sparse layer that recalls least."""
        return self._worst[1]

    @property
    def _worst(self) -> tuple[float, int]:
        return min((mass, il) for il, mass in enumerate(self.mass) if mass is not None)

    @property
    def passed(self) -> bool:
        """Whether both gates hold."""
        return self._worst[0] >= MIN_MASS and self.kl - self.noise <= self.max_kl

    @property
    def passed_clearly(self) -> bool:
        """Whether both hold with a standard error to spare: of many ``n_tip`` tried, some pass by luck."""
        return self.passed and self.kl - self.noise + math.hypot(self.kl_error, self.noise_error) <= self.max_kl

    @property
    def max_kl(self) -> float:
        """The gate of the KL divergence above the noise, in nats."""
        return next(limit for least, limit in MAX_KL.items() if self.budget >= least)

    @property
    def warning(self) -> str | None:
        """What falls short of which gate, and the remedy; None if nothing does."""
        if self.passed:
            return None
        short, worst = [], self._worst[0]
        if not worst >= MIN_MASS:
            short.append(f"layer {self.worst_layer} recalls {worst:.2f} of the attention mass, less than {MIN_MASS}")
        if not self.kl - self.noise <= self.max_kl:
            short.append(f"KL {self.kl - self.noise:.3f} above the noise exceeds {self.max_kl} nats")
        larger = f"a larger --n-tip (now {self.n_tip} of {self.n_chunk}) or " if self.n_tip < self.n_chunk else ""
        return (
            f"{' and '.join(short)} at budget {self.budget}: convert again with {larger}more --n-dense-layers "
            f"(now {self.n_dense_layers}), or run with a larger --budget"
        )


def check_profile(
    header: GgufHeader,
    profile: Profile,
    content: str,
    n_ctx: int,
    reading: Reading | None = None,
    *,
    auto: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    read_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Check:
    """Measures a profile, with its own ``n_tip`` or to find one.

    Args:
        header: of the model, a GGUF on this machine.
        profile: its profile, not yet written.
        content: the calibration text; what comes after the calibrated tokens is held out. The documentation of
            Python takes its place where that is too short.
        n_ctx: the context that the model was trained for, in tokens.
        reading: of the calibration; None: it is read again.
        auto: look for the smallest even ``n_tip`` that passes clearly, by bisection.
        progress: called with the measurements done and those to do at most.
        read_progress: called with the tokens of the prefix that are read and those to read.
        options: ``n_threads``, ``n_gpu_layers`` and the like, of :class:`fasa_edge.Llama`.

    Returns:
        The check of ``profile``, or with ``auto`` of the ``n_tip`` found; if none passes so, of all chunks.

    Raises:
        FasaError: it cannot be measured: too little text or memory, or no layer runs sparse.
    """
    n_chunk = min(chunks.shape[1] for chunks in profile.chunks if chunks.size)
    n_tips = [*range(2, n_chunk, 2), n_chunk] if auto else [profile.n_tip]
    n_prefix = min(max(N_PREFIX, profile.calibration.tokens), n_ctx - N_TOKENS)
    budget = _budget(profile, n_prefix)
    n_most = len(n_tips).bit_length()  # measurements
    progress(0, n_most)
    with work_folder("fasa-edge") as folder:
        path = folder / "profile.gguf"
        first = replace(profile, n_tip=n_tips[len(n_tips) // 2])  # of the context that reads the prefix
        path.write_bytes(encode_profile(header, to_metadata(first)))
        n_cells = n_prefix + N_TOKENS
        with Runner(
            str(header.path), n_ctx=n_cells, read_progress=read_progress, fasa_profile=path, **options
        ) as runner:
            name, tokens, held_out = _text(runner.llm, profile, content, n_prefix)
            if reading is not None and len(reading.tokens) <= n_cells:
                runner.resume(reading.tokens, reading.state)
            runner.prefill(tokens)  # what is not read yet
            shares = _clipped(runner.llm, profile, n_prefix, held_out)
            n_done = 0
            dense = runner.decode(held_out, DENSE, batch=N_TOKENS)  # at once: a fraction of the time
            noise = runner.decode(held_out[:N_NOISE], Method("noise"))
            noise_kl, noise_error = _mean(_kl(dense, noise))

            def measure(n_tip: int) -> Check:
                nonlocal n_done
                steps = runner.decode(held_out, Method("fasa", budget, n_tip), mass=True)
                progress(n_done := n_done + 1, n_most)
                kl, kl_error = _mean(_kl(dense, steps))
                return Check(
                    text=name,
                    n_prefix=n_prefix,
                    n_tokens=N_TOKENS,
                    budget=budget,
                    n_tip=n_tip,
                    n_chunk=n_chunk,
                    n_dense_layers=profile.config.n_dense_layers,
                    kl=kl,
                    kl_error=kl_error,
                    noise=noise_kl,
                    noise_error=noise_error,
                    mass=[None if layer is None else float(layer.mean()) for layer in steps.mass],
                    clipped=[None if layer is None else float(layer[:, :n_tip].mean()) for layer in shares],
                )

            found = smallest_passing(n_tips, measure)
    progress(n_most, n_most)  # bisection may need fewer
    return found


def _mean(x: np.ndarray) -> tuple[float, float]:
    """Returns the mean of ``[n]`` and its standard error."""
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))


def smallest_passing(n_tips: Sequence[int], measure: Callable[[int], Check]) -> Check:
    """Bisects rising numbers of chunks, at least one, for the least that passes clearly.

    Returns:
        Its check; that of the last, if none passes clearly.
    """
    best: Check | None = None
    low, high = 0, len(n_tips)
    while low < high:
        middle = (low + high) // 2
        check = measure(n_tips[middle])
        if check.passed_clearly:
            best, high = check, middle
        else:
            low = middle + 1
    return best or check


def _budget(profile: Profile, n_prefix: int) -> int:
    config = profile.config
    if 2 * config.budget <= n_prefix:
        return config.budget
    budget = max(n_prefix // 8, config.n_sink + config.n_recent)
    if 2 * budget > n_prefix:
        raise ConvertError(
            f"n_sink + n_recent = {config.n_sink + config.n_recent} is more than half of the {n_prefix} tokens that it "
            "would attend to, so that any choice of the rest would do"
        )
    return budget


def _text(llm: Llama, profile: Profile, content: str, n_prefix: int) -> tuple[str, list[int], list[int]]:
    """Name of a text, its first ``n_prefix`` tokens, and ``N_TOKENS`` more that the profile was not calibrated on."""
    name, n_calibrated = profile.calibration.text, profile.calibration.tokens
    n = max(n_prefix, n_calibrated) + N_TOKENS
    tokens = first_tokens(llm, content, n)
    if len(tokens) < n and name != DEFAULT_NAME:
        name, content = read_text()
        tokens = first_tokens(llm, content, n)
    if len(tokens) < n:
        raise ConvertError(f"{name} has {len(tokens)} tokens and {n} are needed, {N_TOKENS} of them not calibrated on")
    return name, tokens[:n_prefix], tokens[-N_TOKENS:]


def _clipped(llm: Llama, profile: Profile, n_past: int, tokens: list[int]) -> list[np.ndarray | None]:
    """Measures by layer the share of each ranked chunk's values that tips clip, of keys after ``n_past`` tokens.

    Returns:
        float64 ``[n_head_kv, n_chunk]``; None as in :class:`Check`. The tokens are left in the context.
    """
    capi.set_capture(llm.ctx, Capture.K)
    sequence.decode(llm.ctx, tokens, n_logits=1)
    res: list[np.ndarray | None] = []
    for il, layer in enumerate(capi.layer_geometry(llm.model)):
        chunks = profile.chunks[il]
        if not chunks.size or layer.is_swa or (k := capi.captured(llm.ctx, il, Capture.K)) is None:
            res.append(None)
            continue
        n_chunk = chunks.shape[1]
        depth = Depth(profile.calibration.context, capi.rope_angles(llm.ctx, il, n_chunk, profile.calibration.context))
        k = planes(k, chunk_dims(layer.n_embd_head, layer.n_rot, layer.rope_type))
        k = turn(k, capi.rope_angles(llm.ctx, il, n_chunk), -np.arange(n_past, n_past + len(k)))
        k = np.take_along_axis(turn(k, depth.angles, depth.spread(len(k))), chunks[None], 2)
        values = np.stack([k.real, k.imag], -1)
        res.append(clipped(values, profile.centre[il], profile.step[il]).mean((0, 3)))
    return res


def _kl(dense: Steps, other: Steps) -> np.ndarray:
    """Computes KL(dense || other) in nats, of as many tokens as both decoded, float64 or float32 [n_tokens]."""
    rows = (map(log_softmax, logits) for logits in zip(dense.logits, other.logits, strict=False))  # they are long
    return np.array([(np.exp(p) * (p - q)).sum() for p, q in rows])
