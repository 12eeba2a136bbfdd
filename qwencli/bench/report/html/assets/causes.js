// Why tokens were late: a lane for each cause under the timeline, its name above its bars.

const LANE = 24, LABEL = 13, LEAST_MARK = 3, MOST_SLOW = 12;

const CAUSE_COLOURS = {
  unknown: "var(--rest)", preemption: "var(--bad)", suspended: "var(--bad)", gil: "var(--prefill)",
  gc: "var(--prefill)", clock: "var(--clock)", throttle: "var(--power)", thermal_drift: "var(--power)",
  power_state: "var(--power)", allocator: "var(--preprocess)",
};
const causeColour = (cause) => CAUSE_COLOURS[cause] || "var(--accent)";

/** The causes that occur, that which cost most first. */
function causeLanes(places) {
  const lost = new Map();
  for (const { run } of places) {
    for (const [, , cause, ms] of run.causes) lost.set(cause, (lost.get(cause) || 0) + ms);
  }
  return [...lost.keys()].sort((a, b) => lost.get(b) - lost.get(a));
}

function causeTip([, , cause, ms, confidence, evidence]) {
  const sure = cause === "unknown" ? "" : `, confidence ${confidence}`;
  return `${cause.replaceAll("_", " ")}: ${show(ms)} ms lost${sure}\n${evidence}`;
}

function drawCauses(root, layer, places, lanes, x, top) {
  const marks = layer();
  for (const { run, from } of places) {
    for (const found of run.causes) {
      const [begin, end, cause] = found;
      const left = x(from + begin);
      const bar = svg(marks, "rect", {
        x: round(left), y: top + lanes.indexOf(cause) * LANE + LABEL, height: LANE - LABEL - 2, rx: 2,
        width: round(Math.max(LEAST_MARK, x(from + end) - left)), fill: causeColour(cause),
      });
      withTip(bar, causeTip(found));
    }
  }
  lanes.forEach((cause, i) => {
    const label = svg(root, "text", { class: "lane", x: LEFT + 5, y: top + i * LANE + LABEL - 3 }, cause.replaceAll("_", " "));
    label.setAttribute("pointer-events", "none");
  });
}

/** In words: what made phases of whole runs slow, those that cost most first. */
function slowRuns(host, runs) {
  const found = runs.flatMap((run) => run.slow.map((one) => [run, one]));
  if (!found.length) return;
  found.sort(([, a], [, b]) => b[3] - a[3]);
  const box = html(host, "div", "whole");
  const more = found.length > MOST_SLOW ? ` (${MOST_SLOW} of ${found.length})` : "";
  html(box, "h3", "", `Slow against the cell's other runs${more}`);
  const list = html(box, "ul", "slow");
  for (const [run, [, , cause, ms, , evidence]] of found.slice(0, MOST_SLOW)) {
    html(list, "li", "", `${runName(run)}: ${show(ms)} ms, ${cause.replaceAll("_", " ")} (${evidence})`);
  }
}
