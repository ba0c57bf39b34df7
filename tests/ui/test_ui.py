"""The web UI of a llama-server in a headless browser: `make test-ui`. Screenshots stay in .venv/ui-tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_server import Server

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / ".venv/ui-tests"  # made by `make test-ui`: npm's packages
BUDGET = 256
DOCUMENT = HERE.parents[1] / "docs/quality.md"
SEEN = 6000  # characters of it, far beyond the budget in tokens


@pytest.fixture(scope="module")
def server(fasa_model_path: Path) -> Iterator[Server]:
    few = json.dumps({"max_tokens": 32, "temperature": 0})
    with Server(fasa_model_path, "--fasa-budget", BUDGET, "--ui-config", few) as running:
        yield running


def test_talk(server: Server, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT.read_text(encoding="utf-8")[:SEEN], encoding="utf-8")
    screenshots = WORK / "screenshots"
    shutil.rmtree(screenshots, ignore_errors=True)
    screenshots.mkdir()
    shutil.copy(HERE / "talk.mjs", WORK)  # node looks for packages beside the script

    command = ["node", str(WORK / "talk.mjs"), f"http://127.0.0.1:{server.port}/", str(document), str(screenshots)]
    path = f"{WORK.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)

    assert not seen["errors"]
    assert seen["switch"] == [True, False, True]
    # nothing was chosen before the switch was touched; what was pasted is in all
    assert [request["fasa_enabled"] for request in seen["requests"]] == [None, False, True]
    words = document.read_text(encoding="utf-8").split()[-5:]
    assert all(word in request["text"] for request in seen["requests"] for word in words if word.isalpha())

    sparse, dense, told = seen["answers"]
    assert sparse["n_states"] > 2 and dense["n_states"] > 2  # they grew while they were watched
    assert sparse["strip"][0] == "FASA" and sparse["strip"][-1] == f"budget {BUDGET}"
    assert dense["strip"][0] == "dense: disabled"
    assert told["strip"][0] == "FASA" and told["strip"][-1] == "budget 123"  # what the answer says, not the browser
    for answer in seen["answers"]:
        assert answer["strip"][1].endswith(" tokens/s")
    read = [int(answer["strip"][2].split("%")[0]) for answer in seen["answers"]]
    assert read[0] < 100 and read[1] == 100 and read[2] < 100
    assert {path.name for path in screenshots.iterdir()} >= {
        f"{name}.png" for name in ("1-open", "2-pasted", "3-fasa-answered", "4-dense-answered", "5-told-answered")
    }
