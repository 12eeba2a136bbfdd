// Runs side by side: their speeds, their phases, their figures.

const PHASES = [
  ["preprocess_s", "preprocess", "var(--preprocess)"],
  ["vision_encode_s", "vision", "var(--vision)"],
  ["prefill_s", "prefill", "var(--prefill)"],
  ["rest_s", "other", "var(--rest)"],
];
const ROW = 18, NAME = 64;

const runName = (run) => (run.warmup ? "warm-up" : `run ${run.run}`);

/** Each run's speed in the order of time; warm-ups stand apart, off the scale if need be. A line at
 * the median, where that is a figure to show. */
function strip(host, { runs, quotable }) {
  const speeds = runs.filter((run) => !run.warmup && run.decode_tok_per_s !== null).map((run) => run.decode_tok_per_s);
  if (!speeds.length) return;
  const sorted = [...speeds].sort((a, b) => a - b);
  const median = (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
  const [low, high] = extent([speeds]);
  const room = Math.max(median * 0.03, (high - low) * 0.15);
  const about = `Speed of ${speeds.length} runs: ${show(low)} to ${show(high)} tokens per second`;
  const { head, root, width, height } = chart(host, "Run to run, tok/s", 220, about);
  key(head, "var(--accent)", "measured");
  if (runs.some((run) => run.warmup)) key(head, "var(--rest)", "○ warm-up, not counted");
  const bottom = height - 24;
  const y = linear([Math.max(0, low - room), high + room], [bottom, 12]);
  svg(root, "rect", { class: "band", x: LEFT, y: y(high), width: width - 8 - LEFT, height: Math.max(1, y(low) - y(high)) });
  yAxis(root, y, LEFT, width - 8, 4);
  if (quotable) svg(root, "line", { stroke: "var(--accent)", "stroke-dasharray": "5 4", x1: LEFT, x2: width - 8, y1: y(median), y2: y(median) });
  const step = (width - 8 - LEFT) / runs.length;
  const every = Math.ceil(24 / step);
  runs.forEach((run, i) => {
    const at = round(LEFT + (i + 0.5) * step);
    if (run.warmup) {
      svg(root, "line", { class: "grid", x1: at + step / 2, x2: at + step / 2, y1: 8, y2: bottom + 6 });
    }
    if (i % every === 0 || run.warmup) {
      svg(root, "text", { x: at, y: bottom + 16, "text-anchor": "middle" }, run.warmup ? "w" : run.run);
    }
    if (run.decode_tok_per_s !== null) drawSpeed(root, run, at, y, bottom);
  });
}

function drawSpeed(root, run, at, y, bottom) {
  const exact = y(run.decode_tok_per_s);
  const height = Math.min(bottom - 6, Math.max(10, exact));
  const look = run.warmup ? { fill: "var(--surface)", stroke: "var(--rest)", "stroke-width": 2 } : { fill: "var(--accent)" };
  const dot = svg(root, "circle", { cx: at, cy: height, r: 5, ...look });
  withTip(dot, `${runName(run)}: ${show(run.decode_tok_per_s, 4)} tok/s`);
  if (Math.abs(exact - height) > 1) {
    const text = `${exact > height ? "↓" : "↑"} ${show(run.decode_tok_per_s)}`;
    svg(root, "text", { x: at + 9, y: height + 4 }, text);
  }
}

/** Bars of one or more parts a run; a warm-up longer than all runs is cut, its figure stands. */
function bars(host, title, runs, parts) {
  const sum = (run) => parts.reduce((total, [name]) => total + (run[name] || 0), 0);
  const longest = Math.max(...runs.filter((run) => !run.warmup).map(sum), 0) || Math.max(...runs.map(sum));
  if (!longest) return;
  const about = `${title} of each run; the table of runs has the figures`;
  const { head, root, width } = chart(host, title, runs.length * ROW + 6, about);
  for (const [name, label, colour] of parts) {
    if (runs.some((run) => run[name])) key(head, colour, label);
  }
  const x = linear([0, longest], [NAME, width - 84]);
  runs.forEach((run, i) => {
    const top = i * ROW + 3;
    svg(root, "text", { class: run.warmup ? "" : "strong", x: 0, y: top + 12 }, runName(run));
    let from = 0;
    for (const [name, label, colour] of parts) {
      const to = from + (run[name] || 0);
      const end = Math.min(x(to), width - 84);
      if (end - x(from) > 0.2) {
        const bar = svg(root, "rect", { x: round(x(from)), y: top, width: round(Math.max(0.5, end - x(from) - 1)), height: ROW - 5, fill: colour, opacity: run.warmup ? 0.55 : 1 });
        withTip(bar, `${runName(run)}, ${label}: ${show(run[name] * 1e3, 4)} ms`);
      }
      from = to;
    }
    const cut = from > longest ? "› " : "";
    svg(root, "text", { x: Math.min(x(from), width - 84) + 5, y: top + 11 }, cut + (from < 1 ? `${show(from * 1e3)} ms` : `${show(from)} s`));
  });
}

function phases(host, runs) {
  for (const run of runs) {
    const known = (run.preprocess_s || 0) + (run.vision_encode_s || 0) + (run.prefill_s || 0);
    run.rest_s = run.ttft_s === null ? null : Math.max(0, run.ttft_s - known);
  }
  bars(host, "Request to first token (TTFT)", runs, PHASES);
  bars(host, "Decode", runs, [["decode_s", "decode", "var(--decode)"]]);
}

const FIGURES = [
  ["tok/s", "", "decode_tok_per_s", 1, 4],
  ["whole", "tok/s", "generate_tok_per_s", 1, 3], ["whole", "s", "generate_s", 1, 3],
  ["tokens", "", "generate_tokens", 1, 4], ["load", "s", "load_s", 1, 3], ["TTFT", "ms", "ttft_s", 1e3, 3],
  ["vision", "ms", "vision_encode_s", 1e3, 3], ["prefill", "ms", "prefill_s", 1e3, 3],
  ["ITL p50", "ms", "itl_p50_ms", 1, 3], ["p99", "ms", "itl_p99_ms", 1, 3], ["max", "ms", "itl_max_ms", 1, 3],
  ["stalls", "", "stall_count", 1, 3], ["clock", "mean MHz", "sm_clock_mhz_mean", 1, 4],
  ["clock", "least MHz", "sm_clock_mhz_min", 1, 4], ["power", "W", "power_w_mean", 1, 3],
  ["heat", "°C", "temperature_c_max", 1, 2], ["fragments", "%", "fragmentation_percent", 1, 2],
  ["retries", "", "num_alloc_retries", 1, 2], ["main thread", "% CPU", "main_thread_cpu_percent", 1, 3],
  ["GC", "ms", "gc_pause_ms", 1, 2], ["switches", "", "involuntary_switches", 1, 3],
];

function runTable(host, runs) {
  const box = html(host, "div", "whole wide");
  const table = html(box, "table", "runs");
  const head = html(html(table, "thead"), "tr");
  const shown = FIGURES.filter(([, , name]) => runs.some((run) => run[name] !== null && run[name] !== undefined));
  html(head, "th", "", "run");
  for (const [label, unit] of shown) html(html(head, "th", "", label), "small", "", unit);
  const throttled = runs.some((run) => run.throttle_reasons);
  if (throttled) html(head, "th", "", "throttled by");
  const body = html(table, "tbody");
  for (const run of runs) {
    const row = html(body, "tr", run.warmup ? "skipped" : "");
    html(row, "th", "", runName(run)).scope = "row";
    for (const [, , name, scale, digits] of shown) {
      html(row, "td", "", run[name] === null ? "–" : show(run[name] * scale, digits));
    }
    if (throttled) html(row, "td", "", run.throttle_reasons || "–");
  }
}
