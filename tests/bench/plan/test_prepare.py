"""Which model is measured when none is named."""

from __future__ import annotations

import pytest

from qwencli.bench.plan import prepare as preparing
from qwencli.bench.plan.prepare import BenchRequest
from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.config import DType, LoadFormat, ModelSource, ModelSpec
from qwencli.models import resolve
from qwencli.models.builtin import bundled_folder
from qwencli.models.folder import read_config

SCENES = ModelSpec(
    "scenes", ModelSource.BUNDLED, None, bundled_folder(), read_config(bundled_folder())
)


@pytest.fixture
def prepared(monkeypatch, tmp_path, gpu, cpu):
    def of(device="cuda", default=SCENES, load_format=LoadFormat.AUTO, matrix="quick", **axes):
        monkeypatch.setattr(resolve, "resolve_model", lambda name: default)
        facts = gpu if device == "cuda" else cpu
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
