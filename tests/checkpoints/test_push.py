"""``toolmem convert --push`` against a hub of our own on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from toolmem import checkpoints
from toolmem.data import ByteTokenizer
from toolmem.models import Transformer

pytest.importorskip(
    "huggingface_hub", reason="the extra hub is not installed: nothing to push with"
)
pytestmark = pytest.mark.slow  # processes


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload needs; every file is one that goes with the commit."""

    def log_message(self, *_):
        pass

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self._answer(200, {"id": "me/model", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self):
        server, body = self.server, self._body()
        server.asked.append((self.path, self.headers.get("Authorization")))
        base = f"http://127.0.0.1:{server.server_port}"
        if server.refuses:
            self._answer(403, {"error": "no permission"})
        elif self.path == "/api/repos/create":
            server.repository = json.loads(body)
            self._answer(200, {"url": f"{base}/me/model", "name": "me/model", "id": "1"})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
            commit = f"{base}/me/model/commit/{'1' * 40}"
            self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": commit})
        else:
            self._answer(200, {"errors": [], "warnings": []})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.repository, server.refuses = [], {}, None, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = Transformer(260, dim=16, n_layers=2, n_heads=2, max_seq_len=32)
    about = checkpoints.describe(
        model, {"tokenizer": ByteTokenizer().spec(), "factbase": None, "setting": "in_tool"}
    )
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / "tiny.ckpt"
    checkpoints.write({"state_dict": state, checkpoints.KEY: about, "global_step": 1}, path)
    return path


def pushed(hub, run, folder):
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "toolmem",
        "convert",
        str(run),
        f"{folder}/",
        "--push",
        "me/model",
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_folder_arrives_with_a_card(hub, run, tmp_path):
    done = pushed(hub, run, tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    assert f"pushed to http://127.0.0.1:{hub.server_port}/me/model" in done.stdout
    assert hub.repository["name"] == "model" and hub.repository["organization"] == "me"
    assert hub.repository.get("private") is True or hub.repository.get("visibility") == "private"
    assert {"Bearer hf_secret"} == {token for path, token in hub.asked if "validate" not in path}
    written = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    assert hub.files == written
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(written)
    card = written["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'from_pretrained("me/model")' in card and "asks a database" in card
    assert (
        f"| parameters | {sum(p.numel() for p in checkpoints.load(run).model.parameters()):,} |"
        in card
    )
    assert "hf_secret" not in done.stdout + done.stderr


def test_a_hub_that_refuses(hub, run, tmp_path):
    hub.refuses = True
    done = pushed(hub, run, tmp_path / "folder")
    assert done.returncode == 2
    assert "the hub did not take me/model" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "folder" / "model.safetensors").is_file()
