from collections.abc import Callable

import pytest

from qwencli.engine.hf.generate import as_generator


def test_values_arrive_in_order_and_as_they_are_pushed() -> None:
    log: list[str] = []

    def push_all(push: Callable[[int], None]) -> None:
        for value in range(3):
            log.append(f"push {value}")
            push(value)

    for value in as_generator(push_all):
        log.append(f"got {value}")
    assert log == ["push 0", "got 0", "push 1", "got 1", "push 2", "got 2"]


def test_closing_early_unwinds_the_producer() -> None:
    log: list[str] = []

    def push_all(push: Callable[[int], None]) -> None:
        try:
            for value in range(1000):
                push(value)
        finally:
            log.append("unwound")

    values = as_generator(push_all)
    assert next(values) == 0
    values.close()
    assert log == ["unwound"]


def test_an_exception_of_the_producer_reaches_the_consumer() -> None:
    def push_all(push: Callable[[int], None]) -> None:
        push(1)
        raise ValueError("broken")

    values = as_generator(push_all)
    assert next(values) == 1
    with pytest.raises(ValueError, match="broken"):
        next(values)


def test_a_producer_that_pushes_nothing_gives_an_empty_stream() -> None:
    assert list(as_generator(lambda push: None)) == []


def test_two_streams_interleave_without_mixing() -> None:
    def counting(start: int) -> Callable[[Callable[[int], None]], None]:
        return lambda push: [push(value) for value in range(start, start + 3)] and None

    first, second = as_generator(counting(0)), as_generator(counting(10))
    mixed = [next(first), next(second), next(first), next(second), next(first), next(second)]
    assert mixed == [0, 10, 1, 11, 2, 12]
    assert list(first) == list(second) == []
