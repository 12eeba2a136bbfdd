"""The probe process: what it answers, and what is made of its death."""

from __future__ import annotations

import sys

import pytest

from qwencli.engine.instruments.probes.answers import PROBES
from qwencli.engine.instruments.probes.ask import Outcome, ProbeProcess
from qwencli.engine.instruments.probes.child import answer
from qwencli.engine.instruments.probes.measure import rates
from qwencli.engine.machine.device import TorchFacts

OK = 'print(\'{"value": {"device": "cpu", "seconds": 1.5}}\', flush=True)'


def process(body):
    script = f"import sys, os, time, signal\nfor line in sys.stdin:\n    {body}\n"
    return ProbeProcess([sys.executable, "-c", script])


def test_every_probe_is_where_the_table_says():
    for name, probe in PROBES.items():
        if name != "triton":  # it cannot even be imported everywhere
            assert callable(probe.function())


def test_a_value():
    with process(OK) as probes:
        assert probes.ask("small-work", "cpu", None).value.seconds == 1.5
        assert probes.ask("small-work", "cpu", None).outcome is Outcome.OK


@pytest.mark.parametrize(
    ("body", "outcome", "kind", "error"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", Outcome.CRASHED, "SIGKILL", ""),
        ("sys.exit(7)", Outcome.CRASHED, "exit code 7", ""),
        ("1 / 0", Outcome.CRASHED, "exit code 1", "ZeroDivisionError: division by zero"),
        ("time.sleep(60)", Outcome.TIMEOUT, "", "no answer after 0.5 s"),
        ('print(\'{"error": "no kernel\\\\nimage", "kind": "RuntimeError"}\', flush=True)',
         Outcome.FAILED, "RuntimeError", "no kernel"),
    ],
)  # fmt: skip
def test_death_silence_and_errors_are_answers(body, outcome, kind, error):
    with process(body) as probes:
        found = probes.ask("small-work", "cpu", None, timeout_s=0.5 if "sleep" in body else 30)
        assert (found.outcome, found.kind, found.error) == (outcome, kind, error)
        assert found.value is None


def test_after_a_death_the_next_probe_gets_a_new_process():
    body = f"{OK} if 'small' in line else os._exit(3)"
    with process(body) as probes:
        assert probes.ask("torch", "cpu", None).outcome is Outcome.CRASHED
        assert probes.ask("small-work", "cpu", None).outcome is Outcome.OK


def test_a_package_that_does_not_import_leaves_the_process_alive():
    body = 'print(\'{"error": "no", "kind": "ImportError"}\', flush=True)'
    with process(body) as probes:
        probes.ask("flash-attn", "cpu", None)
        first = probes._process
        probes.ask("flash-attn", "cpu", None)
        assert probes._process is first


def test_the_real_process_answers():
    with ProbeProcess() as probes:
        build = probes.ask("torch", "", None)
        assert isinstance(build.value, TorchFacts)
        refused = probes.ask("host-link", "nowhere", None)
        assert (refused.outcome, refused.kind) == (Outcome.FAILED, "RuntimeError")


def test_what_a_probe_raises_is_its_answer(monkeypatch):
    def broken(device, work):
        raise RuntimeError("CUDA error: out of ideas\nmore")

    monkeypatch.setattr(rates, "small_work", broken)
    said = answer({"probe": "small-work", "device": "cpu", "work": None})
    assert said == {"error": "CUDA error: out of ideas\nmore", "kind": "RuntimeError"}
