"""Why a layer does not run sparse: each reason that a model or a setting can give, on a hand-made profile."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import fasa_edge
from fasa_edge.config import FasaConfig
from fasa_edge.convert.capture import ModelRun
from fasa_edge.errors import ConvertError
from fasa_edge.io.gguf_header import read_header
from fasa_edge.io.gguf_splice import splice
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.schema import Calibration, Profile, to_metadata

import numpy as np
import pytest
from tiny_models import Shape, make_model
from unchecked import convert

pytestmark = pytest.mark.check

DESIGN = Path(__file__).resolve().parent.parent / "docs/design.md"


def annotate(model: Path, out: Path, without: Iterable[int] = ()) -> Path:
    """Any model that has chunks, with these in their natural order.

    Args:
        model: to be copied.
        out: the copy.
        without: layers that get none, besides those that have no planes.
    """
    with ModelRun(model, 256) as run:
        layers, fingerprint = run.geometry, run.fingerprint
    shapes = [(layer.n_head_kv, len(capi.chunk_dims(layer))) for layer in layers]
    shapes = [(0, 0) if il in without or 0 in shape else shape for il, shape in enumerate(shapes)]
    profile = Profile(
        n_tip=4,
        chunks=[np.tile(np.arange(n_chunk, dtype=np.int32), (n_head_kv, 1)) for n_head_kv, n_chunk in shapes],
        agreement=[np.zeros(shape, np.float32) for shape in shapes],
        centre=[np.zeros((*shape, 2), np.float32) for shape in shapes],
        step=[np.full(shape, 0.35, np.float32) for shape in shapes],
        config=FasaConfig(n_dense_layers=0, min_ctx=1),
        calibration=Calibration("none", 0, 0, 0, "natural order", "test"),
        fingerprint=fingerprint,
    )
    splice(read_header(model), out, to_metadata(profile), progress=lambda done, total: None)
    return out


@dataclass(frozen=True)
class Case:
    """A model and settings, and the layers of a decode step that do not run sparse.

    A model that can have no chunks has no profile, so what counts its layers is ``fasa.exact``.
    """

    dense: dict[str, int]
    n_sparse: int = 0
    arch: str = "llama"
    n_layer: int = 2
    without: tuple[int, ...] = ()
    settings: dict[str, bool | int] = field(default_factory=dict)
    n_batch: int = 1
    flash_attn: bool = True
    causal: bool = True


EXACT = {"fasa.exact": True}

CASES = {
    "none": Case({}, n_sparse=2),
    "disabled": Case({"disabled": 2}, settings={"fasa.enabled": False}),
    "prompt": Case({"prompt": 2}, n_batch=17),
    "short_context": Case({"short_context": 2}, settings={"fasa.min_ctx": 512}),
    "dense_layer": Case({"dense_layer": 1}, n_sparse=1, settings={"fasa.n_dense_layers": 1}),
    "no_chunks": Case({"no_chunks": 1}, n_sparse=1, without=(1,)),
    "no_chunks-shared": Case({"sliding_window": 3, "no_chunks": 1}, n_sparse=2, arch="gemma4", n_layer=6),
    "no_kv_heads": Case({"no_kv_heads": 2}, n_sparse=2, arch="deci", n_layer=4),
    "no_kv_heads-hybrid": Case({"no_kv_heads": 2}, n_sparse=2, arch="lfm2", n_layer=4),
    "no_kv_heads-recurrent": Case({"no_kv_heads": 2}, arch="mamba", settings=EXACT),
    "mla": Case({"mla": 2}, arch="deepseek2", settings=EXACT),
    "sliding_window": Case({"sliding_window": 1}, n_sparse=1, arch="gemma3"),
    "flash_attn_off": Case({"flash_attn_off": 2}, flash_attn=False),
    "non_causal": Case({"non_causal": 2}, causal=False),
    "attn_bias": Case({"attn_bias": 2}, arch="t5", settings=EXACT),
    "attn_bias-alibi": Case({"attn_bias": 2}, arch="bloom", settings=EXACT),
    "attn_bias-alibi-of-a-rope-architecture": Case({"attn_bias": 40}, arch="baichuan", n_layer=40, settings=EXACT),
}


@pytest.mark.parametrize("name", CASES)
def test_each_reason_can_be_reached(name, tmp_path) -> None:
    case = CASES[name]
    model = make_model(tmp_path / "tiny.gguf", case.arch, Shape(n_layer=case.n_layer))
    path = model if case.settings is EXACT else annotate(model, tmp_path / "annotated.gguf", case.without)
    llm = llama_cpp.Llama(
        str(path), n_ctx=512, flash_attn=case.flash_attn, kv_overrides=case.settings or None, verbose=False
    )
    fasa = fasa_edge.Fasa(llm)
    if llama_cpp.llama_model_has_encoder(llm.model):
        tokens = (llama_cpp.llama_token * 8)(*range(3, 11))
        assert llama_cpp.llama_encode(llm.ctx, llama_cpp.llama_batch_get_one(tokens, 8)) == 0
    llm.eval(list(range(3, 103)))
    llama_cpp.llama_set_causal_attn(llm.ctx, case.causal)
    fasa.reset_stats()
    llm.eval(list(range(3, 3 + case.n_batch)))
    stats = fasa.stats()
    assert stats.n_steps_prompt + stats.n_steps_decode == 1
    assert (stats.n_layers_sparse, stats.n_layers_dense) == (case.n_sparse, case.dense)
    llm.close()


def test_a_model_with_alibi_is_refused_by_the_converter_whatever_its_architecture(tmp_path) -> None:
    model = make_model(tmp_path / "tiny.gguf", "baichuan", Shape(n_layer=40))
    with pytest.raises(ConvertError, match="no rotary embedding"):
        convert(model, tokens=512)


REACHED_ELSEWHERE = {"backend", "stale_tips", "policy"}  # test_offload.py, test_state.py, test_policies.py


def test_the_table_of_reasons_is_the_same_in_docs_and_code() -> None:
    section = DESIGN.read_text(encoding="utf-8").split("## When a layer runs dense")[1].split("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    names = [name for name, _ in capi.REASONS]
    assert names[0] == "none" and documented == names[1:]
    assert {name.split("-")[0] for name in CASES} | REACHED_ELSEWHERE == set(names)
