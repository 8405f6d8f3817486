"""A wandb server on this machine: what it answers is enough for wandb's own client to send a run.

It keeps a run's history as the real one does: each request says at which line its lines begin, and what was
there is replaced. A run that is asked for again is told where its history ends.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "someone"


class Server(ThreadingHTTPServer):
    """``history[run id]`` are the rows that arrived; ``asked`` the names of the questions; a server that is
    ``down`` hangs up on whoever calls.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, list[dict]] = {}
        self.summaries: dict[str, str] = {}
        self.runs: dict[str, dict] = {}
        self.exit_codes: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self.lock = threading.Lock()
        self.down = False

    def handle_error(self, request, client_address) -> None:
        """A client that has gone: clients do."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def lose(self, keep: int) -> list[dict]:
        """Let the only run have its first rows alone, as if no more had arrived; return them."""
        [(run, rows)] = self.history.items()
        del rows[keep:]
        self.summaries.pop(run, None)
        return rows

    def answer(self, query: str, variables: dict) -> dict:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = operation[1] if operation else ""
        self.asked.append(name)
        viewer = {"id": "VXNlcjox", "entity": ENTITY, "username": ENTITY, "flags": "{}", "email": None,
                  "teams": {"edges": []}, "admin": False, "apiKeys": {"edges": []}}  # fmt: skip
        if name == "UpsertBucket":
            run = variables.get("name") or variables.get("id")
            inserted = run not in self.runs
            self.runs.setdefault(run, {}).update(
                {key: value for key, value in variables.items() if value is not None}
            )
            self.history.setdefault(run, [])
            return {"upsertBucket": {"bucket": self._bucket(run, variables), "inserted": inserted}}
        if name == "RunResumeStatus":
            run = variables["name"]
            bucket = self._bucket(run, variables) if run in self.runs else None
            return {"model": {"id": "cDox", "name": "toolmem", "entity": {"id": "ZTox", "name": ENTITY},
                              "bucket": bucket}}  # fmt: skip
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]
            ]
            return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return {"viewer": viewer, "serverInfo": {"features": []}}

    def _bucket(self, run: str, variables: dict) -> dict:
        rows = self.history.get(run, [])
        return {
            "id": f"id-{run}", "name": run, "displayName": run, "description": None, "sweepName": None,
            "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]", "summaryMetrics": self.summaries.get(run, "{}"), "tags": [],
            "wandbConfig": '{"t": 1}',
            "config": self.runs.get(run, {}).get("config") or "{}",
            "project": {"id": "cDox", "name": variables.get("project") or "toolmem",
                        "entity": {"id": "ZTox", "name": ENTITY}},
        }  # fmt: skip

    def stream(self, run: str, sent: dict) -> None:
        with self.lock:
            part = sent.get("files", {}).get("wandb-history.jsonl")
            if part is not None:
                rows = [json.loads(line) for line in part["content"]]
                start = part["offset"]
                self.history.setdefault(run, [])[start : start + len(rows)] = rows
            summary = sent.get("files", {}).get("wandb-summary.json")
            if summary is not None:
                self.summaries[run] = summary["content"][-1]
            if sent.get("complete"):
                self.exit_codes.setdefault(run, []).append(sent.get("exitcode", 0))


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = {}
        if self.server.down:
            pass
        elif self.path.endswith("/graphql"):
            sent = json.loads(body)
            answer = {"data": self.server.answer(sent["query"], sent.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        self._send(answer)

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send({})

    def _send(self, answer: dict) -> None:
        if self.server.down:
            self.close_connection = True
            return
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
