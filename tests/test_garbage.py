"""What garbage collection is spared when a model is loaded."""

import gc
import weakref

import pytest

from qwencli.garbage import gc_freeze_loaded


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("freezing")
def test_what_a_load_leaves_is_collected_and_what_was_there_is_not_looked_through() -> None:
    gc.unfreeze()
    seen: list[int] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(len(gc.get_objects()))

    before = Circle()
    gc.callbacks.append(watch)
    try:
        with gc_freeze_loaded():
            kept, dropped = Circle(), weakref.ref(Circle())
    finally:
        gc.callbacks.remove(watch)
    assert dropped() is None
    assert seen
    assert max(seen) < 2000, "libraries have a hundred times as many"
    assert not any(each in (before, kept) for each in gc.get_objects())


@pytest.mark.usefixtures("freezing")
def test_a_load_that_fails_takes_nothing_out() -> None:
    before = Circle()
    with pytest.raises(ValueError, match="no model"), gc_freeze_loaded():
        raise ValueError("no model")
    assert any(each is before for each in gc.get_objects())
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("freezing")
def test_a_load_that_is_interrupted_at_its_end_takes_nothing_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gc, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt), gc_freeze_loaded():
            pass
    assert gc.get_freeze_count() == 0
