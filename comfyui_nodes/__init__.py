"""Qwen vision-language nodes for ComfyUI. They are part of the package qwencli."""

import sys

try:
    from qwencli.comfyui.extension import comfy_entrypoint
except ModuleNotFoundError as missing:
    if missing.name not in ("qwencli", "qwencli.comfyui", "qwencli.comfyui.extension"):
        raise
    raise ImportError(
        "the nodes of qwencli need the package qwencli in the Python that runs ComfyUI, from its "
        f'source folder: "{sys.executable}" -m pip install --upgrade path/to/qwencli'
    ) from None

__all__ = ["comfy_entrypoint"]
