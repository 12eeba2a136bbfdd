"""Which kernels belong to which kind of attention, by their names."""

from __future__ import annotations

# Word in a kernel's name -> the SDPA backend it belongs to; the first that fits. What attention
# leaves behind besides (copies of masks, conversions) matches none.
FAMILIES = (
    ("cudnn", "cudnn"),
    ("flash_fwd", "flash"),
    ("flash::", "flash"),
    ("fmha", "mem_efficient"),
    ("attention_kernel", "mem_efficient"),
    ("softmax", "math"),
)


def attention_family(names: tuple[str, ...]) -> str | None:
    """The SDPA backend that these kernels belong to; None where the names do not say."""
    lowered = [name.lower() for name in names]
    return next((family for word, family in FAMILIES if any(word in n for n in lowered)), None)


def attention_kernels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the names that belong to an attention backend."""
    return tuple(n for n in names if any(word in n.lower() for word, _ in FAMILIES))


def short(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return plain.partition("<")[0].partition("(")[0].strip()[:80]
