// The page of edges and rates. It reads what the command line reads and changes nothing.
//
// Every text goes in as text, never as markup: names of services and reasons come from workloads.
"use strict";

const EVERY_MS = 2000;
const PATIENCE_MS = 10000;
/// Samples of the lines that show what happens now: two minutes.
const SAMPLES = 60;
/// More services than this make no map that anybody can read; the busiest and the failing ones stay.
const MAP_SERVICES = 40;

const $ = (id) => document.getElementById(id);

function put(id, text) { $(id).textContent = text; }

function show(id, visible) { $(id).hidden = !visible; }

/// An element with attributes and children; a child that is a string becomes text.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "circle", "text", "title", "tspan"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== "") { element.setAttribute(key, value); }
  }
  element.append(...children);
  return element;
}

// --- Words and figures ---------------------------------------------------------------------------------------------

const none = (value) => value === null || value === undefined;
const seconds = (value) => none(value) ? "–" : value < 0.001 ? `${(value * 1e6).toFixed(0)} µs` :
  value < 0.1 ? `${(value * 1e3).toFixed(1)} ms` : value < 1 ? `${(value * 1e3).toFixed(0)} ms` : `${value.toFixed(2)} s`;
/// A share that says 100 only for all of it, and 0 only for nothing.
const percent = (value) => none(value) ? "–" : value === 1 ? "100 %" : value > 0.9999 ? "99.99 %" :
  value > 0 && value < 0.0001 ? "0.01 %" : `${(value * 100).toFixed(value > 0.99 ? 2 : 1)} %`;
const rate = (value) => value === 0 ? "0" : value < 0.05 ? "<0.1" : value < 9.95 ? value.toFixed(1) : value.toFixed(0);
const bytes = (value) => value < 1e3 ? `${value.toFixed(0)} B` : value < 1e6 ? `${(value / 1e3).toFixed(1)} KB` :
  value < 1e9 ? `${(value / 1e6).toFixed(1)} MB` : `${(value / 1e9).toFixed(1)} GB`;
const whole = (value) => value.toLocaleString("en-US").replaceAll(",", "\u202f");
const lasts = (value) => value <= 0 ? "ended" : value < 7200 ? `${Math.ceil(value / 60)} min` :
  value < 172800 ? `${Math.floor(value / 3600)} h` : `${Math.floor(value / 86400)} days`;
/// `NAMESPACE/NAME` as people of one namespace say it.
const short = (name) => name.startsWith("default/") ? name.slice(8) : name;
/// What has no proxy has no NAMESPACE/NAME; the same word means another thing on the other end of a call.
const OUTSIDE = {
  from: { public: "published port", unknown: "caller without a proxy", other: "other callers" },
  to: { unknown: "unknown destination", external: "outside the mesh", other: "other services" },
};
const caller = (edge) => OUTSIDE.from[edge.source] || edge.source;
const called = (edge) => OUTSIDE.to[edge.destination] || edge.destination;

/// As the control plane judges (`telemetry::is_failure`).
const isFailure = (outcome) => outcome.reason ? outcome.reason !== "client-gone" :
  outcome.status >= 500 || [2, 4, 12, 13, 14, 15].includes(outcome.grpc_status);
const outcomeName = (outcome) => outcome.reason ||
  (outcome.grpc_status > 0 ? `gRPC status ${outcome.grpc_status}` : `status ${outcome.status}`);

const isPlain = (edge) => edge.window.plaintext > 0 || (!edge.mtls && edge.window.connections_open > 0);

function failuresOf(figures) {
  return figures.responses.filter(isFailure).map((outcome) => [outcomeName(outcome), outcome.count]);
}

// --- Reading -------------------------------------------------------------------------------------------------------

async function read(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (answer.ok) { return answer.json(); }
  const failure = await answer.json().catch(() => ({}));
  const error = new Error([failure.error || answer.statusText, failure.mend].filter(Boolean).join(": "));
  error.status = answer.status;
  throw error;
}

let lastGood = null;

async function look() {
  try {
    const [mesh, edges, services, workloads, check] = await Promise.all(
      ["mesh", "edges?window_s=60", "services", "workloads", "check"].map((path) => read(`/api/v1/${path}`)));
    remember(edges);
    render({ mesh, edges, services, workloads, check });
    lastGood = new Date();
    show("main", true);
    show("notice", false);
    document.body.classList.remove("stale");
    $("live").className = "ok";
    put("live", `live, ${lastGood.toLocaleTimeString()}`);
  } catch (error) {
    complain(error);
  }
}

function complain(error) {
  let text = error.message;
  if (error.status === 401) {
    text = "This page shows the mesh to those who may see it. In a terminal of the user who runs the control plane, type " +
      "'sheer dashboard' and open the link that it prints; it works once, within a minute.";
  } else if (error.status === undefined) {
    text = "The control plane does not answer. Running workloads go on without it; start it again with 'sheer up' or " +
      "'systemctl start sheer-control'.";
    if (lastGood) { text += ` What is shown here is from ${lastGood.toLocaleTimeString()}.`; }
  }
  put("notice", text);
  show("notice", true);
  document.body.classList.add("stale");
  $("live").className = "bad";
  put("live", error.status === 401 ? "not allowed" : "no answer");
}

// --- What happens now: differences of exact totals between two looks -------------------------------------------------

const history = new Map();
let overall = [];
let before = null;

const idOf = (edge) => [edge.side, edge.source, edge.destination, edge.backend, edge.route, edge.protocol, edge.mtls].join(" ");

function remember(edges) {
  const now = performance.now() / 1000;
  const passed = before === null ? 0 : now - before;
  before = now;
  let sum = 0;
  for (const edge of edges.rows) {
    const id = idOf(edge);
    const seen = history.get(id) || { total: edge.total.requests, rates: [] };
    // A total that shrank is that of a control plane that started anew.
    const grown = Math.max(0, edge.total.requests - seen.total);
    if (passed > 0) { seen.rates = [...seen.rates, grown / passed].slice(-SAMPLES); }
    sum += grown;
    history.set(id, { ...seen, total: edge.total.requests });
  }
  if (passed > 0) { overall = [...overall, sum / passed].slice(-SAMPLES); }
}

function spark(rates, width, height) {
  const svg = make("svg", { class: "spark", width, height, role: "img" });
  const most = Math.max(...rates, 0);
  svg.append(make("title", {}, rates.length ? `now ${rate(rates[rates.length - 1])} a second, at most ${rate(most)} since this page was opened` : "no sample yet"));
  if (rates.length > 1) {
    const x = (at) => width - (rates.length - 1 - at) * (width / (SAMPLES - 1));
    const y = (value) => height - 1.5 - (most > 0 ? value / most : 0) * (height - 3);
    svg.append(make("path", { d: "M" + rates.map((value, at) => `${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("L") }));
  }
  return svg;
}

// --- Rendering -----------------------------------------------------------------------------------------------------

let shown = null;
let chosen = null;

function render(state) {
  shown = state;
  const { mesh, edges, services, workloads, check } = state;
  put("mesh", mesh.trust_domain);
  document.title = `${check.level === "ok" ? "" : check.level === "warn" ? "(!) " : "(!!) "}Sheer: ${mesh.trust_domain}`;
  renderAttention(check);
  renderTiles(mesh, edges);
  renderNothing(edges, workloads);
  show("calls", edges.rows.length > 0);
  show("running", workloads.length > 0);
  put("window", `over the last ${edges.window_s} s`);
  renderMap(edges, services);
  renderEdges(edges);
  renderWorkloads(workloads);
  const fine = check.findings.filter((finding) => finding.level === "ok");
  put("fine-count", `(${fine.length})`);
  $("fine").replaceChildren(...fine.map((finding) => make("li", {}, `${finding.subject}: ${finding.what}`)));
}

const FINDINGS_SHOWN = 8;

function renderAttention(check) {
  const open = check.findings.filter((finding) => finding.level !== "ok");
  const items = open.slice(0, FINDINGS_SHOWN).map((finding) => make("div", { class: `finding ${finding.level}` },
    make("p", {}, make("b", {}, finding.subject), `: ${finding.what}`),
    ...[["why", finding.why], ["mend", finding.mend]].filter(([, text]) => text)
      .map(([name, text]) => make("span", { class: "note" }, `${name}: ${text}`))));
  if (open.length > FINDINGS_SHOWN) {
    items.push(make("p", { class: "more note" }, `and ${open.length - FINDINGS_SHOWN} more: `, make("code", {}, "sheer check")));
  }
  if (open.length === 0) { items.push(make("p", { class: "calm" }, "Nothing needs attention.")); }
  $("attention").replaceChildren(...items);
}

function renderTiles(mesh, edges) {
  let [requests, failures, plain, encrypted, perSecond] = [0, 0, 0, 0, 0];
  for (const edge of edges.rows) {
    requests += edge.window.requests;
    failures += edge.window.failures;
    perSecond += edge.window.rps;
    plain += edge.window.plaintext;
    encrypted += edge.mtls ? edge.window.requests : 0;
  }
  const share = requests ? (requests - failures) / requests : null;
  const tile = (name, value, look, beside) => make("div", {}, make("dt", {}, name),
    make("dd", { class: look }, value), make("dd", {}, beside));
  $("tiles").replaceChildren(
    tile("requests a second", rate(perSecond), "", spark(overall, 90, 26)),
    tile("succeeded", percent(share), none(share) || share === 1 ? "" : share < 0.99 ? "bad" : "warn",
      requests ? `${whole(failures)} of ${whole(requests)} failed` : "no requests"),
    tile("by mutual TLS", percent(plain + encrypted ? encrypted / (plain + encrypted) : null), "",
      plain + encrypted === 0 ? "no requests" : plain ? `${whole(plain)} in plaintext` : "every request"),
    tile("proxies connected", `${mesh.connected} of ${mesh.workloads}`, mesh.connected < mesh.workloads ? "warn" : "",
      `${mesh.services} service${mesh.services === 1 ? "" : "s"}`));
}

function renderNothing(edges, workloads) {
  show("nothing", edges.rows.length === 0);
  if (edges.rows.length > 0) { return; }
  const ready = workloads.filter((workload) => workload.ports.some((port) => port.ready));
  const content = workloads.length === 0 ?
    [make("h2", {}, "Nothing runs in this mesh yet"),
      make("p", {}, "Start two services, each in a terminal of its own, then call one from the other:"),
      make("pre", {}, "sheer run api --port 8081 -- python3 -m http.server 8081\n" +
        "sheer run web --port 8080 --publish 8080 -- python3 -m http.server 8080\n" +
        "sheer exec web-1 -- curl -s http://api/")] :
    [make("h2", {}, "No calls yet"),
      make("p", {}, `${workloads.length} workload${workloads.length === 1 ? " is" : "s are"} known, ${ready.length} ready. ` +
        "A call appears here within a second or two of its end, for example:"),
      make("pre", {}, `sheer exec ${workloads[0].name} -- curl -s http://${short(workloads[0].services[0] || "default/web")}/`)];
  $("nothing").replaceChildren(...content);
}

const isQuiet = (edge) => edge.window.requests === 0 && edge.window.connections_open <= 0;

function renderEdges(edges) {
  const touches = (edge) => chosen === null || [caller(edge), called(edge), edge.backend].includes(chosen);
  const rows = edges.rows.filter(touches);
  rows.sort((a, b) => b.window.failures - a.window.failures || b.window.rps - a.window.rps ||
    b.window.connections_open - a.window.connections_open || idOf(a).localeCompare(idOf(b)));
  document.querySelector("#edges tbody").replaceChildren(...rows.map(edgeRow));
  show("filter", chosen !== null);
  if (chosen !== null) {
    const all = make("button", { class: "plain", type: "button" }, "show all");
    all.addEventListener("click", () => choose(null));
    $("filter").replaceChildren("Only calls of ", make("b", {}, short(chosen)), ", ", all);
  }
}

function edgeRow(edge) {
  const figures = edge.window;
  const share = figures.success_rate;
  const look = none(share) ? "" : share < 0.99 ? "bad" : share < 1 ? "warn" : "ok";
  const to = make("td", {}, short(called(edge)));
  const beside = [];
  if (edge.backend && edge.backend !== edge.destination) { beside.push(`answered by ${short(edge.backend)}`); }
  if (edge.route && edge.route !== "default") { beside.push(`route ${short(edge.route)}`); }
  if (beside.length) { to.append(make("span", { class: "note" }, beside.join(", "))); }
  const tcp = edge.protocol === "tcp";
  const window = Math.max(1, shown.edges.window_s);
  const perSecond = make("td", { class: "n" }, rate(figures.rps));
  if (tcp) {
    perSecond.append(make("span", { class: "note" }, `${Math.max(0, figures.connections_open)} open, ${bytes((figures.bytes_sent + figures.bytes_received) / window)}/s`));
  }
  const bar = none(share) ? "–" : make("span", { class: `share ${look}` },
    make("svg", { width: 44, height: 6, "aria-hidden": "true" }, make("rect", { width: 44, height: 6, rx: 3 }),
      make("rect", { width: (44 * share).toFixed(1), height: 6, rx: 3 })), percent(share));
  const reasons = failuresOf(figures).map(([name, count]) => make("span", { class: "chip" }, `${name} × ${whole(count)}`));
  return make("tr", { class: isQuiet(edge) ? "quiet" : "" },
    make("td", {}, short(caller(edge))), to,
    make("td", {}, edge.protocol, make("span", { class: `note ${edge.mtls ? "ok" : isPlain(edge) ? "warn" : ""}` },
      edge.mtls ? "mutual TLS" : isPlain(edge) ? "plaintext" : isQuiet(edge) ? "" : "nothing was sent")),
    make("td", {}, bar), make("td", { class: "reasons" }, ...reasons), perSecond,
    make("td", {}, spark((history.get(idOf(edge)) || { rates: [] }).rates, 70, 20)),
    ...[figures.p50_s, figures.p95_s, figures.p99_s].map((value) => make("td", { class: "n", title: tcp ? "how long connections lasted" : "" }, seconds(value))),
    make("td", { class: "n" }, seconds(figures.mesh_mean_s)),
    make("td", { class: "n" }, whole(edge.total.requests)));
}

function renderWorkloads(workloads) {
  const now = Date.now() / 1000;
  const calm = (workload) => workload.state === "connected" && (!workload.ports.length || workload.ports.some((port) => port.ready));
  const sorted = [...workloads].sort((a, b) => calm(a) - calm(b) || a.uid.localeCompare(b.uid));
  document.querySelector("#workloads tbody").replaceChildren(...sorted.map((workload) => {
    const deaf = workload.state === "connected" && !calm(workload);
    const ports = workload.ports.map((port) => make("span", { class: port.ready ? "" : "warn" },
      `${port.port}${port.protocol === "detect" ? "" : `/${port.protocol}`}${port.ready ? "" : " (not ready)"} `));
    const left = workload.certificate_expires - now;
    return make("tr", {},
      make("td", {}, short(`${workload.namespace}/${workload.name}`)),
      make("td", { class: calm(workload) ? "ok" : "warn" }, deaf ? "not ready" : workload.state),
      make("td", {}, workload.services.map(short).join(", ") || "–"),
      make("td", {}, ...(ports.length ? ports : ["–"])), make("td", {}, workload.address),
      make("td", { class: workload.mode === "strict" ? "" : "warn" }, workload.mode), make("td", {}, workload.capture),
      make("td", { class: left <= 0 ? "n bad" : "n" }, workload.certificate_expires ? lasts(left) : "–"));
  }));
}

// --- The map: services in columns, callers to the left of whom they call ----------------------------------------------

const NODE = { height: 46, gap: 20, layerGap: 120, padding: 14, character: 7.4, longest: 24 };

/// Edges of one pair as one line; a call that a route answered by another service is two: to the service, and on.
function gather(edges) {
  const lines = new Map();
  const add = (from, to, edge, split) => {
    const key = `${from} ${to} ${split}`;
    const line = lines.get(key) || { key, from, to, split, requests: 0, failures: 0, rps: 0, plain: 0, open: 0, reasons: new Map() };
    const figures = edge.window;
    line.requests += figures.requests;
    line.failures += figures.failures;
    line.rps += figures.rps;
    line.open += Math.max(0, figures.connections_open);
    line.plain += isPlain(edge) ? 1 : 0;
    for (const [name, count] of failuresOf(figures)) { line.reasons.set(name, (line.reasons.get(name) || 0) + count); }
    lines.set(key, line);
  };
  for (const edge of edges.rows) {
    add(caller(edge), called(edge), edge, false);
    if (edge.backend && edge.backend !== edge.destination) { add(called(edge), edge.backend, edge, true); }
  }
  const all = [...lines.values()];
  for (const line of all.filter((it) => it.split)) {
    const siblings = all.filter((it) => it.split && it.from === line.from).reduce((sum, it) => sum + it.requests, 0);
    line.share = siblings ? line.requests / siblings : null;
  }
  return all;
}

/// The services of the most telling calls, where there are too many: those that fail, then the busiest.
function fewer(lines, names) {
  if (names.length <= MAP_SERVICES) { return new Set(names); }
  const kept = new Set();
  for (const line of [...lines].sort((a, b) => b.failures - a.failures || b.rps - a.rps)) {
    if (new Set([...kept, line.from, line.to]).size <= MAP_SERVICES) { kept.add(line.from).add(line.to); }
  }
  return kept;
}

function layersOf(names, lines) {
  const next = new Map(names.map((name) => [name, []]));
  for (const line of lines) { if (line.from !== line.to) { next.get(line.from).push(line); } }
  // Lines that close a circle are drawn, and do not push services further to the right.
  const state = new Map();
  const visit = (name) => {
    state.set(name, 1);
    for (const line of next.get(name)) {
      if (state.get(line.to) === 1) { line.back = true; } else if (!state.has(line.to)) { visit(line.to); }
    }
    state.set(name, 2);
  };
  const called = new Set(lines.filter((line) => line.from !== line.to).map((line) => line.to));
  const roots = names.filter((name) => !called.has(name));
  for (const name of [...roots, ...names]) { if (!state.has(name)) { visit(name); } }
  const layer = new Map(names.map((name) => [name, 0]));
  for (let round = 0; round < names.length; round += 1) {
    let moved = false;
    for (const line of lines) {
      if (line.from === line.to || line.back || layer.get(line.to) > layer.get(line.from)) { continue; }
      layer.set(line.to, layer.get(line.from) + 1);
      moved = true;
    }
    if (!moved) { break; }
  }
  return layer;
}

/// Where every service and every bend of a line stands.
function arrange(names, lines) {
  const layer = layersOf(names, lines);
  const columns = [];
  const place = (item) => { (columns[item.layer] = columns[item.layer] || []).push(item); return item; };
  const items = new Map(names.map((name) => [name, place({ name, layer: layer.get(name), height: NODE.height, near: [] })]));
  for (const line of lines) {
    if (line.from === line.to || line.back) { continue; }
    line.via = [items.get(line.from)];
    for (let at = layer.get(line.from) + 1; at < layer.get(line.to); at += 1) {
      line.via.push(place({ layer: at, height: 14, near: [] }));
    }
    line.via.push(items.get(line.to));
    for (let at = 1; at < line.via.length; at += 1) {
      line.via[at - 1].near.push(line.via[at]);
      line.via[at].near.push(line.via[at - 1]);
    }
  }
  for (const column of columns) { column.forEach((item, at) => { item.y = at * (NODE.height + NODE.gap); }); }
  for (let round = 0; round < 24; round += 1) {
    const order = round % 2 ? [...columns].reverse() : columns;
    for (const column of order) { settle(column); }
  }
  close(columns.flat());
  const top = Math.min(...columns.flat().map((item) => item.y - item.height / 2));
  let x = 10;
  for (const column of columns) {
    const width = Math.max(40, ...column.filter((item) => item.name).map((item) => widthOf(item.name)));
    for (const item of column) {
      item.width = item.name ? widthOf(item.name) : 0;
      item.x = x + width / 2;
      item.y += 16 - top;
    }
    x += width + NODE.layerGap;
  }
  const bottom = Math.max(...columns.flat().map((item) => item.y + item.height / 2));
  const circle = lines.some((line) => line.back) ? 60 : 0;
  return { items, width: x - NODE.layerGap + 10, height: bottom + 16 + circle, bottom };
}

/// Moves the items of a column towards what they are joined to, in their order, without touching each other.
function settle(column) {
  const middle = (item) => item.near.length ? item.near.reduce((sum, it) => sum + it.y, 0) / item.near.length : item.y;
  const wanted = new Map(column.map((item) => [item, middle(item)]));
  column.sort((a, b) => wanted.get(a) - wanted.get(b) || (a.name || "").localeCompare(b.name || ""));
  for (const item of column) { item.y = wanted.get(item); }
  const distance = (a, b) => (a.height + b.height) / 2 + NODE.gap;
  for (let at = 1; at < column.length; at += 1) {
    column[at].y = Math.max(column[at].y, column[at - 1].y + distance(column[at - 1], column[at]));
  }
  // What was pushed down is shared with those above.
  const pushed = column.reduce((sum, item) => sum + item.y - wanted.get(item), 0) / column.length;
  for (const item of column) { item.y -= pushed; }
}

/// Takes out the empty stripes between parts of the map that have nothing to do with each other.
function close(items) {
  const sorted = [...items].sort((a, b) => a.y - b.y);
  let [low, shift] = [-Infinity, 0];
  for (const item of sorted) {
    const empty = item.y - item.height / 2 - low;
    if (low > -Infinity && empty > NODE.gap) { shift += empty - NODE.gap; }
    low = Math.max(low, item.y + item.height / 2);
    item.y -= shift;
  }
}

const label = (name) => short(name).length > NODE.longest ? `${short(name).slice(0, NODE.longest - 1)}…` : short(name);
const widthOf = (name) => Math.max(112, label(name).length * NODE.character + 2 * NODE.padding);

let drawn = "";

function renderMap(edges, services) {
  let lines = gather(edges);
  let names = [...new Set([...services.map((it) => `${it.namespace}/${it.name}`), ...lines.flatMap((line) => [line.from, line.to])])].sort();
  const joined = new Set(lines.flatMap((line) => [line.from, line.to]));
  // Services that nobody calls and that call nobody are in the table of workloads.
  names = names.filter((name) => joined.has(name));
  const kept = fewer(lines, names);
  put("left-out", kept.size < names.length ? `the ${kept.size} busiest and failing of ${names.length} services; the table has all calls` : "");
  names = names.filter((name) => kept.has(name));
  lines = lines.filter((line) => kept.has(line.from) && kept.has(line.to)).sort((a, b) => a.key.localeCompare(b.key));
  const shape = JSON.stringify([names, lines.map((line) => line.key)]);
  // The same services and lines stay where they are, so that nothing jumps and no animation begins anew.
  if (shape !== drawn) {
    drawn = shape;
    draw(names, lines);
  }
  for (const line of lines) { paintLine(line); }
  for (const name of names) { paintNode(name, lines, services); }
}

const elements = { nodes: new Map(), lines: new Map() };

function draw(names, lines) {
  const map = $("map");
  map.replaceChildren();
  elements.nodes.clear();
  elements.lines.clear();
  if (names.length === 0) { return; }
  const { items, width, height, bottom } = arrange(names, lines);
  for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) { map.setAttribute(key, value); }
  for (const line of lines) { elements.lines.set(line.key, drawLine(map, line, items, bottom, lines)); }
  // Above all lines.
  for (const { text } of elements.lines.values()) { map.append(text); }
  for (const name of names) { elements.nodes.set(name, drawNode(map, items.get(name))); }
}

function drawLine(map, line, items, bottom, lines) {
  const [from, to] = [items.get(line.from), items.get(line.to)];
  let d = "";
  let at = { x: 0, y: 0 };
  let head = "";
  if (line.via) {
    const points = line.via.map((item, index) => ({ item, x: item.x, y: item.y, out: item.x + item.width / 2, in: item.x - item.width / 2 - (index === line.via.length - 1 ? 7 : 0) }));
    d = `M${points[0].out} ${points[0].y}`;
    for (let index = 1; index < points.length; index += 1) {
      const [a, b] = [points[index - 1], points[index]];
      const half = (a.out + b.in) / 2;
      d += `C${half} ${a.y} ${half} ${b.y} ${b.in} ${b.y}`;
      if (b.out > b.in && index < points.length - 1) { d += `L${b.out} ${b.y}`; }
    }
    // Towards the end that it shares with fewer others, where it is apart from them.
    const leaving = lines.filter((it) => it.via && it.from === line.from).length;
    const arriving = lines.filter((it) => it.via && it.to === line.to).length;
    const [a, b] = leaving >= arriving ? points.slice(-2) : points;
    const t = leaving === arriving ? 0.5 : leaving > arriving ? 0.6 : 0.4;
    const half = (a.out + b.in) / 2;
    at = {
      x: a.out * (1 - t) ** 3 + half * 3 * t * (1 - t) + b.in * t ** 3,
      y: a.y * (1 - t) ** 2 * (1 + 2 * t) + b.y * t ** 2 * (3 - 2 * t),
    };
    head = `M${b.in + 7} ${b.y}l-8 -4.5v9z`;
  } else if (from === to) {
    const [x, y] = [from.x, from.y - from.height / 2];
    d = `M${x - 16} ${y}C${x - 22} ${y - 22} ${x + 22} ${y - 22} ${x + 16} ${y - 7}`;
    at = { x: x + 34, y: y - 12 };
    head = `M${x + 16} ${y}l-4.5 -8h9z`;
  } else {
    const low = bottom + 34;
    d = `M${from.x} ${from.y + from.height / 2}C${from.x} ${low + 10} ${to.x} ${low + 10} ${to.x} ${to.y + to.height / 2 + 7}`;
    at = { x: (from.x + to.x) / 2, y: low - 4 };
    head = `M${to.x} ${to.y + to.height / 2}l-4.5 8h9z`;
  }
  const path = make("path", { d });
  const flow = make("path", { d, class: "flow" });
  const text = make("text", { x: at.x, y: at.y + 4 });
  const title = make("title");
  const group = make("g", { class: "edge" }, title, path, flow, make("path", { d: head, class: "head" }));
  map.append(group);
  return { group, path, flow, text, title };
}

function drawNode(map, item) {
  const title = make("title");
  const sub = make("text", { class: "sub", x: item.x, y: item.y + 14, "text-anchor": "middle" });
  const group = make("g", { class: "node", tabindex: "0", role: "button" }, title,
    make("rect", { x: item.x - item.width / 2, y: item.y - item.height / 2, width: item.width, height: item.height, rx: 9 }),
    make("text", { x: item.x, y: item.y - 3, "text-anchor": "middle", "font-weight": "600" }, label(item.name)), sub);
  const toggle = () => choose(chosen === item.name ? null : item.name);
  group.addEventListener("click", toggle);
  group.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
  });
  map.append(group);
  return { group, sub, title };
}

function paintLine(line) {
  const { group, path, flow, text, title } = elements.lines.get(line.key);
  const quiet = line.requests === 0 && line.open === 0;
  const looks = ["edge"];
  if (line.failures > 0) { looks.push("bad"); } else if (quiet) { looks.push("quiet"); } else if (line.split) { looks.push("split"); } else if (line.plain > 0) { looks.push("plain"); }
  if (chosen !== null && line.from !== chosen && line.to !== chosen) { looks.push("faded"); }
  group.setAttribute("class", looks.join(" "));
  text.setAttribute("class", ["said", ...looks.slice(1)].join(" "));
  const width = (1.4 + Math.min(3.6, Math.log10(1 + line.rps) * 1.5)).toFixed(2);
  path.setAttribute("stroke-width", width);
  flow.setAttribute("stroke-width", (Number(width) + 1.6).toFixed(2));
  flow.setAttribute("visibility", line.rps > 0 && !line.split ? "visible" : "hidden");
  const failed = line.requests ? line.failures / line.requests : 0;
  const words = line.split ? [percent(line.share)] : quiet ? ["quiet"] : line.rps > 0 ? [`${rate(line.rps)}/s`] : [`${line.open} open`];
  if (line.failures > 0) { words.push(`${percent(failed)} failed`); }
  text.textContent = words.join(", ");
  const reasons = [...line.reasons].map(([name, count]) => `${name} × ${count}`).join(", ");
  title.textContent = `${short(line.from)} → ${short(line.to)}: ${whole(line.requests)} requests, ${whole(line.failures)} failed` +
    `${reasons ? ` (${reasons})` : ""}${line.split || quiet ? "" : line.plain ? ", plaintext among them" : ""}`;
}

function paintNode(name, lines, services) {
  const { group, sub, title } = elements.nodes.get(name);
  const service = services.find((it) => `${it.namespace}/${it.name}` === name);
  const looks = ["node"];
  let words = "";
  if (service) {
    const calls = service.ports.length > 0;
    words = !calls ? "calls others" : service.healthy > 0 ? `${service.healthy} ready` : "no endpoint";
    if (service.suspect) { words += `, ${service.suspect} silent`; }
    if (service.draining) { words += `, ${service.draining} leaving`; }
    if (calls && service.healthy === 0) { looks.push("bad"); } else if (service.suspect) { looks.push("warn"); }
  } else {
    looks.push("outside");
    words = name.includes("/") ? "not known any more" : "not in the mesh";
  }
  const near = lines.some((line) => [line.from, line.to].includes(name) && [line.from, line.to].includes(chosen));
  if (chosen === name) { looks.push("chosen"); } else if (chosen !== null && !near) { looks.push("faded"); }
  group.setAttribute("class", looks.join(" "));
  group.setAttribute("aria-pressed", String(chosen === name));
  sub.textContent = words;
  title.textContent = `${name}: ${words}`;
}

function choose(name) {
  chosen = name;
  if (shown !== null) { render(shown); }
}

// --- Beginning -----------------------------------------------------------------------------------------------------

async function turn() {
  if (!document.hidden) { await look(); }
  setTimeout(turn, EVERY_MS);
}

async function begin() {
  const code = new URLSearchParams(location.hash.slice(1)).get("code");
  if (code) {
    // The code is used up; it should not be copied with the address.
    window.history.replaceState(null, "", "/");
    await fetch("/api/v1/session", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ code }),
    }).catch(() => null);
  }
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { look(); } });
  await turn();
}

begin();
