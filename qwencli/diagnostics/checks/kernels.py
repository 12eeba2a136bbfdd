"""Checks of the fast paths: whether they are on, really run, and compute rightly."""

from __future__ import annotations

from qwencli.diagnostics.checks.driver import NO_GPU
from qwencli.diagnostics.finding import Finding, failed, passed, skipped, warned
from qwencli.diagnostics.machine import Machine, Unreadable, how_it_ended, value_of
from qwencli.engine.instruments.probes.answers import AttentionRun, FlashAttention, LinearRun
from qwencli.engine.instruments.probes.ask import Outcome, ProbeAnswer
from qwencli.engine.machine.flash_attn import BUILD, misfit
from qwencli.models.shape_reader import stored_dtype

FUSED = ("flash", "mem_efficient", "cudnn")
# Relative error of one token through one layer, against the weights before quantization. NF4's
# own is about 0.09, int8's about 0.012; a kernel that computes wrongly is near 1.
MOST_ERROR = {"bnb-nf4": 0.2, "bnb-int8": 0.05}
NAMES = {"bnb-nf4": "4-bit", "bnb-int8": "8-bit"}
# bf16 attention differs by rounding, some hundredths for values around 1.
MOST_FLASH_DIFFERENCE = 0.1
# A convolution this slow is felt in every first token.
SLOW_CONV3D_MS, SLOW_CONV3D_RATIO = 20.0, 10.0


def sdpa_backends(machine: Machine) -> Finding:
    """`scaled_dot_product_attention` can only choose from kernels that are switched on."""
    if not machine.torch.devices:
        return skipped(f"{NO_GPU}: the switches concern CUDA kernels alone")
    state = machine.torch.sdpa_backends
    evidence = ", ".join(f"{name} {'on' if on else 'off'}" for name, on in state.items())
    if not any(state.get(name) for name in FUSED):
        return warned(
            "every fused attention kernel is switched off",
            evidence,
            "remove the code or variable that calls torch.backends.cuda.enable_*_sdp(False)",
        )
    return passed("fused attention kernels may be chosen", evidence)


def attention_kernels(machine: Machine) -> Finding:
    """Which attention kernel ran is known only from the kernel's name."""
    if not machine.torch.devices:
        return skipped(NO_GPU)
    runs: tuple[AttentionRun, ...] = value_of(machine, "attention").runs
    chosen = [run for run in runs if run.backend == "chosen"]
    evidence = "; ".join(_describe(run) for run in chosen)
    broken = [run.phase for run in chosen if run.us is None]
    if broken:
        return failed(
            f"attention cannot run: {', '.join(broken)}", evidence, "use --attention eager"
        )
    if all(run.family is None for run in chosen):
        return skipped(f"attention runs, but the profiler does not name its kernels ({evidence})")
    slow = [run for run in chosen if run.family == "math"]
    if slow:
        refused = [
            f"{run.phase}, {run.backend}: {run.error}"
            for run in runs
            if run.error and run.backend in FUSED and run.phase in {r.phase for r in slow}
        ]
        return warned(
            f"no fused attention kernel ran for {', '.join(run.phase for run in slow)}",
            "; ".join([evidence, *refused[:2]]),
            "install a torch built for this GPU (see arch-list), or try --attention eager",
        )
    return passed("fused attention kernels ran", evidence)


def _describe(run: AttentionRun) -> str:
    if run.us is None:
        return f"{run.phase}: {run.error}"
    kernel = f" ({run.kernels[0]})" if run.kernels else ""
    return f"{run.phase}: {run.family or 'unnamed'}{kernel} {run.us:.0f} us"


def flash_attn_runs(machine: Machine) -> Finding:
    """flash-attn can import and still have no kernel for this GPU, or for the model's heads."""
    if not machine.torch.devices:
        return skipped(NO_GPU)
    if machine.version("flash-attn") is None:
        return skipped("flash-attn is not installed")
    answer = machine.probe("flash-attn")
    if answer.outcome is not Outcome.OK:
        device = machine.cuda_device
        known = misfit(answer.error, None if device is None else device.capability)
        loads = answer.kind not in ("ImportError", "ModuleNotFoundError", "OSError")
        what = "flash-attn cannot run on this GPU" if loads else "flash-attn does not load"
        fix = known.fix if known else BUILD
        return failed(
            known.what if known else what,
            how_it_ended(answer),
            "use --attention sdpa" + (f", or: {fix}" if fix else ""),
        )
    run: FlashAttention = answer.value
    evidence = (
        f"flash-attn {run.version}: {run.flash_us:.0f} us, sdpa {run.sdpa_us:.0f} us; they differ "
        f"by {run.max_difference:.3f} at most"
    )
    if run.max_difference > MOST_FLASH_DIFFERENCE:
        return failed("flash-attn computes wrongly here", evidence, "use --attention sdpa")
    stored = stored_dtype(machine.section("hub_config"))
    if stored == "float32":
        return warned(
            f"flash-attn runs, but not with {machine.model}: its weights are float32",
            evidence,
            "--attention flash_attention_2 --dtype bfloat16",
        )
    # Its pages are of 256 slots or multiples of that, a pool's of 64 (`paged_kv.PAGE_SIZE`).
    alone = "answers that are made together, and --batch-invariant, have kernels of their own"
    return passed("flash-attn runs and agrees with sdpa", f"{evidence}; {alone}")


def bitsandbytes_runs(machine: Machine) -> Finding:
    """Quantized layers can fail, compute wrongly, or take longer than unquantized ones."""
    if not machine.torch.devices:
        return skipped(NO_GPU)
    if machine.version("bitsandbytes") is None:
        return skipped("bitsandbytes is not installed")
    found = value_of(machine, "bitsandbytes")
    runs = {run.scheme: run for run in found.runs}
    unquantized = runs.pop("none")
    base = unquantized.us
    if base is None:
        raise Unreadable(f"an unquantized layer cannot run: {unquantized.error}")
    evidence = f"one token through {found.rows} x {found.columns}: " + "; ".join(
        [f"unquantized {base:.0f} us", *(_linear(run, base) for run in runs.values())]
    )
    upgrade = "pip install --upgrade bitsandbytes"
    for scheme, run in runs.items():
        if run.error:
            return failed(f"{NAMES[scheme]} weights cannot run here", evidence, upgrade)
        if run.relative_error is None or not run.relative_error <= MOST_ERROR[scheme]:
            return failed(f"{NAMES[scheme]} weights compute wrongly here", evidence, upgrade)
    slower = [NAMES[scheme] for scheme, run in runs.items() if run.us and run.us > base]
    what = "4-bit and 8-bit weights of bitsandbytes run"
    if slower:
        what += f"; {' and '.join(slower)} save memory, not time"
    return passed(what, evidence)


def _linear(run: LinearRun, base: float) -> str:
    if run.us is None or run.relative_error is None:
        return f"{NAMES[run.scheme]}: {run.error}"
    times = f"{run.us:.0f} us ({run.us / base:.1f}x)"
    return f"{NAMES[run.scheme]} {times}, error {run.relative_error:.3f}"


def patch_embedding(machine: Machine) -> Finding:
    """The vision tower's convolution is known to be slow in some builds of torch and cuDNN."""
    if not machine.torch.devices:
        return skipped(NO_GPU)
    if not machine.work.vision_hidden:
        return skipped(f"{machine.section('model')} has no vision tower")
    run = value_of(machine, "patch-embedding")
    ratio = run.conv3d_ms / run.linear_ms
    kernel = f" ({run.kernels[0]})" if run.kernels else ""
    evidence = (
        f"{run.patches} patches: conv3d {run.conv3d_ms:.2f} ms{kernel}, linear "
        f"{run.linear_ms:.2f} ms, {ratio:.0f}x"
    )
    if run.conv3d_ms >= SLOW_CONV3D_MS and ratio >= SLOW_CONV3D_RATIO:
        return warned(
            "the patch embedding's convolution is slow here: every image waits for it in the "
            "transformers engine (the native engine uses a linear layer)",
            evidence,
            "use --engine native; or install torch 2.10 or later with cuDNN 9.15 or later",
        )
    return passed("the patch embedding's convolution is not a brake", evidence)


def triton_runs(machine: Machine) -> Finding:
    """Triton compiles kernels on this machine, which takes a compiler that knows the GPU."""
    if not machine.torch.devices:
        return skipped(NO_GPU)
    if machine.version("triton") is None and machine.version("triton-windows") is None:
        return skipped("Triton is not installed")
    answer: ProbeAnswer = machine.probe("triton")
    if answer.outcome is Outcome.OK:
        run = answer.value
        return passed(
            "Triton compiles and runs",
            f"Triton {run.version}, first kernel after {run.compile_and_run_s:.1f} s",
        )
    return failed(
        "Triton cannot compile for this GPU: the native engine's fused kernels will not run",
        how_it_ended(answer),
        "use --kernels torch; or install a C compiler (gcc, or Visual Studio's build tools) and "
        "the Triton that fits torch",
    )
