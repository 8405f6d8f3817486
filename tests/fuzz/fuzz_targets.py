"""What is fuzzed: name -> (strategy, check). A further reader is one line in ``TARGETS``.

A check raises for what is wrong. ``ToolmemError`` (for the server, ``ApiError``) is how bad input is to end.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from toolmem.errors import ToolmemError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("FUZZ_FOLDER") or tempfile.mkdtemp())
Target = tuple[st.SearchStrategy[Any], Callable[[Any], None]]


@contextlib.contextmanager
def only_told():
    """What bad input may raise."""
    with contextlib.suppress(ToolmemError):
        yield


# -- bytes of a valid file, changed in a few places

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "insert", "double", "cut", "zero"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=8),
        st.integers(1, 64),
    ),
    min_size=0,
    max_size=6,
)


def mutated(content: bytes, changes: list[tuple[str, int, bytes, int]]) -> bytes:
    """A file's bytes after some changes."""
    data = bytearray(content)
    for kind, place, new, length in changes:
        at = place % (len(data) + 1)
        if kind == "set":
            data[at : at + len(new)] = new
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = new
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


# -- plain data of a valid document, changed in a few places

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=8),
    st.just([]), st.just({}), st.just([[]]), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
# A recipe may ask for as large a model as it says: that takes its time, and is none of the reader's faults.
SMALL = JUNK.filter(lambda junk: not isinstance(junk, int) or abs(junk) < 100)
SMALL_EDITS = st.lists(st.tuples(st.integers(0, 10_000), SMALL, st.booleans()), max_size=3)
EDITS = st.lists(st.tuples(st.integers(0, 10_000), JUNK, st.booleans()), min_size=0, max_size=3)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything within."""
    found = [path] if path else []
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in inner:
        found += places_of(child, (*path, key))
    return found


def edited(value: Any, edits: list[tuple[int, Any, bool]]) -> Any:
    """Plain data after some places in it were replaced, or taken out."""
    value = copy.deepcopy(value)
    for number, junk, remove in edits:
        places = places_of(value)
        junk = copy.deepcopy(junk)  # nothing is to hold itself
        if not places:
            return junk
        *path, last = places[number % len(places)]
        parent = value
        for key in path:
            parent = parent[key]
        if remove:
            del parent[last]
        else:
            parent[last] = junk
    return value


# -- templates

JINJA = st.sampled_from(
    ["{{ name }}", "{{ birth_date }}", "{{", "}}", "{%", "%}", "{#", "#}", "{{ query('birth_date', name) }}",
     "{% if name %}", "{% else %}", "{% endif %}", "{% for x in name.split() %}", "{% endfor %}", "|upper",
     "{{ x }}", " ~ ", "[0]", "[1:]", ".split()", "(", ")", "'", '"', "*", "**", "%", "range(9)", "__class__",
     "{% macro m() %}", "{% set a = 1 %}", "999999999", "\n", "user: ", "assistant: ", "database: ", "---\n",
     "people: older\n", "people: unique birth_date\n", "answer: birth_date\n", "permute: sentences\n", "-", "\\",
     "<|user|>", "{% raw %}", "{% endraw %}", "{{ other.name }}", "{{ loop.index }}", "{{ self }}", "{{ caller() }}"]
)  # fmt: skip
TEMPLATES = st.lists(st.one_of(JINJA, st.text(max_size=4)), max_size=25).map("".join)


@functools.cache
def population() -> Any:
    from toolmem.data.people import make_population

    return make_population(5)


def check_template(text: str) -> None:
    """A template is refused, or says every question of some people in bounded words."""
    from toolmem.data.dialogues import TemplateSet

    folder = FOLDER / "set"
    folder.mkdir(exist_ok=True)
    starts = text.startswith(("user:", "people:", "answer:", "permute:"))
    text = text if starts else f"user: {{{{ name }}}}?\nassistant: {text} {{{{ birth_date }}}}"
    (folder / "birth_date.jinja").write_text(text, encoding="utf-8", errors="replace")
    with only_told():
        questions = TemplateSet.load(folder).questions(population())
        for index in range(min(len(questions), 20)):
            dialogue = questions.dialogue(index)
            assert sum(len(turn.text) for turn in dialogue.turns) < 1 << 24
            assert {turn.role for turn in dialogue.turns} <= {"user", "assistant", "database"}


# -- the guard of the database

SQL_WORDS = st.sampled_from(
    ["SELECT", "FROM", "people", "WHERE", "name", "birth_date", "*", "=", "'Ann'", "(", ")", ",", ";", "--", "/*", "*/",
     "AND", "OR", "NOT", "IN", "LIKE", "'%a%'", "ORDER BY", "LIMIT", "1", "1e308", "GROUP BY", "HAVING", "count(*)",
     "max(name)", "JOIN", "ON", "USING", "UNION", "ALL", "WITH", "AS", "x", "CASE", "WHEN", "THEN", "END", "CAST",
     "::VARCHAR", "::BLOB", "||", "+", "lower(name)", "read_csv('canary.csv')", "read_text('canary.csv')",
     "'canary.csv'", "read_blob('*')", "glob('*')", "COPY", "TO", "'out.csv'", "ATTACH", "'new.db'", "DETACH", "PRAGMA",
     "INSTALL", "LOAD", "httpfs", "SET", "enable_external_access", "EXPORT DATABASE", "IMPORT", "CREATE", "TABLE",
     "INSERT INTO", "VALUES", "DROP", "UPDATE", "getenv('HOME')", "current_setting('temp_directory')", "query('SELECT 1')",
     "query_table('people')", "sql_auto_complete('S')", "duckdb_settings()", "pragma_version()", "sniff_csv('canary.csv')",
     "parquet_metadata('x.parquet')", "range(9)", "generate_series(1,9)", "repeat(name, 9)", "list_transform([1], x -> x)",
     "EXPLAIN", "ANALYZE", "DESCRIBE", "SHOW", "SUMMARIZE", "main.people", "facts.people", "system.main.people", '"people"',
     '"name"', "$1", "?", "E'\\x41'", "x'41'", "COLUMNS(*)", "EXCLUDE", "REPLACE", "PIVOT", "QUALIFY", "OVER ()", "SAMPLE",
     "LATERAL", "UNNEST([1])", "struct_pack(a := 1)", "INTERVAL 1 DAY", "current_user", "today()", "random()", "error('x')",
     "write_log('x')", "nextval('s')", "CALL", "EXECUTE", "PREPARE", "CHECKPOINT", "FORCE", "VACUUM", "BEGIN", "COMMIT"]
)  # fmt: skip
WHOLE = st.sampled_from(
    ["SELECT name FROM people", "SELECT count(*) FROM people WHERE birth_date LIKE '%19%'",
     "SELECT a.name FROM people a JOIN people b ON a.name = b.name", "SELECT max(name) FROM (SELECT name FROM people) x",
     "SELECT name FROM people ORDER BY name LIMIT 3", "FROM people SELECT name", "SELECT * FROM people WHERE name IN ('a')"]
)  # fmt: skip
QUERIES = st.lists(st.one_of(SQL_WORDS, SQL_WORDS, WHOLE, st.text(max_size=5)), max_size=14).map(
    " ".join
)


@functools.cache
def databases() -> tuple[Any, Any, Any]:
    """The tool, and two DuckDBs over the same facts: one that may reach files, one that may not."""
    import duckdb

    from toolmem.data.factbase import build_factbase
    from toolmem.tools import SqlTool

    folder = FOLDER / "database"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    build_factbase(population(), folder / "facts.duckdb")
    (folder / "canary.csv").write_text("canary\nXYZZYCANARY\n")
    open_ = [
        duckdb.connect(":memory:", config={"threads": 1, "memory_limit": "200MB"}) for _ in range(2)
    ]
    for connection in open_:
        connection.execute(f"ATTACH '{folder / 'facts.duckdb'}' AS facts (READ_ONLY)")
        connection.execute("USE facts")
    open_[1].execute("SET enable_external_access = false")
    return SqlTool(folder / "facts.duckdb", timeout_s=5), open_[0], open_[1]


def check_sql(query: str) -> None:
    """The tool answers every text; what its guard lets through reads and writes no file even where it could."""
    import duckdb

    from toolmem.tools.sql_check import RefusedError, check_select

    tool, free, shut = databases()
    before = sorted(os.listdir())
    answer = tool.answer(query)
    assert (
        "XYZZYCANARY" not in answer.text
        and len(answer.text.encode()) <= 300
        and "\n" not in answer.text
    )
    try:
        parsed = free.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchone()
        check_select(json.loads(parsed[0]), ("name", "birth_date"))
    except (RefusedError, duckdb.Error, RecursionError, ValueError):
        assert sorted(os.listdir()) == before
        return
    results = []
    for connection in (free, shut):
        cursor = connection.cursor()
        cursor.execute("USE facts")
        try:
            results.append(sorted(map(repr, cursor.execute(query).fetchmany(50))))
        except duckdb.Error as error:
            results.append([type(error).__name__])
        cursor.close()
    assert results[0] == results[1], "it says something else where files are out of reach"
    assert "XYZZYCANARY" not in repr(results) and sorted(os.listdir()) == before


# -- text corpora and tables


@functools.cache
def corpus_bytes(kind: str) -> bytes:
    rows = [{"text": f"document {i} é " + "x" * i, "id": i} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "jsonl":
        return lines
    if kind == "jsonl.gz":
        return gzip.compress(lines, mtime=0)
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    codec = kind.partition(".")[0]
    pq.write_table(
        pa.table({"text": [r["text"] for r in rows]}), buffer, row_group_size=5, compression=codec
    )
    return buffer.getvalue()


KINDS = ["jsonl", "jsonl.gz"]
PARQUET = ["none.parquet", "snappy.parquet", "gzip.parquet", "zstd.parquet"]


def check_corpus(example: tuple[str, list[Any]]) -> None:
    """Read whole or refused by name; with bad documents passed over, the same twice, and no others than were there."""
    from toolmem.data.text import sources
    from toolmem.data.text.documents import Documents

    kind, changes = example
    sources.MAX_LINE_BYTES = 300
    sources._told.clear()
    path = FOLDER / f"corpus.{kind}"
    path.write_bytes(mutated(corpus_bytes(kind), changes))
    for policy in ("fatal", "skip"):
        found = []
        for _ in range(2):
            with only_told():
                found.append(
                    list(Documents(path, shuffle_bytes=100, on_bad_document=policy).once())
                )
        assert len(found) != 2 or found[0] == found[1]
        assert all(isinstance(text, str) for texts in found for text in texts)


def check_table(example: list[Any]) -> None:
    """A table of people is read or refused by name."""
    from toolmem.data.tables import load_population

    path = FOLDER / "people.csv"
    path.write_bytes(mutated(b'name,job,born\nAnn Bo,spy,1980\n"Cy, D",cook,1990\n', example))
    with only_told():
        load_population(path)


# -- tokenizers, checkpoints


@functools.cache
def tokenizer_json() -> dict[str, Any]:
    from toolmem.data.hf_tokenizer import train_tokenizer

    described: dict[str, Any] = json.loads(train_tokenizer(["a few words"] * 3, 262).spec()["json"])
    return described


def check_tokenizer(edits: list[Any]) -> None:
    """A tokenizer.json is read or refused; what is read encodes."""
    from toolmem.data.hf_tokenizer import HFTokenizer

    with only_told():
        tokenizer = HFTokenizer(json.dumps(edited(tokenizer_json(), edits)))
        assert not set(tokenizer.encode("a word <|user|> é")) & set(tokenizer.role_ids.values())


@functools.cache
def checkpoint() -> dict[str, Any]:
    """What a small model's checkpoint holds."""
    from toolmem import checkpoints
    from toolmem.data.tokenizers import ByteTokenizer
    from toolmem.models import Transformer

    model = Transformer(vocab_size=260, dim=8, n_layers=1, n_heads=2, max_seq_len=32)
    about = checkpoints.describe(model, {"tokenizer": ByteTokenizer().spec(), "factbase": None})
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {"state_dict": state, "toolmem": about, "global_step": 3, "epoch": 0}


@functools.cache
def checkpoint_bytes(form: str) -> bytes:
    """It as a file: safetensors, torch's of old, or the first of a folder's."""
    import torch

    from toolmem import checkpoints
    from toolmem.checkpoints.convert import convert

    path = FOLDER / "whole.ckpt"
    if form == "torch":
        about = checkpoint()["toolmem"] | {"format": 1}
        torch.save(checkpoint() | {"toolmem": about}, path)
        return path.read_bytes()
    checkpoints.write(checkpoint(), path)
    if form == "file":
        return path.read_bytes()
    convert(path, FOLDER / "folder.ckpt", "folder", ranks=2)
    return (FOLDER / "folder.ckpt" / "rank_0.safetensors").read_bytes()


FORMS = ["file", "torch", "folder"]


def load_bytes(form: str, content: bytes) -> None:
    from toolmem import checkpoints

    if form == "folder":
        path = FOLDER / "folder.ckpt"
        (path / "rank_0.safetensors").write_bytes(content)
    else:
        path = FOLDER / "last.ckpt"
        path.write_bytes(content)
    with only_told():
        checkpoints.load(path)
    with only_told():
        checkpoints.read(path)


def check_checkpoint(example: tuple[str, list[Any]]) -> None:
    """A checkpoint's bytes load or are refused by name."""
    form, changes = example
    load_bytes(form, mutated(checkpoint_bytes(form), changes))


def check_checkpoint_words(edits: list[Any]) -> None:
    """So is what it says of its model."""
    from toolmem import checkpoints

    with only_told():
        words = edited(checkpoint()["toolmem"], edits)
        checkpoints.write(checkpoint() | {"toolmem": words}, FOLDER / "last.ckpt")
        checkpoints.load(FOLDER / "last.ckpt")


def check_checkpoint_header(example: tuple[str, list[Any]]) -> None:
    """And what a safetensors file says of its tensors and its state, with a checksum that fits."""
    import zlib

    from toolmem.checkpoints.tensor_files import CHECKSUM, NO_SUM

    form, edits = example
    content = checkpoint_bytes(form)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    inner = [key for key, value in header["__metadata__"].items() if value.startswith(("{", "["))]
    for key in inner:
        header["__metadata__"][key] = json.loads(header["__metadata__"][key])
    header = edited(header, edits)
    words = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(words, dict):
        words.update({key: json.dumps(words[key]) for key in inner if key in words})
        if CHECKSUM in words:
            words[CHECKSUM] = NO_SUM
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blank = f'"{CHECKSUM}":"{NO_SUM}"'.encode()
    text = text.replace(blank, f'"{CHECKSUM}":"{zlib.crc32(text):08x}"'.encode(), 1)
    load_bytes(form, len(text).to_bytes(8, "little") + text + content[8 + size :])


# -- other programs' models


@functools.cache
def gguf_bytes() -> bytes:
    """A small model as GGUF, with a tokenizer and a chat template."""
    from toolmem import checkpoints
    from toolmem.checkpoints import exports, pretrained
    from toolmem.data.hf_tokenizer import HFTokenizer
    from toolmem.models import Transformer

    template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = HFTokenizer.pretrained(
        json.dumps(tokenizer_json()), template, {"eos_token": "<|end|>"}
    )
    size = tokenizer.vocab_size
    model = Transformer(size, dim=8, n_layers=2, n_heads=2, max_seq_len=16, hidden_dim=8)
    about = checkpoints.describe(model, {"tokenizer": tokenizer.spec(), "factbase": None})
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = FOLDER / "whole.ckpt"
    checkpoints.write({"state_dict": state, "toolmem": about, "global_step": 3, "epoch": 0}, path)
    with pretrained.open_model(path) as opened:
        exports.write_gguf_file(opened, FOLDER / "whole.gguf")
    return (FOLDER / "whole.gguf").read_bytes()


def check_gguf(changes: list[Any]) -> None:
    """A GGUF file's bytes become a checkpoint, or are refused by name."""
    from toolmem.cli.convert import convert

    path = FOLDER / "changed.gguf"
    path.write_bytes(mutated(gguf_bytes(), changes))
    with only_told(), contextlib.redirect_stdout(io.StringIO()):
        convert(str(path), str(FOLDER / "from.ckpt"), overwrite=True)


@functools.cache
def model_folder() -> Path:
    """It as a Hugging Face folder."""
    from toolmem.checkpoints import exports, pretrained

    gguf_bytes()
    with pretrained.open_model(FOLDER / "whole.gguf") as opened:
        exports.write_huggingface(opened, FOLDER / "model")
    return FOLDER / "model"


def check_model_config(edits: list[Any]) -> None:
    """What a folder's config.json says fits its weights, or is refused by name."""
    from toolmem.cli.convert import convert

    path = model_folder() / "config.json"
    good = path.with_suffix(".good")
    if not good.exists():
        good.write_bytes(path.read_bytes())
    path.write_text(json.dumps(edited(json.loads(good.read_text()), edits)))
    with only_told(), contextlib.redirect_stdout(io.StringIO()):
        convert(str(model_folder()), str(FOLDER / "from.ckpt"), overwrite=True)


# -- configs


@functools.cache
def recipe() -> Any:
    return yaml.safe_load((ROOT / "recipes" / "facts_in_tool.yaml").read_text())


YAML_BITS = st.sampled_from(
    ["a: ", "- ", "&x ", "*x", "<<: ", "!!python/object/apply:os.system ['true']", "!!binary ", "? ", "{", "}", "[", "]",
     "\n", "\n  ", ": ", "|", ">", "'", '"', "#", "---\n", "...\n", "1e999", "0x", "2020-99-99", "1:99:99", ".inf", "~", "%YAML 1.1\n",
     "!!set ", "!!timestamp x", "!<tag:yaml.org,2002:python/name:os.system> ", "\t", "\0", "\x85", "=", "!!int a", "1_0", "yes"]
)  # fmt: skip
YAML_TEXTS = st.lists(st.one_of(YAML_BITS, st.text(max_size=4)), max_size=25).map("".join)


def check_yaml(text: str) -> None:
    """A YAML file holds a mapping, or is refused by name; its keys can be looked at and set."""
    from toolmem.recipe_files import flattened, get_key, read_mapping, set_key

    path = FOLDER / "x.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with only_told():
        found = read_mapping(path)
        flattened(found)
        get_key(found, "a.b.c")
        set_key(found, "a.b.c", 1)


def check_config(edits: list[Any]) -> None:
    """A recipe with some keys replaced makes ``toolmem inspect`` end in figures or one plain sentence."""
    from toolmem.cli import main

    path = FOLDER / "recipe.yaml"
    path.write_text(yaml.safe_dump(edited(recipe(), edits)), encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["inspect", "--config", str(path)])
    assert code == 0 or (code == 2 and err.getvalue().startswith("toolmem inspect: "))


def check_sweep(edits: list[Any]) -> None:
    """A sweep's recipe with some keys replaced is expanded or refused."""
    from toolmem.sweeps.plans import make_plan
    from toolmem.sweeps.recipe import SweepRecipe

    base = {
        "base": str(ROOT / "recipes" / "facts_in_tool.yaml"),
        "axes": {
            "lr": {"key": "model.optimizer.lr", "values": [0.1, 0.2]},
            "n": {"a": {"data.people": 3}},
        },
        "seeds": [0, 1],
        "metrics": {"loss": "val/loss"},
    }
    path = FOLDER / "sweep.yaml"
    path.write_text(yaml.safe_dump(edited(base, edits)), encoding="utf-8")
    with only_told():
        make_plan(SweepRecipe.read(path))


# -- the server

BODY = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"query\": \"FIND a FOR b\"}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 2, "seed": 1, "stop": ["x"], "max_tokens": 5, "stream": True,
    "stream_options": {"include_usage": True}, "logit_bias": {"5": 1.0}, "response_format": {"type": "text"},
}  # fmt: skip


def check_request(example: tuple[list[Any], list[Any]]) -> None:
    """A request's body is a request, or an error of the client's in OpenAI's shape."""
    from toolmem.data.tokenizers import ByteTokenizer
    from toolmem.serving.app import read_json
    from toolmem.serving.completion import dialogue_tokens
    from toolmem.serving.fields import ApiError
    from toolmem.serving.protocol import Limits, read_request

    edits, changes = example
    body = mutated(json.dumps(edited(BODY, edits)).encode(), changes)
    try:
        request = read_request(read_json(body), Limits(), ByteTokenizer())
        tokens = dialogue_tokens(request.turns, ByteTokenizer())
        roles = sum(token >= 256 for token in tokens)
        assert len(request.turns) + 1 <= roles <= 2 * len(request.turns) + 1
    except ApiError as error:
        assert 400 <= error.status < 500
        json.dumps(error.body())


# -- tasks: a recipe, and a row that it reads


@functools.cache
def task_recipes() -> list[dict[str, Any]]:
    return [
        yaml.safe_load(path.read_text())
        for path in sorted((ROOT / "recipes" / "evaluation").glob("*.yaml"))
    ]


TASK_ROW: dict[str, Any] = {
    "query": "Q", "choices": ["a", "b"], "gold": 1, "context": "c d", "continuation": "e", "answer": "C",
    "aliases": ["x"], "question": {"stem": "s", "choices": [{"text": "t", "label": "A"}]}, "text": "a b",
    "sentence": "A _ b", "option1": "o", "option2": "p", "label": 0, "endings": ["[x] y"], "ctx_a": "a",
    "ctx_b": "b", "activity_label": "l", "premise": "p.", "choice1": "c", "choice2": "d", "passage": "p",
    "goal": "g", "sol1": "s", "sol2": "t", "answerKey": "A",
}  # fmt: skip


def check_task(example: tuple[int, list[Any], list[Any]]) -> None:
    """A row that a task's recipe reads becomes a question, or is refused by name."""
    from toolmem.evaluation.tasks import TaskRecipe

    number, of_recipe, of_row = example
    recipes = task_recipes()
    values = edited(recipes[number % len(recipes)], of_recipe)
    row = edited(TASK_ROW, of_row)
    with only_told():
        if isinstance(values, dict) and isinstance(row, dict):
            TaskRecipe.from_mapping(values, "recipe.yaml").item(row, 1, "rows.jsonl")


TARGETS: dict[str, Target] = {
    "template": (TEMPLATES, check_template),
    "sql": (QUERIES, check_sql),
    "jsonl": (st.tuples(st.sampled_from(KINDS), CHANGES), check_corpus),
    "parquet": (st.tuples(st.sampled_from(PARQUET), CHANGES), check_corpus),
    "table": (CHANGES, check_table),
    "tokenizer": (EDITS, check_tokenizer),
    "checkpoint": (st.tuples(st.sampled_from(FORMS), CHANGES), check_checkpoint),
    "checkpoint_header": (
        st.tuples(st.sampled_from(["file", "folder"]), EDITS),
        check_checkpoint_header,
    ),
    "checkpoint_words": (EDITS, check_checkpoint_words),
    "gguf": (CHANGES, check_gguf),
    "model_config": (EDITS, check_model_config),
    "yaml": (YAML_TEXTS, check_yaml),
    "config": (SMALL_EDITS, check_config),
    "sweep": (EDITS, check_sweep),
    "request": (st.tuples(EDITS, CHANGES), check_request),
    "task": (st.tuples(st.integers(0, 99), EDITS, EDITS), check_task),
}
