"""The nodes that run through `dataset/`: captions of a folder, answers held to a schema, boxes."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.comfyui import comfy_host
from qwencli.comfyui.engine_use import EngineUse, expected_requests, first_lines
from qwencli.comfyui.node_inputs import (
    Values,
    choice_of,
    engine_key,
    node_text,
    prompt_of,
    sampling_options,
    thinking_budget,
)
from qwencli.comfyui.pictures import Batch
from qwencli.config import Existing
from qwencli.errors import InputError, OutOfMemoryError, UsageError
from qwencli.messages import system_messages

if TYPE_CHECKING:
    from qwencli.dataset.caption_processor import CaptionConfig
    from qwencli.dataset.caption_set import Totals
    from qwencli.dataset.sources import Listing
    from qwencli.results import GenerationResult


def caption_folder(values: Values) -> tuple[Any, ...]:
    from qwencli.dataset.caption_format import CaptionFormat
    from qwencli.dataset.caption_processor import CaptionConfig, CaptionProcessor
    from qwencli.dataset.caption_set import open_set
    from qwencli.dataset.caption_worker import LocalCaptioner
    from qwencli.dataset.pipeline import Captioned, Outcome
    from qwencli.dataset.prompting import Template, prompt_set
    from qwencli.dataset.set_folder import output_place
    from qwencli.dataset.sources import Listing
    from qwencli.dataset.worklist import WorklistOptions

    listing = _listing(values)
    prefix, suffix = (
        Template(values[name], name) if values[name] else None for name in ("prefix", "suffix")
    )
    prompts = prompt_set(
        prompt=prompt_of(values),
        default="",
        seed=values["seed"],
        frames=[each for each in (prefix, suffix) if each is not None],
    )
    budget, sampling = thinking_budget(values), sampling_options(values)
    caption_config = CaptionConfig(prompts, CaptionFormat(prefix, suffix), thinking_budget=budget)
    extension, output = values["caption_extension"].strip() or ".txt", values["output"].strip()
    if "\0" in output:  # a shell could not give it, a graph can
        raise UsageError("output has a null character in it", "take it out")
    place = output_place(listing, Path(output) if output else None, extension)
    where = Listing(listing.base)
    processor = CaptionProcessor(
        caption_config,
        where,
        sampling,
        where.open,
        system=system_messages(values["system"].strip()),
        caption_extension=extension,
    )
    processor.check_fields(listing.items)
    options = WorklistOptions(
        choice_of(values, "existing", Existing), retry_failed=values["retry_failed"]
    )
    key = engine_key(values)
    settings = {
        "model": key.config.model.name,
        **caption_config.settings(),
        "system": values["system"].strip() or None,
        "frames": None,
        "sampling": asdict(sampling),
        "engine": {name: str(values[name]) for name in ("quantization", "attention", "cache")},
    }
    failed: list[str] = []
    last: list[GenerationResult] = []
    with open_set(listing, place, options, settings) as whole:
        work, done = whole.work, 0
        tell = comfy_host.progress(max(1, len(work.tasks)))

        def report(outcome: Outcome) -> None:
            nonlocal done
            if isinstance(outcome, Captioned):
                last[:] = [outcome.result]
            else:
                failed.append(node_text(outcome.error))
            done += 1
            tell(min(done, len(work.tasks)))

        statistics = "no caption was made in this run, so that there are no figures"
        if work.tasks or work.refused:
            whole.begin(report)
            if work.tasks:
                with EngineUse(values, caption_config.wanted) as use:
                    whole.caption(LocalCaptioner(use.engine, processor), report, lambda: False)
                    statistics = use.statistics(last) if last else statistics
            whole.end()
        failures, totals = whole.write_failures(), whole.totals
    if totals.captioned:
        rate = totals.captioned / totals.seconds
        tokens = totals.num_new_tokens / totals.seconds
        statistics = f"{rate:.1f} captions/s, {tokens:.0f} tok/s; the last one:\n{statistics}"
    lines = [_counts(listing.base, totals)]
    if work.num_existing:
        lines.append(f"{work.num_existing} had a caption already")
    if work.failed_before:
        lines.append(f"{len(work.failed_before)} failed before (retry_failed tries again)")
    lines += first_lines(failed)
    if failures is not None:
        lines.append(f"what failed, and why: {failures}")
    return "\n".join(lines), totals.captioned, totals.failed, statistics


def _counts(folder: Path, totals: Totals) -> str:
    from qwencli.dataset.progress import duration

    took = f" in {duration(totals.seconds)}" if totals.captioned else ""
    return f"{folder}: {totals.captioned} captioned, {totals.failed} failed{took}"


def _listing(values: Values) -> Listing:
    """The pictures and videos of a folder.

    Raises:
        QwenCliError: there is no such folder, or no picture in it.
    """
    from qwencli.dataset.sources import Selection, list_inputs

    path, glob = values["path"].strip(), values["glob"].strip()
    if not path:
        raise UsageError("path is empty", "give the folder with the pictures")
    if not _is_there(path):
        raise InputError(f"{path}: no such folder", "check path, as this machine sees it")
    listing = list_inputs([path], Selection(values["recursive"], (glob,) if glob else ()))
    if not (listing.items or listing.refused):
        raise InputError(
            f"{path}: no picture or video there",
            "check path and glob" if values["recursive"] else "check path and glob, or recursive",
        )
    return listing


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False  # too long a name, or one nobody may look at


def structured_captions(values: Values) -> tuple[Any, ...]:
    from qwencli.dataset.caption_processor import CaptionConfig
    from qwencli.dataset.guards import Guards
    from qwencli.dataset.prompting import asks_for
    from qwencli.engine.constrained import SchemaCheck, read_schema

    schema = read_schema(values["schema"], "schema")
    prompt = _escaped(values["prompt"]) or asks_for(schema)
    caption_config = CaptionConfig(
        _prompts(prompt),
        guards=Guards(invalid=SchemaCheck(schema)),
        schema=schema,
        thinking_budget=thinking_budget(values),
    )
    texts, statistics = _shaped(values, Batch(values["images"], "images"), caption_config)
    one = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    return one, texts, statistics


def find_boxes(values: Values) -> tuple[Any, ...]:
    from qwencli.dataset import boxes
    from qwencli.dataset.caption_processor import CaptionConfig
    from qwencli.dataset.guards import Guards
    from qwencli.engine.constrained import SchemaCheck, read_schema

    schema = read_schema(boxes.schema(), "the schema of boxes")
    caption_config = CaptionConfig(
        _prompts(_escaped(values["prompt"]) or boxes.PROMPT),
        guards=Guards(invalid=SchemaCheck(schema)),
        schema=schema,
        boxes=True,
        thinking_budget=thinking_budget(values),
    )
    batch = Batch(values["images"], "images")
    texts, statistics = _shaped({"system": "", **values}, batch, caption_config)
    found = [json.loads(text) for text in texts]
    drawn = [boxes.draw(batch.image(index), each, None) for index, each in enumerate(found)]
    mask = batch.masks_like([[box["bbox_2d"] for box in each] for each in found])
    return batch.pictures_like(drawn), texts, mask, statistics


def _escaped(prompt: str) -> str:
    """A prompt in which braces mean themselves."""
    return prompt.strip().replace("{", "{{").replace("}", "}}")


def _prompts(prompt: str) -> Any:
    from qwencli.dataset.prompting import prompt_set

    return prompt_set(prompt=prompt, default="")


def _shaped(values: Values, batch: Batch, caption_config: CaptionConfig) -> tuple[list[str], str]:
    """An answer about each picture in the form that `caption_config` wants, and statistics.

    Raises:
        QwenCliError: the first picture that has no such answer.
    """
    from qwencli.dataset.caption_processor import CaptionProcessor
    from qwencli.dataset.caption_worker import adapt_to_model
    from qwencli.dataset.pipeline import Failed, Outcome, Task, outcomes
    from qwencli.dataset.sources import Item, Listing

    parts = {batch.name_of(index): index for index in range(len(batch))}
    tasks = [Task(Item(name)) for name in parts]
    processor = CaptionProcessor(
        caption_config,
        Listing(Path()),
        sampling_options(values),
        lambda item: batch.part(parts[item.key]),
        system=system_messages(values["system"].strip()),
    )
    with EngineUse(values, caption_config.wanted) as use:
        adapt_to_model(use.engine, processor)
        made: dict[str, Outcome] = {}
        tell, waiting = comfy_host.progress(len(tasks)), tasks
        for last_try in (False, True):
            left, expected = iter(waiting), expected_requests(use.engine, len(waiting))
            take = functools.partial(next, left, None)
            for outcome in outcomes(use.engine, take, processor.stages(), expected=expected):
                made[outcome.task.item.key] = outcome
                tell(len(made))
            waiting = [task for task in tasks if _ran_out(made[task.item.key])]
            if last_try or not waiting:
                break
            comfy_host.free_models()
        texts, results = [], []
        for name in parts:
            outcome = made[name]
            if isinstance(outcome, Failed):
                raise outcome.error
            texts.append(outcome.caption)
            results.append(outcome.result)
        return texts, use.statistics(results)


def _ran_out(outcome: Any) -> bool:
    return isinstance(getattr(outcome, "error", None), OutOfMemoryError)
