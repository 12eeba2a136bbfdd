"""The output sink."""

from __future__ import annotations

from qwencli.output import _wrapped


def test_long_lines_break_between_words():
    assert _wrapped("one two-three four\n  as is", 10) == "one\ntwo-three\nfour\n  as is"


def test_a_word_longer_than_the_line_stays_whole():
    assert _wrapped("see /a/path/longer/than/that", 10) == "see\n/a/path/longer/than/that"
