"""What HTTP costs: in-tool answers streamed by ``toolmem serve``, beside the engine called from Python.

    python benchmarks/serving.py [--quick] [--json FILE] [--checkpoint RUN]

The model is generate.py's facts model (2 layers, dim 64, trained here unless --checkpoint names a run), the
tool DuckDB. The server is a process of its own with one thread; clients are coroutines of this
process, each with one streamed chat completion at a time. Sides take turns, the
questions are the same. The engine's side has as many dialogues under way as there are clients.

Figures, by clients: requests and generated tokens a second, the time to the first token and to the last
(median and 95th percentile, as a client sees them), and ``http_cost``, the engine's requests a second over
the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import numpy as np
import torch
from command import about, arguments, write
from generate import facts_run
from rich.console import Console
from rich.table import Table

from toolmem.generation import Engine, Request
from toolmem.run import Run
from toolmem.serving.server import listen

CLIENTS = (1, 16, 128)
TOKENS = 160


class Served:
    """``toolmem serve`` in a process of its own, for as long as it is wanted."""

    def __init__(self, run: Run) -> None:
        with listen("127.0.0.1", 0) as free:
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "toolmem",
            "serve",
            "--checkpoint",
            str(run.checkpoint.path),
        ]
        command += ["--port", str(self.port), "--max_lanes", "128", "--max_queued", "1024"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    async def __aenter__(self) -> Served:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/health").raise_for_status()
                return self
            except httpx.TransportError:
                await asyncio.sleep(0.1)
        raise SystemExit("the server did not start within a minute")

    async def __aexit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


async def over_http(port: int, questions: list[str], clients: int) -> dict[str, Any]:
    """All questions, so many at a time, each over a connection of its own.

    Plain sockets: with a hundred streams at once client libraries cost more than the server.
    """
    first, last, answers = [], [], {}
    waiting = iter(enumerate(questions))

    async def one() -> None:
        for place, question in waiting:
            messages = [{"role": "user", "content": question}]
            body = {"messages": messages, "stream": True, "max_tokens": TOKENS}
            data = json.dumps(body).encode()
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
                f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
            )
            begun, seen, said = time.perf_counter(), None, ""
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + data)
            status = await reader.readline()
            assert b"200" in status, status
            async for line in reader:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    content = choices[0]["delta"].get("content") if choices else None
                    if content:
                        seen = seen or time.perf_counter()
                        said += content
            writer.close()
            first.append((seen or time.perf_counter()) - begun)
            last.append(time.perf_counter() - begun)
            answers[place] = said

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "first": first, "last": last, "answers": answers}


def by_engine(run: Run, questions: list[str], clients: int) -> dict[str, Any]:
    """The same by ``Engine.submit``, from as many threads as there are clients' places."""
    requests = [Request(run.prompt(question), max_new_tokens=TOKENS) for question in questions]
    tokens, lock, waiting = [0], threading.Lock(), iter(requests)
    with Engine(run.model, run.tokenizer, run.toolbox, max_lanes=128) as engine:
        engine.generate([requests[0].prompt], max_new_tokens=4)
        begun = time.perf_counter()

        def one() -> None:
            while True:
                with lock:
                    request = next(waiting, None)
                if request is None:
                    return
                result = engine.submit(request).result(120)
                with lock:
                    tokens[0] += len(result.tokens) - result.prompt_length

        threads = [threading.Thread(target=one) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"seconds": time.perf_counter() - begun, "tokens": tokens[0]}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows and their circumstances."""
    torch.set_num_threads(1)
    run = facts_run(options.checkpoint, options.quick)
    rows = []
    async with Served(run) as served:
        for clients in CLIENTS:
            n = 16 if options.quick else 60 + 6 * clients
            texts = [each.question for each in run.questions("known", n)]
            http, engine = [], []
            for _ in range(1 if options.quick else 3):
                http.append(await over_http(served.port, texts, clients))
                engine.append(await asyncio.to_thread(by_engine, run, texts, clients))
            rows.append(row(clients, n, http, engine))
    return {"rows": rows, "about": about(options.quick)}


def row(
    clients: int, n: int, http: list[dict[str, Any]], engine: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of a number of clients."""
    cost = [a["seconds"] / b["seconds"] for a, b in zip(http, engine, strict=True)]
    seconds = statistics.median(each["seconds"] for each in http)
    first = [value for each in http for value in each["first"]]
    last = [value for each in http for value in each["last"]]
    return {
        "clients": clients,
        "requests": n,
        "requests_per_s": n / seconds,
        "tokens_per_s": engine[0]["tokens"] / seconds,
        "first_token_ms": [1e3 * float(np.percentile(first, q)) for q in (50, 95)],
        "answer_ms": [1e3 * float(np.percentile(last, q)) for q in (50, 95)],
        "http_cost": statistics.median(cost),
        "seconds": {
            "http": [each["seconds"] for each in http],
            "engine": [each["seconds"] for each in engine],
        },
    }


def main() -> None:
    """Measure, print, and write."""
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", metavar="RUN", help="a trained in-tool run to serve")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    machine = result["about"]
    table = Table(title=f"{machine['processor']}, a thread a side, torch {machine['torch']}")
    for column in (
        "clients", "requests/s", "tokens/s", "first token, ms (95 %)", "answer, ms (95 %)", "HTTP costs",
    ):  # fmt: skip
        table.add_column(column, no_wrap=True)
    for each in result["rows"]:
        spans = [
            f"{middle:.1f} ({most:.1f})"
            for middle, most in (each["first_token_ms"], each["answer_ms"])
        ]
        rates = [f"{each[key]:.1f}" for key in ("requests_per_s", "tokens_per_s")]
        table.add_row(str(each["clients"]), *rates, *spans, f"{each['http_cost']:.2f}")
    Console(width=110).print(table)
    write(result, options)


if __name__ == "__main__":
    main()
