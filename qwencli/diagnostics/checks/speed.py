"""Checks of what bounds decoding: launches, memory bandwidth, the link to the host, and a short run
of the real engine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from qwencli.config import Quantization
from qwencli.diagnostics.advice import TYPICAL_CONTEXT, advise
from qwencli.diagnostics.checks.driver import NO_GPU
from qwencli.diagnostics.decode_work import operators_per_token, token_bytes, token_is_cached
from qwencli.diagnostics.finding import Confidence, Finding, failed, passed, skipped, warned
from qwencli.diagnostics.machine import Machine, how_it_ended, value_of
from qwencli.engine.instruments.probes.answers import Bandwidth, EngineRun, HostLink, LaunchRate
from qwencli.engine.instruments.probes.ask import Outcome
from qwencli.models.memory import kv_cache_bytes

# Linux launches in 3 to 6 us; beyond this something holds the host up.
SLOW_LAUNCH_US = 15.0
# Library kernels read at 85 to 95 % of the vendor's figure.
LEAST_BANDWIDTH_SHARE = 0.7
# GB/s of one lane in one direction by PCIe generation, after encoding (PCI-SIG).
LANE_GB_PER_S: Mapping[int, float] = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
# Pinned copies reach 80 % and more of the link.
LEAST_LINK_SHARE = 0.4
UNSTABLE_RATIO = 1.1
# Of a step's time the GPU works less than this: the host is the brake.
LEAST_BUSY_SHARE = 0.7
# Of the measured bandwidth a step uses more than this: memory is the brake, as it should be.
BANDWIDTH_BOUND_SHARE = 0.6
# Of the expected speed; the expectation knows neither attention's own work nor other programs.
LEAST_EXPECTED_SHARE = 0.5


def launch_rate(machine: Machine) -> Finding:
    """Without a CUDA graph the host launches every kernel of every token one by one."""
    if not machine.torch.devices:
        return skipped(NO_GPU)
    rate: LaunchRate = value_of(machine, "launch-rate")
    launches = operators_per_token(machine.work.layers)
    bound = 1e6 / (launches * rate.eager_us)
    evidence = (
        f"{rate.eager_us:.1f} us a launch, {rate.round_trip_us:.0f} us to wait for a result: at "
        f"most {bound:.0f} tok/s of {machine.section('model')} without a graph "
        f"({launches:.0f} launches a token)"
    )
    if rate.graph_us is not None:
        graph_bound = 1e6 / (launches * rate.graph_us)
        evidence += f"; {rate.graph_us:.1f} us in a graph: {graph_bound:.0f} tok/s"
    if rate.eager_us > SLOW_LAUNCH_US:
        return warned(
            "this host launches kernels slowly",
            evidence,
            "use --cache static-graph (the default); close programs that use the CPU; see cpu-clock"
            " and variables",
            Confidence.MEDIUM,
        )
    return passed("the host launches kernels fast enough", evidence)


def bandwidth(machine: Machine) -> Finding:
    """Every token reads every weight once, so read bandwidth is the limit of decoding."""
    found: Bandwidth = value_of(machine, "bandwidth")
    gpu = machine.gpu if machine.torch.devices else None
    vendor = gpu.vendor_bytes_per_s if gpu else None
    rate = found.token_bytes_per_s or found.read_bytes_per_s
    limit = rate / machine.work.decoder_bytes
    evidence = (
        f"read {found.read_bytes_per_s / 1e9:.0f} GB/s ({found.read_by}), copy "
        f"{found.copy_bytes_per_s / 1e9:.0f} GB/s"
    )
    if token_is_cached(found):
        evidence += (
            f" from memory; what a token of {machine.section('model')} reads stays in a cache and "
            f"comes at {rate / 1e9:.0f} GB/s"
        )
    if machine.torch.devices:
        evidence += (
            f": at most {limit:.0f} tok/s of {machine.section('model')}, unquantized "
            f"({machine.work.decoder_bytes / 1e9:.2f} GB a token)"
        )
    if vendor is None:
        return passed("memory bandwidth is measured", evidence)
    share = found.read_bytes_per_s / vendor
    evidence += f"; {share:.0%} of the {vendor / 1e9:.0f} GB/s that clock and bus width promise"
    if share < LEAST_BANDWIDTH_SHARE:
        return warned(
            "memory is read far below what this GPU can do",
            evidence,
            "see clocks, throttling and gpu-processes; reset locked memory clocks with "
            "`nvidia-smi --reset-memory-clocks`",
            Confidence.MEDIUM,
        )
    return passed("memory bandwidth is what this GPU should have", evidence)


def pcie(machine: Machine) -> Finding:
    """A link that is narrower or slower than it can be slows loading and images, not decoding."""
    if not machine.torch.devices:
        return skipped(NO_GPU)
    rates: HostLink = value_of(machine, "host-link")
    evidence = (
        f"to the GPU {rates.to_device_bytes_per_s / 1e9:.1f}, back "
        f"{rates.to_host_bytes_per_s / 1e9:.1f} GB/s"
    )
    load, gpu = machine.under_load("host-link"), machine.gpu
    if load is None or gpu is None or load.pcie_gen is None or load.pcie_width is None:
        return passed("the link to the GPU is measured; its width cannot be read", evidence)
    evidence = f"PCIe {load.pcie_gen} x{load.pcie_width} under load; {evidence}"
    reseat = "seat the card again, in the slot that is wired to the CPU with all lanes"
    if gpu.max_pcie_width and load.pcie_width < gpu.max_pcie_width:
        return warned(
            f"the PCIe link has {load.pcie_width} of {gpu.max_pcie_width} lanes",
            evidence,
            f"{reseat}; look whether an M.2 drive shares its lanes (mainboard manual)",
        )
    if gpu.max_pcie_gen and load.pcie_gen < gpu.max_pcie_gen:
        return warned(
            f"the PCIe link runs at generation {load.pcie_gen} of {gpu.max_pcie_gen}",
            evidence,
            "set the slot's link speed to Auto in the firmware; replace a riser cable",
        )
    link = LANE_GB_PER_S.get(load.pcie_gen, 0.0) * load.pcie_width * 1e9
    if rates.to_device_bytes_per_s < LEAST_LINK_SHARE * link:
        return warned(
            "copies to the GPU are far below what the link carries",
            f"{evidence}; the link carries {link / 1e9:.0f} GB/s",
            "close other programs; on a server, run on the CPU socket that the GPU belongs to",
            Confidence.MEDIUM,
        )
    if gpu.device_max_pcie_gen and gpu.max_pcie_gen and gpu.device_max_pcie_gen > gpu.max_pcie_gen:
        evidence += f" (the card could do generation {gpu.device_max_pcie_gen}, the slot cannot)"
    return passed("the PCIe link is at its full width and speed", evidence)


def engine_run(machine: Machine) -> Finding:
    """Only the real engine shows what all of this comes to."""
    answer = machine.probe("engine")
    if answer.outcome is not Outcome.OK:
        return failed("the engine cannot run", how_it_ended(answer), "act on its message")
    run: EngineRun = answer.value
    speed = statistics.median(run.tok_per_s)
    modes = (run.engine, run.quantization, run.attention, run.cache, run.kernels)
    runs = ", ".join(f"{tok:.1f}" for tok in run.tok_per_s)
    evidence = [
        f"{', '.join(modes)}: {speed:.1f} tok/s (runs {runs}), first token {run.ttft_ms:.0f} ms, "
        f"token p50 {run.itl_p50_ms:.2f} ms, p99 {run.itl_p99_ms:.2f} ms, load {run.load_s:.1f} s"
    ]
    if run.peak_allocated_bytes is not None:
        evidence.append(f"peak {run.peak_allocated_bytes / 1e9:.2f} GB")
    what, cause, host_bound = _bound(machine, run)
    evidence += cause
    ratio = max(run.tok_per_s) / max(min(run.tok_per_s), 1e-9)
    if ratio > UNSTABLE_RATIO:
        return warned(
            f"runs of one engine differ {ratio:.2f}x; {what}",
            "; ".join(evidence),
            "run `qwencli bench` and `qwencli diagnose explain` on its folder",
            Confidence.MEDIUM,
        )
    expected = advise(machine).expected_tok_per_s
    if expected and run.engine == "native" and speed < LEAST_EXPECTED_SHARE * expected:
        return warned(
            f"the engine reaches {speed / expected:.0%} of the expected speed; {what}",
            "; ".join(evidence),
            "look at launch-rate, bandwidth, clocks and gpu-processes above",
            Confidence.MEDIUM,
        )
    if host_bound:
        return warned(
            f"{speed:.1f} tok/s; {what}",
            "; ".join(evidence),
            "use --engine native --cache static-graph",
        )
    return passed(f"{speed:.1f} tok/s; {what}", "; ".join(evidence))


def _bound(machine: Machine, run: EngineRun) -> tuple[str, list[str], bool]:
    """What bounds a decode step, the figures that say so, and whether it is the host."""
    figures: list[str] = []
    measured, share = machine.measured("bandwidth"), None
    if measured and run.quantization == Quantization.NONE and machine.device.startswith("cuda"):
        shape = machine.shape
        size = token_bytes(shape) + kv_cache_bytes(shape, TYPICAL_CONTEXT)
        share = size / (run.itl_p50_ms / 1e3) / measured.read_bytes_per_s
        figures.append(f"memory is read at {share:.0%} of the measured bandwidth")
    if run.gpu_busy_ms is None or run.kernels_per_token is None:
        return "what bounds it is not known without a profiler", figures, False
    busy = run.gpu_busy_ms / run.itl_p50_ms
    figures.append(
        f"{run.kernels_per_token:.0f} kernels take {run.gpu_busy_ms:.2f} ms of a token's "
        f"{run.itl_p50_ms:.2f}{' (they overlap)' if busy > 1 else ''}"
        + (f"; attention by {', '.join(run.attention_kernels)}" if run.attention_kernels else "")
    )
    if busy < LEAST_BUSY_SHARE:
        return f"bound by the host: the GPU waits {1 - busy:.0%} of the time", figures, True
    if share is not None and share >= BANDWIDTH_BOUND_SHARE:
        return "bound by memory bandwidth, as it should be", figures, False
    return "bound by its kernels: the GPU is busy, but not with reading weights", figures, False
