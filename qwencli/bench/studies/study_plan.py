"""A study as asked for, as it will run, and what it will roughly cost (`--dry-run`).

    process = start + loads x load + runs x (prompt + tokens x token) + what conditions add

Bandwidth, launch rate and start are measured here and now; the token is that of `plan.predict`,
the others are tables, so this is to plan by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.bench.plan.campaign_plan import Plan, Settings
from qwencli.bench.plan.matrix_file import EXAMPLE_IMAGE
from qwencli.bench.plan.predict import MachineSpeed, duration, predict
from qwencli.bench.plan.stopping import StopRule
from qwencli.bench.studies.claim_file import Study
from qwencli.bench.studies.conditions import CONDITIONS, blocker
from qwencli.bench.studies.schedule import Layout, Process, lay_out, part_of
from qwencli.config import Cache, DType, LoadFormat, ModelSpec
from qwencli.engine.machine.device import DeviceFacts
from qwencli.messages import DEFAULT_PROMPT
from qwencli.output import counted

if TYPE_CHECKING:
    from rich.console import RenderableType


DEFAULT_RUNS, DEFAULT_TOKENS = 5, 48
QUICK_RUNS, QUICK_TOKENS = 3, 16
FORMAT = 1
STUDY, PROCESSES = "study.json", "processes"  # in a study's folder
# Seconds beside what `predict` counts: compiling once, and reading a prompt in each run.
COMPILE_S, PROMPT_S = 50.0, 0.1
# How much faster than from a disk random weights are there: what the loads of
# results/2026-11-23-h200-transformers leave after importing transformers.
RANDOM_FACTOR = 2.5


@dataclass(frozen=True)
class StudyRequest:
    """A study as asked for, nothing resolved.

    Args:
        runs: of each condition in each process.
        max_time_s: no process begins after it; None = no limit.
        part, parts: make only this part, from 1, of all processes dealt out to so many.
    """

    model: str | None
    load_format: LoadFormat
    device: str
    dtype: DType
    runs: int
    max_new_tokens: int
    seed: int
    max_time_s: float | None = None
    timeout_s: float = 1800.0
    part: int = 1
    parts: int = 1


@dataclass(frozen=True)
class PreparedStudy:
    """What will run; `models` by the name that cells carry."""

    request: StudyRequest
    studies: Sequence[Study]
    layout: Layout
    models: dict[str, ModelSpec]
    facts: DeviceFacts

    @property
    def processes(self) -> list[Process]:
        """The processes that this study makes: those of its part."""
        return part_of(self.layout.processes, self.request.part, self.request.parts)

    def document(self) -> dict[str, Any]:
        """study.json; two studies with equal documents do the same work."""
        return {
            "format": FORMAT,
            "claims": [study.claim for study in self.studies],
            "model": next(iter(self.models)),
            "load_format": str(self.request.load_format),
            "device": self.facts.device,
            "dtype": str(self.request.dtype),
            "runs": self.request.runs,
            "max_new_tokens": self.request.max_new_tokens,
            "seed": self.request.seed,
            "places": [
                {"claim": claim, "arm": arm, **asdict(place)}
                for (claim, arm), place in self.layout.places.items()
            ],
            "blocked": dict(self.layout.blocked),
            "about": {
                study.claim: why
                for study in self.studies
                if (why := blocker(study.about, self.facts))
            },
            "blocked_tests": [
                {"claim": study.claim, "part": part, "why": why}
                for study in self.studies
                for part, test in enumerate(study.tests, start=1)
                if (why := blocker(test.needs, self.facts))
            ],
            "processes": [
                {"name": p.name, "runs": list(p.runs), "environment": dict(p.environment)}
                for p in self.layout.processes
            ],
        }

    def plan(self, process: Process) -> Plan:
        """The campaign of one process."""
        request, held = self.request, process.held
        settings = Settings(
            stop=StopRule(len(process.runs), len(process.runs)),
            max_new_tokens=held.get("max_new_tokens", request.max_new_tokens),
            prompt=DEFAULT_PROMPT,
            images=(EXAMPLE_IMAGE,) * held.get("images", 1),
            seed=request.seed,
            device=self.facts.device,
            dtype=request.dtype,
            load_format=LoadFormat(held.get("load_format", request.load_format)),
        )
        cell = process.cell
        return Plan((cell,), settings, {cell.model: self.models[cell.model]})


def prepare_study(
    studies: Sequence[Study], request: StudyRequest, facts: DeviceFacts
) -> PreparedStudy:
    """Resolve models and lay the processes out.

    Raises:
        ModelError: a model is unknown, or no engine could load the study's own.
    """
    from qwencli.models.resolve import check_model, resolve_model

    main = resolve_model(request.model)
    check_model(main, request.load_format)
    layout = lay_out(studies, main.name, facts, request.runs, request.seed)
    models = {main.name: main}
    for process in layout.processes:
        name = process.cell.model
        models.setdefault(name, main if name == main.name else resolve_model(name))
    return PreparedStudy(request, studies, layout, models, facts)


def process_folder(folder: Path, name: str) -> Path:
    """Where a process of the study in `folder` keeps its campaign."""
    return folder / PROCESSES / name


def predicted_s(study: PreparedStudy, process: Process, speed: MachineSpeed) -> float | None:
    """Seconds of one process; None where `predict` knows no speed."""
    plan = study.plan(process)
    found = predict(plan, process.cell, speed)
    if found.seconds is None or found.tok_per_s is None:
        return None
    runs = len(process.runs)
    answers_s = (runs + 1) * plan.settings.max_new_tokens / found.tok_per_s
    load_s = max(0.0, found.seconds - answers_s - speed.start_s)
    if plan.settings.load_format is LoadFormat.DUMMY:
        load_s /= RANDOM_FACTOR
    extra_s = sum(CONDITIONS[name].extra_s for name in process.runs) + PROMPT_S * runs
    compiling = COMPILE_S if process.cell.cache is Cache.STATIC_COMPILE else 0.0
    return found.seconds + (process.loads - 1) * load_s + extra_s + compiling


def planned_study(study: PreparedStudy, seconds: Mapping[str, float | None]) -> RenderableType:
    """The processes in their order, and the claims that cannot run here."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    processes = study.processes
    table = Table(
        title=counted(len(processes), "process", "processes"), box=SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("#", justify="right")
    for name in ("process", "claims"):
        table.add_column(name, overflow="fold")
    for name in ("runs", "loads", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, process in enumerate(processes, start=1):
        took = seconds[process.name]
        table.add_row(
            str(number),
            process.name,
            " ".join(process.claims),
            str(len(process.runs)),
            str(process.loads),
            duration(took),
        )
    total = duration(sum(took for took in seconds.values() if took is not None))
    lines = [f"all together about {total}; without what conditions themselves slow down"]
    lines += [f"{claim} cannot run here: {why}" for claim, why in study.layout.blocked.items()]
    return Group(table, *(Text(line, style="dim") for line in lines))
