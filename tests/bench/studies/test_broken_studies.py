"""A study that is broken in any file ends its report in one clean line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from qwencli.bench.studies.study_report import build_study_report
from qwencli.errors import BenchError, QwenCliError
from tests.bench.broken_campaigns import mutate

COMMITTED = Path(__file__).parents[3] / "results" / "2026-11-24-cpu-studies"
FILES = ("study.json", "environment.json", "plan.json", "schedule.json", "conditions.csv",
         "runs.csv")  # fmt: skip


@pytest.fixture
def study(tmp_path):
    return Path(shutil.copytree(COMMITTED, tmp_path / "study"))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("study.json", lambda d: d.pop("places"), "study.json is broken: it has no places"),
        ("study.json", lambda d: d["places"][0].pop("arm"), "it has no places[0].arm"),
        ("study.json", lambda d: d.update(runs="many"), 'runs: "many" is not a whole number'),
        ("environment.json", lambda d: d.update(versions=3), "versions: 3 is not an object"),
    ],
)
def test_what_is_broken_is_named(study, file, change, said):
    document = json.loads((study / file).read_text(encoding="utf-8"))
    change(document)
    (study / file).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BenchError) as caught:
        build_study_report(study)
    assert said in caught.value.message


def test_no_broken_study_is_a_fault(study):
    chance = random.Random(1)
    files = sorted(path for path in study.rglob("*") if path.name in FILES)
    for _ in range(12):
        path = chance.choice([study / "study.json", chance.choice(files)])
        whole = path.read_bytes()
        done = mutate(path, chance)
        try:
            build_study_report(study)
        except QwenCliError as error:
            assert error.hint, done
        shutil.rmtree(path, ignore_errors=True)
        path.with_name(path.name + ".gz").unlink(missing_ok=True)
        path.write_bytes(whole)
