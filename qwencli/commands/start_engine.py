"""Chooses a command's model and starts the engine that answers.

That engine runs in this process, is the one kept loaded, or stands for servers elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qwencli.commands.options import RunOptions
from qwencli.config import EngineConfig, EngineName, LoadFormat, ModelSource, ModelSpec
from qwencli.engine.abilities import Abilities, check_known, check_loaded, fetch_model
from qwencli.errors import (
    AnswerError,
    InputError,
    OutOfMemoryError,
    QwenCliError,
    RequestError,
)
from qwencli.models.resolve import recommended_model, resolve_model
from qwencli.output import Output
from qwencli.tracing import active

# Reading has to take that long before its speed is told.
_SHORTEST_S = 0.2
# What one request may end with, while others go on.
ANSWERING_ERRORS = (InputError, OutOfMemoryError, AnswerError, RequestError)

if TYPE_CHECKING:
    from qwencli.engine.protocol import Engine


def choose_model(run: RunOptions, output: Output) -> ModelSpec:
    """The model named, or the best one for this machine; see `qwencli.models.resolve`.

    Where only the bundled model is left and a person sits before a machine with a GPU, they are
    offered the download of a better one, with its size.

    Raises:
        ModelError, UsageError: as `resolve_model` does.
        EndpointError: no server of `--endpoint` can be used.
    """
    if run.is_remote:
        from qwencli.engine.remote import remote_model

        with output.status("asking the server for its models"):
            return remote_model(run.endpoints, run.model, offline=run.offline)
    if run.model:
        return resolve_model(run.model, models_file=run.models_file, offline=run.offline)
    spec = resolve_model(
        None,
        models_file=run.models_file,
        offline=run.offline,
        free_bytes=lambda: _free_bytes_for_bf16(run.device),
    )
    if spec.source is not ModelSource.BUNDLED or run.load_format is LoadFormat.DUMMY:
        return spec
    free_bytes, on_gpu = free_bytes_on(run.device) if _can_ask(run, output) else (0, False)
    better = recommended_model(free_bytes) if on_gpu else None
    return better if better and _wants(better, output) else spec


def free_bytes_on(device: str) -> tuple[int, bool]:
    """Bytes a model may take on the device that `auto` or `device` means; whether it is a GPU."""
    from qwencli.engine.machine.host import gpu_free_bytes, host_memory

    if device in ("auto", "") or device.startswith("cuda"):
        free = gpu_free_bytes()
        if free is not None:
            return free, True
    return host_memory().available_bytes, False


def _free_bytes_for_bf16(device: str) -> int:
    """What the estimates of a GPU, at 2 bytes a value, may come to on the device."""
    from qwencli.models.memory import CPU_VALUE_BYTES, GPU_VALUE_BYTES

    free, on_gpu = free_bytes_on(device)
    return free if on_gpu else free * GPU_VALUE_BYTES // CPU_VALUE_BYTES


def _can_ask(run: RunOptions, output: Output) -> bool:
    return output.can_ask() and not (_is_offline(run) or output.quiet)


def _wants(better: ModelSpec, output: Output) -> bool:
    from qwencli.models.memory import weight_bytes
    from qwencli.models.shape_reader import read_shape

    assert better.hub_config is not None, "built-ins come with their configuration"
    size = weight_bytes(read_shape(better.hub_config, better.name)) / 1e9
    return output.confirm(
        f"No model for photographs is on this machine. Download {better.name} ({size:.1f} GB) "
        "from the Hugging Face hub now?"
    )


def announce_model(spec: ModelSpec, run: RunOptions, output: Output, wanted: Abilities) -> None:
    """Say on stderr what the bundled model is, and what is about to be downloaded.

    Args:
        wanted: of the model.

    Raises:
        UnsupportedModeError: it cannot do that, and a download would not change it.
    """
    check_known(spec, wanted)
    if spec.source is ModelSource.BUNDLED:
        output.notice(
            "note: using the bundled model 'scenes', which knows drawn scenes only "
            "(shapes, colours, positions, numbers); for photographs use "
            "--model qwen3-vl-4b (see: qwencli models)"
        )
    elif (
        spec.path is None
        and spec.source is not ModelSource.REMOTE
        and run.load_format is LoadFormat.AUTO
        and not _is_offline(run)
    ):
        output.notice(f"downloading {spec.repo_id} (kept in the Hugging Face cache)")


def _is_offline(run: RunOptions) -> bool:
    return run.offline or bool(os.environ.get("HF_HUB_OFFLINE"))


@contextmanager
def running_engine(
    config: EngineConfig, output: Output, keep_s: float | None, wanted: Abilities
) -> Iterator[Engine]:
    """An engine, loaded, closed at the end whatever happens.

    Args:
        keep_s: above 0 it is the resident one, which stays so long after the last request; None =
            it is that one where it has this model loaded already. 0 = it runs in this process.
        wanted: of its model.

    Raises:
        UsageError: its model cannot do that, which is told before the load where its files are
            here; and whatever `Engine.load` raises.
    """
    engine = None if keep_s == 0 else _resident(config, output, keep_s, wanted)
    engine = engine or _loaded_here(config, output, wanted)
    said = engine.load_warnings
    try:
        for warning in said:
            output.warn(warning)
        if config.max_seq_len == "auto":
            output.notice(
                f"--max-seq-len auto: {engine.max_seq_len}{memory_figures(engine.memory_plan)}"
            )
        check_loaded(config.model.name, engine, wanted)
        yield engine
    finally:
        engine.close()
        for warning in engine.load_warnings:
            if warning not in said:  # what a load left to be done later may go wrong too
                output.warn(warning)


def _resident(
    config: EngineConfig, output: Output, keep_s: float | None, wanted: Abilities
) -> Engine | None:
    """The resident engine with this model loaded; None where it cannot be used now."""
    from qwencli.server.resident_state import read_state, state_folder

    if keep_s is not None:
        fetch_model(config, wanted)
    elif read_state(state_folder()) is None:
        return None  # as on most machines, most of the time
    from qwencli.server.resident_engine import ResidentEngine

    engine = ResidentEngine(config, keep_s, output.notice)
    try:
        with output.status(f"loading {config.model.name}"):
            engine.load()
    except QwenCliError:
        if not engine.unusable:
            raise
        if keep_s is not None:
            output.notice(f"note: {engine.unusable}: the model is loaded here")
        return None
    return engine


def _loaded_here(config: EngineConfig, output: Output, wanted: Abilities) -> Engine:
    from qwencli.engine.factory import create_engine

    with output.status(f"starting {config.model.name}"):
        # Before a download: a mode that the engine does not have should not cost gigabytes first.
        if config.engine is EngineName.REMOTE:
            from qwencli.engine.remote import RemoteEngine

            engine: Engine = RemoteEngine(config, warn=output.warn)
        else:
            engine = create_engine(config)
        if config.model.source is not ModelSource.REMOTE:
            from qwencli.engine.resolve import resolve_device

            device = resolve_device(config.device)
            if active() is not None:
                from qwencli.engine.instruments.kernel_trace import trace_kernels

                trace_kernels(device)
    # Here and not in load(): the download's own progress bars need the terminal to themselves.
    fetch_model(config, wanted)
    try:
        with output.status(f"loading {config.model.name}", reading_speed(engine)):
            engine.load()
    except OutOfMemoryError as error:
        raise _with_resident(error) from error
    return engine


def reading_speed(engine: Engine) -> Callable[[], str]:
    """Says how far the reading of an engine's weights is, and how fast it has been."""
    seen: list[tuple[float, int]] = []

    def said() -> str:
        done, total = engine.weights_read
        if not total:
            return ""
        seen.append((time.perf_counter(), min(done, total)))  # some of it is read once more
        (first_s, before), (now_s, done) = seen[0], seen.pop() if seen[1:] else seen[0]
        seconds = now_s - first_s
        rate = f", {(done - before) / 1e9 / seconds:.1f} GB/s" if seconds > _SHORTEST_S else ""
        return f": {done / 1e9:.1f} of {total / 1e9:.1f} GB{rate}"

    return said


def _with_resident(error: OutOfMemoryError) -> OutOfMemoryError:
    """What else may be done where the resident engine takes memory too."""
    from qwencli.server.resident import status

    there = status()
    if there is None or there.model is None:
        return error
    hint = f"qwencli stop frees what {there.model} takes, which is kept loaded"
    return OutOfMemoryError(error.message, f"{hint}; or {error.hint}" if error.hint else hint)


def memory_figures(plan: Mapping[str, int]) -> str:
    """Bytes by use, in brackets; nothing where nothing is planned."""
    parts = ", ".join(f"{use} {size / 2**30:.1f}" for use, size in plan.items())
    return f" (GiB: {parts})" if parts else ""
