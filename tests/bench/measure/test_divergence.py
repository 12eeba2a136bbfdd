from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.measure.quality import (
    divergence,
    divergence_rows,
    passages,
    reference_rows,
    wants_reference,
)
from qwencli.bench.storage.columns import QUALITY, REFERENCE
from qwencli.bench.storage.row_file import write_rows
from qwencli.config import DType, EngineConfig, EngineName, LoadFormat, ModelSource, ModelSpec
from qwencli.engine.factory import create_engine
from qwencli.models.builtin import bundled_folder

COPY = ModelSpec("copy", ModelSource.LOCAL, path=bundled_folder())

weights = st.lists(st.floats(0.01, 10), min_size=6, max_size=6)


def normal(values):
    return [math.log(value / math.fsum(values)) for value in values]


@given(weights, weights, st.integers(1, 6))
def test_it_is_a_lower_bound_that_is_exact_when_all_tokens_are_kept(a, b, kept):
    p, q = normal(a), normal(b)
    exact = math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))
    whole = divergence(dict(enumerate(p)), q)
    assert whole == pytest.approx(exact, abs=1e-9)
    best = sorted(range(6), key=lambda token: -p[token])[:kept]
    assert -1e-12 <= divergence({token: p[token] for token in best}, q) <= whole + 1e-9


@given(weights)
def test_a_model_does_not_diverge_from_itself(a):
    p = normal(a)
    assert divergence({0: p[0], 1: p[1]}, p) == pytest.approx(0.0, abs=1e-9)


def test_a_model_that_rules_out_what_the_reference_says_has_a_finite_figure():
    assert math.isfinite(divergence({0: math.log(0.5)}, np.log([1 - 1e-9, 1e-9])))


@pytest.mark.parametrize(
    ("source", "load_format", "wants"),
    [
        (ModelSource.LOCAL, LoadFormat.AUTO, True),
        (ModelSource.LOCAL, LoadFormat.DUMMY, False),
        (ModelSource.BUNDLED, LoadFormat.AUTO, False),
    ],
)
def test_random_weights_and_the_bundled_model_have_no_reference(source, load_format, wants):
    assert wants_reference(ModelSpec("m", source), load_format) is wants


def engine(name, dtype=DType.AUTO):
    return create_engine(EngineConfig(COPY, name, dtype=dtype, device="cpu"))


def test_engines_agree_and_rounded_weights_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr("qwencli.bench.measure.quality.MOST_TOKENS", 12)
    some = passages()[:2]
    monkeypatch.setattr("qwencli.bench.measure.quality.passages", lambda: some)
    file = tmp_path / "reference.csv"
    with engine(EngineName.TRANSFORMERS) as loaded:
        rows = list(reference_rows(loaded, "copy"))
    write_rows(file, REFERENCE, [*rows, {**rows[0], "model": "another", "log_prob": -9.0}])
    found = {}
    for dtype in (DType.FLOAT32, DType.BFLOAT16):
        with engine(EngineName.NATIVE, dtype) as loaded:
            found[dtype] = list(divergence_rows(loaded, file, "copy"))
    assert [row["sample"] for row in found[DType.FLOAT32]] == [
        f"passage-{number}" for number in range(len(some))
    ]
    for same, other in zip(*found.values(), strict=True):
        assert same.keys() <= set(QUALITY)
        assert 0 <= same["mean_kl"] < 1e-8 < 1e-7 < other["mean_kl"]
