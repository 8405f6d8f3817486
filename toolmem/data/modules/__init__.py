"""LightningDataModules, one file each: what a recipe's ``data:`` names."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "StatefulDataModule": "toolmem.data.modules.base",
        "FactsDataModule": "toolmem.data.modules.facts",
        "TextDataModule": "toolmem.data.modules.text",
        "RecallDataModule": "toolmem.data.modules.recall",
        "PopulationDataModule": "toolmem.data.modules.population",
    },
)
