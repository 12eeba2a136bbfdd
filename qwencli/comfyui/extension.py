"""The nodes as ComfyUI loads them: `comfy_entrypoint` of its V3 API.

This is the one module that imports ComfyUI's API, so it can be imported inside ComfyUI alone.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from qwencli.comfyui import comfy_host, nodes, schemas
from qwencli.comfyui.engine_keeper import KEEPER
from qwencli.comfyui.schemas import Kind
from qwencli.errors import QwenCliError

_TYPES: dict[Kind, Any] = {
    Kind.STRING: io.String,
    Kind.INT: io.Int,
    Kind.FLOAT: io.Float,
    Kind.BOOLEAN: io.Boolean,
    Kind.COMBO: io.Combo,
    Kind.IMAGE: io.Image,
    Kind.MASK: io.Mask,
    Kind.VIDEO: io.Video,
    Kind.ENGINE: io.Custom(Kind.ENGINE.value),
}


def _input(each: schemas.Input) -> Any:
    about: dict[str, Any] = {"optional": each.optional, "tooltip": each.tooltip}
    if each.is_widget:
        about["default"] = each.default
    if each.kind is Kind.COMBO:
        about["options"] = list(each.options or schemas.models())
    if each.kind is Kind.STRING:
        about["multiline"] = each.multiline
    if each.kind in (Kind.INT, Kind.FLOAT):
        about |= {"min": each.low, "max": each.high, "step": each.step}
    if each.id == "seed":
        about["control_after_generate"] = True
    return _TYPES[each.kind].Input(each.id, **about)


def _output(each: schemas.Output) -> Any:
    return _TYPES[each.kind].Output(
        each.id, display_name=each.id, tooltip=each.tooltip, is_output_list=each.is_list
    )


class QwencliNode(io.ComfyNode):
    """A node of the table. Subclasses say which."""

    NODE: schemas.Node

    @classmethod
    def define_schema(cls) -> io.Schema:
        node = cls.NODE
        return io.Schema(
            node_id=node.id,
            display_name=node.display_name,
            category=schemas.CATEGORY,
            description=node.description,
            inputs=[_input(each) for each in node.inputs],
            outputs=[_output(each) for each in node.outputs],
            is_output_node=node.runs_alone,
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        try:
            return io.NodeOutput(*nodes.run(cls.NODE, given))
        except QwenCliError as error:
            raise nodes.NodeError(nodes.node_text(error)) from None


class QwencliModelNode(QwencliNode):
    """A node that asks a model."""

    @classmethod
    def validate_inputs(cls, model: str = schemas.AUTO) -> bool | str:
        # In place of ComfyUI's "value not in list": graphs may name any hub id or folder.
        return nodes.unknown_model(model) or True

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> Any:
        return nodes.changes(cls.NODE, given)


class QwencliCaption(QwencliModelNode):
    NODE = schemas.CAPTION


class QwencliChat(QwencliModelNode):
    NODE = schemas.CHAT


class QwencliCaptionFolder(QwencliModelNode):
    NODE = schemas.CAPTION_FOLDER


class QwencliStructuredCaption(QwencliModelNode):
    NODE = schemas.STRUCTURED_CAPTION


class QwencliBoxes(QwencliModelNode):
    NODE = schemas.BOXES


class QwencliEngine(QwencliNode):
    NODE = schemas.ENGINE


class QwencliExtension(ComfyExtension):
    async def on_load(self) -> None:
        comfy_host.when_memory_is_wanted(KEEPER.trim, KEEPER.give_back)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            QwencliCaption,
            QwencliChat,
            QwencliCaptionFolder,
            QwencliStructuredCaption,
            QwencliBoxes,
            QwencliEngine,
        ]


async def comfy_entrypoint() -> QwencliExtension:
    return QwencliExtension()
