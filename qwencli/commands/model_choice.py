"""Which model `caption` and `chat` run, and what the user is told and asked about it."""

from __future__ import annotations

import os

from qwencli.commands.options import RunOptions
from qwencli.config import LoadFormat, ModelSource, ModelSpec
from qwencli.models.resolve import recommended_model, resolve_model
from qwencli.output import Output


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


def announce_model(spec: ModelSpec, run: RunOptions, output: Output) -> None:
    """Say on stderr what the bundled model is, and what is about to be downloaded."""
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
