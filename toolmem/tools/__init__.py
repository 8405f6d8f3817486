"""Tools that answer a model's queries: a database and a calculator behind one small protocol."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Answer": "toolmem.tools.base",
        "Tool": "toolmem.tools.base",
        "Toolbox": "toolmem.tools.base",
        "extract_query": "toolmem.tools.base",
        "in_thread": "toolmem.tools.threads",
        "Calculator": "toolmem.tools.calculator",
        "ToolCalls": "toolmem.tools.dispatch",
        "ToolCallStats": "toolmem.tools.dispatch",
        "SqlTool": "toolmem.tools.sql",
        "check_tools": "toolmem.tools.recipe",
        "open_toolbox": "toolmem.tools.recipe",
    },
)
