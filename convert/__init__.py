"""The converter: measures which RoPE frequency chunks rank tokens as the full head does, and writes them into a GGUF.

Installed as ``fasa_edge.convert``. Only the commands import it.
"""

from .checkpoint import OUTTYPES
from .objectives import OBJECTIVES
from .pipeline import DEFAULT_TOKENS, DEFAULT_TOP_K, ConvertResult, convert
from .plot import write_plot
from .report import FileReport, farthest, inspect, picture
from .selfcheck import Check
from .source import default_output

__all__ = [
    "DEFAULT_TOKENS",
    "DEFAULT_TOP_K",
    "OBJECTIVES",
    "OUTTYPES",
    "Check",
    "ConvertResult",
    "FileReport",
    "convert",
    "default_output",
    "farthest",
    "inspect",
    "picture",
    "write_plot",
]
