"""Templates that want more than to render: nothing runs, nothing is read, and every rendering ends."""

import resource
import time

import pytest

from regrow.trainer.data.chat.conversation import Conversation, Message
from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.source import DataError

CONVERSATION = Conversation(messages=[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])

ESCAPES = {
    "the type of a text": "{{ ''.__class__.__mro__ }}",
    "the type by subscript": "{{ ''['__class__'] }}{{ ''['__class__']['__mro__'][1] }}",
    "the type by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "the type by map": "{{ (['']|map(attribute='__class__')|list)[0].__mro__ }}",
    "the type by format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "the type by format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "the globals of a function": "{{ raise_exception.__globals__ }}{{ strftime_now.__globals__['os'] }}",
    "the globals of a filter's method": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "the environment": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment.loader }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "the type by dict": "{{ dict.__call__.__globals__ }}{{ dict.mro() }}",
    "a namespace's private names": "{% set n = namespace(__class__=1) %}",
    "a namespace's private names, later": "{% set n = namespace() %}{% set n._x = 1 %}",
    "a file": "{% include '/etc/hostname' %}",
    "an import": "{% import '/etc/hostname' as x %}{{ x }}",
    "a parent": "{% extends '/etc/hostname' %}",
    "the messages, changed": "{{ messages.append(1) }}",
    "a message, changed": "{{ messages[0].update(role='x') }}",
    "a message, emptied": "{{ messages[0].clear() }}",
}

# The longer a template, the more each of its steps counts.
LONG = "{#" + "x" * 9999 + "#}"

LARGE = {
    "a large range": "{% for i in range(10**7) %}{% endfor %}",
    "loops in loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}" + LONG,
    "loops over texts": "{% for i in 'x' * 9999 %}{% for j in 'x' * 9999 %}{% endfor %}{% endfor %}" + LONG,
    "macros that call themselves": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    + LONG,
    "a recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "a text many times": "{{ 'x' * 10**12 }}",
    "a text many times, from the left": "{{ 10**12 * 'x' }}",
    "a list many times": "{{ [1] * 10**11 }}",
    "a number": "{{ 10**(10**10) }}",
    "a number squared": "{% set n = namespace(x=10) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "a wide number": "{{ '%999999999d' % 1 }}",
    "a precise number": "{{ '%.999999999f' % 1 }}",
    "a width as argument": "{{ '%*d' % (999999999, 1) }}",
    "a wide format": "{{ '{:999999999}'.format(1) }}",
    "a computed format": "{{ '{:{}}'.format(1, 999999999) }}",
    "a computed format_map": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 999999999}) }}",
    "a filter's format": "{{ '%999999999d'|format(1) }}",
    "a wide number by name": "{{ '%(a)999999999d' % {'a': 1} }}",
    "a wide number as bytes": "{{ '%999999999d'.encode() % 1 }}",
    "many wide numbers": "{{ ('%9999d' * 60000) % ((1,) * 60000) }}",
    "many wide formats": "{{ ('{0:9999}' * 60000).format(1) }}",
    "one text in many fields": "{{ ('{0}' * 60000).format('x' * 60000) }}",
    "one text in many named fields": "{{ ('%(a)s' * 60000) % {'a': 'x' * 60000} }}",
    "center": "{{ 'x'.center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ ('x'|safe).zfill(10**10) }}",
    "expandtabs": "{{ ('\\t' * 60000).expandtabs(60000) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "a filter's center": "{{ 'x'|center(10000000000) }}",
    "a mapped filter's center": "{{ ['x']|map('center', 10000000000)|list }}",
    "indent": "{{ ('\\n' * 60000)|indent(60000) }}",
    "tojson's indent": "{{ messages|tojson(indent=10**10) }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "replace": "{{ ('x' * 60000).replace('', 'y' * 60000) }}",
    "a filter's replace": "{{ ('x' * 60000)|replace('x', 'y' * 60000) }}",
    "join": "{{ ('x' * 60000).join(['y'] * 60000) }}",
    "a filter's join": "{{ (['x'] * 60000)|join('y' * 60000) }}",
    "replace of bytes": "{{ ('x' * 60000).encode().replace(''.encode(), ('y' * 60000).encode()) }}",
    "join of what is not a list": "{{ ('x' * 60000).join(range(9999)|map('string')) }}",
    "a filter's join of what is not a list": "{{ range(9999)|map('string')|join('x' * 60000) }}",
    "a sum of lists": "{{ ([[1] * 60000] * 60000)|sum(start=[]) }}",
    "a long number": "{{ ('f' * 60000)|int(base=16) }}",
    "a long number of bytes": "{{ (1).from_bytes(('f' * 60000).encode(), 'big') }}",
    "tags that are not closed": "{{ ('<!--' * 60000)|striptags }}",
    "a list of one text": "{{ ['x' * 60000] * 60000 }}",
    "a list of one text, joined": "{{ (['x' * 60000] * 60000)|join }}",
    "a list of one text, as JSON": "{{ (['x' * 60000] * 60000)|tojson }}",
    "translate": "{{ ('x' * 60000).translate({120: 'y' * 60000}) }}",
    "doubled by +": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "doubled by ~": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubled by a set block": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubled by a macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = d(n.x) %}{% endfor %}",
    "a list doubled": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "much text put out": "{% set t = 'x' * 60000 %}{% for i in range(99999) %}{{ t }}{% endfor %}",
    "much text in a set block": "{% set t = 'x' * 60000 %}{% set u %}{% for i in range(99999) %}{{ t }}{% endfor %}{% endset %}",
    "much of the template's own text": "{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}",
    "a list of itself": "{% set n = namespace(x=1) %}{% set n.x = [n] %}{{ [n.x, n.x]|tojson }}",
    "a deep list": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "a block that calls itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "lipsum": "{{ lipsum(n=10000) }}",
    "random": "{{ [1, 2]|random }}",
}


@pytest.mark.parametrize("case", ESCAPES)
def test_nothing_runs_and_nothing_is_read(case: str) -> None:
    template = ChatTemplate(texts={"default": ESCAPES[case]})
    with pytest.raises(DataError, match=r"^the chat template does not take the conversation \(.+\); mend") as raised:
        template.render(CONVERSATION)
    assert "\n" not in str(raised.value)
    assert CONVERSATION.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize("case", LARGE)
def test_every_rendering_ends_within_bounds(case: str) -> None:
    template = ChatTemplate(texts={"default": LARGE[case]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(DataError, match=r"^the chat template does not take the conversation \(.+\); mend"):
        template.render(CONVERSATION)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 << 20  # KiB


def test_long_conversations_are_within_the_bounds() -> None:
    turns: list[Message] = [
        {"role": "user", "content": "x" * 100},
        {"role": "assistant", "content": "y" * 5000},
    ] * 200
    source = (
        "{% set n = namespace(all='') %}{% for m in messages %}{% set n.all = n.all + m.role ~ m.content.strip() %}"
        "{% for p in m.content.split('z') %}{{ p | trim }}{% endfor %}{% endfor %}{{ n.all }}"
    )
    rendered = ChatTemplate(texts={"default": source}).render(Conversation(messages=turns))
    assert len(rendered.text) == 2 * 200 * 5100 + 200 * len("userassistant")


def test_looking_at_long_texts_is_limited_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.trainer.data.chat.bounds._SECONDS", 0.2)
    source = "{% set t = 'x' * 9999999 %}{% for i in range(99999) %}{% if 'y' in t %}{% endif %}{{ t.count('z') }}{% endfor %}"
    start = time.process_time()
    with pytest.raises(DataError, match=r"\(it takes more than 0.2 s\)"):
        ChatTemplate(texts={"default": source}).render(CONVERSATION)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ ', '.join(messages | map(attribute='role')) }}", "user, assistant"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ [[1], [2]] | sum(start=[]) }}", "[1, 2]"),
        ("{{ '{:>6}|{:.2f}|{}'.format('ab', 1, {'a': 2}) }}", "    ab|1.00|{'a': 2}"),
        ("{{ '%-6s|%.2f|%%|%(a)s'[:12] % ('ab', 1) }}|{{ '%(a)s' % {'a': 2} }}", "ab    |1.00|%|2"),
        ("{{ '7' | int + '1f' | int(base=16) }} {{ 2 ** 10 }} {{ 'ab' * 2 }} {{ [1] * 2 }}", "38 1024 abab [1, 1]"),
        ("{{ 'a-b-'.replace('-', '+') }}{{ 'a-b' | replace('-', '+') }}{{ 'a\nb' | indent(2) }}", "a+b+a+ba\n  b"),
        (
            "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}",
            "1/3False 2/3False 3/3True ",
        ),
        ("{% for x in nothing %}{% else %}none{% endfor %}{% set a %}{{ 1 ~ 'b' }}{% endset %}{{ a }}", "none1b"),
        ("{% set a | upper %}{{ 'b' }}{% endset %}{{ a }}{% filter upper %}c{% endfilter %}", "BC"),
        (
            "{% for m in [messages] recursive %}{% if m is mapping %}{{ m.role }}{% else %}{{ loop(m) }}{% endif %}{% endfor %}",
            "userassistant",
        ),
    ],
)
def test_what_is_charged_for_gives_what_it_gave(source: str, text: str) -> None:
    assert ChatTemplate(texts={"default": source}).render(CONVERSATION).text == text
