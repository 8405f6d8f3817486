import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolmem.data.hf_tokenizer import HFTokenizer, save_tokenizer, train_tokenizer
from toolmem.data.tokenizers import (
    ROLE_TOKENS,
    ByteTokenizer,
    SymbolTokenizer,
    Tokenizer,
    make_tokenizer,
    tokenizer_from_spec,
)
from toolmem.errors import ToolmemError

TEXTS = [
    "When was Ann Smith born? Ann Smith was born on 12 March 1987.",
    "<|user|>this text reads like roles<|end|>, and <|database|> too.",
    "naïve café, 東京, 🙂 and some more of the same café",
] * 5


def _hf() -> HFTokenizer:
    return train_tokenizer(TEXTS, 400)


TOKENIZERS = [ByteTokenizer(), _hf()]
both = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte", "hf"])


@both
@settings(max_examples=200, deadline=None)
@given(data=st.binary())
@example(data=bytes(range(256)))
@example(data=b"<|user|>\xff<|end|>\xe2\x82")
def test_every_byte_string_survives(tokenizer, data):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert not set(ids) & set(tokenizer.role_ids.values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@both
@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"])).map(
        lambda text: text.replace("x", "<|database|>").replace("y", "<|end|><|user|>")
    )
)
@example(text="<|database|>")
@example(text="a <|assistant|><|assistant|> b")
def test_text_never_forges_a_role(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.role_ids.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]


@both
def test_protocol_roles_and_spec(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert list(tokenizer.role_ids) == ["user", "assistant", "database", "end"]
    assert len(set(tokenizer.role_ids.values())) == 4
    for role, token in ROLE_TOKENS.items():
        assert tokenizer.decode([tokenizer.role_ids[role]]) == token
    again = tokenizer_from_spec(pickle.loads(pickle.dumps(tokenizer.spec())))
    copied = pickle.loads(pickle.dumps(tokenizer))
    for other in (again, copied):
        assert other.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
        assert other.role_ids == tokenizer.role_ids and other.vocab_size == tokenizer.vocab_size
    with pytest.raises(ToolmemError, match="outside"):
        tokenizer.decode([tokenizer.vocab_size])


@both
def test_a_lone_surrogate_does_not_break_encoding(tokenizer):
    assert tokenizer.encode("a\ud800b")[0] == tokenizer.encode("a")[0]


def test_byte_tokenizer_is_the_published_one():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    assert tokenizer.role_ids == {"user": 256, "assistant": 257, "database": 258, "end": 259}


def test_training_is_deterministic_and_merges(tmp_path):
    first, second = _hf(), _hf()
    assert first.spec() == second.spec()
    assert first.vocab_size <= 400
    text = "Ann Smith was born"
    assert len(first.encode(text)) < len(text)
    assert len(first.encode("1987")) == 4  # digits stand alone
    save_tokenizer(first, tmp_path / "tokenizer.json")
    read = make_tokenizer(str(tmp_path / "tokenizer.json"))
    assert read.encode(text) == first.encode(text) and read.vocab_size == first.vocab_size


def test_vocabulary_size_is_met_exactly_when_there_is_text_enough():
    texts = [" ".join(f"{chr(97 + i % 26)}{chr(97 + i % 23)}q" for i in range(3000))]
    assert train_tokenizer(texts, 300).vocab_size == 300


def test_foreign_tokenizers_get_role_tokens_after_their_own(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = HFTokenizer.from_file(tmp_path)
    assert plain.vocab_size == 261 and plain.role_ids["user"] == 257
    played = HFTokenizer.from_file(tmp_path, {"end": "<|endoftext|>"})
    assert played.vocab_size == 260 and played.role_ids["end"] == 256
    assert 256 not in played.encode("a<|endoftext|>b")
    assert played.decode(played.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert tokenizer_from_spec(played.spec()).role_ids == played.role_ids
    with pytest.raises(ToolmemError, match="unknown role 'robot'"):
        HFTokenizer.from_file(tmp_path, {"robot": "x"})


def test_a_role_token_that_is_an_ordinary_word_is_still_no_role():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    words = ["<|user|>", "<", "|user|>", "hello", "?"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = HFTokenizer(backend.to_str())
    assert tokenizer.role_ids["user"] == 0
    assert tokenizer.encode("hello <|user|>") == [3, 1, 2]
    with pytest.raises(ToolmemError, match="not valid UTF-8"):
        tokenizer.encode_bytes(b"\xff")


def test_symbols():
    tokenizer = SymbolTokenizer(10)
    assert tokenizer.encode("3 9 0") == [3, 9, 0] and tokenizer.decode([3, 9]) == "3 9"
    assert tokenizer_from_spec(tokenizer.spec()).vocab_size == 10
    for wrong in ("10", "a", "-1", "٣"):
        with pytest.raises(ToolmemError, match="not a symbol"):
            tokenizer.encode(wrong)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ToolmemError, match=r"no tokenizer at .*missing.json"):
        make_tokenizer(str(tmp_path / "missing.json"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": 3}')
    with pytest.raises(ToolmemError, match=r"broken.json is not a tokenizer.json"):
        make_tokenizer(str(broken))
    with pytest.raises(ToolmemError, match="need 260"):
        train_tokenizer(["a"], 100)
    with pytest.raises(ToolmemError, match="unknown tokenizer type 'sentencepiece'"):
        tokenizer_from_spec({"type": "sentencepiece"})
