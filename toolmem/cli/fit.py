"""``toolmem fit|validate|test|predict``: LightningCLI, with one run folder and errors that speak."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import Precision

from toolmem import checkpoints
from toolmem.class_path import import_class
from toolmem.cli.functions import limit_imports, plain
from toolmem.data.exposures import steps_of_exposures
from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error, write_text
from toolmem.recipe_files import get_key, read_mapping
from toolmem.tools import check_tools
from toolmem.training import (
    TRAINER_DEFAULTS,
    Checkpointing,
    CSVLogger,
    LanguageModelModule,
    NormProbe,
    Progress,
    RecallProbe,
    Throughput,
)
from toolmem.training.callbacks import Preemption, Profiling, SkippedDocuments
from toolmem.training.folders import RunFolder
from toolmem.training.initial_weights import base_for, model_for
from toolmem.training.loggers import tensorboard_logger
from toolmem.training.mixed_precision import precision_plugin
from toolmem.training.precision import check_precision

EXAMPLE = (
    "example: toolmem {0} --config recipes/facts_in_tool.yaml --name first --trainer.max_steps 500"
)


MODULE = "toolmem.training.LanguageModelModule"


def module_class(command: str, arguments: Sequence[str] | dict[str, Any]) -> type:
    """The LightningModule that a command line or a config names as ``module``.

    It decides which keys ``model`` has, so it is looked for before anything is parsed.

    Args:
        command: the subcommand.
        arguments: the words after ``toolmem``, or a config as a dict.

    Raises:
        ToolmemError: when there is no such class, or it trains something else.
    """
    path = _named("module", command, arguments) or MODULE
    return import_class(str(path), "module", LanguageModelModule)


def _named(key: str, command: str, arguments: Sequence[str] | dict[str, Any]) -> Any:
    """What the last config or option that names a key says of it, before anything is parsed."""
    if isinstance(arguments, dict):
        return get_key(arguments.get(command) or {}, key)
    found = None
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else following
        said: Any = None
        if name == f"--{key}":
            said = value
        elif name in ("--config", "-c") and Path(value).is_file():
            # what is wrong with a config is told when it is parsed
            with contextlib.suppress(ToolmemError):
                said = get_key(read_mapping(value), key)
        found = said or found
    return found


def model_left_open(command: str, arguments: Sequence[str] | dict[str, Any]) -> str | None:
    """The run that a recipe leaves its model to: it names ``model.init_from``, and no ``model.model``."""
    init_from = _named("model.init_from", command, arguments)
    chosen = _named("model.model", command, arguments)
    if isinstance(
        chosen, Mapping
    ):  # with options of the run's model that are to be otherwise, perhaps
        chosen = chosen.get("class_path")
    named = chosen or _named("model.model.class_path", command, arguments)
    return None if named or not init_from else str(init_from)


class ToolmemCLI(LightningCLI):
    """LightningCLI with our run folder, loggers, checkpoints and resuming.

    Args:
        command: the one subcommand to build; the other three would only cost time.
        arguments: the words after ``toolmem``, or a config as a dict.
    """

    def __init__(self, command: str, arguments: Sequence[str] | dict[str, Any]) -> None:
        self.command = command
        self.model_from = model_left_open(command, arguments)
        self.interruptible = not isinstance(arguments, dict)  # whoever calls us has ways of his own
        # Lightning restarts ``sys.argv`` in every DDP rank, so the real command line is left alone.
        same = not isinstance(arguments, dict) and list(arguments) == sys.argv[1:]
        help_text = EXAMPLE.format(command)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within.*")
            super().__init__(
                module_class(command, arguments),
                pl.LightningDataModule,
                subclass_mode_data=True,
                save_config_callback=RunFiles,
                save_config_kwargs={"overwrite": True},
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs={
                    "exit_on_error": False,
                    "allow_abbrev": False,  # `--trainer.max_step` is a mistake, and not max_steps
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
        parser.add_argument(
            "--module", type=str, default=MODULE,
            help="What trains the model: LanguageModelModule on the data's text, toolmem.training.GRPO on "
            "what the model says to its questions. The keys of `model` are its options.",
        )  # fmt: skip
        parser.add_argument("--runs", type=str, default="runs", help="The folder of all runs.")
        parser.add_argument(
            "--resume", type=Literal["auto", "never"], default="never",
            help="auto: go on from the run's last checkpoint where there is one, else start.",
        )  # fmt: skip
        parser.add_argument(
            "--logger", type=Literal["csv", "wandb", "wandb_offline", "tensorboard"], default="csv",
            help="Where metrics go beside metrics.csv, which is always written.",
        )  # fmt: skip
        parser.add_argument(
            "--exposures", type=int | None, default=None,
            help="Train until each fact was seen so many times, on the mean, in place of trainer.max_steps.",
        )  # fmt: skip
        parser.add_argument(
            "--profile", type=int, nargs="?", const=5, default=0,
            help="Watch so many steps (5 without a number) and write what they cost to RUNS/NAME/profile.",
        )  # fmt: skip
        parser.add_lightning_class_args(Checkpointing, "checkpointing")
        parser.add_lightning_class_args(RecallProbe, "recall")
        parser.add_lightning_class_args(NormProbe, "norms")
        if self.model_from is not None:
            parser.set_defaults({"model.model": model_for(self.model_from)})
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
        if settings.model.model.get("init_args", {}).get("vocab_size") is not None:
            raise ToolmemError(
                "model.model.init_args.vocab_size is decided by the data (its tokenizer): leave it out"
            )
        if settings.exposures is not None and settings.trainer.get("max_steps") not in (None, -1):
            raise ToolmemError(
                f"exposures is {settings.exposures} and trainer.max_steps is "
                f"{settings.trainer.max_steps}: both say how long to train; leave one out"
            )
        clip = settings.trainer.get("gradient_clip_val")
        if clip is not None and clip < 0:
            raise ToolmemError(
                f"trainer.gradient_clip_val is {clip}: it is the largest gradient norm, 0 or more "
                "(0 or null does not clip)"
            )
        check_precision(settings.trainer.precision, settings.trainer.accelerator)
        self._fill_base(settings.model)
        self._fill_tokenizer(settings)
        # Settled here and kept in config.yaml, so that it reruns as it is. What depends on this very
        # call (the folder's path, the checkpoint) is handed to the trainer and not kept.
        settings.name = settings.name or self._recipe_name()
        self.folder = RunFolder.of(settings.runs, settings.name)
        self.checkpoint: str | None = None
        if self.command == "fit":
            self.checkpoint = self.folder.checkpoint_to_resume(settings.ckpt_path, settings.resume)
            self._there_before = self.folder.contents()
            self.folder.prepare()
        elif settings.get("ckpt_path"):
            self.checkpoint = str(checkpoints.resolve(settings.ckpt_path))
        else:
            raise ToolmemError(
                f"toolmem {self.command} needs a trained model: name it by --ckpt_path RUN_FOLDER"
            )

    def _fill_base(self, section: Any) -> None:
        """Let a model that drafts have its base as the run has it that it starts from; so config.yaml
        is complete.
        """
        chosen = section.model.get("init_args")
        if chosen is not None:
            base = base_for(section.model.class_path, chosen.as_dict(), section.init_from)
            if base is not None:
                chosen["base"] = base

    def _fill_tokenizer(self, settings: Any) -> None:
        """Let data that names no tokenizer have that of the model that training starts from."""
        options, init_from = settings.data.get("init_args"), settings.model.init_from
        if init_from is None or options is None or options.get("tokenizer", "byte") is not None:
            return
        # told when weights are loaded, which a run that goes on has of its own
        with contextlib.suppress(ToolmemError):
            if checkpoints.tokenizer_spec(init_from).get("type") != "byte":
                options["tokenizer"] = str(init_from)

    def _recipe_name(self) -> str:
        configs = self.settings.get("config") or []
        return Path(str(configs[-1])).stem if configs else "run"

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with the run's loggers, and callbacks that every run has."""
        chosen = self.settings.trainer
        callbacks: list[pl.Callback] = [] if chosen.get("barebones") else [Throughput()]
        if chosen.get("enable_progress_bar") is not False and callbacks:
            callbacks.append(Progress())
        if getattr(self.datamodule, "on_bad_document", "fatal") == "skip" and callbacks:
            callbacks.append(SkippedDocuments())
        if self.command == "fit" and self.settings.profile:
            callbacks.append(Profiling(self.settings.profile))
        if self.command == "fit" and self.interruptible:
            callbacks.append(Preemption(ctrl_c=True, max_seconds=self._max_seconds()))
            kwargs["max_time"] = None
        plugin = precision_plugin(chosen.precision, chosen.accelerator)
        given = self._get(self.config_init, "trainer").get("plugins") or []
        given = given if isinstance(given, list) else [given]
        if plugin is not None and not any(isinstance(one, Precision) for one in given):
            kwargs |= {"precision": None, "plugins": [*given, plugin]}
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        loggers = self._loggers()
        if self.command == "fit" and self.settings.exposures is not None:
            kwargs["max_steps"] = steps_of_exposures(self.datamodule, self.settings.exposures)
        try:
            return super().instantiate_trainer(
                logger=loggers or False, default_root_dir=str(self.folder.path), **kwargs
            )
        except ToolmemError:
            raise
        except (ValueError, TypeError, MisconfigurationException) as error:
            about = ", ".join(f"{key} {chosen.get(key)}" for key in ("accelerator", "devices"))
            raise ToolmemError(f"trainer ({about}): {error}") from error

    def _max_seconds(self) -> float | None:
        return Timer(self.settings.trainer.get("max_time")).time_remaining()

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what a constructor refuses is told in its own words."""
        with self._leaving_nothing():
            try:
                super().instantiate_classes()
            except ValueError as error:
                raise _origin(error) from None

    def _run_subcommand(self, subcommand: str) -> None:
        with self._leaving_nothing():
            super()._run_subcommand(subcommand)

    @contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Should the run be refused before it trained, take back what was written of it."""
        try:
            yield
        except (ToolmemError, MisconfigurationException, OSError):
            if self.command == "fit":
                self.folder.take_back(self._there_before)
            raise

    def _loggers(self) -> list[Any]:
        if self.command != "fit":
            return []
        loggers: list[Any] = [CSVLogger(self.folder.path)]
        chosen = self.settings.logger
        if chosen.startswith("wandb") and os.environ.get("WANDB_MODE") != "disabled":
            from toolmem.training.wandb_runs import wandb_logger

            going_on = self.settings.resume == "auto" or self.settings.ckpt_path == "last"
            options = {"going_on": going_on, "offline": chosen == "wandb_offline"}
            loggers.append(wandb_logger(self.folder.path, checkpoint=self.checkpoint, **options))
        elif chosen == "tensorboard":
            loggers.append(tensorboard_logger(self.folder.path, checkpoint=self.checkpoint))
        return loggers

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.checkpoint}

    def before_fit(self) -> None:
        """Refuse what the model cannot be trained on."""
        longest = getattr(self.datamodule, "seq_len", None)
        model = self.model.model
        check = getattr(self.datamodule, "check_model", None)
        if check is not None:
            check(model)
        check_tools(getattr(self.datamodule, "tools", None))
        if longest is not None and longest > model.max_seq_len:
            raise ToolmemError(
                f"the data has rows of {longest} tokens, model.model.init_args.max_seq_len is "
                f"{model.max_seq_len}: raise it, or make the rows shorter (data.init_args.seq_len)"
            )


class RunFiles(SaveConfigCallback):
    """Keeps the complete config and the facts in the run's folder.

    Not sooner than a checkpoint to go on from was accepted: one that is refused must leave the
    files of its run as they were.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``facts.duckdb``, so that the model's tool can be asked in training and after."""
        write_factbase = getattr(trainer.datamodule, "write_factbase", None)  # type: ignore[attr-defined]
        if write_factbase is not None and trainer.is_global_zero:
            write_factbase(Path(trainer.default_root_dir) / "facts.duckdb")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``config.yaml``."""
        self.text = self.parser.dump(self.config, skip_none=False)
        if trainer.is_global_zero:
            write_text(Path(trainer.default_root_dir) / "config.yaml", self.text)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the config in checkpoints too: one that was copied away still says how it was made."""
        checkpoint["config"] = self.text


def _hint(message: str) -> str:
    """What to do about a key that other LightningCLIs have, and ours has elsewhere."""
    for key, place in (("optimizer", "model.optimizer"), ("lr_scheduler", "model.schedule")):
        if f"does not accept option '{key}" in message:
            return f": the one place for it is {place}"
    return ""


def _origin(error: ValueError) -> ValueError:
    """The error that a constructor raised, out of those that jsonargparse has wrapped it in."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ToolmemError):
            return cause
        cause = cause.__cause__
    return error


def be_quiet() -> None:
    """Keep what Lightning says at every start to itself; its warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*IterableDataset.*has `__len__` defined.*",
        ".*You have overridden `on_after_batch_transfer` in `LightningModule`.*",
        ".*Please add the following callbacks: \\['Preemption'\\].*",  # it has a part in training alone
    ):
        warnings.filterwarnings("ignore", message)


def run(command: str, arguments: Sequence[str] | dict[str, Any]) -> ToolmemCLI:
    """Run one of Lightning's commands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: the whole command line after ``toolmem``, or the command's config as a dict.

    Raises:
        ToolmemError: for everything that the user can mend.
    """
    be_quiet()
    limit_imports()
    if isinstance(arguments, dict):
        arguments = {"subcommand": command, command: arguments}
    try:
        return ToolmemCLI(command, arguments)
    except ArgumentError as error:
        words = [] if isinstance(arguments, dict) else arguments
        raise ToolmemError(
            f"{plain(error, words)}{_hint(str(error))}\n`toolmem {command} --help` shows every key"
        ) from error
    except MisconfigurationException as error:
        raise ToolmemError(str(error)) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise explain_os_error(error, error.filename or "the run's folder") from error


def main(command: str, argv: list[str]) -> int:
    """Entry of the four commands."""
    from toolmem.cli.endings import carry_out

    return carry_out(command, lambda: run(command, [command, *argv]))
