// How often each time between tokens occurred, over all measured runs.

function distribution(host, { histogram, percentiles }) {
  if (!histogram) return;
  const { low_ms, high_ms, counts } = histogram;
  const total = counts.reduce((sum, count) => sum + count, 0);
  const about = `Distribution of ${total} times between tokens, ${show(low_ms)} to ${show(high_ms)} ms`;
  const { head, root, width, height } = chart(host, "Distribution of ITL", 220, about);
  key(head, "var(--accent)", "tokens, logarithmic, over ms, logarithmic");
  const bottom = height - 24;
  const x = logarithmic([low_ms, high_ms], [LEFT, width - 8]);
  const y = logarithmic([0.6, Math.max(...counts) * 1.1], [bottom, 30]);
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
  let taken = [-Infinity, -Infinity];
  for (const [name, value] of Object.entries(percentiles)) {
    const at = round(x(value));
    const line = taken[0] < at ? 0 : 1;
    svg(root, "line", { stroke: "var(--doubt)", x1: at, x2: at, y1: 26, y2: bottom });
    const before = at > width - 60;
    svg(root, "text", { class: "strong", x: before ? at - 3 : at + 3, y: 22 - 12 * line, "text-anchor": before ? "end" : "start" }, `${name} ${show(value)}`);
    taken[line] = at + 62;
  }
}
