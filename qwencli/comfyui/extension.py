"""The nodes as ComfyUI loads them: `comfy_entrypoint` of its V3 API.

This is the one module that imports ComfyUI's API, so it can be imported inside ComfyUI alone.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from qwencli.comfyui import comfy_host, nodes, schemas
from qwencli.comfyui.engine_keeper import KEEPER
from qwencli.comfyui.node_inputs import node_text
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
            outputs = nodes.run(cls.NODE, given)
        except QwenCliError as error:
            raise nodes.NodeError(node_text(error)) from None
        # What runs alone may be connected to nothing: its first output is in the history then.
        ui = {"text": (outputs[0],)} if cls.NODE.runs_alone else None
        return io.NodeOutput(*outputs, ui=ui)


class QwencliModelNode(QwencliNode):
    """A node that asks a model."""

    @classmethod
    def validate_inputs(
        cls,
        model: str = schemas.AUTO,
        custom_model: str = "",
        keep_loaded: str = "0",
        max_new_tokens: int = schemas.MOST_NEW_TOKENS,
        thinking_budget: int = schemas.AS_MODEL,
    ) -> bool:
        """Checks these in place of ComfyUI, whose "value not in list" refuses hub ids and folders;
        what comes over a link is not known yet.

        Raises:
            NodeError: what is wrong. ComfyUI would say a text that is returned once for each of
                these inputs.
        """
        given = {
            "model": model,
            "custom_model": custom_model,
            "keep_loaded": keep_loaded,
            "max_new_tokens": max_new_tokens,
            "thinking_budget": thinking_budget,
        }
        wrong = nodes.validation_error(cls.NODE, given)
        if wrong is not None:
            raise nodes.NodeError(wrong)
        return True

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> Any:
        return nodes.fingerprint(cls.NODE, given)


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
