// The page of the machines. Whatever comes from the service is shown as text, never as markup.

import { Terminal } from "/page/xterm.mjs";
import { FitAddon } from "/page/addon-fit.mjs";
import { Refusal, ask, element, forgetToken, keepToken, token } from "/page/service.mjs";

const PACE = 2000; // milliseconds between two looks at the machines
const SAMPLES = 150; // of the curve
const CONSOLE_LINES = 200;
const BUSY = new Set(["provisioning"]);
const at = (id) => document.getElementById(id);

let chosen = "";
let machines = [];
let curve = null; // { plot, times, cpu, memory }
let session = null; // the open terminal

// -- the token ----------------------------------------------------------------------------------------------------------------------

function tell(text) {
  at("message").textContent = text;
}

function showLogin(text = "") {
  forgetToken();
  closeTerminal();
  at("login").hidden = false;
  at("main").hidden = at("leave").hidden = true;
  tell(text);
  at("token").focus();
}

at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(at("token").value.trim());
  at("token").value = "";
  start();
});
at("leave").addEventListener("click", () => showLogin());

// Runs something and shows its error; returns whether it was done.
async function attempt(work) {
  try {
    await work();
    return true;
  } catch (error) {
    if (error instanceof Refusal && error.status === 401) {
      showLogin(error.message);
    } else {
      tell(error.message);
    }
    return false;
  }
}

// -- the machines -------------------------------------------------------------------------------------------------------------------

async function start() {
  if (await attempt(showMachines)) {
    at("login").hidden = true;
    at("main").hidden = at("leave").hidden = false;
    tell("");
  }
}

async function showMachines() {
  machines = await ask("/vms/");
  at("node").textContent = machines.length ? machines[0].node : "";
  at("machines").replaceChildren(...machines.map(row));
  const one = machines.find((machine) => machine.id === chosen);
  at("one").hidden = one === undefined;
  if (one === undefined) {
    closeTerminal();
    return;
  }
  showActions(one);
  await showDetails(one);
}

function row(machine) {
  const made = element("tr", "", { "aria-selected": String(machine.id === chosen) });
  const name = element("td");
  const button = element("button", machine.name, { type: "button" });
  button.addEventListener("click", () => choose(machine.id));
  name.append(button);
  const ports = Object.entries(machine.ports).map(([guest, host]) => `${guest} at 127.0.0.1:${host}`);
  made.append(
    name,
    element("td", machine.state, { class: `state-${machine.state}` }),
    element("td", machine.base_image),
    element("td", ports.join(", ")),
    element("td", machine.reason),
  );
  return made;
}

function choose(id) {
  if (id !== chosen) {
    closeTerminal();
    curve?.plot.destroy();
    curve = null;
    at("console").textContent = at("figures").textContent = "";
  }
  chosen = id;
  at("title").textContent = id;
  attempt(showMachines);
}

function showActions(machine) {
  const runs = machine.state === "running";
  const off = ["stopped", "off", "error"].includes(machine.state);
  const possible = { start: off, stop: runs, reboot: runs, pause: runs, resume: machine.state === "paused" };
  for (const button of document.querySelectorAll("[data-action]")) {
    button.disabled = !possible[button.dataset.action];
  }
  at("open-terminal").disabled = !runs;
}

for (const button of document.querySelectorAll("[data-action]")) {
  button.addEventListener("click", () => act({ action: button.dataset.action }));
}

function act(body) {
  const id = chosen;
  return change(() => ask(`/vms/${id}/actions`, { method: "POST", body }));
}

async function change(work) {
  tell("");
  if (await attempt(work)) {
    await attempt(showMachines);
  }
}

at("delete").addEventListener("click", () => {
  const id = chosen;
  closeTerminal();
  change(() => ask(`/vms/${id}`, { method: "DELETE" }));
});

at("create").addEventListener("submit", (event) => {
  event.preventDefault();
  const body = { base_image: at("image").value, vcpus: Number(at("vcpus").value), mem_mib: Number(at("memory").value) };
  if (at("name").value) {
    body.name = at("name").value;
  }
  change(async () => {
    choose((await ask("/vms/", { method: "POST", body })).id);
  });
});

// -- one machine --------------------------------------------------------------------------------------------------------------------

async function showDetails(machine) {
  if (BUSY.has(machine.state)) {
    return;
  }
  await quietly(async () => {
    const text = await ask(`/vms/${machine.id}/console/tail?lines=${CONSOLE_LINES}`);
    const box = at("console");
    const below = box.scrollHeight - box.scrollTop - box.clientHeight < 20;
    box.textContent = text;
    if (below) {
      box.scrollTop = box.scrollHeight;
    }
  });
  if (machine.state === "running") {
    await quietly(async () => showFigures(machine.id, await ask(`/metrics/${machine.id}?seconds=0.2`)));
  }
}

// A machine may end between two requests: the next look at it tells.
async function quietly(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refusal) || error.status === 401) {
      throw error;
    }
  }
}

function showFigures(id, figures) {
  if (id !== chosen) {
    return;
  }
  const percent = figures.cpu_percent === null ? "?" : figures.cpu_percent.toFixed(0);
  at("figures").textContent = `${percent} % of a processor, ${figures.rss_human ?? "?"} of memory, ${figures.threads ?? "?"} threads`;
  curve ??= newCurve();
  for (const [list, value] of [[curve.times, figures.ts], [curve.cpu, figures.cpu_percent], [curve.memory, figures.rss_mib]]) {
    list.push(value);
    list.splice(0, list.length - SAMPLES);
  }
  curve.plot.setData([curve.times, curve.cpu, curve.memory]);
}

function newCurve() {
  const ink = getComputedStyle(document.body).color;
  const axis = { stroke: ink, grid: { show: false } };
  const options = {
    width: at("curve").clientWidth,
    height: 180,
    series: [
      {},
      { label: "processor, %", stroke: "#0969da", scale: "percent", width: 2 },
      { label: "memory, MiB", stroke: "#bf8700", scale: "memory", width: 2 },
    ],
    axes: [axis, { ...axis, scale: "percent" }, { ...axis, scale: "memory", side: 1 }],
    scales: { percent: { range: (_, low, high) => [0, Math.max(100, high)] } },
  };
  const plot = new uPlot(options, [[], [], []], at("curve"));
  return { plot, times: [], cpu: [], memory: [] };
}

// -- the terminal -------------------------------------------------------------------------------------------------------------------

at("open-terminal").addEventListener("click", () => openTerminal(chosen));
at("ctrl-c").addEventListener("click", () => control({ type: "ctrlc" }));
at("ctrl-d").addEventListener("click", () => control({ type: "ctrld" }));

function control(message) {
  if (session?.socket.readyState === WebSocket.OPEN) {
    session.socket.send(JSON.stringify(message));
    session.terminal.focus();
  }
}

function openTerminal(id) {
  closeTerminal();
  const terminal = new Terminal({ cursorBlink: true, fontSize: 14, scrollback: 5000 });
  const fit = new FitAddon();
  terminal.loadAddon(fit);
  at("terminal").replaceChildren();
  terminal.open(at("terminal"));
  fit.fit();
  const where = new URL(`/vms/${id}/tty?columns=${terminal.cols}&rows=${terminal.rows}`, location.href);
  where.protocol = where.protocol === "https:" ? "wss:" : "ws:";
  // As a subprotocol, since a browser sends no headers of ours with a WebSocket; a URL would be in logs.
  const socket = new WebSocket(where, ["vmbottle.tty", `vmbottle.bearer.${token()}`]);
  socket.binaryType = "arraybuffer";
  const encoder = new TextEncoder();
  socket.addEventListener("message", ({ data }) => {
    if (typeof data !== "string") {
      terminal.write(new Uint8Array(data));
    }
  });
  socket.addEventListener("open", () => terminal.focus());
  socket.addEventListener("close", ({ code, reason }) => {
    terminal.write(`\r\n[${code === 1000 ? "the shell has ended" : `the connection was lost ${reason}`.trim()}]\r\n`);
    at("ctrl-c").hidden = at("ctrl-d").hidden = true;
  });
  // Binary: what is typed or pasted is never taken for a control message.
  terminal.onData((typed) => socket.readyState === WebSocket.OPEN && socket.send(encoder.encode(typed)));
  terminal.onResize(({ cols, rows }) => control({ type: "resize", columns: cols, rows }));
  const sized = new ResizeObserver(() => fit.fit());
  sized.observe(at("terminal"));
  session = { terminal, socket, sized };
  at("ctrl-c").hidden = at("ctrl-d").hidden = false;
}

function closeTerminal() {
  if (session !== null) {
    session.sized.disconnect();
    session.socket.close();
    session.terminal.dispose();
    at("terminal").replaceChildren();
    at("ctrl-c").hidden = at("ctrl-d").hidden = true;
    session = null;
  }
}

// -- the beginning ------------------------------------------------------------------------------------------------------------------

async function watch() {
  if (token() && !document.hidden) {
    await attempt(showMachines);
  }
  setTimeout(watch, PACE);
}

if (token()) {
  start();
} else {
  showLogin();
}
setTimeout(watch, PACE);
