"""The part of ComfyUI that the nodes use, with its signatures as of 0.3.64, and a small executor.

`install` puts `comfy_api.latest`, `comfy.model_management` and `comfy.utils` where imports find
them. `Graph.run` does to a graph in the API's form what ComfyUI's executor does to it: it checks
the inputs, follows links, and raises what a node raises.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar


class _Slot:
    """An input or output of one of ComfyUI's types."""

    io_type = ""

    def __init__(self, id: str, **about: Any) -> None:
        self.id = id
        self.__dict__.update(about)


def _kind(io_type: str, *names: str) -> Any:
    """A type whose inputs take these names beside those of all inputs, as ComfyUI's do."""
    widget = ("default", "socketless", "force_input") if names else ()
    known = {"display_name", "optional", "tooltip", "lazy", *widget, *names}

    class Input(_Slot):
        def __init__(self, id: str, **about: Any) -> None:
            unknown = set(about) - known
            assert not unknown, f"{io_type}.Input has no {unknown}"
            super().__init__(id, **{"optional": False, "default": None} | about)

    class Output(_Slot):
        def __init__(
            self,
            id: str | None = None,
            display_name: str | None = None,
            tooltip: str | None = None,
            is_output_list: bool = False,
        ) -> None:
            super().__init__(
                str(id), display_name=display_name, tooltip=tooltip, is_output_list=is_output_list
            )

    Input.io_type = Output.io_type = io_type
    return SimpleNamespace(io_type=io_type, Input=Input, Output=Output)


_NUMBER = ("min", "max", "step", "display_mode")


class Schema:
    def __init__(
        self,
        node_id: str,
        display_name: str | None = None,
        category: str = "sd",
        inputs: list[Any] | None = None,
        outputs: list[Any] | None = None,
        hidden: list[Any] | None = None,
        description: str = "",
        is_input_list: bool = False,
        is_output_node: bool = False,
    ) -> None:
        self.node_id, self.display_name, self.category = node_id, display_name, category
        self.inputs, self.outputs = inputs or [], outputs or []
        self.description, self.is_output_node = description, is_output_node

    def validate(self) -> None:
        ids = [each.id for each in (*self.inputs, *self.outputs)]
        doubled = {each for each in ids if ids.count(each) > 1}
        if doubled:
            raise ValueError(f"Ids must be unique between inputs and outputs: {doubled}")


class NodeOutput:
    def __init__(
        self,
        *args: Any,
        ui: Any = None,
        expand: dict[str, Any] | None = None,
        block_execution: str | None = None,
    ) -> None:
        self.args, self.ui = args, ui


class ComfyNode(ABC):
    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema: ...

    @classmethod
    @abstractmethod
    def execute(cls, **kwargs: Any) -> NodeOutput: ...

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        schema = cls.define_schema()
        schema.validate()
        return schema


class ComfyExtension(ABC):
    async def on_load(self) -> None:
        return None

    @abstractmethod
    async def get_node_list(self) -> list[type[ComfyNode]]: ...


class InterruptProcessingException(Exception):
    pass


class Management(ModuleType):
    """`comfy.model_management`.

    `interrupt_at` is which poll of the flag finds the user's stop; None: none does.
    """

    InterruptProcessingException = InterruptProcessingException

    def __init__(self) -> None:
        super().__init__("comfy.model_management")
        self.begin()

    def begin(self) -> None:
        """As it is when ComfyUI starts."""
        self.free_bytes = 8 * 2**30
        self.polls = 0
        self.interrupt_at: int | None = None
        self.unloaded = self.emptied = 0

        def free_memory(
            memory_required: float, device: Any, keep_loaded: Any = (), for_dynamic: bool = False
        ) -> list[Any]:
            self.unloaded += memory_required > 1e29
            return []

        # A plain function of the module, which loaders and the button go through.
        self.free_memory: Callable[..., list[Any]] = free_memory

    def throw_exception_if_processing_interrupted(self) -> None:
        self.polls += 1
        if self.interrupt_at is not None and self.polls >= self.interrupt_at:
            self.interrupt_at = None
            raise InterruptProcessingException

    def get_torch_device(self) -> str:
        return "cpu"

    def get_total_memory(self, device: Any) -> int:
        return 16 * 2**30

    def get_free_memory(self, device: Any = None) -> int:
        return self.free_bytes

    def unload_all_models(self) -> None:
        self.free_memory(1e30, self.get_torch_device())

    def soft_empty_cache(self, force: bool = False) -> None:
        self.emptied += 1


class ProgressBar:
    """`comfy.utils.ProgressBar`; `shown` has what every bar was told."""

    shown: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        ProgressBar.shown.append((value, self.total))


def install(modules: dict[str, ModuleType] | None = None) -> Management:
    """Put the stub into `sys.modules`."""
    modules = sys.modules if modules is None else modules
    io: Any = ModuleType("comfy_api.latest.io")
    io.String = _kind("STRING", "multiline", "placeholder", "dynamic_prompts")
    io.Int = _kind("INT", *_NUMBER, "control_after_generate")
    io.Float = _kind("FLOAT", *_NUMBER, "round")
    io.Boolean = _kind("BOOLEAN", "label_on", "label_off")
    io.Combo = _kind("COMBO", "options", "control_after_generate", "upload", "remote")
    io.Image, io.Mask, io.Video = _kind("IMAGE"), _kind("MASK"), _kind("VIDEO")
    io.Custom = _kind
    io.Schema, io.NodeOutput, io.ComfyNode = Schema, NodeOutput, ComfyNode
    latest: Any = ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, ComfyExtension
    utils: Any = ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    management = Management()
    modules |= {
        "comfy_api": ModuleType("comfy_api"),
        "comfy_api.latest": latest,
        "comfy": ModuleType("comfy"),
        "comfy.utils": utils,
        "comfy.model_management": management,
    }
    return management


class RefusedGraph(Exception):
    """What ComfyUI answers to a graph before it runs any of it."""


def node_classes() -> dict[str, Any]:
    from qwencli.comfyui.extension import comfy_entrypoint

    async def listed() -> list[type[ComfyNode]]:
        extension = await comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return {each.GET_SCHEMA().node_id: each for each in asyncio.run(listed())}


class Graph:
    """Runs graphs of our nodes.

    Args:
        sources: values that graphs may link to by name, as nodes of others would give them.
    """

    def __init__(self, **sources: Any) -> None:
        self.sources, self.classes = sources, node_classes()

    def run(self, graph: dict[str, dict[str, Any]], node: str) -> tuple[Any, ...]:
        """The outputs of `node`. Inputs are values, or links: ["source"] or [node, output]."""
        self._check(graph)
        return self._outputs(graph, node)

    def one(self, class_type: str, **inputs: Any) -> tuple[Any, ...]:
        """The outputs of a graph of one node."""
        return self.run({"1": {"class_type": class_type, "inputs": inputs}}, "1")

    def _outputs(self, graph: dict[str, dict[str, Any]], node: str) -> tuple[Any, ...]:
        chosen, values = graph[node], {}
        for name, value in chosen["inputs"].items():
            if not isinstance(value, list):
                values[name] = value
            elif len(value) == 1:
                values[name] = self.sources[value[0]]
            else:
                values[name] = self._outputs(graph, value[0])[value[1]]
        sys.modules["comfy.model_management"].throw_exception_if_processing_interrupted()
        args = self.classes[chosen["class_type"]].execute(**values).args
        schema = self.classes[chosen["class_type"]].GET_SCHEMA()
        assert len(args) == len(schema.outputs)
        for output, value in zip(schema.outputs, args, strict=True):
            assert isinstance(value, list) == output.is_output_list, output.id
        return tuple(args)

    def _check(self, graph: dict[str, dict[str, Any]]) -> None:
        for node in graph.values():
            node_class = self.classes[node["class_type"]]
            validate = getattr(node_class, "validate_inputs", None)
            own = set(inspect.signature(validate).parameters) if validate else set()
            given = node["inputs"]
            for each in node_class.GET_SCHEMA().inputs:
                if each.id not in given:
                    if not each.optional:
                        raise RefusedGraph(f"Required input is missing: {each.id}")
                    continue
                value = given[each.id]
                if isinstance(value, list) or each.id in own:
                    continue
                low, high = getattr(each, "min", None), getattr(each, "max", None)
                if (low is not None and value < low) or (high is not None and value > high):
                    raise RefusedGraph(f"Value {value} of {each.id} is not from {low} to {high}")
                if each.io_type == "COMBO" and value not in each.options:
                    raise RefusedGraph(f"Value not in list: {each.id}: {value!r}")
            if validate:
                values = {  # what comes over a link is not known yet
                    name: None if isinstance(given[name], list) else given[name]
                    for name in own & set(given)
                }
                try:
                    said = validate(**values)
                except Exception as error:
                    raise RefusedGraph(str(error)) from error
                if said is not True:
                    raise RefusedGraph("".join(f"{name} - {said}" for name in values))
