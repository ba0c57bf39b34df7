#!/usr/bin/env python3
"""Run the FASA cases of test-backend-ops on ggml's variants of the CPU backend, compiled as the wheels have them.

    python ggml_kernels/tools/variants.py [--arch ARCH] [--ops REGEX] [VARIANT ...]

Two builds for each architecture: the test program without a CPU backend, and the variants. So the program finds none
beside it and loads the one it is told (GGML_BACKEND_PATH), unless that says that the processor lacks its instructions.
Another architecture than this machine's is cross-compiled and runs under qemu-user.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / ".venv" / "variants"
CMAKE = ROOT / ".venv" / "bin" / "cmake"

# Of those that GGML_CPU_ALL_VARIANTS makes, one for each set of instructions that kernels are written for, and some
# with parts of one: F16C without AVX2 (ivybridge), FMA without AVX2 (piledriver), f16 arithmetic (armv8.2_2).
VARIANTS = {
    "x86_64": ("x64", "ivybridge", "piledriver", "haswell", "alderlake", "skylakex", "zen4"),
    "aarch64": ("armv8.0_1", "armv8.2_1", "armv8.2_2", "armv8.6_1"),
}


class VariantsError(Exception):
    """Something cannot be built or run; the message names the remedy."""


def arch_of(variant: str) -> str:
    """Return the architecture that ggml names a variant for."""
    return "aarch64" if variant.startswith("arm") else "x86_64"


def emulator(arch: str) -> list[str]:
    """Return the command that runs programs of an architecture here; for this machine's own it is empty.

    Raises:
        VariantsError: a cross-compiler or qemu is not installed.
    """
    if arch == platform.machine():
        return []
    compiler, qemu = f"{arch}-linux-gnu-g++", f"qemu-{arch}"
    if missing := [tool for tool in (compiler, qemu) if not shutil.which(tool)]:
        raise VariantsError(
            f"{' and '.join(missing)} not found, needed to test {arch} on {platform.machine()}\n"
            f"  remedy: apt-get install g++-{arch.replace('_', '-')}-linux-gnu qemu-user,"
            f" or test this machine's own: ARCH={platform.machine()}"
        )
    # SVE vectors as short as NEON's: longer ones, of which most rows here fill only a part, take three times as long
    cpu = "max,sve-default-vector-length=16" if arch == "aarch64" else "max"
    return [qemu, "-cpu", cpu, "-L", f"/usr/{arch}-linux-gnu"]


def logged(log: Path, *command: str | Path) -> None:
    """Run a step of the build; the log holds the output of the last one.

    Raises:
        VariantsError: the step failed.
    """
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        raise VariantsError("\n".join([" ".join(map(str, command)), *tail, f"  all of it: {log}"]))


def build(arch: str, variants: list[str]) -> None:
    """Compile the test program and the variants of one architecture, nothing else of llama.cpp."""
    OUT.mkdir(parents=True, exist_ok=True)
    log = OUT / f"build-{arch}.log"
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_BACKEND_DL=ON"]
    options += ["-DGGML_NATIVE=OFF", "-DLLAMA_BUILD_MTMD=OFF"]
    if arch != platform.machine():
        options += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={arch}"]
        options += [f"-DCMAKE_C_COMPILER={arch}-linux-gnu-gcc", f"-DCMAKE_CXX_COMPILER={arch}-linux-gnu-g++"]
    # The test program takes longer to compile than to run.
    trees = {
        "tests": (["-DGGML_CPU=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"], ["test-backend-ops"]),
        "cpu": (["-DGGML_CPU_ALL_VARIANTS=ON"], [f"ggml-cpu-{variant}" for variant in variants]),
    }
    for name, (more, targets) in trees.items():
        tree = OUT / arch / name
        logged(log, CMAKE, "-S", ROOT, "-B", tree, "-G", "Ninja", *options, *more)
        logged(log, CMAKE, "--build", tree, "--target", *targets)


def run(arch: str, variant: str, ops: str) -> bool | None:
    """Test one variant and print how it went; return whether it passed, None if this machine lacks its instructions.

    Args:
        arch: the architecture of the variant.
        variant: its name, as in libggml-cpu-VARIANT.so.
        ops: a regular expression of ops, as -o of test-backend-ops.
    """
    library = OUT / arch / "cpu" / "bin" / f"libggml-cpu-{variant}.so"
    log = OUT / f"{variant}.log"
    command = [*emulator(arch), OUT / arch / "tests" / "bin" / "test-backend-ops", "-b", "CPU", "-o", ops]
    environ = os.environ | {"GGML_BACKEND_PATH": str(library), "OMP_WAIT_POLICY": "passive"}
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=OUT, env=environ, stdout=out, stderr=subprocess.STDOUT)
    text = log.read_text(encoding="utf-8", errors="replace")

    if f"{library} is not supported on this system" in text:
        print(f"{variant:12} not run here: the processor lacks its instructions", flush=True)
        return None
    passed = re.search(r"^\s*(\d+)/(\d+) tests passed", text, re.MULTILINE)
    loaded = re.findall(r"loaded \S+ backend from (.+)", text)
    if done.returncode == 0 and loaded == [str(library)] and passed and passed[1] == passed[2] != "0":
        print(f"{variant:12} {passed[0].strip()}: {loaded[0]}", flush=True)
        return True
    lines = text.splitlines()
    shown = [line for line in lines if "FAIL" in line][:20] + lines[-6:]
    print("\n    ".join([f"{variant:12} FAILED with status {done.returncode}: {log}", *shown]), flush=True)
    return False


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Run the FASA cases of test-backend-ops on ggml's CPU variants.")
    parser.add_argument("--arch", choices=VARIANTS, help="only this architecture's; without it, all")
    parser.add_argument("--ops", default="FASA_.*", help="as -o of test-backend-ops")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="as in libggml-cpu-VARIANT.so; must run here")
    args = parser.parse_args()

    archs = [args.arch] if args.arch else list(VARIANTS)
    chosen = args.variants or [variant for arch in archs for variant in VARIANTS[arch]]
    results = {}
    try:
        if platform.system() != "Linux":
            raise VariantsError(f"made for Linux, this is {platform.system()}\n  remedy: make backend-test")
        by_arch = {arch: [v for v in chosen if arch_of(v) == arch] for arch in VARIANTS if arch in map(arch_of, chosen)}
        if args.arch and set(by_arch) != {args.arch}:
            raise VariantsError(f"{' '.join(chosen)}: not all are {args.arch}\n  remedy: leave out the architecture")
        for arch in by_arch:
            emulator(arch)  # before minutes of compiling for another one
        for arch, variants in by_arch.items():
            print(f"compiling for {arch}: some minutes the first time", flush=True)
            build(arch, variants)
            for variant in variants:
                results[variant] = run(arch, variant, args.ops)
    except VariantsError as error:
        print(f"variants: error: {error}", file=sys.stderr)
        return 1
    failed = [variant for variant, passed in results.items() if passed is False or passed is None and args.variants]
    if failed or True not in results.values():
        print(f"variants: error: not passed: {' '.join(failed or chosen)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
