"""jinja2's sandbox with a bound on time and on memory: a template is a stranger's program.

Every loop, macro and block looks at the clock. Everything that can make a value larger (operators,
filters, methods, joined output) is weighed before it runs and charged after it. The bounds are far
above what chat templates do: those of the hub take milliseconds and a few copies of the text.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 2.0
# Characters of all values that one rendering makes, beside those of the conversation itself.
MOST_CHARS = 2**25
# The largest templates of the hub have some 20,000.
MOST_SOURCE_CHARS = 2**16
# How often a template may copy the conversation.
_COPIES = 32
# An estimate of what an operation makes is an upper bound, often a wide one.
_ESTIMATE_FACTOR = 8
_MOST_BITS = 2**16
# Of nested lists and objects; few lines can hold each other so that there are 2**60.
_MOST_ITEMS = 2**18
# One step of a template takes about as long as going through so many characters.
_STEP_CHARS, _LOOK_CHARS = 256, 2**17
_SMALL_CHARS = 2**12
_WIDE = re.compile(r"\d{6}")
# Filters and functions that no chat template needs, and whose work no size tells.
_LEFT_OUT = ("urlize", "lipsum", "wordwrap", "striptags")


class TemplateLimitError(jinja2.TemplateError):
    """A template takes more time or memory than any that is meant well."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self, content_chars: int) -> None:
        self.most = MOST_CHARS + _COPIES * content_chars
        self.left = self.most
        self.unseen = 0
        # Of this thread: a machine that was suspended meanwhile has not run for long.
        self.end_s = time.thread_time() + MOST_SECONDS

    def charge(self, size: int = 0) -> None:
        """Charge for `size` characters, and for the time of a small step."""
        self.left -= size
        if self.left < 0:
            raise TemplateLimitError("it makes more text than any conversation needs")
        # The clock takes longer to read than most of a template's steps.
        self.unseen += _STEP_CHARS + size
        if self.unseen > _LOOK_CHARS:
            self.unseen = 0
            if time.thread_time() > self.end_s:
                raise TemplateLimitError(f"it ran for {MOST_SECONDS:g} s without an end")

    def made(self, value: Any) -> Any:
        """`value`, charged for; an iterator as one that charges for its items."""
        if type(value) is str or isinstance(value, str | bytes):
            self.charge(len(value))
        elif isinstance(value, list | tuple | set | dict):
            self.charge(8 * len(value))
        elif isinstance(value, Iterator):
            return map(self.made, value)
        else:
            self.charge()
        return value

    def weigh(self, *values: Any) -> None:
        """Refuse an operation on `values` that may make far too much of them.

        What a method or filter makes is at most about the product of its two largest operands.
        """
        for value in values:
            if type(value) is not str or len(value) >= _SMALL_CHARS:
                break
        else:
            return
        most = _ESTIMATE_FACTOR * self.most
        weights = sorted((self._weight(value, most) for value in values), reverse=True)
        if weights and weights[0] * max(weights[1:2], default=1) > most:
            raise TemplateLimitError("it makes more text than any conversation needs")

    @staticmethod
    def _weight(value: Any, most: int) -> int:
        """Characters of the value as text, nested ones included; numbers count as widths."""
        weight, items, rest = 1, 0, [value]
        while rest and weight <= most:
            item = rest.pop()
            items += 1
            if items + len(rest) > _MOST_ITEMS:
                return most + 1
            if type(item) is str or isinstance(item, str | bytes):
                weight += len(item)
            elif isinstance(item, int):
                weight += abs(item)
            elif isinstance(item, dict):
                rest.extend(item)
                rest.extend(item.values())
            elif isinstance(item, list | tuple | set):
                weight += len(item)
                rest.extend(item)
            elif isinstance(item, jinja2.utils.Namespace):
                rest.append(item._Namespace__attrs)
            else:
                weight += 1
        return weight


# Set while something is rendered; compiling a template runs nothing of it.
_budget: ContextVar[_Budget] = ContextVar("template budget")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which nothing runs or grows without end; see `render`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        # Not optimized: that would evaluate constant expressions, however large, while compiling.
        super().__init__(optimized=False, finalize=_printable, **settings)
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _bounded(function) for name, function in tests.items()}
        self.filters["_slice"] = _bounded(lambda value, *at: value[slice(*at)])
        self.filters["_weighed"] = _bounded(lambda value: value)
        for name in _LEFT_OUT:
            self.filters.pop(name, None)
            self.globals.pop(name, None)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _bounded(function)

    def compiled(self, source: str) -> jinja2.Template:
        """The template with its loops watched.

        Raises:
            jinja2.TemplateError: the source is no template, or longer than any is.
        """
        if len(source) > MOST_SOURCE_CHARS:
            raise TemplateLimitError(f"it has {len(source)} characters")
        tree = _Watch().visit(self.parse(source))
        return self.from_string(tree)

    def tick(self) -> None:
        _budget.get().charge()

    def concat(self, pieces: Iterable[str]) -> str:
        """What jinja2 joins all output with, of blocks and macros too."""
        budget = _budget.get()
        budget.charge()
        return "".join(map(budget.made, pieces))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            budget.weigh(left, right)
        elif isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            factor = abs(right) if operator == "**" else 1
            if left.bit_length() * factor + right.bit_length() > _MOST_BITS:
                raise TemplateLimitError("it calculates with numbers of too many digits")
        elif operator == "*":
            budget.weigh(left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            _budget.get().weigh(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        # The sandbox puts a function of its own before `str.format`.
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | list | tuple | dict):
            if isinstance(owner, str) and method.__name__.startswith("format"):
                _check_widths(owner)
            # jinja2 adds the variables of a loop or block, for functions that ask for them.
            named = (value for key, value in kwargs.items() if not key.startswith("_"))
            budget.weigh(owner, *args, *named)
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def render(self, template: jinja2.Template, content_chars: int, **values: Any) -> str:
        """`template.render(**values)`.

        Args:
            content_chars: of the conversation: the more there are, the larger may values be.

        Raises:
            TemplateLimitError: it takes more time or memory than any template that is meant well.
        """
        token = _budget.set(_Budget(content_chars))
        try:
            return template.render(**values)
        finally:
            _budget.reset(token)


class _Watch(NodeTransformer):
    """Puts a look at the clock into whatever repeats, and filters in place of what bypasses us."""

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = nodes.ExprStmt(
            nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        ).set_lineno(node.lineno)
        node.body.insert(0, tick)
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        joined = nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None)
        return joined.set_lineno(node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _weighed(node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends: list[nodes.Expr] = [
            nodes.Const(None) if end is None else end
            for end in (node.arg.start, node.arg.stop, node.arg.step)
        ]
        sliced = nodes.Filter(node.node, "_slice", ends, [], None, None)
        return sliced.set_lineno(node.lineno)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    """The value of the expression, once it is known to be of a size that can be gone through."""
    if isinstance(node, nodes.Const):
        return node
    weighed = nodes.Filter(node, "_weighed", [], [], None, None)
    weighed.set_lineno(node.lineno)
    return weighed


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, weighed and charged for."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if function.__name__ == "do_format":
            _check_widths(str(args[0]))
        budget.weigh(*args, *kwargs.values())
        return budget.made(function(*args, **kwargs))

    return wrapper


def _printable(value: Any) -> Any:
    """`value`, whose text is about to be made and put out."""
    if not isinstance(value, str):
        _budget.get().weigh(value)
    return value


def _check_widths(pattern: str) -> None:
    """Refuse a format that fills up to a width no text has."""
    if _WIDE.search(pattern):
        raise TemplateLimitError("it formats text wider than any is")
