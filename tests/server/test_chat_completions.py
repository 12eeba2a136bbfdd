"""The real `openai` client against a server on the bundled model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from typing import Annotated, Literal

import openai
import pydantic
import pytest
from PIL import Image, ImageDraw

from qwencli.results import GenerationChunk
from qwencli.server.chat_api import ChatBody, ChatFormat
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
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 60
    while served.thread.num_unfinished and time.monotonic() < until:
        time.sleep(0.01)
    assert served.thread.num_unfinished == 0


SHAPE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["shape", "count"],
    "additionalProperties": False,
}


def test_an_answer_is_held_to_a_schema(client) -> None:
    held = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SHAPE}}
    answer = client.chat.completions.create(
        messages=asking("What is it?", drawn()), response_format=held, **SETTINGS
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"shape", "count"}


class Shape(pydantic.BaseModel):
    shape: Literal["circle", "square", "triangle"]
    count: Annotated[int, pydantic.Field(ge=0, le=9)]


def test_the_client_parses_answers_into_a_model_of_pydantic(client) -> None:
    answer = client.chat.completions.parse(
        messages=asking("What is it?", drawn()), response_format=Shape, **SETTINGS
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)
    response = client.responses.parse(
        model="scenes", input="What is it?", text_format=Shape, temperature=0, max_output_tokens=24
    )
    assert isinstance(response.output_parsed, Shape)


def test_logprobs(client) -> None:
    asked = {"messages": asking("Describe this image.", drawn()), **SETTINGS}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    told = answer.choices[0].logprobs.content
    assert "".join(each.token for each in told) == answer.choices[0].message.content
    assert all(each.logprob == each.top_logprobs[0].logprob for each in told)
    events = client.chat.completions.create(**asked, logprobs=True, stream=True)
    streamed = [t for e in events if e.choices[0].logprobs for t in e.choices[0].logprobs.content]
    assert [each.token for each in streamed] == [each.token for each in told]


def test_a_beginning_is_gone_on_with(client) -> None:
    begun = {"role": "assistant", "content": "A small"}
    answer = client.chat.completions.create(
        messages=[*asking("Describe this image.", drawn()), begun],
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
        **SETTINGS,
    )
    assert answer.choices[0].message.content.startswith(" red circle")


def test_the_same_seed_says_the_same(client) -> None:
    said = {
        client.chat.completions.create(
            model="scenes",
            messages=asking("Describe this image.", drawn()),
            temperature=1.5,
            seed=2**40 + 5,
            max_tokens=12,
        )
        .choices[0]
        .message.content
        for _ in range(3)
    }
    assert len(said) == 1


@pytest.mark.parametrize("most", [24, 3])
def test_responses_whole_and_in_events(client, most: int) -> None:
    parts = [
        {"type": "input_image", "image_url": drawn()},
        {"type": "input_text", "text": "Describe this image."},
    ]
    asked = {
        "model": "scenes",
        "input": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_output_tokens": most,
    }
    whole = client.responses.create(**asked)
    assert ("red circle" in whole.output_text) == (whole.status == "completed") == (most == 24)
    events = list(client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].type == f"response.{whole.status}"
    (done,) = (e.item for e in events if e.type == "response.output_item.done")
    assert [done] == events[-1].response.output and done.status == whole.status
    if most == 3:
        return
    held = {"format": {"type": "json_schema", "name": "shape", "schema": SHAPE}}
    assert json.loads(client.responses.create(**asked, text=held).output_text)


def test_many_clients_at_once_get_the_answers_that_they_get_alone(served: Served) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="none") as many:
            asked = [
                many.chat.completions.create(
                    messages=asking("Describe this image." + " " * (n % 2), drawn()), **SETTINGS
                )
                for n in range(6)
            ]
            return [each.choices[0].message.content for each in await asyncio.gather(*asked)]

    assert len(set(asyncio.run(all_of_them()))) <= 2
    assert served.thread.num_unfinished == 0


def test_models(client) -> None:
    assert [each.id for each in client.models.list()] == ["scenes"]
    assert client.models.retrieve("scenes").id == "scenes"
    assert client.models.retrieve("scenes").model_type == "qwen3_vl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize(
    ("said", "thinks", "most"),
    [
        ({}, False, None),
        ({"thinking_token_budget": 64}, True, 64),
        ({"thinking_budget": 64, "enable_thinking": True}, True, 64),
        ({"chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 9}}, True, 9),
        ({"thinking_budget_tokens": 0}, False, 0),
        ({"reasoning_effort": "low", "thinking_token_budget": 5}, True, 5),
        ({"reasoning_effort": "none", "thinking_token_budget": 5}, False, 0),
        ({"enable_thinking": False, "thinking_token_budget": 5}, False, 0),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, 0),
        ({"reasoning_effort": "none"}, False, 0),
    ],
)
def test_a_thinking_budget_has_the_names_that_servers_give_it(said, thinks, most) -> None:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "hi"}], **said})
    assert (body.thinks, body.most_thinking) == (thinks, most)


@pytest.mark.parametrize("budget", [-1, "9"])
def test_a_budget_that_means_nothing_is_refused(client, budget) -> None:
    with pytest.raises(openai.BadRequestError, match="thinking_token_budget"):
        client.chat.completions.create(
            messages=asking("hi"), extra_body={"thinking_token_budget": budget}, **SETTINGS
        )


@pytest.mark.parametrize(
    "asked",
    [
        {"thinking_token_budget": 9},
        {"enable_thinking": True},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"reasoning_effort": "low"},
    ],
)
def test_thoughts_of_a_model_that_has_none_are_refused_before_pictures_are_read(
    client, asked
) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [broken]}]
    with pytest.raises(
        openai.BadRequestError, match=r"cannot think before it answers.*\(leave out"
    ):
        client.chat.completions.create(messages=messages, extra_body=asked, **SETTINGS)
    off = {name: 0 if value == 9 else "none" for name, value in asked.items()}
    if "enable_thinking" not in str(asked):
        client.chat.completions.create(messages=asking("hi"), extra_body=off, **SETTINGS)


def test_a_piece_of_text_alone_is_the_event_that_it_is_among_others() -> None:
    """Most pieces are text alone, and are written without a look at all else they may have."""
    question = [{"role": "user", "content": "Hi"}]
    form = ChatFormat(ChatBody.model_validate({"messages": question}), "scenes")
    for text in ("word", 'a "quoted"\n\\ \x00\x7f\u2028', "Größe \U0001f600", "a lone \ud800 half"):
        piece = GenerationChunk(text, (1,))
        event = form.events([piece])
        assert event == b"".join(form._events([piece]))
        assert event.startswith(b"data: {") and event.endswith(b"}\n\n")
        said = json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"]
        assert said == {"content": text.replace("\ud800", "?")}
    assert form.events([GenerationChunk("", (1,))]) == b""
