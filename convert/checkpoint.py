"""From a Hugging Face checkpoint to a GGUF: runs the converter of the pinned llama.cpp, which the build installs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fasa_edge.errors import ConvertError
from fasa_edge.io.temporary import work_folder
from fasa_edge.runtime.library import installed

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")  # --outtype of the script

_SCRIPT = installed("llama.cpp") / "convert_hf_to_gguf.py"
_NEEDS = ("torch", "transformers", "sentencepiece")
_REMEDY = "run pip install '.[hf]' in the clone of fasa-edge"
_CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE")  # which would count for more than HF_HOME
_TAIL = 8  # lines of the script that an error shows
_WRITTEN = re.compile(r"Writing:\s+(\d+)%")  # tqdm in gguf_writer.py

Progress = Callable[[str, int, int], None]


def check_packages(name: str) -> None:
    """Refuses to convert the checkpoint ``name`` where this installation cannot, before it is downloaded.

    Raises:
        ConvertError: packages of the extra are missing, or the converter itself.
    """
    if missing := [package for package in _NEEDS if importlib.util.find_spec(package) is None]:
        raise ConvertError(f"{name} is a checkpoint, which takes {', '.join(missing)} to convert: {_REMEDY}")
    if not _SCRIPT.is_file():
        raise ConvertError(f"{_SCRIPT} is missing: reinstall fasa-edge")


@contextmanager
def made_gguf(files: list[Path], name: str, beside: Path, outtype: str, progress: Progress) -> Iterator[Path]:
    """Converts a checkpoint into a temporary GGUF, which is gone when the block ends.

    Args:
        files: the checkpoint, all of one folder; of what else lies there, code above all, nothing is read.
        name: of the model; the script derives metadata from it.
        beside: folder for the temporary file, which has the size of the model.
        outtype: one of :data:`OUTTYPES`; auto keeps 16-bit weights as they are and makes others f16.
        progress: called with stage ``"convert"``, the percentage done and 100.

    Raises:
        ConvertError: ``beside`` cannot be written, or the script fails.
    """
    with ExitStack() as stack:
        try:
            work = stack.enter_context(work_folder(name, beside))
        except OSError as error:
            raise ConvertError(f"{beside} cannot be written: {error.strerror}; choose another output file") from error
        checkpoint, gguf = work / "checkpoint" / name, work / "model.gguf"
        checkpoint.mkdir(parents=True)
        for file in files:
            (checkpoint / file.name).symlink_to(file.resolve())
        command = [sys.executable, _SCRIPT, checkpoint, "--outfile", gguf, "--outtype", outtype]
        _run(command, files[0].parent, work / "home", progress)
        yield gguf


def _run(command: list, folder: Path, home: Path, progress: Progress) -> None:
    # All files are there. A config can name code in other repositories: offline and with an empty cache of its own,
    # transformers neither downloads that nor finds it.
    environment = {name: value for name, value in os.environ.items() if name not in _CACHES}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("PYTHONSAFEPATH", None)  # the script imports what lies beside it
    tail: deque[str] = deque(maxlen=_TAIL)
    progress("convert", 0, 100)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():  # tqdm's carriage returns end lines, too
                if match := _WRITTEN.match(line):
                    progress("convert", int(match[1]), 100)
                elif line.strip(" ^~\n"):  # not the marks of a traceback
                    tail.append(line.rstrip())
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        said = "\n  ".join(tail)
        raise ConvertError(
            f"llama.cpp's converter cannot convert {folder} (exit status {process.returncode}); it said:\n  {said}\n"
            f"check that the checkpoint is complete; if a package is missing, {_REMEDY}"
        )
