"""Turns at the interpreter lock while an engine works."""

from __future__ import annotations

import sys

import pytest

from qwencli.engine.machine.interpreter_turns import undisturbed


def test_turns_at_the_interpreter_lock_are_as_before_in_whatever_order_blocks_end() -> None:
    before = sys.getswitchinterval()
    first, second = undisturbed(0.001), undisturbed(0.0005)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(0.0005, rel=0.01)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == before


def test_turns_inside_others_are_the_quicker_ones() -> None:
    with undisturbed(0.0005):
        with undisturbed(0.001):
            assert sys.getswitchinterval() == pytest.approx(0.0005, rel=0.01)
        with undisturbed(0.0001):
            assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.02)
        assert sys.getswitchinterval() == pytest.approx(0.0005, rel=0.01)
