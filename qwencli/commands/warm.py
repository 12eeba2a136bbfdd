"""`qwencli warm`: compile a model's kernels for this GPU ahead of the first request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwencli.config import (
    DType,
    EngineConfig,
    KVDType,
    Quantization,
    Speculate,
    check_device_name,
)
from qwencli.errors import DeviceError
from qwencli.output import Output


def warm(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Name, hub id or folder; see: qwencli models."),
    ] = None,
    quantization: Annotated[
        Quantization, typer.Option(metavar="MODE", help="none, 8bit, 4bit or fp8.")
    ] = Quantization.NONE,
    kv_dtype: Annotated[
        KVDType, typer.Option(metavar="TYPE", help="auto, int8 or fp8.")
    ] = KVDType.AUTO,
    speculate: Annotated[
        Speculate, typer.Option(metavar="off|auto|mtp|N", help="As in caption.")
    ] = Speculate.OFF,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        DType, typer.Option(metavar="NAME", help="auto, bfloat16, float16 or float32.")
    ] = DType.AUTO,
    models_file: Annotated[
        Path | None, typer.Option("--models-file", help="A custom_models.json to read as well.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
) -> None:
    """Compile a model's kernels for this GPU, and keep them.

    The first request of a process then compiles nothing. No weights are read.
    """
    from qwencli.engine.factory import warm_kernels
    from qwencli.models.resolve import resolve_model

    output = context.ensure_object(Output)
    check_device_name(device)
    spec = resolve_model(model, models_file=models_file, offline=offline)
    config = EngineConfig(
        spec,
        quantization=quantization,
        kv_dtype=kv_dtype,
        speculate=speculate,
        device=device,
        dtype=dtype,
        offline=offline,
    )
    with output.status(f"compiling kernels of {spec.name}"):
        try:
            made = warm_kernels(config)
        except DeviceError as error:
            # On a CPU, which the error may offer instead, there is nothing to compile.
            raise DeviceError(error.message, "run it where the GPU is") from error
    for warning in made.warnings:
        output.warn(warning)
    output.answer(
        f"{made.kernels} kernels of {spec.name} are ready in {made.folder} "
        f"({made.compiled} compiled now, {made.seconds:.1f} s)"
    )
