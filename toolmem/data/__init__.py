"""Facts, text and synthetic tasks; tokenizers; the loaders that turn them into batches.

Everything public is reachable from here (``toolmem.data.FactsDataModule`` in a recipe), and
imported when it is first used.
"""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        # people and their facts
        "ATTRIBUTES": "toolmem.data.people",
        "Population": "toolmem.data.people",
        "make_population": "toolmem.data.people",
        "unseen_population": "toolmem.data.people",
        "load_population": "toolmem.data.tables",
        "information_bits": "toolmem.data.information",
        "Factbase": "toolmem.data.factbase",
        "build_factbase": "toolmem.data.factbase",
        # dialogues
        "Turn": "toolmem.data.dialogues",
        "Dialogue": "toolmem.data.dialogues",
        "QuestionTable": "toolmem.data.dialogues",
        "TemplateSet": "toolmem.data.dialogues",
        # tokens
        "ROLE_TOKENS": "toolmem.data.tokenizers",
        "Tokenizer": "toolmem.data.tokenizers",
        "ByteTokenizer": "toolmem.data.tokenizers",
        "SymbolTokenizer": "toolmem.data.tokenizers",
        "HFTokenizer": "toolmem.data.hf_tokenizer",
        "make_tokenizer": "toolmem.data.tokenizers",
        "tokenizer_from_spec": "toolmem.data.tokenizers",
        "train_tokenizer": "toolmem.data.hf_tokenizer",
        # batches
        "Batch": "toolmem.data.batch",
        "IndexedBatches": "toolmem.data.stream",
        "TokenTable": "toolmem.data.text.token_table",
        "encode_dialogue": "toolmem.data.text.token_table",
        "prompt_tokens": "toolmem.data.text.token_table",
        "DialogTokenGenerator": "toolmem.data.text.dialog_tokens",
        "Documents": "toolmem.data.text.documents",
        "TokenGenerator": "toolmem.data.text.tokens",
        "WindowGenerator": "toolmem.data.text.windows",
        "RecallGenerator": "toolmem.data.recall",
        "MADGenerator": "toolmem.data.mad",
        # what a recipe names
        "FactsDataModule": "toolmem.data.modules.facts",
        "TextDataModule": "toolmem.data.modules.text",
        "RecallDataModule": "toolmem.data.modules.recall",
        "MADDataModule": "toolmem.data.modules.recall",
        "PopulationDataModule": "toolmem.data.modules.population",
    },
)
