"""The converter without its check at the end, which costs more than the conversion of a small model."""

from functools import partial

from fasa_edge.convert import convert as _convert

convert = partial(_convert, check=False)
