"""Checks of Windows, WSL, the processor, and environment variables."""

from __future__ import annotations

from dataclasses import dataclass

from qwencli.diagnostics.finding import Confidence, Finding, failed, passed, skipped, warned
from qwencli.diagnostics.machine import Machine

# These choose the clock by themselves, whatever the governor is called.
SELF_GOVERNED = ("intel_pstate", "amd-pstate-epp")
BUSY_SHARE = 0.75


def driver_model(machine: Machine) -> Finding:
    """Under WDDM Windows queues every launch; compute-only drivers pass them on."""
    if machine.system.name != "Windows":
        return skipped("Windows alone has driver models")
    gpu = machine.gpu
    if gpu is None or gpu.driver_model is None:
        return skipped("the driver does not tell its model")
    evidence = f"{gpu.name}: {gpu.driver_model}"
    if gpu.driver_model != "WDDM":
        return passed(f"the driver runs as {gpu.driver_model}", evidence)
    if "GeForce" in gpu.name:
        return passed("the driver runs as WDDM, as it must on a GeForce card", evidence)
    return warned(
        "the driver runs as WDDM on a card that could do without",
        evidence,
        f"if no screen hangs on it: nvidia-smi -i {gpu.index} -dm MCDM (as administrator), restart",
        Confidence.MEDIUM,
    )


def hags(machine: Machine) -> Finding:
    """Hardware-accelerated GPU scheduling was reported to change speed from run to run."""
    system = machine.system
    if system.name != "Windows" and not system.wsl:
        return skipped("Windows alone has it")
    if system.hags is None:
        return skipped("the registry does not tell whether it is on")
    if not system.hags:
        return passed("hardware-accelerated GPU scheduling is off", "HwSchMode 1")
    return warned(
        "hardware-accelerated GPU scheduling is on; some users see random slow runs with it",
        "HwSchMode 2; reported for an RTX 5070 Ti (Asd-g/avs-mlrt #14), others see no difference",
        "measure: `qwencli bench`, switch it off (Settings, System, Display, Graphics), restart, "
        "`qwencli bench` again, `qwencli bench compare`",
        Confidence.LOW,
    )


def wsl(machine: Machine) -> Finding:
    """WSL 1 has no GPU; WSL 2 reaches it through Windows' driver."""
    generation = machine.system.wsl
    if generation is None:
        return skipped("not inside WSL")
    evidence = f"kernel {machine.system.release}"
    if generation == 1:
        return failed(
            "WSL 1 has no GPU", evidence, "in Windows: wsl --set-version <distribution> 2"
        )
    return passed("WSL 2: the GPU is reached through Windows' driver", evidence)


def cpu(machine: Machine) -> Finding:
    """With a single core the system takes its time from decoding."""
    facts = machine.cpu
    evidence = f"{facts.model or 'unnamed processor'}, {facts.cores} usable logical cores"
    if facts.cores < 2:
        return warned(
            "one CPU core: the system competes with the decode loop",
            evidence,
            "give this process more cores",
        )
    return passed(f"{facts.cores} CPU cores", evidence)


def cpu_clock(machine: Machine) -> Finding:
    """A processor that saves power launches kernels slowly."""
    facts = machine.cpu
    if facts.policy is None:
        return skipped("the system does not tell what sets the processor's clock")
    evidence = ", ".join(filter(None, (facts.policy, facts.driver, facts.preference)))
    windows = machine.system.name == "Windows"
    saving = (
        "saver" in facts.policy.lower()
        or (facts.policy == "powersave" and facts.driver not in SELF_GOVERNED)
        or facts.preference == "power"
    )
    if saving:
        return warned(
            "the processor is set to save power",
            evidence,
            "powercfg /setactive SCHEME_MIN"
            if windows
            else "sudo cpupower frequency-set -g performance",
            Confidence.MEDIUM,
        )
    return passed("the processor's clock is not held down", evidence)


def cpu_load(machine: Machine) -> Finding:
    """Programs that keep the processor busy make every launch late."""
    facts = machine.cpu
    if facts.busy_cores is None:
        return skipped("the system does not tell its load")
    evidence = f"load {facts.busy_cores:.1f} on {facts.cores} cores"
    if facts.busy_cores > BUSY_SHARE * facts.cores:
        return warned(
            "other programs keep the processor busy",
            evidence,
            "close them before you measure",
            Confidence.MEDIUM,
        )
    return passed("the processor has time", evidence)


@dataclass(frozen=True)
class Variable:
    """An environment variable that changes behaviour; `bad` values cost speed or function."""

    name: str
    bad: tuple[str, ...]
    effect: str


VARIABLES = (
    Variable("CUDA_LAUNCH_BLOCKING", ("1",), "waits for every kernel: decoding is far slower"),
    Variable("PYTORCH_NO_CUDA_MEMORY_CACHING", ("1",), "asks the driver for every tensor"),
    Variable("TORCHDYNAMO_DISABLE", ("1",), "static-compile compiles nothing"),
    Variable("TORCH_COMPILE_DISABLE", ("1",), "static-compile compiles nothing"),
    Variable("TORCH_CUDNN_SDPA_DETERMINISTIC", ("1",), "slows attention"),
    Variable("TORCH_USE_CUDA_DSA", ("1",), "checks every kernel's assertions"),
    Variable("TORCH_SHOW_DISPATCH_TRACE", ("1",), "prints every operator"),
    Variable("CUDA_FORCE_PTX_JIT", ("1",), "compiles every kernel anew"),
    Variable("CUDA_CACHE_DISABLE", ("1",), "forgets compiled kernels"),
    Variable("CUDA_DISABLE_PTX_JIT", ("1",), "kernels without machine code fail"),
    Variable("NVIDIA_TF32_OVERRIDE", ("0",), "float32 products cannot use tensor cores"),
    Variable("OMP_NUM_THREADS", ("1",), "the CPU then computes on one core"),
    Variable("TRITON_INTERPRET", ("1",), "Triton's kernels run in Python"),
    Variable("PYTORCH_CUDA_ALLOC_CONF", (), "changes the CUDA allocator"),
    Variable("PYTORCH_ALLOC_CONF", (), "changes the allocator"),
    Variable("CUDA_VISIBLE_DEVICES", (), "hides or reorders GPUs"),
    Variable("CUDA_MODULE_LOADING", ("EAGER",), "loads every kernel at start, using memory"),
    Variable("TORCH_LOGS", (), "prints what torch does"),
    Variable("HF_HUB_OFFLINE", (), "nothing is downloaded"),
    Variable("TRANSFORMERS_OFFLINE", (), "nothing is downloaded"),
    Variable("QWENCLI_MODEL", (), "names the model to use"),
)


def variables(machine: Machine) -> Finding:
    """Some environment variables slow everything down, and outlive the reason they were set for."""
    have = [entry for entry in VARIABLES if entry.name in machine.variables]
    bad = [entry for entry in have if machine.variables[entry.name] in entry.bad]
    evidence = ", ".join(f"{entry.name}={machine.variables[entry.name]}" for entry in have)
    if bad:
        effects = "; ".join(f"{entry.name} {entry.effect}" for entry in bad)
        return warned(effects, evidence, f"unset {' '.join(entry.name for entry in bad)}")
    harmless = f"set, and harmless: {evidence}" if evidence else "none set"
    return passed("no variable that slows things down", harmless)
