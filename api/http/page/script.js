const PAUSE = 2000, KEPT = 150, STORED = "molehill-key";
// Cividis (Nuñez, Anderton, Renslow 2018): even to the eye, and the same to colour-blind people.
const SCALE = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

const $ = (id) => document.getElementById(id);
const past = new Map();  // by adapter: what happened between two answers
let shares = [], last = null, chosen = null, routing = null, cell = null, running = false, again = false;

// Numbers as people read them.
const percent = (x) => x === null ? "–" : (100 * x).toFixed(x < 0.0995 && x > 0 ? 1 : 0) + " %";
const short = (x) => x === null ? "–" : Math.abs(x) >= 100 ? Math.round(x).toLocaleString("en") : x.toFixed(Math.abs(x) >= 10 ? 1 : 2).replace(/\.?0+$/, "");
function scaled(x, base, units) {
  let i = 0;
  while (x >= base && i < units.length - 1) { x /= base; i += 1; }
  return short(x) + " " + units[i];
}
const bytes = (x) => scaled(x, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const flops = (x) => scaled(x, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"]);

class Refused extends Error {}

async function ask(path, more = {}, patience = 10000) {
  const key = sessionStorage.getItem(STORED);
  const headers = { ...(key && { Authorization: "Bearer " + key }), ...(more.body && { "Content-Type": "application/json" }) };
  const answer = await fetch(path, { ...more, headers, cache: "no-store", signal: AbortSignal.timeout(patience) });
  if (answer.status === 401 || answer.status === 403) throw new Refused();
  if (!answer.ok) {
    const error = new Error("it answers " + answer.status);
    error.status = answer.status;
    error.answer = await answer.json().catch(() => null);
    throw error;
  }
  return answer.json();
}

const address = (name) => "v1/adapters/" + name.split("/").map(encodeURIComponent).join("/");

async function poll() {
  if (running) { again = true; return; }
  running = true;
  again = false;
  try {
    const overview = await ask("v1/routing");
    keep(overview);
    await choose(overview);
    show(overview);
  } catch (error) {
    if (error instanceof Refused) wantKey();
    else lose(error);
  }
  running = false;
  if (again) poll();
}

async function choose(overview) {
  const names = overview.adapters.map((adapter) => adapter.adapter);
  if (!names.includes(chosen)) { chosen = busiest(overview); cell = null; }
  const name = chosen;
  let answer = null;
  if (name !== null) {
    try { answer = await ask(address(name) + "/routing"); }
    catch (error) { if (error.status !== 404) throw error; }  // unloaded just now, or draining
  }
  if (name === chosen) routing = answer;
}

function busiest(overview) {
  const sorted = [...overview.adapters].sort((a, b) => b.tokens - a.tokens);
  return sorted.length ? sorted[0].adapter : null;
}

// Counters only grow, except where an adapter was loaded anew.
function keep(overview) {
  const now = Date.now() / 1000, before = last;
  const names = new Set(overview.adapters.map((adapter) => adapter.adapter));
  for (const name of past.keys()) if (!names.has(name)) past.delete(name);
  for (const adapter of overview.adapters) {
    const old = before && before.adapters.get(adapter.adapter);
    if (!past.has(adapter.adapter)) past.set(adapter.adapter, []);
    if (!old || adapter.tokens < old.tokens) continue;
    const decisions = adapter.total.decisions - old.total.decisions;
    const activated = adapter.total.experts_activated - old.total.experts_activated;
    push(past.get(adapter.adapter), {
      time: now,
      speed: (adapter.tokens - old.tokens) / (now - before.time),
      value: decisions > 0 ? activated / decisions : null,
    });
  }
  if (overview.seconds && before && before.seconds) {
    const steps = overview.seconds.steps - before.seconds.steps;
    const ops = overview.seconds.adapter_ops - before.seconds.adapter_ops;
    push(shares, { time: now, value: steps > 0 ? ops / steps : null });
  }
  last = { time: now, seconds: overview.seconds, adapters: new Map(overview.adapters.map((a) => [a.adapter, a])) };
}

function push(points, point) {
  points.push(point);
  if (points.length > KEPT) points.shift();
}

function wantKey() {
  $("login").hidden = false;
  for (const id of ["content", "empty", "trouble", "views", "prompt-view"]) $(id).hidden = true;
  $("status").textContent = sessionStorage.getItem(STORED) ? "The key was refused" : "Locked";
  if (document.activeElement !== $("key")) $("key").focus();
}

function lose(error) {
  const since = last ? " Figures are those of " + new Date(1000 * last.time).toLocaleTimeString() + "." : "";
  $("trouble").textContent = "No figures from the server: " + (error.message || error.name) + ". Trying again." + since;
  $("trouble").hidden = false;
  $("status").textContent = "No connection";
}

function show(overview) {
  $("login").hidden = $("trouble").hidden = true;
  showView();
  listAsked(overview);
  $("status").textContent = "Live, every " + PAUSE / 1000 + " s";
  const none = overview.adapters.length === 0;
  $("empty").hidden = !none;
  $("content").hidden = none;
  if (none) return;
  showTiles(overview);
  showRows(overview);
  showDetail(overview);
}

const sum = (adapters, of) => adapters.reduce((total, adapter) => total + of(adapter), 0);
const latest = (points) => points && points.length ? points[points.length - 1] : null;
const speedOf = (name) => { const point = latest(past.get(name)); return point ? point.speed : null; };

function showTiles(overview) {
  const adapters = overview.adapters;
  $("count").textContent = adapters.length;
  $("running").textContent = sum(adapters, (a) => a.requests_in_flight);
  $("speed").textContent = last && latest(past.get(adapters[0].adapter)) ? short(sum(adapters, (a) => speedOf(a.adapter) || 0)) : "–";
  $("memory").textContent = bytes(sum(adapters, (a) => a.resident_bytes));
  const point = [...shares].reverse().find((p) => p.value !== null);
  const whole = overview.seconds && overview.seconds.steps > 0 ? overview.seconds.adapter_ops / overview.seconds.steps : null;
  $("share").textContent = percent(point ? point.value : whole);
  $("share-text").textContent = overview.seconds ? "of the step in adapter ops" : "step share: not measured on this device";
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

const rows = new Map();

function showRows(overview) {
  const wanted = $("filter").value.toLowerCase();
  const shown = overview.adapters.filter((adapter) => adapter.adapter.toLowerCase().includes(wanted));
  const names = new Set(shown.map((adapter) => adapter.adapter));
  for (const [name, row] of rows) if (!names.has(name)) { row.line.remove(); rows.delete(name); }
  // Rows are kept, so that focus and scrolling are.
  shown.forEach((adapter, i) => {
    if (!rows.has(adapter.adapter)) rows.set(adapter.adapter, makeRow(adapter.adapter));
    const row = rows.get(adapter.adapter);
    fillRow(row, adapter);
    if ($("rows").children[i] !== row.line) $("rows").insertBefore(row.line, $("rows").children[i] || null);
  });
  $("filtered").hidden = shown.length === overview.adapters.length;
  $("filtered").textContent = shown.length + " of " + overview.adapters.length + " shown";
}

function what(adapter) {
  const away = adapter.state === "serving" && !adapter.resident_bytes ? "in no slot" : "";
  return [adapter.kind, adapter.state, away, adapter.note].filter((part) => part).join(", ");
}

function makeRow(name) {
  const line = element("tr"), head = element("td"), button = element("button", name), note = element("small");
  button.type = "button";
  button.title = name;
  const pick = () => { if (chosen !== name) { chosen = name; cell = null; routing = null; refresh(); } };
  line.addEventListener("click", pick);
  head.append(button, note);
  const cells = ["", "", "", "wide", "wide"].map((kind) => element("td", "", kind));
  line.append(head, ...cells);
  return { line, button, note, cells };
}

function fillRow(row, adapter) {
  const total = adapter.total, points = past.get(adapter.adapter) || [];
  row.note.textContent = what(adapter);
  row.line.className = adapter.adapter === chosen ? "chosen" : "";
  row.button.setAttribute("aria-pressed", String(adapter.adapter === chosen));
  const speed = speedOf(adapter.adapter);
  [adapter.requests_in_flight, speed === null ? "–" : short(speed), short(total.experts_per_decision), percent(total.soft_share)]
    .forEach((text, i) => { row.cells[i].textContent = text; });
  row.cells[4].replaceChildren(spark(points));
}

function spark(points) {
  const drawn = draw(points, 90, 22);
  drawn.setAttribute("width", 90);
  drawn.setAttribute("height", 22);
  drawn.setAttribute("aria-hidden", "true");
  return drawn;
}

const shape = (tag, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

function range(points) {
  const values = points.map((point) => point.value).filter((value) => value !== null);
  if (!values.length) return null;
  const low = Math.min(...values), high = Math.max(...values);
  return high - low < 1e-9 ? [low - 0.5, high + 0.5] : [low, high];
}

// A line with gaps where nothing was decided.
function draw(points, width, height, limits = range(points), into = shape("svg", { viewBox: `0 0 ${width} ${height}` })) {
  into.replaceChildren();
  if (!limits || !points.length) return into;
  const [low, high] = limits, end = latest(points).time, start = end - PAUSE / 1000 * (KEPT - 1);
  const first = Math.max(start, Math.min(points[0].time, end - 60));
  let path = "", pen = "M";
  for (const point of points) {
    if (point.value === null) { pen = "M"; continue; }
    const x = width * (point.time - first) / (end - first || 1);
    const y = 2 + (height - 4) * (1 - (point.value - low) / (high - low));
    path += pen + x.toFixed(1) + " " + y.toFixed(1) + (pen === "M" ? "l0.01 0" : "");
    pen = "L";
  }
  into.append(shape("path", { d: path, class: "curve", "stroke-linecap": "round" }));
  return into;
}

function chart(points, ids, limits, unit, what) {
  const svg = $(ids.curve);
  draw(points, 300, 96, limits, svg);
  for (const y of [2, 48, 94]) svg.prepend(shape("path", { d: `M0 ${y}H300`, class: "grid" }));
  const span = points.length ? Math.max(60, Math.round(latest(points).time - points[0].time)) : 0;
  $(ids.since).textContent = span ? "−" + (span >= 120 ? Math.round(span / 60) + " min" : span + " s") : "";
  const now = latest(points.filter((point) => point.value !== null));
  svg.setAttribute("aria-label", now ? `${what}: ${unit(now.value)} at last, between ${unit(limits[0])} and ${unit(limits[1])}` : what + ": nothing yet");
}

function figure(name, text) {
  const pair = element("div");
  pair.append(element("dt", name), element("dd", text));
  return pair;
}

function showDetail(overview) {
  const adapter = overview.adapters.find((one) => one.adapter === chosen);
  if (!adapter) return;
  const total = adapter.total, all = sum(overview.adapters, (a) => a.total.flops_done);
  const work = total.flops_done + total.flops_avoided;
  $("title").textContent = chosen;
  $("subtitle").textContent = what(adapter) + (routing ? ", generation " + routing.generation.slice(0, 12) : "");
  $("figures").replaceChildren(
    figure("tokens", adapter.tokens.toLocaleString("en")),
    figure("experts per decision", short(total.experts_per_decision)),
    figure("soft fallbacks", percent(total.soft_share)),
    figure("router entropy", total.mean_entropy === null ? "–" : total.mean_entropy.toFixed(2)),
    figure("imbalance of experts", total.imbalance === null ? "–" : total.imbalance.toFixed(2) + " ×"),
    figure("low-rank work done", flops(total.flops_done)),
    figure("avoided by routing", work ? percent(total.flops_avoided / work) : "–"),
    figure("of all adapters' work", all ? percent(total.flops_done / all) : "–"),
    figure("memory in the workers", bytes(adapter.resident_bytes)),
  );
  const points = past.get(chosen) || [], limits = range(points);
  $("most").textContent = limits ? short(limits[1]) : "";
  $("least").textContent = limits ? short(limits[0]) : "";
  chart(points, { curve: "curve", since: "since" }, limits, short, "Experts activated per decision");
  $("share-section").hidden = overview.seconds === null;
  const high = Math.max(0.01, Math.ceil(11 * Math.max(...shares.map((point) => point.value || 0))) / 10);
  $("share-most").textContent = percent(high);
  chart(shares, { curve: "share-curve", since: "share-since" }, [0, high], percent, "Share of the step in adapter ops");
  showMap();
}

// The heat map.

function showMap() {
  const sites = routing ? routing.sites.filter((site) => site.layer !== null) : [];
  const routed = sites.filter((site) => site.decisions > 0 || site.expert_shares !== null);
  const kinds = [...new Set(routed.map((site) => site.projection))];
  $("unrouted").hidden = routed.length > 0;
  $("unrouted").textContent = routing === null ? "No figures by layer."
    : routing.tokens === 0 ? "No token has run through this adapter yet."
    : "No router: every token takes all experts, at every layer.";
  $("map").hidden = routed.length === 0;
  const select = $("projection");
  select.parentElement.hidden = routed.length === 0;
  if (kinds.join() !== [...select.options].map((option) => option.value).join()) {
    const before = select.value;
    select.replaceChildren(...kinds.map((kind) => new Option(kind, kind)));
    if (kinds.includes(before)) select.value = before;
  }
  if (routed.length) drawMap(routed.filter((site) => site.projection === select.value));
}

let grid = null;  // layers, experts, shares[layer][expert]

function drawMap(sites) {
  const layers = sites.map((site) => site.layer), experts = Math.max(...sites.map((site) => site.experts));
  const most = Math.max(0.01, ...sites.flatMap((site) => site.expert_shares));
  grid = { sites, layers, experts, most };
  const canvas = $("heat"), ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = Math.min(420, Math.max(96, experts * 22));
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d"), across = canvas.width / sites.length, down = canvas.height / experts;
  const gap = Math.min(across, down) > 8 * ratio ? ratio : 0;
  sites.forEach((site, i) => site.expert_shares.forEach((share, e) => {
    const left = Math.round(i * across), top = Math.round(e * down);
    pen.fillStyle = colour(share / most);
    pen.fillRect(left, top, Math.round((i + 1) * across) - left - gap, Math.round((e + 1) * down) - top - gap);
  }));
  if (cell && cell[0] < sites.length && cell[1] < experts) {
    pen.lineWidth = 2 * ratio;
    pen.strokeStyle = "#ffffff";
    pen.strokeRect(cell[0] * across + ratio, cell[1] * down + ratio, across - 3 * ratio, down - 3 * ratio);
    pen.lineWidth = ratio;
    pen.strokeStyle = "#000000";
    pen.strokeRect(cell[0] * across, cell[1] * down, across - ratio, down - ratio);
  }
  $("first").textContent = layers[0];
  $("last").textContent = layers.length > 1 ? layers[layers.length - 1] : "";
  $("top").textContent = percent(most);
  canvas.setAttribute("aria-label", describe());
  $("readout").textContent = cell ? readout() : "Point at a cell, or focus the map and use the arrow keys.";
  drawLegend();
  if ($("numbers").open) fillTable();
}

function drawLegend() {
  const canvas = $("legend"), pen = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x += 1) {
    pen.fillStyle = colour(x / (canvas.width - 1));
    pen.fillRect(x, 0, 1, canvas.height);
  }
}

function colour(share) {
  const place = Math.max(0, Math.min(1, share)) * (SCALE.length - 1), i = Math.min(SCALE.length - 2, Math.floor(place));
  const part = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  const mix = (at) => Math.round(part(SCALE[i], at) + (part(SCALE[i + 1], at) - part(SCALE[i], at)) * (place - i));
  return `rgb(${mix(1)}, ${mix(3)}, ${mix(5)})`;
}

function describe() {
  let best = [0, 0];
  grid.sites.forEach((site, i) => site.expert_shares.forEach((share, e) => {
    if (share > grid.sites[best[0]].expert_shares[best[1]]) best = [i, e];
  }));
  const site = grid.sites[best[0]];
  return `Share of decisions that chose each of ${grid.experts} experts at ${grid.layers.length} layers; ` +
    `the most at layer ${site.layer}, expert ${best[1]}: ${percent(site.expert_shares[best[1]])}`;
}

function readout() {
  const site = grid.sites[cell[0]];
  if (!site || cell[1] >= site.experts) return "";
  return `Layer ${site.layer}, expert ${cell[1]}: ${percent(site.expert_shares[cell[1]])} of ` +
    `${site.decisions.toLocaleString("en")} decisions. The layer: ${short(site.experts_per_decision)} experts per decision, ` +
    `entropy ${site.mean_entropy.toFixed(2)}, imbalance ${site.imbalance === null ? "–" : site.imbalance.toFixed(2) + " ×"}.`;
}

function fillTable() {
  const head = element("tr");
  head.append(element("th", "layer"), ...Array.from({ length: grid.experts }, (_, e) => element("th", "expert " + e)));
  const lines = grid.sites.map((site) => {
    const line = element("tr");
    line.append(element("td", site.layer), ...site.expert_shares.map((share) => element("td", percent(share))));
    return line;
  });
  $("table").replaceChildren(head, ...lines);
}

function point(event) {
  const box = $("heat").getBoundingClientRect();
  cell = [
    Math.min(grid.sites.length - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * grid.sites.length))),
    Math.min(grid.experts - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * grid.experts))),
  ];
  drawMap(grid.sites);
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

$("heat").addEventListener("pointermove", point);
$("heat").addEventListener("pointerdown", point);
$("heat").addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (!move) return;
  event.preventDefault();
  const from = cell || [0, 0];
  cell = cell ? [
    Math.min(grid.sites.length - 1, Math.max(0, from[0] + move[0])),
    Math.min(grid.experts - 1, Math.max(0, from[1] + move[1])),
  ] : from;
  drawMap(grid.sites);
});
$("numbers").addEventListener("toggle", () => { if ($("numbers").open) fillTable(); });
$("projection").addEventListener("change", () => { cell = null; showMap(); });
$("filter").addEventListener("input", () => { if (last) showRows({ adapters: [...last.adapters.values()] }); });
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(STORED, $("key").value);
  $("key").value = "";
  poll();
});
let drawn = null;
window.addEventListener("resize", () => {
  cancelAnimationFrame(drawn);
  drawn = requestAnimationFrame(() => { if (grid && !$("map").hidden) drawMap(grid.sites); });
});

// A click is answered at once; the poll after it brings the adapter's own figures.
function refresh() {
  if (last) showRows({ adapters: [...last.adapters.values()] });
  poll();
}

$("example").textContent =
  `curl ${location.origin}/v1/adapters -H 'Content-Type: application/json' \\\n` +
  `  -H 'Authorization: Bearer KEY' -d '{"name": "NAME", "source": "DIRECTORY"}'`;
poll();
setInterval(() => { if (!document.hidden && $("login").hidden) poll(); }, PAUSE);
