"""Every ComfyUI node as a table: its id, inputs and outputs. Saved graphs depend on these names.

Imports nothing of ComfyUI, so that workflows can be converted and checked without it. `extension`
turns the tables into ComfyUI's own schemas; `nodes` says what each node does.

A widget's value below a sampling parameter's range (-1) means "as the model's
generation_config.json says"; for `seed` it means another seed in every run. In a graph saved by
ComfyUI's editor the values of a node (`widgets_values`) stand in the order of its widgets here,
sockets left out, and `seed` is followed by one more value of the editor's own ("fixed",
"randomize", ...): a new widget goes behind all others of its node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from qwencli.config import (
    MAX_FRAMES,
    MAX_PIXELS,
    SAMPLING_BOUNDS,
    Attention,
    Cache,
    Existing,
    Quantization,
    SamplingParams,
)
from qwencli.errors import QwenCliError
from qwencli.messages import PRESETS

CATEGORY = "qwencli"
# Of `model`: the user's default, else the best one that is on this machine.
AUTO = "auto"
# Of `preset`: the text of `prompt` is asked.
NO_PRESET = "none"
AS_MODEL = -1


class Kind(StrEnum):
    """ComfyUI's types; those of `SOCKETS` come from other nodes, the others are widgets."""

    STRING = "STRING"
    INT = "INT"
    FLOAT = "FLOAT"
    BOOLEAN = "BOOLEAN"
    COMBO = "COMBO"
    IMAGE = "IMAGE"
    MASK = "MASK"
    VIDEO = "VIDEO"
    ENGINE = "QWENCLI_ENGINE"


SOCKETS = frozenset({Kind.IMAGE, Kind.MASK, Kind.VIDEO, Kind.ENGINE})


class BatchMode(StrEnum):
    """What the pictures of `images` are."""

    EACH = "a caption each"
    TOGETHER = "all in one request"
    VIDEO = "frames of one video"


class RunsWhere(StrEnum):
    """Where the engine is: in ComfyUI's process, in one of qwencli's own, or a server."""

    IN_PROCESS = "in-process"
    RESIDENT = "resident"
    REMOTE = "remote"


@dataclass(frozen=True)
class Input:
    """One input of a node.

    Args:
        options: of a COMBO; `models` fills in those of `model`.
        low, high, step: of a number.
        optional: may be left unconnected, or out of a graph sent to the API; what is left out has
            its default.
        multiline: of a STRING.
    """

    id: str
    kind: Kind
    tooltip: str
    default: Any = None
    options: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    optional: bool = True
    multiline: bool = False

    @property
    def is_widget(self) -> bool:
        return self.kind not in SOCKETS


@dataclass(frozen=True)
class Output:
    """One output of a node. is_list: as many values as there were answers."""

    id: str
    kind: Kind
    tooltip: str
    is_list: bool = False


@dataclass(frozen=True)
class Node:
    """One node. runs_alone: it does its work even where nothing takes its outputs."""

    id: str
    display_name: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    runs_alone: bool = False

    def defaults(self) -> Mapping[str, Any]:
        """The value of every input that is left out; None of what is not connected."""
        return {each.id: each.default for each in self.inputs}

    @property
    def widgets(self) -> Sequence[Input]:
        return [each for each in self.inputs if each.is_widget]


def _choice(name: str, tooltip: str, options: type[StrEnum], default: StrEnum) -> Input:
    return Input(name, Kind.COMBO, tooltip, default.value, tuple(each.value for each in options))


def _socket(name: str, kind: Kind, tooltip: str) -> Input:
    return Input(name, kind, tooltip)


def _sampling(name: str, tooltip: str, step: float = 1) -> Input:
    bound = SAMPLING_BOUNDS[name]
    kind = Kind.INT if bound.integer else Kind.FLOAT
    text = f"{tooltip} Below that, as -1: as the model says."
    low: float = AS_MODEL
    return Input(name, kind, text, type(step)(AS_MODEL), low=low, high=bound.high, step=step)


_ENGINE = _socket(
    "engine", Kind.ENGINE, "A Qwen Engine node. Without one the model runs in ComfyUI's process."
)
_MODEL = (
    Input("model", Kind.COMBO, "auto: your default, else the best one on this machine.", AUTO),
    Input(
        "custom_model", Kind.STRING, "A hub id or a folder; replaces model where it is given.", ""
    ),
    _choice("quantization", "Of the weights.", Quantization, Quantization.NONE),
    _choice("attention", "auto: the fastest here.", Attention, Attention.AUTO),
    Input(
        "cache",
        Kind.COMBO,
        "Of keys and values. auto: the fastest here.",
        AUTO,
        (AUTO, *(each.value for each in Cache)),
    ),
)
_MOST = SAMPLING_BOUNDS["max_new_tokens"]
MOST_NEW_TOKENS = int(_MOST.high)
_SAMPLING = (
    Input(
        "max_new_tokens",
        Kind.INT,
        "Longest answer, in tokens.",
        SamplingParams().max_new_tokens,
        low=_MOST.low,
        high=_MOST.high,
        step=1,
    ),
    Input(
        "do_sample",
        Kind.BOOLEAN,
        "Off: always the likeliest token. On: as the model and the values below say.",
        True,
    ),
    _sampling("temperature", "0 (greedy) to 2.", 0.05),
    _sampling("top_p", "0 to 1; 1 is off.", 0.01),
    _sampling("top_k", "0 to 200; 0 is off."),
    _sampling("min_p", "0 to 1; 0 is off.", 0.01),
    _sampling("repetition_penalty", "1 (off) to 2.", 0.05),
    Input(
        "seed",
        Kind.INT,
        "The same seed gives the same answer; -1: another one in every run.",
        0,
        low=SAMPLING_BOUNDS["seed"].low,
        high=SAMPLING_BOUNDS["seed"].high,
        step=1,
    ),
)
_KEEP = Input(
    "keep_loaded",
    Kind.STRING,
    "How long the model stays loaded after a run, as 90s, 5m or 2h; 0: not at all. It goes sooner "
    "where ComfyUI needs the memory.",
    "10m",
)
_SYSTEM = Input("system", Kind.STRING, "System prompt.", "", multiline=True)
_PRESET = Input(
    "preset",
    Kind.COMBO,
    "What is asked where prompt is empty.",
    "detailed",
    (NO_PRESET, *PRESETS),
)
_IMAGES = _socket("images", Kind.IMAGE, "A picture, or a batch of them.")
_NEEDED_IMAGES = replace(_IMAGES, optional=False)
_PICTURES = (
    _IMAGES,
    *(
        _socket(f"image_{n}", Kind.IMAGE, "Shown in every request, before the picture of images.")
        for n in range(1, 5)
    ),
    _socket("video", Kind.VIDEO, "Shown in every request, after image_1 to image_4."),
)
_FRAMES = (
    _choice("batch_mode", "What the pictures of images are.", BatchMode, BatchMode.EACH),
    Input(
        "frames",
        Kind.INT,
        "Frames of a video that are looked at, evenly spaced; 0: two a second, 4 to 64.",
        0,
        low=0,
        high=MAX_FRAMES,
        step=1,
    ),
    Input(
        "fps",
        Kind.FLOAT,
        "Of images, where they are the frames of one video.",
        24.0,
        low=0.1,
        high=240.0,
        step=0.1,
    ),
)
_THINK = Input("think", Kind.BOOLEAN, "Let a model that can think do so.", False)
_THINKING_BUDGET = Input(
    "thinking_budget",
    Kind.INT,
    "Above 0: a model that can think does so for at most so many tokens, fewer than "
    "max_new_tokens. 0: no thoughts. -1: not said.",
    AS_MODEL,
    low=AS_MODEL,
    high=_MOST.high - 1,
    step=1,
)
_STATISTICS = Output(
    "statistics", Kind.STRING, "Speed, times and tokens, and the engine and modes that ran."
)

CAPTION = Node(
    "QwencliCaption",
    "Qwen Caption",
    "Describe a picture, each picture of a batch, several pictures together, or a video.",
    (
        *_PICTURES,
        _ENGINE,
        _PRESET,
        Input("prompt", Kind.STRING, "What to ask; empty: the preset.", "", multiline=True),
        _SYSTEM,
        *_FRAMES,
        *_MODEL,
        *_SAMPLING,
        _THINK,
        _KEEP,
        _THINKING_BUDGET,
    ),
    (
        Output("text", Kind.STRING, "The answer; of several requests one a line."),
        Output("texts", Kind.STRING, "The answers as a list.", is_list=True),
        _STATISTICS,
    ),
)
CHAT = Node(
    "QwencliChat",
    "Qwen Chat",
    "Ask anything; pictures and a video may be shown, and need not be.",
    (
        *_PICTURES,
        _ENGINE,
        Input("prompt", Kind.STRING, "What to ask.", "", multiline=True),
        _SYSTEM,
        *_FRAMES,
        *_MODEL,
        *_SAMPLING,
        _THINK,
        _KEEP,
        _THINKING_BUDGET,
    ),
    CAPTION.outputs,
)
CAPTION_FOLDER = Node(
    "QwencliCaptionFolder",
    "Qwen Caption Folder",
    "Caption the pictures of a folder into files beside them. A run that was stopped goes on "
    "where it ended.",
    (
        _ENGINE,
        Input("path", Kind.STRING, "The folder.", ""),
        _PRESET,
        Input("prompt", Kind.STRING, "What to ask; empty: the preset.", "", multiline=True),
        _SYSTEM,
        Input("recursive", Kind.BOOLEAN, "Pictures in folders inside the folder too.", False),
        Input("glob", Kind.STRING, "Only pictures whose path matches, as *.png; empty: all.", ""),
        _choice("existing", "Captions that are there.", Existing, Existing.SKIP),
        Input("caption_extension", Kind.STRING, "Ending of the caption files.", ".txt"),
        Input(
            "output",
            Kind.STRING,
            "One .jsonl, .csv or .json for all captions, or a folder; empty: beside the pictures.",
            "",
        ),
        Input("prefix", Kind.STRING, "Set in front of each caption (trigger words).", ""),
        Input("suffix", Kind.STRING, "Set behind each caption.", ""),
        Input("retry_failed", Kind.BOOLEAN, "Try again what failed before.", False),
        *_MODEL,
        *_SAMPLING,
        _KEEP,
        _THINKING_BUDGET,
    ),
    (
        Output("summary", Kind.STRING, "What became of the pictures, and each that failed."),
        Output("captioned", Kind.INT, "Captions made in this run."),
        Output("failed", Kind.INT, "Pictures that could not be captioned in this run."),
        _STATISTICS,
    ),
    runs_alone=True,
)
STRUCTURED_CAPTION = Node(
    "QwencliStructuredCaption",
    "Qwen Structured Caption",
    "Answers about each picture that keep to a JSON schema.",
    (
        _NEEDED_IMAGES,
        _ENGINE,
        Input(
            "schema",
            Kind.STRING,
            "A JSON schema.",
            # Bounds, so that no model goes on until its tokens are used up.
            '{"type": "object", "properties": {"subject": {"type": "string", "maxLength": 80}, '
            '"colours": {"type": "array", "maxItems": 6, "items": {"type": "string", '
            '"maxLength": 20}}}, "required": ["subject", "colours"], '
            '"additionalProperties": false}',
            multiline=True,
        ),
        Input("prompt", Kind.STRING, "What to ask; empty: what the schema asks for.", "",
              multiline=True),
        _SYSTEM,
        *_MODEL,
        *_SAMPLING,
        _KEEP,
        _THINKING_BUDGET,
    ),
    (
        Output("json", Kind.STRING, "The answer; of several pictures a JSON array."),
        Output("jsons", Kind.STRING, "The answers as a list.", is_list=True),
        _STATISTICS,
    ),
)  # fmt: skip
BOXES = Node(
    "QwencliBoxes",
    "Qwen Boxes",
    "Find the objects of each picture, as boxes in its own pixels.",
    (
        _NEEDED_IMAGES,
        _ENGINE,
        Input("prompt", Kind.STRING, "What to find; empty: every object.", "", multiline=True),
        *_MODEL,
        *_SAMPLING,
        _KEEP,
        _THINKING_BUDGET,
    ),
    (
        Output("drawn", Kind.IMAGE, "The pictures with their boxes and labels."),
        Output("boxes", Kind.STRING, "bbox_2d (x1, y1, x2, y2 in pixels) and label, as JSON; one "
               "text a picture.", is_list=True),
        Output("mask", Kind.MASK, "1 inside of boxes, one mask a picture."),
        _STATISTICS,
    ),
)  # fmt: skip
ENGINE = Node(
    "QwencliEngine",
    "Qwen Engine",
    "Where the model runs: in ComfyUI's process, in a process of its own that ComfyUI does not "
    "slow down, or on a server.",
    (
        _choice("runs", "Where the model runs.", RunsWhere, RunsWhere.IN_PROCESS),
        Input("endpoint", Kind.STRING, "Of remote: the server, as http://127.0.0.1:8000/v1.", ""),
        Input(
            "api_key_variable",
            Kind.STRING,
            "Of remote: the environment variable that holds the key. The key itself is never part "
            "of a graph.",
            "QWENCLI_API_KEY",
        ),
        Input("device", Kind.STRING, "auto, cpu, cuda, cuda:N or mps; not of remote.", "auto"),
        Input(
            "max_pixels",
            Kind.INT,
            "Largest height x width of a picture; 0: the model's own, or what fits.",
            0,
            low=0,
            high=MAX_PIXELS,
            step=1,
        ),
        Input(
            "max_seq_len",
            Kind.INT,
            "Most tokens of a request, which memory is kept for; 0: the engine's own choice.",
            0,
            low=0,
            high=1_048_576,
            step=1,
        ),
    ),
    (Output("engine_choice", Kind.ENGINE, "For the other nodes."),),
)

NODES: Mapping[str, Node] = {
    node.id: node for node in (CAPTION, CHAT, CAPTION_FOLDER, STRUCTURED_CAPTION, BOXES, ENGINE)
}


def fold_seed(seed: int) -> int:
    """A seed of another node, of up to 64 bits, as one of ours: the same one each time."""
    most = int(SAMPLING_BOUNDS["seed"].high)
    return seed % (most + 1) if seed > most else seed


def models() -> tuple[str, ...]:
    """The values of `model` on this machine: entries of custom_models.json first, if it can be
    read, then the bundled model and the built-ins."""
    from qwencli.models.builtin import BUILTINS, BUNDLED_NAME
    from qwencli.models.resolve import SearchPaths

    try:
        custom = tuple(SearchPaths().custom_models(None).specs)
    except QwenCliError:
        custom = ()  # running one says what is wrong with the file
    return tuple(dict.fromkeys((AUTO, *custom, BUNDLED_NAME, *BUILTINS)))
