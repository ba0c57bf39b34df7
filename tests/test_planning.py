"""What a llama-server takes of the machine: of made-up GPUs by numbers alone, and of models that llama.cpp measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fasa_edge.errors import ModelError
from fasa_edge.runtime import capi, memory
from fasa_edge.runtime.fit import Room, usage, weightless
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.planning import N_CTX_ON_GPU, Plan, choose, plan
from fasa_edge.runtime.server_options import ServerOptions

import pytest
from runtime import annotated_tiny
from tiny_models import Shape, make_model

pytestmark = pytest.mark.check

MIB, GIB = 1 << 20, 1 << 30
GPU = 1  # ggml_backend_dev_t, made up
N_CTX_TRAIN = 1 << 17


PLENTY = Room([memory.Available(1 << 50, "")], lambda device: 1 << 50, maps=True, n_threads=0, is_loaded=False)


# By numbers alone


@dataclass(frozen=True)
class Geometry:
    """A model of as many bytes as one of Llama 3's at Q4_K_M; K and V are f16, a tip is of 16 dims."""

    n_layer: int
    embeddings: int
    output: int
    layer: int
    cell: int  # bytes of K, V and tips in one layer

    @property
    def n_layers(self) -> int:
        return self.n_layer + 1

    def usage(self, n_gpu_layers: int, n_ctx: int, n_slots: int) -> list[capi.Memory]:
        """The output goes to the GPU first, then the last layers; each keeps its cells."""
        there = min(max(n_gpu_layers - 1, 0), self.n_layer)
        here, cells = self.n_layer - there, n_ctx * n_slots
        output = self.output if n_gpu_layers else 0
        computing = 300 * MIB + 1024 * n_ctx  # of which a mask, f16, of a micro-batch
        host = {
            "model": self.embeddings + self.output - output + here * self.layer,
            "context": here * self.cell * cells,
        }
        on_gpu = {"model": output + there * self.layer, "context": there * self.cell * cells}
        return [
            capi.Memory(is_host=True, can_map=True, compute=computing if here else 20 * MIB, **host),
            capi.Memory(device=GPU, compute=computing if there else 0, **on_gpu),
        ]

    def on(self, card: float, host: float = 32, **asked: int) -> Plan:
        """Choose for GPU and host of so many GiB, of which half a GiB is taken."""
        limits = [memory.Available(int(host * GIB), "the machine's memory")]
        free = int((card - 0.5) * GIB)
        room = Room(limits, lambda device: free, maps=True, n_threads=3, is_loaded=False)
        res = choose(self.usage, room, name="m.gguf", n_ctx_train=N_CTX_TRAIN, n_layers=self.n_layers, **asked)
        taken = self.usage(res.n_gpu_layers, res.n_ctx, res.n_slots)
        assert taken[1].model + taken[1].context + taken[1].compute <= free - GIB
        assert taken[0].context <= (host * GIB - taken[0].model - taken[0].compute) / 2
        return res


MODELS = {
    "1B": Geometry(n_layer=16, embeddings=0, output=205 * MIB, layer=36 * MIB, cell=2 * 8 * 64 * 2 + 8 * 16 * 2),
    "8B": Geometry(
        n_layer=32, embeddings=282 * MIB, output=411 * MIB, layer=125 * MIB, cell=2 * 8 * 128 * 2 + 8 * 16 * 2
    ),
}
CARDS = [  # GiB of the GPU, -c; layers there, cells, slots
    ("1B", 8, 0, 17, 131072, 1),
    ("1B", 8, 32768, 17, 32768, 4),
    ("1B", 12, 0, 17, 131072, 2),
    ("1B", 24, 0, 17, 131072, 4),
    ("8B", 5, 0, 19, 8192, 1),
    ("8B", 8, 0, 33, 14336, 1),
    ("8B", 8, 8192, 33, 8192, 1),
    ("8B", 8, 16384, 31, 16384, 1),
    ("8B", 8, 32768, 23, 32768, 1),
    ("8B", 8, 131072, 9, 131072, 1),
    ("8B", 12, 0, 33, 45056, 1),
    ("8B", 12, 16384, 33, 16384, 2),
    ("8B", 12, 131072, 15, 131072, 1),
    ("8B", 16, 0, 33, 75520, 1),
    ("8B", 16, 16384, 33, 16384, 4),
    ("8B", 16, 131072, 21, 131072, 1),
    ("8B", 24, 0, 33, 131072, 1),
    ("8B", 24, 32768, 33, 32768, 4),
]


@pytest.mark.parametrize("name, card, n_ctx, n_gpu_layers, n_cells, n_slots", CARDS)
def test_cards(name: str, card: float, n_ctx: int, n_gpu_layers: int, n_cells: int, n_slots: int) -> None:
    """The context that is asked for, or one of 8192 cells, goes before layers; those before a longer one."""
    res = MODELS[name].on(card, n_ctx=n_ctx)
    assert (res.n_gpu_layers, res.n_ctx, res.n_slots) == (n_gpu_layers, n_cells, n_slots)
    assert res.n_gpu_layers == MODELS[name].n_layers or res.n_ctx >= (n_ctx or N_CTX_ON_GPU)


def test_what_is_asked_for_stays_on_a_card() -> None:
    model = MODELS["8B"]
    assert model.on(8, n_gpu_layers=10).n_gpu_layers == 10
    assert model.on(8, n_gpu_layers=10).n_ctx > model.on(8, n_gpu_layers=30).n_ctx > model.on(8).n_ctx
    assert model.on(8, n_slots=3, n_ctx=8192).n_gpu_layers < model.on(8, n_slots=1, n_ctx=8192).n_gpu_layers
    assert model.on(8, n_slots=3).n_ctx == N_CTX_ON_GPU
    said = "8192 cells for each of 1 slots with 33 layers .* a GPU's, which is room for 6656; lower .*, or -ngl"
    with pytest.raises(ModelError, match=said):
        model.on(7, n_ctx=8192, n_gpu_layers=33)


def test_little_memory_beside_a_card() -> None:
    """Layers that the host has no room for are on the GPU, with the context that is left for them."""
    model = MODELS["8B"]
    res = model.on(6, host=2)
    assert res.n_ctx < N_CTX_ON_GPU and res.n_gpu_layers > model.on(6).n_gpu_layers
    with pytest.raises(ModelError, match=r"131072 cells for each of 1 slots: .* room for \d+; lower the context"):
        model.on(8, host=8, n_ctx=N_CTX_TRAIN)
    with pytest.raises(
        ModelError, match=r"not hold m.gguf: \d+ bytes of weights, \d+ are left of the .*, \d+ of a GPU's"
    ):
        model.on(3, host=2)


def test_prompts_get_what_slots_leave() -> None:
    """The host's memory without weights, compute buffers and cells of all slots, of which half stays free."""
    model = MODELS["8B"]
    res = model.on(8, host=32, n_ctx=32768)
    taken = model.usage(res.n_gpu_layers, res.n_ctx, res.n_slots)[0]
    assert model.on(8, host=32, n_ctx=32768).cache_mib == 8192  # llama-server's own at most
    assert (
        model.on(8, host=16, n_ctx=32768).cache_mib
        == (16 * GIB - taken.model - taken.context - taken.compute) // MIB // 2
    )
    assert model.on(8, host=1.25, n_ctx=8192).cache_mib < 500


def test_more_than_a_model_was_trained_for() -> None:
    said = r"129 cells is more than the 128 that m.gguf was trained for, .*: lower -c to 128, or .*yarn --rope-scale 2`"
    for n_ctx in (129, 256):
        with pytest.raises(ModelError, match=said.replace("129", str(n_ctx), 1)):
            choose(MODELS["1B"].usage, PLENTY, name="m.gguf", n_ctx_train=128, n_layers=17, n_ctx=n_ctx)
    res = choose(MODELS["1B"].usage, PLENTY, name="m.gguf", n_ctx_train=1000, n_layers=17)
    assert res.n_ctx == 1000 and res.arguments()[:4] == ["--ctx-size", "4096", "--parallel", "4"]
    res = choose(MODELS["1B"].usage, PLENTY, name="m.gguf", n_ctx_train=N_CTX_TRAIN, n_layers=17, n_ctx=1000)
    assert res.n_ctx == 1024  # llama.cpp rounds up


# Of models that llama.cpp measures


def test_slots_and_context_by_memory(tmp_path: Path, free: Callable[..., None]) -> None:
    """As many slots of the whole context as fit, then one of what fits."""
    n_ctx = 1 << 16
    model = make_model(tmp_path / "long.gguf", shape=Shape(n_ctx=n_ctx))
    found = []
    for n_bytes in (1 << 40, *range(2000 << 20, 200 << 20, -(100 << 20)), 160 << 20):
        free(host=n_bytes)
        found.append(plan(model))
    assert (found[0].n_slots, found[0].n_ctx, found[0].cache_mib) == (4, n_ctx, 8192)
    assert [plan.n_slots for plan in found] == sorted((plan.n_slots for plan in found), reverse=True)
    assert {plan.n_slots for plan in found} == {1, 2, 3, 4}
    assert all(plan.n_ctx == n_ctx for plan in found if plan.n_slots > 1) and found[-1].n_ctx < n_ctx
    assert found[-1].cache_mib < 100

    assert plan(model, n_slots=8).n_ctx < found[-1].n_ctx
    with pytest.raises(ModelError, match=r"65536 cells for each of 8 slots: .* room for \d+; lower the context or the"):
        plan(model, n_ctx=n_ctx, n_slots=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_layer=4, n_ctx=1 << 16)


def test_a_batch_is_shared_by_slots(model: Path) -> None:
    """It holds as many tokens as all slots have cells, as llama-server's: not just those of one."""
    params = llama_cpp.llama_context_default_params()
    with weightless(model, llama_cpp.llama_model_default_params()) as loaded:
        found = usage(loaded, params, 256, 2048, 512, n_slots=4)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4 * 256, 2048, 512, 4
        ctx = llama_cpp.llama_init_from_model(loaded, params)
        wanted = capi.memory(ctx)
        llama_cpp.llama_free(ctx)
    assert [(of.context, of.compute) for of in found] == [(of.context, of.compute) for of in wanted]


def test_layers_on_a_device(model: Path, offload_device: int, free: Callable[..., None]) -> None:
    """The fewer, the less memory it has, until the whole context is on the host."""
    n_ctx = 32768
    found = []
    for n_mib in (1 << 20, *range(250, 0, -10), 0):
        free(on_device=n_mib * MIB)
        found.append(plan(model, n_ctx=n_ctx, n_slots=1).n_gpu_layers)
    assert found == sorted(found, reverse=True) and set(found) == set(range(6))
    assert all(of.n_ctx == 1 << 16 for of in (plan(model, n_gpu_layers=0), plan(model)))


def test_devices_that_are_not_there(model: Path, free: Callable[..., None]) -> None:
    assert plan(model).n_gpu_layers == 0 and plan(model, n_gpu_layers=-1).n_gpu_layers == 5
    assert plan(model, n_gpu_layers=-1).arguments()[4:6] == ["--gpu-layers", "999"]


def test_options_of_the_server(model: Path, free: Callable[..., None]) -> None:
    """Scaling of RoPE lets a context be longer, where llama.cpp says so; types of the cache make it smaller."""
    with pytest.raises(ModelError, match="--rope-scaling yarn --rope-scale 2"):
        plan(model, n_ctx=1 << 17)
    yarn = ServerOptions(["--rope_scaling", "yarn", "--rope-scale", "2"], {})
    assert plan(model, options=yarn).n_ctx == plan(model, n_ctx=1 << 17, options=yarn).n_ctx == 1 << 17
    by_environment = ServerOptions([], {"LLAMA_ARG_ROPE_SCALING_TYPE": "yarn", "LLAMA_ARG_ROPE_FREQ_SCALE": "0.5"})
    assert plan(model, options=by_environment).n_ctx == 1 << 17
    for words in (
        ["--rope-scale", "2"],
        ["--rope-scaling", "yarn", "--rope-scale", "0"],
        ["-ctk", "q3", "--rope-scale"],
    ):
        assert plan(model, options=ServerOptions(words, {})).n_ctx == 1 << 16

    free(host=200 * MIB)
    assert plan(model).n_ctx < plan(model, options=ServerOptions(["-ctk", "q8_0", "--cache-type-v", "q8_0"], {})).n_ctx


@pytest.mark.parametrize(
    "words, n_slots, n_gpu_layers, reason",
    [
        (["-fa", "off", "-ctv", "q8_0"], 0, None, "V cache"),
        (["-fa", "off", "-ctv", "q8_0"], 0, -1, "V cache"),
        (["-ctk", "q8_0"], 0, None, "K cache"),  # heads of 80 are no whole blocks of 32
        ([], 1000, None, "n_seq_max"),
    ],
)
def test_what_llama_cpp_refuses(
    model: Path,
    tmp_path: Path,
    free: Callable[..., None],
    words: list[str],
    n_slots: int,
    n_gpu_layers: int,
    reason: str,
) -> None:
    """It is no lack of memory, and llama.cpp says what it is."""
    if "-ctk" in words:
        model = make_model(tmp_path / "small.gguf", shape=Shape(n_embd_head=80))
    with pytest.raises(ModelError, match=f"makes no context of .*{model.name} with these options.*{reason}"):
        plan(model, n_slots=n_slots, n_gpu_layers=n_gpu_layers, options=ServerOptions(words, {}))
