"""Where a model comes from: a GGUF, a checkpoint folder, or either of them on a hub. In the end it is a local GGUF."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fasa_edge.errors import ConvertError
from fasa_edge.io.output import check_outputs
from fasa_edge.io.split import output_paths, parse_name

from .checkpoint import OUTTYPES, check_packages, made_gguf

Progress = Callable[[str, int, int], None]


class Source(NamedTuple):
    """A model that was found, and of which nothing was read yet.

    Attributes:
        name: of the GGUF file, the first one of a split model, or of the checkpoint.
        folder: where its copy goes unless told otherwise.
        is_gguf: whether it is no checkpoint.
        fetch: brings it onto this machine; returns its files, a GGUF's in order. Those of a local checkpoint are
            all that its folder holds; beside others there may lie what does not belong to them.
    """

    name: str
    folder: Path
    is_gguf: bool
    fetch: Callable[[Progress], list[Path]]

    @property
    def n_files(self) -> int:
        """Number of files of the GGUF."""
        return parse_name(self.name).count if self.is_gguf else 1

    @property
    def default_output(self) -> Path:
        """``<name>-fasa.gguf``, for a split model without the numbers."""
        return self.folder / f"{parse_name(self.name).prefix if self.is_gguf else self.name}-fasa.gguf"


def default_output(src: str | Path) -> Path:
    """Return where :func:`fasa_edge.convert.convert` puts the copy of a GGUF file, of a split model its first file."""
    source = find_source(src)
    return output_paths(source.default_output, source.n_files)[0]


def find_source(src: str | Path) -> Source:
    """Finds a model. What exists on this machine wins; of a hub only the list of files is asked for.

    Args:
        src: a GGUF file, the first file of a split one, a checkpoint folder, or ``user/model[:quant]`` on a hub.

    Raises:
        ConvertError: it is none of these, or as :func:`fasa_edge.convert.hub.find_model`.
    """
    path = Path(src)
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ConvertError(
                f"{src} holds no config.json: give a GGUF file or the folder of a Hugging Face checkpoint"
            )
        path = path.resolve()  # "." has no name
        return Source(path.name, path.parent, False, lambda progress: sorted(path.iterdir()))
    if os.path.exists(path):
        return Source(path.name, path.parent, True, lambda progress: [path])

    from . import hub  # huggingface_hub takes a while to import

    name = hub.parse_source(str(src))
    if name is None or (path.suffix == ".gguf" and path.parent.is_dir()):
        raise ConvertError(
            f"{src} does not exist: give a GGUF file, the folder of a Hugging Face checkpoint, "
            "or a model on a hub as user/model or user/model:quant"
        )
    model = hub.find_model(*name)
    return Source(model.name, Path(), model.is_gguf, model.download)


@contextmanager
def local_gguf(
    source: Source,
    outputs: Sequence[Path],
    inputs: Sequence[Path] = (),
    *,
    outtype: str,
    force: bool,
    progress: Progress,
) -> Iterator[Path]:
    """Downloads and converts what is not yet a GGUF on this machine.

    Args:
        source: as :func:`find_source` returns.
        outputs: files that will be written; what forbids that is found out here, before the long work.
        inputs: other files that are read, none of which an output may replace.
        outtype: type of the weights made of a checkpoint, one of :data:`fasa_edge.convert.checkpoint.OUTTYPES`.
        force: allow existing outputs.
        progress: called with a stage, what is done and what there is to do: bytes in stage ``"download"``, percent in
            stage ``"convert"``.

    Returns:
        The GGUF, or the first file of a split one. That of a checkpoint is gone when the block ends.

    Raises:
        ConvertError: ``outtype`` is unknown, or set for a GGUF; or as
            :func:`fasa_edge.io.output.check_outputs`, :meth:`fasa_edge.convert.hub.HubModel.download` and
            :func:`fasa_edge.convert.checkpoint.made_gguf`.
    """
    if outtype not in OUTTYPES:
        raise ConvertError(f"outtype {outtype!r} is unknown: choose one of {', '.join(OUTTYPES)}")
    if source.is_gguf and outtype != "auto":
        raise ConvertError(f"outtype {outtype}: {source.name} is a GGUF, whose weights stay as they are: leave it out")
    check_outputs(outputs, inputs, force=force)
    if not source.is_gguf:
        check_packages(source.name)
    files = source.fetch(progress)
    # beside a checkpoint an older copy may lie
    read = files if source.is_gguf else [file for file in files if file.suffix != ".gguf"]
    check_outputs(outputs, read, force=force)
    if source.is_gguf:
        yield files[0]
        return
    with made_gguf(files, source.name, outputs[0].parent, outtype, progress) as path:
        yield path
