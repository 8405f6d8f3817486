"""Many runs from one recipe: the grid, the processes that train it, one file of results."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Axis": "toolmem.sweeps.axes",
        "LocalExecutor": "toolmem.sweeps.local",
        "Planned": "toolmem.sweeps.grid",
        "Results": "toolmem.sweeps.results",
        "SlurmExecutor": "toolmem.sweeps.slurm",
        "SlurmOptions": "toolmem.sweeps.slurm_options",
        "SweepRecipe": "toolmem.sweeps.recipe",
        "SweepRunner": "toolmem.sweeps.runner",
        "expand": "toolmem.sweeps.grid",
    },
)
