"""Which kernels a piece of work launches, found out without running any; and compiling them.

Work over tensors of torch's "meta" device runs the code that chooses kernels and their constants,
and computes nothing. Inside `planning` such tensors, and those of the host, stand for those of a
GPU that need not be here, and launches are collected instead of made. A launch is then compiled
from its description alone, in any process (`compile_launch`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from qwencli.engine import kernels

# What our allocators and Triton agree on: an address that this divides is an aligned one.
ALIGNMENT = 16
_planned: Gpu | None = None


@dataclass(frozen=True)
class Gpu:
    """What kernels are chosen and compiled by."""

    capability: tuple[int, int]
    num_processors: int

    @property
    def fp8(self) -> bool:
        """Whether it converts and multiplies e4m3."""
        return self.capability >= (8, 9)

    @property
    def dependent(self) -> bool:
        """Whether a kernel can be launched before the one in front has ended."""
        return self.capability >= (9, 0)

    @property
    def arch(self) -> int:
        return self.capability[0] * 10 + self.capability[1]


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that tensors of this device are on, or stand for; None = no GPU, which is Triton's
    interpreter."""
    if device.type != "cuda":
        return _planned
    found = torch.cuda.get_device_properties(device)
    return Gpu((found.major, found.minor), found.multi_processor_count)


@dataclass(frozen=True)
class TensorArgument:
    """A tensor as a compiled kernel depends on it."""

    dtype: str
    aligned: bool


# What stands for an integer of which a kernel knows only whether 16 divides it, or nothing.
_DIVISIBLE, _OTHER, _WIDE = 2 * ALIGNMENT, 3, 1 << 40


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel and everything that decides what is compiled for it; equal where that is the same.

    Args:
        arguments: by name, constants and launch options among them, in the order they were given:
            Triton finds a kernel again by that, too.
    """

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls, kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> KernelLaunch:
        names = _names(kernel)
        unspecialized = _unspecialized(kernel)
        given = {**dict(zip(names, arguments, strict=False)), **options}
        constants = _constants(kernel)
        said = {
            name: value if name in constants or name not in names
            else _described(value, name in unspecialized)
            for name, value in given.items()
        }  # fmt: skip
        return cls(kernel.fn.__module__, kernel.fn.__name__, tuple(said.items()))


def _described(value: Any, unspecialized: bool) -> Any:
    """An argument that is no constant, without what makes no difference to the compiler."""
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() * value.element_size()
        return TensorArgument(str(value.dtype).removeprefix("torch."), offset % ALIGNMENT == 0)
    if isinstance(value, bool) or not isinstance(value, int):
        return 0.0 if isinstance(value, float) else value
    if value >= 1 << 31:
        return _WIDE
    if value == 1 and not unspecialized:
        return 1
    return _DIVISIBLE if value % ALIGNMENT == 0 and not unspecialized else _OTHER


@functools.cache
def _names(kernel: Any) -> tuple[str, ...]:
    return tuple(kernel.arg_names)


@functools.cache
def _constants(kernel: Any) -> frozenset[str]:
    annotations = kernel.fn.__annotations__
    return frozenset(name for name, kind in annotations.items() if "constexpr" in str(kind))


@functools.cache
def _unspecialized(kernel: Any) -> frozenset[str]:
    """The names that `@triton.jit` was told not to look at; its interpreter keeps them too."""
    if hasattr(kernel, "params"):
        return frozenset(param.name for param in kernel.params if param.do_not_specialize)
    return frozenset(kernel.kwargs.get("do_not_specialize") or ())


class _Recorder:
    """Stands in for a kernel.

    Args:
        runs: whether launches are made too.
    """

    def __init__(self, kernel: Any, found: dict[KernelLaunch, None], runs: bool) -> None:
        self._kernel, self._found, self._runs = kernel, found, runs

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self._found[KernelLaunch.of(self._kernel, arguments, options)] = None
            return self._kernel[grid](*arguments, **options) if self._runs else None

        return launch


@contextmanager
def recording(runs: bool = True) -> Iterator[dict[KernelLaunch, None]]:
    """Collect the launches inside the block, in order, and with `runs` make them too."""
    found: dict[KernelLaunch, None] = {}
    replaced = []
    try:
        for module in kernel_modules():
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel") and hasattr(value, "arg_names"):
                    replaced.append((module, name, value))
                    setattr(module, name, _Recorder(value, found, runs))
        yield found
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


@contextmanager
def planning(gpu: Gpu | None) -> Iterator[dict[KernelLaunch, None]]:
    """Collect the launches of work over tensors of "meta" or the host, as if they were on `gpu`;
    None = in Triton's interpreter."""
    global _planned
    before, _planned = _planned, gpu
    try:
        with recording(runs=False) as found:
            yield found
    finally:
        _planned = before


def kernel_modules() -> list[Any]:
    """All modules of ours that may launch a kernel."""
    return [
        importlib.import_module(module.name)
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")
    ]


def jit_functions() -> dict[str, Any]:
    """All functions of ours that Triton compiles, by name, in one order."""
    from triton.runtime.jit import JITFunction

    return {
        f"{module.__name__}.{name}": value
        for module in kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    }


def compile_for(gpu: Gpu) -> None:
    """From now on this process compiles for `gpu`, which it does not touch."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", gpu.arch, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
        )
    )


def compile_launch(launch: KernelLaunch) -> Any:
    """What Triton compiles for a launch, from its cache where it is there. After `compile_for`."""
    return compile_described(getattr(importlib.import_module(launch.module), launch.kernel), launch)


def compile_described(kernel: Any, launch: KernelLaunch) -> Any:
    """Likewise, of a kernel at hand."""
    names = _names(kernel)
    given = {name: _mocked(value) for name, value in launch.arguments}
    positional = [given.pop(name) for name in names if name in given]
    return kernel.warmup(*positional, grid=(1,), **given)


class _Pointer:
    """A tensor's type and the alignment of its address: what Triton asks of an argument."""

    def __init__(self, described: TensorArgument) -> None:
        self.dtype = getattr(torch, described.dtype)
        self._address = 0 if described.aligned else 1

    def data_ptr(self) -> int:
        return self._address

    @staticmethod
    def ptr_range() -> int:
        return 0


def _mocked(value: Any) -> Any:
    return _Pointer(value) if isinstance(value, TensorArgument) else value
