"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const el = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const HEAD = 16, LANE = 74, VALUE = 56, GAP = 8;
const { axis, chunks, moments, stops, frames } = trace;
const length = axis.reduce((sum, part) => sum + part[1], 0);
const known = moments.map((m) => ({ step: m[0], value: m[2] })).filter((m) => m.value !== null);
const valued = known.length > 1 ? known : [];
let now = 0, width = 0, dynamic = null, saying = 0;

const percent = (w) => (w > 0 && w < 0.01 ? "<1" : Math.round(100 * w)) + "%";
const number = (v) => String(Number(v.toPrecision(3)));
const decode = (text) => Array.from({ length: text.length / 2 },
  (_, i) => (DIGITS.indexOf(text[2 * i]) * 64 + DIGITS.indexOf(text[2 * i + 1])) / 4095);
const labelOf = (step) => trace.labels[step - trace.first] || "";
const rewardOf = (step) => trace.rewards[step - trace.first];
const stepsOf = ([, first, count]) =>
  count === 1 ? `step ${first}` : `steps ${first} to ${first + count - 1}`;

function make(kind, attributes = {}, parent = null, text = null) {
  const node = kind in { svg: 1, g: 1, rect: 1, line: 1, text: 1, polyline: 1, circle: 1 }
    ? document.createElementNS(SVG, kind) : document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function x(step) {
  let before = 0;
  for (const [first, count] of axis) {
    if (step < first + count) return (before + Math.max(0, step - first)) * width / length;
    before += count;
  }
  return width;
}

function stepAt(px) {
  let left = Math.min(Math.max(px, 0), width - 0.01) * length / width;
  for (const [first, count] of axis) {
    if (left < count) return first + Math.floor(left);
    left -= count;
  }
  return 0;
}

function draw() {
  width = el("timeline").clientWidth;
  const height = HEAD + trace.layers * (LANE + GAP) + (valued.length ? VALUE : 0) + 18;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  for (const [first, count, chunk] of axis) {
    const left = x(first), wide = count * width / length;
    if (chunk >= 0 && wide > 26)
      make("text", { x: left + 2, y: 11, class: "soft" }, svg,
        wide > 62 ? `chunk ${chunks[chunk][0]}` : chunks[chunk][0]);
    for (let layer = 0; layer < trace.layers; layer++)
      make("rect", { x: left, y: HEAD + layer * (LANE + GAP), width: Math.max(wide - 1, 0.5),
        height: LANE, class: chunk < 0 ? "open" : "band" }, svg);
  }
  const bottom = HEAD + trace.layers * (LANE + GAP);
  for (const m of moments) if (m[0] !== null)
    make("line", { x1: x(m[0] + 0.5), x2: x(m[0] + 0.5), y1: bottom - GAP, y2: bottom - 1, class: "tick" }, svg);
  if (valued.length) {
    const all = valued.map((m) => m.value), low = Math.min(0, ...all), high = Math.max(...all, low + 1e-9);
    const y = (v) => bottom + 14 + (VALUE - 20) * (1 - (v - low) / (high - low));
    make("polyline", { class: "value", points: valued.map((m) => `${x(m.step + 0.5)},${y(m.value)}`).join(" ") }, svg);
    if (valued.length < 40) for (const m of valued)
      make("circle", { class: "dot", r: 2.5, cx: x(m.step + 0.5), cy: y(m.value) }, svg);
    make("text", { x: 2, y: bottom + 11, class: "soft" }, svg, `value, ${number(low)} to ${number(high)}`);
  }
  const paid = trace.rewards.map((r, i) => [r, i]).filter(([r]) => r);
  if (paid.length < 30) for (const [r, i] of paid) {
    const at = x(trace.first + i + 0.5);
    make("text", { x: Math.min(at, width - 2), y: height - 4, "text-anchor": at > width / 2 ? "end" : "start" },
      svg, `reward ${number(r)}`);
  }
  dynamic = make("g", {}, svg);
  el("timeline").replaceChildren(svg);
  show(now);
}

function drawRecall(moment, layer) {
  const top = HEAD + layer * (LANE + GAP), best = [];
  for (const [chunk, weight, text] of moment[4][layer]) {
    const [, first, count] = chunks[chunk], left = x(first), wide = count * width / length;
    make("rect", { x: left, y: top, width: Math.max(wide - 1, 0.5), height: LANE, class: "weight",
      "fill-opacity": (0.22 * weight).toFixed(3) }, dynamic);
    decode(text).forEach((w, i) => best.push([first + i, w * weight]));
    if (wide > 30) make("text", { x: left + 3, y: top + 12 }, dynamic, percent(weight));
  }
  const most = Math.max(...best.map((b) => b[1]), 1e-9), bar = Math.max(width / length - 0.6, 0.6);
  for (const [step, w] of best) if (w > 0)
    make("rect", { x: x(step), y: top + LANE - (LANE - 16) * w / most, width: bar, class: "bar",
      height: (LANE - 16) * w / most, "fill-opacity": (0.3 + 0.7 * w / most).toFixed(2) }, dynamic);
  if (moment[3] !== null) {
    const [, first, count] = chunks[moment[3]], wide = count * width / length;
    make("rect", { x: x(first) + 1, y: top + 1, width: Math.max(wide - 3, 2), height: LANE - 2, class: "asked" }, dynamic);
    if (wide > 34) make("text", { x: x(first) + 4, y: top + 25 }, dynamic, "asked");
  }
}

function paint(canvas, step) {
  const place = frames ? frames.places[step - trace.first] ?? -1 : -1, ready = el("sheet").complete;
  canvas.hidden = place < 0;
  if (canvas.hidden || !ready) return;
  [canvas.width, canvas.height] = frames.size;
  const [w, h] = frames.size;
  canvas.getContext("2d").drawImage(el("sheet"), (place % frames.columns) * w,
    Math.floor(place / frames.columns) * h, w, h, 0, 0, w, h);
  canvas.setAttribute("aria-label", `picture of step ${step}${labelOf(step) ? ": " + labelOf(step) : ""}`);
}

function card(list, moment, [chunk, weight, text]) {
  const span = chunks[chunk], item = make("li", {}, list), isAsked = chunk === moment[3];
  make("h3", {}, item, `chunk ${span[0]}: ${percent(weight)}`);
  if (isAsked) { item.className = "asked"; make("strong", {}, item, "the chunk asked about"); }
  make("div", { class: "hint" }, item, stepsOf(span) + (span[3] ? `, ${span[3]}` : ""));
  make("div", {}, make("div", { class: "meter" }, item)).style.width = `${100 * weight}%`;
  const strongest = decode(text).map((w, i) => [w, span[1] + i]).sort((a, b) => b[0] - a[0]);
  const row = make("div", { class: "best" }, item);
  for (const [w, step] of strongest.slice(0, 3)) {
    const figure = make("figure", {}, row);
    paint(make("canvas", { role: "img" }, figure), step);
    const label = span[4] ? span[4][step - span[1]] || labelOf(step) : labelOf(step);
    make("figcaption", {}, figure, `step ${step}: ${percent(w)} of it${label ? ", " + label : ""}`);
  }
}

function sentence(step, moment) {
  const label = step === null ? moment[5] : labelOf(step);
  const where = step === null ? label : `Step ${step}${label ? ": " + label : ""}`;
  if (!moment) return `${where}${/[.?!]$/.test(where) ? "" : "."} ${stops[now][1] < -1 ? "What was recalled here was left out of the page."
    : "Nothing is asked of the memory here."}`;
  const parts = [/[.?!]$/.test(where) ? where : where + "."];
  if (moment[1] !== null) parts.push(`Decides ${moment[1]}.`);
  moment[4].forEach((layer, n) => {
    const name = trace.layers > 1 ? `Layer ${n + 1} recalls` : "Recalls";
    const each = layer.map(([chunk, weight, text]) => {
      const inside = decode(text), top = inside.indexOf(Math.max(...inside));
      return `chunk ${chunks[chunk][0]} with ${percent(weight)}, most of it step ${chunks[chunk][1] + top}`;
    });
    parts.push(each.length ? `${name} ${each.join("; ")}.` : `${name} nothing: no chunk has closed.`);
    if (moment[3] !== null) {
      const rank = layer.findIndex(([chunk]) => chunk === moment[3]);
      parts.push(rank < 0 ? "The chunk asked about is not among them."
        : `Chunk ${chunks[moment[3]][0]} is the one asked about.`);
    }
  });
  return parts.join(" ");
}

function show(stop) {
  now = Math.min(Math.max(stop, 0), stops.length - 1);
  const [step, which] = stops[now], moment = which < 0 ? null : moments[which];
  el("scrub").value = now;
  const said = sentence(step, moment);
  el("scrub").setAttribute("aria-valuetext", step === null ? `query ${now + 1}` : `step ${step}${moment ? ", a decision" : ""}`);
  clearTimeout(saying);
  saying = setTimeout(() => { el("said").textContent = said; }, 200);
  el("label").textContent = (moment && moment[5]) || (step === null ? "" : labelOf(step)) || "";
  const facts = step === null ? [["query", `${now + 1} of ${stops.length}`]] : [["step", step]];
  if (moment && moment[1] !== null) facts.push(["action", moment[1]]);
  if (moment && moment[2] !== null) facts.push(["value", number(moment[2])]);
  if (step !== null && rewardOf(step) != null) facts.push(["reward", number(rewardOf(step))]);
  el("numbers").replaceChildren();
  for (const [name, value] of facts) { make("dt", {}, el("numbers"), name); make("dd", {}, el("numbers"), value); }
  if (step !== null) paint(el("frame"), step);
  dynamic.replaceChildren();
  el("recalled").replaceChildren();
  if (moment) moment[4].forEach((layer, n) => {
    drawRecall(moment, n);
    make("h2", {}, el("recalled"), trace.layers > 1 ? `Layer ${n + 1} recalls` : "Recalls");
    const list = make("ol", {}, el("recalled"));
    if (!layer.length) make("li", {}, list, "nothing: no chunk has closed");
    for (const one of layer) card(list, moment, one);
  });
  if (step !== null)
    make("line", { x1: x(step + 0.5), x2: x(step + 0.5), y1: 0, y2: HEAD + trace.layers * (LANE + GAP), class: "now" }, dynamic);
}

function jump(way) {
  for (let n = now + way; n >= 0 && n < stops.length; n += way) if (stops[n][1] >= 0) return show(n);
}

function drag(event) {
  const step = stepAt(event.clientX - el("timeline").getBoundingClientRect().left);
  let best = -1;
  stops.forEach(([s], n) => {
    if (s !== null && (best < 0 || Math.abs(s - step) < Math.abs(stops[best][0] - step))) best = n;
  });
  if (best >= 0) show(best);
}

el("scrub").addEventListener("input", () => show(Number(el("scrub").value)));
el("previous").addEventListener("click", () => jump(-1));
el("next").addEventListener("click", () => jump(1));
el("timeline").addEventListener("pointerdown", (event) => { el("timeline").setPointerCapture(event.pointerId); drag(event); });
el("timeline").addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
document.addEventListener("keydown", (event) => {
  // In the slider the browser does it; elsewhere only what scrolls nothing is taken.
  if (event.target !== document.body || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "ArrowRight") show(now + 1);
  if (event.key === "ArrowLeft") show(now - 1);
});
el("sheet").addEventListener("load", () => show(now));
new ResizeObserver(() => { if (el("timeline").clientWidth !== width) draw(); }).observe(el("timeline"));
const telling = (test) => stops.findIndex(([, which]) => which >= 0 && test(moments[which]));
now = Math.max(telling((m) => m[4].some((layer) => layer.length)), 0);
draw();
