"""The states of one model in a store, found, read and written by the tokens that they stand for.

The rows of K and V of every 256 tokens are a file, named by a hash of the model and of all tokens up to them: prompts
share what they have in common, and the longest stored prefix of a prompt is found by its tokens alone. The last file of
a prompt has fewer tokens. Of a memory that cannot forget a part of a sequence (sliding windows, recurrent states) a
whole copy at some token is a file besides, a tail.

Rows of the same tokens differ by what batches of other sizes round. Where that matters a file has the tokens of a
batch, and is used as a whole or not at all (``batch``): then its name says in which batches it was computed.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeVar

from fasa_edge.errors import FasaError
from fasa_edge.io.block_file import BlockError, BlockReader, block_size, write_block
from fasa_edge.io.block_folder import BlockFolder, Name
from fasa_edge.runtime import memory
from fasa_edge.runtime.library import LLAMA_COMMIT
from fasa_edge.runtime.sequence import n_common
from fasa_edge.runtime.state_layout import HEAD, Layout

import numpy as np

N_BLOCK = 256
"""Tokens of a file."""

N_FIRST = 64
"""Tokens that prompts have in common at least, or none of them is looked for in files of the other: those that begin
alike are found by name, however many others there are."""

_N_READERS = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)

_T = TypeVar("_T")

Progress = Callable[[str, int, int], None]
"""A function that is called with "restoring" or "storing", the bytes done and the bytes to do."""


class Found(NamedTuple):
    """The files of a prefix.

    Attributes:
        rows: in order, each with how many of its tokens belong to the prefix.
        n_rows: tokens of all of them.
        tails: each with how many tokens go before it, in ascending order.
    """

    rows: list[tuple[Name, int]]
    n_rows: int
    tails: list[tuple[Name, int]]


class _Part(NamedTuple):
    """A file that is to be written."""

    name: Name
    header: dict[str, Any]
    tokens: np.ndarray
    data: list[np.ndarray]

    @property
    def size(self) -> int:
        return block_size(self.header, len(self.tokens), sum(part.nbytes for part in self.data))


class _Unusable(FasaError):
    """A file cannot be used; without a message, because it was removed meanwhile."""

    def __init__(self, name: Name, reason: str = "") -> None:
        super().__init__(reason)
        self.name = name


class StoredStates:
    """The states of a model in a store.

    Args:
        folder: of the store.
        identity: what its states depend on besides the tokens, for JSON.
        has_rows: whether K and V are kept for each token.
        has_tail: whether there is memory that cannot forget a part of a sequence.
        progress: see :data:`Progress`.
        batch: tokens of a batch, where only what was computed in the same batches will do; None: whatever the batches.

    Attributes:
        problems: what could not be used or written, and why.
    """

    def __init__(
        self,
        folder: BlockFolder,
        identity: dict[str, Any],
        *,
        has_rows: bool,
        has_tail: bool,
        progress: Progress,
        batch: int | None = None,
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._key = _digest(json.dumps(identity, sort_keys=True).encode())
        self._has_rows = has_rows
        self._has_tail = has_tail
        self._progress = progress
        self._n_block = batch or N_BLOCK
        self._only_whole = batch is not None
        self._unusable: set[Name] = set()
        self._tails: dict[Name, int] = {}  # of the prompt, and their bytes: what else is written does not push them out
        self.problems: list[str] = []

    def start(self) -> None:
        """Forget what was of no use, and what was of the prompt: another one is to be found."""
        self._unusable.clear()
        self._tails.clear()
        self.problems = []

    def find(self, tokens: np.ndarray) -> Found:
        """Find the files of the longest prefix of tokens, int32 [n_tokens]."""
        files = self._folder.list(self._key)
        rows: list[tuple[Name, int]] = []
        tails: list[tuple[Name, int]] = []
        n_rows, goes_on = 0, True
        for parent, start, block in self._blocks(tokens):
            names = [name for name in files.get(parent, []) if name not in self._unusable]
            for name in names:
                if name.n_tail is not None and name == _tail_name(parent, block[: name.n_tail]):
                    if not self._only_whole or name.n_tail in (0, len(block)):
                        tails.append((name, start + name.n_tail))
            if goes_on and len(block) and (best := self._best(names, parent, block)):
                rows.append(best)
                n_rows += best[1]
            goes_on = n_rows == start + self._n_block
        return Found(rows, n_rows, sorted(tails, key=lambda tail: tail[1]))

    def choose(self, found: Found, n_max: int) -> tuple[Name | None, int]:
        """Choose how many tokens can be restored, ``n_max`` at most, and after which tail if one is needed."""
        n = min(found.n_rows, n_max) if self._has_rows else n_max
        if not self._has_tail:
            return None, n
        return max((tail for tail in found.tails if tail[1] <= n), key=lambda tail: tail[1], default=(None, 0))

    def read(self, found: Found, tail: Name | None, n: int) -> np.ndarray | None:
        """Read the state after the first ``n`` tokens, uint8 [n_bytes].

        Returns:
            None where a file turned out to be of no use: what :meth:`find` finds from now on is without it.

        Raises:
            FasaError: memory does not suffice.
        """
        try:
            return self._read(found, tail, n)
        except _Unusable as error:
            self._exclude(error)
            return None

    def write_rows(
        self, tokens: np.ndarray, layout: Layout, sections: Sequence[np.ndarray], n_prompt: int, capacity: int
    ) -> int:
        """Write what is not there yet of the rows of tokens.

        Args:
            tokens: int32 [n_tokens].
            layout: of the state.
            sections: its sections in the order of the tokens, each uint8 [n_tokens or more, row_size].
            n_prompt: tokens that are to be written in the end: if they do not fit, nothing gives way to some of them.
            capacity: bytes of the whole store.

        Returns:
            Bytes written.

        Raises:
            FasaError: they do not all fit; what fits stays, and is of use.
        """
        if (size := layout.size(n_prompt) + sum(self._tails.values())) > capacity:
            raise FasaError(f"{size} bytes of a prompt exceed the {capacity} of {self._folder.path}: raise its size")
        files = self._folder.list(self._key)
        header, names, parts, superseded = self._header(layout=layout.as_dict()), [], [], []
        for parent, start, block in self._blocks(tokens):
            if not len(block):
                continue
            siblings = [name for name in files.get(parent, []) if name not in self._unusable]
            best = self._best(siblings, parent, block)
            if best and best[1] == len(block):
                names.append(best[0])
                continue
            if best and best[1] == len(self._tokens(best[0])):
                superseded.append(best[0])
            names.append(Name(parent, _hash(parent, block)))
            data = [section[start : start + len(block)] for section in sections]
            parts.append(_Part(names[-1], header, block, data))
        n_written = self._write(parts, names, capacity)
        for name in superseded:
            self._folder.remove(self._key, name)
        self._folder.touch(self._key, names)
        return n_written

    def write_tail(self, tokens: np.ndarray, save: Callable[[], np.ndarray], capacity: int) -> tuple[Name, int]:
        """Write what memory holds, but for the rows, after these tokens, if it is not there yet; as :meth:`write_rows`.

        Args:
            tokens: int32 [n_tokens].
            save: returns the partial state of the sequence, uint8 [n_bytes].
            capacity: bytes of the whole store.

        Returns:
            The file, and bytes written.
        """
        blocks = list(self._blocks(tokens))
        names = [Name(parent, _hash(parent, block)) for parent, _, block in blocks]
        parent, _, rest = blocks[-1]
        name = _tail_name(parent, rest)
        if size := self._size(name):
            self._tails[name] = size
            self._folder.touch(self._key, [name])
            return name, 0
        try:
            size = self._write([_Part(name, self._header(), rest, [save()])], names, capacity)
        except BaseException:  # which may come when it is in its place: nobody would know of it
            self.remove(name)
            raise
        self._tails[name] = size
        return name, size

    def remove(self, name: Name) -> None:
        """Remove a file that is of no more use."""
        self._tails.pop(name, None)
        self._folder.remove(self._key, name)

    def touch(self, found: Found, n: int) -> None:
        """Note that what was found of the first ``n`` tokens is used, though another has it, too."""
        rows = [name for i, (name, _) in enumerate(found.rows) if i * self._n_block < n]
        self._folder.touch(self._key, [*rows, *(name for name, n_before in found.tails if n_before <= n)])

    def _header(self, **more: Any) -> dict[str, Any]:
        return {"llama_cpp": LLAMA_COMMIT, "identity": self._identity, **more}

    def _blocks(self, tokens: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield for every file the hash of what goes before, where it starts, and its tokens.

        The last of them is never full, and has no tokens where all others are: a tail may follow these.
        """
        parent = self._root(tokens)
        for start in range(0, len(tokens) + 1, self._n_block):
            block = tokens[start : start + self._n_block]
            yield parent, start, block
            parent = _hash(parent, block)

    def _root(self, tokens: np.ndarray) -> str:
        """What stands for the hash of what goes before the first file."""
        return _hash(self._key, tokens[:N_FIRST])

    def _best(self, names: Sequence[Name], parent: str, block: np.ndarray) -> tuple[Name, int] | None:
        """Find which of the files after ``parent`` has most of a block's tokens, and how many."""
        names = [name for name in names if name.n_tail is None]
        exact = Name(parent, _hash(parent, block))
        if exact in names and len(self._tokens(exact)):
            return exact, len(block)
        if self._only_whole:
            return None
        matching = [(name, n) for name in names if (n := n_common(self._tokens(name), block))]
        return max(matching, key=lambda match: match[1], default=None)

    def _tokens(self, name: Name) -> np.ndarray:
        try:
            with self._open(name) as reader:
                return reader.block.tokens
        except _Unusable as error:
            self._exclude(error)
            return np.empty(0, np.int32)

    def _size(self, name: Name) -> int:
        """Bytes of a file; 0 where there is none that can be used."""
        if name in self._unusable:
            return 0
        try:
            with self._open(name) as reader:
                return block_size(reader.block.header, len(reader.block.tokens), reader.block.n_bytes)
        except _Unusable as error:
            self._exclude(error)
            return 0

    def _exclude(self, error: _Unusable) -> None:
        self._unusable.add(error.name)
        self.problems += [str(error)] if str(error) else []

    def _open(self, name: Name) -> BlockReader:
        """Open a file that belongs to this model and library; another one is removed, for it can never be used here."""
        path = self._folder.file(self._key, name)
        try:
            reader = BlockReader(path)
        except FileNotFoundError:
            raise _Unusable(name) from None
        except OSError as error:
            raise _Unusable(name, f"{path} cannot be read: {error.strerror}") from error
        except BlockError as error:
            raise self._useless(name, str(error)) from error
        if reason := self._foreign(reader.block.header, reader.block.tokens, name):
            reader.close()
            raise self._useless(name, f"{path} is of {reason}")
        return reader

    def _useless(self, name: Name, reason: str) -> _Unusable:
        removed = self._folder.remove(self._key, name)
        return _Unusable(name, f"{reason}; {'removed' if removed else 'it cannot be removed, and is passed over'}")

    def _foreign(self, header: dict[str, Any], tokens: np.ndarray, name: Name) -> str:
        if (commit := header.get("llama_cpp")) != LLAMA_COMMIT:
            return f"llama.cpp {commit}, expected {LLAMA_COMMIT}"
        other = header.get("identity")
        if other != self._identity:
            other = other if isinstance(other, dict) else {}
            different = [key for key, value in self._identity.items() if other.get(key) != value]
            return f"another model, or made in another way: {', '.join(different)}"
        expected = (
            Name(name.parent, _hash(name.parent, tokens)) if name.n_tail is None else _tail_name(name.parent, tokens)
        )
        return "" if name == expected else "other tokens than its name says"

    def _layout(self, reader: BlockReader, name: Name) -> Layout:
        try:
            layout = Layout.from_dict(reader.block.header["layout"])
            if reader.block.n_bytes == len(reader.block.tokens) * layout.token_size:
                return layout
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
        raise self._useless(name, f"{self._folder.file(self._key, name)} has no rows that fit its tokens")

    def _read(self, found: Found, tail: Name | None, n: int) -> np.ndarray:
        rows: list[tuple[Name, int, int]] = []
        for name, n_used in found.rows if self._has_rows else ():
            start = sum(used for _, _, used in rows)
            if start < n:
                rows.append((name, start, min(n_used, n - start)))
        layout, n_tail = Layout((), ()), 0
        if rows:
            with self._open(rows[0][0]) as reader:
                layout = self._layout(reader, rows[0][0])
        if tail is not None:
            with self._open(tail) as reader:
                n_tail = reader.block.n_bytes
        # a tail comes with a head of its own, which gives way to that of the rows
        n_head = HEAD if rows and n_tail else 0
        size = layout.size(n) + n_tail - n_head
        if size > (available := memory.available()).n_bytes:
            raise FasaError(
                f"the state of {n} stored tokens takes {size} bytes, of which {available}: they are read anew"
            )
        state = layout.empty(n, n_tail - n_head)
        sections = layout.sections(state, n)

        def read_rows(row: tuple[Name, int, int]) -> int:
            name, start, n_used = row
            views = [section[start : start + n_used] for section in sections]
            with self._open(name) as reader:
                if self._layout(reader, name) != layout:
                    raise self._useless(name, f"{self._folder.file(self._key, name)} has rows of another layout")
                n_tokens = len(reader.block.tokens)
                data = (
                    views if n_tokens == n_used else [np.empty((n_tokens, view.shape[1]), np.uint8) for view in views]
                )
                self._fill(reader, name, data)
            if data is not views:
                for view, part in zip(views, data, strict=True):
                    view[:] = part[:n_used]
            return sum(view.nbytes for view in views)

        done = 0
        with ThreadPoolExecutor(_N_READERS) as pool:
            for n_bytes in pool.map(read_rows, rows):
                done += n_bytes
                self._progress("restoring", done, size)
        if tail is not None:
            with self._open(tail) as reader:
                self._fill(reader, tail, [np.empty(n_head, np.uint8), state[len(state) - (n_tail - n_head) :]])
        self._progress("restoring", size, size)
        self._folder.touch(self._key, [*(name for name, _, _ in rows), *([tail] if tail else [])])
        return state

    def _fill(self, reader: BlockReader, name: Name, data: Sequence[np.ndarray]) -> None:
        try:
            reader.read(data)
        except BlockError as error:
            raise self._useless(name, str(error)) from error
        except OSError as error:
            raise _Unusable(name, f"{self._folder.file(self._key, name)} cannot be read: {error.strerror}") from error

    def _write(self, parts: Sequence[_Part], keep: Collection[Name], capacity: int) -> int:
        """Write files; ``keep`` and the tails are those of the same prompt, which give way to none of them."""
        if not parts:
            return 0
        keep = {*keep, *self._tails}
        size = sum(part.size for part in parts)
        done = 0
        try:
            if size > capacity or self._folder.evict(capacity - size, self._key, keep) > capacity - size:
                raise FasaError(
                    f"{size} bytes more of a prompt exceed the {capacity} of {self._folder.path}: raise its size"
                )
            with ExitStack() as stack:
                enter = lambda: stack.enter_context(self._folder.staging(self._key))  # noqa: E731
                staging = self._with_room(enter, 1, size, keep)
                for part in parts:
                    path = staging / str(part.name)
                    write = partial(write_block, path, part.header, part.tokens, part.data)
                    self._with_room(write, part.size, size - done, keep)
                    self._folder.publish(path, self._key, part.name)
                    done += part.size
                    self._unusable.discard(part.name)
                    self._progress("storing", done, size)
        except OSError as error:
            raise FasaError(f"{size - done} bytes cannot be stored in {self._folder.path}: {error.strerror}") from error
        return done

    def _with_room(self, write: Callable[[], _T], n_now: int, n_left: int, keep: Collection[Name]) -> _T:
        """Write something; on a full disk make room for all that is left to be written, if that frees enough for now.

        Once: whoever else fills the disk is not to be outdone.
        """
        try:
            return write()
        except OSError as error:
            size = self._folder.size()
            if error.errno not in _FULL or self._folder.evict(size - n_left, self._key, keep) > size - n_now:
                raise
            return write()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _hash(parent: str, tokens: np.ndarray) -> str:
    """Name tokens after those that ``parent`` names."""
    return _digest(bytes.fromhex(parent) + np.asarray(tokens, "<i4").tobytes())


def _tail_name(parent: str, tokens: np.ndarray) -> Name:
    return Name(parent, _hash(parent, tokens), len(tokens))
