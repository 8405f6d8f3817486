"""Models that say one dialogue, engines that run them, and a server on a real socket."""

from __future__ import annotations

import contextlib
import threading
import time

import torch
import uvicorn

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.models import Transformer
from toolmem.serving import Limits, Service, build_app, listen
from toolmem.tools import Calculator, Toolbox

TOKENIZER = ByteTokenizer()
ROLES = TOKENIZER.role_ids

QUESTION = "How old?"
QUERY = "CALCULATE 1987 - 1950"
TOOL_SAYS = "37"
ANSWER = "Zoë is 37."


def spell(*turns: str) -> list[int]:
    """Tokens of a dialogue: role names in angle brackets, everything else is text."""
    tokens: list[int] = []
    for turn in turns:
        if turn in ("<user>", "<assistant>", "<database>", "<end>"):
            tokens.append(ROLES[turn.strip("<>")])
        else:
            tokens += TOKENIZER.encode(turn)
    return tokens


IN_TOOL = spell(
    "<user>",
    QUESTION,
    "<assistant>",
    QUERY,
    "<database>",
    TOOL_SAYS,
    "<assistant>",
    ANSWER,
    "<end>",
)
IN_WEIGHT = spell("<user>", QUESTION, "<assistant>", ANSWER, "<end>")


def reciter(dialogue: list[int], max_seq_len: int = 256, sharpness: float = 2.0) -> Transformer:
    """A Transformer that says this dialogue: only the position tells it the next token.

    Args:
        dialogue: tokens.
        max_seq_len: of the model, which is as wide.
        sharpness: how sure it is; the logit of the right token is 16 times that.
    """
    model = Transformer(260, max_seq_len, 1, 1, max_seq_len=max_seq_len, position="learned")
    with torch.no_grad():
        for parameter in [*model.blocks.parameters(), *model.embedding.parameters()]:
            parameter.zero_()
        model.position_embedding.weight.copy_(torch.eye(max_seq_len))
        model.head.weight.zero_()
        for place, token in enumerate(dialogue[1:]):
            model.head.weight[token, place] = sharpness
    return model.eval()


def babbler(calls: bool = False, max_seq_len: int = 512) -> Transformer:
    """An untrained model that does not end by itself; greedily it calls no tool unless it may."""
    torch.manual_seed(0)
    model = Transformer(260, 16, 2, 2, max_seq_len=max_seq_len)
    with torch.no_grad():
        model.head.weight[ROLES["end"]] = 0
        model.head.weight[ROLES["database"]] *= 2 * calls
    return model.eval()


def calculator() -> Toolbox:
    return Toolbox([Calculator()])


@contextlib.contextmanager
def serving(engine, *, toolbox=None, name="toy", limits=None, **options):
    """A server of an engine, in a thread: yields its address and its service."""
    service = Service(engine, TOKENIZER, toolbox, name, limits or Limits(), **options)
    sock = listen("127.0.0.1", 0)
    config = uvicorn.Config(build_app(service), log_level="error", lifespan="on", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition, seconds: float = 60.0) -> None:
    """Fail when a condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
