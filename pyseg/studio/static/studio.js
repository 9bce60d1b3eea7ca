"use strict";
// The page of pyseg studio. What is on disk and what a click means is the server's matter; here is
// what is shown, and how pointer and keys become steps.

const $ = (id) => document.getElementById(id);
const TOKEN = new URLSearchParams(location.hash.slice(1)).get("token") || "";
const HEAT = [[0, 0, 0], [128, 0, 38], [227, 26, 28], [253, 141, 60], [254, 217, 118], [255, 255, 255]];
const WRONG = [214, 40, 57], MISSED = [247, 160, 30], IGNORED = [64, 68, 76], RIGHT = [222, 226, 230];
const ASKED = [0, 200, 255], HOVER = [255, 225, 60];
const TOOLS = { c: "click", x: "box", b: "brush", e: "eraser", f: "fill", s: "select", h: "move" };
const MODES = ["one", "swipe", "side"];
const DRAGGED = ["box", "brush", "eraser"];

let studio = null; // classes, palette, spec, items
let index = null; // of the image that is open
let view = null; // its stages, decoded
let state = null; // its revision, map, mask
let picture = null; // ImageBitmap
let tool = "click", label = 0, mode = "one";
const hidden = new Set(); // classes
const doubts = new Map(); // stage -> Uint8Array
const layers = new Map(); // source -> canvas
const look = { scale: 1, x: 0, y: 0 }; // of the image on the canvas, in CSS pixels
const cross = { x: 0, y: 0, shown: false }; // the keyboard's place, in pixels of the image
let drag = null; // what the pointer or the keyboard draws
let hovered = null; // mask under the pointer

// --- the server -----------------------------------------------------------------------------

async function ask(method, path, body, raw) {
  const headers = { Authorization: `Bearer ${TOKEN}` };
  if (body !== undefined && !raw) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: raw || body === undefined ? body : JSON.stringify(body) });
  } catch (error) {
    throw new Error("The server does not answer. What was done is on its disk: start it again, and reload.");
  }
  if (answer.ok) return answer;
  let text = `${answer.status} ${answer.statusText}`;
  try { text = (await answer.json()).error || text; } catch (error) { /* no JSON: a proxy's page */ }
  throw Object.assign(new Error(text), { status: answer.status });
}
const get = async (path) => (await ask("GET", path)).json();
const send = async (method, path, body) => (await ask(method, path, body)).json();

function decode(runs) {
  if (!runs) return null;
  const values = new Int16Array(view.size[0] * view.size[1]);
  let at = 0;
  runs.values.forEach((value, k) => { values.fill(value, at, at += runs.lengths[k]); });
  return values;
}

function say(text) { $("status").textContent = text; }
function complain(error, where = "alert") {
  $(where).textContent = error ? error.message : "";
  $(where).hidden = !error;
}

// Steps go one after the other, so that each knows the revision that the last one left.
let steps = Promise.resolve();
function inTurn(work) {
  steps = steps.then(async () => {
    try { complain(null); await work(); } catch (error) {
      drag = null;
      complain(error);
      if (error.status === 409) await refresh();
    }
    draw();
  });
  return steps;
}
function step(body, said) {
  const of = index;
  return inTurn(async () => {
    if (of !== index || of === null) return;
    take(await send("POST", `api/items/${of}/step?revision=${state.revision}`, body));
    drag = hovered = null;
    if (said) say(said);
    else if (state.score !== null) say(`Mask of ${share(state.mask)}, predicted IoU ${state.score.toFixed(2)}. Enter accepts.`);
  });
}
function share(mask) {
  let count = 0;
  for (const value of mask) count += value;
  return `${(100 * count / mask.length).toFixed(1)} % of the image`;
}
async function refresh() {
  if (index !== null) take(await get(`api/items/${index}/state`));
}

function take(found) {
  state = { ...found, map: decode(found.map), mask: decode(found.mask), ids: decode(found.ids) };
  for (const key of [...layers.keys()]) if (!key.startsWith("stage") && !key.startsWith("doubt")) layers.delete(key);
  const item = studio.items[index];
  item.done = state.done;
  item.saved = state.saved;
  showQueue();
  showStages();
  showObjects();
  showButtons();
}

// --- opening --------------------------------------------------------------------------------

async function begin() {
  try {
    studio = await get("api/studio");
  } catch (error) {
    return complain(error);
  }
  showStudio();
  const wanted = Number(new URLSearchParams(location.hash.slice(1)).get("image"));
  if (studio.items.length) await open(studio.items[wanted] ? wanted : 0);
  else say("Add images to begin.");
}

async function open(which) {
  const name = studio.items[which].name;
  $("busy").hidden = false;
  say(`Opening ${name} …`);
  complain(null);
  try {
    await steps;
    const found = await get(`api/items/${which}`);
    const file = await (await ask("GET", `api/items/${which}/image`)).blob();
    const bitmap = await createImageBitmap(file);
    const same = view && view.size[0] === found.size[0] && view.size[1] === found.size[1];
    [index, view, picture] = [which, found, bitmap];
    layers.clear(); doubts.clear(); drag = hovered = null;
    view.stages.forEach((stage) => { stage.map = decode(stage.map); });
    view.truth = decode(view.truth);
    take(found);
    if (!same) { fit(); cross.x = found.size[1] / 2; cross.y = found.size[0] / 2; }
    say(`${name}: ${found.size[1]} × ${found.size[0]} pixels.`);
    history.replaceState(null, "", `#token=${TOKEN}&image=${which}`);
  } catch (error) {
    studio.items[which].error = error.message;
    [index, view, picture, state] = [which, null, null, null];
    say("");
    complain(error);
  }
  $("busy").hidden = true;
  showDocument();
  draw();
}

// --- panels ---------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const css = (colour) => `rgb(${colour.join(",")})`;

function showStudio() {
  $("spec").value = studio.spec;
  $("output").textContent = studio.output;
  label = Math.min(label, studio.classes.length - 1);
  $("clicks").replaceChildren(...[...new Set([studio.clicks, ...studio.clickers])].map((name) => make("option", { value: name, textContent: name })));
  $("clicks").value = studio.clicks;
  $("legend").replaceChildren(...studio.classes.map((name, k) => {
    // Style attributes are what the page's policy forbids; an SVG's fill is not one.
    const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const square = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of Object.entries({ width: 18, height: 18, rx: 3, fill: css(studio.palette[k]), stroke: "currentColor" })) square.setAttribute(key, value);
    swatch.append(square);
    swatch.setAttribute("aria-hidden", "true");
    const button = make("button", { type: "button" }, swatch, name, make("kbd", { textContent: k < 9 ? String(k + 1) : "" }));
    button.setAttribute("aria-pressed", String(k === label));
    button.onclick = () => choose(k);
    const box = make("input", { type: "checkbox", checked: !hidden.has(k) });
    box.setAttribute("aria-label", `show ${name}`);
    box.onchange = () => { if (box.checked) hidden.delete(k); else hidden.add(k); layers.clear(); draw(); };
    return make("li", {}, box, button);
  }));
  $("class").replaceChildren(...studio.classes.map((name, k) => make("option", { value: String(k), textContent: name })));
  $("class").value = String(label);
  showQueue();
}

function choose(k) {
  label = (k + studio.classes.length) % studio.classes.length;
  $("class").value = String(label);
  $("legend").querySelectorAll("button").forEach((button, n) => button.setAttribute("aria-pressed", String(n === label)));
  const list = $("legend"), row = list.children[label];
  list.scrollTop = Math.min(row.offsetTop - list.offsetTop, Math.max(list.scrollTop, row.offsetTop - list.offsetTop + row.offsetHeight - list.clientHeight));
  say(`Class ${studio.classes[label]}.`);
  draw();
}

function order() {
  const list = studio.items.map((_, k) => k);
  if (!$("unsure").checked) return list;
  const weight = (k) => (studio.items[k].done ? -2 : studio.items[k].unsure ?? -1);
  return list.sort((a, b) => weight(b) - weight(a) || a - b);
}

function showQueue() {
  const items = studio.items, done = items.filter((item) => item.done).length;
  $("progress").textContent = items.length ? `${done} of ${items.length} done${index === null ? "" : ` · ${items[index].name}`}` : "no images";
  $("share").value = items.length ? done / items.length : 0;
  const options = order().map((k) => {
    const item = items[k];
    const mark = item.error ? "✗" : item.done ? "✓" : item.saved ? "•" : "\u2007";
    const unsure = item.unsure === null ? "" : `  ${(100 * item.unsure).toFixed(1)} % unsure`;
    return make("option", { value: String(k), textContent: `${mark} ${item.name}${unsure}`, selected: k === index });
  });
  $("queue").replaceChildren(...options);
  $("survey").textContent = studio.surveying ? "Stop looking" : "Look through all";
}

function showDocument() {
  const stages = view ? view.stages : [];
  const named = stages.map((stage, k) => [`stage ${k}`, `after ${stage.name}`]);
  const truth = view && view.truth ? [["truth", "ground truth"], ["error", "errors of the map"],
    ...stages.map((stage, k) => [`error ${k}`, `errors after ${stage.name}`])] : [];
  const doubt = stages.flatMap((stage, k) => (stage.doubt ? [[`doubt ${k}`, `uncertainty of ${stage.name}`]] : []));
  const sources = [["map", "the map"], ...named, ...truth, ...doubt, ["image", "the image alone"]];
  for (const [id, first] of [["left", "map"], ["right", named.length ? "stage 0" : "image"]]) {
    const before = $(id).value;
    $(id).replaceChildren(...sources.map(([value, textContent]) => make("option", { value, textContent })));
    $(id).value = sources.some(([value]) => value === before) ? before : first;
  }
  $("start").replaceChildren(...named.map(([, text], k) => make("option", { value: String(k), textContent: text })), make("option", { value: "", textContent: "nothing: all void" }));
  showQueue();
  showButtons();
  showMode();
}

function showStages() { // and what the map as edited scores
  const row = (...cells) => make("tr", {}, ...cells.map((textContent) => make("td", { textContent })));
  const miou = (scores) => (scores ? scores.miou.toFixed(3) : "–");
  const rows = view.stages.map((stage) => row(stage.name, stage.milliseconds.toFixed(0),
    stage.peak_bytes === null ? "–" : (stage.peak_bytes / 1e6).toFixed(0), miou(stage.scores)));
  $("stages").tBodies[0].replaceChildren(...rows, row("the map", "", "", miou(state.scores)));
}

function showObjects() { // of instances: what each is, to be selected by name
  $("objects-panel").hidden = studio.edit !== "instances";
  $("objects").replaceChildren(...(state.objects || []).map((one, k) => {
    const name = studio.classes[one.label];
    const button = make("button", { type: "button", disabled: one.at === null, textContent: `${k + 1} ${name}, ${one.area} pixels${one.score < 1 ? `, score ${one.score.toFixed(2)}` : ""}` });
    button.onclick = () => select(one.at[0] + 0.5, one.at[1] + 0.5);
    return make("li", {}, button);
  }));
}

function showButtons() {
  const there = state !== null && view !== null;
  $("accept").disabled = !there || !state.mask;
  $("clear").disabled = !there || !state.mask;
  $("undo").disabled = !there || !state.undo;
  $("redo").disabled = !there || !state.redo;
  $("remove").disabled = !there || !state.asked || !state.asked.selected;
  $("done").disabled = !there;
  $("done").setAttribute("aria-pressed", String(there && state.done));
  $("done").textContent = there && state.done ? "Done (take back)" : "Done, next";
  for (const button of document.querySelectorAll("[data-export], #begin")) button.disabled = !there;
  for (const row of document.querySelectorAll("#start-row, #load-label")) row.hidden = studio !== null && studio.edit === "instances"; // they put label maps
  for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  $("size-label").hidden = tool !== "brush" && tool !== "eraser";
  $("sign").hidden = tool !== "click";
}

function showMode() {
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  $("right-label").hidden = mode === "one";
  $("split-label").hidden = mode !== "swipe";
}

// --- layers ---------------------------------------------------------------------------------

function painted(colour) { // colour(k) -> [r, g, b] or null, of pixel k
  const [height, width] = view.size;
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  const data = context.createImageData(width, height);
  for (let k = 0; k < width * height; k++) {
    const found = colour(k);
    if (found) { data.data.set(found, 4 * k); data.data[4 * k + 3] = 255; }
  }
  context.putImageData(data, 0, 0);
  return canvas;
}

const ofMap = (map) => painted((k) => (map[k] < 0 || hidden.has(map[k]) ? null : studio.palette[map[k]]));
const ofBorders = (ids) => { // white, where an object ends and another, or none, begins
  const [height, width] = view.size;
  return painted((k) => {
    const differs = (to) => ids[to] !== undefined && ids[to] !== ids[k];
    return ids[k] >= 0 && (differs(k - width) || differs(k + width) || (k % width > 0 && differs(k - 1)) || (k % width < width - 1 && differs(k + 1))
      || k < width || k >= width * (height - 1) || k % width === 0 || k % width === width - 1) ? [255, 255, 255] : null;
  });
};
const ofErrors = (map) => painted((k) => {
  const truth = view.truth[k];
  return truth < 0 ? IGNORED : map[k] === truth ? RIGHT : map[k] < 0 ? MISSED : WRONG;
});
const ofMask = (mask, colour) => { // with a white outline, which shows on a class of any colour
  const width = view.size[1], at = (k) => mask[k] === 1;
  return painted((k) => (!mask[k] ? null : at(k - 1) && at(k + 1) && at(k - width) && at(k + width) ? colour : [255, 255, 255]));
};
const heats = Array.from({ length: 256 }, (_, value) => {
  const at = value / 255 * (HEAT.length - 1), low = Math.min(Math.floor(at), HEAT.length - 2);
  return HEAT[low].map((channel, c) => Math.round(channel + (at - low) * (HEAT[low + 1][c] - channel)));
});

function layer(source) {
  if (source === "image") return null;
  if (layers.has(source)) return layers.get(source);
  const [kind, number] = source.split(" ");
  let found = null;
  if (kind === "map") found = ofMap(state.map);
  else if (kind === "stage") found = ofMap(view.stages[number].map);
  else if (kind === "truth") found = ofMap(view.truth);
  else if (kind === "error") found = ofErrors(number === undefined ? state.map : view.stages[number].map);
  else if (kind === "borders") found = ofBorders(state.ids);
  else if (kind === "mask") found = ofMask(state.mask, ASKED);
  else if (doubts.has(number)) found = painted((k) => heats[doubts.get(number)[k]]);
  else { fetchDoubt(number); return null; }
  layers.set(source, found);
  return found;
}

async function fetchDoubt(number) {
  const of = index;
  try {
    const bytes = new Uint8Array(await (await ask("GET", `api/items/${of}/doubt/${number}`)).arrayBuffer());
    if (of === index) { doubts.set(number, bytes); draw(); }
  } catch (error) { complain(error); }
}

// --- drawing --------------------------------------------------------------------------------

const canvas = $("canvas"), context = canvas.getContext("2d");

function panes() { // where the image is shown: left edge, width, source
  const width = canvas.clientWidth;
  if (mode !== "side") return [{ left: 0, width, source: $("left").value }];
  return [{ left: 0, width: width / 2 - 2, source: $("left").value }, { left: width / 2 + 2, width: width / 2 - 2, source: $("right").value }];
}

function fit() {
  if (!view) return;
  const [height, width] = view.size, pane = panes()[0];
  look.scale = Math.min(pane.width / width, canvas.clientHeight / height);
  look.x = (pane.width - width * look.scale) / 2;
  look.y = (canvas.clientHeight - height * look.scale) / 2;
}

let planned = false;
function draw() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => { planned = false; paint(); });
}

function paint() {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  if (!view) return;
  for (const pane of panes()) {
    clipped(pane.left, pane.width, () => drawImage(pane, pane.source));
    if (mode === "swipe") {
      const middle = look.x + view.size[1] * look.scale * $("split").value / 100;
      clipped(middle, width - middle, () => drawImage(pane, $("right").value));
      context.fillStyle = "#fff";
      context.fillRect(middle - 1, 0, 2, height);
    }
    clipped(pane.left, pane.width, () => drawPrompt(pane));
  }
}

function clipped(left, width, work) {
  context.save();
  context.beginPath();
  context.rect(left, 0, Math.max(0, width), canvas.clientHeight);
  context.clip();
  work();
  context.restore();
}

function drawImage(pane, source) {
  const [height, width] = view.size;
  context.imageSmoothingEnabled = look.scale < 2;
  const at = [pane.left + look.x, look.y, width * look.scale, height * look.scale];
  context.drawImage(picture, ...at);
  const found = layer(source);
  if (!found) return;
  context.imageSmoothingEnabled = false;
  context.globalAlpha = $("opacity").value / 100;
  context.drawImage(found, ...at);
  context.globalAlpha = 1;
  if (source === "map" && state.ids) context.drawImage(layer("borders"), ...at);
}

function drawPrompt(pane) {
  const [height, width] = view.size;
  const to = (x, y) => [pane.left + look.x + x * look.scale, look.y + y * look.scale];
  const at = [...to(0, 0), width * look.scale, height * look.scale];
  context.imageSmoothingEnabled = false;
  context.globalAlpha = 0.65;
  if (state.mask) context.drawImage(layer("mask"), ...at);
  if (hovered) context.drawImage(hovered, ...at);
  context.globalAlpha = 1;
  if (state.asked) {
    if (state.asked.box) outlined(to, state.asked.box);
    state.asked.points.forEach(([x, y], k) => dot(...to(x, y), state.asked.positive[k]));
  }
  if (drag && drag.tool === "box" && drag.points.length > 1) {
    const [a, b] = [drag.points[0], drag.points[drag.points.length - 1]];
    outlined(to, [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])]);
  } else if (drag && drag.tool !== "box") {
    context.strokeStyle = drag.tool === "eraser" ? "#fff" : css(studio.palette[label]);
    context.globalAlpha = 0.75;
    context.lineWidth = 2 * drag.radius * look.scale;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    drag.points.forEach(([x, y], k) => context[k ? "lineTo" : "moveTo"](...to(x, y)));
    if (drag.points.length === 1) context.lineTo(...to(drag.points[0][0] + 0.01, drag.points[0][1]));
    context.stroke();
    context.globalAlpha = 1;
  }
  if (cross.shown) {
    const [x, y] = to(cross.x, cross.y);
    for (const [colour, wide] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = wide;
      context.beginPath();
      context.moveTo(x - 12, y); context.lineTo(x + 12, y);
      context.moveTo(x, y - 12); context.lineTo(x, y + 12);
      context.stroke();
    }
    if (tool === "brush" || tool === "eraser") ring(x, y, radius() * look.scale);
  }
}

function ring(x, y, size) {
  for (const [colour, wide] of [["#000", 3], ["#fff", 1.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = wide;
    context.beginPath();
    context.arc(x, y, size, 0, 2 * Math.PI);
    context.stroke();
  }
}
function outlined(to, [x0, y0, x1, y1]) {
  const [left, top] = to(x0, y0), [right, bottom] = to(x1, y1);
  for (const [colour, dash] of [["#000", []], ["#fff", [6, 4]]]) {
    context.strokeStyle = colour;
    context.lineWidth = 2;
    context.setLineDash(dash);
    context.strokeRect(left, top, right - left, bottom - top);
  }
  context.setLineDash([]);
}
function dot(x, y, positive) {
  context.fillStyle = positive ? "#14702b" : "#a8182b";
  context.strokeStyle = "#fff";
  context.lineWidth = 2;
  context.beginPath();
  context.arc(x, y, 8, 0, 2 * Math.PI);
  context.fill();
  context.stroke();
  context.beginPath();
  context.moveTo(x - 4, y); context.lineTo(x + 4, y);
  if (positive) { context.moveTo(x, y - 4); context.lineTo(x, y + 4); }
  context.stroke();
}

// --- pointer and keyboard -> steps ------------------------------------------------------------

const radius = () => Number($("size").value) / 2;
const inside = ([x, y]) => view && x >= 0 && y >= 0 && x < view.size[1] && y < view.size[0];
const negative = (event) => event.shiftKey || event.button === 2 || $("sign").getAttribute("aria-pressed") === "true";

function place(event) { // [x, y] in pixels of the image
  const box = canvas.getBoundingClientRect(), x = event.clientX - box.left;
  const pane = panes().find((one) => x < one.left + one.width) || panes()[0];
  return [(x - pane.left - look.x) / look.scale, (event.clientY - box.top - look.y) / look.scale];
}

function use(point, off) { // tools that need one place
  if (!inside(point)) return;
  const [x, y] = point, named = studio.classes[label];
  if (tool === "click") step({ do: "click", x, y, positive: !off, label: named });
  else if (tool === "fill") step({ do: "fill", x, y, label: named }, `Filled with ${named}.`);
  else if (tool === "select") select(x, y);
}
function select(x, y) {
  const objects = studio.edit === "instances";
  return step({ do: "select", x, y }, `Selected: clicks correct it, ${objects ? "the brush adds, the eraser takes, " : ""}Enter replaces it, Delete removes it.`).then(() => {
    // An object keeps its class where none is chosen for it.
    if (objects && state && state.asked) choose(studio.classes.indexOf(state.asked.label));
  });
}

function startDrag(point) { drag = { tool, points: [point], radius: radius() }; draw(); }
function growDrag(point) {
  const last = drag.points[drag.points.length - 1];
  // Nearer than a quarter of the radius, a line looks the same without the point.
  if (drag.tool !== "box" && Math.hypot(point[0] - last[0], point[1] - last[1]) < Math.max(0.5, drag.radius / 4)) return;
  drag.points.push(point);
  draw();
  if (drag.tool !== "box" && drag.points.length >= 4000) { endDrag(); startDrag(point); }
}
function endDrag() {
  const made = drag, named = studio.classes[label];
  if (!made || made.sent) return;
  made.sent = true;
  if (made.tool === "box") {
    const [a, b] = [made.points[0], made.points[made.points.length - 1]];
    const [x0, y0, x1, y1] = [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
    if (x1 - x0 < 1 || y1 - y0 < 1) { drag = null; say("A box needs two corners: drag, or space at each."); draw(); return; }
    step({ do: "box", x0, y0, x1, y1, label: named });
  } else {
    const erased = made.tool === "eraser";
    step({ do: "brush", points: made.points, radius: made.radius, label: erased ? "void" : named }, erased ? "Erased." : `Painted ${named}.`);
  }
}

const fingers = new Map();
let panned = null;
canvas.addEventListener("pointerdown", (event) => {
  if (!view) return;
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  cross.shown = false;
  if (fingers.size === 2) { drag = null; panned = null; return draw(); }
  const point = place(event);
  if (tool === "move" || event.button === 1) panned = [event.clientX, event.clientY];
  else if (DRAGGED.includes(tool)) { if (event.button === 0) startDrag(point); }
  else use(point, negative(event));
  event.preventDefault();
});
canvas.addEventListener("pointermove", (event) => {
  if (!view) return;
  const now = [event.clientX, event.clientY];
  if (fingers.size === 2 && fingers.has(event.pointerId)) {
    const [, other] = [...fingers].find(([id]) => id !== event.pointerId);
    const was = fingers.get(event.pointerId), box = canvas.getBoundingClientRect();
    const spread = (a) => Math.max(1, Math.hypot(a[0] - other[0], a[1] - other[1]));
    look.x += (now[0] - was[0]) / 2;
    look.y += (now[1] - was[1]) / 2;
    zoom(spread(now) / spread(was), (now[0] + other[0]) / 2 - box.left, (now[1] + other[1]) / 2 - box.top);
    fingers.set(event.pointerId, now);
  } else if (panned) {
    look.x += now[0] - panned[0];
    look.y += now[1] - panned[1];
    panned = now;
    draw();
  } else if (drag && !drag.sent && fingers.has(event.pointerId)) growDrag(place(event));
  else if (event.pointerType === "mouse" && !fingers.size) hover(place(event), event.shiftKey);
});
for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => {
  const single = fingers.size === 1;
  fingers.delete(event.pointerId);
  panned = null;
  if (!drag || drag.sent || !single) return;
  if (kind === "pointercancel") { drag = null; draw(); } else { if (inside(place(event)) || drag.tool === "box") growDrag(place(event)); endDrag(); }
});
canvas.addEventListener("pointerleave", () => { hovered = null; next = null; draw(); });
canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

function zoom(factor, x, y) {
  if (!view) return;
  const pane = panes().find((one) => x < one.left + one.width) || panes()[0];
  const scale = Math.min(64, Math.max(0.05, look.scale * factor));
  look.x = x - pane.left - (x - pane.left - look.x) * scale / look.scale;
  look.y = y - (y - look.y) * scale / look.scale;
  look.scale = scale;
  draw();
}
const zoomMiddle = (factor) => zoom(factor, panes()[0].width / 2, canvas.clientHeight / 2);

// One preview is asked for at a time; of the places since, the last one comes next.
let next = null, previewing = false;
function hover(point, off) {
  if (tool !== "click" || !$("hover").checked || !inside(point)) {
    next = null;
    if (hovered) { hovered = null; draw(); }
    return;
  }
  next = { point, off };
  if (!previewing) preview();
}
async function preview() {
  previewing = true;
  while (next) {
    const { point: [x, y], off } = next, of = index, revision = state.revision;
    next = null;
    try {
      const found = await send("POST", `api/items/${of}/preview`, { do: "click", x, y, positive: !off && $("sign").getAttribute("aria-pressed") !== "true", label: studio.classes[label] });
      if (of === index && revision === state.revision && tool === "click") { hovered = ofMask(decode(found.mask), HOVER); draw(); }
    } catch (error) { complain(error); next = null; }
  }
  previewing = false;
}

function press(off) { // space on the image
  const point = [cross.x, cross.y];
  cross.shown = true;
  if (!DRAGGED.includes(tool)) use(point, off);
  else if (drag && !drag.sent) { if (drag.tool === "box") growDrag(point); endDrag(); }
  else startDrag(point);
}

function moveCross(dx, dy) {
  const [height, width] = view.size;
  cross.shown = true;
  cross.x = Math.min(width - 0.5, Math.max(0.5, cross.x + dx));
  cross.y = Math.min(height - 0.5, Math.max(0.5, cross.y + dy));
  if (drag && !drag.sent) growDrag([cross.x, cross.y]);
  const under = state.map[Math.floor(cross.y) * width + Math.floor(cross.x)];
  say(`${Math.floor(cross.x)}, ${Math.floor(cross.y)}: ${under < 0 ? "void" : studio.classes[under]}`);
  draw();
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function onImage(event) {
  if (!view) return false;
  if (ARROWS[event.key]) {
    const by = event.shiftKey ? 10 : 1;
    moveCross(ARROWS[event.key][0] * by, ARROWS[event.key][1] * by);
  } else if (event.key === " ") press(event.shiftKey || $("sign").getAttribute("aria-pressed") === "true");
  else return false;
  return true;
}

const KEYS = {
  m: () => $("sign").click(), v: () => setMode(MODES[(MODES.indexOf(mode) + 1) % 3]),
  n: () => move(1), p: () => move(-1), d: () => $("done").click(),
  o: () => slide("opacity", -10), O: () => slide("opacity", 10), "[": () => slide("size", -2), "]": () => slide("size", 2),
  "+": () => zoomMiddle(1.25), "=": () => zoomMiddle(1.25), "-": () => zoomMiddle(0.8), 0: () => { fit(); draw(); },
  Delete: () => $("remove").click(), Backspace: () => $("remove").click(),
  ",": () => choose(label - 1), ".": () => choose(label + 1),
  Escape: () => { if (drag && !drag.sent) { drag = null; draw(); } else $("clear").click(); },
};

document.addEventListener("keydown", (event) => {
  if (!studio) return;
  const at = event.target, typing = at.matches("input:not([type=range]):not([type=checkbox]):not([type=radio]), select");
  const control = event.ctrlKey || event.metaKey;
  if (control && !typing && "zy".includes(event.key.toLowerCase())) {
    $(event.key.toLowerCase() === "y" || event.shiftKey ? "redo" : "undo").click();
  } else if (control || event.altKey || typing) return;
  else if (at === canvas && onImage(event)) { /* done */ }
  else if (event.key === "Enter" && !at.matches("button, summary, a")) $("accept").click();
  else if (TOOLS[event.key]) setTool(TOOLS[event.key]);
  else if (event.key >= "1" && event.key <= "9") { if (Number(event.key) <= studio.classes.length) choose(Number(event.key) - 1); }
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

function slide(id, by) {
  $(id).value = Number($(id).value) + by;
  $(id).dispatchEvent(new Event("input"));
}
function setTool(name) {
  tool = name;
  drag = hovered = null;
  canvas.style.cursor = name === "move" ? "grab" : "crosshair";
  showButtons();
  say(`Tool: ${name}.`);
  draw();
}
function setMode(name) {
  const sided = (mode === "side") !== (name === "side");
  mode = name;
  showMode();
  if (sided) fit();
  draw();
}

// --- queue and files --------------------------------------------------------------------------

function move(by) {
  const list = order(), at = list.indexOf(index);
  const to = list[at + by];
  if (to !== undefined) return open(to);
  say(by > 0 ? "This is the last image." : "This is the first image.");
}

async function reload() {
  const found = await get("api/items");
  studio.items = found.items;
  studio.surveying = found.surveying;
  showQueue();
  if (studio.surveying) setTimeout(() => reload().catch(complain), 1000);
}

async function saveAs(to) {
  const answer = await ask("GET", `api/items/${index}/export?to=${to}`);
  const address = URL.createObjectURL(await answer.blob());
  make("a", { href: address, download: `${studio.items[index].name}.${to === "indexed" ? "png" : `${to}.json`}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  say(`Saved as ${to}.`);
}

async function add(files) {
  let first = null;
  for (const file of files) {
    const found = await (await ask("POST", `api/items?name=${encodeURIComponent(file.name)}`, file, true)).json();
    first = first ?? found.index;
  }
  await reload();
  if (first !== null) await open(first);
}

const trying = (work) => async (event) => { try { complain(null); await work(event); } catch (error) { complain(error); } };

for (const button of document.querySelectorAll("[data-tool]")) button.onclick = () => setTool(button.dataset.tool);
for (const button of document.querySelectorAll("[data-export]")) button.onclick = trying(() => saveAs(button.dataset.export));
for (const button of document.querySelectorAll("[data-all]")) button.onclick = trying(async () => say((await send("POST", "api/export", { to: button.dataset.all })).lines.join("; ")));
for (const choice of document.querySelectorAll("[name=mode]")) choice.onchange = () => setMode(choice.value);
for (const name of ["clear", "undo", "redo"]) $(name).onclick = () => step({ do: name }, { clear: "Cleared.", undo: "Undone.", redo: "Done again." }[name]);
$("accept").onclick = () => step({ do: "accept", label: studio.classes[label] }, `Accepted as ${studio.classes[label]}.`);
$("remove").onclick = () => step({ do: "accept", label: "void" }, "Removed.");
$("sign").onclick = () => $("sign").setAttribute("aria-pressed", String($("sign").getAttribute("aria-pressed") !== "true"));
$("zoom-in").onclick = () => zoomMiddle(1.25);
$("zoom-out").onclick = () => zoomMiddle(0.8);
$("zoom-fit").onclick = () => { fit(); draw(); };
$("size").oninput = () => { $("size-value").textContent = $("size").value; draw(); };
for (const id of ["opacity", "split", "left", "right"]) $(id).oninput = draw;
$("class").onchange = () => choose(Number($("class").value));
$("previous").onclick = () => move(-1);
$("next").onclick = () => move(1);
$("done").onclick = trying(async () => {
  const on = !state.done;
  await steps;
  take(await send("POST", `api/items/${index}/done`, { on }));
  if (on) await move(1);
});
$("queue").onchange = () => open(Number($("queue").value));
$("unsure").onchange = trying(async () => {
  showQueue();
  if ($("unsure").checked && studio.items.some((item) => item.unsure === null && !item.done && !item.error)) say("Look through all, so that each image's uncertainty is known.");
});
$("survey").onclick = trying(async () => { await send("POST", "api/survey", { on: !studio.surveying }); await reload(); });
$("begin").onclick = () => step({ do: "start", stage: $("start").value === "" ? null : Number($("start").value) }, "Begun anew; undo brings the former map back.");
$("upload").onchange = trying(async () => { await add([...$("upload").files]); $("upload").value = ""; });
$("load").onchange = () => inTurn(async () => {
  const file = $("load").files[0];
  $("load").value = "";
  if (!file || index === null) return;
  take(await (await ask("PUT", `api/items/${index}/map?revision=${state.revision}`, file, true)).json());
  say("Map loaded; undo brings the former one back.");
});
$("clicks").onchange = trying(async () => { studio = await send("PUT", "api/studio", { clicks: $("clicks").value }); showStudio(); if (index !== null) await open(index); });
$("spec").oninput = () => {
  const text = $("spec").value, cut = text.lastIndexOf("+") + 1;
  const names = cut ? studio.refiners : studio.models;
  $("spec-names").replaceChildren(...names.map((name) => make("option", { value: text.slice(0, cut) + name })));
};
$("spec-form").onsubmit = async (event) => {
  event.preventDefault();
  complain(null, "spec-error");
  $("busy").hidden = false;
  try {
    studio = await send("PUT", "api/studio", { spec: $("spec").value });
    hidden.clear();
    showStudio();
    if (index !== null) await open(index);
  } catch (error) { complain(error, "spec-error"); }
  $("busy").hidden = true;
};
$("frame").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
$("frame").addEventListener("dragleave", () => { $("drop").hidden = true; });
$("frame").addEventListener("drop", trying(async (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  await add([...event.dataTransfer.files]);
}));
// Another tab may have worked on the same image.
document.addEventListener("visibilitychange", () => { if (!document.hidden && view) inTurn(async () => { await reload(); await refresh(); }); });
let wide = 0; // a telephone's address bar changes the height alone, which is no reason to zoom out
new ResizeObserver(() => { if (canvas.clientWidth !== wide) { wide = canvas.clientWidth; fit(); } draw(); }).observe(canvas);
showButtons();
begin();
