"""The sampler on a CUDA device: the same distributions, and the same draws as on the CPU."""

from __future__ import annotations

import pytest

from qwencli.config import SamplingParams
from tests.engine.native.test_sampler import (
    NEUTRAL,
    SETTINGS,
    assert_follows_the_distribution,
    draw,
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_distribution(settings):
    assert_follows_the_distribution(settings, "cuda")


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_seed_draws_the_same_as_on_the_cpu(settings):
    sampling = SamplingParams(**{**NEUTRAL, **settings})
    here = draw(sampling, draws=500, device="cuda")
    # A target on the very border of two tokens may fall to either where sums round differently.
    assert (here - draw(sampling, draws=500)).abs().sum() <= 2
