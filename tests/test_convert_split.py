"""Split models: the copy is a split model again, which llama.cpp runs as it runs the same model in one file."""

import errno
import functools
import os
import shutil

import fasa_edge
from fasa_edge.cli import main
from fasa_edge.convert import inspect
from fasa_edge.errors import ConvertError
from fasa_edge.io import gguf_splice
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.split import output_paths, parse_name

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from runtime import teacher_forced
from tiny_models import make_model
from unchecked import convert

TOKENS = 512


def make_split(path, **options):
    """The tiny model in 3 files; returns the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, **{"split_max_tensors": 8} | options))
        make_model(path)
    first, *_ = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return first


@pytest.fixture
def split(tmp_path):
    (tmp_path / "in").mkdir()
    return make_split(tmp_path / "in" / "tiny.gguf")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def three(prefix: str) -> list[str]:
    return [f"{prefix}-0000{no}-of-00003.gguf" for no in (1, 2, 3)]


def content(path) -> bytes:
    return path.read_bytes()[read_header(path).data_offset :]


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_copy_runs_like_that_of_the_whole_model(tmp_path, small_first_shard):
    split = make_split(tmp_path / "tiny.gguf", small_first_shard=small_first_shard)
    n = parse_name(split.name).count
    assert read_header(split).n_tensors == (0 if small_first_shard else 8)
    seen = []
    result = convert(split, tokens=TOKENS, progress=lambda *at: seen.append(at))
    assert result.path == tmp_path / f"tiny-fasa-00001-of-0000{n}.gguf"
    paths = output_paths(result.path, n)
    assert result.n_bytes == sum(path.stat().st_size for path in paths)
    assert seen[-1] == ("write", paths[0].stat().st_size, paths[0].stat().st_size)
    sources = output_paths(split, n)
    assert content(paths[0]) == content(sources[0])
    assert read_header(paths[0]).tensor_infos == read_header(split).tensor_infos
    assert all(new.samefile(old) for new, old in zip(paths[1:], sources[1:], strict=True))

    whole = convert(make_model(tmp_path / "whole.gguf"), tokens=TOKENS).path
    tokens = np.random.default_rng(0).integers(3, 259, 300).tolist()
    logits = []
    for path in (whole, result.path):
        llm = fasa_edge.Llama(str(path), n_ctx=512, fasa_budget=64, fasa_min_ctx=1, verbose=False)
        logits.append(teacher_forced(llm, tokens, 290))
        assert llm.fasa.stats().n_layers_sparse > 0
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("out", ["copy.gguf", "copy-00001-of-00003.gguf"])
def test_output_names_the_set(split, tmp_path, out):
    assert convert(split, tmp_path / out, tokens=TOKENS).path == tmp_path / three("copy")[0]
    assert names(tmp_path) == [*three("copy"), "in"]
    with pytest.raises(ConvertError, match=r"copy-00001-of-00003\.gguf exists"):
        convert(split, tmp_path / out, tokens=TOKENS)
    (tmp_path / three("copy")[0]).unlink()
    with pytest.raises(ConvertError, match=r"copy-00002-of-00003\.gguf exists"):
        convert(split, tmp_path / out, tokens=TOKENS)
    again = convert(split, tmp_path / out, tokens=TOKENS, force=True).path
    assert names(tmp_path) == [*three("copy"), "in"]
    with pytest.raises(ConvertError, match="already annotated"):
        convert(again, tokens=TOKENS)


@pytest.mark.check
def test_copied_where_links_are_impossible(split, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    seen = []
    result = convert(split, tmp_path / "copy.gguf", tokens=TOKENS, progress=lambda *at: seen.append(at))
    assert seen[-1] == ("write", result.n_bytes, result.n_bytes)
    for name, source in zip(three("copy")[1:], three("tiny")[1:], strict=True):
        old, new = split.with_name(source), tmp_path / name
        assert new.read_bytes() == old.read_bytes() and not new.samefile(old)
        assert new.stat().st_mode == old.stat().st_mode


def test_symlinks_as_in_the_cache_of_a_hub(split, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in three("tiny"):
        (snapshot / name).symlink_to(split.with_name(name))
    result = convert(snapshot / split.name, tmp_path / "copy.gguf", tokens=TOKENS)
    assert not any(path.is_symlink() for path in output_paths(result.path, 3))


@pytest.mark.parametrize("step", [1, 2])
def test_failure_leaves_nothing_behind(split, tmp_path, monkeypatch, step):
    """Of the renames, in which the first file of the set comes last."""
    replaced, replace = [], os.replace

    def fail(source, target):
        replaced.append(target.name)
        if len(replaced) > step:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConvertError, match="Input/output error"):
        convert(split, tmp_path / "copy.gguf", tokens=TOKENS, force=True)
    assert replaced == [three("copy")[i] for i in (1, 2, 0)][: step + 1]
    assert names(tmp_path) == ["in"] and names(split.parent) == three("tiny")


def test_too_little_disk_counts_what_is_copied(split, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    need = split.stat().st_size
    monkeypatch.setattr(gguf_splice.shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(ConvertError, match=f"needs {need} bytes but .* has {need - 1} free"):
        convert(split, tmp_path / "copy.gguf", tokens=TOKENS)


def test_inspect_counts_all_files_that_are_there(split):
    whole = make_model(split.with_name("whole.gguf"))
    n_bytes = [path.stat().st_size for path in output_paths(split, 3)]
    report = inspect(split)
    assert (report.n_files, report.n_tensors, report.n_bytes) == (3, inspect(whole).n_tensors, sum(n_bytes))
    assert report.to_dict()["n_files"] == 3
    assert " 21 tensors in 3 files, " in CliRunner().invoke(main, ["inspect", str(split)]).stdout
    report = inspect(nth(split, 2))
    assert (report.n_files, report.n_bytes) == (1, n_bytes[1])
    nth(split, 3).unlink()
    report = inspect(split)
    assert (report.n_files, report.n_tensors, report.n_bytes) == (1, 8, n_bytes[0])


# Damaged sets


def nth(split, no: int):
    return split.with_name(three("tiny")[no - 1])


def overwrite(path, key: str, dtype, value: int) -> None:
    """Replaces a number in a header."""
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[key].parts[-1][:] = np.array(value).astype(dtype)
    reader.data.flush()


@pytest.mark.check
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: nth(s, 3).unlink(), r"tiny-00003-of-00003\.gguf is missing: .* into 3 files"),
        (
            lambda s: s.rename(s.with_name("model.gguf")),
            r"is one of 3 files .* name them model-00001-of-00003\.gguf and so on",
        ),
        (
            lambda s: s.rename(s.with_name("tiny-00001-of-00002.gguf")),
            "named as one of 2 files but its split.count is 3",
        ),
        (lambda s: shutil.copy(nth(s, 2), s), r"not file 1 of 3: its split.no is 1 .UINT16.*expected 0"),
        (lambda s: overwrite(nth(s, 2), "split.no", "<u2", 2), "not file 2 of 3: its split.no is 2 .*expected 1"),
        (lambda s: overwrite(s, "split.tensors.count", "<i4", 20), "hold 21 tensors but split.tensors.count is 20"),
        (lambda s: os.truncate(nth(s, 2), 5000), r"tiny-00002-of-00003\.gguf is truncated"),
    ],
    ids=["missing", "unnamed", "count", "swapped", "number", "tensors", "truncated"],
)
def test_damaged_sets_are_refused(split, damage, message):
    damage(split)
    first = min(split.parent.iterdir())
    before = names(split.parent)
    with pytest.raises(ConvertError, match=message):
        convert(first, tokens=TOKENS)
    assert names(split.parent) == before


def test_later_file_names_the_first(split):
    with pytest.raises(ConvertError, match=r"is file 2 of 3 .* give the first, tiny-00001-of-00003\.gguf"):
        convert(nth(split, 2))


def test_another_type_of_split_no_would_abort_llama_cpp(split):
    path = nth(split, 2)
    data = path.read_bytes()
    key = data.index(b"split.no") + len("split.no")
    assert data[key] == 2  # UINT16
    path.write_bytes(data[:key] + b"\x03" + data[key + 1 :])  # INT16
    with pytest.raises(ConvertError, match=r"its split.no is 1 \(INT16\), expected 1 \(UINT16\)"):
        convert(split)


def test_absurd_count(tmp_path):
    model = make_model(tmp_path / "tiny-00001-of-00002.gguf", split__count=2**32 - 1)
    with pytest.raises(ConvertError, match=f"named as one of 2 files but its split.count is {2**32 - 1}"):
        convert(model)


@pytest.mark.parametrize("out", ["copy-00002-of-00003.gguf", "copy-00001-of-00004.gguf"])
def test_output_named_as_another_file(split, tmp_path, out):
    with pytest.raises(ConvertError, match=r"the model has 3: choose copy\.gguf or copy-00001-of-00003\.gguf"):
        convert(split, tmp_path / out)


@pytest.mark.check
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("m.gguf", ("m", 1, 1)),
        ("m.Q4_K_M-00002-of-00010.gguf", ("m.Q4_K_M", 2, 10)),
        ("m-1-of-3.gguf", ("m-1-of-3", 1, 1)),
        ("m.bin", ("m.bin", 1, 1)),
    ],
)
def test_names(name, parts):
    assert parse_name(name) == parts
