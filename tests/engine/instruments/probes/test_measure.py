"""The measurements on the CPU, in sizes that take no time."""

from __future__ import annotations

import pytest

from qwencli.config import EngineConfig
from qwencli.engine.instruments import timing
from qwencli.engine.instruments.probes.answers import EngineWork, Work
from qwencli.engine.instruments.probes.measure import attention_runs, engine_run, linears, rates
from qwencli.models.resolve import resolve_model

WORK = Work(
    hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, decoder_bytes=1,
    vision_heads=2, vision_head_dim=16, vision_hidden=32, patch_size=4, temporal_patch_size=2,
    in_channels=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_S", 0.0005)
    monkeypatch.setattr(rates, "DURATION_S", 0.01)
    monkeypatch.setattr(timing, "LARGEST_BUFFER_ON_CPU", 1 << 22)
    monkeypatch.setattr(linears, "CACHE_BYTES", 1)
    monkeypatch.setattr(attention_runs, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(attention_runs, "CACHED_TOKENS", 16)
    monkeypatch.setattr(attention_runs, "PATCHES", 8)
    monkeypatch.setattr(linears, "PATCHES", 4)


def test_bandwidth():
    found = rates.bandwidth("cpu", WORK)
    assert found.read_bytes_per_s > 1e8
    assert found.copy_bytes_per_s > 1e8
    assert found.read_by in ("matrix-vector product", "sum")


def test_launch_rate():
    found = rates.launch_rate("cpu", WORK)
    assert found.eager_us > 0.1
    assert found.graph_us is None


def test_attention_in_every_phase():
    runs = attention_runs.attention("cpu", WORK).runs
    chosen = {run.phase: run for run in runs if run.backend == "chosen"}
    assert set(chosen) == {"prefill", "decode", "vision"}
    assert all(run.us for run in chosen.values())
    refused = [run for run in runs if run.backend == "cudnn"]
    assert all(run.error and run.us is None for run in refused)


def test_the_patch_embedding_and_a_model_without_one():
    found = linears.patch_embedding("cpu", WORK)
    assert found.conv3d_ms > 0
    assert found.linear_ms > 0
    text = Work(64, 128, 2, 4, 2, 16, 1)
    with pytest.raises(RuntimeError, match="no patch embedding"):
        linears.patch_embedding("cpu", text)


def test_quantized_linears_compute_rightly_or_say_why_not(monkeypatch):
    def broken(weight, device):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(
        linears,
        "SCHEMES",
        {"none": linears._unquantized, "bnb-nf4": linears._nf4, "bnb-int8": broken},
    )
    none, nf4, int8 = linears.quantized_linears("cpu", WORK).runs
    assert none.relative_error < 1e-5
    assert 0.02 < nf4.relative_error < 0.2
    assert int8.error == "no kernel image"


def test_flash_attention_that_is_not_there():
    with pytest.raises(ImportError):
        attention_runs.flash_attention("cpu", WORK)


def test_a_short_run_of_the_engine():
    work = EngineWork(EngineConfig(resolve_model("scenes"), device="cpu"), 6, 2)
    found = engine_run.engine_run("cpu", work)
    assert (found.engine, found.quantization, len(found.tok_per_s)) == ("native", "none", 2)
    assert 0 < found.itl_p50_ms <= found.itl_p99_ms
    assert found.gpu_busy_ms is None
    assert found.kernels_per_token is None


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "cudnn"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "flash"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEff::Kernel)", "mem_efficient"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 10>", "math"),
        ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_NNT", None),
    ],
)  # fmt: skip
def test_kernels_are_known_by_their_names(name, family):
    assert attention_runs.attention_family((name,)) == family


def test_short_names():
    long = "void at::native::vectorized_elementwise_kernel<8, at::native::Add>(int)"
    assert attention_runs.short(long) == "at::native::vectorized_elementwise_kernel"
    assert attention_runs.short("void (anonymous namespace)::softmax<1>(int)") == "softmax"
    assert attention_runs.short("nvjet_sm90_tst") == "nvjet_sm90_tst"
