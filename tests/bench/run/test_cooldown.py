from __future__ import annotations

import pytest

from qwencli.bench.run.cooldown import Cooldown, cool_down, read_cooldown
from qwencli.errors import UsageError


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now = 100.0

    def sleep(self, seconds):
        self.now += seconds

    def spent(self, cooldown, temperature_c):
        begun = self.now
        cool_down(cooldown, temperature_c, sleep=self.sleep, clock=lambda: self.now)
        return self.now - begun


def test_a_fixed_pause():
    assert Time().spent(Cooldown(7.0), lambda: None) == 7.0


def test_without_a_sensor_there_is_nothing_to_settle():
    assert Time().spent(Cooldown(None), lambda: None) == 0.0


def test_a_cool_gpu_is_waited_for_ten_seconds():
    assert Time().spent(Cooldown(None), lambda: 40.0) == pytest.approx(10.0)


def test_a_hot_gpu_is_waited_for_until_it_settles():
    time = Time()
    cooling = lambda: max(40.0, 80.0 - (time.now - 100.0))  # noqa: E731  one degree a second
    assert 40.0 <= time.spent(Cooldown(None), cooling) <= 51.0


def test_a_gpu_that_never_settles_is_not_waited_for_longer_than_three_minutes():
    time = Time()
    assert time.spent(Cooldown(None), lambda: 1000.0 - 2 * time.now) == pytest.approx(180.0)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("2.5", 2.5), ("settle", None)])
def test_what_may_be_said(text, seconds):
    assert read_cooldown(text) == Cooldown(seconds)


@pytest.mark.parametrize("text", ["", "-1", "inf", "nan", "4000", "cool"])
def test_what_may_not(text):
    with pytest.raises(UsageError, match="is not a pause") as caught:
        read_cooldown(text)
    assert "settle" in caught.value.hint
