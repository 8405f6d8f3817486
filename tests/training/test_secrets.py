"""Nothing of the user's environment or command line is in any file that a run leaves, wandb's among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from toolmem.data.text.documents import Documents
from toolmem.errors import ToolmemError
from toolmem.training.folders import environment

ROOT = Path(__file__).resolve().parents[2]
MARK = "q7Zx9SECRETq7Zx9"
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "q7Zx9abc",
    "HF_TOKEN": f"hf_{MARK}",
    "AWS_SECRET_ACCESS_KEY": MARK,
    "AWS_SESSION_TOKEN": MARK,
    "OPENAI_API_KEY": f"sk-{MARK}",
    "TOOLMEM_API_KEY": MARK,
    "DATABASE_URL": f"postgres://u:{MARK}@host/db",
    "HTTP_PROXY": f"http://u:{MARK}@127.0.0.1:9",
    "SOMETHING": MARK,
}
RECIPE = {
    "model": {
        "model": {
            "class_path": "toolmem.models.Transformer",
            "init_args": {"dim": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 256},
        },
        "optimizer": {"class_path": "toolmem.training.AdamW"},
        "schedule": {"class_path": "toolmem.training.Constant"},
    },
    "data": {
        "class_path": "toolmem.data.FactsDataModule",
        "init_args": {"people": 12, "setting": "in_tool", "batch_size": 8, "n_val_questions": 4},
    },
    "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
    "recall": {"n_questions": 2, "n_unseen": 0},
}


def test_environment_json_has_nothing_of_the_environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["toolmem", "fit", f"--key={MARK}"])
    text = repr(environment())
    assert MARK not in text and "q7Zx9" not in text
    assert not any(name in text for name in SECRETS)


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_no_file_of_a_run_has_a_secret(logger, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    # a repository whose remote has a password, as some tools leave them
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    remote = f"https://user:{MARK}@host.invalid/repo.git"
    subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True)
    # the one word of the command line that is no part of the config
    words = ["fit", "--config", "recipe.yaml", "--name", "run", "--logger", logger]
    done = subprocess.run(
        [sys.executable, "-m", "toolmem", *words, "--allow_packages", MARK],
        cwd=tmp_path,
        env=os.environ | SECRETS | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "runs" / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and any(logger in str(path) for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"q7Zx9" not in content, path
        assert SECRETS["WANDB_API_KEY"].encode() not in content, path
    assert "q7Zx9" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{MARK}@host.invalid/a.jsonl",
        f"https://host.invalid/a.jsonl?X-Amz-Signature={MARK}",
        f"https://host.invalid/a.jsonl?a=1&token={MARK}",
        f"s3://key:{MARK}@bucket/a.jsonl",
    ],
)
def test_addresses_with_keys_are_refused_and_not_repeated(address):
    with pytest.raises(ToolmemError, match="holds a password or a key") as refused:
        Documents(address)
    assert MARK not in str(refused.value)
