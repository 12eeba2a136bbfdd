"""Headless Chromium, driven over a pipe (DevTools protocol): no package is needed."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Page:
    """One page of a running browser."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._numbers = itertools.count(1)
        self._held = b""
        self.session: str | None = None
        self.told: list[dict[str, Any]] = []

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": values}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 30
        while time.monotonic() < until:
            answer = self._next(until)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.told.append(answer)
        raise TimeoutError(method)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._held:
            if not select.select([self._reads], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser says nothing")
            self._held += os.read(self._reads, 1 << 20)
        line, _, self._held = self._held.partition(b"\0")
        return json.loads(line)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        answer = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < until, f"{script} stayed false"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    @property
    def problems(self) -> list[str]:
        """What scripts threw, and what the browser logged as an error."""
        found = []
        for each in self.told:
            values = each.get("params", {})
            if each.get("method") == "Runtime.exceptionThrown":
                found.append(str(values["exceptionDetails"]))
            if each.get("method") == "Log.entryAdded" and values["entry"]["level"] == "error":
                found.append(str(values["entry"]))
        return found


@contextmanager
def opened(address: str, size: tuple[int, int] = (1240, 800), dark: bool = False) -> Iterator[Page]:
    """A page at an address, loaded."""
    assert PROGRAM is not None, "callers looked"
    # Above the numbers that the browser wants them at.
    low = (*os.pipe(), *os.pipe())
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    their_in, our_out, our_in, their_out = ends
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    flags += [f"--window-size={size[0]},{size[1]}", "--no-first-run"]
    flags += ["--force-dark-mode"] if dark else []

    def place() -> None:
        os.dup2(their_in, 3)
        os.dup2(their_out, 4)

    browser = subprocess.Popen(
        [PROGRAM, *flags, "about:blank"],
        preexec_fn=place,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    page = Page(our_in, our_out)
    try:
        target = page.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = page.ask("Target.attachToTarget", targetId=target, flatten=True)
        page.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            page.ask(f"{domain}.enable")
        page.ask("Page.navigate", url=address)
        page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        yield page
    finally:
        browser.kill()
        browser.wait()
        for end in ends:
            os.close(end)
