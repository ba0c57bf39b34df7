"""What the patches hook into llama.cpp, read from their text: hooks that its maintainers could take."""

import re
from email import message_from_string
from pathlib import Path

import pytest

pytestmark = pytest.mark.check

ROOT = Path(__file__).resolve().parent.parent
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
OURS = sorted(path for folder in ("patches/overlay", "patches/eval") for path in (ROOT / folder).rglob("*.[hc]*"))
SOURCES = {".h", ".cpp", ".cu", ".cuh", ".metal"}
KERNELS = sorted(path for path in (ROOT / "ggml_kernels").rglob("*") if path.suffix in SOURCES)


def added(patch: Path, file: str) -> str:
    """The lines that a patch adds to files of that name."""
    parts = patch.read_text(encoding="utf-8").split("\ndiff --git ")[1:]
    lines = [line for part in parts if file in part.split("\n", 1)[0] for line in part.splitlines()]
    return "\n".join(line[1:] for line in lines if line.startswith("+") and not line.startswith("+++"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem[:4])
def test_patch_is_a_mail_that_says_why(patch: Path) -> None:
    text = patch.read_text(encoding="utf-8")
    assert text.startswith("From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n")
    mail = message_from_string(text.partition("\n")[2])
    assert mail["From"] and mail["Date"] and re.fullmatch(r"\[PATCH\] [a-z-]+: .+", mail["Subject"])
    message = mail.get_payload().partition("\ndiff --git ")[0]
    assert len(message.split()) > 20
    assert all(len(line) <= 78 for line in message.splitlines())


def test_kv_cache_knows_nothing_of_tips() -> None:
    hooks = "".join(added(patch, "llama-kv-cache.") for patch in PATCHES)
    assert "listener->on_change" in hooks and "tips" not in hooks


def test_huge_pages_are_of_a_patch_alone() -> None:
    (patch,) = [patch for patch in PATCHES if "huge_pages" in patch.read_text(encoding="utf-8")]
    assert patch.read_text(encoding="utf-8").count("\n@@ ") == 2  # an include, a call


def test_nothing_is_defined_in_the_name_of_a_foreign_class() -> None:
    texts = [path.read_text(encoding="utf-8") for path in OURS]
    find = lambda pattern: {name for text in texts for name in re.findall(pattern, text, re.MULTILINE)}  # noqa: E731
    classes = find(r"^(?:class|struct) +(\w+)(?: +:[^;{]*)? *\{")
    owners = find(r"^(?=\w)(?!static)[\w:<>*&, ]*?\b(\w+)::~?\w+\([^;]*?\{$")
    assert "llama_fasa_tips" in owners and owners <= classes


@pytest.mark.parametrize("header", ["overlay/include/llama-fasa.h", "eval/llama-fasa-eval.h"])
def test_enumerators_carry_the_name_of_their_enum(header: str) -> None:
    text = (ROOT / "patches" / header).read_text(encoding="utf-8")
    enums = re.findall(r"^ +LLAMA_FASA_ENUM\((\w+)\) \{(.*?)^ +\};", text, re.MULTILINE | re.DOTALL)
    assert enums
    for name, body in enums:
        enumerators = re.findall(r"^ +([A-Z]\w+)", body, re.MULTILINE)
        assert len(enumerators) > 1 and all(each.startswith(f"{name.upper()}_") for each in enumerators)


SAME_ON_BOTH = {
    *("FASA_BINS", "FASA_BIN_SHIFT", "FASA_BIN_FIRST", "FASA_LEAST", "FASA_MOST", "FASA_LOG2_E"),
    *("fasa_bin", "fasa_round_query"),  # of other arguments
}
"""Names that CPU and GPU kernels both define, for the same."""


def test_a_name_means_one_thing_in_all_kernels() -> None:
    definition = (
        r"#define +(\w+)|constexpr [\w ]+?\b(\w+) +=|^(?:struct|class) (\w+) \{|^[A-Za-z][\w :*&<>]*?\b(\w+)\([^;]*$"
    )
    defined: dict[str, set[str]] = {"cpu": set(), "gpu": set()}
    for path in KERNELS:
        text, side = path.read_text(encoding="utf-8"), path.parent.name
        found = {name for names in re.findall(definition, text, re.MULTILINE) for name in names}
        own = {name for name in found if name.lower().startswith("fasa_")}
        if side != "ggml_kernels":  # which all share
            defined["cpu" if side == "cpu" else "gpu"] |= own
    assert {"FASA_SCORE_HEADS", "fasa_count_bins"} <= defined["cpu"] and "FASA_MAX_TILE" in defined["gpu"]
    assert defined["cpu"] & defined["gpu"] == SAME_ON_BOTH
