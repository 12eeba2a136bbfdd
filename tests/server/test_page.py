"""The page at `/` in headless Chromium: it streams from the server and says how fast."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qwencli.server.page import chat_page
from tests import browser
from tests.server.conftest import Served
from tests.server.test_chat_completions import drawn


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium here")
def test_a_dropped_picture_is_captioned_and_asked_about(served: Served, tmp_path: Path) -> None:
    with browser.opened(f"{served.address}/") as page:
        page.run(
            f"""(() => {{
            const text = atob({json.dumps(drawn().partition(",")[2])});
            const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "a.png", {{ type: "image/png" }}));
            for (const kind of ["dragenter", "drop"]) {{
              const event = new Event(kind, {{ bubbles: true, cancelable: true }});
              event.dataTransfer = carried;
              dispatchEvent(event);
            }} }})()"""
        )
        done = (
            "document.querySelector('#stop').hidden && !!document.querySelector('.turn.assistant')"
        )
        page.wait_for(done)
        text = "document.querySelector('.turn.assistant:last-child').textContent"
        assert "red circle" in page.run(text)
        assert page.run("document.querySelector('.turn.user img').naturalWidth") == 224
        assert page.run("document.querySelectorAll('#timeline line').length") > 4
        assert page.run("document.querySelector('#ttft').textContent").endswith("s")
        assert "tok/s" in page.run("document.querySelector('#speed').textContent")
        assert "prefill" in page.run("document.querySelector('#phases').textContent")
        page.run(
            """(() => { document.querySelector('#prompt').value = 'How many shapes are there?';
            document.querySelector('#send').click(); })()"""
        )
        page.wait_for(f"document.querySelectorAll('.turn').length === 4 && {done}")
        assert page.run(text).strip()
        page.wait_for("document.querySelectorAll('#engine div').length > 5")
        assert page.problems == []
        # What was refused can be put right and sent again.
        page.run(
            """(() => { document.querySelector('#max').value = '99999';
            document.querySelector('#prompt').value = 'Again?';
            document.querySelector('#send').click(); })()"""
        )
        refused = "!!document.querySelector('.turn .error')"
        page.wait_for(f"{refused} && document.querySelector('#stop').hidden")
        assert page.run("document.querySelector('#prompt').value") == "Again?"
        if shots := os.environ.get("QWENCLI_SCREENSHOTS"):
            page.screenshot(Path(shots) / "page.png")


def test_the_page_is_one_file_and_what_it_shows_is_escaped() -> None:
    page = chat_page("</script><script>alert(1)</script>", asks_key=True)
    assert "alert(1)</script>" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "src=" not in page
    assert "connect-src 'self'" in page
