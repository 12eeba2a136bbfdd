"""The process that works on the device, so that a crash or a hang there is an answer too.

python -m qwencli.engine.instruments.probes.child

stdin     JSON lines {"probe": name, "device": ..., "work": {...}}; closing it ends the process
stdout    one JSON line for each: {"value": ...} or {"error": "...", "kind": "..."}
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

from qwencli.engine.instruments.probes.answers import PROBES, EngineWork, Work, decode, dumps


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one probe; whatever it raises is its answer."""
    name, device = request["probe"], request["device"]
    kind = EngineWork if name == "engine" else Work
    try:
        if device.startswith("cuda"):
            import torch

            # Graphs, Triton and flash-attn work on the current device, whatever their tensors say.
            torch.cuda.set_device(device)
        value = PROBES[name].function()(device, decode(kind, request["work"]))
    except Exception as error:  # noqa: BLE001 - that it fails, and how, is what was asked
        return {"error": str(error).strip() or "no message", "kind": type(error).__name__}
    return {"value": value}


def main() -> int:
    # Answers get a descriptor of their own; what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        answers.write(dumps(answer(json.loads(requests.get()))) + "\n")
        answers.flush()


def _read(requests: queue.SimpleQueue[str]) -> None:
    """Pass lines on, and end the process with its parent, even in the middle of a probe."""
    with os.fdopen(os.dup(0), encoding="utf-8") as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
