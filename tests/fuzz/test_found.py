"""What fuzzing has found, one example each: it stays mended."""

from __future__ import annotations

import fuzz_targets
import pytest
import yaml

from toolmem.recipe_files import MAX_CHARS, read_mapping

FOUND = {
    "template": [
        "{{ self }}",
        "{{ range }} {{ query }}",
        "user: {{ name }}\nassistant: {{ (name.split() ~ '').split() }}",
    ],
    "sql": ["", "SELECT name FROM people; COPY people TO 'out.csv'", "SELECT getenv('HOME') FROM people"],
    "jsonl": [("jsonl", [("set", 0, b"\xff\xfe{\x00", 1)]), ("jsonl.gz", [("cut", 60, b"x", 1)])],
    "parquet": [("none.parquet", [("zero", 4, b"x", 64)]), ("snappy.parquet", [("cut", 300, b"x", 1)])],
    "yaml": ["!!timestamp x", "a: 2020-99-99", "&x [*x]", "[" * 2000, "!!python/object/apply:os.getcwd []"],
    "config": [
        [(1036, None, False)],
        [(4, True, False)],
        [(2103, [], False)],
    ],
    "sweep": [[(103, [[]], False)], [(10, 10**15, False)], [(0, "\x00", False)]],
    "checkpoint_words": [[(1036, None, False)]],
    "checkpoint_header": [("file", [(741, None, False)]), ("file", [(226, None, False)])],
    "request": [([], [("set", 0, b"[[[[", 1)])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "example"), [(name, one) for name, examples in FOUND.items() for one in examples]
)
def test_it_stays_mended(target, example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the database's target changes the folder
    fuzz_targets.TARGETS[target][1](example)


def test_aliases_that_grow(tmp_path):
    """A thousand letters that stand for 10⁹ values (the billion laughs)."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for n in range(1, 10):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(fuzz_targets.ToolmemError, match="more than 200,000 values"):
        read_mapping(path)
    path.write_text("a: " + "x" * MAX_CHARS)
    with pytest.raises(fuzz_targets.ToolmemError, match=r"characters, at most 4,194,304"):
        read_mapping(path)
    path.write_text(yaml.safe_dump({"a": list(range(1000))}))
    assert len(read_mapping(path)["a"]) == 1000
