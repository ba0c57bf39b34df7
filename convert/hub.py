"""Models on a Hugging Face hub, through huggingface_hub, whose settings hold: endpoint, cache, token, offline mode.

Imported only when a hub is asked: huggingface_hub takes a while to load.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fasa_edge.errors import ConvertError
from fasa_edge.io.split import SplitName, parse_name

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from tqdm import tqdm

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?", re.ASCII)

# common/download.cpp of the pinned llama.cpp, find_best_model() and what it calls: `-hf` chooses the same file
_DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_QUANT = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)

# What upstream's converter reads; no code and no pickles. Other weights, of Mistral's own format say, would come twice.
_CHECKPOINT = ("*.json", "*.txt", "*.md", "*.model", "*.tiktoken", "*.jinja")
_WEIGHTS = "model*.safetensors"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, of which nothing but the list of its files was read.

    Attributes:
        repo: ``user/model``.
        commit: whose files were listed.
        files: what is to be downloaded: the files of one GGUF, in order, or those of a checkpoint.
        n_bytes: their size.
        is_gguf: which of both.
    """

    repo: str
    commit: str
    files: tuple[str, ...]
    n_bytes: int
    is_gguf: bool

    @property
    def name(self) -> str:
        """File name of the GGUF, or the name of the model."""
        return PurePosixPath(self.files[0] if self.is_gguf else self.repo).name

    def download(self, progress: Progress) -> list[Path]:
        """Brings the files into the hub's cache, unless they are there.

        Args:
            progress: called with stage ``"download"``, the bytes done and those to do; also from other threads.

        Returns:
            :attr:`files` in the cache, where others may lie beside them.

        Raises:
            ConvertError: the hub or the disk fails, the hub is offline and the cache lacks a file, the repository got a
                new commit meanwhile, or whatever ``progress`` raises of this kind.
        """
        try:
            # not by commit: then the cache would not learn which one is the latest, and know nothing when offline
            folder = Path(
                snapshot_download(
                    self.repo,
                    allow_patterns=[glob.escape(name) for name in self.files],
                    tqdm_class=_bars(lambda done: progress("download", min(done, self.n_bytes), self.n_bytes)),
                )
            )
        except ConvertError:  # of the callback
            raise
        except RepositoryNotFoundError as error:
            raise _no_access(self.repo) from error
        except Exception as error:  # of the HTTP library underneath, too
            raise ConvertError(f"{self.repo} cannot be downloaded: {_first_line(error)}; try again") from error
        if folder.name != self.commit:
            raise ConvertError(f"{self.repo} changed from {self.commit} to {folder.name} meanwhile: try again")
        progress("download", self.n_bytes, self.n_bytes)
        for name in self.files:
            if not (folder / name).is_file():
                raise ConvertError(f"{name} of {self.repo} is not in the cache, and the hub is offline: go online once")
        return [folder / name for name in self.files]


def parse_source(text: str) -> tuple[str, str | None] | None:
    """Splits ``user/model[:quant]`` into repository and quant, None if the text is something else."""
    match = _NAME.fullmatch(text)
    return (match[1], match[2]) if match else None


def find_model(repo: str, quant: str | None) -> HubModel:
    """Chooses what to download of a repository: a GGUF as :func:`choose_gguf` does, or else the checkpoint.

    Raises:
        ConvertError: there is no such repository or quant, the repository holds no model, or the hub cannot be reached
            and its cache does not know the repository.
    """
    commit, sizes = _list_files(repo)
    if files := choose_gguf(repo, sizes, quant):
        return HubModel(repo, commit, tuple(files), sum(sizes[name] for name in files), is_gguf=True)
    if quant is not None:
        raise ConvertError(f"{repo} holds no GGUF, so no quant {quant}: leave out :{quant} to convert its checkpoint")
    top = [name for name in sorted(sizes) if "/" not in name]
    weights = fnmatch.filter(top, _WEIGHTS)
    if "config.json" not in top or not weights:
        raise ConvertError(
            f"{repo} holds neither a GGUF nor a checkpoint (config.json and {_WEIGHTS}): choose another repository"
        )
    files = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in _CHECKPOINT)] + weights
    return HubModel(repo, commit, tuple(files), sum(sizes[name] for name in files), is_gguf=False)


def choose_gguf(repo: str, names: Iterable[str], quant: str | None) -> list[str]:
    """Chooses among the files of a repository as llama.cpp's ``-hf`` does.

    Args:
        repo: its name, for the error.
        names: of its files.
        quant: part of a file name, in any case; None for Q4_K_M, then Q8_0, then the first GGUF.

    Returns:
        All files of the GGUF, in order; empty without any GGUF.

    Raises:
        ConvertError: there are GGUFs, but none of the quant; or files of a split one are not there.
    """
    ggufs = {name: parse_name(name) for name in sorted(names) if _is_model(name)}
    firsts = [name for name, split in ggufs.items() if split.no == 1]
    for wanted in _DEFAULT_QUANTS if quant is None else (quant,):
        if chosen := next((name for name in firsts if re.search(f"{re.escape(wanted)}[.-]", name, re.I)), None):
            break
    else:
        if quant is not None and ggufs:
            quants = sorted({match[1].upper() for split in ggufs.values() if (match := _QUANT.search(split.prefix))})
            raise ConvertError(f"{repo} has no quant {quant}: choose one of {', '.join(quants) or ', '.join(ggufs)}")
        chosen = next(iter(firsts), None)
    if chosen is None:
        return []
    prefix, _, count = ggufs[chosen]
    files = [name for name, split in ggufs.items() if (split.prefix, split.count) == (prefix, count)]
    if [ggufs[name] for name in files] != [SplitName(prefix, no, count) for no in range(1, count + 1)]:
        raise ConvertError(f"{repo} has {len(files)} of the {count} files of {chosen}: choose another quant")
    return files


def _is_model(name: str) -> bool:
    file = PurePosixPath(name).name
    return file.endswith(".gguf") and not any(part in file for part in _NO_MODELS)


def _list_files(repo: str) -> tuple[str, dict[str, int]]:
    """Commit, files and their sizes in bytes of a repository; of the cache where the hub cannot be reached."""
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        return info.sha or "main", {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except HFValidationError as error:
        raise ConvertError(f"{repo} is no name of a model on a hub: {_first_line(error)}") from error
    except RepositoryNotFoundError as error:
        raise _no_access(repo) from error
    except Exception as error:  # whatever the HTTP library underneath raises without a network
        try:
            # no patterns: or files that were never asked for would count as missing
            folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            raise ConvertError(
                f"{repo} is not in the cache and {constants.ENDPOINT} cannot be asked: {_first_line(error)}; "
                "check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or give a file that is on this machine"
            ) from error
        files = (path for path in folder.rglob("*") if path.is_file())
        return folder.name, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _no_access(repo: str) -> ConvertError:
    return ConvertError(
        f"{repo} is neither here nor on {constants.ENDPOINT}, or it is private or gated: check the name, "
        "or log in with `hf auth login` or HF_TOKEN"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _bars(report: Callable[[int], None]) -> type:
    """A tqdm that shows nothing and reports the bytes done instead, never fewer than before."""
    most = 0  # there may be several bars of bytes, of what is received and of what is written

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"file": io.StringIO()}))

        def display(self, *_, **__):
            nonlocal most
            if self.unit == "B" and self.n > most:  # others count files
                most = int(self.n)
                report(most)

    return Bar
