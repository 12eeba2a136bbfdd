from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwencli.comfyui import node_inputs, nodes, schemas
from qwencli.comfyui.schemas import NODES, Kind, RunsWhere
from qwencli.config import Cache, EngineConfig, SamplingOptions
from qwencli.engine.machine.device import why_no_graphs
from qwencli.models.resolve import SearchPaths, resolve_model
from tests.comfyui.comfy_stub import Management, node_classes


def test_every_schema_loads(management: Management) -> None:
    classes = node_classes()
    assert list(classes) == list(NODES)
    for name, node_class in classes.items():
        schema, node = node_class.GET_SCHEMA(), NODES[name]
        assert schema.node_id == name == node_class.__name__
        assert schema.display_name.startswith("Qwen ") and schema.category == "qwencli"
        assert [each.id for each in schema.inputs] == [each.id for each in node.inputs]
        assert [each.io_type for each in schema.inputs] == [each.kind for each in node.inputs]
        assert [each.io_type for each in schema.outputs] == [each.kind for each in node.outputs]
    # ComfyUI gives memory to a pack that has not run yet, too.
    assert hasattr(management.free_memory, "_qwencli_gives_back")


@pytest.mark.parametrize("node", NODES.values(), ids=lambda node: node.id)
def test_defaults_are_values_that_the_widget_takes(node: schemas.Node) -> None:
    types: dict[Kind, Any] = {Kind.INT: int, Kind.FLOAT: float, Kind.BOOLEAN: bool}
    for each in node.widgets:
        assert type(each.default) is types.get(each.kind, str), each.id
        if each.low is not None and each.high is not None:
            assert each.low <= each.default <= each.high
        if each.kind is Kind.COMBO:
            assert each.default in (each.options or schemas.models()), each.id
    for each in node.inputs:
        assert each.is_widget or each.default is None


@pytest.mark.parametrize("node", NODES.values(), ids=lambda node: node.id)
def test_what_a_number_widget_gives_is_taken(node: schemas.Node) -> None:
    for each in node.widgets:
        if each.low is None or each.high is None or each.step is None:
            assert each.kind not in (Kind.INT, Kind.FLOAT), each.id
            continue
        for value in (each.low, each.low + each.step, 0, each.high - each.step, each.high):
            given = {**node.defaults(), "max_new_tokens": 8192, each.id: value}
            if not each.low <= value <= each.high:
                continue
            if node is schemas.ENGINE:
                assert nodes.run(node, given)
                continue
            node_inputs.sampling_options(given)
            if each.id != "max_new_tokens":
                node_inputs.thinking_budget(given)
                named = ("max_new_tokens", "thinking_budget")
                assert nodes.validation_error(node, {name: given[name] for name in named}) is None


def test_widgets_are_where_saved_graphs_have_them() -> None:
    """New ones come last."""
    for node in (each for each in NODES.values() if each is not schemas.ENGINE):
        assert [each.id for each in node.widgets][-2:] == ["keep_loaded", "thinking_budget"]


def test_every_sampling_parameter_is_a_widget() -> None:
    widgets = {each.id for each in schemas.CAPTION.widgets}
    assert {*SamplingOptions.__dataclass_fields__} - {"stop"} <= widgets
    assert node_inputs.sampling_options(schemas.CAPTION.defaults()) == SamplingOptions(
        max_new_tokens=512, seed=0
    )


def test_models_are_listed_whatever_is_wrong_with_the_users_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "custom_models.json").write_text('{"hf_models": {"mine": {"repo_id": "a/b"}}}')
    assert "scenes" in schemas.models() and schemas.models()[0] == "auto"
    assert next(iter(SearchPaths().custom_models(None).specs)) in schemas.models()
    (tmp_path / "custom_models.json").write_text("{")
    assert "qwen3-vl-4b" in schemas.models()


def test_a_model_runs_elsewhere_where_this_process_captures_no_graphs(monkeypatch) -> None:
    config = EngineConfig(resolve_model("scenes"))

    def places(**modes: Any) -> list[RunsWhere]:
        return [node_inputs.where_it_runs(each, replace(config, **modes)) for each in RunsWhere]

    assert places() == list(RunsWhere), "there is no GPU here"
    monkeypatch.setattr(node_inputs, "why_no_graphs", lambda: "cudaMallocAsync")
    assert places() == [RunsWhere.RESIDENT, RunsWhere.RESIDENT, RunsWhere.REMOTE]
    assert places(device="cpu") == list(RunsWhere)
    assert places(cache=Cache.STATIC) == list(RunsWhere), "no graphs were asked for"


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_the_allocator_decides_whether_graphs_are_captured(monkeypatch, backend: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    why = why_no_graphs()
    assert why is None if backend == "native" else "--disable-cuda-malloc" in str(why)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("lower --max-pixels", "lower max_pixels"),
        ("the log tells why; --keep-loaded 0 does without it", "runs: in-process does without it"),
        ("choose with --model: a, b", "choose with custom_model: a, b"),
        ("give it with --api-key", "give it with api_key_variable"),
    ],
)
def test_hints_name_inputs_that_do_what_they_say(said: str, shown: str) -> None:
    assert node_inputs.with_input_names(said).endswith(shown)
    known = {each.id for node in NODES.values() for each in node.inputs}
    assert known & set(re.findall(r"\w+", shown))
