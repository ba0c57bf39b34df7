"""Every type of K and V that llama.cpp stores: attending to all cells decodes what dense attention decodes."""

from __future__ import annotations

from pathlib import Path

from fasa_edge.runtime.library import llama_cpp

import pytest
from runtime import GGML_TYPES, TEXTS, Context, annotated_tiny, nmse

N_PROMPT = 700
TYPES = [*((type_kv, type_kv) for type_kv in GGML_TYPES), ("q8_0", "f16"), ("f16", "q4_0"), ("q8_0", "q5_1")]
UNQUANTIZED = {"f32", "f16", "bf16"}


@pytest.fixture(scope="module", params=[64, 80, 96, 128, 256])
def n_embd_head(request: pytest.FixtureRequest) -> int:
    """64 and 128 are rotated before K is quantized, 96 is not, and 80 cannot be quantized."""
    return request.param


@pytest.fixture(scope="module")
def model(n_embd_head: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated_tiny(tmp_path_factory.mktemp("tiny"), n_embd_head=n_embd_head)


def test_all_cells_decode_as_dense(model: Path, n_embd_head: int) -> None:
    batch = [(TEXTS[1][i], N_PROMPT + i, (0,)) for i in range(4)]
    for type_k, type_v in TYPES:
        if n_embd_head % 32 and not {type_k, type_v} <= UNQUANTIZED:
            continue
        with Context(model, type_k=GGML_TYPES[type_k], type_v=GGML_TYPES[type_v]) as ctx:
            ctx.read(TEXTS[0][:N_PROMPT])
            ctx.configure(budget=1024)
            ctx.reasons()
            everything = ctx.decode(batch)
            assert ctx.reasons() == {"none": 2}
            llama_cpp.llama_memory_seq_rm(ctx.memory, 0, N_PROMPT, -1)
            ctx.configure(enabled=False)
            dense = ctx.decode(batch)
            assert nmse(dense, everything) <= 5e-5, (type_k, type_v)
            llama_cpp.llama_memory_seq_rm(ctx.memory, 0, N_PROMPT, -1)
            ctx.configure(exact=True)
            ctx.stats()
            assert nmse(dense, ctx.decode(batch)) <= 5e-5, (type_k, type_v)
            assert ctx.stats().n_layers_exact == 2
