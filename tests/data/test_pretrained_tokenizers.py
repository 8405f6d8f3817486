"""Tokenizers of pretrained models: the same tokens as transformers', from folders and GGUF files."""

import json
import random

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from varied_strings import PIECES, strings

from toolmem import ToolmemError
from toolmem.data import ByteTokenizer, tokenizer_from_spec
from toolmem.data.hf_tokenizer import train_tokenizer
from toolmem.data.pretrained_tokenizers import (
    GGML,
    SPLITS,
    gguf_metadata_of,
    tokenizer_files,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)

TEXTS = [" ".join(PIECES), *strings(300, seed=9)]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 700)


def metadata(trained, split, template=None):
    """What a GGUF file says of the vocabulary of a trained tokenizer."""
    model = json.loads(trained.spec()["json"])["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*tokens, "<|end|>", "<think>", "<s>"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    n = len(tokens)
    found = {
        GGML + "model": "gpt2", GGML + "pre": split, GGML + "tokens": tokens, GGML + "merges": merges,
        GGML + "token_type": [1] * (n - 3) + [3, 4, 3],
        GGML + "eos_token_id": n - 3, GGML + "bos_token_id": n - 1,
        "general.architecture": "llama",
    }  # fmt: skip
    return found if template is None else {**found, "tokenizer.chat_template": template}


def theirs_of(metadata):
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING

    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {
        names[key.removeprefix("tokenizer.")]: value
        for key, value in metadata.items()
        if key.removeprefix("tokenizer.") in names
    }
    backend, _ = convert_gguf_tokenizer("llama", described)
    backend.encode_special_tokens = True  # text is text
    return backend


@pytest.mark.parametrize("split", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_gguf_as_transformers_reads_it(split, trained):
    found = metadata(trained, split)
    ours = tokenizer_from_gguf(found, len(found[GGML + "tokens"]), "a.gguf")
    theirs = theirs_of(found)
    for text in strings(400, seed=len(split)):
        wanted = theirs.encode(text, add_special_tokens=False).ids
        if "<|end|>" not in text:
            assert ours.encode(text) == wanted, text
        assert ours.decode(wanted) == text


def test_sentencepiece_as_transformers_reads_it():
    draw = random.Random(3)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdeé漢"]
    words = {"▁a", "ab", "abc", "▁abc", "de", "cde", "▁▁", "▁▁▁▁", "ca", "bca", "ed", "▁de", "é漢"}
    tokens = [*pieces, *sorted(words)]
    found = {
        GGML + "model": "llama", GGML + "tokens": tokens, "general.architecture": "llama",
        GGML + "scores": [0.0] * len(pieces) + [-float(i % 5) for i in range(len(words))],
        GGML + "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        GGML + "bos_token_id": 1, GGML + "eos_token_id": 2, GGML + "unknown_token_id": 0,
    }  # fmt: skip
    ours, theirs = tokenizer_from_gguf(found, len(tokens), "a.gguf"), theirs_of(found)
    assert ours.prefix_ids == [1]
    for _ in range(300):
        text = "".join(draw.choice("abcde  é漢xΩ\n🙂") for _ in range(draw.randrange(20)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)).strip() == text.strip()


@pytest.mark.parametrize("kind", ["trained", "byte", "gguf"])
def test_files_that_transformers_reads(kind, trained, tmp_path):
    if kind == "gguf":
        found = metadata(trained, "qwen2", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
        ours = tokenizer_from_gguf(found, len(found[GGML + "tokens"]) + 5, "a.gguf")
    else:
        ours = trained if kind == "trained" else ByteTokenizer()
    for name, text in tokenizer_files(ours, 128).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in strings(300, seed=1):
        split = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == split, text
        assert theirs.decode(split) == ours.decode(split)
    assert theirs.eos_token == ours.decode([ours.role_ids["end"]]) or kind == "gguf"
    again = tokenizer_from_folder(tmp_path, ours.vocab_size)
    assert again is not None and again.vocab_size == ours.vocab_size
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    if kind != "gguf":  # our own form of dialogues, as a template
        messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Ann"}]
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert text == "<|user|>who?<|assistant|>Ann<|end|>"
        ids = theirs.encode(text, add_special_tokens=False)
        roles = ours.role_ids
        said = [ours.encode("who?"), ours.encode("Ann")]
        assert ids == [roles["user"], *said[0], roles["assistant"], *said[1], roles["end"]]


@pytest.mark.parametrize("split", ["smollm", "qwen2", "llama-bpe", "gpt-2"])
def test_gguf_metadata_there_and_back(split, trained):
    first = metadata(trained, split, "{{ messages[0]['content'] }}")
    size = len(first[GGML + "tokens"]) + 3
    ours = tokenizer_from_gguf(first, size, "a.gguf")
    second = gguf_metadata_of(ours, size, split)
    assert second[GGML + "tokens"][: size - 3] == first[GGML + "tokens"]
    for key in ("pre", "merges", "eos_token_id", "bos_token_id"):
        assert second[GGML + key] == first[GGML + key]
    again = tokenizer_from_gguf(second, size, "b.gguf")
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert again.chat["template"] == ours.chat["template"]


def test_vocabulary_smaller_than_the_model(trained):
    found = metadata(trained, "gpt-2")
    n = len(found[GGML + "tokens"])
    ours = tokenizer_from_gguf(found, n + 40, "a.gguf")
    assert ours.vocab_size == n + 40
    again = tokenizer_from_spec(json.loads(json.dumps(ours.spec())))
    assert (again.vocab_size, again.encode("a fox")) == (n + 40, ours.encode("a fox"))
    with pytest.raises(ToolmemError, match="do not belong together"):
        tokenizer_from_gguf(found, n - 1, "a.gguf")


def test_damaged_metadata_are_refused(trained):
    good = metadata(trained, "gpt-2")
    for change, (value, message) in {
        "model": ("bert", "kind 'bert'"), "pre": ("zebra", "'zebra'"), "tokens": ([], "no tokenizer"),
        "merges": (None, "no merges"), "eos_token_id": (10**9, "no token has that id"),
        "token_type": ([1], "damaged"),
    }.items():  # fmt: skip
        with pytest.raises(ToolmemError, match=message):
            tokenizer_from_gguf({**good, GGML + change: value}, 10**6, "a.gguf")


def test_known_splits_are_transformers_own():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name, split in SPLITS.items():
        assert GGUF_PRE_TOKENIZER_SPLITS.get(name) == split, name


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(text):
    ours = test_any_text_comes_back.__dict__.setdefault(
        "tokenizer",
        tokenizer_from_gguf(metadata(train_tokenizer(TEXTS[:20], 400), "qwen2"), 500, "a"),
    )
    assert ours.decode(ours.encode(text)) == text.encode("utf-8", "replace").decode()
