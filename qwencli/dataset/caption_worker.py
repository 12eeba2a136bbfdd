"""The engine's side of a captioned set: what one worker does, in this process or in another.

A worker is told once what it works with (`WorkerConfig`), and then which captions to make. It knows
nothing of the manifest, of files that captions go to, or of other workers: outcomes go back to the
one process that keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qwencli.config import EngineConfig, EngineName, LoadFormat, ModelSpec
from qwencli.dataset.pipeline import Outcome, Task, outcomes
from qwencli.errors import UsageError

if TYPE_CHECKING:
    from qwencli.dataset.caption_processor import CaptionProcessor
    from qwencli.engine.protocol import Engine

Facts = Mapping[str, str | None]


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker works with. Can be pickled.

    Args:
        processor: has asked nothing yet.
        expected: about how many captions each worker makes.
    """

    config: EngineConfig
    processor: CaptionProcessor
    expected: int


@dataclass(frozen=True)
class WorkerReady:
    """A worker that has loaded its model.

    Args:
        facts: what really runs: columns of the manifest's `runs`.
        max_rows: captions that it makes at once.
        warnings: what loading has to say, a line each.
    """

    facts: Facts
    max_rows: int
    warnings: tuple[str, ...] = ()


class Captioner(Protocol):
    """Makes captions: one engine, or many workers. `facts` are of all that have run so far."""

    @property
    def facts(self) -> Facts: ...

    def outcomes(
        self, tasks: Sequence[Task], stopping: Callable[[], bool]
    ) -> Generator[Outcome, None, None]:
        """Make captions of all tasks, or of those that run when `stopping` begins to be true.

        Raises:
            QwenCliError: nothing can go on.
        """


class LocalCaptioner:
    """One engine, which is loaded, in this process."""

    def __init__(self, engine: Engine, processor: CaptionProcessor) -> None:
        self._engine, self._processor = engine, processor
        self.facts = adapt_to_model(engine, processor).facts

    def outcomes(
        self, tasks: Sequence[Task], stopping: Callable[[], bool]
    ) -> Generator[Outcome, None, None]:
        waiting = iter(tasks)
        return outcomes(
            self._engine,
            lambda: next(waiting, None),
            self._processor.stages(),
            expected=len(tasks),
            stopping=stopping,
        )


def run_worker(
    worker_config: WorkerConfig, take: Callable[[], Task | None], stopping: Callable[[], bool]
) -> Iterator[WorkerReady | Outcome]:
    """Load the model, say what runs, then caption what `take` gives, until it gives nothing.

    Args:
        take: see `pipeline.outcomes`.

    Raises:
        QwenCliError: the model cannot be loaded, or the engine cannot go on.
    """
    from qwencli.engine.factory import create_engine

    engine = create_engine(worker_config.config)
    engine.load()
    try:
        yield adapt_to_model(engine, worker_config.processor)
        yield from outcomes(
            engine,
            take,
            worker_config.processor.stages(),
            expected=worker_config.expected,
            stopping=stopping,
        )
    finally:
        engine.close()


def adapt_to_model(engine: Engine, processor: CaptionProcessor) -> WorkerReady:
    """Tell `processor` what is known of a loaded model: its longest request, how it counts tokens,
    and how it counts in boxes.

    Raises:
        UsageError: it is not known how it counts in boxes, which `processor` wants.
    """
    config = engine.config
    processor.max_seq_len = engine.max_seq_len
    if processor.config.boxes:
        processor.count_boxes_in(_box_grid(engine))
    has_files = config.load_format is LoadFormat.AUTO and config.engine is not EngineName.REMOTE
    if processor.config.format.max_tokens is not None and has_files:
        from qwencli.engine.frontend.tokenizer import Tokenizer
        from qwencli.models.resolve import locate

        folder = locate(config.model, offline=True, allow_pickle=config.allow_pickle)
        tokenizer = Tokenizer.from_folder(folder)
        processor.count_tokens_with(lambda text: len(tokenizer.encode(text)))
    return WorkerReady(_facts(engine, config.model), engine.max_rows, tuple(engine.load_warnings))


def _box_grid(engine: Engine) -> int | None:
    """See `Family.box_grid`.

    Raises:
        UsageError: nothing is known of how the model counts.
    """
    from qwencli.models.families import FAMILIES

    model = engine.config.model
    # What the model is: as its files or its server say, else as a server's name for it does.
    kind = engine.model_type or (model.hub_config or {}).get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        hint = f"take a model of these: {', '.join(FAMILIES)}"
        if engine.config.engine is EngineName.REMOTE:
            hint = (
                "start the server with the model's name on the hub (vLLM: --served-model-name "
                "Qwen/Qwen3-VL-4B-Instruct), or with qwencli serve"
            )
        raise UsageError(
            f"--schema boxes: nothing is known of how {model.name} counts in boxes", hint
        )
    return family.box_grid


def joined_facts(every: Sequence[Facts]) -> Facts:
    """Of several workers: each value that any of them has, once."""
    names = dict.fromkeys(name for facts in every for name in facts)
    values = {name: dict.fromkeys(facts.get(name) for facts in every) for name in names}
    return {
        name: ", ".join(value for value in found if value is not None) or None
        for name, found in values.items()
    }


def _facts(engine: Engine, model: ModelSpec) -> Facts:
    ran = engine.effective
    return {
        "model": model.name,
        "revision": model_revision(model),
        "engine": ran.engine,
        "quantization": ran.quantization,
        "attention": ran.attention,
        "cache": ran.cache,
        "kernels": ran.kernels,
        "device": ran.device,
        "dtype": ran.dtype,
    }


def model_revision(model: ModelSpec) -> str | None:
    """What tells two states of a model's files apart: the hub's commit, or a digest of their sizes
    and of config.json; None where the files are not here (random weights)."""
    from qwencli.models.hub import find_cached

    folder = model.path
    if folder is None and model.repo_id is not None:
        folder = find_cached(model.repo_id)
    if folder is None:
        return None
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    try:
        files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        for file in files:
            if file.is_file():
                digest.update(f"{file.name}:{file.stat().st_size};".encode())
        config = folder / "config.json"
        if config.is_file():
            digest.update(config.read_bytes())
    except OSError:
        return None
    return f"files-{digest.hexdigest()[:16]}"
