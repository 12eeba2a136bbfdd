"""The remote engine against a small server that fails in the ways servers do."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwencli.bench.plan import prepare as preparing
from qwencli.bench.plan.campaign_plan import dump_spec, load_spec
from qwencli.bench.plan.environment import environment
from qwencli.bench.plan.stopping import Progress, RepetitionOptions
from qwencli.bench.run import worker
from qwencli.cli import run
from qwencli.config import (
    DType,
    EngineConfig,
    EngineName,
    LoadFormat,
    ModelSource,
    ModelSpec,
    SamplingOptions,
)
from qwencli.engine import endpoint_pool, openai_client, remote
from qwencli.engine.client import generate_many
from qwencli.engine.machine.device import DeviceFacts
from qwencli.engine.openai_client import OpenAIClient, endpoint_url
from qwencli.engine.remote import RemoteEngine
from qwencli.errors import (
    AnswerError,
    EndpointError,
    InputError,
    UnsupportedModeError,
    UsageError,
)
from qwencli.messages import GenerationRequest, ImagePart, user_message
from tests.engine.openai_server import MODEL, StandIn, seen


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_pool, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(endpoint_pool, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setenv(remote.KEY_VARIABLE, "")  # or what a command sets would stay
    monkeypatch.delenv(remote.KEY_VARIABLE)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn().running() as stand_in:
        yield stand_in


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = []
    for number in range(24):
        paths.append(tmp_path / f"{number:02}.png")
        Image.new("RGB", (40, 30), (number, 0, 0)).save(paths[-1])
    return paths


def engine(*stand_ins: StandIn, model: str = MODEL, **settings: object) -> RemoteEngine:
    urls = tuple(stand_in.url for stand_in in stand_ins)
    spec = ModelSpec(model, ModelSource.REMOTE)
    return RemoteEngine(EngineConfig(spec, EngineName.REMOTE, endpoints=urls, **settings))


def asked(colour: int = 1, size: tuple[int, int] = (40, 30), **said: object) -> GenerationRequest:
    picture = ImagePart(Image.new("RGB", size, (colour, 0, 0)), f"{colour}.png")
    return GenerationRequest((user_message("What?", (picture,)),), SamplingOptions(**said))


def caption(*arguments: object) -> int:
    return run(["caption", *map(str, arguments)])


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_an_answer_is_streamed_and_what_is_not_known_is_none(server: StandIn) -> None:
    server.step_s = 0.002
    with engine(server) as remote_engine:
        chunks = list(remote_engine.stream(asked(max_new_tokens=9)))
    result = chunks[-1].result
    assert result is not None
    assert "".join(chunk.text for chunk in chunks) == result.text == "A picture 40x30 of 1,0,0"
    # Others, which say nothing, come while nothing comes.
    assert len([chunk for chunk in chunks if chunk.text or chunk.result]) == 6
    assert (result.num_prompt_tokens, result.num_image_tokens, result.num_new_tokens) == (
        20,
        None,
        10,
    )
    # Pieces that come together have nothing between them.
    assert len(result.itl_ms) == 4 and min(result.itl_ms) >= 0
    assert result.timings.ttft_s > 0 and result.timings.decode_tok_per_s > 0
    assert result.timings.load_s is None and result.timings.prefill_s is None
    assert result.effective.device == server.url and result.effective.quantization is None
    (body,) = server.bodies
    assert body["max_tokens"] == 9 and "temperature" not in body and "seed" not in body


def test_settings_travel_under_the_names_that_servers_know(server: StandIn) -> None:
    server.models = [{"id": MODEL, "owned_by": "llamacpp"}]
    request = GenerationRequest(
        (user_message("What?"),),
        SamplingOptions(do_sample=False, repetition_penalty=1.1, seed=-1, stop=("\n",)),
        ignore_eos=True,
        starts_with="An",
        schema='{"type": "object"}',
    )
    with engine(server) as remote_engine:
        assert remote_engine.generate(request).text == " answer."
    (body,) = server.bodies
    assert (body["temperature"], body["repeat_penalty"], body["stop"]) == (0.0, 1.1, ["\n"])
    assert "seed" not in body and "repetition_penalty" not in body
    assert body["messages"][-1] == {"role": "assistant", "content": "An"}
    assert body["continue_final_message"] and body["ignore_eos"] and body["min_tokens"] == 512
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "chat_template_kwargs" not in body


@pytest.mark.parametrize(
    ("owner", "budget", "sent"),
    [
        ("vllm", 64, {"thinking_token_budget": 64}),
        ("llamacpp", 64, {"thinking_budget_tokens": 64}),
        ("vllm", 0, {}),
        ("vllm", None, {}),
    ],
)
def test_a_thinking_budget_is_asked_for(
    server: StandIn, owner: str, budget: int | None, sent: dict[str, int]
) -> None:
    server.models = [{"id": MODEL, "owned_by": owner}]
    request = GenerationRequest((user_message("What?"),), thinking=True, thinking_budget=budget)
    with engine(server) as remote_engine:
        remote_engine.generate(request)
    (body,) = server.bodies
    assert body["chat_template_kwargs"] == {"enable_thinking": budget != 0}
    assert {name: body[name] for name in body if name.startswith("thinking")} == sent


@pytest.mark.parametrize(("said", "known"), [(False, False), (True, True), ("yes", None)])
def test_a_server_of_ours_says_whether_its_model_thinks(server: StandIn, said, known) -> None:
    server.models = [{"id": MODEL, "owned_by": "qwencli", "can_think": said}]
    with engine(server) as remote_engine:
        assert remote_engine.can_think is known


def test_a_server_says_of_what_kind_its_model_is_and_so_how_it_counts_in_boxes(
    server: StandIn, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"bbox_2d": [0, 500, 1000, 1000], "label": "ring"}
    server.say = lambda body: json.dumps([found])
    boxes = (pictures[0], "--schema", "boxes", "--overlay", "none", "--endpoint", server.url)
    assert caption(*boxes) == 2
    assert "vLLM: --served-model-name" in capsys.readouterr().err
    server.models = [{"id": MODEL, "owned_by": "qwencli", "model_type": "qwen3_vl"}]
    assert caption(*boxes) == 0
    assert '"bbox_2d": [0, 15, 40, 30]' in capsys.readouterr().out
    with StandIn().running() as other, engine(server, other) as remote_engine:
        assert remote_engine.model_type is None  # either may be asked


@pytest.mark.parametrize(
    ("says", "flags", "line"),
    [
        ({"can_think": False}, ("--think",), "cannot think before it answers"),
        ({"can_think": False}, ("--schema", "boxes", "--thinking-budget", "9"), "cannot think"),
        ({"model_type": "qwen3"}, (), "reads text only"),
    ],
)
def test_what_a_server_of_ours_says_its_model_cannot_do_is_not_asked_of_it(
    server: StandIn, pictures: list[Path], capsys: pytest.CaptureFixture[str], says, flags, line
) -> None:
    server.models = [{"id": MODEL, "owned_by": "qwencli", "model_type": "qwen3_vl"} | says]
    assert caption(pictures[0], *flags, "--endpoint", server.url) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error:") == 1 and f"{MODEL} {line}" in err
    assert caption(pictures[0].parent, *flags[-2:], "--endpoint", server.url) in (1, 2)
    with engine(server) as remote_engine, pytest.raises(UnsupportedModeError, match=line):
        remote_engine.generate(replace(asked(), thinking=True))
    assert server.bodies == []


def test_a_server_that_ignores_thinking_is_told_of(server: StandIn) -> None:
    with engine(server) as remote_engine:
        assert remote_engine.can_think is None
        asked = remote_engine.generate(GenerationRequest((user_message("?"),), thinking=True))
        plain = remote_engine.generate(GenerationRequest((user_message("?"),)))
    assert "no thoughts" in " ".join(asked.notes) and not plain.notes


@pytest.mark.parametrize(
    ("size", "most", "sent"),
    [((40, 30), None, "40x30"), ((400, 300), 10_000, "115x86"), ((1600, 1200), None, "1600x1200")],
)
def test_pictures_are_prepared_to_max_pixels(
    server: StandIn, size: tuple[int, int], most: int | None, sent: str
) -> None:
    with engine(server, max_pixels=most) as remote_engine:
        result = remote_engine.generate(asked(size=size))
    assert result.text.startswith(f"A picture {sent} of")
    assert result.image_sizes == (size,)
    assert "x".join(map(str, result.resized_sizes[0])) == sent


def test_thoughts_are_told_from_the_answer(server: StandIn) -> None:
    with engine(server) as remote_engine:
        server.say = lambda body: "<think>Hm, well.</think> Yes."
        chunks = list(remote_engine.stream(asked()))
        assert "".join(chunk.text for chunk in chunks) == "Yes."
        server.say = lambda body: "Hm, well.</think> Yes."
        results = [chunks[-1].result, remote_engine.generate(asked())]
    assert [(each.thoughts, each.text) for each in results] == [("Hm, well.", "Yes.")] * 2


def test_without_usage_pieces_are_counted_and_it_is_said(server: StandIn) -> None:
    server.usage = False
    with engine(server) as remote_engine:
        result = remote_engine.generate(asked())
    assert result.num_new_tokens == 5 and result.num_prompt_tokens is None
    assert "counts no tokens" in result.notes[0]


def test_what_reads_an_answer_is_closed_before_the_loop_ends(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python finds that nobody reads any more and has the loop close it, which else says on stderr
    that it was still to do."""
    closed = []

    async def pieces() -> AsyncGenerator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0.1)
            closed.append(True)

    async def leave_one(client: OpenAIClient) -> None:
        left = pieces()
        await anext(left)

    monkeypatch.setattr(OpenAIClient, "close", leave_one)
    with engine(server) as remote_engine:
        assert remote_engine.generate(asked()).text
    assert closed == [True]


def test_a_whole_answer_in_place_of_a_stream(server: StandIn) -> None:
    server.fault = lambda number: "whole"
    with engine(server) as remote_engine:
        result = remote_engine.generate(asked())
    assert result.text == "A picture 40x30 of 1,0,0"
    assert result.timings.ttft_s is None and result.timings.decode_tok_per_s is None


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "drop", "html", "no json"])
def test_a_failure_is_tried_again(server: StandIn, fault: str) -> None:
    server.fault = lambda number: fault if number < 2 else ""
    with engine(server) as remote_engine:
        assert remote_engine.generate(asked()).text == "A picture 40x30 of 1,0,0"
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("400", InputError, "refuses the request: asked to fail with 400"),
        ("413", InputError, "refuses the request"),
        ("401", EndpointError, "wants an API key (asked to fail"),
        ("404", EndpointError, "has no model 'stand-in', or no such API"),
        ("500", AnswerError, "failed with status 500: asked to fail with 500"),
        ("html", AnswerError, "sent something that is not a stream of events"),
        ("no json", AnswerError, "sent something that is not JSON"),
        ("deep", AnswerError, "sent something that is not JSON"),
        ("202", AnswerError, "sent status 202 for an answer"),
        ("301", EndpointError, "sends its clients on to http://elsewhere.example/v1"),
        ("error inside", AnswerError, "sent an error: out of memory"),
        ("cut", AnswerError, "broke off its answer"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    server: StandIn, fault: str, error: type[Exception], said: str
) -> None:
    server.fault = lambda number: fault
    with engine(server) as remote_engine, pytest.raises(error) as caught:
        remote_engine.generate(asked())
    assert type(caught.value) is error
    assert said in caught.value.message and server.url in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("whole", "sent more than 0 MiB where it has to be less"),
        ("", "sent more than 0 MiB where it has to be less"),
    ],
)
def test_an_answer_without_an_end_does_not_fill_the_memory(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    with engine(server) as remote_engine:
        monkeypatch.setattr(openai_client, "MOST_BYTES", 50)
        server.fault = lambda number: fault
        with pytest.raises(AnswerError) as caught:
            remote_engine.generate(asked())
        assert said in caught.value.message
        monkeypatch.setattr(openai_client, "MOST_BYTES", 300)  # an event has less, the answer more
        server.fault = lambda number: ""
        assert remote_engine.generate(asked()).text == "A picture 40x30 of 1,0,0"


def test_a_list_or_an_error_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "MOST_BYTES", 5_000)
    for status in (200, 500):
        with StandIn(listing=(status, b" " * 10_000)).running() as wrong:
            with pytest.raises(EndpointError) as caught:
                engine(wrong).load()
            assert "does not answer as OpenAI's API does" in caught.value.message


def test_figures_that_nobody_means_are_not_known(server: StandIn) -> None:
    server.fault = lambda number: "absurd"
    with engine(server) as remote_engine:
        result = remote_engine.generate(asked())
    assert result.text == "A picture 40x30 of 1,0,0"
    assert result.timings.prefill_s is result.timings.preprocess_s is None
    assert result.timings.vision_encode_s is None and result.num_new_tokens == 1


def test_an_answer_in_parts_is_the_text_of_them(server: StandIn) -> None:
    server.fault = lambda number: "parts"
    with engine(server) as remote_engine:
        assert remote_engine.generate(asked()).text == "A picture 40x30 of 1,0,0"


@pytest.mark.parametrize(
    ("listing", "said"),
    [
        ((200, b"[" * 100_000), "does not answer as OpenAI's API does"),
        ((200, b'{"data": 5}'), "does not answer as OpenAI's API does"),
        ((302, b""), "sends its clients on to http://elsewhere.example/v1"),
        ((400, b"\xff"), "refuses the request: status 400"),
    ],
)
def test_a_list_that_is_none_costs_that_server_only(
    server: StandIn, listing: tuple[int, bytes], said: str
) -> None:
    with StandIn(listing=listing).running() as wrong:
        with pytest.raises(EndpointError) as caught:
            engine(wrong).load()
        assert said in caught.value.message and caught.value.hint
        with engine(wrong, server) as both:
            assert said in both.load_warnings[0]
            assert both.generate(asked()).text == "A picture 40x30 of 1,0,0"


def test_a_stream_that_was_shown_is_not_begun_anew(server: StandIn) -> None:
    server.fault = lambda number: "cut"
    with engine(server) as remote_engine, pytest.raises(AnswerError, match="broke off"):
        list(remote_engine.stream(asked()))
    assert len(server.bodies) == 1


def test_a_server_that_hangs_is_given_up(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "SILENCE_S", 0.1)
    monkeypatch.setattr(openai_client, "HANG_S", 0.3)
    monkeypatch.setattr(endpoint_pool, "ATTEMPTS", 2)
    server.fault = lambda number: "hang"
    with engine(server) as remote_engine, pytest.raises(AnswerError, match="said nothing"):
        remote_engine.generate(asked())
    until_s = time.monotonic() + 30  # what it was sent it may read later
    while len(server.bodies) < 2 and time.monotonic() < until_s:
        time.sleep(0.01)
    assert len(server.bodies) == 2


def test_one_that_is_slow_but_lives_is_waited_for(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_client, "SILENCE_S", 0.02)
    server.step_s = 0.05
    with engine(server) as remote_engine:
        assert remote_engine.generate(asked()).text
    assert len(server.bodies) == 1


def test_abandoned_streams_cancel_and_leave_the_engine_usable(server: StandIn) -> None:
    server.step_s = 0.01
    with engine(server) as remote_engine:
        stream = remote_engine.stream(asked())
        next(stream)
        stream.close()
        assert remote_engine.generate(asked(2)).text.endswith("of 2,0,0")


def test_requests_are_shared_by_how_many_run(server: StandIn) -> None:
    server.step_s = 0.005
    with StandIn(step_s=0.005).running() as other, engine(server, other) as remote_engine:
        results = list(generate_many(remote_engine, (asked(n) for n in range(20))))
    assert [result.text for result in results] == [f"A picture 40x30 of {n},0,0" for n in range(20)]
    assert min(len(server.bodies), len(other.bodies)) >= 6
    assert server.most_at_once > 2


@pytest.mark.parametrize(
    "said", ["", "ftp://host", "http://", "http://host:port", "http://a b", "http://[::1"]
)
def test_what_is_no_address_is_refused(said: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        endpoint_url(said)


@pytest.mark.parametrize(
    ("said", "url"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://host:1/", "http://host:1/v1"),
        ("https://host/api/v1/", "https://host/api/v1"),
        ("http://host/v1/chat/completions", "http://host/v1"),
        ("[::1]:80", "http://[::1]:80/v1"),
    ],
)
def test_addresses_are_completed(said: str, url: str) -> None:
    assert endpoint_url(said) == url


def test_captions_through_a_server(
    server: StandIn, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(pictures[3], "--endpoint", server.url, "--json", "--stats") == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["caption"] == "A picture 40x30 of 3,0,0"
    assert (record["model"], record["engine"], record["device"]) == (MODEL, "remote", server.url)
    assert record["quantization"] is record["num_image_tokens"] is None
    assert record["timings"]["prefill_s"] is None and record["timings"]["ttft_s"] > 0
    assert "prompt 20 | TTFT" in err and f"remote on {server.url}" in err


@pytest.mark.parametrize("of_a_folder", [False, True])
def test_ttft_has_no_imports_in_it(
    server: StandIn, pictures: list[Path], of_a_folder: bool
) -> None:
    """Of a fresh process: a request's time has no import of ours in it, and numpy is not needed."""
    code = """
import sys
from qwencli.cli import run
from qwencli.engine import endpoint_pool
from qwencli.engine.openai_format import AnswerReader, encode_request

def encoded(*arguments):
    begun.append(set(sys.modules))
    return encode_request(*arguments)

def result(reader):
    new = set(sys.modules) - begun[0]
    late.extend(name for name in new if name.startswith(("PIL", "httpx", "qwencli.engine")))
    return finish(reader)

begun, late, finish = [], [], AnswerReader.result
endpoint_pool.encode_request, AnswerReader.result = encoded, result
code = run(sys.argv[1:])
assert begun and not late and "numpy" not in sys.modules, late
sys.exit(code)
"""
    where = pictures[0].parent if of_a_folder else pictures[0]
    done = subprocess.run(
        [sys.executable, "-c", code, "caption", str(where), "--endpoint", server.url],
        timeout=120, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_request_begins_once_its_pictures_are_open(server: StandIn) -> None:
    def opened() -> GenerationRequest:
        time.sleep(0.5)
        return asked()

    with engine(server) as remote_engine:
        (result,) = generate_many(remote_engine, [opened])
    assert result.timings.e2e_s < 0.5


def test_a_folder_whose_second_server_is_killed_midway(
    server: StandIn, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server.step_s = 0.01
    with StandIn(step_s=0.01).running() as other:
        other.fault = lambda number: killed.set() or "" if number == 5 else ""
        killed = threading.Event()
        killer = threading.Thread(target=lambda: killed.wait(10) and other.kill())
        killer.start()
        folder = pictures[0].parent
        endpoints = ("--endpoint", server.url, "--endpoint", other.url)
        assert caption(folder, *endpoints, "--engine", "remote") == 0
        killer.join()
    for number, path in enumerate(pictures):
        said = path.with_suffix(".txt").read_text("utf-8").strip()
        assert said == f"A picture 40x30 of {number},0,0"
    err = capsys.readouterr().err
    assert "24 captioned, 0 failed" in err
    gone = f"warning: {other.url} does not answer any more; the others are asked meanwhile"
    assert [line for line in err.splitlines() if "warning" in line] == [gone]


def test_servers_that_die_are_told_of_and_that_they_are_back(server: StandIn) -> None:
    with engine(server) as remote_engine:
        server.fault = lambda number: "drop" if number < 2 else ""
        assert remote_engine.generate(asked()).text
        assert remote_engine.load_warnings == ()  # it was there all the time
        server.fault = lambda number: "drop" if number < 5 else ""
        server.listing = (503, b"{}")
        assert remote_engine.generate(asked()).text
        gone, back = remote_engine.load_warnings
    assert (gone, back) == (f"{server.url} does not answer any more", f"{server.url} answers now")


def test_where_all_are_dead_all_are_named(server: StandIn) -> None:
    with StandIn().running() as other, engine(server, other) as remote_engine:
        server.kill()
        other.kill()
        with pytest.raises(EndpointError) as told:
            remote_engine.generate(asked())
    assert server.url in told.value.message and other.url in told.value.message
    with pytest.raises(EndpointError) as told:
        engine(server, other).load()
    assert server.url in told.value.message and other.url in told.value.message


def test_a_picture_that_always_fails_costs_its_caption_only(
    server: StandIn, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures[0].parent
    server.say = lambda body: "bad" if seen(body).endswith("of 7,0,0") else "Good."
    server.fault = lambda number: "500" if server.say(server.bodies[number]) == "bad" else ""
    assert caption(folder, "--endpoint", server.url) == 1
    assert "07.png" in (err := capsys.readouterr().err) and "status 500" in err
    assert sorted(path.stem for path in folder.glob("*.txt")) == [
        path.stem for path in pictures if path.stem != "07"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quantization", "4bit"), "--quantization belongs to the server of --endpoint"),
        (("--attention", "sdpa"), "belongs to the server"),
        (("--cache", "static"), "belongs to the server"),
        (("--device", "cuda"), "--device belongs to the server"),
        (("--engine", "native"), "--endpoint and --engine native exclude each other"),
        (("--devices", "all"), "--devices and --endpoint exclude each other"),
        (("--model", "other"), "has no model 'other'"),
    ],
)
def test_options_that_are_the_servers_own(
    server: StandIn,
    pictures: list[Path],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    assert caption(pictures[0], "--endpoint", server.url, *arguments) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and said in err
    assert not server.bodies


def test_servers_that_cannot_be_used(
    server: StandIn, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert caption(pictures[0], *arguments) in (1, 2)
        out, err = capsys.readouterr()
        assert out == "" and len(err.strip().splitlines()) <= 2, err
        return err

    refused = f"http://127.0.0.1:{free_port()}"
    assert "cannot be reached (connection refused)" in said("--endpoint", refused)
    assert "cannot be reached (connection refused)" in said("--endpoint", refused, "--model", "m")
    assert "needs a server" in said("--engine", "remote")
    server.key = "secret"
    assert "wants an API key" in said("--endpoint", server.url)
    assert "refuses the API key" in (err := said("--endpoint", server.url, "--api-key", "tip"))
    assert "tip" not in err
    assert caption(pictures[0], "--endpoint", server.url, "--api-key", "secret") == 0
    server.key = None
    server.models = [{"id": "a"}, {"id": "b"}]
    capsys.readouterr()
    assert "choose with --model: a, b" in said("--endpoint", server.url)
    server.models = []
    assert "has no model" in said("--endpoint", server.url)
    server.models = [{"id": MODEL}]
    wrong = server.url.replace("/v1", "/v2/other")
    assert caption(pictures[0], "--endpoint", wrong, "--quiet") == 0  # it looks at the end alone
    capsys.readouterr()
    # One of two: the other does the work, and a warning says so.
    assert caption(pictures[0], "--endpoint", refused, "--endpoint", server.url) == 0
    assert "cannot be reached" in capsys.readouterr().err
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        talk = threading.Thread(target=_answers_nonsense, args=(silent,), daemon=True)
        talk.start()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not speak HTTP" in said("--endpoint", address)


def _answers_nonsense(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"220 mail ready\r\n\r\n")
        connection.recv(1000)  # the other end leaves


def test_a_chat_through_a_server(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "Hello?", "--endpoint", server.url]) == 0
    assert capsys.readouterr().out == "An answer.\n"


def test_a_campaign_measures_a_server(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cell as a worker measures it; modes that are the server's are skipped."""
    facts = DeviceFacts("cpu", None, None, None, None, "2.13", None, None, "no flash", None)
    monkeypatch.setattr(preparing, "read_device_facts", lambda device: facts)
    server.say = lambda body: " ".join(["word"] * body["max_tokens"])
    request = preparing.BenchRequest(
        matrix="quick", exclude=(), repetition=RepetitionOptions(runs=2), max_new_tokens=8,
        prompt=None,
        axes={"engine": "remote", "quantization": "none,8bit", "attention": "sdpa",
              "cache": "dynamic"},
        images=(), seed=0, device="auto", dtype=DType.AUTO, load_format=LoadFormat.AUTO,
        max_seq_len=None, quality_samples=0, endpoints=(server.url,),
    )  # fmt: skip
    plan, _ = preparing.prepare(request)
    cell, skipped = plan.cells
    assert cell.skip_reason is None and "belongs to the server" in str(skipped.skip_reason)
    assert plan.document()["endpoints"] == [server.url]
    messages: list[dict[str, Any]] = []
    spec = load_spec(dump_spec(plan.worker_spec(cell, 1, Progress())))
    worker.run_cell(spec, messages.append)
    rows = [message["row"] for message in messages if message["type"] == "run"]
    assert [row["status"] for row in rows] == ["warmup", "ok", "ok"]
    assert all(row["ttft_s"] > 0 and row["num_new_tokens"] == 16 for row in rows)
    assert all(row["ran_cache"] is row["prefill_s"] is None for row in rows)
    assert all(len(each["tokens"]) == 8 for each in messages if each["type"] == "run")
    assert messages[-1] == {"type": "end", "status": "ok", "reason": None}
    assert all(body["ignore_eos"] and body["min_tokens"] == 8 for body in server.bodies)
    assert run(["bench", "--engine", "remote"]) == 2
    assert "needs a server" in capsys.readouterr().err


def test_no_file_of_a_campaign_has_the_key() -> None:
    said = ["bench", "--api-key", "sekret", "--api-key=sekret", "--runs", "2"]
    facts = DeviceFacts("cpu", None, None, None, None, "2.13", None, None, None, None)
    told = environment(facts, said, 0)["command_line"]
    assert told == ["qwencli", "bench", "--api-key", "***", "--api-key=***", "--runs", "2"]
