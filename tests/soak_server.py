"""64 clients ask one server with 4 slots at once: `make soak-server`.

Prompts of many lengths, settings of the requests mixed, one in eight clients leaves before its answer ends. Every
answer must be the one that its prompt gets alone, memory stay flat, and in the end no slot be busy.
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
from pathlib import Path
from typing import Any

import psutil
from llama_server import Server, is_same
from runtime import TEXTS, annotated_tiny

N_CLIENTS, N_SLOTS, N_PREDICT = 64, 4, 24
SETTINGS: tuple[dict[str, Any], ...] = ({}, {}, {"fasa_budget": 128}, {"fasa_enabled": False})
N_FLAT = 32 << 20  # bytes by which memory may differ


def leave(port: int, prompt: list[int]) -> None:
    """Ask for a long answer, and hang up at its first bytes."""
    body = json.dumps({"prompt": prompt, "n_predict": 3000, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
        client.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        client.recv(256)


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

            def client(number: int) -> tuple[int, int, int]:
                mine, counts = random.Random(args.seed + number), [0, 0, 0]
                while time.monotonic() < end:
                    which = mine.randrange(len(questions))
                    prompt, fields = questions[which]
                    if mine.random() < 1 / 8:
                        leave(server.port, prompt)
                        counts[2] += 1
                        continue
                    answer = server.complete(prompt, N_PREDICT, **fields)
                    counts[0] += 1
                    counts[1] += not is_same(answer, alone[which])
                return counts[0], counts[1], counts[2]

            with ThreadPoolExecutor(N_CLIENTS) as pool:
                clients = [pool.submit(client, number) for number in range(N_CLIENTS)]
                time.sleep(args.seconds / 4)
                early = memory.memory_info().rss
                totals = [sum(column) for column in zip(*(future.result() for future in clients), strict=True)]
            late = memory.memory_info().rss
            n_answers, n_wrong, n_left = totals
            patience = time.monotonic() + 60
            while (
                busy := [slot for slot in server.ask("/slots") if slot["is_processing"]]
            ) and time.monotonic() < patience:
                time.sleep(0.1)
            sparse = server.metrics()["llamacpp:fasa_layers_sparse_total"]
    print(
        f"{n_answers} answers, {n_wrong} other than alone, {n_left} clients left; {sparse:.0f} layers ran sparse; "
        f"memory {early >> 20} MiB after a quarter of the time, {late >> 20} MiB in the end; {len(busy)} slots stuck"
    )
    return int(bool(n_wrong or busy or late > early + N_FLAT or not n_answers))


if __name__ == "__main__":
    sys.exit(main())
