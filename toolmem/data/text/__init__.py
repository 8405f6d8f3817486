"""From text to tokens: documents in, batches out.

::

    documents.py --> tokens.py         text, packed without padding, every token bears loss
    (one .txt)   --> windows.py        one long text, cut in windows at random offsets
    dialogues.py --> token_table.py --> dialog_tokens.py     dialogues, loss mask by role

Every generator gives `Batch`es that carry where the generator stands after them.
"""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "TokenTable": "toolmem.data.text.token_table",
        "encode_dialogue": "toolmem.data.text.token_table",
        "prompt_tokens": "toolmem.data.text.token_table",
        "DialogTokenGenerator": "toolmem.data.text.dialog_tokens",
        "Documents": "toolmem.data.text.documents",
        "HubDocuments": "toolmem.data.text.hub",
        "open_documents": "toolmem.data.text.documents",
        "TokenGenerator": "toolmem.data.text.tokens",
        "WindowGenerator": "toolmem.data.text.windows",
    },
)
