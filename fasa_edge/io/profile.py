"""A stand-alone profile: a GGUF without tensors that holds the ``fasa.*`` keys, for all quantizations of a model."""

from __future__ import annotations

import struct

from fasa_edge.io.gguf_header import MAGIC, VERSIONS, GgufHeader
from fasa_edge.io.gguf_splice import Metadata, encode_entry
from fasa_edge.schema import GGUFValueType

TYPE = "fasa-profile"  # general.type, beside llama.cpp's model, adapter, imatrix, mmproj
_KEPT = ("general.architecture", "general.name")


def encode_profile(header: GgufHeader, metadata: Metadata) -> bytes:
    """Encodes a profile as the whole file.

    Args:
        header: of the model, whose architecture and name it repeats.
        metadata: ``(key, type, value)``, see :func:`fasa_edge.io.gguf_splice.encode_entry`.
    """
    pairs = [entry.raw for key in _KEPT if (entry := header.find(key)) is not None]
    pairs += [encode_entry(*item) for item in (("general.type", GGUFValueType.STRING, TYPE), *metadata)]
    return MAGIC + struct.pack("<IQQ", VERSIONS[-1], 0, len(pairs)) + b"".join(pairs)
