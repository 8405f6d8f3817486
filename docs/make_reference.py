"""Writes the command-line reference, docs/cli.md, from signatures and docstrings.

    python docs/make_reference.py

A test holds the page to what this writes: change a command, and run it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

from toolmem.cli import COMMANDS
from toolmem.cli import facts as facts_cli
from toolmem.cli.convert import convert
from toolmem.cli.demo import demo
from toolmem.cli.evaluate import evaluate
from toolmem.cli.evaluate_compare import compare_results
from toolmem.cli.evaluate_watch import watch_run
from toolmem.cli.generate import generate
from toolmem.cli.inspect import inspect as inspect_recipe
from toolmem.cli.inspect_init import inspect_init
from toolmem.cli.plan import plan
from toolmem.cli.plot import norms as plot_norms
from toolmem.cli.plot import page as plot_page
from toolmem.cli.plot_circuits import circuits as plot_circuits
from toolmem.cli.serve import serve
from toolmem.cli.sweep import sweep
from toolmem.cli.tokenizer import train as tokenizer_train
from toolmem.cli.tool import calculator, sql
from toolmem.cli.wandb import sync as wandb_sync
from toolmem.data import FactsDataModule, MADDataModule, RecallDataModule, TextDataModule
from toolmem.files import write_text
from toolmem.models import (
    RNN,
    Hybrid,
    LinearAttention,
    Mamba,
    Mamba2,
    MoETransformer,
    Transformer,
)
from toolmem.training import (
    EMA,
    TRAINER_DEFAULTS,
    WSD,
    AdamW,
    BatchSizeWarmup,
    Checkpointing,
    Constant,
    Cosine,
    Flops,
    InverseSqrt,
    LanguageModelModule,
    Linear,
    MemoryUse,
    Muon,
    NormProbe,
    RecallProbe,
    TaskProbe,
    TokenLossProbe,
)

PAGE = Path(__file__).parent / "cli.md"

HEAD = """\
# Command line

This page is written by `docs/make_reference.py` from the code. `toolmem COMMAND --help` says the same.

An error is one plain line and exit code 2; nothing half-written stays behind. Ctrl-C gives exit code 130.
`toolmem fit` that a signal asked to end gives 75: the same command with `--resume auto` goes on
([Interruptions](reliability.md)).
`TOOLMEM_DEBUG=1` shows the traceback instead.

With every command, `--allow_packages NAME[,NAME]` lets recipes and checkpoints name classes of these
packages. Without it they may name those of toolmem, torch and lightning: importing a module runs it.

| variable | meaning |
|---|---|
| `TOOLMEM_DATA` | where `TextDataModule` reads when `data.path` is not set |
| `TOOLMEM_CACHE` | where tokenizers that a recipe trains are kept; `~/.cache/toolmem` by default |
| `TOOLMEM_API_KEY` | the key that `toolmem serve` wants of its clients |
| `TOOLMEM_DEBUG` | show tracebacks |

"""

FIT = """\
## toolmem fit, validate, test, predict

These four are [LightningCLI](https://lightning.ai/docs/pytorch/stable/cli/lightning_cli.html) with a run
folder. Options come from YAML (`--config FILE`, several are merged) and from the command line, which wins.
`--print_config` prints the complete config and stops. `validate`, `test` and `predict` need
`--ckpt_path RUN_FOLDER` (or a `.ckpt` file); with `fit` it says where training goes on from.

| option | meaning |
|---|---|
| `--config FILE` | a recipe |
| `--name NAME` | the run's name; its folder is `RUNS/NAME`; the recipe's name by default |
| `--runs FOLDER` | the folder of all runs; `runs` by default |
| `--exposures N` | train until each fact was seen N times on the mean, in place of `--trainer.max_steps` |
| `--resume auto` | go on from the run's last checkpoint where there is one; `never`, the default, refuses |
| `--logger csv\\|wandb\\|wandb_offline\\|tensorboard` | where metrics go beside `metrics.csv` |
| `--seed_everything N` | seed of weights and of everything random in training |
| `--ckpt_path PATH` | a checkpoint or a run's folder |
| `--trainer.KEY VALUE` | any argument of Lightning's Trainer, but for `logger` and `default_root_dir` |

`trainer` has other defaults than Lightning's: {defaults}.
`vocab_size` is taken from the data: a recipe does not repeat it.

"""


def kind_of(hint: Any) -> str:
    """A type as the page shows it, the same for every Python."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (Union, UnionType):
        return " | ".join(kind_of(one) for one in inner)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(kind_of(one) for one in inner)}]"
    if hint is Ellipsis:
        return "..."
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every parameter of a function or class."""
    target: Any = function.__init__ if inspect.isclass(function) else function
    hints = get_type_hints(target)
    doc = parse(inspect.getdoc(function) or "")
    texts = {
        entry.arg_name: " ".join((entry.description or "").replace("``", "`").split())
        for entry in doc.params
    }
    rows = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(parameter.default):  # an option for each of its fields
            rows += [(f"{name}.{one}", *rest) for one, *rest in parameters(type(parameter.default))]
            continue
        empty = parameter.default is inspect.Parameter.empty
        default = "required" if empty else value(parameter.default)
        rows.append((name, kind_of(hints.get(name, Any)), default, texts.get(name, "")))
    return rows


def value(default: Any) -> str:
    """A default as YAML would show it."""
    known = {None: "null", True: "true", False: "false"}
    if default is None or isinstance(default, bool):
        return f"`{known[default]}`"
    return f"`{list(default)}`" if isinstance(default, tuple) else f"`{default}`"


def table(
    function: Callable[..., Any], prefix: str = "--", positional: tuple[str, ...] = ()
) -> str:
    """The options of a function or class as a table."""
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, text in parameters(function):
        shown = name.upper() if name in positional else f"{prefix}{name}"
        cells = (f"`{shown}`", f"`{kind}`", default, text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n\n"


def summary(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring."""
    text = (inspect.getdoc(function) or "").split("\n\n")[0]
    return " ".join(text.split()).replace("``", "`") + "\n\n"


def command(title: str, function: Callable[..., Any], positional: tuple[str, ...] = ()) -> str:
    """The section of one command."""
    return f"## {title}\n\n{summary(function)}{table(function, positional=positional)}"


def page() -> str:
    """The whole page."""
    text = HEAD + "| command | what it does |\n|---|---|\n"
    text += "".join(f"| `toolmem {name}` | {line} |\n" for name, (_, line) in COMMANDS.items())
    text += "\n" + command("toolmem demo", demo)
    defaults = ", ".join(
        f"`{key}: {value(item).strip('`')}`" for key, item in TRAINER_DEFAULTS.items()
    )
    text += FIT.format(defaults=defaults)
    for title, prefix, cls in (
        ("model", "--model.", LanguageModelModule),
        ("checkpointing", "--checkpointing.", Checkpointing),
        ("recall", "--recall.", RecallProbe),
        ("norms", "--norms.", NormProbe),
    ):
        text += f"### {title}\n\n{summary(cls)}{table(cls, prefix)}"
    text += "### Classes that a recipe names\n\nEach is `class_path`, with these `init_args`.\n\n"
    for package, classes in (
        ("toolmem.data", (FactsDataModule, TextDataModule, RecallDataModule, MADDataModule)),
        (
            "toolmem.models",
            (Transformer, MoETransformer, Mamba, Mamba2, RNN, LinearAttention, Hybrid),
        ),
        ("toolmem.training", (Muon, AdamW, WSD, Cosine, Linear, InverseSqrt, Constant)),
        ("toolmem.training", (Flops, EMA, BatchSizeWarmup, TokenLossProbe, TaskProbe, MemoryUse)),
    ):
        for cls in classes:
            text += f"#### {package}.{cls.__name__}\n\n{summary(cls)}{table(cls, '')}"
    text += command("toolmem sweep", sweep, ("recipe",))
    text += command("toolmem generate", generate)
    text += command("toolmem serve", serve)
    text += command("toolmem evaluate", evaluate)
    text += command("toolmem evaluate --compare", compare_results, ("first", "second"))
    text += command("toolmem evaluate --watch", watch_run)
    text += command("toolmem inspect", inspect_recipe)
    text += command("toolmem inspect init", inspect_init)
    text += command("toolmem plan", plan)
    text += command("toolmem plot", plot_page, ("folder",))
    text += command("toolmem plot norms", plot_norms, ("run",))
    text += command("toolmem plot circuits", plot_circuits, ("run",))
    text += command("toolmem convert", convert, ("source", "target"))
    text += command("toolmem wandb sync", wandb_sync, ("run",))
    for name, (function, positional, _) in facts_cli.COMMANDS.items():
        text += command(f"toolmem facts {name}", function, tuple(positional))
    text += command("toolmem tool sql", sql, ("file", "query"))
    text += command("toolmem tool calculator", calculator, ("query",))
    text += command("toolmem tokenizer train", tokenizer_train, ("paths",))
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    write_text(PAGE, page())
