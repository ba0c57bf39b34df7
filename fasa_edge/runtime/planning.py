"""What a llama-server takes of the machine: layers on GPUs, context, slots, and prompts that no slot holds any more."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from fasa_edge.errors import ModelError
from fasa_edge.runtime import capi, memory
from fasa_edge.runtime.fit import N_CTX_STEP, Room, longest, maps, n_ctx_train, padded, usage, weightless
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import error_log
from fasa_edge.runtime.server_options import ServerOptions

_N_BATCH, _N_UBATCH = 2048, 512  # of llama-server
_MAX_SLOTS = 4  # as llama-server has them unless told otherwise
_ALL_LAYERS = 999
_CACHE_SHARE = 2  # of what the slots leave of the host's memory, half is for prompts that no slot holds any more
_MAX_CACHE_MIB = 8192  # of llama-server

N_CTX_ON_GPU = 8192
"""Cells for whose sake layers stay on the CPU where a GPU has no room for both. With fewer, all layers might go there
and decode faster, but from texts too short for what FASA is for; whoever asks for more gets them, and fewer layers."""

Usage = Callable[[int, int, int], "Sequence[capi.Memory] | None"]
"""Says what so many layers on devices, cells of a slot and slots take, by kind of memory; None: they cannot be had."""


@dataclass(frozen=True)
class Plan:
    """What a server takes of the machine.

    Attributes:
        n_ctx: cells of each slot.
        n_slots: requests that are answered at once.
        n_gpu_layers: layers on devices.
        n_layers: layers of the model, its output being one.
        cache_mib: memory for prompts that no slot holds any more.
    """

    n_ctx: int
    n_slots: int
    n_gpu_layers: int
    n_layers: int
    cache_mib: int

    def arguments(self) -> list[str]:
        """Return the options of llama-server that say so."""
        options = {
            "--ctx-size": padded(self.n_ctx) * self.n_slots,
            "--parallel": self.n_slots,
            "--gpu-layers": _every(self.n_gpu_layers, self.n_layers),
            "--cache-ram": self.cache_mib,
        }
        return [word for name, value in options.items() for word in (name, str(value))]


def plan(
    model_path: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    *,
    n_ctx: int = 0,
    n_slots: int = 0,
    n_threads: int = 1,
    n_gpu_layers: int | None = None,
    options: ServerOptions | None = None,
) -> Plan:
    """Choose what was not chosen, by what llama.cpp says that the model takes and what the machine has left.

    Args:
        model_path: a GGUF file.
        profile: FASA profile that replaces the model's own.
        n_ctx: cells of each slot; 0: see :func:`choose`.
        n_slots: requests that are answered at once; 0: likewise.
        n_threads: that will be started.
        n_gpu_layers: layers on devices, -1 for all; None: likewise.
        options: further options of llama-server, of which those that scale RoPE and set the types of the cache count.

    Raises:
        ModelError: the model cannot be loaded, llama.cpp makes no context of it with these options, it was not trained
            for such a context, or memory does not hold it, or not with such a context.
    """
    model_params, context_params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    context_params.swa_full = False  # as llama-server has it
    context_params.n_outputs_max = context_params.n_outputs_max_per_seq = 1  # likewise, of a slot
    if options is not None:
        options.apply(context_params)

    with contextlib.ExitStack() as stack:

        @cache
        def loaded(n_gpu_layers: int) -> int | None:
            params = type(model_params).from_buffer_copy(model_params)
            params.n_gpu_layers = n_gpu_layers
            return stack.enter_context(weightless(model_path, params, profile))

        if not (model := loaded(0)):
            raise ModelError(
                f"{os.fspath(model_path)} cannot be loaded: `fasa-edge run -v` shows what llama.cpp says of it"
            )
        n_layers = llama_cpp.llama_model_n_layer(model) + 1

        @cache
        def taken(n_gpu_layers: int, n_ctx: int, n_slots: int) -> list[capi.Memory] | None:
            model = loaded(_every(n_gpu_layers, n_layers))
            return usage(model, context_params, n_ctx, _N_BATCH, _N_UBATCH, n_slots) if model else None

        if n_gpu_layers is None and not llama_cpp.llama_supports_gpu_offload():
            n_gpu_layers = 0
        if n_gpu_layers == -1:
            n_gpu_layers = n_layers
        # it takes no memory, and llama.cpp says only then how far YaRN stretches what the model was trained for
        for n in (0, n_gpu_layers or 0):
            with error_log() as said:
                if taken(n, N_CTX_STEP, n_slots or 1) is None:
                    reason = "; ".join(dict.fromkeys(said)) or "it does not say why"
                    raise ModelError(
                        f"llama.cpp makes no context of {os.fspath(model_path)} with these options, however short: "
                        f"{reason}; change the options after --, --slots or -ngl"
                    )
        return choose(
            taken,
            Room(memory.limits(), capi.device_memory, maps=maps(model_params), n_threads=n_threads, is_loaded=False),
            name=os.fspath(model_path),
            n_ctx_train=n_ctx_train(model),
            n_layers=n_layers,
            n_ctx=n_ctx,
            n_slots=n_slots,
            n_gpu_layers=n_gpu_layers,
        )


def choose(
    usage: Usage,
    room: Room,
    *,
    name: str,
    n_ctx_train: int,
    n_layers: int,
    n_ctx: int = 0,
    n_slots: int = 0,
    n_gpu_layers: int | None = None,
) -> Plan:
    """Choose layers on devices, context and slots, in this order, by nothing but numbers.

    As many layers go to devices as leave room there for the context that is asked for, or else for
    :data:`N_CTX_ON_GPU` cells. Without a context that is asked for, it is then the longest that memory holds, up to
    what the model was trained for. Then more slots of it, up to 4, and then the cache of prompts.

    Args:
        usage: what a choice takes.
        room: what there is.
        name: of the model, in messages.
        n_ctx_train: cells that the model was trained for.
        n_layers: layers of the model, its output being one.
        n_ctx: cells of each slot; 0: to be chosen.
        n_slots: 0: to be chosen.
        n_gpu_layers: None: to be chosen.

    Raises:
        ModelError: the model was not trained for such a context, or memory does not hold it, or not with such a
            context.
    """
    if n_ctx > n_ctx_train:
        raise ModelError(
            f"a context of {n_ctx} cells is more than the {n_ctx_train} that {name} was trained for, and llama-server "
            f"gives a slot no more: lower -c to {n_ctx_train}, or stretch it by options of llama-server, `-- "
            f"--rope-scaling yarn --rope-scale {-(-n_ctx // n_ctx_train)}`"
        )
    n_asked, slots = padded(n_ctx), n_slots or 1
    on_devices = f" with {n_gpu_layers} layers on devices" if n_gpu_layers else ""

    def fits(n_gpu_layers: int, n_ctx: int, n_slots: int) -> bool:
        kinds = usage(n_gpu_layers, n_ctx, n_slots)
        return kinds is not None and room.holds(kinds)

    def devices_lack_room(n_gpu_layers: int, n_ctx: int) -> bool:
        kinds = usage(n_gpu_layers, n_ctx, slots)
        return kinds is None or not room.devices_hold(kinds)

    @cache
    def layers_beside(n_ctx: int) -> int | None:
        """The most layers that devices have room for beside so many cells; None: the host has none for the rest."""
        if fits(n_layers, n_ctx, slots):
            return n_layers
        n = bisect_left(range(n_layers + 1), True, key=lambda n: devices_lack_room(n, n_ctx)) - 1
        return n if n >= 0 and fits(n, n_ctx, slots) else None

    def possible(n_ctx: int) -> bool:
        return layers_beside(n_ctx) is not None if n_gpu_layers is None else fits(n_gpu_layers, n_ctx, slots)

    wanted = n_asked or min(padded(n_ctx_train), N_CTX_ON_GPU)
    if not possible(wanted):
        most = longest(wanted, possible)
        if not most:
            kinds = usage(n_gpu_layers or 0, N_CTX_STEP, slots) or ()
            raise ModelError(
                f"memory does not hold {name}{on_devices}: {sum(kind.model for kind in kinds)} bytes of weights, "
                f"{room.describe(kinds)}; end what else takes memory, or choose a smaller quantization or model"
            )
        if n_asked:
            kinds = usage(n_gpu_layers or 0, most, slots) or ()
            lower = "the context or the slots, or -ngl" if on_devices else "the context or the slots"
            raise ModelError(
                f"memory does not hold {n_ctx} cells for each of {slots} slots{on_devices}: {room.describe(kinds)}, "
                f"which is room for {most}; lower {lower}"
            )
        wanted = most
    if n_gpu_layers is None:
        n_gpu_layers = layers_beside(wanted) or 0
    n_layers_chosen = n_gpu_layers
    n_cells = n_asked or longest(n_ctx_train, lambda n_ctx: fits(n_layers_chosen, n_ctx, slots))
    if not n_slots:
        n_slots = next((n for n in range(_MAX_SLOTS, 1, -1) if fits(n_gpu_layers, n_cells, n)), 1)
    left = room.left(usage(n_gpu_layers, n_cells, n_slots) or ())
    return Plan(
        n_ctx=min(n_cells, n_ctx_train),
        n_slots=n_slots,
        n_gpu_layers=n_gpu_layers,
        n_layers=n_layers,
        cache_mib=min((left >> 20) // _CACHE_SHARE, _MAX_CACHE_MIB),
    )


def _every(n_gpu_layers: int, n_layers: int) -> int:
    """A number of layers as llama.cpp takes it: all are more than any model has, also what it has beside its layers."""
    return _ALL_LAYERS if n_gpu_layers >= n_layers else n_gpu_layers
