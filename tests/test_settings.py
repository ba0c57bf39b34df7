"""Settings are declared once, in ``fasa_edge.config``: what else names them, in Python, C or text, says the same."""

import re
from collections.abc import Iterator
from pathlib import Path

import fasa_edge
from fasa_edge.cli import main
from fasa_edge.config import INT32_MAX, SELECTS, SETTINGS, FasaConfig, Setting
from fasa_edge.convert.rope import ROPE_IMROPE, ROPE_MROPE, ROPE_NEOX, ROPE_NORM, chunk_dims
from fasa_edge.errors import FasaError, ModelError, SchemaError
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.schema import OPTIONAL, SCALARS, GGUFValueType

import numpy as np
import pytest
from tiny_models import make_model
from unchecked import convert

pytestmark = pytest.mark.check

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = [setting for setting in SETTINGS.values() if setting.type is int]
LATER = [setting for setting in SETTINGS.values() if not setting.is_fixed]


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the default settings; a head has 32 chunks."""
    folder = tmp_path_factory.mktemp("settings")
    return convert(make_model(folder / "plain.gguf"), folder / "fasa.gguf", tokens=512).path


@pytest.fixture(scope="module")
def llm(annotated: Path) -> Iterator[fasa_edge.Llama]:
    llm = fasa_edge.Llama(str(annotated), n_ctx=256, verbose=False)
    yield llm
    llm.close()


def bounds(setting: Setting) -> tuple[list[int], list[int]]:
    """Numbers within the limits and beyond, as C can tell them."""
    low, high = setting.limits
    return [low, high], [n for n in (low - 1, high + 1, 2**32 - 1) if 0 <= n < 2**32]


# The library


def test_the_library_has_the_same_settings() -> None:
    fields = {name.removeprefix("_"): kind for name, kind in capi.Params._fields_}
    assert fields.keys() == SETTINGS.keys() | {"policy"}
    kinds = {bool: "c_bool", int: "c_uint", str: "c_int"}
    for name, setting in SETTINGS.items():
        assert fields[name].__name__ == kinds[setting.type], name
    header = (ROOT / "patches/overlay/include/llama-fasa.h").read_text()
    struct = re.search(r"struct llama_fasa_params \{(.*?)\n *\};", header, re.S)[1]
    assert re.findall(r"^\s*(?:enum )?\w+\s+(\w+);", struct, re.M) == list(fields)


def test_the_library_names_the_same_choices() -> None:
    name = capi._function("llama_fasa_select_name", capi.ctypes.c_char_p, capi.ctypes.c_int)
    assert [name(i) for i in range(len(SELECTS) + 1)] == [*(choice.encode() for choice in SELECTS), None]


def test_the_library_has_the_same_defaults(tmp_path: Path) -> None:
    """Where it has any: a file may lack what came later, and ``exact`` alone needs no file."""
    llm = fasa_edge.Llama(str(make_model(tmp_path / "plain.gguf")), n_ctx=256, fasa_exact=True, verbose=False)
    found = llm.fasa.settings
    defaults = {name: getattr(FasaConfig, name) for name in ("budget_ctx", "max_batch", "select", "prompt_mass")}
    assert found == found | defaults
    settings = {f"fasa.{name}": getattr(FasaConfig, name) for name in ("exact", "budget_ctx", "select", "prompt_mass")}
    assert OPTIONAL == settings | {"fasa.calibration.clipped": None}
    llm.close()


@pytest.mark.parametrize("setting", [s for s in LATER if s.type is int], ids=lambda setting: setting.name)
def test_the_library_has_the_same_ranges(setting: Setting, llm: fasa_edge.Llama) -> None:
    """Of the settings that can change; what no budget leaves room for is refused by both, too."""
    good, bad = bounds(setting)
    before = llm.fasa.settings
    for n in good:
        others = {"n_sink": 0, "n_recent": 0, **({} if setting.name == "budget" else {"budget": INT32_MAX})}
        wanted = before | others | {setting.name: n}
        capi.set_params(llm.ctx, capi.Params(**wanted))
        assert llm.fasa.settings == wanted
        llm.fasa.configure(**{name: value for name, value in wanted.items() if name in (*others, setting.name)})
        assert llm.fasa.settings == wanted
    for n in bad:
        with pytest.raises(FasaError, match="refused the settings"):
            capi.set_params(llm.ctx, capi.Params(**(before | {setting.name: n})))
        with pytest.raises(SchemaError, match=f"^{setting.name} = {n} is out of range"):
            llm.fasa.configure(**{setting.name: n})
    capi.set_params(llm.ctx, capi.Params(**before))
    llm.fasa.configure(budget=before["budget"])  # nothing that the library took is refused from now on


@pytest.mark.parametrize("setting", [s for s in NUMBERS if s.is_fixed], ids=lambda setting: setting.name)
def test_the_library_has_the_same_ranges_at_load(setting: Setting, annotated: Path) -> None:
    good, bad = bounds(setting)
    for n in good:
        if setting.name == "n_tip" and n > 1:
            n = 32  # as many as the head has
        llm = fasa_edge.Llama(str(annotated), n_ctx=256, kv_overrides={f"fasa.{setting.name}": n}, verbose=False)
        assert llm.fasa.settings[setting.name] == n
        llm.close()
    for n in bad:
        with pytest.raises(ModelError, match=rf"fasa\.{setting.name} = {n} is out of range"):
            fasa_edge.Llama(str(annotated), n_ctx=256, kv_overrides={f"fasa.{setting.name}": n}, verbose=False)
        with pytest.raises(SchemaError, match=f"^fasa_{setting.name} = {n} is out of range"):
            fasa_edge.Llama(str(annotated), n_ctx=256, **{f"fasa_{setting.name}": n})


# Python


def test_keys() -> None:
    types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
    for name, setting in SETTINGS.items():
        assert SCALARS[f"fasa.{name}"] == types[setting.type]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_arguments_and_configure_check_alike(setting: Setting, annotated: Path, llm: fasa_edge.Llama) -> None:
    for value in (1.5, "nonsense", *([-1] if setting.type is int else [])):
        with pytest.raises(SchemaError, match=f"^fasa_{setting.name} = {value!r}"):
            fasa_edge.Llama(str(annotated), **{f"fasa_{setting.name}": value})
        if not setting.is_fixed:
            with pytest.raises(SchemaError, match=f"^{setting.name} = {value!r}"):
                llm.fasa.configure(**{setting.name: value})
    if setting.is_fixed:
        with pytest.raises(FasaError, match=f"{setting.name} is fixed when the model is loaded"):
            llm.fasa.configure(**{setting.name: 1})


def test_options_of_convert() -> None:
    options = {option.name: option for option in main.commands["convert"].params}
    for name, setting in SETTINGS.items():
        if setting.type is bool:
            continue  # of a run, not of a file
        assert options[name].default == setting.default
        assert options[name].help.startswith(setting.help)


def test_chunks_of_the_converter_are_the_runtimes() -> None:
    """The planes that ggml_rope_ext turns (ggml/src/ggml-cpu/ops.cpp), written down once more."""
    i = np.arange(16)
    for rope_type in (ROPE_NORM, ROPE_NEOX, ROPE_MROPE, ROPE_IMROPE):
        turned = np.stack([2 * i, 2 * i + 1] if rope_type == ROPE_NORM else [i, i + 16], 1)
        alone = np.arange(32, 64).reshape(-1, 2)
        assert (chunk_dims(64, 32, rope_type) == np.concatenate([turned, alone])).all()


def test_the_pinned_commit_is_written_once() -> None:
    commit = re.search("commit: (.*)", (ROOT / "patches/upstream.txt").read_text())[1]
    sources = [path for folder in ("fasa_edge", "convert", "patches") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if commit in path.read_text()] == ["library.py"]
    assert llama_cpp  # that it is the one of the library is checked as this is imported


# The documentation


def table() -> str:
    """The settings, as a table for people."""
    rows = [("setting", "default", "range", "meaning"), ("---",) * 4]
    for name, setting in SETTINGS.items():
        default = {None: "24 of 32, half of more", True: "on", False: "off"}.get(setting.default, setting.default)
        default = setting.default if setting.type is int and setting.default is not None else default
        numbers = "{} to {}".format(*setting.limits).replace(str(INT32_MAX), "2^31 - 1")
        limits = numbers if setting.type is int else ", ".join(setting.choices) or "on, off"
        limits = "1 to the chunks of a head" if name == "n_tip" else limits
        rows.append((f"`{name}`", default, limits, setting.help.replace("False: ", "off: ")))
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def test_the_table_is_in_the_documentation() -> None:
    """To bring it up to date, paste what this prints."""
    print(table())
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
    assert sum(table() in text for text in texts) == 1
