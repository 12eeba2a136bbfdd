"""What `diagnose` does around its checks: which model, the report, the user's config."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.config import EngineConfig, LoadFormat, ModelSource, ModelSpec
from qwencli.errors import DeviceError, ModelFileError, OutputError, UsageError
from qwencli.output import Output

if TYPE_CHECKING:
    from qwencli.diagnostics.advice import Advice
    from qwencli.diagnostics.machine import Machine
    from qwencli.diagnostics.report import Result
    from qwencli.engine.instruments.probes.answers import EngineWork

# What is advised for where nobody names a model and none is downloaded.
USUAL_MODEL = "qwen3-vl-4b"
DEEP_NEW_TOKENS, DEEP_RUNS = 64, 3


def chosen_model(name: str | None) -> ModelSpec:
    """The model named, else the default one; on a machine with a GPU not the bundled one, which
    would be advice about nothing. Downloads nothing.

    Raises:
        ModelError, UsageError: as `resolve_model` does, or the model's sizes are not known.
    """
    from qwencli.engine.machine.host import gpu_memory
    from qwencli.models.resolve import recommended_model, resolve_model, usable_on_card

    memory = gpu_memory()
    usable = memory and min(memory.free_bytes, usable_on_card(memory.total_bytes))
    spec = resolve_model(name, offline=True, free_bytes=usable)
    if not name and usable is not None and spec.source is ModelSource.BUNDLED:
        spec = recommended_model(usable) or resolve_model(USUAL_MODEL)
    if spec.hub_config is None:
        raise ModelFileError(
            f"the sizes of {spec.name} are not known before it is downloaded",
            "name a built-in model (see: qwencli models) or a folder with its config.json",
        )
    return spec


def engine_work(spec: ModelSpec, load_format: LoadFormat | None) -> Callable[[Machine], EngineWork]:
    """What --deep runs: the model as advised, with its weights where they are on this machine."""

    def work(machine: Machine) -> EngineWork:
        from qwencli.diagnostics.advice import advise
        from qwencli.engine.instruments.probes.answers import EngineWork

        said = {name: value for name, value in settings(advise(machine)).items() if value}
        found = LoadFormat.DUMMY if spec.path is None else LoadFormat.AUTO
        config = EngineConfig(
            model=spec,
            device=machine.device,
            load_format=load_format or found,
            offline=True,
            **said,
        )
        return EngineWork(config, DEEP_NEW_TOKENS, DEEP_RUNS)

    return work


def settings(advice: Advice) -> dict[str, Any]:
    """The advice by the names of config.toml's settings; left out what it has no opinion on."""
    from qwencli.models.user_config import SETTINGS

    advised = {field.name for field in fields(advice)}
    return {name: getattr(advice, name) for name in SETTINGS if name in advised}


def write_report(
    path: Path, results: Sequence[Result], advice: Advice, recorded: Mapping[str, Any]
) -> None:
    """Raises OutputError where the file cannot be written; it is then as it was."""
    from qwencli import __version__
    from qwencli.dataset.sinks import write_whole
    from qwencli.diagnostics.redact import redact, this_owner
    from qwencli.diagnostics.report import markdown

    page = redact(markdown(results, advice, recorded, __version__), this_owner())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page.encode())
    except OSError as error:
        raise OutputError(
            f"--report {path}: cannot be written: {error.strerror or error}", "choose another place"
        ) from error


def apply_advice(advice: Advice, output: Output, *, default: bool, ask: bool) -> None:
    """Write the advice to the user's config.toml, showing what changes first.

    Args:
        default: also make the model the one that is used when none is named.
        ask: wait for a yes at the terminal.

    Raises:
        DeviceError: there is no advice to write.
        UsageError: nobody is there to be asked, or the file is malformed.
        OutputError: it cannot be written.
    """
    from qwencli.models.user_config import (
        CONFIG_FILE,
        changed_config,
        user_config_folder,
        write_config,
    )

    if advice.quantization is None:
        raise DeviceError(f"--apply: there is nothing to apply: {advice.why[0]}")
    folder = user_config_folder()
    old, new = changed_config(folder, advice.model, settings(advice), default=default)
    place = str(folder / CONFIG_FILE)
    if old == new:
        output.notice(f"{place} says so already")
        return
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), place, f"{place} (recommended)", lineterm="", n=1
    )
    output.report(*lines)
    if ask and not output.can_ask():
        raise UsageError("--apply asks before it writes, and nobody is there", "add --yes")
    if ask and not output.confirm("Write this?"):
        output.notice("nothing was written")
        return
    output.notice(f"wrote {write_config(folder, new)}")
