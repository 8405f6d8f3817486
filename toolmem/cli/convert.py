"""``toolmem convert``: checkpoints and weights from one form to another."""

from __future__ import annotations

from pathlib import Path

from toolmem.errors import ToolmemError

# How a file that is to be written is recognised. Other programs' formats have their place here.
SUFFIXES = {".ckpt": "file", ".safetensors": "weights"}


def convert(
    source: str,
    target: str,
    ranks: int | None = None,
    like: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another form: one file, a folder of shards, or its weights alone.

    A checkpoint of shards becomes one file, one file a folder of shards, and one that an older toolmem wrote
    the newest format. Whatever the form, every command and any number of devices reads it. A .safetensors
    file has weights alone, by the model's own names; the way back makes a checkpoint to generate from, to
    evaluate or to start from (model.init_from).

    Args:
        source: a run's folder, a checkpoint, or a .safetensors file of weights.
        target: what to write: NAME.ckpt is one file, or with --ranks a folder; NAME.safetensors is weights.
        ranks: write a folder of so many shards; training on any other number reads it too.
        like: a run of the same model, for weights that do not say what model they are of.
        overwrite: replace what is there.
    """
    from toolmem import checkpoints
    from toolmem.checkpoints import convert as forms
    from toolmem.console import stdout

    path = Path(target)
    if path.suffix not in SUFFIXES:
        raise ToolmemError(
            f"target {target}: what to write is told by its name: NAME.ckpt for a checkpoint, "
            "NAME.safetensors for weights alone"
        )
    form = SUFFIXES[path.suffix]
    if ranks is not None and (ranks < 1 or form == "weights"):
        raise ToolmemError(
            f"ranks is {ranks}: it must be 1 or more, and is for checkpoints (NAME.ckpt) alone"
        )
    if path.exists() and not overwrite:
        raise ToolmemError(f"{path} exists already: name another, or add --overwrite true")
    if forms.is_weights_file(Path(source)):
        if form != "file" or ranks is not None:
            raise ToolmemError(
                f"{source} has weights alone: they become a checkpoint of one file, NAME.ckpt, not {target}"
            )
        about = None
        if like is not None:
            run = checkpoints.resolve(like)
            about = checkpoints.about_of(checkpoints.read_state(run), run)
        forms.import_weights(source, path, about)
        what = "weights"
    else:
        if like is not None:
            raise ToolmemError(f"like is for files of weights, and {source} is a checkpoint")
        what = forms.form_of(checkpoints.resolve(source))
        forms.convert(source, path, "folder" if ranks is not None else form, ranks or 1)  # type: ignore[arg-type]
    now = "weights alone" if form == "weights" else forms.form_of(path)
    stdout().print(f"{path}: {now}, from {what}", highlight=False, soft_wrap=True)


def main(command: str, argv: list[str]) -> int:
    """Entry of ``toolmem convert``."""
    from toolmem.cli.functions import call

    call(
        convert,
        argv,
        prog=f"toolmem {command}",
        positional=["source", "target"],
        example="toolmem convert runs/first weights.safetensors",
    )
    return 0
