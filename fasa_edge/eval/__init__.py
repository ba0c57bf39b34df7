"""Quality of sparse decoding against dense attention, measured on the patched llama.cpp itself (``fasa-edge eval``)."""

from fasa_edge.eval.answers import AnswerRow
from fasa_edge.eval.evaluation import Evaluation, evaluate
from fasa_edge.eval.text import TextRow

__all__ = ["AnswerRow", "Evaluation", "TextRow", "evaluate"]
