"""Tasks from files: multiple choice, cloze, and questions answered in words."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Asked": "toolmem.evaluation.tasks.asking",
        "Choice": "toolmem.evaluation.tasks.items",
        "Cloze": "toolmem.evaluation.tasks.items",
        "Option": "toolmem.evaluation.tasks.items",
        "Prompter": "toolmem.evaluation.tasks.prompts",
        "Question": "toolmem.evaluation.tasks.items",
        "Task": "toolmem.evaluation.tasks.asking",
        "TaskRecipe": "toolmem.evaluation.tasks.recipes",
        "find_recipe": "toolmem.evaluation.tasks.recipes",
        "matches": "toolmem.evaluation.tasks.matching",
        "normalized": "toolmem.evaluation.tasks.matching",
        "read_recipe": "toolmem.evaluation.tasks.recipes",
        "recipe_names": "toolmem.evaluation.tasks.recipes",
    },
)
