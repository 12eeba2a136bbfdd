from __future__ import annotations

import pytest
from PIL import Image

from qwencli.bench.measure import quality
from qwencli.bench.measure.quality import (
    caption_rows,
    count_heldout,
    has_captions,
    heldout,
    quality_columns,
)
from qwencli.bench.storage.columns import QUALITY
from qwencli.config import EngineConfig, EngineName, LoadFormat, ModelSource, ModelSpec
from qwencli.engine.factory import create_engine
from qwencli.models.resolve import resolve_model
from tests.bench.fake_engine import FakeEngine


def test_the_shipped_pictures_are_those_of_the_held_out_set():
    from tools.scenes.heldout import heldout as drawn

    shipped = heldout(10**6)
    assert len(shipped) == count_heldout() == 96
    assert [caption for _, caption in shipped] == [item.caption for item in drawn(96)]
    for (path, _), item in zip(shipped[:8], drawn(8), strict=True):
        with Image.open(path) as image:
            assert image.size == item.image.size
    assert heldout(3) == shipped[:3]


@pytest.mark.parametrize("engine", [EngineName.NATIVE, EngineName.TRANSFORMERS])
def test_the_bundled_model_is_right_about_most_of_them(engine, monkeypatch):
    monkeypatch.setattr(quality, "MOST_S", 600.0)
    with create_engine(EngineConfig(resolve_model("scenes"), engine, device="cpu")) as loaded:
        assert has_captions(loaded)
        rows = list(caption_rows(loaded, 4))
    assert all(row.keys() <= set(QUALITY) for row in rows)
    assert sum(row["exact"] for row in rows) >= 3
    assert all(row["exact"] == (row["answer"] == row["expected"]) for row in rows)


@pytest.mark.parametrize(
    ("source", "load_format", "has"),
    [
        (ModelSource.BUNDLED, LoadFormat.AUTO, True),
        (ModelSource.BUNDLED, LoadFormat.DUMMY, False),
        (ModelSource.LOCAL, LoadFormat.AUTO, False),
    ],
)
def test_only_real_weights_of_the_bundled_model_know_the_captions(source, load_format, has):
    assert (
        has_captions(FakeEngine(EngineConfig(ModelSpec("m", source), load_format=load_format)))
        is has
    )


def test_a_slow_mode_is_asked_fewer(monkeypatch):
    monkeypatch.setattr(quality, "MOST_S", -1.0)
    assert list(caption_rows(FakeEngine(EngineConfig(ModelSpec("m", ModelSource.LOCAL))), 4)) == []


def test_columns_from_rows():
    def row(**said):
        return {**dict.fromkeys(QUALITY, ""), **said}

    captions = [row(exact="1"), row(exact="0"), row(exact="1"), row(reason="broke")]
    assert quality_columns(captions) == {
        "exact_match_percent": pytest.approx(200 / 3), "mean_kl": None, "quality_samples": 3,
    }  # fmt: skip
    passages = [row(mean_kl="0.1", positions="10"), row(mean_kl="0.4", positions="30")]
    assert quality_columns(passages) == {
        "exact_match_percent": None, "mean_kl": pytest.approx(0.325), "quality_samples": 2,
    }  # fmt: skip
    assert set(quality_columns([]).values()) == {None}
