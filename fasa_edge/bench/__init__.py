"""How fast decoding is: of models, and of the attention ops alone (``fasa-edge bench``)."""

from fasa_edge.bench.measurement import measure, measure_ops
from fasa_edge.bench.models import BenchRow
from fasa_edge.bench.ops import OpRow

__all__ = ["BenchRow", "OpRow", "measure", "measure_ops"]
