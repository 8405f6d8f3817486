import json

import pytest

from toolmem.cli.tokenizer import main, train
from toolmem.data.tokenizers import make_tokenizer
from toolmem.errors import ToolmemError


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"body": f"the {a}{b} fox"}) for a in "abcdefgh" for b in "uvwxyz"]
    path.write_text("\n".join(lines * 9))
    return path


def test_a_tokenizer_is_trained_and_can_be_used(corpus, tmp_path, capsys):
    out = tmp_path / "new" / "tokenizer.json"
    main(
        "tokenizer",
        ["train", str(corpus), "--vocab_size", "280", "--out", str(out), "--text_field", "body"],
    )
    tokenizer = make_tokenizer(str(out))
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode("the fox")) < 7
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    said = capsys.readouterr().out
    assert "280 ids" in said.replace("\n", " ") and "432 documents" in said.replace("\n", " ")


def test_several_files_and_a_limit(corpus, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "alpha alpha alpha"}\n')
    train([str(other), str(other)], 270, str(tmp_path / "t.json"))
    assert "fewer than" in capsys.readouterr().out
    train([str(corpus)], 270, str(tmp_path / "u.json"), text_field="body", max_chars=20)
    assert "2 documents" in capsys.readouterr().out.replace("\n", " ")


def test_mistakes_are_told(corpus, tmp_path):
    with pytest.raises(ToolmemError, match="line 1: no field 'text'"):
        train([str(corpus)], 300, str(tmp_path / "t.json"))
    with pytest.raises(ToolmemError, match="is a folder"):
        train([str(corpus)], 300, str(tmp_path))
    with pytest.raises(ToolmemError, match="no such file"):
        train([str(tmp_path / "none.txt")])
    with pytest.raises(ToolmemError, match="need 260"):
        train([str(corpus)], 100, str(tmp_path / "t.json"), text_field="body")
    with pytest.raises(ToolmemError, match="paths"):
        main("tokenizer", ["train"])
    assert list(tmp_path.iterdir()) == [corpus]
