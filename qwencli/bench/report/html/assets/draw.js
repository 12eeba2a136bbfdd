// Elements, numbers, scales and axes: what every chart is made of.

const SVG = "http://www.w3.org/2000/svg";

function html(parent, name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function svg(parent, name, attributes = {}, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

/** Little-endian 32-bit floats from base64. */
function floats(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

/** Three or four significant digits; "–" for what was not measured. */
function show(value, digits = 3) {
  if (value === null || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  if (size >= 10 ** digits) return value.toFixed(0);
  return value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
}

const round = (value) => Math.round(value * 10) / 10;

/** The extent of the numbers in several arrays, NaN and null apart; [0, 1] for none. */
function extent(arrays) {
  let low = Infinity, high = -Infinity;
  for (const values of arrays) {
    for (const value of values) {
      if (value === null || Number.isNaN(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : [0, 1];
}

/** About `count` round numbers within [low, high]; at least three where there is room for them. */
function ticks(low, high, count) {
  let step = (high - low) / count;
  if (!(step > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(step));
  const found = () => {
    const values = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
      values.push(Number((i * step).toPrecision(10)));
    }
    return values;
  };
  const rough = step;
  step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  let values = found();
  for (const finer of [5, 2, 1].map((factor) => factor * power)) {
    if (values.length > 2 || count < 3) break;
    if (finer < step) { step = finer; values = found(); }
  }
  return values;
}

function logTicks(low, high) {
  const fine = [1, 2, 5], coarse = [1];
  const found = (factors) => {
    const values = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of factors) {
        const value = Number((factor * 10 ** power).toPrecision(6));
        if (value >= low * 0.999 && value <= high * 1.001) values.push(value);
      }
    }
    return values;
  };
  const all = found(fine);
  const few = found(coarse);
  return all.length > 7 && few.length > 2 ? few : all.length > 2 ? all : ticks(low, high, 4);
}

function linear([low, high], [from, to]) {
  const span = high - low || 1;
  const scale = (value) => from + ((value - low) / span) * (to - from);
  scale.invert = (position) => low + ((position - from) / (to - from)) * span;
  scale.ticks = (count) => ticks(low, high, count);
  return scale;
}

function logarithmic([low, high], range) {
  const inner = linear([Math.log(low), Math.log(high)], range);
  const scale = (value) => inner(Math.log(Math.max(value, low)));
  scale.ticks = () => logTicks(low, high);
  return scale;
}

/** A blank drawing as wide as its box, with a heading; `about` is what it says without eyes. */
function chart(host, title, height, about) {
  const box = html(host, "div", "chart");
  const head = html(box, "div", "head");
  html(head, "h3", "", title);
  const width = Math.max(300, Math.floor(box.clientWidth));
  const root = svg(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": about });
  return { box, head, root, width, height };
}

/** Names a colour of the chart beside its heading. */
function key(head, colour, text) {
  const item = html(head, "span", "key");
  html(item, "i").style.background = colour;
  item.append(text);
}

function yAxis(root, scale, left, right, count) {
  for (const value of scale.ticks(count)) {
    const y = round(scale(value));
    svg(root, "line", { class: "grid", x1: left, x2: right, y1: y, y2: y });
    svg(root, "text", { x: left - 6, y: y + 4, "text-anchor": "end" }, String(value));
  }
}

const tip = document.getElementById("tip");

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 10)}px`;
}

function hideTip() {
  tip.hidden = true;
}

function withTip(node, text) {
  node.addEventListener("pointermove", (event) => {
    event.stopPropagation(); // the timeline under it has a tip of its own
    showTip(event, text);
  });
  node.addEventListener("pointerleave", hideTip);
}
