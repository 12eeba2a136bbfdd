from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwencli.config import Cache, EngineConfig, Quantization
from qwencli.engine.instruments.probes.answers import EngineWork, LaunchRate, decode, dumps
from qwencli.models.resolve import resolve_model


@dataclass(frozen=True)
class Inner:
    mode: Cache
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    one: Inner
    pair: tuple[int, str]
    many: Mapping[str, Inner]
    maybe: Inner | None = None
    place: Path | None = None


def test_there_and_back():
    inner = Inner(Cache.STATIC, (1, 2, 3))
    outer = Outer(inner, (4, "x"), {"a": inner}, inner, Path("b"))
    assert decode(Outer, json.loads(dumps(outer))) == outer


def test_engine_settings_travel():
    config = EngineConfig(resolve_model("scenes"), quantization=Quantization.INT4)
    work = EngineWork(config, 8, 2)
    assert decode(EngineWork, json.loads(dumps(work))) == work


def test_keys_of_another_version():
    value = {"eager_us": 1.0, "round_trip_us": 2.0, "graph_us": None, "new": 3}
    assert decode(LaunchRate, value) == LaunchRate(1.0, None, 2.0)
    with pytest.raises(TypeError):
        decode(LaunchRate, {"eager_us": 1.0})
