"""Triton's interpreter, several times as fast: nearly all of its time goes into describing values,
none of which the tests are about.

Each replacement gives what the interpreter's own function gives.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import operator
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

MOST_PLANS = 50_000
# Of constants alone they give a constant.
FOLDED = frozenset({
    "create_splat", "create_broadcast", "create_int_cast", "create_fp_trunc", "create_make_range",
})  # fmt: skip
# What `triton.language` does to tensors, all of which follows from their types alone.
TRACED = frozenset({
    *(f"__{name}__" for name in (
        "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv",
        "rfloordiv", "mod", "rmod", "neg", "invert", "and", "rand", "or", "ror", "xor", "rxor",
        "lshift", "rlshift", "rshift", "rrshift", "gt", "rgt", "ge", "rge", "lt", "rlt", "le",
        "rle", "eq", "req", "ne", "rne", "getitem",
    )),
    "abs", "arange", "broadcast_to", "cast", "clamp", "dot", "exp", "exp2", "expand_dims", "fdiv",
    "floor", "fma", "full", "join", "load", "log", "log2", "logical_and", "logical_or", "maximum",
    "minimum", "permute", "reshape", "rsqrt", "sqrt", "store", "to", "trans", "where",
})  # fmt: skip


def speed_up() -> None:
    """Where a test has imported the interpreter; once is enough, however often it is asked for."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or getattr(interpreter, "_is_fast", False):
        return
    _overflows_go_unseen(interpreter)
    _functions_prepared_once(interpreter)
    _types_described_once(interpreter)
    _results_taken_as_they_are(interpreter)
    _builtins_traced_once(interpreter)
    interpreter._is_fast = True


def _overflows_go_unseen(interpreter: Any) -> None:
    """It follows each sum and product by two more in 64 bits to look for an overflow."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    np, plain = interpreter.np, type(builder).create_exp

    def exp(self: Any, arg: Any) -> Any:
        with np.errstate(over="ignore"):  # as on a GPU, where exp(89) is inf and nobody is told
            return plain(self, arg)

    type(builder).create_exp = exp


def _functions_prepared_once(interpreter: Any) -> None:
    """It prepares `triton.language` again at every call of a function inside a kernel.

    The launch has prepared what our functions see; what Triton's own see (`core`) stays prepared
    once it has been.
    """
    core, prepared = interpreter.tl.core, set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        names = function.fn.__globals__
        if id(names) not in prepared:
            if any(value is core for value in names.values()):
                interpreter._patch_lang(function.fn)
            prepared.add(id(names))
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


def _types_described_once(interpreter: Any) -> None:
    """Shapes, names and numpy's types of the few types that a kernel has."""
    core = interpreter.tl.core
    constexpr, block_type, tensor = core.constexpr, core.block_type, core.tensor

    unwrap = core._unwrap_if_constexpr
    plain = frozenset({int, float, bool, str, type(None), tensor, core.dtype, block_type})

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrapped

    init_block_type = block_type.__init__
    blocks: dict[Any, Any] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(unwrapped, shape))
        known = blocks.get(key)
        if known is None:
            init_block_type(self, element_ty, shape)
            blocks[key] = (self.shape, self.numel, self.name)
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = known

    block_type.__init__ = init_block

    init_tensor = tensor.__init__
    shapes: dict[Any, Any] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = builtins.tuple(type.shape.values) if type.is_block() else ()
        known = shapes.get(key)
        if known is None:
            init_tensor(self, handle, type)
            shapes[key] = (self.shape, self.numel)
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known

    tensor.__init__ = init

    np_dtype_of = interpreter._get_np_dtype
    np_dtypes: dict[str, Any] = {}

    def np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype_of(kind)
        return np_dtypes[name]

    interpreter._get_np_dtype = np_dtype


def _results_taken_as_they_are(interpreter: Any) -> None:
    """Of numpy's operators: it looks twice whether a result is wider than its type."""
    handle, validate = interpreter.TensorHandle, interpreter._validate_np_data_size
    np = interpreter.np
    handle.__post_init__ = lambda self: None

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        a, b, kind = lhs.data, rhs.data, lhs.dtype.scalar
        if a.dtype == np.bool_ and b.dtype == np.bool_:
            output = (op(a.astype(np.int8), b.astype(np.int8)) & 1).astype(np.bool_)
        else:
            output = op(a, b)
        if output.dtype is not a.dtype and not validate(output, kind):
            output = output.astype(interpreter._get_np_dtype(kind))
        return handle(output, kind)

    type(interpreter.interpreter_builder).binary_op = binary_op


class _Recorder:
    """Stands in for the interpreter's builder and notes what is asked of it."""

    def __init__(self, builder: Any) -> None:
        vars(self).update(_builder=builder, calls=[])

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._builder, name)
        if not name.startswith(("create_", "get_")):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            self.calls.append((name, value, args, kwargs, result))
            return result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._builder, name, value)


def _builtins_traced_once(interpreter: Any) -> None:
    """What a function of `triton.language` asks of the builder follows from the types that it is
    given: it is noted the first time, and asked at once from then on.

    Nearly all of the interpreter's time goes into finding that out, over a hundred calls for a sum.
    """
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    builder, handle_type = interpreter.interpreter_builder, interpreter.TensorHandle
    tensor, constexpr, dtype = core.tensor, core.constexpr, core.dtype
    numbers = frozenset({int, bool, str, type(None)})
    checked = core.builtin(lambda _semantic=None: None).__code__
    plans: dict[Any, Callable[[list[Any]], Any] | None] = {}

    def described(value: Any, tensors: list[Any]) -> Any:
        """What of an argument decides what is done; raises TypeError for what is not known here."""
        kind = type(value)
        if kind is tensor:
            for place, given in enumerate(tensors):
                if given is value:
                    return place
            tensors.append(value)
            return value.type.name
        if kind is constexpr:
            value = value.value
            kind = type(value)
        if kind in numbers:
            return kind, value
        if kind is float and value == value:
            return kind, value or str(value)  # zeros have two signs
        if kind is slice and value == slice(None):
            return kind
        if isinstance(value, dtype):
            return dtype, value.name
        if kind is list or isinstance(value, builtins.tuple | core.tuple):
            return kind, *(described(part, tensors) for part in value)
        raise TypeError

    def patch(names: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        inner = member.__wrapped__ if member.__code__ is checked else member

        def plain(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if semantic.builder is not builder:  # part of what is being noted
                return plain(*args, **kwargs)
            kwargs.pop("_semantic", None)
            tensors: list[Any] = []
            try:
                key = name, *[described(value, tensors) for value in args]
                if kwargs:
                    key += *kwargs, *[described(value, tensors) for value in kwargs.values()]
                plan = plans[key]
            except TypeError:
                return plain(*args, **kwargs)
            except KeyError:
                if len(plans) < MOST_PLANS:
                    return learnt(key, plain, args, kwargs, tensors)
                return plain(*args, **kwargs)
            return plan(tensors) if plan is not None else plain(*args, **kwargs)

        scope.set_attr(names, name, call if name in TRACED else plain)

    def learnt(key: Any, plain: Any, args: Any, kwargs: Any, tensors: list[Any]) -> Any:
        semantic.builder = recorder = _Recorder(builder)
        try:
            result = plain(*args, **kwargs)
        finally:
            semantic.builder = builder
        if len({id(given.handle) for given in tensors}) == len(tensors):  # or which was meant?
            plans[key] = plan_of(recorder.calls, result, tensors)
        return result

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | builtins.tuple | core.tuple):
            return all(map(is_plain, value))
        return not isinstance(value, handle_type)

    def plan_of(calls: list[Any], result: Any, tensors: list[Any]) -> Any:
        """The function of tensors that does what was noted; None where that cannot be told."""
        handles = {id(given.handle): f"t[{n}].handle" for n, given in enumerate(tensors)}
        if any(result is given for given in tensors):
            return operator.itemgetter([result is given for given in tensors].index(True))
        if type(result) is not tensor:
            return None
        names: dict[str, Any] = {}
        constants: set[int] = set()
        lines: list[str] = []
        for step, (name, function, args, kwargs, given) in enumerate(calls):
            if not isinstance(given, handle_type) and name.startswith("get_"):
                continue
            places = [handles.get(id(value)) for value in args]
            fixed = [p is None or id(v) in constants for p, v in zip(places, args, strict=True)]
            if kwargs or any(
                place is None and not is_plain(value)
                for value, place in zip(args, places, strict=True)
            ):
                return None
            if all(fixed) and (name.startswith("get_") or name in FOLDED):
                given.data.flags.writeable = False
                constants.add(id(given))
                names[f"c{step}"] = given
                handles.setdefault(id(given), f"c{step}")
                continue
            for n, (value, place) in enumerate(zip(args, places, strict=True)):
                if place is None:
                    names[f"c{step}_{n}"] = value
            names[f"f{step}"] = function
            asked = ", ".join(place or f"c{step}_{n}" for n, place in enumerate(places))
            lines.append(f"h{step} = f{step}({asked})")
            if given is not None:
                handles.setdefault(id(given), f"h{step}")
            last = f"h{step}"
        if result.handle is None:
            place = last if lines else None
        else:
            place = handles.get(id(result.handle))
        if place is None:
            return None
        names |= {"new": tensor.__new__, "tensor": tensor, "like": dict(vars(result))}
        lines += ["r = new(tensor)", "r.__dict__.update(like)", f"r.handle = {place}", "return r"]
        exec(_code("\n    ".join(["def plan(t):", *lines])), names)
        return names["plan"]

    interpreter._patch_attr = patch


@functools.cache
def _code(source: str) -> CodeType:
    return compile(source, "<plan>", "exec")
