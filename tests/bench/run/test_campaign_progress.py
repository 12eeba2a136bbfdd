"""How far a campaign is, by a clock that the tests set."""

from __future__ import annotations

import pytest

from qwencli.bench.plan.environment import environment
from qwencli.bench.plan.stopping import StopRule
from qwencli.bench.run import campaign_progress
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_progress import CampaignProgress, show_progress, time_left
from qwencli.bench.run.campaign_runner import RunnerOptions, run_campaign
from qwencli.output import Output


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def walk(progress, clock, *, steps, step_s):
    """A process of `steps` steps, each as long."""
    progress.begin("[1/2]", steps - 2)
    for number in range(steps):
        clock.now += step_s
        progress.step(f"run {number + 1}")
    progress.end()


def test_what_is_left_follows_from_what_the_done_share_took(clock):
    progress = CampaignProgress([1.0, 3.0], clock=clock)
    assert progress.left_s is None
    walk(progress, clock, steps=5, step_s=2.0)
    assert progress.share == pytest.approx(0.25)
    assert progress.left_s == pytest.approx(30.0)


def test_before_the_first_step_a_prediction_says_what_is_left(clock):
    progress = CampaignProgress([40.0, 80.0], clock=clock, in_seconds=True)
    clock.now += 15
    assert progress.left_s == pytest.approx(105.0)


def test_a_step_grows_with_the_clock_as_long_as_the_one_before_took(clock):
    seen = []
    progress = CampaignProgress([1.0], lambda share, text: seen.append((share, text)), clock=clock)
    progress.begin("[1/1]", 2)  # four steps: load, two runs, checks
    clock.now += 10
    progress.step("run 1 of 2")
    clock.now += 10
    progress.step("run 2 of 2")
    assert progress.share == pytest.approx(20 / 35)  # checks are taken for half a load
    clock.now += 5
    progress.tick()
    assert progress.share == pytest.approx(25 / 35)
    clock.now += 500
    assert progress.share < 30 / 35
    assert seen[-1][1].startswith("[1/1] run 2 of 2, about ")


def test_a_long_load_does_not_make_short_runs_long(clock):
    """Six processes, each of a minute of loading and twenty seconds for all the rest."""
    progress = CampaignProgress([1.0] * 6, clock=clock)
    for number in range(6):
        progress.begin(f"[{number + 1}/6]", 5)
        clock.now += 60
        progress.step("run 1 of 5")
        if number == 0:
            assert 300 < progress.left_s < 1000
        for run in range(2, 7):
            clock.now += 2
            progress.step("checks after the runs" if run == 6 else f"run {run} of 5")
        clock.now += 10
        progress.end()
        whole_s = 6 * 80
        assert progress.left_s == pytest.approx(whole_s - 80 * (number + 1))


def test_shares_only_grow_and_end_at_one(clock):
    shares = []
    progress = CampaignProgress([2.0, 1.0, 4.0], lambda s, _: shares.append(s), clock=clock)
    walk(progress, clock, steps=3, step_s=1.0)
    progress.skip()
    walk(progress, clock, steps=4, step_s=2.0)
    assert shares == sorted(shares)
    assert progress.share == 1.0


def test_a_process_that_broke_off_counts_whole(clock):
    progress = CampaignProgress([1.0, 1.0], clock=clock)
    progress.begin("[1/2]", 9)
    clock.now += 4
    progress.end()
    progress.begin("[2/2]", 9)
    assert progress.left_s == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, ""),
        (7.4, ", about 7 s left"),
        (44.0, ", about 40 s left"),
        (186.0, ", about 3 min 10 s left"),
        (3_700.0, ", about 1 h 02 min left"),
    ],
)
def test_the_longer_the_coarser(seconds, said):
    assert time_left(seconds) == said


def test_without_a_terminal_there_is_a_line_now_and_then(clock, capsys):
    with show_progress(Output(), clock) as moved:
        for second in range(70):
            clock.now = 100.0 + second
            moved(second / 70, f"second {second}")
    assert capsys.readouterr().err == "    second 30\n    second 60\n"


def test_at_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress(Output()) as moved:
        moved(0.5, "[2/4] run 3 of 5, about 40 s left")
    said = capsys.readouterr().err
    assert "run 3 of 5, about 40 s left" in said
    assert "━" in said
    erased = "\x1b[2K"
    assert said.rindex(erased) > said.rindex("left"), "nothing is left when the campaign is over"


def test_a_campaign_tells_how_far_it_is_within_a_cell(tmp_path, cpu, make_plan, fake_worker):
    plan = make_plan("steady-a", "steady-b", stop=StopRule(4, 4, processes=2))
    about = environment(cpu, ["bench"], 1)
    seen, said = [], []
    with Campaign(tmp_path / "c", plan, about, resume=False) as campaign:
        options = RunnerOptions(fake_worker, None, 60.0)
        run_campaign(campaign, options, said.append, lambda *move: seen.append(move))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] > 0.9
    texts = " | ".join(text for _, text in seen)
    for part in ("[1/4] loading", "[1/4] run 2 of 4, ", "[4/4] checks after the runs"):
        assert part in texts
    assert "left" in said[2]


def test_what_is_predicted_of_a_cell_is_shared_by_its_processes(
    tmp_path, cpu, make_plan, fake_worker
):
    plan = make_plan("steady-a", stop=StopRule(4, 4, processes=2))
    about = environment(cpu, ["bench"], 1)
    said = []
    with Campaign(tmp_path / "c", plan, about, resume=False) as campaign:
        options = RunnerOptions(fake_worker, None, 60.0)
        predicted_s = {plan.cells[0].cell_id: 186.0}
        run_campaign(campaign, options, said.append, predicted_s=predicted_s)
    assert said[0].endswith(", about 3 min 10 s left")


def test_it_is_only_drawn_when_it_moves(monkeypatch):
    """A thread that draws ten times a second would be beside what is measured."""
    import threading

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    before = threading.active_count()
    with campaign_progress.show_progress(Output()):
        assert threading.active_count() == before
