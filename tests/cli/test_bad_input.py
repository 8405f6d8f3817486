"""Bad input: one plain message that names the key or file, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_toys import TINY, changed, write_config

from toolmem import checkpoints

DATA, MODEL = "data__init_args__", "model__model__init_args__"
TEXT = {"class_path": "toolmem.data.TextDataModule", "init_args": {"seq_len": 16}}
PEOPLE = "name,city\nAnn Smith,Oslo\nBob Jones,Rome\n"


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def refused(called: Any, *expected: str) -> None:
    """The message is plain, short, names what is wrong, and the exit code is 2."""
    assert called.code == 2, called
    message = called.err.strip()
    assert message.startswith("toolmem "), message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 12, message
    assert all(len(line) < 700 for line in message.splitlines()), message
    assert "Union" not in message and "<class" not in message, message
    for text in expected:
        assert text in message, f"{text!r} is not in: {message}"


# ---- recipes: dotted key -> value, and what the message must say
RECIPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown top-level key": ({"modell": 1}, ["'modell'"]),
    "unknown model key": ({MODEL + "dimm": 8}, ["model.model.init_args.dimm"]),
    "unknown data key": ({DATA + "peoples": 8}, ["data.init_args.peoples"]),
    "unknown trainer key": ({"trainer__max_step": 8}, ["max_step"]),
    "unknown recall key": ({"recall__often": 1}, ["often"]),
    "word for a number": ({MODEL + "dim": "wide"}, ["model.model.init_args.dim", "int", "wide"]),
    "list for a number": ({DATA + "people": [1]}, ["data.init_args.people", "int or str"]),
    "trainer's word": ({"trainer__max_steps": "many"}, ["trainer.max_steps", "int"]),
    "unknown setting": ({DATA + "setting": "in_mind"}, ["data.init_args.setting", "in_weight"]),
    "unknown norm": ({MODEL + "norm": "batch"}, ["model.model.init_args.norm", "rms"]),
    "unknown mask": ({DATA + "mask": "user"}, ["data.init_args.mask", "assistant"]),
    "unknown layout": ({DATA + "layout": "heap"}, ["data.init_args.layout", "bucketed"]),
    "unknown query language": ({DATA + "query": "prolog"}, ["data.init_args.query", "sql"]),
    "misspelt model": (
        {"model__model__class_path": "toolmem.models.Transfomer"},
        ["model.model.class_path", "did you mean toolmem.models.Transformer"],
    ),
    "misspelt data": (
        {"data__class_path": "toolmem.data.FactDataModule"},
        ["data.class_path", "did you mean toolmem.data.FactsDataModule"],
    ),
    "misspelt optimizer": (
        {"model__optimizer__class_path": "toolmem.training.Adam"},
        ["model.optimizer.class_path", "toolmem.training.AdamW"],
    ),
    "missing package": (
        {"model__model__class_path": "nosuchpackage.Model"},
        ["model.model", "nosuchpackage"],
    ),
    "a class of something else": (
        {"model__model__class_path": "torch.nn.Linear"},
        ["model.model", "torch.nn.Linear", "LanguageModel"],
    ),
    "heads do not divide dim": ({MODEL + "dim": 9}, ["dim 9", "n_heads 2"]),
    "kv heads do not divide heads": (
        {MODEL + "n_heads": 4, MODEL + "n_kv_heads": 3},
        ["n_kv_heads 3"],
    ),
    "prefix mask with loss everywhere": (
        {MODEL + "attention_mask": "prefix", DATA + "mask": "all"},
        ["attention_mask", "data.init_args.mask"],
    ),
    "prefix mask on plain text": (
        {
            MODEL + "attention_mask": "prefix",
            "data": {"class_path": "toolmem.data.RecallDataModule"},
        },
        ["attention_mask: causal"],
    ),
    "a window below 0": ({MODEL + "window": -1}, ["window is -1"]),
    "rope_fraction above 1": ({MODEL + "rope_fraction": 2.0}, ["rope_fraction is 2.0"]),
    "no layers": ({MODEL + "n_layers": 0}, ["n_layers"]),
    "rows longer than the model": ({MODEL + "max_seq_len": 16}, ["max_seq_len is 16"]),
    "vocab_size given twice": ({MODEL + "vocab_size": 100}, ["init_args.vocab_size", "leave it out"]),
    "in_tool, templates without tool": (
        {DATA + "setting": "in_tool", DATA + "templates": "in_weight"},
        ["data.init_args.setting", "in_weight"],
    ),
    "in_weight, templates with tool": ({DATA + "templates": "in_tool"}, ["data.init_args.templates"]),
    "no such templates": ({DATA + "templates": "in_tol"}, ["in_tol", "in_tool"]),
    "unknown attribute": ({DATA + "attributes": ["shoe_size"]}, ["shoe_size", "birth_date"]),
    "nobody": ({DATA + "people": 0}, ["people"]),
    "more people than names": ({DATA + "people": 999_999}, ["169,556"]),
    "alpha above 1": ({DATA + "alpha": 2}, ["alpha"]),
    "empty batches": ({DATA + "batch_size": 0}, ["batch_size"]),
    "fewer than no workers": ({DATA + "num_workers": -1}, ["num_workers"]),
    "everything held out": ({DATA + "held_out": 1.5}, ["held_out"]),
    "held-out questions of none": ({DATA + "val_split": "held_out"}, ["val_split", "held_out"]),
    "people of a missing table": ({DATA + "people": "nobody.csv"}, ["nobody.csv"]),
    "missing tokenizer": ({DATA + "tokenizer": "nothing.json"}, ["nothing.json"]),
    "negative learning rate": ({"model__optimizer__init_args__lr": -1}, ["model.optimizer", "lr"]),
    "schedule without an end": ({"trainer__max_steps": -1}, ["Linear", "trainer.max_steps"]),
    "negative warm-up": ({"model__schedule__init_args__warmup_steps": -1}, ["warmup_steps"]),
    "no optimizer": ({"model__optimizer": None}, ["model.optimizer"]),
    "no data": ({"data": None}, ["data"]),
    "an optimizer of Lightning's": (
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
        ["optimizer", "model.optimizer"],
    ),
    "a scheduler of Lightning's": (
        {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ConstantLR"}},
        ["lr_scheduler", "model.schedule"],
    ),
    "trainer.logger": ({"trainer__logger": True}, ["trainer.logger", "use logger"]),
    "trainer's folder": ({"trainer__default_root_dir": "x"}, ["trainer.default_root_dir", "name"]),
    "unknown precision": ({"trainer__precision": "8-bit"}, ["trainer.precision", "bf16-mixed"]),
    "unknown accelerator": ({"trainer__accelerator": "abacus"}, ["accelerator", "abacus", "cpu"]),
    "no device": ({"trainer__devices": 0}, ["trainer", "devices"]),
    "clipping below 0": ({"trainer__gradient_clip_val": -1}, ["trainer.gradient_clip_val is -1"]),
    "validation every -1": ({"trainer__val_check_interval": -1}, ["val_check_interval"]),
    "checkpoints every 0": ({"checkpointing__every_n_steps": 0}, ["checkpointing", "every_n_steps"]),
    "unknown mode": ({"checkpointing__mode": "best"}, ["checkpointing.mode", "min"]),
    "stop at a recall of 3": ({"recall__stop_at": 3}, ["recall", "stop_at"]),
    "unknown resume": ({"resume": "maybe"}, ["resume", "auto"]),
    "unknown logger": ({"logger": "paper"}, ["logger", "wandb"]),
    "missing checkpoint": ({"ckpt_path": "nowhere.ckpt"}, ["nowhere.ckpt"]),
    "text without a path": ({"data": TEXT}, ["--data.path", "TOOLMEM_DATA", "Shakespeare"]),
    "missing text": (
        {"data": TEXT | {"init_args": {"path": "gone.txt", "seq_len": 16}}},
        ["gone.txt", "Shakespeare", "smollm-corpus"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_work(case, tmp_path, toolmem, monkeypatch):
    monkeypatch.delenv("TOOLMEM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    changes, expected = RECIPES[case]
    recipe = write_config(tmp_path / "recipe.yaml", changed(**changes))
    refused(toolmem("fit", "--config", recipe, "--runs", "runs", "--name", "x"), *expected)
    assert files(tmp_path) == {Path("recipe.yaml")}
    assert not (tmp_path / "runs" / "x").exists()


@pytest.mark.parametrize(
    "key", ["data.peoples", "data.init_args.peoples", "model.model.dimm", "trainer.max_step"]
)
def test_a_key_of_the_command_line_is_named_as_it_was_typed(key, tmp_path, toolmem):
    """One that is nearly another's beginning (max_step) is a mistake too, and not that other."""
    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    called = toolmem("fit", "--config", recipe, "--runs", tmp_path / "runs", f"--{key}", 8)
    refused(called, key, "toolmem fit --help")
    assert files(tmp_path) == {Path("recipe.yaml")}


def test_text_data_named_by_the_environment(tmp_path, toolmem, monkeypatch):
    monkeypatch.setenv("TOOLMEM_DATA", str(tmp_path / "nothing"))
    recipe = write_config(tmp_path / "recipe.yaml", changed(data=TEXT))
    refused(
        toolmem("fit", "--config", recipe, "--runs", tmp_path / "runs"), str(tmp_path / "nothing")
    )


def test_text_that_is_no_text(tmp_path, toolmem):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    (tmp_path / "c.txt").write_bytes(b"")
    for name in ("a.parquet", "b.jsonl", "c.txt"):
        data = TEXT | {"init_args": {"path": str(tmp_path / name), "seq_len": 16}}
        recipe = write_config(tmp_path / "recipe.yaml", changed(data=data))
        refused(
            toolmem("fit", "--config", recipe, "--runs", tmp_path / "runs", "--name", "x"), name
        )
        assert not (tmp_path / "runs" / "x").exists()


@pytest.mark.parametrize("text", ["model: [unclosed", "- a\n- list\n", "a: 1\n\tb: 2\n"])
def test_a_recipe_that_is_no_yaml(text, tmp_path, toolmem):
    (tmp_path / "recipe.yaml").write_text(text)
    refused(toolmem("fit", "--config", tmp_path / "recipe.yaml"))


# ---- words: the command line itself
WORDS: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["evalute"], ["evalute", "did you mean evaluate"]),
    "missing recipe": (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "unknown option": (["generate", "--checkpoint", "x", "--promt", "?"], ["promt"]),
    "option's type": (["evaluate", "--checkpoint", "x", "--n_questions", "few"], ["n_questions"]),
    "no checkpoint given": (["generate", "--prompt", "?"], ["checkpoint"]),
    "validate what": (["validate"], ["model"]),
    "neither prompt nor prompts": (["generate", "--checkpoint", "x"], ["--prompt"]),
    "prompt and prompts": (
        ["generate", "--checkpoint", "x", "--prompt", "?", "--prompts", "p", "--out", "o"],
        ["--prompt", "--prompts"],
    ),
    "prompts without out": (["generate", "--checkpoint", "x", "--prompts", "p"], ["--out"]),
    "negative temperature": (
        ["generate", "--checkpoint", "x", "--prompt", "?", "--temperature", "-1"],
        ["--temperature"],
    ),
    "missing run": (["generate", "--checkpoint", "nowhere", "--prompt", "?"], ["nowhere"]),
    "run to evaluate": (["evaluate", "--checkpoint", "nowhere"], ["nowhere"]),
    "unknown task": (["evaluate", "--checkpoint", "x", "--tasks", "chess"], ["chess", "recall"]),
    "no questions": (["evaluate", "--checkpoint", "x", "--n_questions", "0"], ["--n_questions"]),
    "unknown facts command": (["facts", "destroy"], ["destroy", "build"]),
    "facts without people": (["facts", "build", "--out", "f"], ["people"]),
    "facts of too many": (["facts", "build", "--people", "999999", "--out", "f"], ["169,556"]),
    "facts with alpha -1": (
        ["facts", "build", "--people", "3", "--alpha", "-1", "--out", "f"],
        ["alpha"],
    ),
    "facts to show": (["facts", "show", "nothing.duckdb"], ["nothing.duckdb"]),
    "unknown tool": (["tool", "hammer"], ["hammer", "sql"]),
    "a tool's file": (["tool", "sql", "nothing.duckdb", "FIND a FOR b"], ["nothing.duckdb"]),
    "a tool's question": (["tool", "sql", "nothing.duckdb"], ["QUERY", "--queries"]),
    "unknown tokenizer command": (["tokenizer", "eat"], ["eat", "train"]),
    "text of a tokenizer": (
        ["tokenizer", "train", "gone.txt", "--out", "t.json"],
        ["gone.txt"],
    ),
    "demo of no steps": (["demo", "--steps", "0"], ["--steps"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_words_that_make_no_sense(case, tmp_path, toolmem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, expected = WORDS[case]
    refused(toolmem(*words), *expected)
    assert files(tmp_path) == set()


# ---- people's tables
TABLES: dict[str, tuple[str, list[str]]] = {
    "no name": ("who,city\nAnn,Oslo\n", ["name", "who, city"]),
    "only names": ("name\nAnn\n", ["only names"]),
    "nobody": ("name,city\n", ["no rows"]),
    "twice": ("name,city\nAnn,Oslo\nAnn,Rome\n", ["row 2", "Ann"]),
    "nameless": ("name,city\n,Oslo\n", ["row 1"]),
    "no value": ("name,city\nAnn,\n", ["row 1", "city"]),
    "NUL": ("name,city\nAnn,Os\0lo\n", ["people.csv"]),
    "tab": ("name,city\nAnn,Os\tlo\n", ["row 1", "city"]),
    "too many values": ("name,city\nAnn,Oslo,Rome\n", ["row 1", "line 2"]),
    "columns alike": ("name,city,City\nAnn,Oslo,Rome\n", ["City"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_of_people(case, tmp_path, toolmem):
    text, expected = TABLES[case]
    table = tmp_path / "people.csv"
    table.write_text(text)
    called = toolmem("facts", "build", "--people", table, "--out", tmp_path / "facts.duckdb")
    refused(called, "people.csv", *expected)
    assert files(tmp_path) == {Path("people.csv")}


# ---- templates
TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "unknown field": ("user: Who is {{ nam }}?\nassistant: {{ birth_date }}.\n", ["line 1", "nam"]),
    "unknown field below": ("user: {{ name }}?\nassistant: {{ birth_dat }}.\n", ["line 2"]),
    "no turn": ("When was {{ name }} born?\n", ["line 1"]),
    "broken": ("user: {{ name ?\nassistant: {{ birth_date }}\n", ["line 1"]),
    "empty": ("", []),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template(case, tmp_path, toolmem):
    text, expected = TEMPLATES[case]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "birth_date.jinja").write_text(text)
    recipe = write_config(tmp_path / "recipe.yaml", changed(**{DATA + "templates": str(folder)}))
    called = toolmem("fit", "--config", recipe, "--runs", tmp_path / "runs", "--name", "x")
    refused(called, "birth_date.jinja", *expected)
    assert not (tmp_path / "runs" / "x").exists()


# ---- checkpoints
def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        checkpoint = checkpoints.read(file)
        change(checkpoint)
        checkpoints.write(checkpoint, file)

    return apply


class Malice:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (lambda file: file.unlink(), ["checkpoint"]),
    "empty": (lambda file: file.write_bytes(b""), ["last.ckpt", "truncated"]),
    "truncated": (truncate, ["last.ckpt", "truncated"]),
    "garbage": (lambda file: file.write_bytes(b"\x80\x02garbage" * 99), ["last.ckpt"]),
    "foreign": (lambda file: torch.save({"state_dict": {}}, file), ["last.ckpt", "toolmem"]),
    "a tensor": (lambda file: torch.save(torch.zeros(3), file), ["last.ckpt", "Tensor"]),
    "code": (lambda file: torch.save(Malice(), file), ["last.ckpt"]),
    "of the future": (edit(lambda c: c["toolmem"].update(format=99)), ["format 99"]),
    "of an unknown class": (
        edit(lambda c: c["toolmem"]["model"].update(class_path="other.Model")),
        ["last.ckpt", "other.Model"],
    ),
    "of no model": (
        edit(lambda c: c["toolmem"]["model"].update(class_path="os.system")),
        ["last.ckpt", "os.system"],
    ),
    "with an odd argument": (
        edit(lambda c: c["toolmem"]["model"]["init_args"].update(tea=1)),
        ["last.ckpt", "tea"],
    ),
    "of another width": (
        edit(lambda c: c["toolmem"]["model"]["init_args"].update(dim=16)),
        ["last.ckpt", "do not fit"],
    ),
    "of another vocabulary": (
        edit(
            lambda c: (
                c["toolmem"]["model"]["init_args"].update(vocab_size=300),
                c["state_dict"].update(
                    {
                        name: torch.zeros(300, 8)
                        for name, value in c["state_dict"].items()
                        if value.shape[:1] == (260,)
                    }
                ),
            )
        ),
        ["last.ckpt", "300", "260"],
    ),
    "of an unknown tokenizer": (
        edit(lambda c: c["toolmem"]["data"].update(tokenizer={"type": "runes"})),
        ["last.ckpt", "tokenizer", "runes"],
    ),
    "without a tokenizer": (
        edit(lambda c: c["toolmem"]["data"].pop("tokenizer")),
        ["last.ckpt", "tokenizer"],
    ),
    "without weights": (edit(lambda c: c.pop("state_dict")), ["last.ckpt"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint(case, tmp_path, runs, toolmem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, expected = CHECKPOINTS[case]
    run = tmp_path / "run"
    shutil.copytree(runs / "in_weight", run)
    (run / "checkpoints" / "best.ckpt").unlink()
    damage(run / "checkpoints" / "last.ckpt")
    refused(toolmem("generate", "--checkpoint", run, "--prompt", "?"), *expected)
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({MODEL + "dim": 16}, "model.model.init_args.dim is 16"),
        ({DATA + "people": 13}, "data.init_args.people"),
        ({"model__optimizer__init_args__lr": 0.5}, "model.optimizer.init_args.lr"),
        ({DATA + "batch_size": 4}, "batch_size"),
    ],
)
def test_a_checkpoint_of_another_recipe(changes, expected, tmp_path, runs, toolmem):
    shutil.copytree(runs / "in_weight", tmp_path / "in_weight")
    run = tmp_path / "in_weight"
    # the same facts may be written anew, other ones must not
    same_facts = set() if "people" in expected else {Path("facts.duckdb")}
    before = {path: (run / path).read_bytes() for path in files(run) - same_facts}
    recipe = write_config(tmp_path / "recipe.yaml", changed(trainer__max_steps=8, **changes))
    words = ["--runs", tmp_path, "--name", "in_weight", "--resume", "auto"]
    refused(toolmem("fit", "--config", recipe, *words), expected)
    assert {path: (run / path).read_bytes() for path in files(run) - same_facts} == before


def test_a_damaged_checkpoint_to_resume(tmp_path, runs, toolmem):
    shutil.copytree(runs / "in_weight", tmp_path / "in_weight")
    truncate(tmp_path / "in_weight" / "checkpoints" / "last.ckpt")
    recipe = write_config(tmp_path / "recipe.yaml", changed(trainer__max_steps=8))
    words = ["--runs", tmp_path, "--name", "in_weight", "--resume", "auto"]
    folder = tmp_path / "in_weight" / "checkpoints"
    with pytest.warns(RuntimeWarning, match=r"last\.ckpt cannot be read.*training goes on from"):
        assert toolmem("fit", "--config", recipe, *words).code == 0
    assert (folder / "last.ckpt.damaged").is_file()
    assert checkpoints.read(folder / "last.ckpt")["global_step"] == 8
    for file in folder.glob("*.ckpt"):
        truncate(file)
    refused(toolmem("fit", "--config", recipe, *words), "no checkpoint", "is whole", "--name")


def test_a_run_that_exists(tmp_path, runs, toolmem):
    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    called = toolmem("fit", "--config", recipe, "--runs", runs, "--name", "in_weight")
    refused(called, "in_weight", "--resume auto", "--name")


# ---- factbases
def test_other_facts(tmp_path, runs, toolmem):
    other = tmp_path / "other.duckdb"
    assert toolmem("facts", "build", "--people", 5, "--seed", 9, "--out", other).code == 0
    words = ["--checkpoint", runs / "in_tool", "--factbase", other]
    refused(toolmem("generate", *words, "--prompt", "?"), "other.duckdb", "--allow_other_factbase")
    refused(toolmem("evaluate", *words, "--out", tmp_path / "r.json"), "other.duckdb")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("damage", ["missing", "garbage", "truncated", "replaced"])
def test_a_factbase(damage, tmp_path, runs, toolmem):
    run = tmp_path / "run"
    shutil.copytree(runs / "in_tool", run)
    facts = run / "facts.duckdb"
    if damage == "missing":
        facts.unlink()
    elif damage == "garbage":
        facts.write_bytes(b"no database" * 999)
    elif damage == "truncated":
        truncate(facts)
    else:
        facts.unlink()
        assert toolmem("facts", "build", "--people", 5, "--seed", 9, "--out", facts).code == 0
    refused(toolmem("evaluate", "--checkpoint", run), "facts.duckdb")
    refused(toolmem("generate", "--checkpoint", run, "--prompt", "When?"), "facts.duckdb")
    if damage in ("garbage", "truncated"):
        refused(toolmem("facts", "show", facts), "facts.duckdb")
        refused(toolmem("tool", "sql", facts, "FIND a FOR b"), "facts.duckdb")


# ---- rows of JSONL
ROWS: dict[str, tuple[bytes, list[str]]] = {
    "not JSON": (b'{"prompt": "a"}\n{prompt}\n', ["line 2", "JSON"]),
    "not an object": (b'"a"\n', ["line 1", "prompt"]),
    "another key": (b'{"question": "a"}\n', ["line 1", "prompt"]),
    "not text": (b'{"prompt": 3}\n', ["line 1", "prompt"]),
    "nothing": (b"\n", ["holds no prompt"]),
    "not UTF-8": (b'{"prompt": "\xff"}\n', ["UTF-8"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, tmp_path, runs, toolmem):
    content, expected = ROWS[case]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(content)
    out = tmp_path / "out.jsonl"
    words = ["--checkpoint", runs / "in_weight", "--prompts", prompts, "--out", out]
    refused(toolmem("generate", *words), "prompts.jsonl", *expected)
    assert not out.exists()


def test_an_output_of_other_prompts_is_not_touched(tmp_path, runs, toolmem):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    out.write_text(json.dumps({"prompt": "b", "answer": "c"}) + "\n")
    before = out.read_bytes()
    words = ["--checkpoint", runs / "in_weight", "--prompts", prompts, "--out", out]
    refused(toolmem("generate", *words), "out.jsonl", "line 1")
    refused(toolmem("generate", *words[:-1], prompts), "prompts.jsonl")
    assert out.read_bytes() == before
    assert prompts.read_text() == '{"prompt": "a"}\n'


# ---- folders and disks
def test_a_file_where_a_folder_should_be(tmp_path, runs, toolmem):
    (tmp_path / "file").write_text("")
    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    inside = tmp_path / "file" / "deep"
    run = runs / "in_weight"
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    rows = ["--prompts", tmp_path / "p.jsonl", "--out", inside / "x"]
    for called in (
        toolmem("fit", "--config", recipe, "--runs", tmp_path, "--name", "file"),
        toolmem("fit", "--config", recipe, "--runs", inside, "--name", "x"),
        toolmem("facts", "build", "--people", 3, "--out", inside / "x"),
        toolmem("evaluate", "--checkpoint", run, "--n_questions", 1, "--out", inside / "x"),
        toolmem("generate", "--checkpoint", run, *rows),
    ):
        refused(called, str(tmp_path / "file"))
    assert files(tmp_path) == {Path("file"), Path("recipe.yaml"), Path("p.jsonl")}


@pytest.mark.parametrize("name", ["../out", "/out", "a\0b"])
def test_a_name_that_leads_elsewhere(name, tmp_path, toolmem):
    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    refused(toolmem("fit", "--config", recipe, "--runs", tmp_path / "runs", "--name", name), "name")
    assert files(tmp_path) == {Path("recipe.yaml")}


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_in_training(tmp_path, toolmem, monkeypatch):
    """The checkpoint before stays whole, and no half of the new one is left."""
    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    fit = ["fit", "--config", recipe, "--runs", tmp_path, "--name", "x"]
    assert toolmem(*fit, "--trainer.max_steps", 2).code == 0
    last = tmp_path / "x" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    monkeypatch.setattr("toolmem.checkpoints.tensor_files.write", full)
    called = toolmem(*fit, "--resume", "auto")
    refused(called, "checkpoints", "disk is full")
    assert last.read_bytes() == before
    assert not [path for path in files(tmp_path) if path.suffix == ".part"]


def test_a_disk_that_is_full_elsewhere(tmp_path, runs, toolmem, monkeypatch):
    words = ["--checkpoint", runs / "in_weight", "--n_questions", 1, "--out", tmp_path / "r.json"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        refused(toolmem("evaluate", *words), "r.json", "disk is full")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        called = toolmem("facts", "build", "--people", 3, "--out", tmp_path / "f.duckdb")
        refused(called, "f.duckdb", "disk is full")
    # what was answered is kept, so that nothing is asked twice
    assert files(tmp_path) == {Path("r.answers.jsonl")}


def test_ctrl_c_is_no_error_of_ours(toolmem, monkeypatch):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("toolmem.cli.facts.main", interrupted)
    called = toolmem("facts", "build")
    assert called.code == 130
    assert "interrupted" in called.err
