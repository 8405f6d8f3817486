"""``toolmem convert``: models, checkpoints and weights from one form to another."""

from __future__ import annotations

from pathlib import Path

from toolmem.errors import ToolmemError

# How what is to be written is recognised; a name without one of them is a Hugging Face folder's.
SUFFIXES = {".ckpt": "checkpoint", ".safetensors": "weights", ".gguf": "gguf", ".peft": "peft"}


def convert(
    source: str,
    target: str,
    ranks: int | None = None,
    like: str | None = None,
    dtype: str | None = None,
    push: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in another form: ours, Hugging Face's, GGUF, or weights alone.

    A pretrained model (a GGUF file, a Hugging Face folder, an id of its hub) becomes a checkpoint to generate
    from, to evaluate or to start from (model.init_from), with its tokenizer and chat template. A checkpoint
    becomes a folder that transformers loads, a GGUF file that llama.cpp loads, or a checkpoint in another
    form: a folder of shards one file, one file a folder of shards, one that an older toolmem wrote the newest
    format. A .safetensors file has weights alone, by the model's own names; the way back makes a checkpoint.

    Args:
        source: a run's folder, a checkpoint, a .gguf file, a Hugging Face folder or id, or a .safetensors
            file of weights.
        target: what to write: NAME.ckpt is a checkpoint, or with --ranks a folder of one; NAME.gguf;
            NAME.safetensors is weights; NAME or NAME/ is a Hugging Face folder. Adapters (model.lora) are
            merged; NAME.peft is a folder of them alone, which the library peft loads.
        ranks: write a folder of so many shards; training on any other number reads it too.
        like: a run of the same model, for weights that do not say what model they are of.
        dtype: of weights written in another program's form or read from one: float32, float16 or bfloat16,
            and q8_0 for GGUF; as they are when left out, in GGUF float32.
        push: upload the Hugging Face folder to this repository (OWNER/NAME), with a model card.
        overwrite: replace what is there.
    """
    from toolmem.console import stdout

    path = Path(target)
    form = _form(target)
    _check(target, form, ranks, dtype, push)
    if path.exists() and not overwrite:
        raise ToolmemError(f"{path} exists already: name another, or add --overwrite true")
    line = _write(source, path, form, ranks, like, dtype)
    stdout().print(line, highlight=False, soft_wrap=True)
    if push is not None:
        from toolmem.checkpoints.exports import push as upload

        stdout().print(f"pushed to {upload(path, push)}", highlight=False, soft_wrap=True)


def _form(target: str) -> str:
    suffix = Path(target).suffix
    if suffix in SUFFIXES and not target.endswith("/"):
        return SUFFIXES[suffix]
    if suffix and not target.endswith("/"):
        raise ToolmemError(
            f"target {target}: what to write is told by its name: NAME.ckpt for a checkpoint, NAME.gguf, "
            "NAME.safetensors for weights alone, NAME/ for a Hugging Face folder"
        )
    return "huggingface"


def _check(target: str, form: str, ranks: int | None, dtype: str | None, push: str | None) -> None:
    from toolmem.checkpoints.exports import DTYPES, GGUF_DTYPES

    if ranks is not None and (ranks < 1 or form != "checkpoint"):
        raise ToolmemError(
            f"ranks is {ranks}: it must be 1 or more, and is for checkpoints (NAME.ckpt) alone"
        )
    if dtype is not None:
        known = GGUF_DTYPES if form == "gguf" else DTYPES
        if dtype not in known or form == "weights":
            raise ToolmemError(
                f"dtype is {dtype!r}: for {target} choose {', '.join(known)}"
                if form != "weights"
                else "dtype is not for NAME.safetensors: its weights are as they are"
            )
    if push is not None and form != "huggingface":
        raise ToolmemError(f"push is for a Hugging Face folder (NAME/), and {target} is none")


def _write(
    source: str, path: Path, form: str, ranks: int | None, like: str | None, dtype: str | None
) -> str:
    """Write it, and say what became of what."""
    from toolmem import checkpoints
    from toolmem.checkpoints import adapters, exports, pretrained
    from toolmem.checkpoints import convert as forms

    if forms.is_weights_file(Path(source)):
        if form != "checkpoint" or ranks is not None:
            raise ToolmemError(
                f"{source} has weights alone: they become a checkpoint of one file, NAME.ckpt, not {path}"
            )
        about = None
        if like is not None:
            run = checkpoints.resolve(like)
            about = checkpoints.about_of(checkpoints.read_state(run), run)
        forms.import_weights(source, path, about)
        return f"{path}: {forms.form_of(path)}, from weights"
    if like is not None:
        raise ToolmemError(f"like is for files of weights, and {source} is none")
    if form == "peft":
        adapters.write_peft(source, path)
        return f"{path}/: adapters for peft, from {source}"
    foreign = pretrained.is_gguf(source) or pretrained.is_huggingface(source)
    if form in ("checkpoint", "weights") and not foreign and dtype is None:
        what = forms.form_of(checkpoints.resolve(source))
        kind: forms.Form = "weights" if form == "weights" else "file"
        if ranks is not None:
            kind = "folder"
        forms.convert(source, path, kind, ranks or 1)
        now = "weights alone" if form == "weights" else forms.form_of(path)
        return f"{path}: {now}, from {what}"
    with pretrained.open_model(source) as model:
        if form == "huggingface":
            return f"{path}/: a folder of {exports.write_huggingface(model, path, dtype)}, from {source}"
        if form == "gguf":
            return f"{path}: GGUF of {exports.write_gguf_file(model, path, dtype)}, from {source}"
        forms.write_model(exports.cast(model, dtype), path, form, ranks)
        now = "weights alone" if form == "weights" else forms.form_of(path)
        return f"{path}: {now}, {model.spec['class_path'].rpartition('.')[2]} {model.name}"


def main(command: str, argv: list[str]) -> int:
    """Entry of ``toolmem convert``."""
    from toolmem.cli.functions import call

    call(
        convert,
        argv,
        prog=f"toolmem {command}",
        positional=["source", "target"],
        example="toolmem convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2.ckpt",
    )
    return 0
