from __future__ import annotations

from qwencli.engine.instruments.device_events import DeviceEvents
from qwencli.engine.instruments.disturbances import compile_for, forget_compilations


def test_compiling_on_purpose_is_compiling():
    compile_for(0.0)  # imports the compiler
    with DeviceEvents("cpu") as events:
        compile_for(0.0)
        compile_for(0.0)
        forget_compilations()
    assert [span.name for span in events.spans] == ["compile", "compile"]
