"""The command line: one light table of commands; what a command needs is imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys

from toolmem.class_path import OPTION, only_packages
from toolmem.errors import ToolmemError

# command -> (module with `main(argv)`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("toolmem.cli.demo", "the library's point in one screen: three models, six minutes"),
    "fit": ("toolmem.cli.fit", "train a model by a recipe"),
    "validate": ("toolmem.cli.fit", "validation loss of a checkpoint"),
    "test": ("toolmem.cli.fit", "test loss of a checkpoint"),
    "predict": ("toolmem.cli.fit", "log-probability of every token of the held-out data"),
    "generate": ("toolmem.cli.generate", "ask a trained model, tools in the loop"),
    "serve": ("toolmem.cli.serve", "a trained model behind OpenAI's API, with a chat page"),
    "evaluate": (
        "toolmem.cli.evaluate",
        "recall, tasks and divergence of a model, with intervals; two compared; a run watched",
    ),
    "inspect": ("toolmem.cli.inspect", "parameters, FLOPs and memory of a recipe's model"),
    "plan": (
        "toolmem.cli.plan",
        "memory and communication of a recipe's training, and what fits on which devices",
    ),
    "sweep": (
        "toolmem.cli.sweep",
        "many runs from one recipe: a grid or a search, one file of results, a plot",
    ),
    "plot": (
        "toolmem.cli.plot",
        "a page of what a sweep or a run has to show, or one kind of figure",
    ),
    "convert": (
        "toolmem.cli.convert",
        "a checkpoint in another form: one file, shards, or weights alone",
    ),
    "wandb": ("toolmem.cli.wandb", "a run's metrics and evaluations, sent to Weights & Biases"),
    "facts": ("toolmem.cli.facts", "build a factbase, or show one"),
    "tool": ("toolmem.cli.tool", "try a tool by hand"),
    "tokenizer": ("toolmem.cli.tokenizer", "train a BPE tokenizer"),
}

EXAMPLES = """\
examples:
  toolmem demo
  toolmem fit --config recipes/facts_in_tool.yaml --name first
  toolmem generate --checkpoint runs/first --prompt "When was Ann Smith born?"
  toolmem evaluate --checkpoint runs/first --tasks recall --out results.json
"""


def usage() -> str:
    """The text of ``toolmem --help``."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: toolmem COMMAND [options]\n\n"
        "Should a language model store facts in its weights, or learn to ask a tool for them?\n\n"
        f"commands:\n{rows}\n\n"
        "`toolmem COMMAND --help` explains each. With every command, --allow_packages NAME[,NAME] lets "
        "recipes and\ncheckpoints name classes of your own packages.\n\n" + EXAMPLES
    )


def split_packages(words: list[str]) -> tuple[list[str], list[str]]:
    """Part ``--allow_packages`` from the words that are the command's own.

    It is a word of the command line alone: no config may allow itself to be trusted.

    Raises:
        ToolmemError: when it has no value.
    """
    own: list[str] = []
    packages: list[str] = []
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        if key != OPTION:
            own.append(word)
            continue
        value = value if equals else next(rest, "")
        if not value:
            raise ToolmemError(f"{OPTION} needs the name of a package, or several parted by commas")
        packages += value.split(",")
    return own, packages


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C.

    Args:
        argv: the words after ``toolmem``; those of the process when None.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        import toolmem

        print(f"toolmem {toolmem.__version__}")
        return 0
    command = argv[0]
    try:
        rest, packages = split_packages(argv[1:])
        if command not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ToolmemError(
                f"unknown command {command!r}: {hint}`toolmem --help` lists them all"
            )
        with only_packages(packages):
            return importlib.import_module(COMMANDS[command][0]).main(command, rest) or 0
    except ToolmemError as error:
        if os.environ.get("TOOLMEM_DEBUG"):
            raise
        print(f"toolmem {command}: {error}", file=sys.stderr)
        return 2
    except SystemExit as leaving:  # --help and --print_config end so
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        print(f"\ntoolmem {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has gone (`toolmem … | head`): nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())
