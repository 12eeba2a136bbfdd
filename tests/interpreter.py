"""Triton's interpreter, several times as fast: nearly all of its time goes into describing values,
none of which the tests are about.

Each replacement gives what the interpreter's own function gives.
"""

from __future__ import annotations

import builtins
import dataclasses
import sys
from typing import Any

MOST_NUMBERS = 10_000


def speed_up() -> None:
    """Where a test has imported the interpreter; once is enough, however often it is asked for."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or getattr(interpreter, "_is_fast", False):
        return
    _overflows_go_unseen(interpreter)
    _functions_prepared_once(interpreter)
    _types_described_once(interpreter)
    _operands_fitted_once(interpreter)
    _builtins_called_directly(interpreter)
    interpreter._is_fast = True


def _overflows_go_unseen(interpreter: Any) -> None:
    """It follows each sum and product by two more in 64 bits to look for an overflow."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


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


def _operands_fitted_once(interpreter: Any) -> None:
    """Operands of one type and shape, or a block and a scalar, need no search for a common one."""
    semantic = type(interpreter.interpreter_semantic)
    common, broadcast = semantic.computation_type_impl, semantic.broadcast_impl_value

    def common_type(
        self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div: bool
    ) -> Any:
        alike = a is b and not div
        return a if alike else common(self, a, a_is_scalar, b, b_is_scalar, div)

    def splat(self: Any, scalar: Any, like: Any) -> Any:
        kind = like.with_element_ty(scalar.dtype)
        return self.make_tensor(self.builder.create_splat(kind, scalar.handle), kind)

    def broadcast_value(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if not a.is_block():
            return (splat(self, lhs, b), rhs) if b.is_block() else (lhs, rhs)
        if not b.is_block():
            return lhs, splat(self, rhs, a)
        alike = a.shape.values == b.shape.values
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    semantic.computation_type_impl, semantic.broadcast_impl_value = common_type, broadcast_value

    fit = semantic.binary_op_type_checking_impl
    numbers: dict[Any, Any] = {}

    def fitted(self: Any, lhs: Any, rhs: Any, *pointers: Any, **how: Any) -> Any:
        """A number beside a block is a block of that number, which nothing writes to."""
        kind = type(rhs)  # zeros of float have two signs
        if not (kind is int or (kind is float and rhs)) or not isinstance(lhs, self.tensor):
            return fit(self, lhs, rhs, *pointers, **how)
        key = (lhs.type.name, kind, rhs, pointers, *how.items())
        known = numbers.get(key)
        if known is None:
            left, known = fit(self, lhs, rhs, *pointers, **how)
            if left is not lhs or len(numbers) > MOST_NUMBERS:
                return left, known
            known.handle.data.flags.writeable = False
            numbers[key] = known
        return lhs, known

    semantic.binary_op_type_checking_impl = fitted


def _builtins_called_directly(interpreter: Any) -> None:
    """Each goes through a check that it is given the interpreter, and a function that gives it."""
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    checked = core.builtin(lambda _semantic=None: None).__code__

    def patch(names: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = member.__wrapped__ if member.__code__ is checked else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        scope.set_attr(names, name, call)

    interpreter._patch_attr = patch
