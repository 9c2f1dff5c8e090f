"""Chat templates: from a conversation to one text, exactly as transformers' apply_chat_template renders it.

Templates come with checkpoints and are untrusted, so they run in jinja2's sandbox, see nothing but plain data, and make
neither endless texts nor huge numbers by repeating. (One that computes for long is not stopped.)
Reference: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from asyncscale.errors import InvalidRequestError
from asyncscale.tokenization.codec import Message

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import SandboxedEnvironment

# No conversation that fits a model's context is longer, in characters.
_MAX_CHARS = 2**26

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's chat template.

    source: in jinja2. special_tokens: bos_token, eos_token, ... as the template sees them.
    One that cannot be compiled is an error only when it is used, because completions do without it.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        import jinja2

        self._special_tokens = special_tokens
        self._template: Template | None = None
        self._defect = ""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            self._defect = str(error)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
    ) -> str:
        """The conversation as one text. Raises InvalidRequestError when it is malformed or the template refuses it."""
        if self._template is None:
            raise InvalidRequestError(f"the model's chat template is not valid: {self._defect}")
        plain = [_with_reasoning(message) for message in check_messages(messages)]
        variables = {"tools": None, "documents": None, **self._special_tokens, **_plain(dict(template_kwargs))}
        variables |= {"messages": plain, "add_generation_prompt": add_generation_prompt}
        try:
            return _bounded(self._template.generate(variables))
        except Exception as error:  # a template can fail in any way that a program can
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from error


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages as plain data, without keys whose value is None. Raises InvalidRequestError when malformed."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages must be a list of messages, got {type(messages).__name__}: "
            'chat([{"role": "user", "content": "Hello!"}])'
        )
    if not messages:
        raise InvalidRequestError("messages is empty: a conversation has at least one message")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            cure = ". One call is one conversation" if isinstance(message, list | tuple) else ""
            raise InvalidRequestError(f"messages[{index}] must be a mapping, got {type(message).__name__}{cure}")
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{index}] must have a 'role' that is a string")
        content = message.get("content")
        if not isinstance(content, str | list | tuple | None) or (content is None and len(message) == 1):
            raise InvalidRequestError(f"messages[{index}] must have a 'content' that is a string or a list of parts")
        checked.append({key: _plain(value) for key, value in message.items() if value is not None})
    return checked


def _plain(value: Any) -> Any:
    """`value` made of JSON's types alone, so that a template gets no object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration, the value, not the name
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise InvalidRequestError(f"a chat template takes JSON's types only, got {type(value).__name__}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a message's reasoning under different names; as in transformers, give it under both usual ones."""
    reasoning = next((message[key] for key in _REASONING_KEYS if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _environment() -> SandboxedEnvironment:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} marks what the assistant wrote, for training; here it only passes its body on."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _bounded(pieces: Iterable[str]) -> str:
    """All of them together."""
    kept, num_chars = [], 0
    for piece in pieces:
        kept.append(piece)
        num_chars += len(piece)
        if num_chars > _MAX_CHARS:
            raise OverflowError(f"the text would have more than {_MAX_CHARS} characters")
    return "".join(kept)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises OverflowError for powers that no template needs, and for what is repeated too often."""
    if operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
        raise OverflowError("the power is too large")
    for repeated, count in ((left, right), (right, left)):
        is_repetition = operator == "*" and isinstance(repeated, str | list | tuple) and isinstance(count, int)
        if is_repetition and len(repeated) * count > _MAX_CHARS:
            raise OverflowError(f"the text would have more than {_MAX_CHARS} characters")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
