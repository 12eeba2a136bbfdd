const settings = JSON.parse(document.getElementById("settings").textContent);
const get = (id) => document.getElementById(id);
const turns = get("turns"), promptBox = get("prompt"), svg = get("timeline");
const CAPTION = "Describe this image.";
let conversation = [], pictures = [], running = null, clocks = [];

if (settings.asks_key) get("key-card").hidden = false;

function headers() {
  const key = get("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function element(kind, cls, text) {
  const made = document.createElement(kind);
  if (cls) made.className = cls;
  if (text) made.textContent = text;
  return made;
}

// --- pictures ---

function read(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
}

async function addFiles(files, caption) {
  const found = [...files].filter((file) => file.type.startsWith("image/"));
  for (const file of found) pictures.push(await read(file));
  showPictures();
  if (found.length && caption && !promptBox.value.trim() && !running) send(CAPTION);
}

function showPictures() {
  get("pictures").replaceChildren(...pictures.map((url, index) => {
    const button = element("button");
    button.type = "button";
    button.title = "Remove";
    const image = element("img");
    image.src = url;
    image.alt = "attached picture";
    button.append(image);
    button.onclick = () => { pictures.splice(index, 1); showPictures(); };
    return button;
  }));
}

let depth = 0;
addEventListener("dragenter", (e) => { e.preventDefault(); depth += 1; get("drop").hidden = false; });
addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) get("drop").hidden = true; });
addEventListener("dragover", (e) => e.preventDefault());
addEventListener("drop", (e) => {
  e.preventDefault();
  depth = 0;
  get("drop").hidden = true;
  addFiles(e.dataTransfer.files, true);
});
addEventListener("paste", (e) => { if (e.clipboardData.files.length) addFiles(e.clipboardData.files, false); });
get("file").onchange = (e) => { addFiles(e.target.files, false); e.target.value = ""; };

// --- talking ---

get("ask").onsubmit = (e) => { e.preventDefault(); send(promptBox.value.trim()); };
get("caption").onclick = () => send(CAPTION);
get("stop").onclick = () => running && running.abort();
get("clear").onclick = () => {
  if (running) running.abort();
  conversation = [];
  turns.replaceChildren(emptyTurn);
};
const emptyTurn = get("empty");
promptBox.onkeydown = (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(promptBox.value.trim()); }
};

function follow() { turns.scrollTop = turns.scrollHeight; }

function body() {
  const asked = {
    model: settings.model, messages: conversation, stream: true,
    stream_options: { include_usage: true }, chat_template_kwargs: { enable_thinking: get("think").checked },
  };
  const most = parseInt(get("max").value, 10), temperature = parseFloat(get("temperature").value);
  if (most > 0) asked.max_tokens = most;
  if (temperature >= 0) asked.temperature = temperature;
  return JSON.stringify(asked);
}

async function send(text) {
  if (running || !(text || pictures.length)) return;
  emptyTurn.remove();
  const shown = element("div", "turn user"), parts = [];
  for (const url of pictures) {
    const image = element("img");
    image.src = url;
    image.alt = "your picture";
    shown.append(image);
    parts.push({ type: "image_url", image_url: { url } });
  }
  if (text) { parts.push({ type: "text", text }); shown.append(text); }
  conversation.push({ role: "user", content: parts });
  pictures = [];
  showPictures();
  promptBox.value = "";
  const answer = element("div", "turn assistant waiting");
  const thoughts = element("div", "thoughts"), said = element("span");
  answer.append(thoughts, said);
  turns.append(shown, answer);
  follow();
  running = new AbortController();
  get("stop").hidden = false;
  get("send").disabled = get("caption").disabled = true;
  const start = performance.now(), times = [];
  let usage = null, failed = false;
  clocks = [];
  const watch = setInterval(() => look(start), 400);
  try {
    const reply = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: body(), signal: running.signal });
    if (!reply.ok) {
      const told = await reply.json().catch(() => null);
      throw new Error(told && told.error ? told.error.message : `the server answers ${reply.status}`);
    }
    for await (const piece of events(reply.body)) {
      if (piece.error) throw new Error(piece.error.message);
      if (piece.usage) usage = piece.usage;
      const delta = piece.choices.length ? piece.choices[0].delta : {};
      if (delta.content || delta.reasoning_content) times.push(performance.now() - start);
      if (delta.reasoning_content) { thoughts.append(delta.reasoning_content); thoughts.scrollTop = thoughts.scrollHeight; }
      if (delta.content) said.append(delta.content);
      figures(times, usage);
      draw(times);
      follow();
    }
  } catch (error) {
    if (error.name !== "AbortError") answer.append(element("div", "error", error.message));
    failed = error.name !== "AbortError" && !times.length;
  }
  clearInterval(watch);
  answer.classList.remove("waiting");
  if (failed) {
    // To be sent again, once what was wrong is put right.
    conversation.pop();
    promptBox.value = promptBox.value || text;
    pictures.push(...parts.filter((part) => part.image_url).map((part) => part.image_url.url));
    showPictures();
  } else {
    conversation.push({ role: "assistant", content: said.textContent });
  }
  running = null;
  get("stop").hidden = true;
  get("send").disabled = get("caption").disabled = false;
  figures(times, usage);
  draw(times);
  look();
  promptBox.focus();
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const found = held.split("\n\n");
    held = found.pop();
    for (const each of found) {
      const data = each.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// --- how fast it is ---

const ms = (value) => value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`;

function figures(times, usage) {
  const last = times[times.length - 1];
  get("ttft").textContent = times.length ? ms(times[0]) : "–";
  get("new").textContent = usage ? usage.completion_tokens : times.length || "–";
  get("speed").textContent = times.length > 1 ? `${((times.length - 1) / (last - times[0]) * 1000).toFixed(1)} tok/s` : "–";
  if (!usage) return;
  const t = usage.timings, cached = usage.prompt_tokens_details.cached_tokens;
  if (t.decode_tok_per_s) get("speed").textContent = `${t.decode_tok_per_s.toFixed(1)} tok/s`;
  get("prompt-tokens").textContent = usage.prompt_tokens + (cached ? ` (${cached} kept)` : "");
  const phases = [["preprocess", t.preprocess_s], ["vision", t.vision_encode_s], ["prefill", t.prefill_s], ["decode", t.decode_s]];
  get("phases").textContent = phases.filter(([, s]) => s !== null).map(([name, s]) => `${name} ${ms(s * 1000)}`).join(" · ");
}

function shape(kind, values, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

function draw(times) {
  if (!times.length) { svg.replaceChildren(); return; }
  const left = 34, right = 314, base = 126, top = 14, end = times[times.length - 1];
  const gaps = times.map((t, i) => i ? t - times[i - 1] : 0), most = Math.max(...gaps.slice(1), 1);
  const x = (t) => left + (right - left) * t / end;
  const parts = [
    shape("line", { x1: left, x2: right, y1: base, y2: base, class: "axis" }),
    shape("text", { x: left - 4, y: top + 4, "text-anchor": "end" }, `${most.toFixed(most < 10 ? 1 : 0)}`),
    shape("text", { x: left - 4, y: base, "text-anchor": "end" }, "ms"),
    shape("text", { x: left, y: 140 }, "0"),
    shape("text", { x: right, y: 140, "text-anchor": "end" }, ms(end)),
    shape("line", { x1: x(times[0]), x2: x(times[0]), y1: base, y2: top, class: "first" }),
    shape("text", { x: Math.min(x(times[0]) + 3, right - 60), y: top - 4 }, `first ${ms(times[0])}`),
  ];
  const step = Math.max(1, Math.ceil(times.length / 400));
  for (let i = 1; i < times.length; i += step) {
    const gap = Math.max(...gaps.slice(i, i + step));
    parts.push(shape("line", { x1: x(times[i]), x2: x(times[i]), y1: base, y2: base - (base - top) * gap / most }));
  }
  const seen = clocks.filter(([t]) => t <= end);
  if (seen.length > 1) {
    const high = Math.max(...seen.map(([, mhz]) => mhz));
    const points = seen.map(([t, mhz]) => `${x(t).toFixed(1)},${(base - (base - top) * 0.95 * mhz / high).toFixed(1)}`);
    parts.push(shape("polyline", { points: points.join(" ") }));
    parts.push(shape("text", { x: right, y: top - 4, "text-anchor": "end" }, `${high} MHz`));
  }
  svg.replaceChildren(...parts);
}

async function look(start) {
  let state;
  try {
    const reply = await fetch("/status", { headers: headers() });
    if (!reply.ok) return;
    state = await reply.json();
  } catch { return; }
  get("clock").hidden = !state.gpu;
  const gpu = state.gpu, ran = state.effective, pages = state.kv_pages;
  if (start !== undefined && gpu && gpu.sm_clock_mhz) clocks.push([performance.now() - start, gpu.sm_clock_mhz]);
  const rows = [
    ["Requests", `${state.running} running, ${state.waiting} waiting`],
    ["Rows", state.rows],
    ["Device", ran.device], ["Quantization", ran.quantization], ["Attention", ran.attention], ["Cache", ran.cache],
  ];
  if (pages) rows.push(["KV cache", `${(100 * pages.used / pages.all).toFixed(0)}% used`]);
  if (gpu) {
    if (gpu.sm_clock_mhz !== null) rows.push(["GPU clock", `${gpu.sm_clock_mhz} MHz`]);
    if (gpu.power_w !== null) rows.push(["Power", `${gpu.power_w.toFixed(0)} W`]);
    if (gpu.temperature_c !== null) rows.push(["Temperature", `${gpu.temperature_c} °C`]);
  }
  get("engine").replaceChildren(...rows.map(([name, value]) => {
    const row = element("div");
    row.append(element("dt", "", name), element("dd", "", String(value)));
    return row;
  }));
}

look();
get("key").onchange = () => look();
setInterval(() => { if (!running && !document.hidden) look(); }, 5000);
promptBox.focus();
