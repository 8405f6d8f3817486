"""SmolLM2-135M-Instruct out of its GGUF file, beside transformers' reading of the same file."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from varied_strings import strings

import toolmem
from toolmem.cli.convert import convert
from toolmem.generation import Engine, Request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(smollm2_checkpoint):
    return toolmem.load(smollm2_checkpoint)


@pytest.fixture(scope="module")
def theirs(smollm2_gguf):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    return model.eval(), tokenizer


def real_texts(folder, n, letters=700):
    """Pieces of the play, and examples of the tasks."""
    whole = (folder / "shakespeare.txt").read_text(encoding="utf-8")
    half = n // 2
    found = [whole[at : at + letters] for at in range(0, len(whole), len(whole) // half)][:half]
    for file in sorted((folder / "eval").glob("*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            found += [
                " ".join(map(str, json.loads(next(lines)).values()))[:letters] for _ in range(n)
            ]
    step = max(1, (len(found) - half) // (n - half))
    return found[:half] + found[half::step][: n - half]


@torch.no_grad()
def test_logits(run, theirs, shared_data):
    model, tokenizer = theirs
    texts = real_texts(shared_data, 20)
    assert len(texts) == 20
    for text in texts:
        ids = run.tokenizer.encode(text)
        assert ids == tokenizer.encode(text, split_special_tokens=True), text
        tokens = torch.tensor([ids])
        assert float((run.model(tokens) - model(tokens).logits).abs().max()) <= 2e-4


def test_greedy_text(run, theirs):
    model, tokenizer = theirs
    prompt = run.prompt("Tell me of the sea, at length.")
    chat = [{"role": "user", "content": "Tell me of the sea, at length."}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt == rendered
    tokens = torch.tensor([prompt])
    ids = {"attention_mask": torch.ones_like(tokens), "eos_token_id": -1, "pad_token_id": 0}
    wanted = model.generate(tokens, max_new_tokens=200, do_sample=False, **ids)[0].tolist()
    with Engine(run.model, run.tokenizer) as engine:
        request = Request(prompt, max_new_tokens=200)
        [found] = engine.run([request])
    n = len(found.tokens)
    assert n == len(prompt) + 200 or found.tokens[-1] == run.tokenizer.turns.end
    assert found.tokens == wanted[:n]


def test_tokens_of_varied_strings(run, theirs):
    _, tokenizer = theirs
    for text in strings(2000):
        wanted = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert run.tokenizer.encode(text) == wanted, text
        # (some letters' bytes are not in the vocabulary, and are left out by both)
        assert run.tokenizer.decode(wanted) == tokenizer.decode(wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_loading_is_quick_and_holds_little_twice(smollm2_checkpoint):
    """Peak memory of a process that loads it, beyond one that only imports what loading needs."""
    script = """
        import json, sys, time
        import torch, tokenizers, toolmem.run, toolmem.generation, toolmem.models
        import toolmem.data.hf_tokenizer, toolmem.models.transformer
        torch.set_num_threads(1)
        from pathlib import Path

        def peak():  # of this program: what getrusage says has the parent's in it, which is large
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(one.split()[1]) for one in lines if one.startswith("VmHWM:")) * 1024

        before, began = peak(), time.process_time()
        run = toolmem.load(sys.argv[1])
        seconds, after = time.process_time() - began, peak()
        size = 4 * sum(p.numel() for p in run.model.parameters())
        print(json.dumps({"seconds": seconds, "ratio": (after - before) / size}))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(smollm2_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(found)
    assert found["ratio"] <= 1.3
    assert found["seconds"] <= 5  # the processor's: others may be at work


@torch.no_grad()
def test_out_again(run, smollm2_checkpoint, smollm2_gguf, tmp_path):
    import transformers

    convert(str(smollm2_checkpoint), f"{tmp_path}/folder/")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "In 1905, he published four papers."
    ids = tokenizer.encode(text)
    assert ids == run.tokenizer.encode(text)
    tokens = torch.tensor([ids])
    assert float((run.model(tokens) - again(tokens).logits).abs().max()) <= 2e-4
    assert again.generation_config.eos_token_id == 2
    assert tokenizer.chat_template == run.tokenizer.chat["template"]
    del again
    convert(str(smollm2_gguf), f"{tmp_path}/model.gguf", dtype="q8_0")
    convert(f"{tmp_path}/model.gguf", f"{tmp_path}/q8.ckpt")
    eight = toolmem.load(tmp_path / "q8.ckpt")
    same = eight.model(tokens).argmax(-1) == run.model(tokens).argmax(-1)
    assert same.float().mean() >= 0.8
    assert eight.tokenizer.spec() == run.tokenizer.spec()
