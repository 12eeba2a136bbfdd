"""Which model is measured when none is named."""

from __future__ import annotations

import dataclasses

import pytest

from qwencli.bench.plan import prepare as preparing
from qwencli.bench.plan.prepare import BenchRequest
from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.commands.diagnosis import chosen_model
from qwencli.config import DType, LoadFormat, ModelSource, ModelSpec
from qwencli.engine.machine import host
from qwencli.models import resolve
from qwencli.models.builtin import bundled_folder
from qwencli.models.folder import read_config

SCENES = ModelSpec(
    "scenes", ModelSource.BUNDLED, None, bundled_folder(), read_config(bundled_folder())
)


@pytest.fixture
def prepared(monkeypatch, tmp_path, gpu, cpu):
    def of(
        device="cuda", default=SCENES, load_format=LoadFormat.AUTO, matrix="quick", facts=None,
        resolved=None, endpoints=(), **axes,
    ):  # fmt: skip
        monkeypatch.setattr(resolve, "resolve_model", resolved or (lambda name, **_: default))
        facts = facts or (gpu if device == "cuda" else cpu)
        monkeypatch.setattr(preparing, "read_device_facts", lambda _: facts)
        request = BenchRequest(
            matrix,
            axes,
            (),
            RepetitionOptions(),
            None,
            None,
            (),
            0,
            device,
            DType.AUTO,
            load_format,
            None,
            24,
            endpoints=endpoints,
        )
        return preparing.prepare(request)[0]

    monkeypatch.delenv(resolve.ENVIRONMENT_KEY, raising=False)
    monkeypatch.setattr(resolve, "user_config_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return of


def test_on_a_gpu_the_recommended_model_stands_in_for_the_bundled_one(prepared):
    plan = prepared()
    (name,) = plan.models
    assert name.startswith(("qwen3-vl-", "qwen3.5-"))
    assert (plan.settings.load_format, plan.settings.quality_samples) == (LoadFormat.DUMMY, 0)
    assert f"measuring {name}" in plan.notice
    assert "random weights" in plan.notice


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 32, 48, 80, 141])
def test_it_is_the_model_that_diagnose_recommends_for_the_card(prepared, monkeypatch, gpu, gib):
    """An idle card: the driver holds some of it, and torch sees a little less than the driver."""
    total = gib << 30
    facts = dataclasses.replace(gpu, total_memory_bytes=int(0.98 * total))
    idle = host.GpuMemory(int(0.97 * total), total)
    monkeypatch.setattr(host, "gpu_memory", lambda: idle)
    name = chosen_model(None).name
    assert name != "scenes"
    asked = []

    def no_model_here(wanted, **how):
        asked.append(how)
        return SCENES

    plan = prepared(facts=facts, resolved=no_model_here)
    assert list(plan.models) == [name]
    assert asked == [{"free_bytes": resolve.usable_on_card(int(0.98 * total))}]


def test_what_was_named_or_downloaded_is_measured(prepared, monkeypatch):
    downloaded = ModelSpec("qwen3-vl-4b", ModelSource.BUILTIN, "Qwen/Qwen3-VL-4B-Instruct")
    for plan in (
        prepared(device="cpu"),
        prepared(default=downloaded),
        prepared(model="scenes"),
        prepared(load_format=LoadFormat.DUMMY),
    ):
        assert plan.notice is None
    monkeypatch.setenv(resolve.ENVIRONMENT_KEY, "scenes")
    assert list(prepared().models) == ["scenes"]


def test_the_origin_s_matrix_has_its_modes_and_its_columns(prepared):
    plan = prepared(matrix="origin")
    assert plan.as_origin
    assert plan.document()["as_origin"] is True
    modes = {(str(c.quantization), str(c.attention), str(c.load_mode)) for c in plan.cells}
    assert {("4bit", "flash_attention_2", "keep"), ("none", "sdpa", "reload")} <= modes
    assert {str(cell.engine) for cell in plan.cells} == {"transformers"}
    assert "as_origin" not in prepared().document()  # older campaigns of it can be resumed


@pytest.mark.parametrize("matrix", ["default", "quick", "full", "own.toml"])
def test_of_a_server_there_is_a_cell_for_each_model_unless_modes_are_named(
    prepared, monkeypatch, tmp_path, matrix
):
    """A file of one's own, and the command line, are told which modes a server cannot be given."""
    (tmp_path / "own.toml").write_text('[axes]\nattention = ["sdpa", "eager"]\n')
    remote = ModelSpec("served", ModelSource.REMOTE)
    monkeypatch.setattr("qwencli.engine.remote.remote_model", lambda endpoints, name: remote)
    asked = {"device": "cpu", "matrix": matrix, "engine": "remote", "endpoints": ("http://h/v1",)}
    cells = prepared(**asked).cells
    assert cells[0].skip_reason is None
    assert len(cells) == (2 if matrix == "own.toml" else 1)
    *_, refused = prepared(**asked, attention="sdpa,eager").cells
    assert "it belongs to the server of --endpoint" in refused.skip_reason
