"""From a model to its annotated copy, or to a profile alone: find, check, calibrate, rank, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fasa_edge.config import INT32_MAX, FasaConfig, default_n_tip
from fasa_edge.errors import ConvertError, FasaError, ModelError
from fasa_edge.io.gguf_header import GgufHeader, read_header
from fasa_edge.io.gguf_splice import check_destination, splice
from fasa_edge.io.output import check_outputs, write_bytes
from fasa_edge.io.profile import encode_profile
from fasa_edge.io.split import output_paths, read_shards
from fasa_edge.io.text import read_text
from fasa_edge.runtime.llama import ROPE_ARGUMENTS
from fasa_edge.runtime.sequence import READING
from fasa_edge.runtime.trial import try_model
from fasa_edge.schema import PREFIX, Calibration, Profile, to_metadata
from fasa_edge.version import __version__

from .calibrate import plan_chunks, rank_chunks
from .capture import ModelRun, Reading
from .objectives import OBJECTIVES
from .selfcheck import Check, check_profile
from .source import find_source, local_gguf

DEFAULT_TOKENS = 2048  # twice as many change 2 to 3 % of the chosen chunks, and attention recall in the 4th digit
MIN_TOKENS = 512
DEFAULT_TOP_K = 256

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ConvertResult:
    """What :func:`convert` made.

    Attributes:
        path: the annotated copy, the first file of a split one; None where only a profile was wanted.
        profile_path: the stand-alone profile; None where none was wanted.
        n_bytes: size of what was written, all files together.
        profile: what was written into them.
        check: what the profile was found to be worth; None where that was not wanted or could not be measured.
        unchecked: why it could not.
    """

    path: Path | None
    profile_path: Path | None
    n_bytes: int
    profile: Profile
    check: Check | None = None
    unchecked: str | None = None


def convert(
    src: str | Path,
    out: str | Path | None = None,
    *,
    profile: str | Path | None = None,
    outtype: str = "auto",
    text: str | Path | None = None,
    n_tip: int | Literal["auto"] | None = None,
    objective: str = "lsq",
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    top_k: int = DEFAULT_TOP_K,
    config: FasaConfig | None = None,
    check: bool = True,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    rope: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Finds the dominant frequency chunks of a model and writes a copy that carries them, or a file of them alone.

    The same file, text, settings and number of threads give the same bytes.

    Args:
        src: a GGUF file, the first file of a split one, the folder of a Hugging Face checkpoint, or a model on a hub as
            ``user/model[:quant]``; see :mod:`fasa_edge.convert.source`.
        out: the copy; None for ``<name>-fasa.gguf`` beside the source, or in the current folder for one of a hub; with
            ``profile`` None for no copy. The copy of a split model is split likewise:
            ``<out without .gguf>-00001-of-00003.gguf`` and so on.
        profile: a stand-alone profile, a small GGUF that serves every quantization of the model.
        outtype: type of the weights made of a checkpoint, ``--outtype`` of llama.cpp's ``convert_hf_to_gguf.py``.
        text: UTF-8 file to calibrate on; None for the documentation in ``pydoc_data.topics``.
        n_tip: chunks used per KV head; None for :func:`fasa_edge.config.default_n_tip` of the largest head; "auto" for
            the smallest that passes the check, or the default where there can be none.
        objective: a name in :data:`fasa_edge.convert.objectives.OBJECTIVES`.
        tokens: length of the calibration; the model's context and the text limit it further.
        context: tokens of the longest context that the calibration is stretched over, see
            :mod:`fasa_edge.convert.stretch`; None for that of the model.
        top_k: how many tokens count as a query's top ones in objectives that look at those.
        config: defaults of the runtime to be stored; None for those of :class:`fasa_edge.config.FasaConfig`.
        check: measure the profile on text that it was not calibrated on (:mod:`fasa_edge.convert.selfcheck`). What
            comes of it decides nothing but an automatic ``n_tip``: the files are written in any case.
        n_threads: that run the model; None: all CPUs to read, half of them to decode token by token.
        n_gpu_layers: layers of it that a GPU runs; -1: all.
        rope: by name, the :data:`ROPE_ARGUMENTS` that the model will be run with; chunks are ranked for those, over a
            ``context`` that is theirs. None for what the model says.
        force: replace existing outputs, and in the copy the ``fasa.*`` keys of a source that is already annotated.
        progress: called with a stage, what is done and what there is to do: bytes in stage ``"download"``, percent in
            stage ``"convert"`` (of a checkpoint), tokens in stage ``"calibrate"``, layers in stage ``"rank"``,
            measurements in stage ``"check"``, within it tokens in stage ``"reading"``, bytes in stage ``"write"``.

    Raises:
        ConvertError: a bad argument; a source that cannot be found, downloaded or converted; a file that is damaged,
            missing or no model; a model without RoPE planes in a plain KV cache; a text too short; or a destination
            that cannot be written. Nothing is left behind but the hub's cache; only where ``force`` was to replace
            several files and a rename failed, some may be replaced already.
        LibraryError: the patched llama.cpp is missing.
    """
    if objective not in OBJECTIVES:
        raise ConvertError(f"objective {objective!r} is unknown: choose one of {', '.join(sorted(OBJECTIVES))}")
    if tokens < MIN_TOKENS:
        raise ConvertError(f"tokens = {tokens} is too few to calibrate on: choose at least {MIN_TOKENS}")
    if context is not None and not MIN_TOKENS <= context <= INT32_MAX:
        raise ConvertError(f"context = {context} is out of range: choose {MIN_TOKENS} to {INT32_MAX} tokens")
    if top_k < 1:
        raise ConvertError(f"top_k = {top_k} is out of range: choose at least 1")
    if unknown := sorted(set(rope or ()) - set(ROPE_ARGUMENTS)):
        raise ConvertError(f"rope = {', '.join(unknown)}: unknown; choose of {', '.join(ROPE_ARGUMENTS)}")
    if n_tip == "auto" and not check:
        raise ConvertError("n_tip = 'auto' is chosen by the check: leave that on, or give a number")
    progress = progress or (lambda stage, done, total: None)
    calibration_text = read_text(text)
    source = find_source(src)
    profile_path = None if profile is None else Path(profile)
    if out is None and profile_path is None:
        out = source.default_output
    copies = [] if out is None else output_paths(Path(out), source.n_files)
    outputs = copies if profile_path is None else [*copies, profile_path]
    inputs = [] if text is None else [Path(text)]

    with local_gguf(source, outputs, inputs, outtype=outtype, force=force, progress=progress) as path:
        header, *others = shards = read_shards(read_header(path))
        _check_model(header, sum(shard.n_tensors for shard in shards))
        if copies:
            check_destination(header, copies[0], others, force=force)
        if profile_path is not None:
            check_outputs([profile_path], [shard.path for shard in shards], force=force)
        try:
            try_model(path)
        except ModelError as error:
            raise ConvertError(str(error)) from error
        n_given = None if n_tip == "auto" else n_tip
        running = {"n_threads": n_threads, "n_threads_batch": n_threads, "n_gpu_layers": n_gpu_layers, **(rope or {})}
        made, reading = _make_profile(
            header, calibration_text, n_given, objective, tokens, context, top_k, config, progress, running
        )
        checked = unchecked = None
        if check:
            checked, unchecked = _check(header, made, calibration_text[1], reading, n_tip, progress, running)
        if checked:
            calibration = replace(made.calibration, clipped=checked.clipped_share)
            made = replace(made, n_tip=checked.n_tip, calibration=calibration)
        metadata = to_metadata(made)
        beside = {} if profile_path is None else {profile_path: encode_profile(header, metadata)}
        if copies:
            report = partial(progress, "write")
            n_bytes = splice(header, copies[0], metadata, others, beside=beside, force=force, progress=report)
        else:
            n_bytes = sum(write_bytes(path, [header.path], data, force=force) for path, data in beside.items())
    return ConvertResult(copies[0] if copies else None, profile_path, n_bytes, made, checked, unchecked)


def _make_profile(
    header: GgufHeader,
    calibration_text: tuple[str, str],
    n_tip: int | None,
    objective: str,
    tokens: int,
    context: int | None,
    top_k: int,
    config: FasaConfig | None,
    progress: Progress,
    running: Mapping[str, Any],
) -> tuple[Profile, Reading | None]:
    """Calibrates a GGUF on this machine; the arguments are those of :func:`convert`, checked; ``running``, the last.

    Returns:
        The profile, and what the model read for it, if that can be kept.
    """
    name, content = calibration_text
    context = context or _context_length(header)
    n_ctx = min(tokens, _context_length(header))
    annotated = any(key.startswith(PREFIX) for key in header.entries)
    with ModelRun(header.path, n_ctx, annotated=annotated, **running) as model:
        dims = plan_chunks(model)
        n_tip = _choose_n_tip(n_tip, [len(planes) for planes in dims.values()])
        prompt = model.tokenize(content, n_ctx)
        if len(prompt) < MIN_TOKENS:
            raise ConvertError(
                f"calibration text {name} has {len(prompt)} tokens but {MIN_TOKENS} are needed: give a longer text"
            )
        rankings = rank_chunks(model, dims, prompt, objective, top_k, context, progress)
        fingerprint, reading = model.fingerprint, _reading(model, prompt)
    profile = Profile(
        n_tip=n_tip,
        chunks=[ranking.chunks for ranking in rankings],
        agreement=[ranking.agreement for ranking in rankings],
        centre=[ranking.centre for ranking in rankings],
        step=[ranking.step for ranking in rankings],
        config=config or FasaConfig(),
        calibration=Calibration(
            text=name,
            tokens=len(prompt),
            context=context,
            top_k=top_k if OBJECTIVES[objective].uses_top_k else 0,
            objective=objective,
            tool=f"fasa-edge {__version__}",
        ),
        fingerprint=fingerprint,
    )
    return profile, reading


def _reading(model: ModelRun, prompt: Sequence[int]) -> Reading | None:
    """What was read; None where llama.cpp cannot save it or memory is short, and the check has to read again."""
    try:
        return model.reading(prompt)
    except (FasaError, MemoryError):
        return None


def _check(
    header: GgufHeader,
    profile: Profile,
    content: str,
    reading: Reading | None,
    n_tip: int | str | None,
    progress: Progress,
    running: Mapping[str, Any],
) -> tuple[Check | None, str | None]:
    """What :func:`check_profile` finds, or why it finds nothing."""
    n_ctx, auto = _context_length(header), n_tip == "auto"
    reports = {"progress": partial(progress, "check"), "read_progress": partial(progress, READING)}
    try:
        return check_profile(header, profile, content, n_ctx, reading, auto=auto, **reports, **running), None
    except (FasaError, RuntimeError, MemoryError, OSError) as error:  # the calibration must not be lost for it
        return None, str(error) or type(error).__name__


def _check_model(header: GgufHeader, n_tensors: int) -> None:
    """Refuses what the header alone shows to be impossible."""
    path, arch = header.path, header.get_string("general.architecture")
    if arch is None:
        raise ConvertError(f"{path} has no general.architecture: it is not a model")
    if n_tensors == 0:
        raise ConvertError(f"{path} holds no tensors: it is a vocabulary or a profile, give a model")
    if (n_layer := header.get_integer(f"{arch}.block_count", 1)) < 1:  # llama.cpp would end the process
        raise ConvertError(f"{path} has {arch}.block_count = {n_layer}, so no layers: the file is damaged")
    if header.get_string("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        raise ConvertError(
            f"{path} has no tokenizer, so no calibration text can be run: convert it with its vocabulary"
        )
    if header.get_integer(f"{arch}.attention.key_length_mla", 0) > 0:
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
