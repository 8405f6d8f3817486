"""The naive loop: one prompt, no cache. What every faster generator must equal, token for token.

The rules of a dialogue, which stand here in the open:

- The assistant speaks until it writes ``<|end|>`` (finished) or ``<|database|>`` (a tool call). In a
  pretrained model's chat format it ends both by the same token, and its turn's text says which it is
  (``toolmem.data.turn_format``).
- A tool call's text is what the assistant wrote since the last ``<|assistant|>``. The answer is
  encoded and forced into the dialogue, followed by ``<|assistant|>``; both are the database's, and so
  are the marks around an answer of a chat format.
- A call that may not be made (no toolbox, or ``max_tool_calls`` made) finishes with ``tool_calls``.
- ``max_new_tokens`` counts what the model writes; ``model.max_seq_len`` bounds the whole dialogue.
  Both finish with ``length``, as does an answer that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from toolmem.data.turn_format import NO_TOKEN, RoleTokens, turn_format
from toolmem.errors import ToolmemError
from toolmem.generation.sampling import Greedy, History, Sampler, choose, uniform_numbers
from toolmem.generation.turns import ASSISTANT, DATABASE, USER
from toolmem.tools.base import Answer, extract_query

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.data.turn_format import TurnFormat
    from toolmem.models.language_model import LanguageModel
    from toolmem.tools.base import Toolbox

FinishReason = Literal["end", "length", "tool_calls", "stop", "seconds", "cancelled", "error"]


@dataclass
class Generated:
    """A finished dialogue, as token ids with a role each.

    Args:
        tokens: prompt and all that followed.
        roles: role code of each token.
        log_probs: the model's own log-probability of each token that it wrote (nats, before
            temperature and truncation), nan for prompt and forced tokens.
        finish_reason: ``end`` written; ``length`` reached; ``tool_calls``: one too many; of the engine
            also ``stop`` (a stop token or string), ``seconds`` (the time was up), ``cancelled``, and
            ``error`` (something of this dialogue's own failed; it has what was written until then).
        tool_calls: queries with their answers.
        prompt_length: tokens of the prompt.
        error: what failed, in words, where that is why it finished.
    """

    tokens: list[int]
    roles: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    tool_calls: list[tuple[str, Answer]] = field(default_factory=list)
    prompt_length: int = 0
    error: str = ""


def failed(prompt: Sequence[int], error: str) -> Generated:
    """A dialogue that nothing has come of but its prompt.

    Args:
        prompt: its token ids.
        error: why.
    """
    tokens, nan = list(prompt), float("nan")
    return Generated(
        tokens, [USER] * len(tokens), [nan] * len(tokens), "error", [], len(tokens), error
    )


def check_all(generated: Iterable[Generated]) -> None:
    """Raise ``ToolmemError`` if any dialogue finished by an error, for those who need all of them."""
    errors = [dialogue.error for dialogue in generated if dialogue.finish_reason == "error"]
    if errors:
        raise ToolmemError(f"{len(errors)} dialogues failed; the first: {errors[0]}")


def token_roles(tokens: Sequence[int], role_ids: Mapping[str, int]) -> list[int]:
    """Role code of each token; a role token belongs to whoever speaks before it."""
    return RoleTokens(role_ids).codes(tokens)


def called_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """What a dialogue's last token asks a tool, of all that the assistant wrote in its turn; None when it
    asks none, or ends no turn.

    Args:
        tokens: a dialogue whose last token the assistant wrote.
        tokenizer: has a form for dialogues.
    """
    form = turn_format(tokenizer)
    if tokens[-1] != (form.end if form.call == NO_TOKEN else form.call):
        return None
    return form.query(tokenizer.decode(tokens[form.turn_start(tokens) : -1]))


def forced_answer(answer: Sequence[int], form: TurnFormat) -> list[int]:
    """The tokens that follow a call: a tool's answer, between its marks, to where the assistant goes on.

    Args:
        answer: token ids of its text.
        form: of dialogues.
    """
    asked, back = form.marks("assistant", "database"), form.marks("database", "assistant")
    return [*(i for i, _ in asked[1:]), *answer, *(i for i, _ in back)]


def check_prompt(model: LanguageModel, prompt: Sequence[int]) -> None:
    """Raise ``ToolmemError`` for a prompt that is empty, too long, or of another vocabulary."""
    if not prompt:
        raise ToolmemError("a prompt is empty: it needs at least one token")
    if len(prompt) > model.max_seq_len:
        raise ToolmemError(
            f"a prompt of {len(prompt)} tokens is longer than the model's max_seq_len "
            f"{model.max_seq_len}: shorten it"
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= model.vocab_size:
        raise ToolmemError(
            f"token {low if low < 0 else high} of a prompt is outside the model's vocabulary "
            f"(vocab_size {model.vocab_size}): use the tokenizer that the model was trained with"
        )


def foreign_spans(roles: Sequence[int]) -> list[int]:
    """Number each run of tokens of one role that the assistant did not write; -1 where it did."""
    spans, number = [], 0
    for i, role in enumerate(roles):
        number += i > 0 and role != roles[i - 1]
        spans.append(-1 if role == ASSISTANT else number)
    return spans


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout off; back as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def generate_naive(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: list[int],
    *,
    toolbox: Toolbox | None = None,
    max_new_tokens: int = 128,
    max_tool_calls: int = 4,
    sampler: Sampler | None = None,
    seed: int = 0,
) -> Generated:
    """Continue one dialogue by running the whole of it through the model for every token.

    Args:
        model: on any device; its mode is put back.
        tokenizer: has the role tokens.
        prompt: token ids, ending where the assistant begins to speak.
        toolbox: answers tool calls.
        max_new_tokens: tokens that the model may write.
        max_tool_calls: calls that it may make.
        sampler: ``Greedy()`` when None.
        seed: of this dialogue's samples.

    Raises:
        ToolmemError: for a prompt that the model cannot take.
    """
    check_prompt(model, prompt)
    sampler = sampler or Greedy()
    generator = torch.Generator().manual_seed(seed)
    form = turn_format(tokenizer)
    device = next(model.parameters()).device
    tokens, roles = list(prompt), form.codes(prompt)
    log_probs = [float("nan")] * len(prompt)
    calls: list[tuple[str, Answer]] = []
    written = 0
    reason: FinishReason = "length"
    with evaluating(model):
        while written < max_new_tokens and len(tokens) < model.max_seq_len:
            told = {}
            if model.attention_mask == "prefix":
                told["spans"] = torch.tensor([foreign_spans(roles)], device=device)
            logits = model(torch.tensor([tokens], device=device), **told)[:, -1].float()
            uniform = uniform_numbers([generator]) if sampler.random else None
            history = History(tokens, roles, len(prompt))
            token = int(choose(sampler, logits, uniform, [history]))
            tokens.append(token)
            roles.append(ASSISTANT)
            log_probs.append(float(logits.log_softmax(dim=-1)[0, token]))
            written += 1
            text = called_text(tokens, tokenizer)
            if token == form.end and text is None:
                reason = "end"
                break
            if text is not None:
                if toolbox is None or len(calls) >= max_tool_calls:
                    reason = "tool_calls"
                    break
                [answer] = toolbox.call_many([text])
                calls.append((extract_query(text), answer))
                forced = forced_answer(tokenizer.encode(answer.text), form)
                if len(tokens) + len(forced) > model.max_seq_len:
                    break
                tokens += forced
                roles += [DATABASE] * len(forced)
                log_probs += [float("nan")] * len(forced)
    return Generated(tokens, roles, log_probs, reason, calls, len(prompt))
