"""The claims as files: all are there, all read, and a wrong one says where."""

from __future__ import annotations

import pytest

from qwencli.bench.studies.claim_file import ALL, CLAIMS, choose, names, read
from qwencli.bench.studies.conditions import CONDITIONS
from qwencli.bench.studies.metrics import NAMES, value
from qwencli.errors import BenchError, UsageError


def test_all_claims_of_the_origin_are_there():
    assert names() == [f"C{number:02}" for number in range(1, 26)]
    studies = choose([ALL])
    assert all(study.title and study.expected for study in studies)
    # One alone has nothing to run: no engine of ours stands for another program.
    assert [study.claim for study in studies if not study.tests] == ["C25"]


def test_every_condition_serves_a_claim():
    used = {arm.condition for study in choose([ALL]) for arm in study.arms.values()}
    assert used == CONDITIONS.keys()


def test_claims_are_chosen_by_name_and_list():
    assert [study.claim for study in choose(["c05,C01", "C05"])] == ["C01", "C05"]


@pytest.mark.parametrize("said", [["C26"], ["C01,x"], [], [" , "]])
def test_what_is_no_claim_is_an_error(said):
    with pytest.raises(UsageError, match="claim"):
        choose(said)


@pytest.mark.parametrize(
    ("old", "new", "names_it"),
    [
        ('condition = "no-kv-cache"', 'condition = "no-such"', "no-such"),
        ('metric = "decode_tok_per_s"', 'metric = "speed"', "speed"),
        ('against = "plain"', 'against = "other"', "other"),
        ('expect = "below"', 'expect = "less"', "less"),
        ("by = 1.5", "by = 0.5", "by 0.5"),
        ("by = 1.5", "", "by"),
        ("[arms.plain]", "[arms.plain]\nspeed = 1", "arms.plain.speed"),
        ("title =", "titel =", "titel"),
        ("title =", "title", "C03"),
        ("[arms.plain]", '[arms.plain]\n[hold]\nmodell = "x"', "hold.modell"),
    ],
)
def test_a_malformed_claim_names_its_fault(tmp_path, old, new, names_it):
    text = (CLAIMS / "C03.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "C03.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BenchError, match=names_it.replace(".", r"\.")):
        read(path)


def test_metrics_are_made_from_a_row():
    row = {
        "num_new_tokens": "48", "e2e_s": "2.5", "preprocess_s": "0.1", "load_s": "",
        "vision_encode_s": "0.2", "prefill_s": "0.3", "ttft_s": "0.625", "itl_p50_ms": "25",
        "processor_s": "0.2", "first_forward_host_s": "0.25",
    }  # fmt: skip
    assert value("generate_tok_per_s", row) == pytest.approx(20.0)
    assert value("request_s", row) == 2.5
    assert value("phases_share_of_ttft", row) == pytest.approx(0.96)
    assert value("first_forward_share", row) == pytest.approx(0.5)
    assert value("ttft_over_median_token", row) == pytest.approx(25.0)
    assert value("prompt_s", row) == pytest.approx(0.5)
    assert value("processor_share", row) == pytest.approx(0.2 / 2.6)
    assert value("processor_over_ours", row) == pytest.approx(2.0)
    assert value("vision_encode_s", row) == 0.2
    assert value("load_s", row) is None
    assert value("sm_clock_mhz_mean", row) is None
    assert set(row) <= set(NAMES)
