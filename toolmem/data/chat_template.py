"""A model's chat template (Jinja) as a `ChatFormat`: which tokens stand between turns.

The template is rendered with words of no meaning for what is said, and cut where they stand. Then some
dialogues are rendered and tokenised as a whole, and must be the tokens that the pieces give; so what a
template does otherwise by turn (a part that only the last turn has, say) is refused, by name.

Rendering happens here alone, when a model is converted or another system's message is chosen. A checkpoint
holds the tokens that came of it, so that no file's template runs when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from toolmem.data.chat_format import CallForm, ChatFormat
from toolmem.data.turn_format import ORDER
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from jinja2 import Template

LONGEST = 64 * 1024  # characters of a template
TOOL = "database"  # what a call names
WORDS = [f"Qz{i}zq" for i in range(6)]
QUOTED = 'Qz"zq'
SAMPLES = (
    ("When was Ann O'Neil born?", "FIND birth_date FOR Ann O'Neil", "7 May 1960", "On 7 May 1960."),
    ('say "{x}"', "12 + 30", "42", "It's 42"),
    ("Où?", "FIND a FOR Ée", "error: no such person", "(none)"),
)

Message = dict[str, Any]


def user(text: str) -> Message:
    """A message of the user's."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """A message of the assistant's."""
    return {"role": "assistant", "content": text}


class ChatTemplate:
    """A chat template that can be rendered, in Jinja's sandbox.

    Args:
        source: the template.
        special_tokens: ``bos_token``, ``eos_token`` and the like, as text.
        system: what the system says first; None for what the template says by itself.

    Raises:
        ToolmemError: when it is no template.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], system: str | None = None
    ) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if len(source) > LONGEST:
            refuse(f"it has {len(source):,} characters, and at most {LONGEST:,} are read")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template: Template = environment.from_string(source)
        except TemplateError as error:
            refuse(f"Jinja cannot read it ({error})")
        self._special_tokens = dict(special_tokens)
        self._system = system

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Messages as text.

        Args:
            messages: as transformers' ``apply_chat_template`` takes them.
            prompt: go on to where the assistant begins to speak.

        Raises:
            ToolmemError: where the template refuses them.
        """
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=prompt,
                tools=None,
                enable_thinking=False,
                **self._special_tokens,
            )
        except Exception as error:  # whatever a template stumbles by
            refuse(f"it does not take these messages ({error})")

    def between(self, messages: Sequence[Message], words: Sequence[str]) -> list[str]:
        """What stands before, between and behind words of messages.

        Raises:
            ToolmemError: where one does not stand there once, in this order.
        """
        text, parts = self.render(messages), []
        for word in words:
            before, found, text = text.partition(word)
            if not found or word in text:
                refuse("it does not say every message once, as it is")
            parts.append(before)
        return [*parts, text]


def chat_format(
    template: ChatTemplate,
    encode: Callable[[str], list[int]],
    encode_marks: Callable[[str], list[int]],
    special_ids: set[int],
    decode: Callable[[Sequence[int]], str],
) -> ChatFormat:
    """The format that a template gives dialogues.

    Args:
        template: the model's.
        encode: tokens of what is said, in which no special token can be.
        encode_marks: tokens of a text in which special tokens are what they are.
        special_ids: ids that ``encode`` never returns.
        decode: tokens back to text.

    Raises:
        ToolmemError: naming what of the template has no form here.
    """
    a, b, c, d = WORDS[:4]
    first, to_assistant, to_user, again, last = template.between(
        [user(a), assistant(b), user(c), assistant(d)], (a, b, c, d)
    )
    if again != to_assistant:
        refuse(f"assistant's turns do not all open alike ({to_assistant!r}, then {again!r})")
    if not last or not to_user.startswith(last.rstrip()) or not last.strip():
        refuse(f"what ends a dialogue ({last!r}) is not what ends a turn within it ({to_user!r})")
    prompt = template.render([user(a)], prompt=True).partition(a)[2]
    if prompt != to_assistant:
        refuse(
            f"what it lets the assistant begin by ({prompt!r}) is not what its turns open by "
            f"({to_assistant!r})"
        )
    texts = {">user": first, "user>assistant": to_assistant, "assistant>user": to_user}
    why: list[str] = []
    for ask in (_as_tool_calls, _as_tool, _as_user):
        try:
            call_form, texts["assistant>database"], texts["database>assistant"] = ask(
                template, to_assistant, to_user
            )
            between = {key: tuple(encode_marks(texts[key])) for key in map(">".join, ORDER)}
            guards = {
                key: _guard(key, texts[key], between[key], special_ids) for key in list(texts)[1:]
            }
            found = ChatFormat(between, guards, call_form, decode)
            _check(found, template, ask, encode, encode_marks)
        except ToolmemError as error:
            why.append(str(error))
        else:
            return found
    raise ToolmemError(why[-1])


Asked = tuple[CallForm, str, str]


def _call(query: str) -> Message:
    function = {"name": TOOL, "arguments": {"query": query}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
    }


def _tool(text: str) -> Message:
    return {"role": "tool", "name": TOOL, "tool_call_id": "call00000", "content": text}


def _as_tool_calls(template: ChatTemplate, to_assistant: str, to_user: str) -> Asked:
    """The template has a way of its own to say a call."""
    a, b, c, d = WORDS[:4]
    messages = [user(a), _call(b), _tool(c), assistant(d)]
    _, opened, asked, answered, _ = template.between(messages, (a, b, c, d))
    if not opened.startswith(to_assistant):
        refuse(f"a call does not open as a turn does ({opened!r})")
    prefix = opened.removeprefix(to_assistant)
    suffix, to_database = _cut_at_end(asked, to_user)
    if not prefix.strip() or not to_database:
        refuse("a call has no mark of its own")
    quoted = template.render([user(a), _call(QUOTED), _tool(c), assistant(d)])
    escaped = json.dumps(QUOTED)[1:-1] in quoted
    opening, closing = prefix.strip(), suffix.strip()
    if escaped:  # marks stand around the object
        opening, closing = prefix.partition("{")[0].strip(), suffix.rpartition("}")[2].strip()
        if not opening:
            refuse("a call has no mark of its own")
    return CallForm(prefix, suffix, opening, closing, escaped), to_database, answered


def _as_tool(template: ChatTemplate, to_assistant: str, to_user: str) -> Asked:
    """Calls as text, and a turn of the tool's."""
    a, b, c, d = WORDS[:4]
    messages = [user(a), assistant(b), _tool(c), assistant(d)]
    _, _, asked, answered, _ = template.between(messages, (a, b, c, d))
    return CallForm(), asked, answered


def _as_user(template: ChatTemplate, to_assistant: str, to_user: str) -> Asked:
    """Calls as text, and what a tool answers as a user's turn, marked as Hermes and Qwen do."""
    return CallForm(), f"{to_user}<tool_response>\n", f"\n</tool_response>{to_assistant}"


def _cut_at_end(asked: str, to_user: str) -> tuple[str, str]:
    """What stands behind a query, cut where the turn ends: as any turn does before the user's."""
    for n in range(len(to_user), 0, -1):
        suffix, found, rest = asked.partition(to_user[:n])
        if found and to_user[:n].strip():
            return suffix, found + rest
    return asked, ""


def _check(
    found: ChatFormat,
    template: ChatTemplate,
    ask: Callable[..., Asked],
    encode: Callable[[str], list[int]],
    encode_marks: Callable[[str], list[int]],
) -> None:
    """Refuse a format whose dialogues are not what the template renders."""
    if found.between["assistant>database"][0] != found.end:
        refuse("a call does not end by the token that ends a turn")
    for question, query, answer, conclusion in SAMPLES:
        asked = assistant(found.written(query, True))
        told = [user(question), asked, _tool(answer), assistant(conclusion)]
        if ask is _as_tool_calls:
            told[1] = _call(query)
        elif ask is _as_user:
            told[2] = user(f"<tool_response>\n{answer}\n</tool_response>")
        plain = [user(question), assistant(conclusion), user(answer), assistant(query)]
        for messages, roles, said in (
            (told, ("user", "assistant", "database", "assistant"),
             (question, asked["content"], answer, conclusion)),
            (plain, ("user", "assistant", "user", "assistant"),
             (question, conclusion, answer, query)),
        ):  # fmt: skip
            ids: list[int] = []
            for before, role, text in zip(("", *roles), roles, said, strict=False):
                ids += [token for token, _ in found.marks(before, role)] + encode(text)
            ids.append(found.end)
            whole = encode_marks(template.render(messages))
            if whole[: len(ids)] != ids:
                refuse(
                    "the tokenizer joins the marks between turns with what is said, so that a dialogue "
                    f"({template.render(messages)!r}) cannot be put together turn by turn"
                )
            if [(span.role) for span in found.spans(ids)] != list(roles):
                refuse("its turns cannot be told from their tokens")


def _guard(key: str, text: str, ids: Sequence[int], special_ids: set[int]) -> int:
    """Where in the marks behind a turn a token stands that no text can have."""
    place = next((at for at, token in enumerate(ids) if token in special_ids), None)
    role = key.partition(">")[0]
    if place is None or (place and role == "assistant"):
        refuse(
            f"the {role}'s turn ends by {text!r}, "
            + (
                "in which no token is a special one: a text could say the same"
                if place is None
                else "which does not begin with a special token: the model could not end it by one"
            )
        )
    return place


def refuse(why: str) -> NoReturn:
    """Say what of a template has no form here."""
    raise ToolmemError(f"the chat template has no form here: {why}")


def _to_json(value: Any, **options: Any) -> str:
    """As transformers': no HTML escapes, letters as they are."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> NoReturn:
    raise ToolmemError(message)
