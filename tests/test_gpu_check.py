"""The scripts that measure on GPUs elsewhere: they must stand whatever hangs, crashes or is missing there."""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_pack
import psutil
import pytest
from gpu_check import CheckError, SkippedError, TimeLimitError, Visit

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""

OUTPUT = """Backend 1/2: CUDA0
  FASA_STORE(n=1): \x1b[1;32mOK\x1b[0m
  FASA_STORE(n=2): not supported [CUDA0]
========= Invalid __global__ read of size 4 bytes
  FASA_SELECT(n=1): [FASA_SELECT] NMSE = 1.0 > 0.1 \x1b[1;31mFAIL\x1b[0m
  FASA_SPARSE(n=1): \x1b[1;32mOK\x1b[0m
  FASA_ATTEND(n=1): """


@pytest.fixture
def visit(tmp_path: Path) -> Visit:
    return Visit(tmp_path, {})


def go(visit: Visit, steps: dict, *arguments: str) -> int:
    options = gpu_check.parse(list(arguments))
    options.steps = list(steps)
    return gpu_check.visit_gpu(options, visit, steps)


def python(visit: Visit, code: str) -> str:
    return visit.run(sys.executable, "-c", code)


def running(pid: int) -> bool:
    """Whether a process is there, and not just waiting for its parent to notice its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.check
def test_whatever_a_step_does_the_next_ones_run(visit: Visit) -> None:
    def sees_the_others() -> str:
        assert [line["step"] for line in gpu_check.read_lines(visit.results)] == ["hangs", "crashes", "odd", "lacks"]
        assert "## lacks" in (visit.out / "report.md").read_text()
        return "seen"

    def lacks() -> str:
        raise SkippedError("it is not here")

    steps = {
        "hangs": (1.0, lambda: python(visit, HANGS)),
        "crashes": (30.0, lambda: python(visit, "import os; print('so far', flush=True); os.abort()")),
        "odd": (30.0, lambda: json.loads("no json")),
        "lacks": (30.0, lacks),
        "last": (30.0, sees_the_others),
    }
    start = time.monotonic()
    assert go(visit, steps) == 1
    assert time.monotonic() - start < 20
    lines = {line["step"]: line for line in gpu_check.read_lines(visit.results)}
    statuses = {name: line["status"] for name, line in lines.items()}
    assert statuses == {"hangs": "timeout", "crashes": "failed", "odd": "failed", "lacks": "skipped", "last": "ok"}
    assert 1 <= lines["hangs"]["seconds"] < 10 and "so far" in lines["crashes"]["text"]
    report = (visit.out / "report.md").read_text()
    assert "TIMEOUT: its time was up" in report and "SKIPPED: it is not here" in report and report.endswith("seen\n")
    log = (visit.out / "log.txt").read_text()
    assert not running(int(re.search(r"^child (\d+)$", log, re.MULTILINE)[1]))


def test_the_budget_of_all_steps(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.5)
    steps = {"first": (30.0, lambda: python(visit, HANGS)), "second": (30.0, lambda: "never")}
    assert go(visit, steps, "--budget-s", "1") == 1
    texts = [line["text"] for line in gpu_check.read_lines(visit.results)]
    assert texts == ["its time was up", "no time was left for it"]


def test_success_and_choice(visit: Visit) -> None:
    steps = {name: (30.0, lambda: "fine") for name in ("ops", "bench-1b", "bench-8b")}
    options = gpu_check.parse(["--steps", "ops", "bench", "--skip", "bench-8b"])
    assert gpu_check.visit_gpu(options, visit, steps) == 0
    assert [line["step"] for line in gpu_check.read_lines(visit.results)] == ["ops", "bench-1b"]
    options = gpu_check.parse(["--device", "SIMT-CUDA"])
    assert (options.patience, options.budget_s) == (gpu_check.SLOW, gpu_check.SLOW * gpu_check.BUDGET_S)


def test_an_absent_device_ends_it(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Visit, "fasa_edge", lambda *_: '{"devices": ["CPU: some"]}')
    steps = {"doctor": (30.0, lambda: gpu_check.doctor(visit, "CUDA7")), "ops": (30.0, lambda: "never")}
    assert go(visit, steps) == 1
    (line,) = gpu_check.read_lines(visit.results)
    assert "there is no CUDA7, only CPU: some" in line["text"]


def fake_ops(folder: Path, code: str) -> Path:
    program = folder / "test-backend-ops"
    program.write_text(f"#!{sys.executable}\nimport sys, time\nop = sys.argv[-1]\n{code}\n")
    program.chmod(0o755)
    return folder


def test_ops_are_counted() -> None:
    found, text = gpu_check.counts(OUTPUT + "\n========= ERROR SUMMARY: 1 error\n")
    assert found["FASA_STORE"] == {"OK": 1, "FAIL": 0, "not supported": 1} and "FASA_ATTEND" not in found
    assert text.splitlines() == [
        "- FASA_STORE: 1/1 passed, 1 not supported",
        "- FASA_SELECT: 0/1 passed",
        "- FASA_SPARSE: 1/1 passed",
        "- ERROR SUMMARY: 1 error",
    ]


def test_ops_that_pass_crash_or_hang(visit: Visit, tmp_path: Path) -> None:
    passed = "for one in ('FASA_STORE', 'FASA_SELECT', 'FASA_ATTEND'): print(f'  {one}(n=1): OK')"
    text = gpu_check.backend_ops(visit, "CUDA0", fake_ops(tmp_path, passed))
    assert text.splitlines() == [f"- {op}: 1/1 passed" for op in gpu_check.OPS]

    with pytest.raises(CheckError, match="FASA_SELECT, FASA_ATTEND not tested on CUDA0"):
        gpu_check.backend_ops(visit, "CUDA0", fake_ops(tmp_path, "print('  FASA_STORE(n=1): OK')"))

    crashes = f"print({OUTPUT!r} if '*' in op else f'  {{op}}(n=1): OK'); sys.exit('*' in op)"
    with pytest.raises(CheckError) as error:
        gpu_check.backend_ops(visit, "CUDA0", fake_ops(tmp_path, crashes))
    assert "- FASA_SPARSE: 1/1 passed" in str(error.value)  # of the first run
    assert str(error.value).endswith("- FASA_ATTEND: 1/1 passed")  # by itself

    visit.deadline = time.monotonic() + 1
    with pytest.raises(TimeLimitError, match=r"FASA_SELECT: 0/1 passed[^$]*its time was up$"):
        gpu_check.backend_ops(visit, "CUDA0", fake_ops(tmp_path, f"print({OUTPUT!r}, flush=True); time.sleep(60)"))


def test_rows_are_noted_as_they_come(visit: Visit) -> None:
    sizes = ("-d", "256,512", "--layers", 1, "-r", 1, "--budget", 64)
    assert "fasa_select" in visit.bench("bench-op", "--op", "--geometry", "4/2x64", *sizes)
    lines = gpu_check.read_lines(visit.results)
    assert {line["step"] for line in lines} == {"bench-op"}
    assert [line["row"]["n_depth"] for line in lines] == 5 * [256] + 5 * [512]
    assert gpu_check.row_text(lines[2]["row"]).startswith("- fasa, 256 cells, budget 64: ")
    assert visit.environment == {}

    model = {"method": "dense", "flash_attn": False, "test": "tg32", "median_ts": 2.0, "budget": 0, "ratio": 0.5}
    assert gpu_check.row_text(model) == "- dense without flash attention, tg32: 2.00 t/s, x stock 0.50"


def test_rows_outlive_their_table(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"op": "fasa", "n_depth": 8, "median_ns": 2000.0, "budget": 4, "ratio": 3.0}
    line = json.dumps({"step": "bench-op", "row": row})
    code = (
        f"import os, time; print({line!r}, file=open(os.environ['FASA_CHECK_ROWS'], 'a'), flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(Visit, "fasa_edge", lambda self, *_: python(self, code))
    visit.deadline = time.monotonic() + 1
    with pytest.raises(TimeLimitError, match="its time was up\n- fasa, 8 cells, budget 4: 2.0 us, x stock 3.00"):
        visit.bench("bench-op")


def test_libraries_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia/cu99/lib").mkdir(parents=True)
    for name in ("libcublas.so.99", "libcublasLt.so.99"):
        (tmp_path / "nvidia/cu99/lib" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    names = gpu_check.cuda_libraries("99")
    assert gpu_check.library_folders(names[2:]) == [str(tmp_path / "nvidia/cu99/lib")]
    with pytest.raises(CheckError, match="libcudart.so.99 not found: add the folder to LD_LIBRARY_PATH"):
        gpu_check.library_folders(names[1:])


def test_a_python_that_lacks_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", ("json", "fasa_nonesuch"))
    with pytest.raises(CheckError, match="lacks fasa_nonesuch: run this with a Python"):
        gpu_check.check_python({}, tmp_path)


def test_parts_make_the_model_again(tmp_path: Path) -> None:
    model, folder = tmp_path / "model.gguf", tmp_path / "parts"
    folder.mkdir()
    model.write_bytes(bytes(range(251)))
    (folder / "fasa-gpu-model.9of9").touch()  # of a larger one, before
    parts = gpu_pack.write_parts(model, folder, max_bytes=100)
    assert [(path.name, path.stat().st_size) for path in parts] == [
        ("fasa-gpu-model.1of3", 84),
        ("fasa-gpu-model.2of3", 84),
        ("fasa-gpu-model.3of3", 83),
    ]
    found = list(folder.glob(gpu_check.MODEL_PARTS))
    assert gpu_check.whole_model(found[::-1], tmp_path).read_bytes() == bytes(range(251))
    assert gpu_check.whole_model([model], tmp_path) == model
    with pytest.raises(SkippedError, match="2 of 3 parts"):
        gpu_check.whole_model(found[:2], tmp_path)
    with pytest.raises(SkippedError, match="no model"):
        gpu_check.whole_model([tmp_path / "none"], tmp_path)


def test_a_pack_says_what_it_is_and_is_small(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pack, archive = tmp_path / "pack", tmp_path / "pack.tar.xz"
    (pack / "lib").mkdir(parents=True)
    (pack / "lib/libggml.so").write_bytes(b"x" * 5000)
    gpu_pack.write_manifest(pack, "90", "13.0", {"gguf": "1.2"})
    manifest = json.loads((pack / gpu_check.MANIFEST).read_text())
    assert (manifest["architecture"], manifest["cuda"], manifest["packages"]) == ("90", "13.0", {"gguf": "1.2"})
    assert len(manifest["commit"].split()[0]) == 40 and list(manifest["files"]) == ["lib/libggml.so"]
    gpu_pack.write_archive(pack, archive)
    gpu_pack.check_sizes([archive])
    assert "MiB" in capsys.readouterr().out
    with pytest.raises(gpu_pack.PackError, match="more than 100"):
        gpu_pack.check_sizes([archive], max_bytes=100)
    subprocess.run([sys.executable, "-m", "tarfile", "-e", archive, tmp_path / "there"], check=True)
    assert (tmp_path / "there/pack/lib/libggml.so").read_bytes() == b"x" * 5000


def test_pure_python_is_packed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    names = (
        "a.py",
        "_a.abi3.so",
        "_a.cpython-311-x86_64-linux-gnu.so",
        "data.txt",
        "lib/libllama.so",
        "__pycache__/a.pyc",
    )
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    gpu_pack.copy_python(source, tmp_path / "target")
    assert {path.name for path in (tmp_path / "target").rglob("*")} == {"a.py", "_a.abi3.so", "data.txt"}


def test_the_driver_is_stubbed(tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    source.write_text(
        "CU_CHECK(cuMemMap(p)); cuda_pool(); // cuBLAS (3)\ncuDeviceGet(&d, 0); cudaFree(p); cuMemMap(q);"
    )
    functions = gpu_pack.driver_calls([source])
    assert functions == ["cuDeviceGet", "cuMemMap"]
    library = gpu_pack.make_driver_stub(tmp_path / "stubs", functions)
    assert ctypes.CDLL(str(library)).cuMemMap() == 999
    time_ = library.stat().st_mtime_ns
    gpu_pack.make_driver_stub(tmp_path / "stubs", functions)
    assert library.stat().st_mtime_ns == time_


def test_no_gpu_no_native_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pack, "ask", lambda *_: "8.9\n9.0")
    assert gpu_pack.native_arch() == "89"
    monkeypatch.setattr(gpu_pack, "ask", lambda *_: "")
    with pytest.raises(gpu_pack.PackError, match="--arch 90"):
        gpu_pack.native_arch()


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parse(["--steps", "benches"])
    assert "invalid choice" in capsys.readouterr().err
    assert isinstance(gpu_check.parse([]), argparse.Namespace)
