"""``toolmem serve``: a trained model behind OpenAI's chat completions, with a chat page."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from toolmem.cli.functions import call
from toolmem.console import stderr, stdout
from toolmem.errors import ToolmemError
from toolmem.models.kernel_choice import KernelChoice

if TYPE_CHECKING:
    from toolmem.run import Run

API_KEY = "TOOLMEM_API_KEY"


def serve(
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    factbase: str | None = None,
    allow_other_factbase: bool = False,
    temperature: float = 0.0,
    max_tokens: int = 256,
    max_tool_calls: int = 4,
    max_seconds: float = 120.0,
    max_lanes: int = 64,
    max_queued: int = 1024,
    max_body_bytes: int = 1048576,
    memory_mib: int = 2048,
    grace_s: int = 10,
    access_log: bool = False,
    attention: KernelChoice = "auto",
    device: str = "cpu",
) -> None:
    """Serve a trained model over HTTP, as OpenAI's clients expect it; its tools answer its queries.

    Args:
        checkpoint: a run's folder, or a .ckpt file.
        host: the address to listen at; 0.0.0.0 for every one of this machine.
        port: the port; 0 takes one that is free.
        api_key: what clients must send as their key (default: the variable TOOLMEM_API_KEY).
        name: the model's name in requests (default: the run's).
        factbase: the DuckDB file that queries go to (default: facts.duckdb in the run's folder).
        allow_other_factbase: accept a factbase whose facts are not those of training.
        temperature: of requests that name none; 0 takes the likeliest token.
        max_tokens: the most that a request may ask for, and what one gets that does not say.
        max_tool_calls: calls that the tools answer in one dialogue.
        max_seconds: that a dialogue may take, waiting included.
        max_lanes: dialogues in a step of the model.
        max_queued: dialogues that may wait; beyond them the answer is 429.
        max_body_bytes: of a request.
        memory_mib: MiB of decoding state, at most.
        grace_s: seconds that answers under way get when the server is stopped.
        access_log: a line on stderr for each request.
        attention: what runs attention: sdpa (torch's own, and C of ours), flex (FlexAttention), flash
            (the package flash-attn, on CUDA), plain (the reference), or the one for the device (auto).
        device: where the model runs.
    """
    for option, value, least in (
        ("--max_tokens", max_tokens, 1),
        ("--max_tool_calls", max_tool_calls, 0),
        ("--max_seconds", max_seconds, 0.001),
        ("--max_lanes", max_lanes, 1),
        ("--max_queued", max_queued, 1),
        ("--max_body_bytes", max_body_bytes, 1024),
        ("--memory_mib", memory_mib, 1),
        ("--grace_s", grace_s, 0),
        ("--temperature", temperature, 0),
    ):
        if not value >= least:
            raise ToolmemError(f"{option} {value}: it must be at least {least}")
    api_key = api_key if api_key is not None else os.environ.get(API_KEY) or None
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip()
    ):
        raise ToolmemError(f"--api_key (or {API_KEY}) must be printable ASCII, and not empty")
    check_installed()
    from toolmem.generation import Engine
    from toolmem.run import load
    from toolmem.serving import Limits, Service, build_app, listen, run_server
    from toolmem.serving.app import LOOPBACK

    run = load(
        checkpoint,
        factbase=factbase,
        allow_other_factbase=allow_other_factbase,
        attention=attention,
        device=device,
    )
    run.prompt("")  # says so where the model takes no question
    sock = listen(host, port)
    with sock:
        bound = sock.getsockname()[1]
        engine = Engine(
            run.model,
            run.tokenizer,
            run.toolbox,
            max_lanes=max_lanes,
            max_queued=max_queued,
            memory_limit=memory_mib * 2**20,
        )
        local = host in ("127.0.0.1", "localhost", "::1")
        service = Service(
            engine,
            run.tokenizer,
            run.toolbox,
            name or model_name(run),
            Limits(max_tokens=max_tokens, max_body_bytes=max_body_bytes, temperature=temperature),
            api_key=api_key,
            max_tool_calls=max_tool_calls,
            max_seconds=max_seconds,
            hosts=LOOPBACK if local and api_key is None else (),
        )
        if not local and api_key is None:
            stderr().print(
                f"anyone who can reach {host}:{bound} can use the model: --api_key sets a key",
                style="yellow",
            )
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound}"
        text = f"{service.name} at {address}/ (chat page) and {address}/v1 (API); Ctrl-C stops"
        stdout().print(text, markup=False, highlight=False, soft_wrap=True)
        try:
            run_server(build_app(service), sock, grace_s=grace_s, access_log=access_log)
        finally:
            engine.close()
            if run.toolbox is not None:
                run.toolbox.close()
    stdout().print("stopped", highlight=False)


def model_name(run: Run) -> str:
    """The name of a run's folder, or of a checkpoint file that stands alone."""
    path = run.checkpoint.path.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem


def check_installed() -> None:
    """Raise ``ToolmemError`` where the extra ``serve`` is not installed."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ToolmemError(
            f"the server needs {error.name}: install it with `pip install 'toolmem[serve]'`"
        ) from None


def main(command: str, argv: list[str]) -> int:
    """Entry."""
    call(
        serve,
        argv,
        prog=f"toolmem {command}",
        example="toolmem serve --checkpoint runs/first --port 8000",
    )
    return 0
