"""``toolmem fit|validate|test|predict``: LightningCLI, with one run folder and errors that speak."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from toolmem import checkpoints
from toolmem.cli.functions import plain
from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error, write_text
from toolmem.training import TRAINER_DEFAULTS, Checkpointing, LanguageModelModule, RecallProbe
from toolmem.training.folders import RunFolder, make_loggers
from toolmem.training.precision import check_precision

EXAMPLE = (
    "example: toolmem {0} --config recipes/facts_in_tool.yaml --name first --trainer.max_steps 500"
)


class ToolmemCLI(LightningCLI):
    """LightningCLI with our run folder, loggers, checkpoints and resuming.

    Args:
        command: the one subcommand to build; the other three would only cost time.
        arguments: the words after ``toolmem``, or a config as a dict.
    """

    def __init__(self, command: str, arguments: Sequence[str] | dict[str, Any]) -> None:
        self.command = command
        # Lightning restarts ``sys.argv`` in every DDP rank, so the real command line is left alone.
        same = not isinstance(arguments, dict) and list(arguments) == sys.argv[1:]
        help_text = EXAMPLE.format(command)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within.*")
            super().__init__(
                LanguageModelModule,
                pl.LightningDataModule,
                subclass_mode_data=True,
                save_config_callback=RunConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs={
                    "exit_on_error": False,
                    "prog": "toolmem",
                    command: {"exit_on_error": False, "epilog": help_text},
                },
                args=None if same else arguments,  # type: ignore[arg-type]
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command that was asked for."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own keys beside Lightning's ``model``, ``data`` and ``trainer``."""
        parser.add_argument(
            "--name", type=str | None, default=None,
            help="The run's name: everything is written to RUNS/NAME (default: the recipe's name).",
        )  # fmt: skip
        parser.add_argument("--runs", type=str, default="runs", help="The folder of all runs.")
        parser.add_argument(
            "--resume", type=Literal["auto", "never"], default="never",
            help="auto: go on from the run's last checkpoint where there is one, else start.",
        )  # fmt: skip
        parser.add_argument(
            "--logger", type=Literal["csv", "wandb", "tensorboard"], default="csv",
            help="Where metrics go beside metrics.csv, which is always written.",
        )  # fmt: skip
        parser.add_lightning_class_args(Checkpointing, "checkpointing")
        parser.add_lightning_class_args(RecallProbe, "recall")
        parser.link_arguments(
            "data.vocab_size", "model.model.init_args.vocab_size", apply_on="instantiate"
        )

    @property
    def settings(self) -> Any:
        """The parsed config of the chosen subcommand."""
        return self.config[self.command]

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work, and settle the run's folder, before anything is built."""
        settings = self.settings
        for key, owner in (("logger", "logger"), ("default_root_dir", "runs and name")):
            if settings.trainer.get(key) not in (None, False):
                raise ToolmemError(f"trainer.{key} is set by toolmem itself: use {owner} instead")
        check_precision(settings.trainer.precision, settings.trainer.accelerator)
        self.folder = RunFolder(Path(settings.runs) / (settings.name or self._recipe_name()))
        if self.command == "fit":
            settings.ckpt_path = self.folder.checkpoint_to_resume(
                settings.ckpt_path, settings.resume
            )
            self.folder.prepare()
        elif settings.get("ckpt_path"):
            settings.ckpt_path = str(checkpoints.resolve(settings.ckpt_path))
        settings.trainer.default_root_dir = str(self.folder.path)

    def _recipe_name(self) -> str:
        configs = self.settings.get("config") or []
        return Path(str(configs[-1])).stem if configs else "run"

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with the run's loggers."""
        loggers = make_loggers(self.folder, self.settings.logger) if self.command == "fit" else []
        return super().instantiate_trainer(logger=loggers or False, **kwargs)


class RunConfig(SaveConfigCallback):
    """Keeps the complete config in the run's folder, in one step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``config.yaml`` when training starts."""
        if stage == "fit" and trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            write_text(Path(trainer.default_root_dir) / "config.yaml", text)


def run(command: str, arguments: Sequence[str] | dict[str, Any]) -> ToolmemCLI:
    """Run one of Lightning's commands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: the whole command line after ``toolmem``, or the command's config as a dict.

    Raises:
        ToolmemError: for everything that the user can mend.
    """
    if isinstance(arguments, dict):
        arguments = {"subcommand": command, command: arguments}
    try:
        return ToolmemCLI(command, arguments)
    except ArgumentError as error:
        raise ToolmemError(f"{plain(error)}\n`toolmem {command} --help` shows every key") from error
    except MisconfigurationException as error:
        raise ToolmemError(str(error)) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise explain_os_error(error, error.filename or "the run's folder") from error


def main(command: str, argv: list[str]) -> int:
    """Entry of the four commands."""
    run(command, [command, *argv])
    return 0
