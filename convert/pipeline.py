"""From a model to its annotated copy: find, check, calibrate, rank, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fasa_edge import __version__
from fasa_edge.config import FasaConfig, default_n_tip
from fasa_edge.errors import ConvertError
from fasa_edge.schema import PREFIX, Calibration, Profile, to_metadata

from .calibrate import plan_chunks, rank_chunks
from .capture import ModelRun
from .gguf_header import GgufHeader, read_header
from .gguf_splice import check_destination, splice
from .objectives import OBJECTIVES
from .source import find_source, local_gguf
from .split import output_paths, read_shards
from .text import read_text

DEFAULT_TOKENS = 2048  # twice as many change 2 to 3 % of the chosen chunks, and attention recall in the 4th digit
MIN_TOKENS = 512
DEFAULT_TOP_K = 256

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ConvertResult:
    """What :func:`convert` made.

    Attributes:
        path: the annotated copy, the first file of a split one.
        n_bytes: its size, all files together.
        profile: what was written into it.
    """

    path: Path
    n_bytes: int
    profile: Profile


def convert(
    src: str | Path,
    out: str | Path | None = None,
    *,
    outtype: str = "auto",
    text: str | Path | None = None,
    n_tip: int | None = None,
    objective: str = "lsq",
    tokens: int = DEFAULT_TOKENS,
    top_k: int = DEFAULT_TOP_K,
    config: FasaConfig | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Finds the dominant frequency chunks of a model and writes a copy of it that carries them.

    The same file, text, settings and number of threads give the same bytes.

    Args:
        src: a GGUF file, the first file of a split one, the folder of a Hugging Face checkpoint, or a model on a hub as
            ``user/model[:quant]``; see :mod:`fasa_edge.convert.source`.
        out: the copy; None for ``<name>-fasa.gguf`` beside the source, or in the current folder for one of a hub. The
            copy of a split model is split likewise: ``<out without .gguf>-00001-of-00003.gguf`` and so on.
        outtype: type of the weights made of a checkpoint, ``--outtype`` of llama.cpp's ``convert_hf_to_gguf.py``.
        text: UTF-8 file to calibrate on; None for the documentation in ``pydoc_data.topics``.
        n_tip: chunks used per KV head; None for :func:`fasa_edge.config.default_n_tip` of the largest head.
        objective: a name in :data:`fasa_edge.convert.objectives.OBJECTIVES`.
        tokens: length of the calibration; the model's context and the text limit it further.
        top_k: K of the contextual agreement, in tokens; other objectives do not use it.
        config: defaults of the runtime to be stored; None for those of :class:`fasa_edge.config.FasaConfig`.
        force: replace an existing ``out``, and the ``fasa.*`` keys of a source that is already annotated.
        progress: called with a stage, what is done and what there is to do: bytes in stage ``"download"``, percent in
            stage ``"convert"`` (of a checkpoint), tokens in stage ``"calibrate"``, bytes in stage ``"write"``.

    Raises:
        ConvertError: a bad argument; a source that cannot be found, downloaded or converted; a file that is damaged,
            missing or no model; a model without RoPE planes in a plain KV cache; a text too short; or a destination
            that cannot be written. Nothing is left behind but the hub's cache.
        LibraryError: the patched llama.cpp is missing.
    """
    if objective not in OBJECTIVES:
        raise ConvertError(f"objective {objective!r} is unknown: choose one of {', '.join(sorted(OBJECTIVES))}")
    if tokens < MIN_TOKENS:
        raise ConvertError(f"tokens = {tokens} is too few to calibrate on: choose at least {MIN_TOKENS}")
    if top_k < 1:
        raise ConvertError(f"top_k = {top_k} is out of range: choose at least 1")
    progress = progress or (lambda stage, done, total: None)
    calibration_text = read_text(text)
    source = find_source(src)
    out = source.default_output if out is None else Path(out)
    with local_gguf(source, out, outtype=outtype, force=force, progress=progress) as path:
        return _annotate(path, out, calibration_text, n_tip, objective, tokens, top_k, config, force, progress)


def _annotate(
    src: Path,
    out: Path,
    calibration_text: tuple[str, str],
    n_tip: int | None,
    objective: str,
    tokens: int,
    top_k: int,
    config: FasaConfig | None,
    force: bool,
    progress: Progress,
) -> ConvertResult:
    """:func:`convert` for a GGUF on this machine, and checked arguments."""
    header, *others = shards = read_shards(read_header(src))
    _check_model(header, sum(shard.n_tensors for shard in shards))
    check_destination(header, out, others, force=force)
    name, content = calibration_text

    n_ctx = min(tokens, _context_length(header))
    annotated = any(key.startswith(PREFIX) for key in header.entries)
    with ModelRun(src, n_ctx, annotated=annotated) as model:
        dims = plan_chunks(model)
        n_tip = _choose_n_tip(n_tip, [len(planes) for planes in dims.values()])
        prompt = model.tokenize(content, n_ctx)
        if len(prompt) < MIN_TOKENS:
            raise ConvertError(
                f"calibration text {name} has {len(prompt)} tokens but {MIN_TOKENS} are needed: give a longer text"
            )
        chunks, agreement = rank_chunks(
            model, dims, prompt, objective, top_k, lambda done, total: progress("calibrate", done, total)
        )
        fingerprint = model.fingerprint
    profile = Profile(
        n_tip=n_tip,
        chunks=chunks,
        agreement=agreement,
        config=config or FasaConfig(),
        calibration=Calibration(
            text=name,
            tokens=len(prompt),
            top_k=top_k if OBJECTIVES[objective].uses_top_k else 0,
            objective=objective,
            tool=f"fasa-edge {__version__}",
        ),
        fingerprint=fingerprint,
    )
    n_bytes = splice(
        header,
        out,
        to_metadata(profile),
        others,
        force=force,
        progress=lambda done, total: progress("write", done, total),
    )
    return ConvertResult(path=output_paths(out, len(shards))[0], n_bytes=n_bytes, profile=profile)


def _check_model(header: GgufHeader, n_tensors: int) -> None:
    """Refuses what the header alone shows to be impossible."""
    path, arch = header.path, header.get_string("general.architecture")
    if arch is None:
        raise ConvertError(f"{path} has no general.architecture: it is not a model")
    if n_tensors == 0:
        raise ConvertError(f"{path} holds no tensors: it is a vocabulary or a profile, give a model")
    if header.get_string("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        raise ConvertError(
            f"{path} has no tokenizer, so no calibration text can be run: convert it with its vocabulary"
        )
    if header.get_integer(f"{arch}.attention.kv_lora_rank", 0) > 0:
        raise ConvertError(
            f"{path} ({arch}) uses latent attention (MLA): its cache holds no keys of heads, so there are no "
            "frequency chunks to choose; run it without FASA"
        )


def _context_length(header: GgufHeader) -> int:
    """The context that the model was trained for, in tokens."""
    n_ctx = header.get_integer(f"{header.get_string('general.architecture')}.context_length", DEFAULT_TOKENS)
    if n_ctx < MIN_TOKENS:
        raise ConvertError(f"{header.path} has a context of {n_ctx} tokens: calibration needs {MIN_TOKENS}")
    return n_ctx


def _choose_n_tip(n_tip: int | None, n_chunks: list[int]) -> int:
    """Chunks per KV head, given the number of chunks of a head in each layer."""
    if n_tip is None:
        return min(default_n_tip(2 * max(n_chunks)), *n_chunks)
    if not 1 <= n_tip <= min(n_chunks):
        raise ConvertError(f"n_tip = {n_tip} is out of range: choose 1 to {min(n_chunks)}, the chunks of a head")
    return n_tip
