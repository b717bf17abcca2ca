"use strict";
// Every text goes in as text, never as markup.
const put = (id, text) => { document.getElementById(id).textContent = text; };
const seconds = (value) => value === null || value === undefined ? "" :
  value < 0.001 ? `${(value * 1e6).toFixed(0)} µs` : value < 1 ? `${(value * 1e3).toFixed(1)} ms` : `${value.toFixed(2)} s`;
const share = (value) => value === null || value === undefined ? "" : `${(value * 100).toFixed(2)} %`;

function notice(text) {
  put("notice", text);
  document.getElementById("notice").hidden = text === "";
}

function fill(id, rows) {
  const body = document.querySelector(`#${id} tbody`);
  body.replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    for (const [text, look] of cells) {
      const cell = document.createElement("td");
      cell.textContent = text;
      if (look) { cell.className = look; }
      row.append(cell);
    }
    return row;
  }));
}

async function read(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) {
    const failure = await answer.json().catch(() => ({}));
    throw new Error([failure.error || answer.statusText, failure.mend].filter(Boolean).join(": "));
  }
  return answer.json();
}

function edgeRow(edge) {
  const rate = edge.window.success_rate;
  const look = rate === null ? "" : rate < 0.99 ? "error" : rate < 1 ? "warn" : "ok";
  const reasons = edge.window.responses.filter((it) => it.reason || it.status >= 500)
    .map((it) => `${it.reason || it.status}: ${it.count}`).join(", ");
  const to = edge.backend && edge.backend !== edge.destination ? `${edge.destination} → ${edge.backend}` : edge.destination;
  return [[edge.source], [to], [edge.route], [edge.protocol], [edge.mtls ? "yes" : "no", edge.mtls ? "" : "warn"],
    [share(rate), look], [edge.window.rps.toFixed(1)], [seconds(edge.window.p50_s)], [seconds(edge.window.p95_s)],
    [seconds(edge.window.p99_s)], [seconds(edge.window.mesh_mean_s)], [reasons, reasons ? "error" : ""],
    [String(edge.total.requests)]];
}

function workloadRow(workload) {
  const ready = workload.ports.filter((it) => it.ready).map((it) => `${it.port}/${it.protocol}`).join(" ");
  return [[`${workload.namespace}/${workload.name}`], [workload.services.join(" ")],
    [workload.state, workload.state === "connected" ? "ok" : "warn"], [workload.address], [workload.mode],
    [workload.capture], [ready]];
}

async function show() {
  try {
    const [mesh, edges, workloads, check] = await Promise.all(
      ["/api/v1/mesh", "/api/v1/edges?window_s=60", "/api/v1/workloads", "/api/v1/check"].map(read));
    put("mesh", `${mesh.trust_domain}: ${mesh.services} services, ${mesh.workloads} workloads, ${mesh.connected} connected; last ${edges.window_s} s`);
    fill("edges", edges.rows.map(edgeRow));
    fill("workloads", workloads.map(workloadRow));
    document.getElementById("findings").replaceChildren(...check.findings.map((finding) => {
      const item = document.createElement("li");
      item.className = finding.level;
      item.textContent = [finding.subject, finding.what, finding.mend].filter(Boolean).join(" — ");
      return item;
    }));
    notice("");
  } catch (error) {
    notice(error.message);
  }
}

async function begin() {
  const code = new URLSearchParams(location.hash.slice(1)).get("code");
  if (code) {
    history.replaceState(null, "", "/");
    await fetch("/api/v1/session", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ code }),
    });
  }
  await show();
  setInterval(show, 2000);
}

begin();
