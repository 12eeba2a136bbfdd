// Every token of a cell over time, SM clock and power under it on the same clock.
// The time between runs is cut out, so that a reload or a pause does not flatten the runs.

const LEFT = 52, TOP = 18, PANEL = { itl: 190, clock: 64, power: 64 }, GAP = 22, CUT = 10;
const FEW = 1500; // tokens that can be told apart, so that a line through them helps

/** Where each run lies on the cut clock, in seconds; `cut` is the width of a gap. */
function layOut(runs) {
  const ends = runs.map((run) => {
    const last = [run.t_s, ...run.gpus.map((gpu) => gpu.t_s)].map((t) => t[t.length - 1] || 0);
    return Math.max(...last);
  });
  const cut = (ends.reduce((sum, end) => sum + end, 0) / 1100) * CUT;
  let at = 0;
  const places = runs.map((run, i) => {
    const place = { run, from: at, to: at + ends[i] };
    at = place.to + cut;
    return place;
  });
  return { places, total: at - cut };
}

/** Index of the value nearest to `wanted` in ascending values; -1 for none. */
function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1; else high = middle;
  }
  if (low > 0 && wanted - values[low - 1] < values[low] - wanted) return low - 1;
  return high < 0 ? -1 : low;
}

function itlScale(places, range) {
  const [, high] = extent(places.map(({ run }) => run.itl_ms));
  const [low] = extent(places.map(({ run }) => run.itl_ms.filter((value) => value > 0)));
  const typical = extent([places.map(({ run }) => run.itl_p50_ms)])[1];
  if (high > 6 * typical) return [logarithmic([low * 0.9, high * 1.1], range), "ms, logarithmic"];
  return [linear([0, high * 1.05], range), "ms"];
}

const STALL_APART = 5;

function drawTokens(root, head, places, x, y, share) {
  const paths = { steady: "", stall: "", joined: "" };
  // Of marks that would lie on each other the highest stays.
  const stalls = new Map();
  for (const { run, from } of places) {
    const limit = run.stall_ms ?? Infinity;
    let pen = "M";
    run.itl_ms.forEach((itl, i) => {
      if (Number.isNaN(itl)) return;
      const at = `${round(x(from + run.t_s[i]))} ${round(y(itl))}`;
      if (itl >= limit) {
        const place = Math.round(x(from + run.t_s[i]) / STALL_APART), there = stalls.get(place);
        if (!there || itl > there.itl) stalls.set(place, { itl, at });
      } else paths.steady += `M${at}h.01`;
      paths.joined += pen + at;
      pen = "L";
    });
  }
  if (stalls.size) key(head, "var(--bad)", "▲ stall: far slower than its run's tokens");
  for (const { at } of stalls.values()) paths.stall += `M${at}m-4 3l4 -7l4 7z`;
  const few = share * places.reduce((sum, { run }) => sum + run.tokens, 0) < FEW;
  if (few) svg(root, "path", { class: "line", d: paths.joined, stroke: "var(--accent)", opacity: 0.35 });
  svg(root, "path", { class: "dots", d: paths.steady, stroke: "var(--accent)", "stroke-width": few ? 4 : 2.6 });
  svg(root, "path", { d: paths.stall, fill: "var(--bad)" });
}

function drawSensor(root, places, x, y, name, colour) {
  const dashes = ["none", "5 3", "2 2"];
  for (const { run, from } of places) {
    run.gpus.forEach((gpu, number) => {
      let path = "", pen = "M";
      gpu[name].forEach((value, i) => {
        if (Number.isNaN(value)) { pen = "M"; return; }
        const at = round(x(from + gpu.t_s[i]));
        path += pen === "M" ? `M${at} ${round(y(value))}` : `H${at}V${round(y(value))}`;
        pen = "H";
      });
      svg(root, "path", { class: "line", d: path, stroke: colour, "stroke-dasharray": dashes[number % 3] });
    });
  }
}

/** Bars over the stretches in which the GPU held its clock back. */
function drawThrottle(root, places, x, y) {
  for (const { run, from } of places) {
    for (const gpu of run.gpus) {
      for (const [begin, end, reasons] of gpu.throttled) {
        const left = x(from + begin);
        const bar = svg(root, "rect", { x: left, y, width: Math.max(3, x(from + end) - left), height: 5, fill: "var(--bad)" });
        withTip(bar, `throttled: ${reasons}`);
      }
    }
  }
}

function describe(cell, { run, from }, at) {
  const t = at - from;
  const lines = [`${run.warmup ? "warm-up" : `run ${run.run}`}, ${show(run.start_s + t, 5)} s`];
  const i = nearest(run.t_s, t);
  if (i >= 0) {
    const token = run.index ? run.index[i] : i;
    const itl = Number.isNaN(run.itl_ms[i]) ? `TTFT ${run.ttft_s === null ? "–" : show(run.ttft_s * 1e3)} ms` : `${show(run.itl_ms[i], 4)} ms`;
    lines.push(`token ${token}: ${itl}`);
  }
  for (const gpu of run.gpus) {
    const j = nearest(gpu.t_s, t);
    const name = run.gpus.length > 1 ? `GPU ${gpu.gpu_index}: ` : "";
    if (j >= 0) lines.push(`${name}${show(gpu.sm_clock_mhz[j], 4)} MHz, ${show(gpu.power_w[j])} W`);
  }
  return lines.join("\n");
}

function drawRunBands(root, places, x, bottom) {
  let free = -Infinity;
  places.forEach(({ run, from, to }) => {
    const [left, right] = [x(from), x(to)];
    svg(root, "rect", { class: "band", x: left, y: TOP, width: right - left, height: bottom - TOP });
    const name = run.warmup ? "warm-up" : places.length > 12 ? run.run : `run ${run.run}`;
    if (left >= free && right > LEFT) {
      svg(root, "text", { class: "strong", x: Math.max(left, LEFT), y: TOP - 6 }, name);
      free = Math.max(left, LEFT) + 7 * name.length + 8;
    }
  });
}

/** Ticks in the campaign's seconds, counted from the cell's first request. */
function drawTimeAxis(root, places, x, [low, high], width, bottom) {
  let free = -Infinity;
  const step = (high - low) / (width / 90);
  for (const { run, from, to } of places) {
    const shift = run.start_s - from;
    const [begin, end] = [Math.max(from, low) + shift, Math.min(to, high) + shift];
    if (end <= begin) continue;
    const inside = ticks(begin, end, Math.max(1, (end - begin) / step));
    for (const value of inside) {
      const at = x(value - shift);
      if (at < free) continue;
      svg(root, "line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 });
      svg(root, "text", { x: at, y: bottom + 16, "text-anchor": "middle" }, `${value} s`);
      free = at + 56;
    }
  }
}

function timeline(host, cell, state) {
  const measured = cell.runs.filter((run) => !run.warmup);
  const { places, total } = layOut(state.warmup || !measured.length ? cell.runs : measured);
  const sensors = places.some(({ run }) => run.gpus.length);
  const lanes = causeLanes(places);
  const marks = lanes.length ? GAP + lanes.length * LANE : 0;
  const bottom = TOP + PANEL.itl + marks + (sensors ? 2 * GAP + PANEL.clock + PANEL.power : 0);
  const view = state.view || [0, total];
  const about = `Time between tokens of ${places.length} runs; the table of runs has the figures`;
  const { box, head, root, width } = chart(host, "Time between tokens (ITL)", bottom + 22, about);
  box.classList.add("whole");
  const x = linear(view, [LEFT, width - 8]);
  const clip = `clip-${state.id}`;
  svg(svg(root, "clipPath", { id: clip }), "rect", { x: LEFT, y: 0, width: width - 8 - LEFT, height: bottom });
  const layer = () => svg(root, "g", { "clip-path": `url(#${clip})` });

  drawRunBands(layer(), places, x, bottom);
  const [y, unit] = itlScale(places, [TOP + PANEL.itl, TOP]);
  yAxis(root, y, LEFT, width - 8, 4);
  key(head, "var(--accent)", `token, ${unit}`);
  drawTokens(layer(), head, places, x, y, (view[1] - view[0]) / total);
  if (marks) drawCauses(root, layer, places, lanes, x, TOP + PANEL.itl + GAP);
  if (sensors) drawSensors(root, layer, places, x, width, TOP + PANEL.itl + marks + GAP);
  drawTimeAxis(root, places, x, view, width, bottom);
  return { box, head, root, x, places, total, bottom };
}

function drawSensors(root, layer, places, x, width, top) {
  for (const [name, size, colour, label] of [
    ["sm_clock_mhz", PANEL.clock, "var(--clock)", "SM clock, MHz"],
    ["power_w", PANEL.power, "var(--power)", "power, W"],
  ]) {
    const [low, high] = extent(places.flatMap(({ run }) => run.gpus.map((gpu) => gpu[name])));
    const room = Math.max((high - low) * 0.1, high * 0.02);
    const y = linear([Math.max(0, low - room), high + room], [top + size, top]);
    yAxis(root, y, LEFT, width - 8, 3);
    const held = name === "sm_clock_mhz" && places.some(({ run }) => run.gpus.some((gpu) => gpu.throttled.length));
    svg(root, "text", { x: LEFT + 5, y: top - 9 }, held ? `${label}; red: held back` : label);
    drawSensor(layer(), places, x, y, name, colour);
    if (name === "sm_clock_mhz") drawThrottle(layer(), places, x, top - 6);
    top += size + GAP;
  }
}
