"""Files that appear complete or not at all: written under temporary names, renamed when all of them are whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(destinations: Sequence[Path]) -> Iterator[list[Path]]:
    """Makes an empty temporary file beside each destination; they take their places when the block ends.

    If the block or a rename fails, the temporary files and all destinations that did not exist before are removed.

    Args:
        destinations: in the order of the renames; the file that makes the others useful belongs last.

    Raises:
        OSError: a temporary file cannot be made or renamed.
    """
    temporaries: list[Path] = []
    new: list[Path] = []
    try:
        for destination in destinations:
            handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.", suffix=".tmp")
            os.close(handle)
            temporaries.append(Path(name))
        yield temporaries
        for temporary, destination in zip(temporaries, destinations, strict=True):
            if not destination.exists():
                new.append(destination)
            os.replace(temporary, destination)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    finally:
        for path in temporaries:  # also a hard link to what its destination is already: renaming that does nothing
            path.unlink(missing_ok=True)
