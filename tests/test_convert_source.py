"""Models that are no GGUF here: what of a hub (a stand-in) is chosen and downloaded, and what is said if that fails."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from fasa_edge.convert import checkpoint, inspect
from fasa_edge.convert import hub as fasa_hub
from fasa_edge.convert.hub import HubModel, choose_gguf, parse_source
from fasa_edge.convert.source import find_source, local_gguf
from fasa_edge.errors import ConvertError

import gguf
import pytest
from hub_server import TOKEN, Hub, hub_server
from tiny_models import make_model
from unchecked import convert

# In a child process, because huggingface_hub reads its environment once: results, and the progress of each.
_CHILD = """
import json, sys
from fasa_edge.convert import convert
from fasa_edge.errors import ConvertError
for arguments in json.loads(sys.argv[1]):
    seen = []
    try:
        result = convert(**arguments, tokens=512, check=False, progress=lambda *at: seen.append(at)).path.as_posix()
    except ConvertError as error:
        result = f"error: {error}"
    print(json.dumps([result, seen]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repos")
    for name in ("tiny", "split", "gated", "weights", "nothing"):
        (folder / name).mkdir()
    for quant in ("Q4_K_M", "Q8_0"):
        make_model(folder / f"tiny/tiny.{quant}.gguf")
    (folder / "tiny/mmproj-tiny.Q4_K_M.gguf").write_text("no model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=8))
        (folder / "split/F32").mkdir()
        make_model(folder / "split/F32/tiny-F32.gguf")
    make_model(folder / "gated/tiny.gguf")
    (folder / "weights/config.json").write_text("{}")
    (folder / "weights/pytorch_model.bin").write_text("pickles")
    (folder / "nothing/README.md").write_text("nothing")
    with hub_server() as server:
        server.repos |= {f"user/{path.name}": path for path in folder.iterdir()}
        yield server


@pytest.fixture
def child(hub: Hub, tmp_path: Path):
    """Converts with the hub in a folder of its own; returns a result and the progress for each source."""

    def run(*sources: str | dict, **environment: str) -> list:
        hub.requests.clear()
        arguments = [source if isinstance(source, dict) else {"src": source} for source in sources]
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(arguments)],
            env=environment_of(hub, tmp_path) | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""  # a library does not print
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    foreign = re.compile("HF_.*|HUGGING.*|.*_PROXY", re.IGNORECASE)
    clean = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    return clean | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf")}


def downloads(hub: Hub) -> list[str]:
    return [Path(request).name for request in hub.requests if request.startswith("GET") and "/resolve/" in request]


def test_command_converts_into_the_current_folder(hub, tmp_path):
    command = Path(sys.executable).with_name("fasa-edge")
    done = subprocess.run(
        [command, "convert", "user/tiny:q8_0", "--tokens", "512", "--no-check", "--json"],
        env=environment_of(hub, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["path"] == "tiny.Q8_0-fasa.gguf" and done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "tiny.Q8_0-fasa.gguf"]
    local = convert(hub.repos["user/tiny"] / "tiny.Q8_0.gguf", tmp_path / "local.gguf", tokens=512)
    assert local.path.read_bytes() == (tmp_path / "tiny.Q8_0-fasa.gguf").read_bytes()


def test_download_progress_cache_and_offline(hub, child, tmp_path):
    (path, seen), (again, _) = child("user/tiny", {"src": "user/tiny", "out": "again.gguf"})
    assert again == "again.gguf"
    assert path == "tiny.Q4_K_M-fasa.gguf" and downloads(hub) == ["tiny.Q4_K_M.gguf"]
    size = (hub.repos["user/tiny"] / "tiny.Q4_K_M.gguf").stat().st_size
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["download", "calibrate", "rank", "write"]
    assert ["download", size, size] in seen and all(at[1] <= at[2] for at in seen)

    (path, _), (error, _) = child({"src": "user/tiny", "out": "offline.gguf"}, "user/tiny:Q8_0", HF_HUB_OFFLINE="1")
    assert path == "offline.gguf" and hub.requests == []
    assert "user/tiny has no quant Q8_0: choose one of Q4_K_M" in error
    ((path, _),) = child({"src": "user/tiny", "out": "unplugged.gguf"}, HF_ENDPOINT="http://127.0.0.1:9")
    assert path == "unplugged.gguf"


def test_split_model(hub, child, tmp_path):
    ((path, seen),) = child("user/split")  # in how many steps is a matter of time: the shards come side by side
    done = [n for stage, n, _ in seen if stage == "download"]
    assert done == sorted(done) and done[-1] == seen[0][2]
    shards = [f"tiny-F32-0000{no}-of-00003.gguf" for no in (1, 2, 3)]
    assert path == "tiny-F32-fasa-00001-of-00003.gguf" and sorted(downloads(hub)) == shards
    assert inspect(tmp_path / path).annotated
    for no in (2, 3):
        source = hub.repos["user/split"] / f"F32/{shards[no - 1]}"
        assert (tmp_path / f"tiny-F32-fasa-0000{no}-of-00003.gguf").read_bytes() == source.read_bytes()


def test_files_are_of_the_commit_that_was_listed(hub, child, monkeypatch):
    monkeypatch.setattr(hub, "restless", {"user/tiny"})
    assert re.search("error: user/tiny changed from [0-9a-f]{40} to [0-9a-f]{40} meanwhile", child("user/tiny")[0][0])


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A checkpoint in the cache, whose code came there by another way, and the bars that a download shows."""
    snapshot = tmp_path / "snapshots/commit"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "code.py", "pytorch_model.bin"):
        (snapshot / name).write_text('{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}')
    bars: list[dict] = []

    def snapshot_download(repo, *, allow_patterns, tqdm_class):
        shown = [tqdm_class(**bar) for bar in bars]
        for n in (60, 30, 10):
            for bar in shown:
                bar.update(n)
                bar.refresh()
                n //= 2
        return str(snapshot)

    monkeypatch.setattr(fasa_hub, "snapshot_download", snapshot_download)
    return HubModel("user/model", "commit", ("config.json", "model.safetensors"), 100, is_gguf=False), bars


@pytest.mark.parametrize(
    ("bars", "seen"),
    [
        ([{"unit": "B"}, {"unit": "B"}], [60, 90, 100, 100]),
        ([{"unit": "it"}], [100]),
        ([{"disable": True}], [100]),
        ([], [100]),
    ],
    ids=["two of bytes", "none of bytes", "disabled", "ignored"],
)
def test_progress_whatever_bars_there_are(downloaded, bars, seen):
    model, shown = downloaded
    shown += bars
    at: list[tuple] = []
    model.download(lambda *progress: at.append(progress))
    assert at == [("download", n, 100) for n in seen]


def test_error_of_the_progress_is_no_failed_download(downloaded):
    def stop(*_):
        raise ConvertError("enough")

    model, bars = downloaded
    bars.append({"unit": "B"})
    with pytest.raises(ConvertError, match="^enough$"):
        model.download(stop)


def test_checkpoint_runs_no_code_from_the_cache(downloaded, tmp_path, monkeypatch):
    """Neither what lies beside the files that were listed, nor what a config names in another repository."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys; from huggingface_hub import constants as c; from pathlib import Path\n"
        "links = {p.name: p.read_text() for p in Path(sys.argv[1]).iterdir()}\n"
        "caches = [c.HF_HOME, c.HF_HUB_CACHE]\n"
        "seen = [Path(sys.argv[1]).name, links, caches, c.HF_HUB_OFFLINE, os.environ.get('HF_MODULES_CACHE')]\n"
        "Path(sys.argv[3]).write_text(json.dumps(seen))\n"
    )
    monkeypatch.setattr(checkpoint, "_SCRIPT", script)
    monkeypatch.setattr(checkpoint, "_NEEDS", ())
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(fasa_hub, "find_model", lambda repo, quant: downloaded[0])
    (tmp_path / "out").mkdir()
    source = find_source("user/model")
    outputs = [tmp_path / "out/copy.gguf"]
    with local_gguf(source, outputs, outtype="auto", force=False, progress=lambda *_: None) as gguf_path:
        name, links, caches, offline, modules = json.loads(gguf_path.read_text())
        assert not any(Path(cache).exists() for cache in caches)
    assert name == "model" and sorted(links) == ["config.json", "model.safetensors"] and links["config.json"]
    assert all(Path(cache).is_relative_to(tmp_path / "out") for cache in caches) and offline and modules is None
    assert not any((tmp_path / "out").iterdir())


def test_token_opens_a_gated_model(child):
    assert "private or gated: check the name, or log in" in child("user/gated")[0][0]
    assert child("user/gated", HF_TOKEN=TOKEN)[0][0] == "tiny-fasa.gguf"


def test_local_path_wins(hub, child, tmp_path):
    make_model(tmp_path / "tiny")
    (tmp_path / "user").mkdir()
    (tmp_path / "tiny").rename(tmp_path / "user/tiny")
    assert child("user/tiny")[0][0] == "user/tiny-fasa.gguf" and hub.requests == []


def test_errors_name_the_remedy(hub, child, tmp_path):
    (tmp_path / "tiny.Q4_K_M-fasa.gguf").write_text("precious")
    cases = {
        "user/missing": f"user/missing is neither here nor on {hub.endpoint}",
        "user/tiny:Q5_K_M": "user/tiny has no quant Q5_K_M: choose one of Q4_K_M, Q8_0",
        "user/weights": "neither a GGUF nor a checkpoint",
        "user/weights:Q8_0": "user/weights holds no GGUF, so no quant Q8_0: leave out :Q8_0",
        "user/nothing": "neither a GGUF nor a checkpoint",
        "user/a--b": "user/a--b is no name of a model on a hub",
        "user/tiny": "tiny.Q4_K_M-fasa.gguf exists: choose another output file",
    }
    for (result, _), message in zip(child(*cases), cases.values(), strict=True):
        assert result.startswith("error: ") and message in result
    assert downloads(hub) == []
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        ((error, _),) = child("user/tiny", **environment)
        assert "user/tiny is not in the cache and" in error and "check the network, HF_HUB_OFFLINE" in error


@pytest.mark.check
@pytest.mark.parametrize(
    ("names", "quant", "chosen"),
    [
        ("a.Q8_0 a.Q4_K_M", None, "a.Q4_K_M"),
        ("a.F16 a.Q8_0", None, "a.Q8_0"),
        ("b a.F16", None, "a.F16"),
        ("a.Q4_K_M a.IQ2_XS", "iq2_xs", "a.IQ2_XS"),
        ("a-Q4_K_S a-Q4_K", "Q4_K", "a-Q4_K"),
        ("mmproj-a.Q8_0 imatrix-a mtp-a.Q8_0 a.F16", "F16", "a.F16"),
        ("mmproj-a.Q8_0", None, ""),
        (
            "B/a-BF16-00002-of-00002 B/a-BF16-00001-of-00002 a",
            "bf16",
            "B/a-BF16-00001-of-00002 B/a-BF16-00002-of-00002",
        ),
    ],
)
def test_choice_is_that_of_llama_cpp(names, quant, chosen):
    names = ["README.md", *(f"{name}.gguf" for name in names.split())]
    assert choose_gguf("user/model", names, quant) == [f"{name}.gguf" for name in chosen.split()]


@pytest.mark.check
@pytest.mark.parametrize(
    ("names", "quant", "message"),
    [
        ("a-Q8_0 a-F16-00001-of-00002 a-F16-00002-of-00002", "Q2_K", "no quant Q2_K: choose one of F16, Q8_0"),
        ("model", "Q2_K", r"no quant Q2_K: choose one of model\.gguf"),
        ("a-F16-00001-of-00003 a-F16-00003-of-00003", None, "has 2 of the 3 files of a-F16-00001-of-00003.gguf"),
    ],
)
def test_impossible_choice(names, quant, message):
    with pytest.raises(ConvertError, match=message):
        choose_gguf("user/model", [f"{name}.gguf" for name in names.split()], quant)


@pytest.mark.check
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("user/model", ("user/model", None)),
        ("user/Model-3.1_x:Q4_K_M", ("user/Model-3.1_x", "Q4_K_M")),
        ("model", None),
        ("a/b/c", None),
        ("./model", None),
        ("../model", None),
        ("/user/model", None),
        ("user/model:", None),
    ],
)
def test_names_of_models(text, parts):
    assert parse_source(text) == parts


# What needs no hub


@pytest.mark.check
@pytest.mark.parametrize("src", ["missing", "missing.gguf", "a/b/c", "{tmp}/missing.gguf", "x" * 5000])
def test_source_that_is_nowhere(tmp_path, src):
    with pytest.raises(ConvertError, match="does not exist: give a GGUF file, the folder"):
        convert(src.format(tmp=tmp_path))


def test_checkpoint_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_NEEDS", ("json", "no_such_package"))
    (tmp_path / "in").mkdir()
    with pytest.raises(ConvertError, match="holds no config.json: give"):
        convert(tmp_path / "in")
    (tmp_path / "in/config.json").write_text("{}")
    with pytest.raises(ConvertError, match=r"which takes no_such_package .* pip install '\.\[hf\]' in the clone"):
        convert(tmp_path / "in")
    monkeypatch.setattr(checkpoint, "_NEEDS", ())
    monkeypatch.setattr(checkpoint, "_SCRIPT", tmp_path / "script.py")
    with pytest.raises(ConvertError, match="script.py is missing: reinstall fasa-edge"):
        convert(tmp_path / "in")


def test_output_type_is_of_checkpoints(tmp_path):
    model = make_model(tmp_path / "tiny.gguf")
    with pytest.raises(ConvertError, match=r"outtype f16: tiny\.gguf is a GGUF"):
        convert(model, outtype="f16")
    with pytest.raises(ConvertError, match="outtype 'q4_0' is unknown: choose one of auto, f32"):
        convert(model, outtype="q4_0")
