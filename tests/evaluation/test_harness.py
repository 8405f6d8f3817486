"""lm-eval's own ``evaluate`` on local tasks: ours against its HFLM over transformers, of the same weights."""

from __future__ import annotations

import json
import math

import pytest
import torch

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.models import Transformer

TOKENIZER = ByteTokenizer()
pytestmark = pytest.mark.slow
SIZE = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "hidden_dim": 64,
    "max_seq_len": 128,
}


@pytest.fixture(scope="module")
def twins():
    """Our Transformer, and transformers' Llama with its weights and a tokenizer of the same bytes."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolmem.evaluation.harness import ToolmemLM

    torch.manual_seed(0)
    ours = Transformer(TOKENIZER.vocab_size, **SIZE).eval()
    with torch.no_grad():
        ours.head.weight *= 4
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
            rope_theta=10_000.0, tie_word_embeddings=False, attention_bias=False,
            bos_token_id=259, eos_token_id=259, pad_token_id=259,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(llama_names(ours))
    return (
        ToolmemLM(model=ours, tokenizer=TOKENIZER, batch_size=3),
        HFLM(pretrained=theirs, tokenizer=hf_tokenizer(), batch_size=2, max_length=128),
    )


def llama_names(model):
    """Our weights by Llama's names."""
    found = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for n, block in enumerate(model.blocks):
        at = f"model.layers.{n}"
        queries, keys, values = block.mixer.qkv.weight.split([32, 16, 16])
        gate, up = block.feed_forward.up.weight.chunk(2)
        found |= {
            f"{at}.self_attn.q_proj.weight": queries,
            f"{at}.self_attn.k_proj.weight": keys,
            f"{at}.self_attn.v_proj.weight": values,
            f"{at}.self_attn.o_proj.weight": block.mixer.out.weight,
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": block.feed_forward.down.weight,
            f"{at}.input_layernorm.weight": block.mixer_norm.weight,
            f"{at}.post_attention_layernorm.weight": block.feed_forward_norm.weight,
        }
    return found


def hf_tokenizer():
    """Bytes as ids, the end of a text 259, in transformers' terms."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    vocabulary = {letters[byte]: byte for byte in range(256)}
    vocabulary |= {f"<|{n}|>": n for n in (256, 257, 258, 259)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|259|>", eos_token="<|259|>", pad_token="<|259|>"
    )


def tasks_of(folder):
    """Three local tasks, one a request type, as lm-eval's configurations."""
    choices = [
        {"query": f"Q: {n} {'or ' * (n % 3)}?", "choices": ["a", "be", "see é"], "gold": n % 3}
        for n in range(8)
    ]
    texts = [{"text": "To be, or not to be. " * n} for n in range(1, 9, 2)]
    questions = [{"query": f"Say {n}:", "answer": "x"} for n in range(4)]
    common = {"dataset_path": "json", "test_split": "test"}
    found = []
    for name, rows, config in (
        ("local_choices", choices, {
            "output_type": "multiple_choice", "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }),
        ("local_texts", texts, {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        }),
        ("local_questions", questions, {
            "output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n", "Q"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        }),
    ):  # fmt: skip
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_kwargs": {"data_files": {"test": str(path)}}}
        found.append({"task": name, **common, **data, **config})
    return found


@pytest.fixture(scope="module")
def results(twins, tmp_path_factory):
    """lm-eval's results for both."""
    import os

    from lm_eval.evaluator import simple_evaluate

    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    tasks = tasks_of(tmp_path_factory.mktemp("tasks"))
    return [simple_evaluate(model=twin, tasks=tasks, bootstrap_iters=0) for twin in twins]


def samples(result, name):
    return sorted(result["samples"][name], key=lambda sample: sample["doc_id"])


def test_multiple_choice(results):
    ours, theirs = (samples(result, "local_choices") for result in results)
    for mine, wanted in zip(ours, theirs, strict=True):
        for (total, greedy), (of_them, their_greedy) in zip(
            [r[0] for r in mine["resps"]], [r[0] for r in wanted["resps"]], strict=True
        ):
            assert float(total) == pytest.approx(float(of_them), abs=1e-4)
            assert str(greedy) == str(their_greedy)
        assert (mine["acc"], mine["acc_norm"]) == (wanted["acc"], wanted["acc_norm"])


def test_whole_texts(results):
    ours, theirs = (result["results"]["local_texts"] for result in results)
    for metric in ("bits_per_byte,none", "word_perplexity,none"):
        assert math.isfinite(ours[metric])
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5)


def test_generated_texts(results):
    ours, theirs = (samples(result, "local_questions") for result in results)
    said = [sample["resps"] for sample in ours]
    assert said == [sample["resps"] for sample in theirs]
    assert any(text for [[text]] in said)


def test_it_is_known_by_its_name():
    from lm_eval.api.registry import get_model

    from toolmem.evaluation.harness import ToolmemLM

    assert get_model("toolmem") is ToolmemLM


def test_the_command_asks_for_a_device_that_may_not_be_there(monkeypatch):
    from toolmem.evaluation import harness

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [harness._device(name) for name in ("cuda:0", None, "cpu")] == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert harness._device("cuda:0") == "cuda:0"


def test_what_is_not_given_or_not_known_is_told(twins):
    from toolmem.evaluation.harness import ToolmemLM

    with pytest.raises(ToolmemError, match="name a checkpoint"):
        ToolmemLM()
    with pytest.raises(ToolmemError, match="num_beams"):
        twins[0]._request("a", {"num_beams": 3})
    with pytest.raises(ToolmemError, match="--chat true"):
        twins[0].apply_chat_template([])
