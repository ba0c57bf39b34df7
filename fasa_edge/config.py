"""The settings of the runtime, each declared once: how many tokens a sparse decode step keeps, and when it runs at all.

Keys of a GGUF (:mod:`fasa_edge.schema`), arguments of :class:`fasa_edge.Llama`, options of the commands, their checks
and the table in the documentation come from here. The budget is ``N_fac`` of arXiv 2602.03152, and its first layer is
dense too; sinks and recent tokens inside the budget are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fasa_edge.errors import SchemaError

INT32_MAX = 2**31 - 1  # cell ids and counts are int32 in the runtime

SELECTS = ("group", "head")
"""``enum llama_fasa_select_type`` (llama-fasa.h), in its order."""


@dataclass(frozen=True)
class Setting:
    """What is known of a setting before any model is.

    Attributes:
        name: in Python; the key is ``fasa.<name>``.
        type: bool, int or str.
        help: what it does, in a sentence.
        default: None where it depends on the model.
        limits: inclusive range of a number, in the unit that ``help`` names.
        choices: of a text; none where only the runtime knows them.
        is_fixed: whether it is fixed when a model is loaded; the others can change between decode steps.
        is_optional: whether a file may lack it, for it came later than the format.
    """

    name: str
    type: type
    help: str
    default: bool | int | str | None = None
    limits: tuple[int, int] = (0, 2**32 - 1)
    choices: tuple[str, ...] = ()
    is_fixed: bool = False
    is_optional: bool = False

    def check(self, value: object, name: str | None = None) -> None:
        """Refuse what could be the value of no model.

        Args:
            value: to be checked.
            name: what the message calls it; None: its own name.

        Raises:
            SchemaError: it has the wrong type, is out of range or none of the choices.
        """
        name = name or self.name
        if self.type is int:
            low, high = self.limits
            if not isinstance(value, int) or isinstance(value, bool):
                raise SchemaError(f"{name} = {value!r}: expected a whole number from {low} to {high}")
            if not low <= value <= high:
                raise SchemaError(f"{name} = {value} is out of range: choose {low} to {high}")
        elif self.type is bool:
            if not isinstance(value, bool):
                raise SchemaError(f"{name} = {value!r}: expected True or False")
        elif not isinstance(value, str):
            raise SchemaError(f"{name} = {value!r}: expected a name")
        elif self.choices and value not in self.choices:
            raise SchemaError(f"{name} = {value!r} is unknown: choose from {', '.join(self.choices)}")


def _setting(default: bool | int | str, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"default": default, "help": help, **more})


@dataclass(frozen=True)
class FasaConfig:
    """Settings of sparse decoding that a GGUF stores; every one of them can be overridden when a model is loaded.

    What each means and may be is in :data:`SETTINGS`.

    Raises:
        SchemaError: a value of the wrong type, out of range, or ``n_sink + n_recent > budget``.
    """

    enabled: bool = _setting(True, "False: all tokens are attended to, everywhere.")
    exact: bool = _setting(
        False,
        "What stays dense on the CPU, prompts as well, takes FASA's kernels: all cells, exact within rounding, faster.",
        is_optional=True,
    )
    budget: int = _setting(
        512,
        "Cells that a decoded token attends to in each sparse layer, of up to budget_ctx in use; sinks and recent ones "
        "included.",
        limits=(1, INT32_MAX),
    )
    budget_ctx: int = _setting(
        4096,
        "Cells in use that the budget is for: with n times as many it grows by the square root of n; 0: never.",
        limits=(0, INT32_MAX),
        is_optional=True,
    )
    n_sink: int = _setting(4, "First tokens, always attended to.", limits=(0, INT32_MAX))
    n_recent: int = _setting(32, "Last tokens, always attended to.", limits=(0, INT32_MAX))
    n_dense_layers: int = _setting(1, "First layers, which stay dense.", limits=(0, INT32_MAX), is_fixed=True)
    min_ctx: int = _setting(
        0,
        "Sparse from this many cells on; 0: from where the budget is half of them, on a GPU from where it pays.",
        limits=(0, INT32_MAX),
    )
    max_batch: int = _setting(  # a decoded token and the 10 that llama-cpp-python's draft model adds
        16, "A batch with more tokens of one sequence is a prompt and runs dense.", limits=(1, 64)
    )
    select: str = _setting(
        "group",
        "Who chooses the cells: each KV head for all query heads that read it, or each query head for itself.",
        choices=SELECTS,
        is_optional=True,
    )

    prompt_mass: int = _setting(
        1000,
        "Thousandths of its attention, by the tips, that a token of a prompt is left with, on the CPU; 1000: all.",
        limits=(1, 1000),
        is_optional=True,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            SETTINGS[item.name].check(getattr(self, item.name))
        if self.n_sink + self.n_recent > self.budget:
            raise SchemaError(
                f"n_sink + n_recent = {self.n_sink} + {self.n_recent} = {self.n_sink + self.n_recent} exceeds "
                f"budget = {self.budget}: raise the budget or keep fewer sinks and recent tokens"
            )


SETTINGS = {item.name: Setting(item.name, type(item.default), **item.metadata) for item in fields(FasaConfig)}
SETTINGS["n_tip"] = Setting("n_tip", int, "Chunks scored per KV head.", limits=(1, INT32_MAX), is_fixed=True)
"""Settings by name: fields of :class:`FasaConfig`, and ``n_tip``, whose default and maximum depend on the heads."""


def default_n_tip(n_embd_head: int) -> int:
    """Return the chunks per KV head for a head of ``n_embd_head`` dims: three quarters up to 24, then half, if more.

    24 of 32 at head size 64, 32 of 64 at 128, 64 of 128 at 256; a multiple of 4, as tips are packed, or all.
    """
    n_chunk = n_embd_head // 2
    n_tip = max(min(24, 3 * n_chunk / 4), n_chunk / 2)
    return min(4 * math.ceil(n_tip / 4), n_chunk)


def tip_bytes(n_tip: int) -> int:
    """Return the bytes of one cell's tips for a KV head: four bits for each dim of a chunk, in blocks of eight dims."""
    return 4 * math.ceil(2 * n_tip / 8)
