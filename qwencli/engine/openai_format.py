"""A request as OpenAI's chat completions want it, and the answer that comes back.

Pictures travel as data URLs. What OpenAI has no name for is sent by vLLM's names (`top_k`,
`repetition_penalty`, `ignore_eos`), which SGLang and our own server have too, and only where a user
asked for it. Knows nothing of connections.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwencli.config import EngineConfig, SamplingOptions, SamplingParams
from qwencli.engine.frontend.detokenizer import ThoughtSplitter
from qwencli.engine.frontend.processor_config import check_visual, smart_resize
from qwencli.engine.frontend.tokenizer import THOUGHT_END
from qwencli.messages import GenerationRequest, ImagePart, Message, TextPart, VideoPart
from qwencli.results import EffectiveConfig, FinishReason, GenerationResult, Size, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

# Where the user names no bound: what Qwen's own processors reduce a picture to at the most.
MAX_PIXELS = 16384 * 32 * 32
# PNG is exact, and takes ten times the bytes and the time of a JPEG nobody can tell from it.
_MAX_PNG_PIXELS = 1_500_000
_JPEG_QUALITY = 95
# Servers that name a setting otherwise, by `owned_by` of their models.
_OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "llamacpp": {
        "repetition_penalty": "repeat_penalty",
        "thinking_token_budget": "thinking_budget_tokens",
    },
}


@dataclass(frozen=True)
class EncodedRequest:
    """A request that is ready to be sent.

    Args:
        body: without the model, which each server may call otherwise.
        names: of the pictures.
        notes: what was done otherwise than asked for.
    """

    body: Mapping[str, Any]
    names: tuple[str, ...]
    image_sizes: tuple[Size, ...]
    resized_sizes: tuple[Size, ...]
    notes: tuple[str, ...]
    starts_with: str
    plain: bool  # data, in which nothing is a thought
    wants_thoughts: bool = False

    def json_for(self, model: str, owner: str | None) -> bytes:
        names = _OTHER_NAMES.get(owner or "", {})
        body = {names.get(name, name): value for name, value in self.body.items()}
        return json.dumps({"model": model, **body}).encode("utf-8", "replace")


def encode_request(request: GenerationRequest, config: EngineConfig) -> EncodedRequest:
    """Encode a request.

    Raises:
        InputError: a picture that no model takes.
    """
    pictures = _Pictures(config)
    messages = [
        {"role": message.role, "content": _content(message, pictures)}
        for message in request.messages
    ]
    body: dict[str, Any] = {
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **_sampling(request.sampling),
    }
    if request.starts_with:
        # The server goes on with what is said already; by default it would begin anew.
        messages.append({"role": "assistant", "content": request.starts_with})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.schema is not None:
        schema = {"name": "answer", "strict": True, "schema": json.loads(request.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.thinking or request.thinking_budget is not None:
        on = request.thinking and request.thinking_budget != 0
        body["chat_template_kwargs"] = {"enable_thinking": on}
    if request.thinking_budget:
        body["thinking_token_budget"] = request.thinking_budget
    if request.ignore_eos:
        body |= {"ignore_eos": True, "min_tokens": body["max_tokens"]}
    return EncodedRequest(
        body,
        tuple(pictures.names),
        tuple(pictures.sizes),
        tuple(pictures.resized),
        tuple(pictures.notes),
        request.starts_with,
        plain=request.schema is not None,
        wants_thoughts=request.wants_thoughts,
    )


def _sampling(said: SamplingOptions) -> dict[str, Any]:
    """What the user said; the server's own defaults stand for the rest, but for the length."""
    temperature = 0.0 if said.do_sample is False else said.temperature
    settings: dict[str, Any] = {
        "max_tokens": said.max_new_tokens or SamplingParams().max_new_tokens,
        "temperature": temperature,
        "top_p": said.top_p,
        "top_k": said.top_k,
        "min_p": said.min_p,
        "repetition_penalty": said.repetition_penalty,
        "seed": None if said.seed is None or said.seed < 0 else said.seed,
        "stop": list(said.stop) or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _content(message: Message, pictures: _Pictures) -> str | list[dict[str, Any]]:
    if all(isinstance(part, TextPart) for part in message.parts):
        return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        else:
            urls = pictures.urls(part)
            content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return content


class _Pictures:
    """Encodes the pictures of a request, and keeps their sizes before and after."""

    def __init__(self, config: EngineConfig) -> None:
        self._factor = resize_factor(config.model.hub_config)
        most = config.max_pixels or MAX_PIXELS
        self._most, self._least = most, min(most, config.min_pixels or self._factor**2)
        self.names: list[str] = []
        self.sizes: list[Size] = []
        self.resized: list[Size] = []
        self.notes: list[str] = []

    def urls(self, part: ImagePart | VideoPart) -> Iterator[str]:
        check_visual(part)
        self.names.append(part.name)
        if isinstance(part, ImagePart):
            yield self._url(part.image)
            return
        self.notes.append(f"{part.name}: its {len(part.frames)} frames are sent as pictures")
        yield from map(self._url, part.frames)

    def _url(self, image: Image) -> str:
        from PIL.Image import Resampling

        width, height = image.size
        rows, columns = smart_resize(
            height, width, factor=self._factor, min_pixels=self._least, max_pixels=self._most
        )
        self.sizes.append((width, height))
        self.resized.append((columns, rows))
        if not self._least <= width * height <= self._most:
            image = image.resize((columns, rows), Resampling.BICUBIC)
        return data_url(image)


def data_url(image: Image) -> str:
    """A picture as PNG; a large one as JPEG of high quality."""
    kind, settings = "png", {"compress_level": 1}
    if image.width * image.height > _MAX_PNG_PIXELS:
        kind, settings = "jpeg", {"quality": _JPEG_QUALITY, "subsampling": 0}
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def resize_factor(hub_config: Mapping[str, Any] | None) -> int:
    """What heights and widths become multiples of; 1 where nothing is known of the model."""
    vision = (hub_config or {}).get("vision_config")
    if not isinstance(vision, dict):
        return 1
    patch, merge = vision.get("patch_size"), vision.get("spatial_merge_size", 2)
    return patch * merge if type(patch) is int and type(merge) is int else 1


@dataclass(frozen=True)
class AnswerDelta:
    """Thoughts and text that one event of a stream adds."""

    thoughts: str
    text: str


class MalformedAnswerError(Exception):
    """What came is no answer; the text says what it is."""


@dataclass
class AnswerReader:
    """Puts the events of one answer together.

    Args:
        started_s: when the request began, on `time.perf_counter`.
        device: what the result calls the server.
    """

    sent: EncodedRequest
    started_s: float
    device: str
    finish_reason: FinishReason | None = None
    streamed: bool = True
    _thoughts: list[str] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)
    _usage: Mapping[str, Any] = field(default_factory=dict)
    _ours: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._splitter = ThoughtSplitter(inside=False)
        # Some servers say the beginning that they were given once more.
        self._echo = self.sent.starts_with

    def read(self, event: Any) -> AnswerDelta:
        """Take one event, or a whole answer.

        Raises:
            MalformedAnswerError: it is none.
        """
        if not isinstance(event, dict):
            raise MalformedAnswerError("something that is not a JSON object")
        if event.get("error"):
            raise MalformedAnswerError(f"an error: {error_text(event)}")
        self._usage = _mapping(event.get("usage")) or self._usage
        self._ours = _mapping(event.get("qwencli")) or self._ours
        choices = event.get("choices")
        if not isinstance(choices, list):
            raise MalformedAnswerError("JSON without choices")
        choice = _mapping(choices[0]) if choices else {}
        reason = choice.get("finish_reason")
        if reason:
            self.finish_reason = "length" if reason == "length" else "stop"
        delta = _mapping(choice.get("delta")) or _mapping(choice.get("message"))
        if "message" in choice:
            self.streamed = False
        thoughts = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        text = _text(delta.get("content"))
        if thoughts or text:
            self._times.append(time.perf_counter())
        if not self.sent.plain:
            found, text = self._splitter.push(text)
            thoughts += found
        return self._without_echo(thoughts, text)

    def finish(self) -> AnswerDelta:
        """What was held back until the stream ended."""
        return self._without_echo(
            *(("", "") if self.sent.plain else self._splitter.finish()), end=True
        )

    def _without_echo(self, thoughts: str, text: str, *, end: bool = False) -> AnswerDelta:
        if self._echo:
            text = "".join(self._text) + text
            self._text.clear()
            if text.startswith(self._echo):
                text, self._echo = text[len(self._echo) :], ""
            elif self._echo.startswith(text) and not end:
                self._text.append(text)
                return AnswerDelta(thoughts, "")
            else:
                self._echo = ""
        self._thoughts.append(thoughts)
        self._text.append(text)
        return AnswerDelta(thoughts, text)

    def result(self) -> GenerationResult:
        end_s = time.perf_counter()
        thoughts, text = "".join(self._thoughts).strip(), "".join(self._text)
        if not self.sent.plain and not thoughts and THOUGHT_END in text:
            # The server's template opened a thought, and nothing there took it out.
            thoughts, _, text = text.rpartition(THOUGHT_END)
            thoughts, text = thoughts.strip(), text.lstrip()
        usage, notes = self._usage, list(self.sent.notes)
        count = _number(usage.get("completion_tokens"))
        if count is None:
            count = len(self._times)
            notes.append("the server counts no tokens: pieces of its answer are counted")
        if self.sent.wants_thoughts and not thoughts:
            notes.append("thinking was asked for, and the server's answer has no thoughts")
        details = _mapping(usage.get("prompt_tokens_details"))
        thinking = _mapping(usage.get("completion_tokens_details")).get("reasoning_tokens")
        theirs = self._ours.get("notes")
        if isinstance(theirs, list):
            notes += [note for note in theirs if isinstance(note, str)]
        return GenerationResult(
            text=text,
            token_ids=(),
            finish_reason=self.finish_reason or "stop",
            num_prompt_tokens=_number(usage.get("prompt_tokens")),
            num_image_tokens=_number(details.get("image_tokens")),
            num_cached_tokens=_number(details.get("cached_tokens")) or 0,
            notes=tuple(notes),
            timings=self._timings(count, end_s),
            effective=self._effective(),
            token_t_s=tuple(self._times) if self.streamed else (),
            token_gpu_ms=None,
            thoughts=thoughts or None,
            image_sizes=self.sent.image_sizes,
            resized_sizes=self._sizes("resized_sizes") or self.sent.resized_sizes,
            num_counted_tokens=count,
            num_thinking_tokens=_number(thinking) or 0,
        )

    def _timings(self, count: int, end_s: float) -> Timings:
        """TTFT and decode as seen here, and the server's own phases where it tells them."""
        theirs = _mapping(self._usage.get("timings"))
        ttft_s = decode_s = None
        if self._times and self.streamed:
            ttft_s, decode_s = self._times[0] - self.started_s, self._times[-1] - self._times[0]
        return Timings(
            load_s=None,
            preprocess_s=_seconds(theirs.get("preprocess_s")),
            vision_encode_s=_seconds(theirs.get("vision_encode_s")),
            prefill_s=_seconds(theirs.get("prefill_s")),
            ttft_s=ttft_s,
            decode_s=decode_s,
            e2e_s=end_s - self.started_s,
            decode_tok_per_s=(count - 1) / decode_s if decode_s and count > 1 else None,
        )

    def _effective(self) -> EffectiveConfig:
        ran = _mapping(self._ours.get("effective"))

        def mode(axis: str) -> str | None:
            value = ran.get(axis)
            return value if isinstance(value, str) else None

        return EffectiveConfig(
            engine="remote",
            quantization=mode("quantization"),
            attention=mode("attention"),
            cache=mode("cache"),
            device=self.device,
            dtype=mode("dtype"),
            kernels=mode("kernels"),
            kv_dtype=mode("kv_dtype"),
            speculate=mode("speculate"),
        )

    def _sizes(self, name: str) -> tuple[Size, ...]:
        sizes = self._ours.get(name)
        if not isinstance(sizes, list) or len(sizes) != len(self.sent.image_sizes):
            return ()
        try:
            pairs = [(_number(width), _number(height)) for width, height in sizes]
        except (TypeError, ValueError):
            return ()
        return tuple((width, height) for width, height in pairs if width and height)


def read_json(text: str | bytes) -> Any:
    """What a server's JSON says.

    Raises:
        ValueError: it is none, or nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def error_text(answer: Any) -> str:
    """What a server says went wrong, on one line."""
    error = answer.get("error") if isinstance(answer, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    if not isinstance(said, str) and isinstance(answer, dict):
        said = answer.get("message") or answer.get("detail")
    line = " ".join(str(said).split()) if said else "no reason given"
    return line if len(line) <= 300 else f"{line[:300]}..."


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """A text; of a list of parts, those that are text."""
    if isinstance(value, list):
        return "".join(_text(_mapping(part).get("text")) for part in value)
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST else None


def _seconds(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value <= _MOST else None


# No count or time is larger; what is comes from a server that is out of order.
_MOST = 2**53
