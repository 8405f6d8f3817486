"""An OpenAI-compatible HTTP server over one engine, with a chat page and Prometheus' metrics."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Limits": "toolmem.serving.protocol",
        "Service": "toolmem.serving.app",
        "build_app": "toolmem.serving.app",
        "listen": "toolmem.serving.server",
        "run_server": "toolmem.serving.server",
    },
)
