"""How fast reading and decoding are: of models, and of the attention ops alone (``fasa-edge bench``)."""

from fasa_edge.bench.measurement import measure, measure_ops, measure_prompt_ops
from fasa_edge.bench.models import BenchRow
from fasa_edge.bench.ops import OpRow
from fasa_edge.bench.prompt_ops import PromptOpRow

__all__ = ["BenchRow", "OpRow", "PromptOpRow", "measure", "measure_ops", "measure_prompt_ops"]
