"""``toolmem serve``: a run behind HTTP, started and stopped as a user does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

import toolmem as package

httpx = pytest.importorskip("httpx", reason="the extra dev is not installed: no client to ask with")
pytest.importorskip("starlette", reason="the extra serve is not installed: no server to test")

QUESTION = "When was person 1 born?"


class Served:
    """A server in a process of its own."""

    def __init__(self, *words: object, **environment: str) -> None:
        command = [sys.executable, "-m", "toolmem", "serve", "--port", "0", *map(str, words)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"COLUMNS": "200"} | environment,
        )  # fmt: skip
        self.line = self.process.stdout.readline()
        found = re.search(r"http://[\w.\[\]:]+", self.line)
        assert found, self.line + self.process.stderr.read()
        self.address = found[0]

    def stop(self, number: int) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, self.line + out, err

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_run_is_served_until_ctrl_c(runs):
    """The answer is that of ``run.ask``, for who has the key; the end is clean."""
    words = ("--checkpoint", runs / "in_tool", "--max_tokens", 9)
    with Served(*words, TOOLMEM_API_KEY="secret") as server:
        ask = httpx.Client(base_url=server.address, timeout=60)
        body = {"model": "in_tool", "messages": [{"role": "user", "content": QUESTION}]}
        assert ask.post("/v1/chat/completions", json=body).status_code == 401
        ask.headers["authorization"] = "Bearer secret"
        reply = ask.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        expected = package.load(runs / "in_tool").ask(QUESTION, max_new_tokens=9)
        told = reply.json()["choices"][0]["toolmem"]["dialogue"]
        assert [(turn["role"], turn["text"]) for turn in told] == expected.dialogue[1:]
        ask.close()
        code, out, err = server.stop(signal.SIGINT)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("in_tool at http://127.0.0.1:")
    assert out.splitlines()[-1] == "stopped"


def test_an_answer_under_way_is_finished_first(runs):
    """SIGTERM ends the server, but not before what it has begun."""
    with Served("--checkpoint", runs / "in_weight") as server:
        body = {"stream": True, "messages": [{"role": "user", "content": QUESTION}]}
        address = server.address + "/v1/chat/completions"
        with httpx.stream("POST", address, json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        out, err = server.process.communicate(timeout=120)
    assert '"finish_reason": "' in text and text.rstrip().endswith("data: [DONE]")
    assert (server.process.returncode, out, err) == (0, "stopped\n", "")


def test_what_cannot_be_served(runs, toolmem, tmp_path, monkeypatch):
    words = ("serve", "--checkpoint", runs / "in_weight")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        called = toolmem(*words, "--port", port)
        assert called.code == 2 and f"127.0.0.1:{port}" in called.err and "--port" in called.err
    for bad, told in (
        (("--port", 70000), "--port"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--max_lanes", 0), "--max_lanes"),
        (("--max_seconds", "nan"), "max_seconds"),
        (("--temperature", -1), "--temperature"),
        (("--api_key", ""), "--api_key"),
        (("--api_key", "schlüssel"), "--api_key"),
    ):
        called = toolmem(*words, *bad)
        assert called.code == 2 and told in called.err and "Traceback" not in called.err, bad
    called = toolmem("serve", "--checkpoint", tmp_path / "none")
    assert called.code == 2 and "no such checkpoint" in called.err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    called = toolmem(*words)
    assert called.code == 2 and "pip install 'toolmem[serve]'" in called.err
