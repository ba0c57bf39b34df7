"""64 clients ask one server with 4 slots at once: `make soak-server`.

Prompts of many lengths, settings of the requests mixed, one in eight clients leaves before its answer ends, with a
stream or without. Every answer must be the one that its prompt gets alone, no request fail, memory stay flat, and in
the end no slot be busy. An answer may part from the one alone where two tokens are all but a tie, in its second half;
how many do is said.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
from llama_server import PATIENCE, Server, is_same, n_agreed
from runtime import TEXTS, annotated_tiny

N_CLIENTS, N_SLOTS, N_PREDICT = 64, 4, 24
SETTINGS: tuple[dict[str, Any], ...] = ({}, {}, {"fasa_budget": 128}, {"fasa_enabled": False})
N_FLAT = 32 << 20  # bytes by which memory may differ


def leave(port: int, prompt: list[int], stream: bool, delay: float) -> None:
    """Ask for a long answer, and hang up at its first bytes, or without a stream after a delay in seconds."""
    body = json.dumps({"prompt": prompt, "n_predict": 3000, "ignore_eos": True, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        if stream:
            client.recv(256)
        else:
            time.sleep(delay)


@dataclass
class Counts:
    """Of what the clients saw: answers, those that parted at a tie, others than alone, clients that left, failures."""

    answers: int = 0
    ties: int = 0
    wrong: int = 0
    left: int = 0
    failures: list[str] = field(default_factory=list)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def main() -> int:
    """Run it; the status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    print(f"seed {args.seed}", flush=True)
    prompts = [TEXTS[0][i * 7 : i * 7 + rng.randrange(20, 900)] for i in range(24)]
    questions = [(prompt, rng.choice(SETTINGS)) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        model = annotated_tiny(Path(folder))
        # what 64 clients asked before is not all kept: prompts are read anew, too
        with Server(model, "--parallel", N_SLOTS, "--ctx-size", N_SLOTS * 4096, "--cache-ram", 16) as server:
            alone = [server.complete(prompt, N_PREDICT, **fields) for prompt, fields in questions]
            memory = psutil.Process(server.process.pid)
            end = time.monotonic() + args.seconds

            def ask(mine: random.Random, counts: Counts) -> None:
                which = mine.randrange(len(questions))
                prompt, settings = questions[which]
                if mine.random() < 1 / 8:
                    leave(server.port, prompt, stream=mine.random() < 1 / 2, delay=mine.random())
                    counts.left += 1
                    return
                answer = server.complete(prompt, N_PREDICT, **settings)
                counts.answers += 1
                counts.wrong += not is_same(answer, alone[which])
                counts.ties += 0 <= n_agreed(answer, alone[which]) < N_PREDICT

            def client(number: int) -> Counts:
                mine, counts = random.Random(args.seed + number), Counts()
                while time.monotonic() < end:
                    try:
                        ask(mine, counts)
                    except Exception as error:  # noqa: BLE001
                        counts.failures.append(f"{type(error).__name__}: {error}")
                        break
                return counts

            with ThreadPoolExecutor(N_CLIENTS) as pool:
                clients = [pool.submit(client, number) for number in range(N_CLIENTS)]
                time.sleep(args.seconds / 4)
                early = memory.memory_info().rss
                counts = sum((future.result() for future in clients), Counts())
            late = memory.memory_info().rss
            patience = time.monotonic() + 60
            while (
                busy := [slot for slot in server.ask("/slots") if slot["is_processing"]]
            ) and time.monotonic() < patience:
                time.sleep(0.1)
            sparse = server.metrics()["llamacpp:fasa_layers_sparse_total"]
    first = f" ({counts.failures[0]})" if counts.failures else ""
    print(
        f"{counts.answers} answers, {counts.wrong} other than alone, {counts.ties} parted from it at a tie; "
        f"{counts.left} clients left, {len(counts.failures)} requests failed{first}; {sparse:.0f} layers ran sparse; "
        f"memory {early >> 20} MiB after a quarter of the time, {late >> 20} MiB in the end; {len(busy)} slots stuck"
    )
    is_right = counts.answers and sparse and not (counts.wrong or counts.failures or busy)
    return int(not is_right or late > early + N_FLAT)


if __name__ == "__main__":
    sys.exit(main())
