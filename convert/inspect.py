"""Reports what a GGUF file holds, without loading the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fasa_edge.errors import SchemaError
from fasa_edge.schema import PREFIX, Profile, from_metadata

from .gguf_header import read_header


@dataclass(frozen=True)
class FileReport:
    """What :func:`inspect` found.

    Attributes:
        path: the file.
        n_bytes: its size.
        architecture: ``general.architecture``, None where the file names none.
        name: ``general.name``, None likewise.
        n_tensors: number of tensors; 0 for a profile.
        profile: the FASA profile, None where the file is not annotated.
    """

    path: Path
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
        """The same as plain values for JSON; of each ranking only the ``n_tip`` chunks that the runtime uses."""
        report = {
            "path": str(self.path),
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
                "agreement": agreement[:, :n_tip].tolist(),
            }
            for il, (chunks, agreement) in enumerate(zip(self.profile.chunks, self.profile.agreement, strict=True))
        ]
        return report | {
            "n_tip": n_tip,
            "config": asdict(self.profile.config),
            "calibration": asdict(self.profile.calibration),
            "fingerprint": self.profile.fingerprint,
            "layers": layers,
        }


def inspect(path: str | Path) -> FileReport:
    """Reads the header of a GGUF model or profile.

    Raises:
        ConvertError: the file is not a readable GGUF.
        SchemaError: its ``fasa.*`` keys are not valid; the message names file, key, value and limit.
    """
    header = read_header(path)
    metadata = {key: entry.value() for key, entry in header.entries.items() if key.startswith(PREFIX)}
    try:
        profile = from_metadata(metadata) if metadata else None
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error
    return FileReport(
        path=header.path,
        n_bytes=header.file_size,
        architecture=header.get_string("general.architecture"),
        name=header.get_string("general.name"),
        n_tensors=header.n_tensors,
        profile=profile,
    )
