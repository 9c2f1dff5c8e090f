from __future__ import annotations

import re
import tracemalloc
from typing import Any

import pytest

from asyncscale.errors import InvalidRequestError
from asyncscale.tokenization.chat import ChatTemplate, check_messages

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}
{% set rest = messages[1:] %}{% else %}{% set system = false %}{% set rest = messages %}{% endif %}
{% for message in rest %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate') }}
  {% endif %}
  {% if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{% else %}{{ message.content }}{{ eos_token }}{% endif %}

{% endfor %}
"""
TOOLS = """{%- if tools %}{{ '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}
{{ tool.function | tojson(indent=2) }}
{% endfor %}{% endif -%}
{%- macro show(message) %}{{ message.role }}: {{ message.content if message.content is defined else '-' }}{% endmacro %}
{%- set state = namespace(count=0) %}
{%- for message in messages %}
{%- if message.role == 'skip' %}{% continue %}{% endif %}
{%- if message.role == 'stop' %}{% break %}{% endif %}
{%- set state.count = state.count + 1 %}
{{ show(message) }}
{% for call in message.tool_calls or [] %}<call>{{ call | tojson(sort_keys=true) }}</call>{% endfor %}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- endfor %} ({{ state.count }}){{ '<think>' if enable_thinking }}{{ documents is none }}{{ tools is none }}
"""
GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
    {% generation %}
    {% set inner = message.content %}
{{ inner }}<end>
    {% endgeneration %}
{% else %}
{{ message.content }}{{ inner is defined }}
{% endif %}
{% endfor %}
"""
PARTS = """{% for message in messages %}{% if message.content is string %}{{ message.content }}
{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}{% endfor %}"""

HELLO = [{"role": "user", "content": "  Hello <b>&'ä漢  "}]
LONG = [
    {"role": "system", "content": "Brief."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]
CALLS = [
    {"role": "user", "content": "x"},
    {"role": "skip", "content": "y"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "f", "arguments": {"b": [1, 2.5, True], "a": "<ä>"}}],
    },
    {"role": "assistant", "content": "thought", "reasoning": "deep"},
    {"role": "stop", "content": "z"},
    {"role": "user", "content": "never"},
]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string <&>"}}}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("template", "messages", "options"),
    [
        (CHATML, HELLO, {}),
        (CHATML, LONG, {}),
        (LLAMA2, LONG, {}),
        (LLAMA2, HELLO, {"bos_token": "overridden"}),
        (TOOLS, CALLS, {}),
        (TOOLS, CALLS, {"tools": [WEATHER], "enable_thinking": True}),
        (GENERATION, LONG, {}),
        (PARTS, [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], {}),
        ("{{ strftime_now('%Y') }}", HELLO, {}),
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_chat_is_rendered_as_in_transformers(
    template: str, messages: list[dict[str, Any]], options: dict[str, Any], add_generation_prompt: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    (expected,), _ = render_jinja_template(
        [plain], chat_template=template, add_generation_prompt=add_generation_prompt, **(TOKENS | options)
    )
    assert ChatTemplate(template, TOKENS).render(messages, add_generation_prompt, options) == expected
    assert expected


def test_what_a_template_refuses_is_an_error_with_its_reason() -> None:
    with pytest.raises(InvalidRequestError, match="Conversation roles must alternate"):
        ChatTemplate(LLAMA2, TOKENS).render([HELLO[0], HELLO[0]], True, {})
    with pytest.raises(InvalidRequestError, match="refuses these messages"):
        ChatTemplate("{{ 1 / 0 }}", TOKENS).render(HELLO, True, {})


def test_a_template_that_is_no_template_fails_only_when_it_is_used() -> None:
    template = ChatTemplate("{% for %}", TOKENS)
    with pytest.raises(InvalidRequestError, match="chat template is not valid"):
        template.render(HELLO, True, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ '{0.__class__}'.format(messages).__len__() }}",
    ],
)
def test_templates_are_kept_in_the_sandbox(source: str) -> None:
    template = ChatTemplate(source, TOKENS)
    with pytest.raises(InvalidRequestError, match=r"unsafe|access to attribute"):
        template.render(HELLO, True, {})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "must be a list of messages, got str"),
        ({"role": "user"}, "must be a list of messages, got dict"),
        (None, "must be a list of messages, got NoneType"),
        ([], "messages is empty"),
        (["hi"], "messages[0] must be a mapping, got str"),
        ([*HELLO, {"content": "x"}], "messages[1] must have a 'role'"),
        ([{"role": 1, "content": "x"}], "messages[0] must have a 'role'"),
        ([{"role": "user"}], "messages[0] must have a 'content'"),
        ([{"role": "user", "content": 5}], "messages[0] must have a 'content'"),
        ([{"role": "user", "content": [object()]}], "JSON's types only, got object"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)):
        ChatTemplate(CHATML, TOKENS).render(messages, True, {})


def test_messages_are_not_changed() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"a": (1, 2)}]}
    checked = check_messages([message])
    assert checked == [{"role": "assistant", "tool_calls": [{"a": [1, 2]}]}]
    assert message["content"] is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{% set big = [0] * 10**9 %}",
        "{{ 2 ** (10**9) }}",
        "{{ 10 ** 60 ** 60 }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_hostile_template_is_refused_and_takes_no_memory(template: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError, match="chat template"):
            ChatTemplate(template, {}).render([{"role": "user", "content": "hi"}], True, {})
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_small_products_and_powers_are_computed() -> None:
    template = ChatTemplate("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 6 * 7 }}", {})
    assert template.render([{"role": "user", "content": "hi"}], True, {}) == "---102442"
