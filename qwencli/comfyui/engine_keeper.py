"""The one engine of this process, kept between runs of nodes until something else needs its memory.

It goes when another configuration is asked for, when ComfyUI wants memory on its device, when it
has been idle for as long as the last node said, and when the program ends. Nodes hold no state of
their own.
"""

from __future__ import annotations

import atexit
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from qwencli.comfyui import comfy_host
from qwencli.comfyui.schemas import RunsWhere
from qwencli.config import EngineConfig, LoadFormat
from qwencli.engine.abilities import Abilities, check_known, check_loaded, fetch_model
from qwencli.errors import EngineError, OutOfMemoryError, QwenCliError

if TYPE_CHECKING:
    from qwencli.engine.protocol import Engine
    from qwencli.engine.request import StepOutput
    from qwencli.messages import GenerationRequest
    from qwencli.results import GenerationChunk, GenerationResult

log = logging.getLogger("qwencli.comfyui")


@dataclass(frozen=True)
class EngineKey:
    """What tells one engine from another.

    Args:
        key_variable: of a remote one; the environment variable with the API key.
    """

    config: EngineConfig
    runs: RunsWhere = RunsWhere.IN_PROCESS
    key_variable: str = ""


class StoppableEngine:
    """An engine that looks between two steps whether the user has asked for a stop.

    Args:
        check: raises where that is so.
    """

    def __init__(self, engine: Engine, check: Callable[[], None]) -> None:
        self._engine, self._check = engine, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[StepOutput]:
        self._check()
        return self._engine.step()

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        self._check()
        # Closed at once, or what runs ahead would run on.
        with closing(cast("Any", self._engine.stream(request))) as chunks:
            for chunk in chunks:
                yield chunk
                self._check()

    def generate(self, request: GenerationRequest) -> GenerationResult:
        from qwencli.engine.protocol import drain

        return drain(self.stream(request))


class EngineKeeper:
    """Thread-safe: one node after the other has the engine.

    Args:
        create: makes an engine, not yet loaded; raises what is known to be wrong without a load.
    """

    def __init__(self, create: Callable[[EngineKey, float, Abilities], Engine]) -> None:
        self._create = create
        self._lock = threading.RLock()
        self._engine: Engine | None = None
        self._key: EngineKey | None = None
        self._timer: threading.Timer | None = None
        self._in_use = False

    @property
    def is_loaded(self) -> bool:
        return self._engine is not None

    @contextmanager
    def using(self, key: EngineKey, keep_s: float, wanted: Abilities) -> Iterator[Engine]:
        """The engine of `key`, loaded; another one is closed first.

        Args:
            keep_s: how long it stays afterwards; 0 = it is closed then.
            wanted: of its model.

        Raises:
            UnsupportedModeError: its model cannot do that; which mostly is told before the load,
                and then what was loaded stays.
            QwenCliError: it cannot be loaded, also after ComfyUI has given up its own models.
        """
        with self._lock:
            if self._in_use:
                raise EngineError("the engine is in use by this very thread", "report this fault")
            self._in_use = True
            self._stop_timer()
            try:
                engine = self._loaded(key, keep_s, wanted)
                check_loaded(key.config.model.name, engine, wanted)
                yield cast("Engine", StoppableEngine(engine, comfy_host.check_interrupted))
            except Exception as error:
                # What nobody foresaw may have left it in any state.
                if not (isinstance(error, QwenCliError) or comfy_host.is_interruption(error)):
                    self._close()
                raise
            finally:
                self._in_use = False
                if keep_s <= 0:
                    self._close()
                elif self._engine is not None:
                    self._start_timer(keep_s)

    def trim(self, device: str) -> None:
        """Give back what batches of pictures take on `device` ("": any), unless a node uses the
        engine; the model stays."""
        with self._idle() as engine:
            if engine is not None and self._is_on(device):
                engine.drop_queue()

    def give_back(self, device: str) -> None:
        """Close the engine where it takes memory of `device` ("": any), unless a node uses it."""
        with self._idle() as engine:
            if engine is not None and self._is_on(device):
                log.info("qwencli: the model is unloaded, as ComfyUI needs the memory")
                self._stop_timer()
                try:
                    self._close(with_process=True)
                except QwenCliError as error:
                    # ComfyUI loads a model just now, which may fit all the same.
                    log.warning("qwencli: %s", error.message)

    def close(self) -> None:
        """Close the engine, unless a node is using it."""
        with self._idle() as engine:
            if engine is not None:
                self._stop_timer()
                self._close()

    @contextmanager
    def _idle(self) -> Iterator[Engine | None]:
        """The engine, which nobody gets inside the block; None where there is none, or in use."""
        if self._engine is None or not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            yield None if self._in_use else self._engine
        finally:
            self._lock.release()

    def _loaded(self, key: EngineKey, keep_s: float, wanted: Abilities) -> Engine:
        if self._engine is not None and self._key == key:
            return self._engine
        made = self._create(key, keep_s, wanted)
        self._close()
        comfy_host.when_memory_is_wanted(self.trim, self.give_back)
        comfy_host.empty_cache()
        engine = None
        with suppress(OutOfMemoryError):
            engine = _opened(made)
        if engine is None:
            # Not in a handler: until one ends, the traceback holds what took the memory.
            log.info("qwencli: out of memory; ComfyUI is asked for the memory of its models")
            comfy_host.free_models()
            engine = _opened(made)
        self._engine, self._key = engine, key
        # Loading takes all objects out of garbage collection. ComfyUI finds models that nobody
        # uses any more by collecting, so here they stay in.
        gc.unfreeze()
        return engine

    def _is_on(self, device: str) -> bool:
        assert self._engine is not None, "somebody asked"
        kind, _, number = device.partition(":")
        ours, _, our_number = self._engine.effective.device.partition(":")
        return not device or (
            kind == ours and (not number or not our_number or number == our_number)
        )

    def _close(self, *, with_process: bool = False) -> None:
        """Close the engine. with_process: the resident process too, where nothing runs in it."""
        engine, key = self._engine, self._key
        self._engine = self._key = None
        if engine is None or key is None:
            return
        engine.close()
        if with_process and key.runs is RunsWhere.RESIDENT:
            from qwencli.server import resident

            there = resident.status()
            if there is not None and not there.running:
                resident.stop()

    def _start_timer(self, seconds: float) -> None:
        def close() -> None:
            with self._lock:
                if self._timer is timer and not self._in_use:
                    self._timer = None
                    self._close()

        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), close)
        timer.daemon, timer.name = True, "qwencli idle"
        self._timer = timer
        timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _opened(engine: Engine) -> Engine:
    """Loaded; closed where that fails, and may be loaded again."""
    try:
        engine.load()
    except BaseException:
        engine.close()
        raise
    return engine


def create(key: EngineKey, keep_s: float, wanted: Abilities) -> Engine:
    """The engine of `key`, not yet loaded; its model's files are here then.

    Raises:
        QwenCliError: it could not be loaded, or its model cannot do what is wanted, and that can
            be told before the load.
    """
    if key.runs is RunsWhere.REMOTE:
        from qwencli.engine.remote import RemoteEngine

        return RemoteEngine(key.config, key.key_variable)
    model = key.config.model
    check_known(model, wanted)
    if model.path is None and key.config.load_format is LoadFormat.AUTO:
        log.info("qwencli: downloading %s (kept in the Hugging Face cache)", model.repo_id)
    fetch_model(key.config, wanted)
    if key.runs is RunsWhere.RESIDENT:
        from qwencli.server.resident_engine import ResidentEngine

        # A node that keeps nothing still needs it for as long as it runs.
        return ResidentEngine(key.config, max(keep_s, 1.0), log.info)
    from qwencli.engine.factory import create_engine

    return create_engine(key.config)


KEEPER = EngineKeeper(create)
atexit.register(KEEPER.close)
