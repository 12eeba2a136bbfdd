// How often each time between tokens occurred, over all measured runs.

function distribution(host, { histogram, percentiles }) {
  if (!histogram) return;
  const { low_ms, high_ms, counts } = histogram;
  const total = counts.reduce((sum, count) => sum + count, 0);
  const about = `Distribution of ${total} times between tokens, ${show(low_ms)} to ${show(high_ms)} ms`;
  const { head, root, width, height } = chart(host, "Distribution of ITL", 220, about);
  key(head, "var(--accent)", "tokens over ms, log-log");
  const named = Object.entries(percentiles).map(([name, value]) => `${name} ${show(value)}`);
  key(head, "var(--doubt)", `${named.join(", ")} ms`);
  const bottom = height - 24;
  const x = logarithmic([low_ms, high_ms], [LEFT, width - 8]);
  const y = logarithmic([0.6, Math.max(...counts) * 1.1], [bottom, 8]);
  yAxis(root, y, LEFT, width - 8, 4);
  const bar = (width - 8 - LEFT) / counts.length;
  const edge = (i) => low_ms * (high_ms / low_ms) ** (i / counts.length);
  counts.forEach((count, i) => {
    if (!count) return;
    const top = round(y(count));
    const rect = svg(root, "rect", { x: round(LEFT + i * bar), y: top, width: round(Math.max(1, bar - 1)), height: bottom - top, fill: "var(--accent)" });
    withTip(rect, `${show(edge(i), 4)} to ${show(edge(i + 1), 4)} ms: ${count} tokens`);
  });
  svg(root, "line", { class: "axis", x1: LEFT, x2: width - 8, y1: bottom, y2: bottom });
  for (const value of x.ticks()) {
    svg(root, "text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, String(value));
  }
  for (const value of Object.values(percentiles)) {
    const at = round(x(value));
    svg(root, "line", { stroke: "var(--doubt)", "stroke-width": 1.5, x1: at, x2: at, y1: 4, y2: bottom });
  }
}
