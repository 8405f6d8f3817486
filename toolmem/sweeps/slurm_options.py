"""What a sweep asks Slurm for, in submitit's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.sweeps.checks import check_keys, is_number, is_whole

DEFAULTS: dict[str, Any] = {
    "timeout_min": 60,
    "cpus_per_task": 1,
    "gpus_per_node": 0,
    "array_parallelism": 256,
    "max_jobs": 1000,
    "max_num_timeout": 3,
    "signal_delay_s": 90,
    "poll_s": 30,
    "ahead": False,
    "setup": (),
    "additional_parameters": {},
}
AT_LEAST = {
    "timeout_min": 1, "cpus_per_task": 1, "gpus_per_node": 0, "array_parallelism": 1, "max_jobs": 1,
    "max_num_timeout": 0, "signal_delay_s": 1,
}  # fmt: skip


@dataclass(frozen=True)
class SlurmOptions:
    """What each job of a sweep asks for; a job trains one run.

    Args:
        partition: where jobs wait; Slurm's default when left out.
        account: that is charged.
        qos: quality of service.
        constraint: features that a node must have.
        timeout_min: minutes of a job, 60; a run that needs longer goes on from its checkpoint in the next.
        cpus_per_task: cores of a job, and threads, 1.
        mem_gb: memory of a job in GB; Slurm's default when left out.
        gpus_per_node: GPUs of a job, 0.
        array_parallelism: jobs of one array that run at a time at most, 256.
        max_jobs: jobs in the queue at a time, running ones among them, at most, 1000.
        max_num_timeout: how often a run may be out of time before it counts as failed, 3.
        signal_delay_s: seconds before its end at which a job writes its checkpoint, 90.
        setup: commands of the shell before each job: [module load cuda].
        additional_parameters: of sbatch, as they come: {reservation: mine}.
        ahead: train also what a search may turn out not to need, false.
        poll_s: seconds between two questions to Slurm, 30.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    gpus_per_node: int | None = None
    array_parallelism: int | None = None
    max_jobs: int | None = None
    max_num_timeout: int | None = None
    signal_delay_s: int | None = None
    setup: list[str] | None = None
    additional_parameters: dict[str, Any] | None = None
    ahead: bool | None = None
    poll_s: float | None = None

    @classmethod
    def parse(cls, written: Any) -> SlurmOptions:
        """Check the section ``slurm`` of a recipe.

        Args:
            written: the YAML's content.

        Raises:
            ToolmemError: naming the key.
        """
        if written is None:
            return cls()
        names = tuple(one.name for one in fields(cls))
        check_keys("slurm", written, names)
        for name, value in written.items():
            if value is not None and not _fits(name, value):
                raise ToolmemError(f"slurm.{name} is {value!r}: it must be {_kind(name)}")
        return cls(**written)

    def over(self, others: SlurmOptions) -> SlurmOptions:
        """These, and where nothing is said, those of others, and where they say nothing, defaults.

        Args:
            others: that give way.

        Raises:
            ToolmemError: for a number that is too small.
        """
        values: dict[str, Any] = {}
        for name in (one.name for one in fields(self)):
            mine, other = getattr(self, name), getattr(others, name)
            values[name] = next((v for v in (mine, other) if v is not None), DEFAULTS.get(name))
        for name, least in AT_LEAST.items():
            if values[name] < least:
                raise ToolmemError(f"slurm.{name} is {values[name]}: it must be at least {least}")
        for name in ("mem_gb", "poll_s"):
            if values[name] is not None and values[name] <= 0:
                raise ToolmemError(f"slurm.{name} is {values[name]}: it must be more than 0")
        return SlurmOptions(**values)

    def parameters(self, name: str) -> dict[str, Any]:
        """What ``submitit.AutoExecutor.update_parameters`` takes; of options that ``over`` has settled.

        Args:
            name: of the jobs.
        """
        threads = f"OMP_NUM_THREADS={self.cpus_per_task} MKL_NUM_THREADS={self.cpus_per_task}"
        return {
            "name": name,
            "timeout_min": self.timeout_min,
            "cpus_per_task": self.cpus_per_task,
            "mem_gb": self.mem_gb,
            "gpus_per_node": self.gpus_per_node or None,
            "nodes": 1,
            "tasks_per_node": 1,
            "stderr_to_stdout": True,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_array_parallelism": self.array_parallelism,
            "slurm_signal_delay_s": self.signal_delay_s,
            "slurm_setup": [f"export {threads} NO_COLOR=1", *(self.setup or ())],
            # since Slurm 22.05 srun takes it from sbatch no more
            "slurm_srun_args": [f"--cpus-per-task={self.cpus_per_task}"],
            "slurm_additional_parameters": {"requeue": True, **(self.additional_parameters or {})},
        }

    def given(self) -> list[str]:
        """Names of options that are said."""
        return [one.name for one in fields(self) if getattr(self, one.name) is not None]


def _kind(name: str) -> str:
    if name in AT_LEAST:
        return f"a whole number, at least {AT_LEAST[name]}"
    kinds = {
        "mem_gb": "a number",
        "poll_s": "a number",
        "setup": "a list of commands",
        "additional_parameters": "a mapping",
        "ahead": "true or false",
    }
    return kinds.get(name, "a word")


def _fits(name: str, value: Any) -> bool:
    if name in AT_LEAST:
        return is_whole(value, AT_LEAST[name])
    if name in ("mem_gb", "poll_s"):
        return is_number(value)
    if name == "setup":
        return isinstance(value, list) and all(isinstance(line, str) for line in value)
    if name == "additional_parameters":
        return isinstance(value, Mapping)
    return isinstance(value, bool if name == "ahead" else str)
