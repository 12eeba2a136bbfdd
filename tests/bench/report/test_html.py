from __future__ import annotations

import base64
import json
import math
import re
import struct
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.attribution.summary import with_causes
from qwencli.bench.causes import Cause, Finding
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.report.html.charts import (
    BINS,
    TOKEN_POINTS,
    GpuSamples,
    RunTrace,
    cell_charts,
    histogram,
    keep_extremes,
    pack_floats,
    points_per_run,
    throttled,
    traces_by_cell,
)
from qwencli.bench.report.html.page import ASSETS, SCRIPTS, heat_maps, html_page, lead
from qwencli.bench.report.html.sections import speed_range
from qwencli.bench.report.tables import row_label, speed_text, varying_axes
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import write_rows
from qwencli.errors import BenchError
from qwencli.html_page import ASSETS as FRAME
from tests import browser
from tests.bench.synthetic_campaign import ENVIRONMENT, Made, campaign

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that elements nest; collects ids, links, scripts and attributes that load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.data = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.loads += [name for name in ("src", "srcset", "data", "action") if name in given]
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][1].get("type") == "application/json":
            self.data[self.open[-1][1]["id"]] = json.loads(data)


def render(made: Made, environment=ENVIRONMENT):
    return html_page(made.rows, made.plan, environment, made.runs, made.tokens, made.gpu)


def unpack(text):
    data = base64.b64decode(text)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


@pytest.fixture(scope="module")
def made():
    return campaign(14, 3, 12, skipped=2)


@pytest.fixture(scope="module")
def text(made):
    return render(made)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_every_link_leads_to_a_place_on_the_page(page, made):
    assert len(page.ids) == len(set(page.ids))
    assert {link[0] for link in page.links} == {"#"}
    assert {link[1:] for link in page.links} <= set(page.ids)
    ran = [row for row in made.rows if row["status"] != "skipped"]
    assert {f"cell-{place}" for place in range(len(ran))} <= set(page.ids)


def test_nothing_is_loaded_from_anywhere(page, text):
    assert not page.loads
    assert "default-src 'none'" in text
    files = [*(ASSETS / name for name in (*SCRIPTS, "style.css")), *FRAME.iterdir()]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    addresses = set(re.findall(r"https?://[^\s\"')]+", code))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|@import|url\((?!#)", code)


def test_header_says_on_what_and_with_which_versions(text):
    for said in ("NVIDIA GeForce RTX 5090", "580.1", "2.11.0", "5.17.0", "3 runs of 12 tokens"):
        assert said in text


def test_the_map_has_a_figure_for_every_cell_that_ran(made, text):
    maps = re.findall(r'<table class="map">.*?</table>', text, re.DOTALL)
    assert len(maps) == 4  # two models, two load modes
    cells = [cell for table in maps for cell in re.findall(r"<td class=\"(\S+?)\".*?</td>", table)]
    assert cells.count("none") == 0
    unstable = [row for row in made.rows[:-2] if row["verdict"].startswith("unstable")]
    assert cells.count("unquotable") == len(unstable) > 0
    # A rule for another part of the page would draw that part into the map's cell.
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    assert re.findall(r"^.*\.unquotable\b", style, re.MULTILINE) == [".map .unquotable"]
    assert sum(kind.startswith("heat-") for kind in cells) == 12 - len(unstable)
    assert f"<b>{speed_text(unstable[0])}</b>" in "".join(maps)
    speeds = sorted(row["decode_tok_per_s_median"] for row in made.rows[:-2])
    assert f"<b>{speeds[0]:.1f}</b>" in "".join(maps)


def test_what_was_skipped_is_a_short_list_with_reasons_and_in_no_table(made, text, page):
    (listed,) = re.findall(r'<section id="skipped">.*?</section>', text, re.DOTALL)
    assert "2 cells of the matrix cannot run here." in listed
    assert listed.count("<li>flash-attn is not installed<details>") == 1
    assert "<summary>2 cells</summary>" in listed
    axes = varying_axes(made.rows)
    for row in made.rows[-2:]:
        assert row_label(row, axes) in listed
    others = text.replace(listed, "")
    assert "flash-attn is not installed" not in others
    assert "skipped" not in "".join(re.findall(r"<table.*?</table>", others, re.DOTALL))
    assert f"cell-{len(made.rows) - 1}" not in page.ids
    assert '<section id="skipped">' not in render(campaign(1, 1, 5))


def test_cells_of_other_kernels_do_not_hide_each_other_on_the_map():
    made = campaign(2, 2, 5)
    first, second = made.rows
    rows = [{**first, "verdict": "ok", "kernels": "triton"}, {**second, "verdict": "ok"}]
    for axis in ("quantization", "attention", "cache", "model", "engine", "load_mode"):
        rows[1][axis] = first[axis]
    rows[1]["kernels"] = "torch"
    found = heat_maps(rows)
    assert found.count("heat-") - found.count('<i class="heat-') == 2
    assert "kernels triton</caption>" in found and "kernels torch</caption>" in found


def test_fastest_gets_the_strongest_colour_and_slowest_the_weakest(made, text):
    speeds = [row["decode_tok_per_s_median"] for row in made.rows[:-2]]
    for speed, step in ((max(speeds), 6), (min(speeds), 0)):
        place = speeds.index(speed)
        assert re.search(rf'class="heat-{step}"><a href="#cell-{place}"><b>{speed:.1f}</b>', text)


def test_each_cell_that_ran_has_its_charts_data_and_the_others_none(page):
    assert set(page.data) == {f"charts-{place}" for place in range(12)}
    runs = page.data["charts-0"]["runs"]
    assert [(run["run"], run["warmup"]) for run in runs] == [
        ("0", True), ("1", False), ("2", False), ("3", False),
    ]  # fmt: skip


def test_times_and_latencies_come_back_as_they_were_measured(page, made):
    run = page.data["charts-3"]["runs"][2]
    rows = [row for row in made.tokens if (row["cell_id"], row["run"]) == ("cell-3", "2")]
    itl, times = unpack(run["itl_ms"]), unpack(run["t_s"])
    assert math.isnan(itl[0])
    assert itl[1:] == pytest.approx([float(row["itl_ms"]) for row in rows[1:]], rel=1e-6)
    assert times[0] == pytest.approx(run["ttft_s"], rel=1e-6)
    since_first = [float(row["t_s"]) - float(rows[0]["t_s"]) + run["ttft_s"] for row in rows]
    assert times == pytest.approx(since_first, rel=1e-6)
    assert run["start_s"] > page.data["charts-3"]["runs"][1]["start_s"] > 0


def test_sensors_share_the_clock_of_the_tokens(page, made):
    run = page.data["charts-1"]["runs"][1]
    (gpu,) = run["gpus"]
    rows = [row for row in made.gpu if (row["cell_id"], row["run"]) == ("cell-1", "1")]
    assert unpack(gpu["power_w"]) == pytest.approx([float(row["power_w"]) for row in rows])
    times = unpack(gpu["t_s"])
    assert times[0] == pytest.approx(0, abs=1e-5)
    assert times[-1] <= unpack(run["t_s"])[-1]


def test_the_cell_whose_runs_differ_most_is_open(made, text):
    ratios = [row["run_ratio_max_min"] or 0 for row in made.rows]
    (opened,) = re.findall(r'<details id="cell-(\d+)" class="[a-z ]+" open>', text)
    assert int(opened) == ratios.index(max(ratios))


def test_without_sensors_there_are_no_sensor_lines():
    made = campaign(1, 2, 5)
    made.gpu.clear()
    data = Page(render(made)).data["charts-0"]
    assert all(run["gpus"] == [] for run in data["runs"])


def test_an_unreadable_sensor_is_missing_never_zero():
    made = campaign(1, 1, 5)
    for row in made.gpu:
        row["sm_clock_mhz"] = ""
    for run in Page(render(made)).data["charts-0"]["runs"]:
        assert all(map(math.isnan, unpack(run["gpus"][0]["sm_clock_mhz"])))


def test_names_cannot_break_out_of_the_page():
    made = campaign(1, 2, 5)
    nasty = "</script><script>alert(1)</script><b>&\"'"
    made.plan["cells"][0]["model"] = made.plan["prompt"] = nasty
    for row in made.runs:
        row["throttle_reasons"] = nasty
    text = render(made, {**ENVIRONMENT, "variables": {nasty: nasty}})
    assert "<script>alert" not in text
    assert Page(text).data["charts-0"]["runs"][0]["throttle_reasons"] == nasty


def test_a_campaign_where_nothing_ran_still_has_a_page():
    page = Page(render(campaign(2, 3, 5, skipped=2)))
    assert not page.data
    assert "skipped" in page.ids
    assert not [each for each in page.ids if each.startswith("cell-")]


def test_a_broken_number_is_an_error_that_says_so():
    made = campaign(1, 1, 5)
    made.gpu[0]["power_w"] = "12x"
    with pytest.raises(BenchError, match="'12x' is not a number"):
        render(made)


def test_a_resumed_cell_keeps_its_two_warm_ups_apart():
    first, again = campaign(1, 1, 4), campaign(1, 2, 4, seed=1)
    part = [row for row in again.tokens if row["run"] in "02"]
    runs = [*first.runs, again.runs[0], again.runs[2]]
    gpu = [row for row in again.gpu if row["run"] in "02"]
    takes = traces_by_cell(runs, [*first.tokens, *part], [*first.gpu, *gpu])["cell-0"]
    assert [take.row["run"] for take in takes] == ["0", "1", "0", "2"]
    assert [len(take.t_s) for take in takes] == [4, 4, 4, 4]
    assert takes[2].t_s == [float(row["t_s"]) for row in part[:4]]
    assert [len(take.gpus["0"].t_s) for take in takes][2:] == [
        sum(row["run"] == run for row in gpu) for run in "02"
    ]


def test_rows_of_a_run_that_did_not_finish_are_left_out():
    made = campaign(1, 1, 4)
    made.tokens.append({**made.tokens[0], "run": "2"})
    (takes,) = traces_by_cell(made.runs, made.tokens, made.gpu).values()
    assert [len(take.t_s) for take in takes] == [4, 4]


@pytest.mark.slow
def test_a_hundred_cells_of_20_runs_of_256_tokens_stay_below_15_mb():
    text = render(campaign(25, 20, 256))
    assert 4 * len(text.encode()) < 15e6
    assert '"index":[' not in text  # no token was left out


def test_a_run_too_long_to_draw_keeps_its_stall():
    made = campaign(1, 1, 5000)
    made.tokens[-777]["itl_ms"] = "98765.0"
    run = Page(render(made)).data["charts-0"]["runs"][1]
    itl = unpack(run["itl_ms"])
    assert run["tokens"] == 5000
    assert len(itl) == len(run["index"]) <= 2002
    assert run["index"][itl.index(98765.0)] == 5000 - 777


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300), st.integers(4, 64)
)
def test_extremes_survive_decimation(values, most):
    kept = keep_extremes([values], most)
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert len(kept) <= most + 2
    known = [value for value in values if value == value]
    if known:
        assert {min(known), max(known)} <= {values[i] for i in kept}


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_packed_floats_come_back_exactly(values):
    assert unpack(pack_floats(values)) == values


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_every_latency_is_in_the_histogram_once(values):
    counted = histogram(values)
    assert sum(counted["counts"]) == len(values)
    assert len(counted["counts"]) == BINS
    assert 0 < counted["low_ms"] < counted["high_ms"]


def test_no_latency_no_histogram():
    assert histogram([]) is None


def test_throttled_stretches_name_their_reasons():
    reasons = ["none", "power", "power", "heat", "", "heat"]
    samples = GpuSamples([10.0, 11.0, 12.0, 13.0, 14.0, 15.0], [], [], reasons)
    apart = [(1, 2, "power"), (3, 3, "heat"), (5, 5, "heat")]
    assert throttled(samples, 10.0, 100) == apart
    assert throttled(samples, 10.0, 5) == [(1, 3, "power heat"), (5, 5, "heat")]


def test_points_are_shared_out_among_runs():
    assert points_per_run(TOKEN_POINTS, 2_100) >= 256
    assert points_per_run(600_000, 3) == 2_000
    assert points_per_run(600_000, 10**6) == 16


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_apart_in_light_and_dark():
    files = (FRAME / "theme.css", ASSETS / "style.css")
    css = "".join(path.read_text(encoding="utf-8") for path in files)
    pair = r"light-dark\((#\w{6}), (#\w{6})\)"
    colours = {name: rest for name, *rest in re.findall(rf"--(\w+): {pair}", css)}
    steps = re.findall(rf"\.heat-\d {{ background: {pair}; color: {pair}; }}", css)
    assert len(steps) == 7
    for theme in (0, 1):
        surface = colours["surface"][theme]
        for name in ("ink", "muted", "accent", "doubt", "bad"):  # text
            assert contrast(colours[name][theme], surface) >= 4.5, name
            assert contrast(colours[name][theme], colours["band"][theme]) >= 4.5, name
        for name in ("clock", "power", "preprocess", "vision", "prefill", "rest"):  # graphics
            assert contrast(colours[name][theme], surface) >= 3, name
        for step in steps:
            assert contrast(step[theme], step[2 + theme]) >= 4.5, step
        shades = [_luminance(step[theme]) for step in steps]
        assert shades == sorted(shades, reverse=theme == 0)


def found(made, row, scope, token_index=3):
    end = float(made.tokens[token_index]["t_s"])
    return Finding(
        row["cell_id"], row["run"], scope, token_index, 1, end, 40.0, 30.0, Cause.GC, 0.9, "a <b>"
    )


def test_causes_are_drawn_under_the_tokens_of_their_run():
    made = campaign(1, 2, 12)
    run = made.runs[1]
    findings = [found(made, run, "gap", 15), found(made, run, "decode", 23)]
    page = Page(
        html_page(made.rows, made.plan, ENVIRONMENT, made.runs, made.tokens, made.gpu, findings)
    )
    warm_up, first, second = page.data["charts-0"]["runs"]
    assert warm_up["causes"] == second["causes"] == []
    ((begin, end, cause, lost, confidence, evidence),) = first["causes"]
    assert (cause, lost, confidence, evidence) == ("gc", 30.0, 0.9, "a <b>")
    token = made.tokens[15]
    assert token["run"] == run["run"]
    assert end == pytest.approx(unpack(first["t_s"])[3], abs=1e-4)
    assert end - begin == pytest.approx(0.04, abs=1e-4)
    assert [one[2] for one in first["slow"]] == ["gc"]


def test_of_too_many_gaps_those_that_cost_most_are_drawn():
    take = RunTrace(dict.fromkeys(columns.RUNS, ""))
    take.findings = [
        Finding("a", "1", "gap", n, 1, 10.0 - n, 5.0, float(n), Cause.GIL, 0.5, "")
        for n in range(9)
    ]
    (run,) = cell_charts([take], 100, 100, 3)["runs"]
    assert [one[3] for one in run["causes"]] == [8.0, 7.0, 6.0]


def test_why_says_what_slowed_each_cell():
    made = campaign(2, 2, 12)
    rows = with_causes(made.rows, [found(made, made.runs[1], "gap")], made.runs, [])
    text = html_page(rows, made.plan, ENVIRONMENT, made.runs, made.tokens, made.gpu)
    assert "1 gap took" in text
    assert "because Python collected garbage" in text
    assert '<section id="why">' not in render(made)


def test_the_report_is_rebuilt_from_the_files_alone(tmp_path):
    made = campaign(3, 2, 6, skipped=1)
    for name in ("runs", "tokens", "gpu"):
        write_rows(tmp_path / f"{name}.csv", getattr(columns, name.upper()), getattr(made, name))
    for name, value in (("plan", made.plan), ("environment", ENVIRONMENT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    build_report(tmp_path)
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written == render(made)
    build_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == written


def test_legends_name_only_what_is_shown(made):
    page = render(made)
    assert "mean divergence" not in page  # no cell has that column
    assert "between processes" not in page
    assert "share of the variance of token times within runs" in page


def test_what_may_not_be_quoted_has_no_median_in_map_scale_or_bar(made):
    rows = [{**row, "verdict": "unstable: runs differ 1.30x"} for row in made.rows]
    found = heat_maps(rows)
    assert "logarithmic" not in found
    assert "heat-" not in found
    assert "unquoted" in speed_range(next(r for r in rows if r["decode_tok_per_s_median"]), 100.0)
    assert "In grey" in lead(rows)
    assert "In grey" not in lead([{**row, "verdict": "ok"} for row in made.rows])


def test_charts_know_whether_a_median_may_be_shown_and_whether_the_origin_is_to_be_compared(made):
    plan = {**made.plan, "as_origin": True}
    rows = [{**row, "verdict": "unstable: runs differ 1.30x"} for row in made.rows]
    for given_rows, given_plan, quotable in ((made.rows, made.plan, True), (rows, plan, False)):
        page = html_page(given_rows, given_plan, ENVIRONMENT, made.runs, made.tokens, made.gpu)
        charts = Page(page).data["charts-0"]
        assert charts["quotable"] is quotable
        whole = [run["generate_tok_per_s"] for run in charts["runs"]]
        assert all(whole) is (given_plan is plan)


TILES = """[...document.querySelectorAll('.map td:not(.absent)')].map(tile => {
  const look = getComputedStyle(tile), box = tile.getBoundingClientRect();
  const [across, down] = [['Left', 'Right'], ['Top', 'Bottom']].map(sides =>
    sides.reduce((sum, side) => sum + parseFloat(look[`border${side}Width`]), 0));
  return [box.width - across, box.height - down, look.backgroundClip];
})"""


@pytest.mark.skipif(browser.PROGRAM is None, reason="needs Chromium")
def test_tiles_of_the_map_have_equal_areas(made, tmp_path):
    """Also those that are not quotable, and those without a figure."""
    rows = list(made.rows)
    rows[1] = {**rows[1], "verdict": "unstable: runs differ 1.30x"}
    rows[2] = {**rows[2], "decode_tok_per_s_median": None, "status": "oom", "verdict": None}
    place = tmp_path / "report.html"
    page = html_page(rows, made.plan, ENVIRONMENT, made.runs, made.tokens, made.gpu)
    place.write_text(page, encoding="utf-8")
    assert {"unquotable", "none"} <= set(re.findall(r'<td class="([\w-]+)"', page))
    with browser.opened(place.as_uri()) as shown:
        tiles = shown.run(TILES)
        assert shown.problems == []
    assert len(tiles) > 5
    width, height, _ = tiles[0]
    for tile in tiles:
        assert tile == [
            pytest.approx(width, abs=0.5),
            pytest.approx(height, abs=0.5),
            "padding-box",
        ]
