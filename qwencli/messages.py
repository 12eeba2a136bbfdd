"""A conversation as the engines take it: messages made of text, images and videos; and what
`--preset` asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from qwencli.config import SamplingOptions, keep_tuples
from qwencli.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Role = Literal["system", "user", "assistant", "tool"]

DEFAULT_PROMPT = "Describe this image."

PRESETS = {
    "short": "Write a short caption.",
    "detailed": "Describe this image in detail.",
    "tags": "List tags for this image, separated by commas.",
    "cinematic": "Describe this image as a film still: subject, framing, light, colour and mood.",
    "analysis": "Analyse this image: list the objects, their colours, counts and positions.",
    "prompt-refine": "Write a prompt for an image generator that would recreate this image.",
}


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    """One decoded picture, mode RGB, EXIF orientation applied.

    Args:
        name: what errors call it.
        first_of: what its file holds several of, where only the first one is shown here.
        file_size: (width, height) of the upright picture, where it was decoded smaller than it is.
    """

    image: Image
    name: str
    first_of: Literal["frames", "pages"] | None = None
    file_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture, by which models see it."""
        return self.file_size or self.image.size


@dataclass(frozen=True)
class VideoPart:
    """Frames of a video, each as `ImagePart.image` and all of one size, in order.

    Args:
        times_s: when each frame is seen, from the video's beginning.
        duration_s: of the whole video, above 0.
    """

    frames: tuple[Image, ...]
    times_s: tuple[float, ...]
    duration_s: float
    name: str

    def __post_init__(self) -> None:
        keep_tuples(self, "frames", "times_s")


VisualPart = ImagePart | VideoPart
Part = TextPart | VisualPart


@dataclass(frozen=True)
class ToolCall:
    """A function that the model has called.

    Args:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn. An answer of the assistant may hold calls of functions; what they gave is said by
    turns of the role `tool`."""

    role: Role
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        keep_tuples(self, "parts", "tool_calls")


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to produce.

    Args:
        messages: in order; the last one is normally the user's.
        sampling: what the user said; the engine fills in the model's own defaults.
        ignore_eos: produce exactly `max_new_tokens` tokens (equal work for measurements).
        bypass_caches: use nothing that earlier requests left behind (likewise).
        starts_with: what the answer begins with, whatever the model would have said; it goes on
            from there, and the result's text is what it adds.
        schema: a JSON schema, as text, that the answer is held to; see `engine.constrained`.
        thinking: let a model that can think before it answers do so.
        thinking_budget: most tokens of those thoughts; what they are cut off with is not counted.
            0 = none, whatever `thinking` says; None = as many as the answer may have.
        tools: functions that the model may call, each a JSON object as text, in OpenAI's form.
        cut_to_fit: the answer may be shorter than `max_new_tokens` where there is no room for it.
        logprobs: tell of each token how likely it was, and of so many others in its place; None =
            do not.
    """

    messages: tuple[Message, ...]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    ignore_eos: bool = False
    bypass_caches: bool = False
    starts_with: str = ""
    schema: str | None = None
    thinking: bool = False
    thinking_budget: int | None = None
    tools: tuple[str, ...] = ()
    cut_to_fit: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        keep_tuples(self, "messages", "tools")

    @property
    def wants_thoughts(self) -> bool:
        return self.thinking if self.thinking_budget is None else self.thinking_budget > 0


def user_message(text: str, visuals: tuple[VisualPart, ...] = ()) -> Message:
    """Images and videos first, then the text: the order Qwen's models were trained on."""
    return Message("user", (*visuals, TextPart(text)) if text else visuals)


def text_message(role: Role, text: str) -> Message:
    return Message(role, (TextPart(text),))


def system_messages(system: str | None) -> tuple[Message, ...]:
    """The messages in front of a conversation: the system prompt, or none."""
    return (text_message("system", system),) if system else ()


def check_prompt(prompt: str | None) -> None:
    """Raises UsageError for one with nothing in it."""
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty", "say what to ask, or leave it out")


def prompt_text(prompt: str | None, preset: str | None) -> str:
    """The text to send for `--prompt` and `--preset`, of which at most one is given.

    Raises:
        UsageError: both are given, the prompt is empty, or the preset is unknown.
    """
    check_prompt(prompt)
    if prompt is not None and preset is not None:
        raise UsageError("--prompt and --preset exclude each other", "give one of them")
    if preset is None:
        return DEFAULT_PROMPT if prompt is None else prompt
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset!r} is unknown", f"use one of: {', '.join(PRESETS)}")
    return PRESETS[preset]
