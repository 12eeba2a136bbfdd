"""The resident engine: found, started once, swapped, left, and come back from the dead."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwencli.cli import run
from qwencli.commands.start_engine import running_engine
from qwencli.config import (
    EngineConfig,
    LoadFormat,
    ModelSource,
    ModelSpec,
    Quantization,
    SamplingOptions,
)
from qwencli.engine import client
from qwencli.engine.abilities import Abilities
from qwencli.engine.client import REQUESTS_AHEAD
from qwencli.errors import (
    EngineError,
    InputError,
    OutOfMemoryError,
    QwenCliError,
    UnsupportedModeError,
    UsageError,
)
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.output import Output
from qwencli.results import GenerationChunk, GenerationResult
from qwencli.server import resident, resident_process, resident_state
from qwencli.server.frames import HEAD_BYTES, decode_frame, encode_frame, frame_lengths
from qwencli.server.resident_engine import ResidentEngine
from qwencli.server.resident_state import LOG_FILE, STATE_FILE, build, read_state, state_folder
from tests.dataset.fake_engine import FakeEngine

MODEL = ModelSpec("small", ModelSource.LOCAL, hub_config={"layers": [1, 2], "name": "a"})
CONFIG = EngineConfig(MODEL, device="cpu")


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No test meets the user's own engine, nor leaves one behind."""
    monkeypatch.setattr("platformdirs.user_state_path", lambda *_, **__: tmp_path / "qwencli")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # of processes
    yield state_folder()
    resident.stop()


def test_what_python_compiles_makes_no_other_build(monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    for module in (package / "__init__.py", package / "part" / "some.py"):
        module.touch()
    monkeypatch.setattr("qwencli.__file__", str(package / "__init__.py"))
    before = build()
    compiled = package / "part" / "__pycache__"
    compiled.mkdir()
    later = time.time() + 60
    for each in (compiled, compiled.parent, package):
        os.utime(each, (later, later))
    assert build() == before
    os.utime(package / "part" / "some.py", (later, later))
    assert build() != before


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engines that a server in this process makes."""
    engines: list[FakeEngine] = []

    def create(config: EngineConfig) -> FakeEngine:
        if config.model.name == "too large":
            raise OutOfMemoryError("it does not fit", "take a smaller one")
        engines.append(FakeEngine(config, step_s=0.005))
        return engines[-1]

    monkeypatch.setattr("qwencli.engine.factory.create_engine", create)
    monkeypatch.setattr("qwencli.engine.resolve.resolve_device", lambda device: device)
    return engines


@contextmanager
def serving(folder: Path, said: str | None = None) -> Iterator[resident_process.ResidentServer]:
    """A resident server in a thread of this process."""
    resident_state.make_folder(folder)
    servers: list[resident_process.ResidentServer] = []

    async def serve() -> None:
        servers.append(resident_process.ResidentServer(folder, said or build()))
        await servers[0].run()

    before = read_state(folder)
    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    until(lambda: read_state(folder) != before)
    try:
        yield servers[0]
    finally:
        if thread.is_alive():
            resident.stop()
        thread.join(60)
        assert not thread.is_alive()


def until(holds: Callable[[], object], most_s: float = 60.0) -> None:
    end = time.monotonic() + most_s
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def engine(config: EngineConfig = CONFIG, keep_s: float | None = 60.0) -> ResidentEngine:
    return ResidentEngine(config, keep_s, said.append)


said: list[str] = []


def asked(colour: int = 1) -> GenerationRequest:
    picture = ImagePart(Image.new("RGB", (8, 6), (colour, 0, 0)), f"{colour}.png")
    return GenerationRequest((user_message("What?", (picture,)),), SamplingOptions(seed=3))


def test_answers_are_those_of_the_engine(own_state: Path, made: list[FakeEngine]) -> None:
    with serving(own_state), engine() as there:
        result = there.generate(asked())
        assert there.max_rows == 8 and there.max_seq_len == 4096
        assert there.config == replace(CONFIG)
        expected = next(iter(FakeEngine(CONFIG).stream(asked()))).result
        assert expected is not None
        timings = replace(expected.timings, load_s=there.load_s)
        assert result == replace(expected, timings=timings)
        many = list(client.generate_many(there, (asked(n) for n in range(30))))
        assert [each.text for each in many if isinstance(each, GenerationResult)] == [
            FakeEngine(CONFIG).generate(asked(n)).text for n in range(30)
        ]
    assert len(made) == 1


def test_errors_come_back_as_they_are(own_state: Path, made: list[FakeEngine]) -> None:
    def refuse() -> GenerationRequest:
        raise InputError("no picture", "take another")

    with serving(own_state):
        with engine() as there:
            made[0].answer = lambda request: _raise(InputError("too long", "shorten it"))
            with pytest.raises(InputError, match="too long"):
                there.generate(asked())
            (error,) = client.generate_many(there, [refuse])
            assert isinstance(error, InputError) and error.hint == "take another"
            made[0].answer = lambda request: "fine"
            assert there.generate(asked()).text == "fine"
        with pytest.raises(OutOfMemoryError, match="does not fit") as caught:
            engine(replace(CONFIG, model=replace(MODEL, name="too large"))).load()
        assert caught.value.hint == "take a smaller one"
        with engine() as there:  # it recovers
            assert there.generate(asked()).text


def _raise(error: Exception) -> str:
    raise error


def test_another_model_takes_the_place_unless_it_is_busy(
    own_state: Path, made: list[FakeEngine]
) -> None:
    other = replace(CONFIG, quantization=Quantization.INT4)
    with serving(own_state), engine() as first:
        assert first.generate(asked()).text
        with engine(other) as second:  # nothing runs, though `first` is still there
            assert second.generate(asked()).text
        assert first.generate(asked()).text  # and has its model again
        assert len(made) == 3
        seen = threading.Event()
        made[-1].answer = lambda request: str(seen.wait(60))
        waiting = threading.Thread(target=first.generate, args=(asked(),))
        waiting.start()
        until(lambda: (now := resident.status()) and now.running)
        third = engine(other)
        with pytest.raises(EngineError, match="busy with small"):
            third.load()
        assert "busy with small" in third.unusable
        seen.set()
        waiting.join()


def test_a_request_waits_for_one_of_a_command_that_took_the_place_in_between(
    own_state: Path, made: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(CONFIG, quantization=Quantization.INT4)
    with serving(own_state), engine() as first, engine(other) as second:
        assert second.generate(asked()).text
        seen = threading.Event()
        made[-1].answer = lambda request: str(seen.wait(60))
        with ThreadPoolExecutor(2) as threads:
            running = threads.submit(second.generate, asked())
            until(lambda: (now := resident.status()) and now.running)
            monkeypatch.setattr(resident_process, "BUSY_S", 0.0)
            with pytest.raises(EngineError, match="busy with small"):
                first.generate(asked())
            monkeypatch.setattr(resident_process, "BUSY_S", 60.0)
            number = first.add(asked())
            time.sleep(0.3)
            first.abort(number)
            waiting = threads.submit(first.generate, asked())
            time.sleep(0.3)
            assert not waiting.done()
            seen.set()
            assert running.result(20).text and waiting.result(20).text
        assert len(made) == 3


def test_one_that_is_there_and_fits_is_used_where_nothing_is_said(
    own_state: Path, made: list[FakeEngine]
) -> None:
    fits = replace(CONFIG, load_format=LoadFormat.DUMMY)
    other = replace(fits, quantization=Quantization.FP8)
    with running_engine(fits, Output(), None, Abilities()) as here:
        assert here is made.pop() and read_state(own_state) is None  # none is started
    with serving(own_state) as server:
        with engine(fits, 45.0) as kept:
            kept.generate(asked())
        with running_engine(fits, Output(), None, Abilities()) as there:
            assert isinstance(there, ResidentEngine) and there.generate(asked()).text
        assert len(made) == 1 and server.status()["until_s"] > 40
        for config, keep_s in ((other, None), (fits, 0.0)):
            with running_engine(config, Output(), keep_s, Abilities()) as here:
                assert here is made.pop()
        assert server.has(fits)  # another model does not take its place


def test_it_leaves_when_nothing_is_asked(own_state: Path, made: list[FakeEngine]) -> None:
    with serving(own_state) as server:
        with engine(keep_s=1.0) as there:
            begun = time.monotonic()
            assert there.generate(asked()).text
            until(lambda: server.over.is_set())
        assert time.monotonic() - begun > 0.9
        until(lambda: not (own_state / STATE_FILE).exists())
    assert resident.status() is None and resident.stop() is None


def test_one_of_another_build_makes_way_unless_it_is_busy(
    own_state: Path, made: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(resident, "start_process", started.append)
    with serving(own_state, "another build") as server:
        monkeypatch.setattr(resident, "build", lambda: "another build")
        with engine() as old:
            monkeypatch.setattr(resident, "build", lambda: "this build")
            made[0].step_s = 1.0
            waiting = threading.Thread(target=old.generate, args=(asked(),))
            waiting.start()
            until(lambda: (now := resident.status()) and now.running)
            with pytest.raises(EngineError, match="no resident engine can be had"):
                engine().load()
            waiting.join()
            assert not server.over.is_set() and not started
        with pytest.raises(EngineError):
            engine().load()  # now it ends, and one of this build is to be started
        until(server.over.is_set)
    assert started == [own_state]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"pid": 1}',
        '{"pid": "1", "port": 1, "token": "", "build": ""}',
        '{"pid": 1, "port": 99999, "token": "", "build": ""}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_state_file_that_says_nothing_is_none(own_state: Path, text: str) -> None:
    resident_state.make_folder(own_state)
    (own_state / STATE_FILE).write_text(text)
    assert read_state(own_state) is None and resident.status() is None


def test_a_folder_that_cannot_be_had_costs_the_keeping_only(own_state: Path) -> None:
    """Where `unusable` says why, the command loads the model itself."""
    own_state.parent.mkdir(parents=True, exist_ok=True)
    own_state.write_text("a file where the folder would be")
    asking = engine()
    with pytest.raises(EngineError):
        asking.load()
    assert "cannot be made" in asking.unusable
    own_state.unlink()
    (own_state / LOG_FILE).mkdir(parents=True)
    with pytest.raises(EngineError):
        asking.load()
    assert str(own_state) in asking.unusable


def test_a_state_file_that_cannot_be_written_leaves_nothing(own_state: Path) -> None:
    (own_state / STATE_FILE / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"directory|denied"):
        resident_state.write_state(own_state, 1, "build")
    assert [path.name for path in own_state.iterdir()] == [STATE_FILE]


def test_a_port_that_another_program_has_by_now_keeps_nobody_waiting(own_state: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        resident_state.make_folder(own_state)
        state = {"pid": ended.pid, "port": silent.getsockname()[1], "token": "a", "build": build()}
        (own_state / STATE_FILE).write_text(json.dumps(state))
        begun = time.monotonic()
        assert resident.status() is None and resident.stop() is None
        assert time.monotonic() - begun < 20
    assert not (own_state / STATE_FILE).exists()


def test_who_does_not_know_the_token_gets_nothing(own_state: Path) -> None:
    with serving(own_state):
        state = read_state(own_state)
        assert state is not None
        assert (own_state / STATE_FILE).stat().st_mode & 0o077 == 0
        for data in (
            b"".join(encode_frame({"op": "hello", "token": "wrong"})),
            b"".join(encode_frame({"op": "hello"})),
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"".join(encode_frame({"op": "hello", "token": "x" * 10_000})),
            struct.pack("<IQ", 34, 3) + b'{"~": "Image", "size": [900, 900]}' + b"123",
        ):
            with socket.create_connection(("127.0.0.1", state.port)) as connection:
                connection.sendall(data)
                assert connection.recv(100) == b""
        assert resident.status() is not None


def test_ten_starts_make_one_process_that_comes_back_when_killed(own_state: Path) -> None:
    resident_state.make_folder(own_state)
    # What a crash has left: nobody listens there.
    stale = {"pid": 1, "port": 9, "token": "old", "build": build()}
    (own_state / STATE_FILE).write_text(json.dumps(stale))
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda _: resident.connect(own_state), range(10)))
    (pid,) = {connection.state.pid for connection in found if connection is not None}
    for connection in found:
        assert connection is not None
        connection.close()
    assert pid != 1 and len(list(own_state.glob("*.json"))) == 1
    os.kill(pid, signal.SIGKILL)
    again = resident.connect(own_state)
    assert again is not None and again.state.pid != pid
    again.close()
    begun = time.monotonic()
    ended = resident.stop()
    assert ended is not None and ended.pid == again.state.pid
    assert time.monotonic() - begun < 30
    assert not (own_state / STATE_FILE).exists()


def test_one_that_does_not_answer_is_ended(
    own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "ANSWER_S", 0.2)
    resident_state.make_folder(own_state)
    state = resident_state.start_process(own_state)
    assert state is not None
    os.kill(state.pid, signal.SIGSTOP)
    assert resident.status() is None
    ended = resident.stop()
    assert ended is not None and ended.pid == state.pid
    assert resident.stop() is None


def test_what_is_lost_midway_is_asked_again_unless_it_was_shown(
    own_state: Path, made: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    said.clear()
    dropped = threading.Event()

    def in_two_pieces(self: FakeEngine, request: GenerationRequest) -> Iterator[GenerationChunk]:
        yield GenerationChunk("one", (1,))
        dropped.wait(60)
        yield self._chunk(request)

    monkeypatch.setattr(FakeEngine, "stream", in_two_pieces)

    def drop_all(there: ResidentEngine) -> None:
        assert there._shared is not None
        there._shared._connection._socket.shutdown(socket.SHUT_RDWR)
        dropped.set()

    with serving(own_state), engine() as there:
        results: list[Any] = []
        waiting = threading.Thread(target=lambda: results.append(there.generate(asked())))
        waiting.start()
        until(lambda: (now := resident.status()) and now.running)
        drop_all(there)
        waiting.join()
        assert results[0].text and said == ["the resident engine has ended; starting it again"]
        dropped.clear()
        pieces = there.stream(asked())
        assert next(pieces).text == "one"
        drop_all(there)
        with pytest.raises(EngineError, match="in the middle of an answer"):
            list(pieces)


def test_of_a_batch_that_is_lost_midway_each_request_is_asked_again_once(
    own_state: Path, made: list[FakeEngine]
) -> None:
    """What the lost connection says of its requests is about none of the next one's."""
    said.clear()
    count = 7 * REQUESTS_AHEAD
    with serving(own_state), engine() as there:
        answers = client.generate_many(there, [asked(colour) for colour in range(count)])
        results = []
        # No request is lost twice: answers that had come before are read before the loss is, and
        # as many are asked for meanwhile.
        for taken in (8, 4 * REQUESTS_AHEAD):
            results += itertools.islice(answers, taken)
            assert there._shared is not None
            there._shared._connection._socket.shutdown(socket.SHUT_RDWR)
        results += answers
        assert [each.text for each in results if isinstance(each, GenerationResult)] == [
            FakeEngine(CONFIG).generate(asked(colour)).text for colour in range(count)
        ]
    assert said == ["the resident engine has ended; starting it again"] * 2


def test_a_caption_is_the_same_and_nothing_heavy_is_loaded_for_it(
    own_state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the real process, with the bundled model; it holds no stream of its command."""
    code = (
        "import sys; from qwencli.cli import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'httpx', 'rich', 'prompt_toolkit',"
        " 'qwencli.models.tensors', 'qwencli.dataset.sources'};"
        "assert not heavy & set(sys.modules); sys.exit(code)"
    )
    picture, bad = str(Path("examples/scene.png").resolve()), str(tmp_path / "bad.png")
    Path(bad).write_bytes(b"no picture")
    arguments = ["caption", picture, bad, "--device", "cpu", "--greedy", "--json", "--stats"]
    # Through pipes: one that stayed open would keep this waiting.
    kept = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--keep-loaded", "1m"],
        cwd=tmp_path, timeout=120, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert kept.returncode == run([*arguments, "--keep-loaded", "0"]) == 1, kept.stderr
    out, err = capsys.readouterr()
    one, other = ([json.loads(line) for line in text.splitlines()] for text in (kept.stdout, out))
    for record in (*one, *other):
        record.pop("timings", None)
    assert one == other
    numbers = re.compile(r"[\d.]+( tok/s| ms| s\b)")
    assert numbers.sub("N", kept.stderr) == numbers.sub("N", err)
    assert run(["ps", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model"], shown["device"], shown["running"]) == ("scenes", "cpu", 0)
    assert run(["ps"]) == run(["stop"]) == 0
    out, err = capsys.readouterr()
    assert "scenes  cpu" in out and "stopped (process" in err
    assert run(["ps"]) == 0 and "no model is kept loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep-loaded", "soon"), "--keep-loaded 'soon' is not a time"),
        (("--keep-loaded", "-1"), "is not a time"),
        (("--keep-loaded", "99999999h"), "is not a time"),
        (("--keep-loaded", "5m", "--endpoint", "http://127.0.0.1:9"), "exclude each other"),
    ],
)
def test_times_that_are_none(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(["caption", "a.png", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_option_environment_and_config_say_how_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from qwencli.commands.options import KeepOptions, RunOptions

    folder = tmp_path / "user-config"
    folder.mkdir()
    (folder / "config.toml").write_text('keep_loaded = "2h"\n')
    assert KeepOptions("90s").seconds(RunOptions()) == 90
    monkeypatch.setenv("QWENCLI_KEEP_LOADED", "5m")
    assert KeepOptions().seconds(RunOptions()) == 300
    monkeypatch.delenv("QWENCLI_KEEP_LOADED")
    assert KeepOptions().seconds(RunOptions()) == 7200
    (folder / "config.toml").write_text("keep_loaded = true\n")
    with pytest.raises(UsageError, match="keep_loaded: expected a time"):
        KeepOptions().seconds(RunOptions())
    (folder / "config.toml").unlink()
    assert KeepOptions().seconds(RunOptions(device="cpu")) is None
    assert KeepOptions("0").seconds(RunOptions(device="cpu")) == 0
    monkeypatch.setattr("qwencli.engine.machine.host.num_gpus", lambda: 1)
    assert KeepOptions().seconds(RunOptions()) == 300


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("backend:cudaMallocAsync", None),
        ("backend:cudaMallocAsync,garbage_collection_threshold:0.8",
         "garbage_collection_threshold:0.8"),
        ("expandable_segments:True, backend : cudaMallocAsync", "expandable_segments:True"),
        ("roundup_power2_divisions:[256:1,512:2]", "roundup_power2_divisions:[256:1,512:2]"),
    ],
)  # fmt: skip
def test_an_engine_that_comfyui_starts_has_torchs_own_allocator(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: str | None
) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    plain = build()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", value)
    assert resident_state._environment().get("PYTORCH_CUDA_ALLOC_CONF") == expected
    # A command in a terminal uses the engine that ComfyUI started, and the other way round.
    assert (build() == plain) == (expected is None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=30)
@given(value=VALUES, text=st.text())
def test_what_is_sent_is_what_comes(value: Any, text: str) -> None:
    errors: list[QwenCliError] = [InputError(text, "hint"), UnsupportedModeError("a", "b", "c")]
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    message = {
        "value": value,
        "request": GenerationRequest((user_message(text, (ImagePart(picture, "a"),)),)),
        "config": EngineConfig(MODEL, quantization=Quantization.INT8, endpoints=("a",)),
        "path": Path("a/b"),
        "errors": tuple(errors),
    }
    pieces = encode_frame(message)
    assert frame_lengths(pieces[0]) == (len(pieces[1]), sum(map(len, pieces[2:])))
    came = decode_frame(pieces[1], b"".join(pieces[2:]))
    part = came["request"].messages[0].parts[0]
    assert part.image.tobytes() == picture.tobytes()
    assert [(type(e), e.message, e.hint) for e in came.pop("errors")] == [
        (type(e), e.message, e.hint)
        for e in message.pop("errors")  # type: ignore[attr-defined]
    ]
    request, sent = came.pop("request"), message.pop("request")
    assert request.messages[0].parts[1:] == sent.messages[0].parts[1:]  # type: ignore[attr-defined]
    assert came == message


@given(text=st.binary(max_size=200), head=st.binary(min_size=HEAD_BYTES, max_size=HEAD_BYTES))
def test_nonsense_is_an_input_error(text: bytes, head: bytes) -> None:
    for read in (lambda: frame_lengths(head), lambda: decode_frame(text, b"")):
        try:
            read()
        except InputError:
            continue


KINDS = st.sampled_from(
    ["Image", "dict", "tuple", "Path", "error", "TextPart", "Quantization", "x"]
)
NONSENSE = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries(
            {"~": KINDS | inner},
            optional=dict.fromkeys(("items", "value", "size", "class", "message", "hint"), inner),
        )
    ),
    max_leaves=8,
)


@given(value=NONSENSE)
@example({"~": "Image", "size": [-1, -1]})
@example({"~": "dict", "items": []})
def test_kinds_of_what_they_are_not_are_an_input_error(value: Any) -> None:
    with contextlib.suppress(InputError):
        decode_frame(json.dumps(value).encode(), b"abc")


def test_a_picture_without_its_pixels_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects may send one, before the token is known."""
    monkeypatch.setattr(Image, "frombytes", lambda *given: pytest.fail("memory is taken for it"))
    with pytest.raises(InputError, match="pixels are missing"):
        decode_frame(b'{"~": "Image", "size": [1000, 1000]}', b"abc")
