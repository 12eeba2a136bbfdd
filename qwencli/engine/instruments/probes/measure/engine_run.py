"""A short run of the real engine, and where a decode step's time goes."""

from __future__ import annotations

import statistics
from typing import Any

from qwencli.config import SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.engine.instruments.device_events import DeviceWork, device_work
from qwencli.engine.instruments.probes.answers import EngineRun, EngineWork
from qwencli.engine.instruments.probes.measure.attention_runs import attention_kernels, short
from qwencli.engine.machine.device import memory_stats, reset_peak_memory
from qwencli.engine.protocol import Engine, drain
from qwencli.messages import GenerationRequest, ImagePart, user_message

PICTURE_SIZE = 448
PROMPT = "Describe this image."
# Few, because the profiler keeps thousands of events a token.
PROFILED_TOKENS = (2, 10)


def engine_run(device: str, work: EngineWork) -> EngineRun:
    """A warm-up, `work.runs` timed answers of equal length, and one under the profiler.

    Raises:
        QwenCliError: the model cannot be loaded or run here.
    """
    engine = create_engine(work.config)
    with engine:
        request = _request(work)
        drain(engine.stream(request))
        reset_peak_memory(engine.effective.device)
        results = [drain(engine.stream(request)) for _ in range(work.runs)]
        memory = memory_stats(engine.effective.device)
        profiles = [_profile(engine, _request(work, tokens)) for tokens in PROFILED_TOKENS]
        ran, load_s = engine.effective, engine.load_s
    # What the two answers differ by are their decode steps: prompt and vision are equal.
    few, more = profiles
    steps = PROFILED_TOKENS[1] - PROFILED_TOKENS[0]
    itl = sorted(ms for result in results for ms in result.itl_ms)
    return EngineRun(
        engine=ran.engine,
        quantization=str(ran.quantization),
        attention=str(ran.attention),
        cache=str(ran.cache),
        kernels=str(ran.kernels),
        load_s=load_s,
        ttft_ms=statistics.median(r.timings.ttft_s or 0.0 for r in results) * 1e3,
        tok_per_s=tuple(r.timings.decode_tok_per_s or 0.0 for r in results),
        itl_p50_ms=statistics.median(itl),
        itl_p99_ms=itl[min(len(itl) - 1, round(0.99 * (len(itl) - 1)))],
        peak_allocated_bytes=memory.peak_allocated_bytes if memory else None,
        gpu_busy_ms=(more.busy_ms - few.busy_ms) / steps if more and few else None,
        kernels_per_token=(more.kernels - few.kernels) / steps if more and few else None,
        attention_kernels=tuple(dict.fromkeys(map(short, attention_kernels(more.names))))
        if more
        else (),
    )


def _profile(engine: Engine, request: GenerationRequest) -> DeviceWork | None:
    return device_work(engine.effective.device, lambda: drain(engine.stream(request)))


def _request(work: EngineWork, new_tokens: int | None = None) -> GenerationRequest:
    """Greedy and of fixed length, with a picture where the model can see."""
    images: tuple[ImagePart, ...] = ()
    hub_config: Any = work.config.model.hub_config or {}
    if "vision_config" in hub_config:
        from PIL import Image

        picture = Image.radial_gradient("L").resize((PICTURE_SIZE, PICTURE_SIZE)).convert("RGB")
        images = (ImagePart(picture, "a gradient"),)
    return GenerationRequest(
        messages=(user_message(PROMPT, images),),
        sampling=SamplingOptions(do_sample=False, max_new_tokens=new_tokens or work.new_tokens),
        ignore_eos=True,
        bypass_caches=True,
    )
