// A timeline that can be pointed at, zoomed and shown with the warm-up.

function liveTimeline(host, cell, state) {
  const slot = html(host, "div", "whole");
  const redraw = () => {
    slot.replaceChildren();
    const drawn = timeline(slot, cell, state);
    addButtons(drawn.head, cell, state, redraw);
    followPointer(drawn, cell, state, redraw);
  };
  redraw();
}

function addButtons(head, cell, state, redraw) {
  if (state.view) {
    const button = html(head, "button", "", "whole time");
    button.type = "button";
    button.addEventListener("click", () => { state.view = null; redraw(); });
  }
  if (!cell.runs.some((run) => run.warmup) || cell.runs.every((run) => run.warmup)) return;
  const label = html(head, "label");
  const box = html(label, "input");
  box.type = "checkbox";
  box.checked = state.warmup;
  label.append(" warm-up");
  box.addEventListener("change", () => { state.warmup = box.checked; state.view = null; redraw(); });
}

function followPointer({ root, x, places, total, bottom }, cell, state, redraw) {
  const cursor = svg(root, "line", { class: "cursor", y1: TOP, y2: bottom, visibility: "hidden" });
  const brush = svg(root, "rect", { class: "brush", y: TOP, height: bottom - TOP, width: 0 });
  let begun = null;
  const time = (event) => {
    const box = root.getBoundingClientRect();
    const scale = root.viewBox.baseVal.width / box.width;
    return Math.min(total, Math.max(0, x.invert((event.clientX - box.left) * scale)));
  };
  root.addEventListener("pointerdown", (event) => {
    begun = time(event);
    event.preventDefault();
  });
  root.addEventListener("pointermove", (event) => {
    const at = time(event);
    const place = places.find(({ from, to }) => from <= at && at <= to);
    cursor.setAttribute("visibility", place ? "visible" : "hidden");
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    if (place) showTip(event, describe(cell, place, at)); else hideTip();
    if (begun !== null) {
      brush.setAttribute("x", x(Math.min(begun, at)));
      brush.setAttribute("width", Math.abs(x(at) - x(begun)));
    }
  });
  root.addEventListener("pointerup", (event) => {
    const range = [begun, time(event)].sort((a, b) => a - b);
    const wide = begun !== null && x(range[1]) - x(range[0]) > 6;
    begun = null;
    if (wide) { hideTip(); state.view = range; redraw(); }
  });
  root.addEventListener("pointerleave", () => {
    begun = null;
    brush.setAttribute("width", 0);
    cursor.setAttribute("visibility", "hidden");
    hideTip();
  });
  root.addEventListener("dblclick", () => { state.view = null; redraw(); });
}
