"""The native engine: our own decoder and vision tower, decoding from replayed CUDA graphs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qwencli.capabilities import Lacks, Need, fastest_cache, fastest_kernels
from qwencli.config import (
    Attention,
    Cache,
    DType,
    EngineConfig,
    EngineName,
    Kernels,
    KVDType,
    LoadFormat,
    Quantization,
    SamplingParams,
    Speculate,
)
from qwencli.engine.base_engine import BaseEngine
from qwencli.engine.cache.kv_cache import KV_SCHEMES
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.device_memory import release
from qwencli.engine.frontend.model_files import FoundModel, ModelFiles, find_model
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.loading import weights
from qwencli.engine.loading.reader import pin_ahead
from qwencli.engine.machine.cpu_threads import computing_with
from qwencli.engine.machine.host import host_memory
from qwencli.engine.machine.python_runtime import (
    LOAD_TURN_S,
    gc_freeze_loaded,
    gc_thawed,
    quick_function_sources,
    undisturbed,
)
from qwencli.engine.native.batch_plan import BATCH_LIMITS, plan_batch
from qwencli.engine.native.decode_state import STEPPERS, DecodeState, decodes_on_cpu
from qwencli.engine.native.generate import Generation, row_logits
from qwencli.engine.native.memory_plan import MemoryPlan, plan_memory
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.supported import (
    batch_invariant_for,
    check_supported,
    fused_for,
    quantizer_for,
)
from qwencli.engine.protocol import RequestQueue
from qwencli.engine.request import RequestId, StepOutput
from qwencli.engine.resolve import (
    check_modes,
    device_lacks,
    no_kernels,
    resolve_attention,
    resolve_device,
    resolve_dtype,
)
from qwencli.engine.response import ResponseBuilder
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.errors import MissingDependencyError, UnsupportedModeError
from qwencli.messages import GenerationRequest
from qwencli.models.checkpoint import has_draft_head
from qwencli.models.memory import RUNTIME_BYTES, packed_weight_bytes
from qwencli.models.quant_formats import PackedFormat, format_of
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.results import EffectiveConfig, GenerationChunk
from qwencli.tracing import span

if TYPE_CHECKING:
    from pathlib import Path

    from qwencli.engine.constrained import TokenMatcher
    from qwencli.engine.loading.weight_cache import BackgroundWriter, CacheWriter
    from qwencli.engine.native.kernel_loader import KernelLoader
    from qwencli.engine.native.kernel_plan import PlannedModel
    from qwencli.engine.spec_decode.verify import Speculator


# How long the end of an engine waits for quantized weights to be on disk.
CACHE_WRITE_S = 10.0


@dataclass(frozen=True)
class WarmedKernels:
    """What `NativeEngine.warm_kernels` did: kernels that are ready now, those of them that it
    compiled, and what went wrong."""

    folder: str
    kernels: int
    compiled: int
    seconds: float
    warnings: tuple[str, ...]


class NativeEngine(BaseEngine):
    """One model, its cache and its graphs.

    Raises:
        UnsupportedModeError: a mode this engine does not have, on creation.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._generation: Generation | None = None
        self._model: QwenModel | None = None
        self._plan: MemoryPlan | None = None
        self._vision_cache = VisionCache()
        self._pool: dict[str, int] = {}
        # What kernels depend on, where they can be compiled ahead; and where they run.
        self._kernel_plan: PlannedModel | None = None
        self._torch_device = torch.device("cpu")
        self._cache_writer: BackgroundWriter | None = None
        self._pinning: threading.Thread | None = None
        # What steps gave others while a stream ran.
        self._outputs_of_others: list[StepOutput] = []

    @property
    def max_seq_len(self) -> int:
        assert self._plan is not None, "load() comes first"
        return self._plan.max_seq_len

    @property
    def memory_plan(self) -> Mapping[str, int]:
        assert self._plan is not None, "load() comes first"
        return {**self._plan.parts, **self._pool}

    def _fitted(self, files: ModelFiles) -> ModelFiles:
        assert self._plan is not None, "after the plan"
        tower = read_shape(files.hub_config).vision
        if tower is None or self.config.max_pixels is not None:
            return files
        side = tower.patch_size * tower.merge_size
        pixels = self._plan.max_image_tokens * side**2
        return replace(files, prompts=files.prompts.within(pixels))

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        self.load()
        asks_odds = request.logprobs is not None and self.max_rows > 1
        if self._generation is None or self.config.batch_invariant or asks_odds:
            yield from self._stream_as_row(request)
            return
        # From the first picture on: every operation of a prompt's pass takes the interpreter lock
        # back, hundreds of turns before the first token.
        with undisturbed():
            yield from super().stream(request)

    def _stream_as_row(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """A lone request as a row of a batch: what it would be beside others, and the only way of
        models that run in rows alone."""
        number, over = self.add(request), False
        try:
            while not over:
                outputs = self._step_of_rows()
                self._outputs_of_others += [each for each in outputs if each.request != number]
                for output in (each for each in outputs if each.request == number):
                    if output.error is not None:
                        raise output.error
                    assert output.chunk is not None, "an output is an error or a chunk"
                    over = output.finished
                    yield output.chunk
        finally:
            self.abort(number)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._outputs_of_others) or super().has_unfinished

    def step(self) -> list[StepOutput]:
        found, self._outputs_of_others = self._outputs_of_others, []
        return found or self._step_of_rows()

    def abort(self, request: RequestId) -> None:
        self._outputs_of_others = [
            each for each in self._outputs_of_others if each.request != request
        ]
        super().abort(request)

    def _step_of_rows(self) -> list[StepOutput]:
        # As a lone stream computes: how many threads share a sum is part of it.
        as_alone = self._generation is None or self.config.batch_invariant
        with computing_with(self._threads if as_alone else None):
            return super().step()

    def _begin_load(self, device: str) -> None:
        if device.startswith("cuda") and self.config.load_format is not LoadFormat.DUMMY:
            place = torch.device(device)
            # No daemon: one that comes back from CUDA while a process ends, as after a model that
            # cannot be opened, aborts it.
            self._pinning = threading.Thread(target=pin_ahead, args=(place,))
            self._pinning.start()

    def _load(self, found: FoundModel) -> tuple[ModelFiles, EffectiveConfig]:
        with undisturbed(LOAD_TURN_S), quick_function_sources(), gc_freeze_loaded(self):
            if self._pinning is not None:
                self._pinning.join()
            try:
                return self._load_all(found)
            except BaseException:
                self._generation = self._model = None  # their memory is what another try needs
                raise

    def _load_all(self, found: FoundModel) -> tuple[ModelFiles, EffectiveConfig]:
        device = resolve_device(self.config.device)
        lacks = device_lacks(device)
        shape = self._shape_of(found)
        rows_only = shape.text.rows_only
        check_modes(self.config, EngineName.NATIVE, lacks, shape.text.traits)
        cache = self.config.cache or fastest_cache(EngineName.NATIVE, lacks)
        packed = self._packed(found)
        kernels = self._kernels(cache, lacks, is_packed=packed is not None)
        warnings: list[str] = []
        if kernels is Kernels.TRITON:
            kernels = self._launchable(device, warnings)
        invariant = None
        if self.config.batch_invariant:
            invariant = batch_invariant_for(kernels, device)
        kv = KV_SCHEMES[self.config.kv_dtype]
        dtype = resolve_dtype(self.config.dtype, device, found.checkpoint_dtype)
        self._plan = plan_memory(
            found.hub_config,
            self.config.model.name,
            dtype=dtype,
            model_limit=found.max_seq_len,
            wanted=self.config.max_seq_len,
            free_bytes=_free_bytes(device),
            max_pixels=self.config.max_pixels,
            own_pixels=found.max_pixels,
            quantization=self.config.quantization,
            kv_dtype=self.config.kv_dtype,
            checkpoint_weights=_checkpoint_weights(found, shape, packed, dtype),
            prompt_graphs=cache is Cache.STATIC_GRAPH,
            drafting=self.config.speculate is not Speculate.OFF,
            draft_head=shape.text.draft_head,
        )
        check_supported(shape)
        attention = resolve_attention(
            self.config.attention, EngineName.NATIVE, shape, dtype, device
        )
        place, torch_dtype = torch.device(device), getattr(torch, dtype.value)
        self._kernel_plan = self._plan_kernels(kernels, shape, torch_dtype, packed)
        self._torch_device = place
        compiling = self._begin_kernels(rows=0)
        fused = fused_for(kernels, self.config.attention)
        left_to_us = self.config.attention is Attention.AUTO

        def make(shape: ModelShape, loaded: weights.LoadedWeights, slots: int) -> QwenModel:
            return QwenModel(shape, loaded, slots, attention, fused, kv, left_to_us, invariant)

        with ExitStack() as begun:
            if compiling is not None:
                begun.callback(compiling.close)
            pending = None
            if found.folder is not None:
                reading = self._begin_weights(found.folder, shape, torch_dtype, packed)
                pending = begun.enter_context(reading)
            warming = None
            # Where kernels are compiled the load waits for them; this would make it only longer.
            if place.type == "cuda" and not (compiling is not None and compiling.compiles):
                from qwencli.engine.native.warmup import WarmUp

                warming = WarmUp(
                    shape,
                    torch_dtype,
                    place,
                    make,
                    graphs=cache is Cache.STATIC_GRAPH,
                    room_bytes=self._plan.total - self._plan.weights - RUNTIME_BYTES,
                )
            files = self._open(found)
            with span("weights"):
                quantizer = quantizer_for(kernels)
                if pending is None:
                    mode = self.config.quantization
                    loaded = weights.dummy(shape, torch_dtype, place, mode, quantizer)
                else:
                    loaded = pending.finish(quantizer)
            begun.pop_all()
        if warming is not None:
            with span("wait for the warm-up"):
                warming.wait()
        # More slots than anybody may ask for: graph capture needs a place to write, and so do
        # drafts that turn out wrong.
        drafting = self.config.speculate is not Speculate.OFF
        slots = self._plan.max_seq_len + 1 + (MAX_VERIFY_TOKENS if drafting else 0)
        with torch.inference_mode():
            model = make(shape, loaded, slots)
            store, state = None, None
            if not rows_only:
                store = model.dynamic_cache() if cache is Cache.DYNAMIC else model.static_cache()
                state = DecodeState(model, store, slots, with_drafts=drafting)
            effective = EffectiveConfig(
                engine=EngineName.NATIVE.value,
                quantization=loaded.effective_scheme(model.step_ops.activation_bits),
                attention=_row_attention(model)
                if state is None
                else _decode_attention(state, cache),
                cache=cache.value,
                device=device,
                dtype=dtype.value,
                kernels=kernels.value,
                kv_dtype=dtype.value if kv is None else kv.value,
                speculate=(Speculate.MTP if shape.text.draft_head else self.config.speculate).value,
                threads=self._threads,
            )
            self._model = model
            if store is not None and state is not None:
                prompts = None
                if cache is Cache.STATIC_GRAPH:
                    from qwencli.engine.native.prefill_graphs import PrefillGraphs

                    prompts = PrefillGraphs(model, store, slots, self._plan.graph_sizes)
                self._generation = Generation(
                    model,
                    state,
                    STEPPERS[cache](state),
                    effective,
                    self._vision_cache,
                    self._speculator(state, cache),
                    prompts,
                )
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        if compiling is not None:
            with span("wait for kernels"):
                compiling.wait()
            warnings += compiling.notes()
        self._warnings = tuple(warnings)
        self._begin_cache_write(loaded.keeping, cache)
        return files, effective

    def _shape_of(self, found: FoundModel) -> ModelShape:
        """The model's, with its head that drafts tokens where that is to be used."""
        shape, speculate = found.shape, self.config.speculate
        layers = shape.text.mtp_layers
        if speculate is Speculate.MTP and layers != 1:
            head = "head that drafts tokens (MTP)"
            has = f"a {head} of {layers} layers, and those of one run" if layers else f"no {head}"
            raise UnsupportedModeError(
                f"--speculate mtp: {self.config.model.name} has {has}",
                nearest=Speculate.AUTO.value,
            )
        wanted = speculate is Speculate.MTP
        if speculate is Speculate.AUTO and layers == 1:
            wanted = found.folder is None or has_draft_head(found.stored)
        return shape.with_draft_head() if wanted else shape

    def _begin_cache_write(self, writer: CacheWriter | None, cache: Cache) -> None:
        """Begin to write what this load has quantized."""
        if writer is None:
            return
        writer.begin()
        if writer.warning is not None:
            self._warnings += (writer.warning,)
            return
        from qwencli.engine.loading.weight_cache import BackgroundWriter

        self._cache_writer = BackgroundWriter(writer, self._torch_device)
        if cache is Cache.STATIC_COMPILE:
            self._end_cache_write(None)  # torch captures its graphs such that no thread may copy

    def _end_cache_write(self, wait_s: float | None) -> None:
        writer, self._cache_writer = self._cache_writer, None
        warning = None if writer is None else writer.end(wait_s)
        self._warnings += () if warning is None else (warning,)

    def warm_kernels(self) -> WarmedKernels:
        """Compile all kernels of this model and these modes, for lone requests and for batches.

        Raises:
            UnsupportedModeError: plain torch runs here.
        """
        started, warnings = time.perf_counter(), list[str]()
        found = find_model(replace(self.config, load_format=LoadFormat.DUMMY))
        shape = self._shape_of(found)
        device = resolve_device(self.config.device)
        lacks = device_lacks(device)
        check_modes(self.config, EngineName.NATIVE, lacks)
        cache = self.config.cache or fastest_cache(EngineName.NATIVE, lacks)
        kernels = self._kernels(cache, lacks)
        if kernels is not Kernels.TRITON:
            raise no_kernels(lacks.get(Need.TRITON, f"on {device} plain torch runs"))
        if self._launchable(device, warnings) is not Kernels.TRITON:
            raise UnsupportedModeError(warnings[0])
        from qwencli.engine.native.kernel_cache import use_folder_of

        self._torch_device = torch.device(device)
        dtype = resolve_dtype(self.config.dtype, device, found.checkpoint_dtype)
        self._kernel_plan = self._plan_kernels(kernels, shape, getattr(torch, dtype.value), None)
        ready = compiled = 0
        for rows in (0, BATCH_LIMITS["cuda"].max_rows):
            loading = self._begin_kernels(rows)
            assert loading is not None, "there is a plan"
            loading.wait()
            ready, compiled = loading.num_kernels, compiled + loading.num_compiled
            warnings += loading.notes()
        folder = str(use_folder_of(self._torch_device))
        seconds = time.perf_counter() - started
        return WarmedKernels(folder, ready, compiled, seconds, tuple(warnings))

    def _kernels(self, cache: Cache, lacks: Lacks, is_packed: bool = False) -> Kernels:
        """The kernels asked for, which `check_modes` has not refused, or the fastest.

        Args:
            is_packed: whether the checkpoint is quantized already.
        """
        wanted, quantization = self.config.kernels, self.config.quantization
        quantized = is_packed or quantization is not Quantization.NONE
        return fastest_kernels(cache, quantized, lacks) if wanted is Kernels.AUTO else wanted

    def _launchable(self, device: str, warnings: list[str]) -> Kernels:
        """Triton's kernels where it can launch them; else torch's, unless they were asked for."""
        from qwencli.engine.native.kernel_cache import use_folder_of, why_no_launches

        use_folder_of(torch.device(device))
        why = why_no_launches()
        if why is None:
            return Kernels.TRITON
        hint = "install a C compiler (gcc) and Python's headers, or use --kernels torch"
        if self.config.kernels is Kernels.TRITON or self.config.batch_invariant:
            raise MissingDependencyError(f"--kernels triton cannot run: {why}", hint)
        warnings.append(f"Triton cannot launch kernels ({why}): plain torch runs; {hint}")
        return Kernels.TORCH

    def _begin_weights(
        self,
        folder: Path,
        shape: ModelShape,
        dtype: torch.dtype,
        packed: PackedFormat | None,
    ) -> weights.PendingWeights:
        mode, kept = self.config.quantization, None
        if mode is not Quantization.NONE:
            from qwencli.models.quantized_cache import cache_file

            kept = cache_file(folder, mode, str(dtype).removeprefix("torch."))
        return weights.begin(
            folder, shape, dtype, self._torch_device, mode, packed, kept, self._bytes_read
        )

    def _plan_kernels(
        self, kernels: Kernels, shape: ModelShape, dtype: torch.dtype, packed: PackedFormat | None
    ) -> PlannedModel | None:
        if kernels is not Kernels.TRITON or packed is not None:
            return None
        from qwencli.engine.native.kernel_plan import PlannedModel

        config = self.config
        return PlannedModel(
            shape,
            dtype,
            config.quantization,
            config.kv_dtype,
            config.attention,
            config.speculate,
            config.batch_invariant,
        )

    def _begin_kernels(self, rows: int) -> KernelLoader | None:
        """Begin to have all kernels ready that batches of so many rows need, or with 0 lone
        requests; None where it is not known which: of pre-quantized checkpoints."""
        if self._kernel_plan is None:
            return None
        from qwencli.engine.native.kernel_loader import KernelLoader

        return KernelLoader(replace(self._kernel_plan, rows=rows), self._torch_device)

    def _packed(self, found: FoundModel) -> PackedFormat | None:
        """How the checkpoint is quantized already. Random weights never are."""
        if self.config.load_format is LoadFormat.DUMMY:
            return None
        packed = format_of(found.hub_config, found.stored, self.config.model.name)
        if packed is not None and self.config.quantization is not Quantization.NONE:
            raise UnsupportedModeError(
                f"--quantization {self.config.quantization}: {self.config.model.name} is a "
                "checkpoint that is quantized already",
                nearest=Quantization.NONE.value,
            )
        return packed

    def _speculator(self, state: DecodeState, cache: Cache) -> Speculator | None:
        if self.config.speculate is Speculate.OFF:
            return None
        from qwencli.engine.spec_decode.verify import VERIFIERS, Speculator

        return Speculator(VERIFIERS[cache](state), state, self.config.speculate)

    def _answer(self, answer: ResponseBuilder) -> Iterator[GenerationChunk]:
        assert self._generation is not None, "requests to other models are rows"
        yield from self._generation.chunks(answer, self.load_s)

    def _logits(self, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
        assert self._model is not None, "load() comes first"
        if self._generation is None:
            yield from row_logits(self._model, token_ids)
        else:
            yield from self._generation.step_logits(token_ids)

    def _release(self) -> None:
        self._end_cache_write(CACHE_WRITE_S)
        self._generation = self._model = None
        self._vision_cache.clear()
        if self.effective.cache == Cache.STATIC_COMPILE:
            torch.compiler.reset()
        with gc_thawed(self):
            release(self.effective.device)

    def _make_queue(self) -> RequestQueue:
        """Rows that run together, where the modes of this engine are those that rows have."""
        cache, config = Cache(str(self.effective.cache)), self.config
        batches = cache in (Cache.STATIC, Cache.STATIC_GRAPH) and config.attention in (
            Attention.AUTO,
            Attention.SDPA,
        )
        if not batches:
            return super()._make_queue()
        compiling = self._begin_kernels(BATCH_LIMITS["cuda"].max_rows)
        from qwencli.engine.cache.paged_kv import PagePool
        from qwencli.engine.cache.recurrent_state import SnapshotPool
        from qwencli.engine.engine_core import EngineCore
        from qwencli.engine.runner import ModelRunner
        from qwencli.engine.scheduler import Scheduler
        from qwencli.engine.spec_decode.verify import batch_policy

        model = self._model
        assert model is not None, "load() comes first"
        cuda = model.device.type == "cuda"
        with torch.inference_mode():
            fixed = self._plan
            assert fixed is not None, "load() comes first"
            drafting = config.speculate is not Speculate.OFF
            plan = plan_batch(
                model.shape,
                BATCH_LIMITS["cuda" if cuda else "cpu"],
                max_seq_len=self.max_seq_len,
                value_bytes=model.dtype.itemsize,
                free_bytes=_free_bytes(self.effective.device),
                quantized_kv=config.kv_dtype is not KVDType.AUTO,
                reserved=fixed.activations + fixed.kept_images + fixed.graphs,
                drafting=drafting,
                dense_bytes=model.dense_copies_bytes,
            )
            if plan.keep_dense:
                model.keep_dense_copies()
            self._pool = plan.parts
            runner = ModelRunner(
                model,
                plan.num_pages,
                plan.limits.max_rows,
                self.max_seq_len,
                cache is Cache.STATIC_GRAPH,
                self._vision_cache,
                num_states=plan.num_states,
                with_drafts=drafting,
            )
        if compiling is not None:
            compiling.wait()
        return EngineCore(
            self.files,
            runner,
            Scheduler(
                plan.limits,
                PagePool(plan.num_pages),
                SnapshotPool(plan.num_states) if plan.num_states else None,
            ),
            replace(self.effective, attention=_row_attention(model)),
            self.load_s,
            self._prepared,
            batch_policy(config.speculate, model.draft_head is not None),
        )

    def _prepared(
        self, request: GenerationRequest
    ) -> tuple[Prompt, SamplingParams, TokenMatcher | None]:
        matcher = self._matcher(request)
        prompt = self._built(request, matcher)
        return prompt, self._fitting(request, prompt), matcher

    def _forget(self) -> None:
        self._vision_cache.clear()
        if self._generation is not None:
            self._generation.forget()

    def _close_queue(self) -> None:
        super()._close_queue()
        if self._pool and self._model is not None:
            self._model.forget_dense_copies()
        self._pool = {}

    def _recover(self) -> None:
        self._forget()
        if not self.has_unfinished:
            # The pool of a batch that is over; the next one makes it again.
            self._close_queue()
        release(self.effective.device)


def _checkpoint_weights(
    found: FoundModel, shape: ModelShape, packed: PackedFormat | None, dtype: DType
) -> int | None:
    if packed is None:
        return None
    value_bytes = 4 if dtype is DType.FLOAT32 else 2
    return packed_weight_bytes(shape, packed, found.stored, value_bytes)


def _row_attention(model: QwenModel) -> str:
    """What attends in steps of rows, as results report it."""
    return "triton" if model.reads_lengths else "sdpa"


def _decode_attention(state: DecodeState, cache: Cache) -> str:
    """What attends in decode steps, as results report it."""
    model = state.model
    if model.step_ops.kv_len_on_device:
        return "triton"
    numpy = model.any_attention and cache is Cache.STATIC and decodes_on_cpu(state)
    return f"numpy+{model.attention}" if numpy else model.attention.value


def _free_bytes(device: str) -> int | None:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return host_memory().available_bytes if device == "cpu" else None
