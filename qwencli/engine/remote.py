"""The remote engine: asks servers that speak OpenAI's API, as many at once as they like.

`endpoint_pool` shares the requests among them, `openai_client` talks to one. Knows no torch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qwencli.capabilities import why_not
from qwencli.config import DType, EngineConfig, EngineName, LoadFormat, ModelSource, ModelSpec
from qwencli.engine.endpoint_pool import EndpointPool
from qwencli.engine.openai_client import Endpoint, endpoint_url
from qwencli.engine.protocol import WAIT_S, QueuedEngine, RequestQueue
from qwencli.engine.request import RequestId, RequestSource, StepOutput
from qwencli.errors import AnswerError, QwenCliError, UnsupportedModeError, UsageError
from qwencli.results import EffectiveConfig, GenerationChunk

KEY_VARIABLE = "QWENCLI_API_KEY"


def remote_model(
    endpoints: Sequence[str],
    name: str | None,
    *,
    offline: bool = False,
    key_variable: str = KEY_VARIABLE,
) -> ModelSpec:
    """The model that is asked for by this name, or the only one that the servers have.

    Args:
        key_variable: see `RemoteEngine`.

    Raises:
        UsageError: there are several, and none was named.
        EndpointError: no server answers.
    """
    if not name:
        config = EngineConfig(
            ModelSpec("", ModelSource.REMOTE), EngineName.REMOTE, endpoints=tuple(endpoints)
        )
        with RemoteEngine(replace(config, offline=offline), key_variable) as engine:
            name = engine.config.model.name
    from qwencli.models.builtin import builtin_spec, find_builtin

    entry = find_builtin(name)
    known = None if entry is None else builtin_spec(entry)
    return ModelSpec(
        name,
        ModelSource.REMOTE,
        repo_id=known.repo_id if known else None,
        hub_config=known.hub_config if known else None,
    )


class RemoteEngine(QueuedEngine):
    """Implements `Engine` over servers; `load` asks each what models it has.

    Args:
        key_variable: the environment variable that holds the servers' API key.
        warn: takes a line, in another thread, when a server answers no more, or again. Without it
            such lines join `load_warnings`.

    Raises:
        UsageError: no endpoint, or one that is no address, on creation.
        UnsupportedModeError: a mode that is the server's own, on creation.

    `stream` raises InputError where a server refuses the request or a picture cannot be used,
    AnswerError where it gave no usable answer, and EndpointError where no server is left.
    """

    batch_from = 2

    def __init__(
        self,
        config: EngineConfig,
        key_variable: str = KEY_VARIABLE,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        config = replace(config, engine=EngineName.REMOTE)
        self._key_variable = key_variable
        _check_settings(config)
        self.config = config
        self.endpoints = [
            Endpoint(url) for url in dict.fromkeys(map(endpoint_url, config.endpoints))
        ]
        for endpoint in self.endpoints:
            if config.offline and not endpoint.is_local:
                raise UsageError(
                    f"--offline: {endpoint.name} is not on this machine", "leave --offline out"
                )
        self._pool: EndpointPool | None = None
        self._warnings: tuple[str, ...] = ()
        self._warn = warn or self._add_warning
        self._load_s = 0.0

    @property
    def effective(self) -> EffectiveConfig:
        names = ", ".join(endpoint.name for endpoint in self.endpoints)
        return EffectiveConfig("remote", None, None, None, names, None, None, speculate=None)

    @property
    def load_s(self) -> float:
        return self._load_s

    @property
    def max_seq_len(self) -> int | None:
        lengths = [each.max_seq_len for each in self.endpoints if each.max_seq_len is not None]
        return min(lengths, default=None)

    @property
    def model_type(self) -> str | None:
        """What all of the servers say."""
        said = {each.model_type for each in self.endpoints if each.model}
        return said.pop() if len(said) == 1 else None

    @property
    def can_think(self) -> bool | None:
        """False where one of the servers says so, as any may be asked; True where all do."""
        said = [each.can_think for each in self.endpoints]
        if False in said:
            return False
        return None if None in said else True

    @property
    def memory_plan(self) -> Mapping[str, int]:
        return {}

    @property
    def load_warnings(self) -> tuple[str, ...]:
        return self._warnings

    def _add_warning(self, text: str) -> None:
        if text not in self._warnings:  # one that comes and goes would fill them
            self._warnings += (text,)

    def load(self) -> None:
        """Ask the servers for their models.

        Raises:
            EndpointError: none of them can be used.
            UsageError: no model was named, and there are several.
        """
        if self._pool is not None:
            return
        started_s = time.perf_counter()
        pool = EndpointPool(self.endpoints, self._key_variable, self._warn)
        try:
            refusals = pool.wait(pool.learn_models(self.config.model))
            name = self.config.model.name or pool.first_model
        except BaseException:
            pool.close()
            raise
        self.config = replace(self.config, model=replace(self.config.model, name=name))
        self._pool, self._load_s = pool, time.perf_counter() - started_s
        self._warnings = tuple(
            f"{error.message}; the others are asked meanwhile" for error in refusals
        )

    def _make_queue(self) -> RequestQueue:
        return _RemoteQueue(self._opened_pool(), self.config)

    def _opened_pool(self) -> EndpointPool:
        assert self._pool is not None, "load() comes first"
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._close_queue()
            self._pool.close()
            self._pool = None


def _check_settings(config: EngineConfig) -> None:
    if not config.endpoints:
        raise UsageError(
            "--engine remote needs a server", "give --endpoint http://127.0.0.1:8000/v1"
        )
    modes = {axis: getattr(config, axis) for axis in ("engine", *_SERVERS_MODES)}
    refusal = why_not(modes)
    if refusal is not None:
        raise refusal.error()
    for name, default in _SERVERS_SETTINGS.items():
        if getattr(config, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise UnsupportedModeError(
                f"{flag} cannot be set from here: it belongs to the server of --endpoint",
                f"set it where that server is started, and leave {flag} out",
            )


_SERVERS_MODES = ("quantization", "attention", "cache", "kernels", "kv_dtype", "speculate")
_SERVERS_SETTINGS: Mapping[str, object] = {
    "device": "auto",
    "dtype": DType.AUTO,
    "load_format": LoadFormat.AUTO,
    "max_seq_len": None,
    "threads": None,
    "batch_invariant": False,
    "allow_pickle": False,
}


class _RemoteQueue:
    """The requests of one caller, each a task of the loop. One whose pieces were read is over
    when it breaks off; another is asked for again."""

    def __init__(self, pool: EndpointPool, config: EngineConfig) -> None:
        self._pool, self._config = pool, config
        self._ids = itertools.count()
        self._outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._unfinished: dict[RequestId, concurrent.futures.Future[None]] = {}

    @property
    def max_rows(self) -> int:
        return self._pool.max_rows

    @property
    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    def add(self, request: RequestSource, *, stream: bool = True) -> RequestId:
        number = next(self._ids)

        def tell(chunk: GenerationChunk) -> None:
            if stream or chunk.result is not None:
                self._outputs.put(StepOutput(number, chunk))
            elif chunk.text:  # it has begun
                self._outputs.put(StepOutput(number, GenerationChunk("", ())))

        async def answer() -> None:
            try:
                await self._pool.answer(request, self._config, tell, live=stream)
            except QwenCliError as error:
                self._outputs.put(StepOutput(number, error=error))
            except Exception as error:  # noqa: BLE001 - told to the one that waits for it
                failure = AnswerError(f"{type(error).__name__}: {error}", "report this fault")
                failure.__cause__ = error
                self._outputs.put(StepOutput(number, error=failure))

        self._unfinished[number] = self._pool.begin(answer())
        return number

    def step(self) -> list[StepOutput]:
        """What has come; waits for something."""
        if not self._unfinished:
            return []
        try:
            outputs = [self._outputs.get(timeout=WAIT_S)]
        except queue.Empty:
            return []
        with contextlib.suppress(queue.Empty):
            while True:
                outputs.append(self._outputs.get_nowait())
        outputs = [output for output in outputs if output.request in self._unfinished]
        for output in outputs:
            if output.finished:
                self._unfinished.pop(output.request, None)
        return outputs

    def abort(self, request: RequestId) -> None:
        running = self._unfinished.pop(request, None)
        if running is not None:
            running.cancel()

    def close(self) -> None:
        for number in list(self._unfinished):
            self.abort(number)
