"""`qwencli caption FOLDER`: captions that are kept, in files beside the pictures or in a table."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from qwencli.commands.caption_options import (
    CaptionJob,
    FolderOptions,
    caption_extension,
    check_samples,
    overlay_folder,
    worker_devices,
)
from qwencli.commands.options import RunOptions
from qwencli.config import Existing, ModelSpec
from qwencli.errors import InputError, UsageError
from qwencli.messages import system_messages
from qwencli.output import Output

if TYPE_CHECKING:
    from qwencli.config import EngineConfig
    from qwencli.dataset.caption_processor import CaptionConfig, CaptionProcessor
    from qwencli.dataset.caption_worker import Captioner
    from qwencli.dataset.pipeline import Outcome

# Options that choose what computes: other captions may come of them.
_COMPUTES = (
    "engine", "quantization", "attention", "cache", "kernels", "kv_dtype", "dtype", "min_pixels",
    "max_pixels", "load_format",
)  # fmt: skip


def caption_folder(job: CaptionJob, caption_config: CaptionConfig, chosen: FolderOptions) -> None:
    """Caption pictures into files beside them; leaves with exit code 1 where one failed."""
    from qwencli.commands.start_engine import announce_model, choose_model
    from qwencli.dataset.boxes import Overlays
    from qwencli.dataset.caption_processor import CaptionProcessor
    from qwencli.dataset.caption_set import open_set
    from qwencli.dataset.manifest import STATE_FOLDER
    from qwencli.dataset.pipeline import Stopper
    from qwencli.dataset.run_report import RunReport
    from qwencli.dataset.set_folder import output_place
    from qwencli.dataset.sources import Listing, Selection, list_inputs
    from qwencli.dataset.worklist import WorklistOptions

    run, output, frames = job.run, job.output, job.frames
    sampling, max_pixels = run.sampling_options(), run.decoded_pixels(job.keep_s)
    if caption_config.schema is not None and chosen.existing in (Existing.APPEND, Existing.PREPEND):
        raise UsageError(
            f"--existing {chosen.existing} and --schema exclude each other",
            "use --existing overwrite, or --samples for several answers",
        )
    check_samples(chosen.samples, sampling)
    devices = worker_devices(chosen, run)
    with output.status("listing pictures"):
        listing = list_inputs(
            job.inputs or ["."], Selection(chosen.recursive, tuple(chosen.glob or ()))
        )
    if not (listing.items or listing.refused):
        named = ", ".join(str(each) for each in job.inputs) or "this folder"
        if listing.unmatched:
            raise InputError(
                f"{named}: no picture or video there matches {' or '.join(chosen.glob or ())}",
                "check --glob; a pattern with a slash is of the whole path",
            )
        raise InputError(
            f"{named}: no picture or video there",
            "--recursive looks into its folders too" if not chosen.recursive else "check the path",
        )
    extension = caption_extension(chosen, caption_config)
    place = output_place(listing, chosen.output, extension)
    worklist_options = WorklistOptions(
        chosen.existing or Existing.SKIP,
        fields=tuple(caption_config.prompts.fields),
        samples=chosen.samples,
        retry_failed=chosen.retry_failed,
    )
    # The items stay here: what asks goes to other processes.
    where = Listing(listing.base)
    processor = CaptionProcessor(
        caption_config,
        where,
        sampling,
        functools.partial(where.open, frames=frames, max_pixels=max_pixels),
        system=system_messages(job.system),
        caption_extension=extension,
    )
    processor.check_fields(listing.items)
    folder = overlay_folder(caption_config, job.overlay, place.folder / STATE_FOLDER / "overlays")
    overlays = Overlays(folder, functools.partial(where.open, frames=frames), output.error)

    def tell(outcome: Outcome) -> None:
        reporter.add(outcome)
        overlays.add(outcome)

    spec = choose_model(run, output)
    settings = {
        "model": spec.name,
        **caption_config.settings(),
        "system": job.system,
        "frames": frames,
        "sampling": asdict(sampling),
        "engine": _given_modes(run),
    }
    device = ",".join(devices) or (f"ray {chosen.ray}" if chosen.ray else run.device)
    computes = what_computes(run, spec, device, caption_config.schema)
    with (
        open_set(
            listing,
            place,
            worklist_options,
            settings,
            redo=chosen.redo,
            look_only=chosen.dry_run,
        ) as whole,
        RunReport(
            whole, output, spec.name, computes, json=run.json, stats=run.stats
        ).telling() as reporter,
    ):
        reporter.begin(place.suffix, dry_run=chosen.dry_run)
        if chosen.redo is not None and not whole.options.redo:
            output.notice("note: --redo: no record of these captions meets the condition")
        if chosen.dry_run:
            reporter.show_questions(processor)
            return
        if whole.work.tasks or whole.work.refused:
            whole.begin(reporter.add)
            if whole.work.tasks:
                announce_model(spec, run, output, caption_config.wanted)
                stopper = Stopper(output.notice)
                config, count = run.engine_config(spec), len(whole.work.tasks)
                with (
                    _captioner(
                        config, processor, count, devices, chosen.ray, output, job.keep_s
                    ) as captioner,
                    stopper.watching(),
                    overlays,
                ):
                    reporter.device = device if devices else captioner.facts.get("device") or device
                    with reporter.progress.shown(reporter.device):
                        whole.caption(captioner, tell, lambda: stopper.asked)
            whole.end()
        if overlays.count:
            output.notice(f"pictures with their boxes: {folder}")
        all_well = reporter.finish()
        if not all_well or overlays.num_failed:
            raise typer.Exit(1)


@contextmanager
def _captioner(
    config: EngineConfig,
    processor: CaptionProcessor,
    count: int,
    devices: Sequence[str],
    ray: str | None,
    output: Output,
    keep_s: float | None,
) -> Iterator[Captioner]:
    """What makes `count` captions: workers of a cluster, or on devices, or an engine right here."""
    from qwencli.commands.start_engine import running_engine
    from qwencli.dataset.caption_worker import LocalCaptioner, WorkerConfig
    from qwencli.dataset.devices import DeviceWorkers
    from qwencli.dataset.ray_cluster import RayWorkers
    from qwencli.engine.abilities import fetch_model

    if not devices and ray is None:
        with running_engine(config, output, keep_s, processor.config.wanted) as engine:
            yield LocalCaptioner(engine, processor)
        return
    fetch_model(config, processor.config.wanted)
    worker_config = WorkerConfig(config, processor, -(-count // max(1, len(devices))))
    workers: DeviceWorkers | RayWorkers
    if ray is not None:
        workers, where = RayWorkers(worker_config, ray, output.warn), f"Ray ({ray})"
    else:
        workers, where = DeviceWorkers(worker_config, devices, output.warn), ", ".join(devices)
    with ExitStack() as stack:
        with output.status(f"loading {config.model.name} on {where}"):
            stack.enter_context(workers)
        yield workers


def what_computes(
    run: RunOptions, spec: ModelSpec, device: str, schema: str | None
) -> dict[str, str]:
    """By what the speed of a run is kept, for the estimate of the next one."""
    computes = {"model": spec.name, "device": device, **_given_modes(run)}
    if run.endpoint:
        # Servers are as fast as they are; their addresses may hold a password.
        servers = "\n".join(sorted(run.endpoint))
        computes["servers"] = hashlib.sha256(servers.encode()).hexdigest()[:16]
    if schema is not None:
        # What has to keep to one takes another time.
        computes["schema"] = hashlib.sha256(schema.encode()).hexdigest()[:16]
    return computes


def _given_modes(run: RunOptions) -> dict[str, str]:
    """The options that choose what computes, as far as they were given."""
    return {name: str(value) for name in _COMPUTES if (value := getattr(run, name)) is not None}
