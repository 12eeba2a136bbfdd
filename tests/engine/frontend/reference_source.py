"""Functions of the reference's video processors, which cannot be imported without torchvision.

They are compiled from its own source file; none of those asked for needs anything but torch, numpy
and math.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


def reference_function(module: str, name: str) -> Callable[..., Any]:
    """The function or method `name` (methods take `self` first) of `transformers.models.MODULE`."""
    path = Path(transformers.__file__).parent / "models" / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [found] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    found.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    code = compile(ast.Module([*future, found], []), str(path), "exec")
    space: dict[str, Any] = {"math": math, "np": np, "torch": torch}
    exec(code, space)
    function: Callable[..., Any] = space[name]
    return function
