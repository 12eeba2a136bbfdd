"""The options that `caption` and `chat` share, each written once.

A command declares one parameter `run: RunOptions` and wears `@with_run_options`; Typer then sees
every field of `RunOptions` as an option of that command. `caption_options` has those of `caption`
alone.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from qwencli.capabilities import runs_with
from qwencli.config import (
    MAX_FRAMES,
    Attention,
    Cache,
    DType,
    EngineConfig,
    EngineName,
    Kernels,
    KVDType,
    LoadFormat,
    ModelSpec,
    Quantization,
    SamplingOptions,
    SamplingParams,
    Speculate,
    check_pixels,
    check_sampling,
    check_thinking_budget,
)
from qwencli.errors import UsageError
from qwencli.typed_values import parse_duration, parse_max_pixels, parse_seq_len


def option(panel: str, *names: str, text: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


_model = functools.partial(option, "Model")
_sampling = functools.partial(option, "Sampling")
_output = functools.partial(option, "Output")
SAMPLING = SamplingParams()


def _mode(axis: str, text: str, metavar: str = "MODE") -> Any:
    """A mode's option, with what it runs with."""
    return _model(metavar=metavar, text=f"{text} {runs_with(axis)}.")


def _else(value: float) -> str:
    """The default where the model's generation_config.json states none."""
    return f"Default: the model's, else {value:g}."


_MODES = ("engine", "quantization", "attention", "cache", "kernels", "kv_dtype")
# What a server was started with.
_OF_A_SERVER = (
    *_MODES[1:], "speculate", "device", "dtype", "load_format", "max_seq_len", "threads",
    "batch_invariant", "allow_pickle",
)  # fmt: skip


Frames = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Frames of a video, also of a GIF or a folder.", min=1, max=MAX_FRAMES
    ),
]

# Those of the commands of `bench`.
Images = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME|FILE", help="Repeatable. Default: a shipped example."),
]
Format = Annotated[LoadFormat, typer.Option(help="dummy: random weights.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    DType,
    typer.Option(
        metavar="NAME",
        help="Of weights that are not quantized: auto, bfloat16, float16 or float32.",
    ),
]


Think = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Let a model that can think before it answers do so; captions never have thoughts.",
        show_default="no-think",
    ),
]
ThinkingBudget = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="End its thoughts after N tokens, and have it answer then; 0 = no thoughts.",
        min=0,
    ),
]


def thoughts(
    think: bool | None, budget: int | None, sampling: SamplingOptions
) -> tuple[bool, int | None]:
    """Whether a model is let think, and for how many tokens. A budget asks for thoughts; who says
    that there are to be none has those of a model ended that has no switch for them, too.

    Raises:
        UsageError: a budget for no thoughts, or one that leaves nothing for the answer.
    """
    if think is False and budget is not None:
        raise UsageError("--thinking-budget and --no-think exclude each other", "leave one out")
    check_thinking_budget(budget, sampling.max_new_tokens)
    if think is False:
        budget = 0
    return (bool(think) if budget is None else budget > 0), budget


@dataclass(frozen=True)
class RunOptions:
    """What a user may say about the model, the sampling and the output of a run."""

    model: Annotated[
        str | None, _model("--model", "-m", text="Name, hub id or folder; see: qwencli models.")
    ] = None
    models_file: Annotated[Path | None, _model(text="A custom_models.json to read as well.")] = None
    engine: Annotated[
        EngineName | None,
        _model(
            metavar="NAME",
            text="native, transformers or remote. Default: native where it reads the weights.",
        ),
    ] = None
    endpoint: Annotated[
        list[str] | None,
        _model(
            metavar="URL",
            text="An OpenAI-compatible server that answers (remote); repeatable: they share.",
        ),
    ] = None
    api_key: Annotated[
        str | None, _model(metavar="KEY", text="For those servers. Default: $QWENCLI_API_KEY.")
    ] = None
    quantization: Annotated[
        Quantization | None, _mode("quantization", "none, 8bit, 4bit or fp8. Default: none.")
    ] = None
    attention: Annotated[
        Attention | None,
        _mode("attention", "auto, sdpa, eager or flash_attention_2. Default: auto."),
    ] = None
    cache: Annotated[
        Cache | None,
        _mode("cache", "dynamic, static, static-compile or static-graph. Default: the best."),
    ] = None
    kernels: Annotated[
        Kernels | None,
        _mode("kernels", "auto, triton (fused) or torch (operators). Default: auto.", "NAME"),
    ] = None
    kv_dtype: Annotated[
        KVDType | None,
        _mode(
            "kv_dtype",
            "Stored keys and values: auto, int8 or fp8 (half the memory). Default: auto.",
            "TYPE",
        ),
    ] = None
    device: Annotated[str, _model(metavar="NAME", text="auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[DType, _model(metavar="NAME", text="auto, bfloat16, float16 or float32.")] = (
        DType.AUTO
    )
    load_format: Annotated[
        LoadFormat, _model(metavar="NAME", text="auto, or dummy: random weights of true shape.")
    ] = LoadFormat.AUTO
    min_pixels: Annotated[int | None, _model(text="Smallest height x width of an image.")] = None
    max_pixels: Annotated[
        str | None,
        _model(
            metavar="N|auto",
            text="Largest height x width of an image. Default: auto, the model's own or what fits.",
        ),
    ] = None
    max_seq_len: Annotated[
        str | None,
        _model(metavar="N|auto", text="Most tokens of a request; auto: what fits."),
    ] = None
    speculate: Annotated[
        Speculate | None,
        _mode(
            "speculate",
            "Draft tokens: N (1 to 7) from earlier text for each greedy step; mtp: by the model's "
            "own head, as many as pay; auto: by that where there is one. Default: off.",
            "off|auto|mtp|N",
        ),
    ] = None
    threads: Annotated[
        int | None,
        _model(metavar="N", min=1, text="Of the CPU, where it computes. Default: as many as pay."),
    ] = None
    batch_invariant: Annotated[
        bool,
        _model(
            "--batch-invariant",
            text="Answers that do not depend on what runs beside them, to the bit; slower.",
        ),
    ] = False
    offline: Annotated[bool, _model("--offline", text="Never touch the network.")] = False
    allow_pickle: Annotated[
        bool, _model("--allow-pickle", text="Load .bin weights, which can run code.")
    ] = False

    max_new_tokens: Annotated[
        int | None,
        _sampling(
            text=f"Longest answer, in tokens. Default: {SAMPLING.max_new_tokens}. Of serve: 1024."
        ),
    ] = None
    greedy: Annotated[
        bool, _sampling("--greedy", text="Always the likeliest token. Default: as the model says.")
    ] = False
    temperature: Annotated[
        float | None, _sampling(text=f"0 (greedy) to 2. {_else(SAMPLING.temperature)}")
    ] = None
    top_p: Annotated[float | None, _sampling(text=f"0 to 1; 1 = off. {_else(SAMPLING.top_p)}")] = (
        None
    )
    top_k: Annotated[int | None, _sampling(text=f"0 to 200; 0 = off. {_else(SAMPLING.top_k)}")] = (
        None
    )
    min_p: Annotated[float | None, _sampling(text=f"0 to 1; 0 = off. {_else(SAMPLING.min_p)}")] = (
        None
    )
    repetition_penalty: Annotated[
        float | None, _sampling(text=f"1 (off) to 2. {_else(SAMPLING.repetition_penalty)}")
    ] = None
    seed: Annotated[
        int | None, _sampling(text=f"-1 = another every time. Default: {SAMPLING.seed}.")
    ] = None
    stop: Annotated[
        list[str] | None, _sampling(metavar="TEXT", text="End the answer before TEXT; repeatable.")
    ] = None

    json: Annotated[bool, _output("--json", text="One JSON object a line.")] = False
    stats: Annotated[bool, _output("--stats", text="Timings on stderr.")] = False

    def __post_init__(self) -> None:
        """Raises UsageError for what no model can do, before anything is opened."""
        most = None if self.max_pixels is None else parse_max_pixels(self.max_pixels)
        check_pixels(self.min_pixels, most)
        if self.max_seq_len is not None:
            parse_seq_len(self.max_seq_len)
        if self.engine is EngineName.REMOTE and not self.endpoint:
            raise UsageError(
                "--engine remote needs a server", "give --endpoint http://127.0.0.1:8000/v1"
            )
        for name in _OF_A_SERVER if self.endpoint else ():
            if getattr(self, name) != getattr(type(self), name):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{flag} belongs to the server of --endpoint, and cannot be set from here",
                    f"set it where that server is started, and leave {flag} out",
                )
        if self.endpoint and self.engine not in (None, EngineName.REMOTE):
            raise UsageError(
                f"--endpoint and --engine {self.engine} exclude each other", "use --engine remote"
            )

    def decoded_pixels(self, keep_s: float | None) -> int | None:
        """What pictures may be decoded for, see `image_part`; None = whole.

        A server is sent the picture and makes it smaller itself.
        """
        here = not (self.is_remote or keep_s)
        return parse_max_pixels(self.max_pixels) if here and self.max_pixels else None

    @property
    def is_remote(self) -> bool:
        return bool(self.endpoint)

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(self.endpoint or ())

    def sampling_options(self) -> SamplingOptions:
        """Raises UsageError for a value out of range, or --greedy with a temperature."""
        if self.greedy and self.temperature:
            raise UsageError("--greedy and --temperature exclude each other", "give one of them")
        said: dict[str, Any] = {
            f.name: getattr(self, f.name, None) for f in fields(SamplingOptions)
        }
        said |= {"do_sample": False if self.greedy else None, "stop": tuple(self.stop or ())}
        options = SamplingOptions(**said)
        check_sampling(options)
        return options

    def engine_config(self, spec: ModelSpec) -> EngineConfig:
        """What the user said, over their config.toml, over our own defaults.

        Raises:
            UsageError: config.toml is malformed.
        """
        from qwencli.models.user_config import model_settings, user_config_folder

        settings = {} if self.is_remote else model_settings(user_config_folder(), spec.name)
        if self.device != "auto" or any(getattr(self, name) is not None for name in _MODES):
            # They fit each other and the device they were chosen for: one that is said undoes all.
            settings = {key: value for key, value in settings.items() if key not in _MODES}
        said: dict[str, Any] = {
            f.name: value
            for f in fields(EngineConfig)
            if (value := getattr(self, f.name)) is not None
        }
        if self.max_seq_len is not None:
            said["max_seq_len"] = parse_seq_len(self.max_seq_len)
        if self.max_pixels is not None:
            said["max_pixels"] = parse_max_pixels(self.max_pixels)
        if self.is_remote:
            said["engine"] = EngineName.REMOTE
        return EngineConfig(**settings | said | {"model": spec})


@dataclass(frozen=True)
class KeepOptions:
    """What a user may say about the engine that stays behind; see `server.resident_engine`."""

    keep_loaded: Annotated[
        str | None,
        _model(
            metavar="TIME",
            text="Keep the model loaded for the next command, 0 = do not; $QWENCLI_KEEP_LOADED. "
            "Default: 5m on a GPU; else one that is there is used, and none started.",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.keep_loaded is not None:
            parse_duration(self.keep_loaded, "--keep-loaded")

    def seconds(self, run: RunOptions) -> float | None:
        """What the user said, over the environment, over their config.toml, over our default.

        None is that default on a CPU: none is started, and one that is there is used, for as long
        as was said of it.

        Raises:
            UsageError: it is no time.
        """
        if run.is_remote:
            if self.keep_loaded is not None:
                raise UsageError(
                    "--keep-loaded and --endpoint exclude each other", "the server keeps its model"
                )
            return 0.0
        if self.keep_loaded is not None:
            return parse_duration(self.keep_loaded, "--keep-loaded")
        if said := os.environ.get("QWENCLI_KEEP_LOADED"):
            return parse_duration(said, "QWENCLI_KEEP_LOADED")
        from qwencli.models.user_config import configured_keep_loaded, user_config_folder

        said = configured_keep_loaded(user_config_folder())
        return _default_keep_s(run.device) if said is None else parse_duration(said, "keep_loaded")


def _default_keep_s(device: str) -> float | None:
    """Loading a model onto a GPU takes long enough that keeping it pays."""
    if device != "auto" and not device.startswith("cuda"):
        return None
    from qwencli.engine.machine.host import num_gpus

    return 300.0 if num_gpus() else None


def with_run_options(
    command: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """Give `command(..., run: RunOptions)` one option per field of RunOptions.

    So too for every other parameter whose type is a dataclass. Of a name that the command has
    itself the field keeps its default, and so does one of `without`, which is no option of it.
    """
    own = inspect.signature(command, eval_str=True).parameters
    kept = {*own, *without}
    groups: dict[str, Any] = {
        name: p.annotation for name, p in own.items() if is_dataclass(p.annotation)
    }
    parameters = [p for name, p in own.items() if name not in groups]
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
            )
            for f in fields(group)
            if f.name not in kept
        ]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        made = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group) if f.name not in kept})
            for name, group in groups.items()
        }
        if made["run"].api_key is not None:
            # Where processes of our own find it too; no file and no message has it.
            os.environ["QWENCLI_API_KEY"] = made["run"].api_key
        if made["run"].offline:
            # The hub's library reads this when it is imported, which nothing has done yet.
            os.environ["HF_HUB_OFFLINE"] = "1"
        command(**given, **made)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapper.__wrapped__
    return wrapper
