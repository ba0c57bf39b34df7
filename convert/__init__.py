"""The converter: measures which RoPE frequency chunks rank tokens as the full head does, and writes them into a GGUF.

Installed as ``fasa_edge.convert``. Only the commands import it.
"""

from .checkpoint import OUTTYPES
from .inspect import FileReport, farthest, inspect, picture
from .objectives import OBJECTIVES
from .pipeline import DEFAULT_TOKENS, DEFAULT_TOP_K, ROPE_ARGUMENTS, ConvertResult, convert
from .plot import write_plot
from .selfcheck import Check

__all__ = [
    "DEFAULT_TOKENS",
    "DEFAULT_TOP_K",
    "OBJECTIVES",
    "OUTTYPES",
    "ROPE_ARGUMENTS",
    "Check",
    "ConvertResult",
    "FileReport",
    "convert",
    "farthest",
    "inspect",
    "picture",
    "write_plot",
]
