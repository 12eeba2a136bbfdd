"""Workers on a Ray cluster: the tasks of a set as a Ray data set, mapped by one engine an actor.

An actor per GPU, or per node where the cluster has none. Pictures are opened where the actor runs,
so their folder must have the same path on every node; captions come back and are written here.
What an actor held whose process or node dies comes round again: a round of Ray Data takes what the
rounds before it have not brought back.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Self

from qwencli.dataset.caption_worker import (
    Facts,
    WorkerConfig,
    WorkerReady,
    joined_facts,
    run_worker,
)
from qwencli.dataset.pipeline import Outcome, Task
from qwencli.engine.machine.packages import require
from qwencli.errors import DatasetError, QwenCliError
from qwencli.output import counted

# Captions of one call of an actor, of which some run at a time: their rows fill an engine.
MOST_OF_A_CALL, CALLS_AT_ONCE = 64, 3
# Outcomes come back in blocks of so many bytes; what is not back is made again where a node dies.
_BLOCK_BYTES = 2**14
_LOOK_EVERY_S = 0.3
_ANSWER_S = 10.0
# Rounds in a row that bring nothing back.
_MOST_EMPTY_ROUNDS = 3
_COLUMN = "pickled"
Batch = dict[str, Any]


class RayWorkers:
    """Engines on a cluster; a context manager.

    Args:
        address: of the cluster, or "local" for one on this machine that ends with the command.
        say: takes a line about what is lost.

    Raises:
        MissingDependencyError: Ray is not installed, or is too old.
        DatasetError: on entering: there is no such cluster, or nothing in it that can compute.
    """

    def __init__(
        self, worker_config: WorkerConfig, address: str, say: Callable[[str], None]
    ) -> None:
        self._config, self._address, self._say = worker_config, address, say
        self._facts: list[Facts] = []

    @property
    def facts(self) -> Facts:
        return joined_facts(self._facts)

    def __enter__(self) -> Self:
        # Ray would tell its makers of each run.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        require(
            "ray.data",
            "--ray",
            "pip install 'qwencli[ray]'",
            "use --devices for the GPUs of this machine",
        )
        import ray

        self._ours = not ray.is_initialized()
        if self._ours:
            _check_address(self._address)
            address = None if self._address == "local" else self._address
            options: Batch = {"include_dashboard": False} if address is None else {}
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DatasetError(
                    f"--ray {self._address}: {line}", "check that the cluster runs (ray status)"
                ) from error
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        self._stop = ray.remote(num_cpus=0, max_restarts=-1)(_Stop).remote()
        return self

    def __exit__(self, *exc: object) -> None:
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._stop)
        if self._ours:
            ray.shutdown()

    def outcomes(
        self, tasks: Sequence[Task], stopping: Callable[[], bool]
    ) -> Generator[Outcome, None, None]:
        """See `worker.Captioner`.

        Raises:
            QwenCliError: a model cannot be loaded, or rounds bring nothing back any more.
        """
        left = {task.slot: task for task in tasks}
        empty = 0
        with self._telling(stopping):
            while left and not stopping():
                before = len(left)
                for outcome in self._round(list(left.values())):
                    # What came back twice is one caption.
                    if left.pop(outcome.task.slot, None) is not None:
                        yield outcome
                if not left or stopping():
                    return
                empty = empty + 1 if len(left) == before else 0
                many = counted(len(left), "caption")
                if empty == _MOST_EMPTY_ROUNDS:
                    raise DatasetError(
                        f"--ray: {many} did not come back, and no worker is left",
                        "the same command goes on where this one ended; see: ray status",
                    )
                self._say(f"workers were lost; the others make {many} again")

    def _round(self, tasks: list[Task]) -> Iterator[Outcome]:
        """What workers make of tasks; less than all where some of them die."""
        import ray

        resources, count = _actors()
        size = max(1, min(MOST_OF_A_CALL, len(tasks) // (CALLS_AT_ONCE * count)))
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1
        context.target_max_block_size = _BLOCK_BYTES
        with ray.data.DataContext.current(context):
            rows = [{_COLUMN: pickle.dumps(task)} for task in tasks]
            made = ray.data.from_items(
                rows, override_num_blocks=-(-len(tasks) // size)
            ).map_batches(
                _Actor,
                fn_constructor_args=(self._config, self._stop),
                compute=ray.data.ActorPoolStrategy(
                    size=count,
                    max_tasks_in_flight_per_actor=CALLS_AT_ONCE,
                    max_concurrent_calls_per_actor=CALLS_AT_ONCE,
                ),
                batch_size=size,
                batch_format="numpy",
                # What a dead actor had comes round again, and does not wait for its place.
                ray_remote_args_fn=lambda: {"scheduling_strategy": "SPREAD", "max_task_retries": 0},
                **resources,
            )
            with suppress(ray.exceptions.RayError):
                for row in made.iter_rows():
                    message = pickle.loads(row[_COLUMN])
                    if isinstance(message, QwenCliError):
                        raise message
                    if isinstance(message, WorkerReady):
                        self._facts.append(message.facts)
                    else:
                        yield message

    @contextmanager
    def _telling(self, stopping: Callable[[], bool]) -> Iterator[None]:
        """Tell the workers when the user wants to stop: this thread waits for outcomes."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK_EVERY_S):
                if stopping():
                    self._stop.ask.remote()
                    return

        thread = threading.Thread(target=look, name="look whether to stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _check_address(address: str) -> None:
    """Raise DatasetError where nobody listens, which Ray would wait for for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise DatasetError(
            f"--ray {address}: {getattr(error, 'strerror', None) or error}",
            "give the address that `ray start --head` prints, or: --ray local",
        ) from error


def _actors() -> tuple[Batch, int]:
    """What an actor takes, and how many there are."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        return {"num_gpus": 1}, gpus
    able = sum(node.get("CPU", 0) >= 1 for node in nodes)
    if not able:
        raise DatasetError("--ray: no node of the cluster has a CPU or GPU", "see: ray status")
    return {"num_cpus": 1}, able


class _Stop:
    """Whether the user wants to stop, for all actors of a run."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked


class _Actor:
    """What Ray Data maps tasks with: an engine in a thread, which answers several calls at once."""

    def __init__(self, worker_config: WorkerConfig, stop: Any) -> None:
        self._config, self._stop = worker_config, stop
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._replies: dict[Task, queue.SimpleQueue[bytes]] = {}
        self._ready: list[WorkerReady] = []
        self._end: QwenCliError | None = None
        self._num_running = 0
        self._stopping = self._ended = False
        for work in (self._watch, self._work):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        tasks = [pickle.loads(each) for each in batch[_COLUMN]]
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for task in tasks:
            self._replies[task] = answers
            self._tasks.put(task)
        left = len(tasks)
        while left:
            try:
                answer = answers.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                if self._ended:
                    break
                continue
            left -= 1
            yield _row(answer)
        if self._ready:
            yield _row(pickle.dumps(self._ready.pop()))
        if left and self._end is not None:
            yield _row(pickle.dumps(self._end))

    def _work(self) -> None:
        try:
            for message in run_worker(self._config, self._take, lambda: self._stopping):
                if isinstance(message, WorkerReady):
                    self._ready.append(message)
                    continue
                self._num_running -= 1
                task = replace(message.task, attempt=0)
                self._replies.pop(task).put(pickle.dumps(message))
        except QwenCliError as error:
            self._end = error
        except Exception as error:  # noqa: BLE001 - told where outcomes are awaited
            line = (str(error).strip() or "no message").splitlines()[0]
            self._end = DatasetError(
                f"{type(error).__name__}: {line}", "report this fault of qwencli"
            )
        finally:
            self._ended = True

    def _take(self) -> Task | None:
        """The next task; where nothing runs, waits for it, or until the user wants to stop."""
        while not self._stopping:
            idle = self._num_running == 0
            with suppress(queue.Empty):
                task = self._tasks.get(block=idle, timeout=_LOOK_EVERY_S if idle else None)
                self._num_running += 1
                return task
            if not idle:
                break
        return None

    def _watch(self) -> None:
        import ray

        while not self._stopping:
            time.sleep(_LOOK_EVERY_S)
            with suppress(ray.exceptions.RayError):
                self._stopping = ray.get(self._stop.asked.remote())


def _row(pickled: bytes) -> Batch:
    import numpy as np

    column = np.empty(1, dtype=object)
    column[0] = pickled
    return {_COLUMN: column}
