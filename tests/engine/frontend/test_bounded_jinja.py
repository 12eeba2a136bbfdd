"""Chat templates that run, grow or nest without end are refused; others render as ever."""

from __future__ import annotations

import time
from pathlib import Path

import jinja2.ext
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwencli.engine.frontend import bounded_jinja
from qwencli.engine.frontend.bounded_jinja import MOST_SECONDS, BoundedEnvironment
from qwencli.engine.frontend.chat_template import ChatTemplate
from qwencli.errors import ModelFileError, QwenCliError
from qwencli.messages import user_message

GROW = (
    "{{% set ns = namespace(x={0}) %}}"
    "{{% for i in range(60) %}}{{% set ns.x = {1} %}}{{% endfor %}}"
)
STRING, NESTED = "'ab'", "['lol']"
DOUBLED = GROW.format(NESTED, "[ns.x, ns.x]")
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "printing": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(100) }}",
    "one macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive": "{% for x in [[1]] recursive %}{{ loop([x]) }}{{ loop([x]) }}{% endfor %}",
}
LARGE = {
    "repeated": "{{ 'a' * 10**10 }}",
    "list": "{{ ([1] * 10**9)|length }}",
    "power": "{{ 10**10**10 }}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**11) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format_map": "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "nested width": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "star": "{{ '%*d' % (10**10, 1) }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "wrapped": "{{ ('a' * 1000000)|wordwrap(1) }}",
    "joined": GROW.format(STRING, "ns.x ~ ns.x"),
    "added": GROW.format(STRING, "ns.x + ns.x"),
    "replaced": GROW.format(STRING, "ns.x.replace('a', ns.x)"),
    "join": GROW.format(STRING, "[ns.x, ns.x]|join(ns.x)"),
    "straight": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60,
    "blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "printed": DOUBLED + "{{ ns.x }}",
    "as json": DOUBLED + "{{ ns.x|tojson }}",
    "as text": DOUBLED + "{{ ns.x ~ 'a' }}",
    "in a namespace": DOUBLED + "{{ ns }}",
    "compared": DOUBLED + "{% set y = ns.x %}" + DOUBLED + "{{ y == ns.x }}",
    "slices": "{% set x = 'a' * 1000000 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(90000) %}{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
    "lazily": "{{ range(100000)|map('string')|map('center', 100000)|join|length }}",
    "batches": "{% for x in [1]|batch(10**9, 'x') %}{% endfor %}",
    "indent": "{{ {'a': 1}|tojson(indent=10**10) }}",
    "format many": "{{ ('{0}' * 10000).format('x' * 1000000) }}",
}
NO_TEMPLATE = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "not": "{{ " + "not " * 15000 + "1 }}",
    "digits": "{{ " + "1" * 5000 + " }}",
    "long": "{{ a }}" * 200_000,
    "included": "{% include 'x' %}",
}


def render(folder: Path, template: str, text: str = "hello") -> str:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ChatTemplate.from_folder(folder).render([user_message(text)], as_parts=False)


@pytest.mark.parametrize("name", [*ENDLESS, *LARGE, *NO_TEMPLATE])
def test_what_has_no_end_or_no_bound_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = MOST_SECONDS
    if name in ENDLESS:  # each takes all that it is given
        most = 0.5
        monkeypatch.setattr(bounded_jinja, "MOST_SECONDS", most)
    started = time.thread_time()
    with pytest.raises(ModelFileError, match="broken chat template") as caught:
        render(tmp_path, {**ENDLESS, **LARGE, **NO_TEMPLATE}[name])
    assert "\n" not in caught.value.message and len(caught.value.message) < 500
    assert time.thread_time() - started < 3 * most


def test_a_refusal_of_many_lines_is_one_short_line(tmp_path: Path) -> None:
    with pytest.raises(QwenCliError) as caught:
        render(tmp_path, "{{ raise_exception('x' * 5000 ~ '\\ny') }}")
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


def test_a_long_conversation_is_no_reason(tmp_path: Path) -> None:
    text = "word " * 400_000
    template = (
        "{% for m in messages[::-1] %}{{ m.content.split('</think>')[-1].lstrip('\\n')"
        ".replace('a', 'bc')|trim ~ m.content[:9] }}{% if m.content.startswith('<tool>') %}x"
        "{% endif %}{% endfor %}"
    )
    assert render(tmp_path, template, text) == text.strip() + text[:9]


PIECES = [
    "{{ a }}",
    "{{ a ~ b ~ 1 }}",
    "{{ xs[1:] }}{{ xs[::-1]|join(',') }}{{ a[:2] }}{{ xs[-1] }}",
    "{% for x in xs if x != 2 %}{{ loop.index }}{{ x * 2 }}{% else %}none{% endfor %}",
    "{% macro f(x, y='z') %}{{ x }}{{ y }}{% endmacro %}{{ f(a) }}{{ f(b, y=1) }}",
    "{% set t %}{{ a }}-{% endset %}{{ t|upper|trim }}",
    "{{ '%s-%05d' % (a, 7) }}{{ '{:>5}'.format(b) }}{{ 2 ** 5 % 7 + 1 }}",
    "{% if a in d and d[a] is defined or b == 'x' %}yes{% endif %}{{ d|tojson(indent=2) }}",
    "{{ missing }}{{ xs|map('string')|list }}{{ xs|sum }}{{ [a, [b, none]] }}{{ xs is iterable }}",
    "{% call(u) g() %}<{{ u }}>{% endcall %}{% macro g() %}{{ caller(a) }}{% endmacro %}",
]


@given(st.permutations(PIECES), st.text(max_size=9), st.text(max_size=9))
@settings(max_examples=25)
def test_ordinary_templates_render_as_in_the_sandbox(pieces: list[str], a: str, b: str) -> None:
    # The macro that a call needs comes first.
    source = "".join(sorted(pieces, key=lambda piece: "caller" not in piece))
    source = "{% macro g() %}{{ caller(a) }}{% endmacro %}" + source
    options = {"trim_blocks": True, "extensions": [jinja2.ext.loopcontrols]}
    values = {"a": a, "b": b, "xs": [1, 2, 3], "d": {a: [b, 1.5], "k": {}}}
    bounded = BoundedEnvironment(**options)
    assert bounded.render(bounded.compiled(source), 10, **values) == ImmutableSandboxedEnvironment(
        **options
    ).from_string(source).render(**values)
