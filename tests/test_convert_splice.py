"""The byte splice: everything old stays to the bit, damaged input is refused by name, failures leave nothing behind."""

import errno
import os
import pathlib
import resource
import struct

from fasa_edge.errors import ConvertError
from fasa_edge.io import gguf_splice, output
from fasa_edge.io.gguf_header import TENSOR_TYPES, read_header
from fasa_edge.io.gguf_splice import encode_entry, splice
from fasa_edge.schema import NUMPY_TYPES, GGUFValueType

import gguf
import numpy as np
import pytest
from tiny_models import make_model

pytestmark = pytest.mark.check

T = GGUFValueType
OURS = [
    ("fasa.version", T.UINT32, 1),
    ("fasa.chunks", T.ARRAY, np.array([1, 0], np.int32)),
    ("fasa.calibration.text", T.STRING, "é"),
]


def string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def pair(key: bytes, type_: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_) + value


def array(element: int, count: int, body: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + body


def odd_pairs() -> list[bytes]:
    """What gguf-py cannot write back: every scalar and array type, empty arrays, invalid UTF-8."""
    pairs = [
        pair(b"general.architecture", T.STRING, string(b"llama")),
        pair(b"text.invalid", T.STRING, string(b"\xff\xfe")),
        pair(b"text.empty", T.STRING, string(b"")),
        pair(b"key.\xff", T.BOOL, b"\x02"),
        pair(b"texts", T.ARRAY, array(T.STRING, 3, string(b"a") + string(b"") + string(b"\xc3("))),
        pair(b"texts.empty", T.ARRAY, array(T.STRING, 0, b"")),
    ]
    for type_, dtype in NUMPY_TYPES.items():
        size = dtype.itemsize
        pairs.append(pair(f"scalar.{type_.name}".encode(), type_, bytes(range(1, 1 + size))))
        pairs.append(pair(f"array.{type_.name}".encode(), T.ARRAY, array(type_, 3, bytes(range(3 * size)))))
        pairs.append(pair(f"empty.{type_.name}".encode(), T.ARRAY, array(type_, 0, b"")))
    return pairs


def tensor_info(name: bytes, dims: tuple[int, ...], type_: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def gguf_bytes(pairs: list[bytes], *, alignment: int = 32, version: int = 3, tail: bytes = b"") -> bytes:
    """Two tensors after the given pairs, the data filled with a pattern."""
    if alignment != 32:
        pairs = [*pairs, pair(b"general.alignment", T.UINT32, struct.pack("<I", alignment))]
    second = -(-20 // alignment) * alignment
    infos = tensor_info(b"a", (5,), 0, 0) + tensor_info(b"b", (32, 2), 2, second)
    head = b"GGUF" + struct.pack("<IQQ", version, 2, len(pairs)) + b"".join(pairs) + infos
    head += bytes(-len(head) % alignment)
    return head + bytes(i % 251 for i in range(second + 36)) + tail


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(gguf_bytes(odd_pairs()))
    return path


def only_source_is_left(source) -> bool:
    return [path.name for path in source.parent.iterdir()] == [source.name]


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("tail", [b"", b"junk after the last tensor"])
def test_everything_old_is_byte_identical(tmp_path, alignment, version, tail):
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    source.write_bytes(gguf_bytes(odd_pairs(), alignment=alignment, version=version, tail=tail))
    before = read_header(source)
    size = splice(before, out, OURS)
    after = read_header(out)

    new = {key: after.entries[key] for key, _, _ in OURS}
    assert list(after.entries) == [*before.entries, *new]
    for key, entry in before.entries.items():
        assert after.entries[key].raw == entry.raw
    assert [new[key].raw for key, _, _ in OURS] == [encode_entry(*item) for item in OURS]
    assert after.tensor_infos == before.tensor_infos
    assert (after.version, after.alignment, after.n_tensors) == (version, alignment, 2)
    assert after.data_offset % alignment == 0
    data = source.read_bytes()[before.data_offset :]
    assert out.read_bytes()[after.data_offset :] == data
    assert out.stat().st_size == size == after.data_offset + len(data)


def test_stripping_our_keys_gives_the_source_back(source, tmp_path):
    out, back = tmp_path / "out.gguf", tmp_path / "back.gguf"
    splice(read_header(source), out, OURS)
    splice(read_header(out), back, [], force=True)
    assert back.read_bytes() == source.read_bytes()


def test_gguf_py_reads_the_copy(tmp_path):
    source, out = make_model(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    splice(read_header(source), out, OURS)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(out)
    assert set(after.fields) == {*before.fields, *(key for key, _, _ in OURS)}
    assert after.fields["fasa.chunks"].contents() == [1, 0]
    assert after.fields["fasa.calibration.text"].contents() == "é"
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.tensor_type) == (new.name, new.tensor_type)
        assert np.array_equal(old.data, new.data)


def test_values_are_decoded(source):
    header = read_header(source)
    assert header.entries["text.invalid"].value() == "��"
    assert header.entries["texts"].value() == ["a", "", "�("]
    assert header.entries["texts.empty"].value() == []
    assert header.entries["key.\udcff"].value() == np.True_
    for type_, dtype in NUMPY_TYPES.items():
        if type_ != T.BOOL:
            expected = np.frombuffer(bytes(range(3 * dtype.itemsize)), dtype)
            np.testing.assert_array_equal(header.entries[f"array.{type_.name}"].value(), expected)
        assert header.entries[f"array.{type_.name}"].value().dtype == dtype
        assert header.entries[f"empty.{type_.name}"].value().shape == (0,)
        assert header.entries[f"scalar.{type_.name}"].value().dtype == dtype


def test_encoded_entries_are_those_of_gguf_py(tmp_path):
    path = tmp_path / "keys.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("fasa.version", 1)
    writer.add_array("fasa.chunks", [1, 0])
    writer.add_string("fasa.calibration.text", "é")
    writer.add_bool("fasa.enabled", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    entries = read_header(path).entries
    for item in [*OURS, ("fasa.enabled", T.BOOL, True)]:
        assert entries[item[0]].raw == encode_entry(*item)


def test_tensor_types_are_those_of_gguf_py():
    for type_, sizes in gguf.GGML_QUANT_SIZES.items():
        if type_.name != "Q8_1":  # gguf-py 0.19 says 40 bytes, ggml 36
            assert TENSOR_TYPES[type_.value] == sizes, type_.name


def test_progress_runs_to_the_end(source, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_splice, "BLOCK", 16)
    seen = []
    size = splice(read_header(source), tmp_path / "out.gguf", OURS, progress=lambda *at: seen.append(at))
    assert seen[-1] == (size, size)
    assert seen == sorted(seen) and len(seen) > 4
    assert {total for _, total in seen} == {size}


# Refusals


def test_annotated_source_needs_force(source, tmp_path):
    out = tmp_path / "out.gguf"
    splice(read_header(source), out, OURS)
    with pytest.raises(ConvertError, match=r"already annotated \(3 fasa"):
        splice(read_header(out), tmp_path / "again.gguf", OURS)
    splice(read_header(out), tmp_path / "again.gguf", OURS, force=True)
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def test_existing_destination_needs_force(source, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    with pytest.raises(ConvertError, match="exists"):
        splice(read_header(source), out, OURS)
    assert out.read_text() == "precious"
    splice(read_header(source), out, OURS, force=True)
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_source_is_never_the_destination(source, link):
    before = source.read_bytes()
    out = source
    if link is not None:
        out = source.parent / "link.gguf"
        link(source, out)
    with pytest.raises(ConvertError, match="is the input .* itself"):
        splice(read_header(source), out, OURS, force=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize(("name", "message"), [("missing/out.gguf", "not a folder"), ("", "is a folder")])
def test_impossible_destination(source, tmp_path, name, message):
    with pytest.raises(ConvertError, match=message):
        splice(read_header(source), tmp_path / name, OURS, force=True)


def test_too_little_disk_is_known_before(source, tmp_path, monkeypatch):
    usage = gguf_splice.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(gguf_splice.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ConvertError, match=r"needs \d+ bytes but .* has 100 free"):
        splice(read_header(source), source.parent / "out.gguf", OURS)
    assert only_source_is_left(source)


def test_disk_full_while_writing(source):
    """A file size limit makes the write fail as a full disk would, with EFBIG for ENOSPC."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    header = read_header(source)
    resource.setrlimit(resource.RLIMIT_FSIZE, (header.file_size // 2, limit[1]))
    try:
        with pytest.raises(ConvertError, match="make room"):
            splice(header, source.parent / "out.gguf", OURS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert only_source_is_left(source)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_an_existing_destination_alone(source, monkeypatch, error):
    out = source.parent / "out.gguf"
    out.write_text("precious")

    def fail(*_):
        raise error

    monkeypatch.setattr(output.os, "fsync", fail)
    with pytest.raises(ConvertError if isinstance(error, OSError) else KeyboardInterrupt):
        splice(read_header(source), out, OURS, force=True)
    assert out.read_text() == "precious"
    assert len(list(source.parent.iterdir())) == 2


def test_source_that_shrinks_meanwhile(source):
    header = read_header(source)
    source.write_bytes(source.read_bytes()[:-10])
    with pytest.raises(ConvertError, match="ended 10 bytes early"):
        splice(header, source.parent / "out.gguf", OURS)
    assert only_source_is_left(source)


# Damaged files


def rewrite(path, data: bytes) -> None:
    """Replaces a file; removing it first spares the flush that ext4 makes when a file is truncated and rewritten."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def test_every_truncation_is_refused(tmp_path):
    data, path = gguf_bytes(odd_pairs()), tmp_path / "cut.gguf"
    for n in range(len(data)):
        rewrite(path, data[:n])
        with pytest.raises(ConvertError, match=r"cut\.gguf"):
            read_header(path)


@pytest.mark.parametrize("patch", [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x00" * 8, b"\x01" * 4, b"\x80"])
def test_overwritten_bytes_never_raise_anything_else(tmp_path, patch):
    data, path = gguf_bytes(odd_pairs()), tmp_path / "damaged.gguf"
    for at in range(0, len(data) - len(patch)):
        rewrite(path, data[:at] + patch + data[at + len(patch) :])
        try:
            for entry in read_header(path).entries.values():
                entry.value()
        except ConvertError:
            pass


def header_of(n_tensors: int, n_kv: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file: it has 0 bytes"),
        (b"PK\x03\x04 zip", "not a GGUF file: it begins with"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header_of(0, 0, version=1), "version 1"),
        (header_of(0, 0, version=4), "version 4"),
        (header_of(0, 2**60), f"header of {2**60} keys"),
        (header_of(2**60, 0), f"header of {2**60} tensors"),
        (header_of(0, 1, pair(b"", T.BOOL, b"\1\0")), "empty key"),
        (header_of(0, 1, pair(b"k", 13, b"\1" * 9)), "value type of key 'k' is 13"),
        (header_of(0, 1, pair(b"k", T.ARRAY, array(T.ARRAY, 1, bytes(12)))), "array of arrays"),
        (header_of(0, 1, pair(b"k", T.ARRAY, array(T.UINT8, 2**62, bytes(12)))), "value of key 'k' takes"),
        (header_of(0, 1, pair(b"k", T.ARRAY, array(T.STRING, 2**62, bytes(12)))), "value of key 'k' takes"),
        (header_of(0, 2, 2 * pair(b"k", T.BOOL, b"\1")), "key 'k' stands twice"),
        (header_of(0, 1, pair(b"general.alignment", T.UINT32, struct.pack("<I", 48))), "48 is not a power of two"),
        (header_of(0, 1, pair(b"general.alignment", T.UINT32, bytes(4))), "0 is not a power of two"),
        (header_of(0, 1, pair(b"general.alignment", T.UINT8, b"\x20")), "has type UINT8"),
        (header_of(1, 0, tensor_info(b"t", (1, 1, 1, 1, 1), 0, 0)), "5 dimensions"),
        (header_of(1, 0, tensor_info(b"t", (32,), 4, 0) + bytes(64)), "type 4, which"),
        (header_of(1, 0, tensor_info(b"t", (33,), 2, 0) + bytes(64)), "33 elements, not a multiple"),
        (header_of(1, 0, tensor_info(b"t", (1,), 0, 16) + bytes(64)), "begins at 16, not a multiple"),
        (header_of(1, 0, tensor_info(b"t", (2**40, 2**40), 0, 0) + bytes(64)), "truncated: tensor 't' ends"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_named(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ConvertError, match=message) as caught:
        read_header(path)
    assert "bad.gguf" in str(caught.value)


def test_unreadable_file(tmp_path):
    with pytest.raises(ConvertError, match="cannot be read: No such file"):
        read_header(tmp_path / "missing.gguf")
    with pytest.raises(ConvertError, match="cannot be read"):
        read_header(tmp_path)


def test_keys_of_the_wrong_type(source):
    header = read_header(source)
    assert header.get_string("general.architecture") == "llama"
    assert header.get_integer("missing", 7) == 7
    with pytest.raises(ConvertError, match=r"general\.architecture = llama is not a whole number"):
        header.get_integer("general.architecture", 0)
    with pytest.raises(ConvertError, match=r"texts = .* is not a string"):
        header.get_string("texts")


def test_devices_are_no_output_and_links_stay(source, tmp_path):
    with pytest.raises(ConvertError, match="a device or the like"):
        output.check_outputs([pathlib.Path(os.devnull)], force=True)
    target, link = tmp_path / "target.gguf", tmp_path / "link.gguf"
    target.write_bytes(b"old")
    link.symlink_to(target)
    output.write_bytes(link, [source], b"new", force=True)
    assert link.is_symlink() and target.read_bytes() == b"new"
