"""How much worse a text is predicted: perplexity, KL divergence and agreement to dense, attention mass.

A prefix of the text is read by dense attention; the tokens after it are decoded as they stand in the text (teacher
forcing), by each method. One pass gives all measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fasa_edge.errors import FasaError
from fasa_edge.eval.methods import DENSE, Method
from fasa_edge.eval.results import Results, hash_tokens
from fasa_edge.eval.runner import Runner, Steps

import numpy as np

TASKS = ("ppl", "kld", "mass")
"""Perplexity, distance to dense attention, recall of attention mass."""

_PERCENTILE = 99
_FIELDS = ("nll", "kl", "agree", "kept", "mass")  # of a value in the results


@dataclass(frozen=True)
class Block:
    """A window of a text.

    Attributes:
        text: name of the text.
        start: its first token in the text.
        n_prefix: tokens that are read by dense attention.
        tokens: these, those that are decoded, and the one after them.
    """

    text: str
    start: int
    n_prefix: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class TextCell:
    """What one method made of one block.

    Attributes:
        block: the window.
        method: how it was decoded.
        nll: negative log likelihood of each next token in nats, float64 [n_tokens].
        kl: KL(dense || method) of each in nats, float64 [n_tokens].
        agree: whether both find the same token likeliest, bool [n_tokens].
        kept: cells attended to, mean over sparse layers, heads and tokens; None if no layer ran sparse.
        mass: recall of attention mass by layer and head, mean over the tokens; None for a dense layer. Empty if it was
            not asked for.
    """

    block: Block
    method: Method
    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    kept: float | None
    mass: list[list[float] | None]


@dataclass(frozen=True)
class TextRow:
    """One method at one length of the prefix, over all blocks of all texts (of one, if it is named).

    Attributes:
        n_prefix: tokens before those decoded.
        text: name of the text; None for all of them.
        method: of :data:`fasa_edge.eval.methods.METHODS`.
        budget: cells that it may attend to; None for all.
        n_tip: chunks scored; None for the model's own, or none.
        settings: further settings.
        n_blocks: windows.
        n_tokens: decoded in all of them.
        kept: cells really attended to, mean over sparse layers, heads and tokens; None if no layer ran sparse.
        ppl: perplexity.
        ppl_ratio: over that of dense.
        kl: mean KL(dense || method) in nats.
        kl_stderr: standard error of it, from the means of the blocks; None for one block.
        kl_p99: 99th percentile over the tokens.
        top1: share of tokens where both find the same next token likeliest.
        mass: mean recall of attention mass over the sparse layers; None if it was not asked for.
        mass_worst: that of the worst layer.
        mass_worst_layer: which one.
        mass_by_layer: recall by layer and head.
    """

    n_prefix: int
    text: str | None
    method: str
    budget: int | None
    n_tip: int | None
    settings: dict[str, Any]
    n_blocks: int
    n_tokens: int
    kept: float | None
    ppl: float
    ppl_ratio: float
    kl: float
    kl_stderr: float | None
    kl_p99: float
    top1: float
    mass: float | None
    mass_worst: float | None
    mass_worst_layer: int | None
    mass_by_layer: list[list[float] | None]

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


def blocks_of(
    name: str, tokens: Sequence[int], prefixes: Sequence[int], n_blocks: int, n_tokens: int, bos: int | None = None
) -> list[Block]:
    """Spread windows evenly over a text, for each length of the prefix.

    Args:
        name: of the text.
        tokens: of the text, without a token that begins it.
        prefixes: lengths.
        n_blocks: windows for each.
        n_tokens: decoded in each.
        bos: token that begins every window, if the model wants one.

    Raises:
        FasaError: the text is too short, also for as many windows without a token that is decoded twice, or a number
            is out of range.
    """
    if min(prefixes) < 1 or n_blocks < 1 or n_tokens < 1:
        raise FasaError(f"prefixes {list(prefixes)}, {n_blocks} blocks, {n_tokens} tokens: use positive numbers")
    head = () if bos is None else (bos,)
    res = []
    for n_prefix in prefixes:
        n_window = n_prefix + n_tokens + 1 - len(head)
        if n_window > len(tokens):
            raise FasaError(
                f"the text {name} has {len(tokens)} tokens, and a prefix of {n_prefix} with {n_tokens} after it takes "
                f"{n_window}: give a longer text, or lower the prefix"
            )
        most = (len(tokens) - n_window) // n_tokens + 1
        if n_blocks > most:
            raise FasaError(
                f"{n_blocks} blocks of the text {name}, {len(tokens)} tokens, with a prefix of {n_prefix} would decode "
                f"tokens twice: lower --blocks to {most}, or give a longer text"
            )
        for start in np.linspace(0, len(tokens) - n_window, n_blocks).astype(int).tolist():
            res.append(Block(name, start, n_prefix, (*head, *tokens[start : start + n_window])))
    return res


def run(
    runner: Runner,
    blocks: Sequence[Block],
    methods: Sequence[Method],
    batch: int,
    *,
    mass: bool = False,
    results: Results | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[TextCell]:
    """Measure all methods on all blocks; what the results hold already is not run again.

    Args:
        runner: the model.
        blocks: from :func:`blocks_of`.
        methods: the first is dense.
        batch: tokens decoded at once.
        mass: whether to measure attention mass, too.
        results: from former runs, and for later ones.
        key: what they depend on besides (:func:`fasa_edge.eval.results.identity`).
        progress: called with the cells done and those to do.

    Yields:
        A cell for each block and method.

    Raises:
        FasaError: the context is too small, or llama.cpp failed.
    """
    results = results or Results()
    n_done, n_total = 0, len(blocks) * len(methods)
    for block in blocks:
        common = {**(key or {}), "task": "text", "n_prefix": block.n_prefix, "batch": batch}
        common["tokens"] = hash_tokens(block.tokens)
        keys = [common | method.as_dict() for method in methods]
        values = [results.get(key, _FIELDS) for key in keys]
        todo = [
            method
            for method, value in zip(methods, values, strict=True)
            if value is None or (mass and method.sparse and not value["mass"])
        ]
        if todo:
            tokens = list(block.tokens)
            runner.prefill(tokens[: block.n_prefix], observe=any(method.observes for method in todo))
            fed, targets = tokens[block.n_prefix : -1], np.array(tokens[block.n_prefix + 1 :])
            dense = runner.decode(fed, DENSE, batch)
        for method, key_, value in zip(methods, keys, values, strict=True):
            if method in todo:
                steps = dense if method == DENSE else runner.decode(fed, method, batch, mass)
                value = results.put(key_, _measure(dense, steps, targets))
            assert value is not None  # or it was to be measured
            n_done += 1
            progress(n_done, n_total)
            arrays = {name: np.array(value[name]) for name in ("nll", "kl", "agree")}
            yield TextCell(block, method, **arrays, kept=value["kept"], mass=value["mass"] if mass else [])


def _measure(dense: Steps, steps: Steps, targets: np.ndarray) -> dict[str, Any]:
    nll, kl, agree = [], [], []
    for target, wanted, found in zip(targets, dense.logits, steps.logits, strict=True):
        p, q = log_softmax(wanted), log_softmax(found)
        nll.append(round(float(-q[target]), 6))
        kl.append(round(float((np.exp(p) * (p - q)).sum()), 9))
        agree.append(bool(p.argmax() == q.argmax()))
    mass = [None if layer is None else [round(float(head), 6) for head in layer.mean(axis=0)] for layer in steps.mass]
    return {"nll": nll, "kl": kl, "agree": agree, "kept": steps.kept, "mass": mass}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Compute log softmax along the last axis: ``[..., n_vocab]`` to float64 of the same shape."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def summarize(cells: Sequence[TextCell], by_text: bool = False) -> list[TextRow]:
    """Make a row for each length of the prefix and each method, in the order of the cells.

    With ``by_text`` each text has rows of its own.
    """
    groups: dict[tuple[int, str | None, Method], list[TextCell]] = {}
    for cell in cells:
        text = cell.block.text if by_text else None
        groups.setdefault((cell.block.n_prefix, text, cell.method), []).append(cell)
    return [
        _row(n_prefix, text, method, group, groups[n_prefix, text, DENSE])
        for (n_prefix, text, method), group in groups.items()
    ]


def _row(n_prefix: int, text: str | None, method: Method, cells: list[TextCell], dense: list[TextCell]) -> TextRow:
    nll, kl, agree = (np.concatenate([getattr(cell, name) for cell in cells]) for name in ("nll", "kl", "agree"))
    kept = [cell.kept for cell in cells if cell.kept is not None]
    of_blocks = [cell.kl.mean() for cell in cells]
    heads = _mean_mass(cells)
    layers = {il: float(np.mean(layer)) for il, layer in enumerate(heads) if layer is not None}
    worst = min(layers, key=layers.__getitem__) if layers else None
    return TextRow(
        n_prefix=n_prefix,
        text=text,
        method=method.name,
        budget=method.budget,
        n_tip=method.n_tip,
        settings=dict(method.settings),
        n_blocks=len(cells),
        n_tokens=len(nll),
        kept=float(np.mean(kept)) if kept else None,
        ppl=float(np.exp(nll.mean())),
        ppl_ratio=float(np.exp(nll.mean() - np.concatenate([cell.nll for cell in dense]).mean())),
        kl=float(kl.mean()),
        kl_stderr=float(np.std(of_blocks, ddof=1) / len(of_blocks) ** 0.5) if len(of_blocks) > 1 else None,
        kl_p99=float(np.percentile(kl, _PERCENTILE)),
        top1=float(agree.mean()),
        mass=float(np.mean(list(layers.values()))) if layers else None,
        mass_worst=layers[worst] if worst is not None else None,
        mass_worst_layer=worst,
        mass_by_layer=heads,
    )


def _mean_mass(cells: Sequence[TextCell]) -> list[list[float] | None]:
    """Average by layer and head, over cells of as many tokens each."""
    layers = zip(*(cell.mass for cell in cells), strict=True)
    return [None if None in layer else np.mean(layer, axis=0).tolist() for layer in layers]
