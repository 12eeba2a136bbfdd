"""The real `openai` client against a server on the bundled model."""

from __future__ import annotations

import base64
import io
import time

import openai
import pytest
from PIL import Image, ImageDraw

from tests.server.conftest import Served


@pytest.fixture(scope="module")
def client(served: Served):
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as made:
        yield made


def drawn() -> str:
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((60, 60, 160, 160), fill="red")
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def asking(text: str, *urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


SETTINGS = {"model": "scenes", "temperature": 0, "max_tokens": 24}


def test_a_picture_is_described(client) -> None:
    answer = client.chat.completions.create(
        messages=asking("Describe this image.", drawn()), **SETTINGS
    )
    assert "red circle" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens > 0
    assert usage.timings["ttft_s"] > 0


def test_pieces_are_the_whole_answer(client) -> None:
    asked = {"messages": asking("Describe this image.", drawn()), **SETTINGS}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    events = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] in ("stop", "length")
    assert events[-1].usage.completion_tokens > 1
    assert events[0].choices[0].delta.role == "assistant"


def test_a_client_that_goes_ends_its_request(client, served: Served) -> None:
    stream = client.chat.completions.create(
        model="scenes",
        messages=asking("Count.", drawn()),
        max_tokens=4000,
        temperature=2,
        stream=True,
    )
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 5
    while served.thread.num_unfinished and time.monotonic() < until:
        time.sleep(0.01)
    assert served.thread.num_unfinished == 0
