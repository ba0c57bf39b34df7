"""Reports what a GGUF file holds, without loading the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fasa_edge.config import tip_bytes
from fasa_edge.errors import SchemaError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.split import model_files, read_shards
from fasa_edge.schema import ARRAYS, PREFIX, SCALARS, GGUFValueType, Profile, from_metadata

import numpy as np

from .ranges import N_LEVEL


@dataclass(frozen=True)
class FileReport:
    """What :func:`inspect` found.

    Attributes:
        path: the file.
        n_files: of a split model, of which the first was given and the others lie beside it, their number; else 1.
        n_bytes: their size.
        architecture: ``general.architecture``, None where the file names none.
        name: ``general.name``, None likewise.
        n_tensors: number of tensors in them; 0 for a profile.
        profile: the FASA profile, None where the file is not annotated.
    """

    path: Path
    n_files: int
    n_bytes: int
    architecture: str | None
    name: str | None
    n_tensors: int
    profile: Profile | None

    @property
    def annotated(self) -> bool:
        """Whether the file carries a FASA profile."""
        return self.profile is not None

    def to_dict(self) -> dict:
        """Returns the same as plain values for JSON; of rankings only the ``n_tip`` chunks that the runtime uses."""
        report = {
            "path": str(self.path),
            "n_files": self.n_files,
            "n_bytes": self.n_bytes,
            "architecture": self.architecture,
            "name": self.name,
            "n_tensors": self.n_tensors,
            "annotated": self.annotated,
        }
        if self.profile is None:
            return report
        n_tip = self.profile.n_tip
        layers = [
            {
                "layer": il,
                "n_head_kv": chunks.shape[0],
                "n_chunk": chunks.shape[1],
                "chunks": chunks[:, :n_tip].tolist(),
                "agreement": self.profile.agreement[il][:, :n_tip].tolist(),
                "centre": self.profile.centre[il][:, :n_tip].tolist(),
                "step": self.profile.step[il][:, :n_tip].tolist(),
            }
            for il, chunks in enumerate(self.profile.chunks)
        ]
        return report | {
            "n_tip": n_tip,
            "tip_bytes": tip_bytes(n_tip),
            "config": asdict(self.profile.config),
            "calibration": asdict(self.profile.calibration),
            "fingerprint": self.profile.fingerprint,
            "layers": layers,
        }


def inspect(path: str | Path) -> FileReport:
    """Reads the header of a GGUF model or profile, and those of the files that belong to the first of a split model.

    Raises:
        ConvertError: the file is not a readable GGUF, or as :func:`fasa_edge.io.split.read_shards`.
        SchemaError: its ``fasa.*`` keys are not valid; the message names file, key, value and limit.
    """
    header = read_header(path)
    # no key of ours is an array of texts, which may be long
    metadata = {
        key: [] if entry.count is not None and entry.type == GGUFValueType.STRING else entry.value()
        for key in (*SCALARS, *ARRAYS)
        if (entry := header.find(key)) is not None
    }
    annotated = any(key.startswith(PREFIX) for key in header.entries)
    try:
        profile = from_metadata(metadata) if annotated else None
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error
    shards = read_shards(header) if len(model_files(header.path)) > 1 else [header]
    return FileReport(
        path=header.path,
        n_files=len(shards),
        n_bytes=sum(shard.file_size for shard in shards),
        architecture=header.get_string("general.architecture"),
        name=header.get_string("general.name"),
        n_tensors=sum(shard.n_tensors for shard in shards),
        profile=profile,
    )


def picture(chunks: np.ndarray, step: np.ndarray) -> str:
    """Shows the ranges of a KV head's chunks, a character each, by falling frequency.

    Args:
        chunks: int32 ``[n_chunk]``, the ranking.
        step: float32 ``[n_chunk]``, in its order.

    Returns:
        0 to 9: the step in tenths of the head's largest; ``-``: 0, the chunk is never scored.
    """
    by_chunk = np.empty_like(step)
    by_chunk[chunks] = step
    tenths = 10 * by_chunk / max(by_chunk.max(), np.finfo(np.float32).tiny)
    return "".join("-" if size == 0 else str(min(int(size), 9)) for size in tenths)


def farthest(chunks: np.ndarray, centre: np.ndarray, step: np.ndarray) -> tuple[int, float]:
    """Finds the chunk of a KV head whose keys lie farthest from 0.

    Chunks that are never scored do not count.

    Args:
        chunks: int32 ``[n_chunk]``, the ranking.
        centre: float32 ``[n_chunk, 2]``, in its order.
        step: float32 ``[n_chunk]``, likewise.

    Returns:
        The chunk, and how far its centre lies from 0, in the widths of a range to either side: beyond 1 a range around
        0 would not hold its keys at all.
    """
    size = np.divide(np.abs(centre).max(-1), N_LEVEL / 2 * step, out=np.zeros_like(step), where=step > 0)
    return int(chunks[size.argmax()]), float(size.max())
