"use strict";
/* The report of a run. Its data is JSON in script elements that browsers do not run; `page.py` writes them.

   Most texts come from guests, which may be hostile. So elements are made by `make`, which knows text and attributes but no markup, and no
   URL but those that `page.py` made. Timeline libraries were considered: vis-timeline takes over 500 kB and builds its items of strings of
   HTML. The lanes are a canvas instead, in which text cannot be markup at all. uPlot draws the curves: it takes 50 kB, and text as text. */
(() => {
  // Places in the list that an event is.
  const [TIME, LASTS, MACHINE, LANE, ROW, KIND, FLAGS, WORDS, DETAIL] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const [FAILED, STANDS_OUT] = [1, 2]; // flags; page.py has the same
  const LETTERS = { phases: "P", commands: "C", files: "F", waits: "W", machine: "M", notes: "N", console: "L" };
  const DARK_LANES = ["commands", "console"]; // whose letters are light
  const NAMES = {
    phases: "Phases",
    commands: "Commands",
    files: "Files",
    waits: "Waits",
    machine: "Machine: power, snapshots, network, screen",
    notes: "Notes",
    console: "Lines of the console",
  };
  const FIELDS = [
    "argv",
    "cwd",
    "user",
    "env",
    "verb",
    "path",
    "args",
    "phase",
    "state",
    "nodeid",
    "status",
    "error",
    "text",
    "note",
    "stderr",
    "stdout",
  ];
  const LEFT = 124,
    RIGHT = 64,
    RULER = 22,
    HEAD = 20,
    LANE_HEIGHT = 19; // of the canvas, in pixels; the charts have the same margins
  const CHART_HEIGHT = 90,
    LIST_ROW = 22,
    SPARE_ROWS = 12;
  const TESTS_SHOWN = 200;
  const LONGEST_LINE = 500,
    LONGEST_TEXT = 12000; // shown at once; the rest is a button away
  const SHORTEST_SPAN = 0.2; // milliseconds of the closest zoom

  const run = parsed("run");
  const $ = (id) => document.getElementById(id);
  /* The test that is shown: its number and data, what of it can be seen, the chosen event, and the events that the filters let through. */
  const shown = {
    test: -1,
    data: null,
    from: 0,
    to: 1,
    whole: [0, 1],
    chosen: -1,
    found: [],
    hidden: new Set(),
    standing: false,
    query: "",
  };
  let charts = [],
    canvas = null,
    rowsOf = null,
    redrawAsked = false,
    searchRound = 0,
    colours = null,
    dragged = null,
    canvasWidth = 0;

  // ---- data ----

  function parsed(id) {
    return JSON.parse(document.getElementById(id).textContent);
  }

  const cached = new Map();
  /* Tests are parsed when they are first shown: a page may have megabytes of events. */
  function dataOf(test) {
    if (!cached.has(test)) cached.set(test, parsed(`test-${test}`));
    return cached.get(test);
  }

  const lastOf = (list) => list[list.length - 1];
  const laneOf = (event) => run.lanes[event[LANE]];
  const endOf = (event) => event[TIME] + Math.max(0, event[LASTS]);
  const hasFlag = (event, flag) => (event[FLAGS] & flag) !== 0;

  function textsOf(value) {
    if (Array.isArray(value)) return value.map(textsOf).join(" ");
    if (value && typeof value === "object")
      return Object.keys(value)
        .filter((key) => !key.endsWith("_href"))
        .map((key) => textsOf(value[key]))
        .join(" ");
    return String(value ?? "");
  }

  function searchable(data, event) {
    return `${data.machines[event[MACHINE]].name} ${data.kinds[event[KIND]]} ${event[WORDS]} ${textsOf(event[DETAIL])}`.toLowerCase();
  }

  /* Texts for the search are made at the first search only: they take as much memory as the events. */
  function searchables(data) {
    if (!data.searchables) data.searchables = data.events.map((event) => searchable(data, event));
    return data.searchables;
  }

  // ---- elements ----

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null)); // strings become text, never markup
    return element;
  }

  const button = (text, onclick, attributes = {}) => make("button", { type: "button", onclick, ...attributes }, text);

  function link(text, href) {
    // page.py makes all of them relative; anything else is no link, whatever it is.
    return href.startsWith("./") ? make("a", { href, rel: "noreferrer", target: "_blank" }, text) : make("span", {}, text);
  }

  function shortened(text) {
    const most = LONGEST_TEXT;
    const kept =
      text.length <= most
        ? text
        : `${text.slice(0, most / 3)}\n[${text.length - most} characters are hidden]\n${text.slice((-most * 2) / 3)}`;
    return kept
      .split("\n")
      .map((line) => (line.length <= LONGEST_LINE ? line : `${line.slice(0, LONGEST_LINE)} [${line.length - LONGEST_LINE} more]`))
      .join("\n");
  }

  /* A text of a program, with a button for what is hidden of it. */
  function textBlock(text) {
    const short = shortened(text);
    const pre = make("pre", {}, short);
    const box = make("div", { class: "block", tabindex: "0" }, pre);
    if (short === text) return box;
    const more = button(`Show all ${text.length.toLocaleString("en")} characters`, () => {
      pre.textContent = text;
      more.remove();
    });
    box.append(more);
    return box;
  }

  const letterOf = (lane) => make("span", { class: `letter ${lane}`, "aria-hidden": "true" }, LETTERS[lane]);
  const secondsText = (milliseconds, digits = 3) => `${(milliseconds / 1000).toFixed(digits)} s`;

  // ---- tests ----

  function showCounts() {
    const words = Object.entries(run.counts).map(([outcome, count]) => `${count} ${outcome}`);
    $("counts").textContent = words.join(", ") || "no tests";
  }

  function testButton(entry, test) {
    const took = `${entry.seconds.toFixed(1)} s, ${entry.count.toLocaleString("en")} events`;
    const label = make(
      "span",
      {},
      outcomeBadge(entry),
      entry.nodeid.slice(0, 300),
      make("small", {}, entry.error),
      make("small", {}, took),
    );
    return button(label, () => openTest(test), { "data-test": test });
  }

  // Never by colour alone: each outcome has a sign and its word.
  const outcomeBadge = ({ outcome }) =>
    make("span", { class: `badge ${outcome === "failed" ? "failed" : "passed"}` }, outcomeText(outcome));
  const outcomeText = (outcome) => ({ failed: "✕ failed", passed: "✓ passed", skipped: "– skipped" })[outcome] ?? outcome;

  /* A run of thousands of tests is listed in parts, so that the page stays small. */
  function listTests(from = 0) {
    const list = $("tests");
    run.tests.slice(from, from + TESTS_SHOWN).forEach((entry, at) => list.append(make("li", {}, testButton(entry, from + at))));
    const left = run.tests.length - from - TESTS_SHOWN;
    if (left <= 0) return;
    const more = make(
      "li",
      {},
      button(`Show more (${left} left)`, () => {
        more.remove();
        listTests(from + TESTS_SHOWN);
      }),
    );
    list.append(more);
  }

  function openTest(test, chosen = -1) {
    if (!run.tests.length) $("main").textContent = "This run has no tests with artifacts.";
    if (!run.tests[test]) return;
    Object.assign(shown, { test, data: dataOf(test), chosen: -1 });
    shown.whole = extentOf(shown.data, run.tests[test]);
    [shown.from, shown.to] = shown.whole;
    markTest(test);
    buildPanel(run.tests[test], shown.data);
    filter();
    choose(chosen >= 0 ? chosen : firstToLookAt(shown.data), { focus: false });
    performance.mark("test-shown");
  }

  function markTest(test) {
    for (const each of document.querySelectorAll("#tests button[data-test]")) {
      each.setAttribute("aria-current", String(Number(each.dataset.test) === test));
    }
  }

  /* From the first to the last instant, with a little room at both ends. */
  function extentOf(data, entry) {
    let from = 0,
      to = entry.seconds * 1000;
    for (const event of data.events) {
      from = Math.min(from, event[TIME]);
      to = Math.max(to, endOf(event));
    }
    const room = Math.max((to - from) * 0.01, 1);
    return [from - room, to + room];
  }

  const failureOf = (data) => data.events.find((event) => laneOf(event) === "phases" && hasFlag(event, FAILED));

  /* The last event before the failure that stands out, else the last one of all before it: that is where a reader begins. */
  function firstToLookAt(data) {
    const end = failureOf(data)?.[TIME] ?? Infinity;
    const before = [...data.events.keys()].filter((at) => data.events[at][TIME] <= end);
    const standing = before.filter((at) => hasFlag(data.events[at], STANDS_OUT));
    return lastOf(standing) ?? lastOf(before) ?? -1;
  }

  // ---- panel of a test ----

  function buildPanel(entry, data) {
    charts.forEach((chart) => chart.destroy());
    charts = [];
    $("main").replaceChildren(
      heading(entry, data),
      ...errorParts(data),
      standingOut(data),
      toolbar(data),
      timelineParts(data),
      listAndDetail(),
      ...sectionParts(data),
      ...fileParts(data),
    );
    layOut(data);
    makeCharts(data);
    redraw();
  }

  function heading(entry, data) {
    const facts = [
      entry.phase && entry.outcome !== "passed" ? `in ${entry.phase}` : "",
      `${entry.seconds.toFixed(2)} s`,
      entry.began && `began ${dateText(entry.began)}`,
      entry.worker && `worker ${entry.worker}`,
      data.machines.length ? `machines: ${data.machines.map((each) => each.name).join(", ")}` : "no machines",
    ];
    return make(
      "div",
      {},
      make("h2", {}, outcomeBadge(entry), entry.nodeid),
      make("p", { class: "facts" }, facts.filter(Boolean).join(" · ")),
    );
  }

  function dateText(seconds) {
    const date = new Date(seconds * 1000);
    // An artifact may have any number, and dates end some time.
    return Number.isNaN(date.getTime()) ? `${seconds} s after 1970` : `${date.toISOString().replace("T", " ").slice(0, 19)} UTC`;
  }

  function errorParts(data) {
    const error = data.error ? make("div", { class: "error" }, make("pre", {}, shortened(data.error))) : null;
    const traceback = data.traceback ? make("details", { open: true }, make("summary", {}, "Traceback"), textBlock(data.traceback)) : null;
    return [error, traceback].filter(Boolean);
  }

  function standingOut(data) {
    const all = [...data.events.keys()].filter((at) => hasFlag(data.events[at], STANDS_OUT));
    if (!all.length) return "";
    // What began it and what came last; a crash loop may have a thousand between.
    const some = all.length <= 12 ? all : [...all.slice(0, 4), ...all.slice(-8)];
    const items = some.map((at) =>
      make(
        "li",
        {},
        button(eventLine(data, data.events[at]), () => chooseAndReveal(at)),
      ),
    );
    const more =
      all.length > some.length
        ? make("p", { class: "hint" }, `${all.length - some.length} more between them: press e for the next one.`)
        : null;
    return make(
      "section",
      { "aria-label": "What stands out" },
      make("h3", {}, "What stands out"),
      make("ul", { class: "standing" }, ...items),
      more,
    );
  }

  function eventLine(data, event) {
    const mark = hasFlag(event, FAILED) ? "✕ " : "! ";
    const of = `${(event[TIME] / 1000).toFixed(3)} s  ${data.machines[event[MACHINE]].name}  `;
    return make("span", {}, letterOf(laneOf(event)), ` ${of}`, make("span", { class: "bad" }, `${mark}${event[WORDS]}`));
  }

  function toolbar(data) {
    const lanes = [...new Set(data.events.map(laneOf))].sort((one, two) => run.lanes.indexOf(one) - run.lanes.indexOf(two));
    const toggles = lanes.map((lane) => {
      const toggle = button("", () => toggleLane(lane, toggle), {
        class: "lane",
        "aria-pressed": String(!shown.hidden.has(lane)),
        title: NAMES[lane],
      });
      toggle.append(letterOf(lane), ` ${lane}`);
      return toggle;
    });
    const standing = button(
      "only what stands out",
      () => {
        shown.standing = !shown.standing;
        standing.setAttribute("aria-pressed", String(shown.standing));
        filter();
      },
      { "aria-pressed": String(shown.standing), class: "only" },
    );
    const zooms = [
      make("output", { id: "span" }),
      button("+", () => zoom(0.5), { "aria-label": "Zoom in", id: "zoom-in" }),
      button("−", () => zoom(2), { "aria-label": "Zoom out", id: "zoom-out" }),
      button("←", () => move(-0.4), { "aria-label": "Earlier" }),
      button("→", () => move(0.4), { "aria-label": "Later" }),
      button("Whole", () => setView(...shown.whole), { "aria-label": "Whole test", id: "zoom-whole" }),
    ];
    const head = make("div", { class: "bar" }, make("h3", {}, "Timeline"), make("span", { class: "gap" }), ...zooms);
    return make("div", {}, head, make("div", { class: "bar", role: "group", "aria-label": "Lanes and events" }, ...toggles, standing));
  }

  function toggleLane(lane, toggle) {
    if (!shown.hidden.delete(lane)) shown.hidden.add(lane);
    toggle.setAttribute("aria-pressed", String(!shown.hidden.has(lane)));
    filter();
  }

  function timelineParts(data) {
    canvas = make("canvas", {
      class: "lanes",
      role: "img",
      "aria-label": "Timeline of the machines. The list of events below has the same in words.",
    });
    canvas.addEventListener("wheel", onWheel, { passive: false });
    canvas.addEventListener("pointerdown", onPointerDown);
    canvas.addEventListener("pointermove", onPointerMove);
    canvas.addEventListener("pointerup", onPointerUp);
    canvas.addEventListener("pointerleave", () => point(null));
    const left = data.left_out ? make("p", { class: "hint" }, `${data.left_out} earlier events are only in timeline.jsonl.`) : null;
    return make(
      "div",
      {},
      make("div", { class: "timeline", id: "timeline" }, canvas),
      make("div", { class: "pointed", id: "pointed" }),
      left,
    );
  }

  function listAndDetail() {
    const all = make("div", { class: "all", role: "presentation" });
    const list = make(
      "div",
      { class: "list", id: "list", role: "listbox", tabindex: "0", "aria-label": "Events", onscroll: askRows, onclick: onListClick },
      all,
    );
    return make("div", { class: "pair" }, list, make("section", { class: "detail", id: "detail", "aria-label": "Event", tabindex: "0" }));
  }

  function sectionParts(data) {
    return data.sections.map(([title, text]) => make("details", {}, make("summary", {}, title), textBlock(text)));
  }

  function fileParts(data) {
    const groups = [["Test", data.files], ...data.machines.map((machine) => [machine.name, machine.files])].filter(
      ([, files]) => files.length,
    );
    const lines = groups.map(([name, files]) =>
      make("li", {}, `${name}: `, ...files.flatMap(([text, href], at) => [at ? ", " : "", link(text, href)])),
    );
    const images = data.machines
      .filter((machine) => machine.screenshot.startsWith("data:image/png;base64,"))
      .map((machine) =>
        make(
          "figure",
          {},
          make("img", { src: machine.screenshot, alt: `Screen of ${machine.name}` }),
          make("figcaption", {}, `Screen of ${machine.name}`),
        ),
      );
    return lines.length ? [make("h3", {}, "Files"), make("ul", {}, ...lines), ...images] : images;
  }

  // ---- timeline ----

  /* One row for each lane of a machine that has events, and more where events overlap. */
  function layOut(data) {
    const needed = new Map();
    for (const event of data.events) {
      const key = `${event[MACHINE]} ${event[LANE]}`;
      needed.set(key, Math.max(needed.get(key) ?? 0, event[ROW] + 1));
    }
    const rows = [],
      heads = [],
      places = new Map();
    let y = RULER;
    data.machines.forEach((machine, number) => {
      heads.push({ y, name: machine.name });
      y += HEAD;
      run.lanes.forEach((lane, at) => {
        const key = `${number} ${at}`;
        if (!needed.has(key)) return;
        places.set(key, rows.length);
        for (let row = 0; row < needed.get(key); row++, y += LANE_HEIGHT) rows.push({ y, lane, label: row ? "" : lane });
      });
    });
    rowsOf = { rows, heads, height: y + 4, of: (event) => rows[places.get(`${event[MACHINE]} ${event[LANE]}`) + event[ROW]] };
  }

  // The width is read once for each drawing: the browser may lay the page out anew for each time that it is asked.
  const span = () => Math.max(1, canvasWidth - LEFT - RIGHT);
  const xOf = (time) => LEFT + ((time - shown.from) / (shown.to - shown.from)) * span();
  const timeAt = (x) => shown.from + ((x - LEFT) / span()) * (shown.to - shown.from);

  function setView(from, to) {
    const [first, last] = shown.whole;
    const length = Math.min(Math.max(to - from, SHORTEST_SPAN), last - first);
    shown.from = Math.min(Math.max(from, first), last - length);
    shown.to = shown.from + length;
    showSpan();
    redraw();
  }

  /* In words too, for those who do not see the ruler. */
  function showSpan() {
    charts.forEach((chart) => chart.setScale("x", { min: shown.from / 1000, max: shown.to / 1000 }));
    $("span").textContent = `${secondsText(shown.from)} to ${secondsText(shown.to)}`;
  }

  /* Zoom, and keep one time where it is: that under the pointer, else that of the chosen event if it can be seen, else the middle. */
  function zoom(factor, around = null) {
    const chosen = shown.data.events[shown.chosen]?.[TIME];
    const seen = chosen >= shown.from && chosen <= shown.to ? chosen : (shown.from + shown.to) / 2;
    const fixed = around ?? seen;
    setView(fixed - (fixed - shown.from) * factor, fixed + (shown.to - fixed) * factor);
  }

  function move(share) {
    const by = (shown.to - shown.from) * share;
    setView(shown.from + by, shown.to + by);
  }

  function colourOf(name) {
    if (!colours) colours = new Map();
    if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
    return colours.get(name);
  }

  /* Many changes between two frames are one drawing. */
  function redraw() {
    if (redrawAsked) return;
    redrawAsked = true;
    requestAnimationFrame(() => {
      redrawAsked = false;
      if (canvas) draw();
    });
  }

  function draw() {
    // Browsers have no canvas of more than 32,767 pixels; one of very many machines is less sharp instead.
    const ratio = Math.min(window.devicePixelRatio || 1, 30000 / rowsOf.height);
    canvasWidth = canvas.clientWidth;
    canvas.style.height = `${rowsOf.height}px`;
    canvas.width = Math.round(canvasWidth * ratio);
    canvas.height = Math.round(rowsOf.height * ratio);
    const paper = canvas.getContext("2d");
    paper.setTransform(ratio, 0, 0, ratio, 0, 0);
    paper.font = "12px system-ui, sans-serif";
    paper.textBaseline = "middle";
    drawRuler(paper);
    drawLabels(paper);
    paper.save();
    paper.beginPath();
    paper.rect(LEFT, 0, span(), rowsOf.height);
    paper.clip();
    drawEvents(paper);
    drawFailure(paper);
    drawChosen(paper);
    drawDrag(paper);
    paper.restore();
  }

  /* The step of 1, 2 or 5 times a power of ten by which the ruler has about a mark every hundred pixels. */
  function rulerStep() {
    const rough = ((shown.to - shown.from) / span()) * 100;
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough) ?? 10 * power;
  }

  function drawRuler(paper) {
    const step = rulerStep();
    const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step / 1000) + 1e-9)));
    paper.textAlign = "center";
    const first = Math.ceil(shown.from / step) * step;
    // Counted, because a step may be too small to change a very large time.
    for (let mark = 0, time = first; time <= shown.to && mark < 100; mark++, time = first + mark * step) {
      paper.fillStyle = colourOf("line");
      paper.fillRect(xOf(time), RULER - 4, 1, rowsOf.height);
      paper.fillStyle = colourOf("dim");
      paper.fillText(`${(time / 1000).toFixed(digits)} s`, xOf(time), 10);
    }
  }

  function drawLabels(paper) {
    paper.textAlign = "left";
    for (const { y, name } of rowsOf.heads) {
      paper.fillStyle = colourOf("raised");
      paper.fillRect(0, y, canvasWidth, HEAD);
      paper.fillStyle = colourOf("text");
      paper.font = "600 12px system-ui, sans-serif";
      paper.fillText(name.slice(0, 60), 8, y + HEAD / 2);
    }
    paper.font = "12px system-ui, sans-serif";
    for (const { y, lane, label } of rowsOf.rows) {
      if (!label) continue;
      paper.fillStyle = colourOf(lane);
      paper.fillRect(10, y + 3, 14, 13);
      paper.fillStyle = colourOf("text");
      paper.fillText(`${LETTERS[lane]}`, 28, y + LANE_HEIGHT / 2);
      paper.fillText(label, 44, y + LANE_HEIGHT / 2);
    }
  }

  /* Events that fall on the same pixel of a row are drawn once, but for those that stand out: those come last, above the others. */
  function drawEvents(paper) {
    const { events } = shown.data;
    const isFound = new Uint8Array(events.length);
    for (const at of shown.found) isFound[at] = 1;
    const lastX = new Map(),
      standing = [];
    events.forEach((event, at) => {
      if (endOf(event) < shown.from || event[TIME] > shown.to || shown.hidden.has(laneOf(event))) return;
      if (hasFlag(event, STANDS_OUT | FAILED)) return void standing.push(at);
      const row = rowsOf.of(event),
        x = Math.round(xOf(event[TIME])),
        end = xOf(endOf(event));
      if (lastX.get(row) === x && end - x < 2) return;
      lastX.set(row, x);
      drawEvent(paper, event, row, isFound[at]);
    });
    standing.forEach((at) => drawEvent(paper, events[at], rowsOf.of(events[at]), isFound[at]));
    paper.globalAlpha = 1;
  }

  function drawEvent(paper, event, row, isFound) {
    const x = xOf(event[TIME]),
      middle = row.y + LANE_HEIGHT / 2;
    paper.globalAlpha = isFound ? 1 : 0.15;
    paper.fillStyle = colourOf(row.lane);
    if (event[LASTS] >= 0) drawBar(paper, x, row, Math.max(3, xOf(endOf(event)) - x));
    else if (row.lane === "console") paper.fillRect(x, row.y + 4, 1.5, LANE_HEIGHT - 8);
    else drawMark(paper, x, middle, row.lane);
    if (hasFlag(event, FAILED | STANDS_OUT)) drawCross(paper, x, middle, hasFlag(event, FAILED));
  }

  function drawBar(paper, x, row, length) {
    paper.fillRect(x, row.y + 3, length, LANE_HEIGHT - 6);
    if (length < 16) return;
    paper.fillStyle = colourOf(DARK_LANES.includes(row.lane) ? "on-dark-lane" : "on-lane");
    paper.textAlign = "left";
    paper.fillText(LETTERS[row.lane], Math.max(x, LEFT) + 4, row.y + LANE_HEIGHT / 2);
  }

  /* A triangle for phases, a diamond for all else that takes no time. */
  function drawMark(paper, x, y, lane) {
    const corners =
      lane === "phases"
        ? [
            [0, -6],
            [7, 0],
            [0, 6],
          ]
        : [
            [0, -6],
            [5, 0],
            [0, 6],
            [-5, 0],
          ];
    paper.beginPath();
    corners.forEach(([right, down]) => paper.lineTo(x + right, y + down));
    paper.fill();
  }

  /* A cross for what failed, an exclamation mark for what merely looks bad. */
  function drawCross(paper, x, y, failed) {
    paper.font = "700 14px system-ui, sans-serif";
    paper.textAlign = "center";
    paper.lineWidth = 3;
    paper.strokeStyle = colourOf("back");
    paper.strokeText(failed ? "✕" : "!", x, y);
    paper.fillStyle = colourOf("failed");
    paper.fillText(failed ? "✕" : "!", x, y);
    paper.font = "12px system-ui, sans-serif";
  }

  function drawFailure(paper) {
    const failure = failureOf(shown.data);
    if (!failure) return;
    paper.strokeStyle = colourOf("failed");
    paper.lineWidth = 1.5;
    paper.setLineDash([5, 4]);
    strokeVertical(paper, xOf(failure[TIME]));
    paper.setLineDash([]);
  }

  function strokeVertical(paper, x) {
    paper.beginPath();
    paper.moveTo(x, RULER - 4);
    paper.lineTo(x, rowsOf.height);
    paper.stroke();
  }

  function drawChosen(paper) {
    const event = shown.data.events[shown.chosen];
    if (!event) return;
    const row = rowsOf.of(event),
      x = xOf(event[TIME]);
    paper.strokeStyle = colourOf("focus");
    paper.lineWidth = 1;
    strokeVertical(paper, x);
    paper.lineWidth = 2;
    paper.strokeRect(x - 4, row.y + 1, Math.max(9, xOf(endOf(event)) - x + 6), LANE_HEIGHT - 2);
  }

  function drawDrag(paper) {
    if (!dragged || dragged.moves || dragged.x === dragged.to) return;
    paper.globalAlpha = 0.25;
    paper.fillStyle = colourOf("focus");
    paper.fillRect(Math.min(dragged.x, dragged.to), 0, Math.abs(dragged.to - dragged.x), rowsOf.height);
    paper.globalAlpha = 1;
  }

  function onWheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 30 : 1; // some browsers count lines, not pixels
    const sideways = event.shiftKey ? event.deltaY || event.deltaX : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
    if (sideways) move((sideways * lines) / 1000);
    else zoom(Math.exp(event.deltaY * lines * 0.002), timeAt(event.offsetX));
  }

  function onPointerDown(event) {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    dragged = { x: event.offsetX, to: event.offsetX, moves: event.shiftKey, from: shown.from, until: shown.to };
  }

  function onPointerMove(event) {
    if (!dragged) return void point(eventAt(event.offsetX, event.offsetY));
    dragged.to = event.offsetX;
    if (!dragged.moves) return void redraw();
    const by = ((dragged.x - dragged.to) / span()) * (dragged.until - dragged.from);
    setView(dragged.from + by, dragged.until + by);
  }

  function onPointerUp(event) {
    if (!dragged) return;
    const { x, to, moves } = dragged;
    dragged = null;
    if (Math.abs(to - x) < 4) chooseAndReveal(eventAt(event.offsetX, event.offsetY));
    else if (!moves) setView(timeAt(Math.min(x, to)), timeAt(Math.max(x, to)));
    redraw();
  }

  /* The event under a point, or within five pixels of it; of several the nearest, what stands out before the rest. */
  function eventAt(x, y) {
    let best = null,
      least = 6;
    for (const at of shown.found) {
      const event = shown.data.events[at],
        row = rowsOf.of(event);
      if (y < row.y || y >= row.y + LANE_HEIGHT) continue;
      const distance = Math.max(xOf(event[TIME]) - x, x - xOf(endOf(event)), 0) - (hasFlag(event, STANDS_OUT) ? 1 : 0);
      if (distance <= least) [best, least] = [at, distance];
    }
    return best;
  }

  function point(at) {
    const event = shown.data.events[at];
    $("pointed").textContent = event ? `${secondsText(event[TIME])}  ${event[WORDS]}` : "";
  }

  // ---- curves ----

  function makeCharts(data) {
    data.machines.forEach((machine) => {
      if (machine.metrics[0].length < 2) return;
      const place = make("div", { class: "chart", role: "img", "aria-label": metricsText(machine) });
      $("timeline").append(place);
      charts.push(new uPlot(chartOptions(machine, $("timeline").clientWidth), chartData(machine), place));
    });
    showSpan();
  }

  const MIB = 1 << 20;
  const chartData = ({ metrics: [times, cpu, memory] }) => [times, cpu, memory.map((bytes) => (bytes === null ? null : bytes / MIB))];

  function metricsText({ name, metrics: [times, cpu, memory] }) {
    const most = (values) => values.reduce((one, two) => Math.max(one, two ?? 0), 0);
    return `Curves of ${name}, ${times.length} samples: CPU up to ${most(cpu).toFixed(0)} %, memory up to ${(most(memory) / MIB).toFixed(0)} MiB`;
  }

  function chartOptions(machine, wide) {
    const axis = {
      stroke: () => colourOf("dim"),
      grid: { stroke: () => colourOf("line"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui, sans-serif",
    };
    return {
      width: wide,
      height: CHART_HEIGHT,
      padding: [8, 0, 4, 0],
      ms: 1,
      cursor: { drag: { x: true, y: false, setScale: false } },
      hooks: { setSelect: [chartSelected] },
      scales: {
        x: { time: false, auto: false },
        cpu: { range: (_, __, most) => [0, Math.max(100, most)] },
        memory: { range: (_, __, most) => [0, Math.max(1, most * 1.1)] },
      },
      axes: [
        { ...axis, show: false },
        { ...axis, scale: "cpu", size: LEFT, values: (_, values) => values.map((value) => `${value} %`) },
        {
          ...axis,
          scale: "memory",
          side: 1,
          size: RIGHT,
          grid: { show: false },
          values: (_, values) => values.map((value) => `${value} MiB`),
        },
      ],
      // Not by colour alone: the second curve is dashed.
      series: [
        { label: `${machine.name} at`, value: (_, value) => (value == null ? "–" : `${value.toFixed(1)} s`) },
        {
          label: "CPU (—)",
          scale: "cpu",
          stroke: () => colourOf("curve"),
          width: 1.5,
          points: { show: false },
          value: (_, value) => (value == null ? "–" : `${value.toFixed(0)} %`),
        },
        {
          label: "memory (- -)",
          scale: "memory",
          stroke: () => colourOf("waits"),
          width: 2,
          dash: [6, 4],
          points: { show: false },
          value: (_, value) => (value == null ? "–" : `${value.toFixed(0)} MiB`),
        },
      ],
    };
  }

  function chartSelected(chart) {
    if (chart.select.width < 4) return;
    const [from, to] = [chart.select.left, chart.select.left + chart.select.width].map((x) => chart.posToVal(x, "x") * 1000);
    chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    setView(from, to);
  }

  // ---- list of events ----

  /* Only rows that can be seen are elements, whatever the number of events. */
  function askRows() {
    requestAnimationFrame(showRows);
  }

  function showRows() {
    const list = $("list"),
      all = list.firstChild;
    const first = Math.max(0, Math.floor(list.scrollTop / LIST_ROW) - SPARE_ROWS);
    const last = Math.min(shown.found.length, Math.ceil((list.scrollTop + list.clientHeight) / LIST_ROW) + SPARE_ROWS);
    all.style.height = `${shown.found.length * LIST_ROW}px`;
    const rows = [];
    for (let place = first; place < last; place++) rows.push(listRow(place));
    all.replaceChildren(...rows);
    const active = $(`event-${shown.chosen}`);
    if (active) list.setAttribute("aria-activedescendant", active.id);
    else list.removeAttribute("aria-activedescendant");
  }

  function listRow(place) {
    const at = shown.found[place],
      event = shown.data.events[at];
    const bad = hasFlag(event, FAILED | STANDS_OUT);
    const row = make(
      "div",
      {
        class: bad ? "row bad" : "row",
        role: "option",
        id: `event-${at}`,
        "data-at": at,
        "aria-selected": String(at === shown.chosen),
        "aria-posinset": place + 1,
        "aria-setsize": shown.found.length,
      },
      make("span", { class: "time" }, (event[TIME] / 1000).toFixed(3)),
      make("span", { class: "of" }, shown.data.machines[event[MACHINE]].name),
      letterOf(laneOf(event)),
      make("span", { class: "unseen" }, shown.data.kinds[event[KIND]]),
      make("span", { class: "words" }, `${hasFlag(event, FAILED) ? "✕ " : bad ? "! " : ""}${event[WORDS]}`),
    );
    row.style.top = `${place * LIST_ROW}px`;
    return row;
  }

  function onListClick(click) {
    const row = click.target.closest("[data-at]");
    if (row) choose(Number(row.dataset.at));
  }

  /* Show an event everywhere: in the list, on the timeline, and in full. */
  function choose(at, { focus = true } = {}) {
    if (at < 0 || !shown.data.events[at]) return;
    shown.chosen = at;
    const event = shown.data.events[at];
    if (event[TIME] < shown.from || event[TIME] > shown.to) moveTo(event[TIME]);
    scrollTo(shown.found.indexOf(at));
    showRows();
    $("detail").replaceChildren(...detailParts(event));
    if (focus) rememberPlace();
    redraw();
  }

  /* For clicks far from the event's detail. */
  function chooseAndReveal(at) {
    if (at === null) return;
    choose(at);
    $("detail").scrollIntoView({ block: "nearest" });
  }

  function moveTo(time) {
    const half = (shown.to - shown.from) / 2;
    setView(time - half, time + half);
  }

  function scrollTo(place) {
    const list = $("list"),
      top = place * LIST_ROW;
    if (place >= 0 && (top < list.scrollTop || top + LIST_ROW > list.scrollTop + list.clientHeight))
      list.scrollTop = Math.max(0, top - list.clientHeight / 2);
  }

  /* The next event that passes the filters, in one direction. */
  function step(by, accept = () => true) {
    const { found } = shown;
    let place = found.indexOf(shown.chosen);
    // The chosen event may be filtered out: then its neighbours count.
    if (place < 0) place = found.filter((at) => at < shown.chosen).length - (by > 0 ? 1 : 0);
    for (place += by; place >= 0 && place < found.length; place += by) {
      if (accept(shown.data.events[found[place]])) return choose(found[place]);
    }
  }

  // ---- one event in full ----

  function detailParts(event) {
    const fields = event[DETAIL] ?? {};
    const names = Object.keys(fields).filter((name) => !name.endsWith("_href"));
    const known = FIELDS.filter((name) => names.includes(name));
    const list = make("dl", {});
    for (const name of [...known, ...names.filter((name) => !known.includes(name))]) {
      list.append(make("dt", {}, name), make("dd", {}, fieldOf(name, fields)));
    }
    const took = event[LASTS] >= 0 ? `, took ${secondsText(event[LASTS])}` : "";
    const mark = hasFlag(event, FAILED) ? make("span", { class: "badge failed" }, "✕ failed") : null;
    return [
      make("h3", {}, letterOf(laneOf(event)), ` ${shown.data.kinds[event[KIND]]} on ${shown.data.machines[event[MACHINE]].name} `, mark),
      make("p", { class: "facts" }, `at ${secondsText(event[TIME])}${took}`),
      names.length ? list : textBlock(event[WORDS]),
    ];
  }

  function fieldOf(name, fields) {
    const value = fields[name],
      href = fields[`${name}_href`];
    if (href) return link(`${value}: the whole output`, href);
    if (name === "argv" && Array.isArray(value)) return textBlock(value.map(quoted).join(" "));
    if (Array.isArray(value)) return textBlock(value.join("\n"));
    return typeof value === "string" ? textBlock(value) : String(value);
  }

  /* As a shell would have to be given it. */
  function quoted(word) {
    return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replace(/'/g, "'\"'\"'")}'`;
  }

  // ---- search and filters ----

  function filter() {
    const { data, query } = shown;
    const texts = query ? searchables(data) : null;
    shown.found = [...data.events.keys()].filter((at) => {
      const event = data.events[at];
      return (
        !shown.hidden.has(laneOf(event)) &&
        (!shown.standing || hasFlag(event, STANDS_OUT | FAILED)) &&
        (!texts || texts[at].includes(query))
      );
    });
    $("matches").textContent = query ? `${shown.found.length.toLocaleString("en")} of ${data.events.length.toLocaleString("en")}` : "";
    scrollTo(shown.found.indexOf(shown.chosen));
    showRows();
    redraw();
  }

  function search() {
    shown.query = $("search").value.trim().toLowerCase();
    searchRound += 1;
    if (!shown.data) return;
    filter();
    if (shown.query && !shown.found.includes(shown.chosen)) choose(shown.found[0] ?? -1, { focus: false });
    countElsewhere(0, searchRound);
  }

  /* Count the matches in the other tests, one at a time, so that typing goes on meanwhile; a newer search ends this one. */
  function countElsewhere(test, round) {
    if (round !== searchRound || test >= run.tests.length) return;
    const place = document.querySelector(`#tests button[data-test="${test}"]`);
    place?.querySelector(".count")?.remove();
    if (shown.query.length > 1 && place) {
      const data = cached.get(test) ?? parsed(`test-${test}`); // what is parsed for this alone is not kept
      const count = data.events.filter((event) => searchable(data, event).includes(shown.query)).length;
      if (count) place.append(make("small", { class: "count" }, `${count} found`));
    }
    setTimeout(countElsewhere, 0, test + 1, round);
  }

  function endSearch() {
    $("search").value = "";
    $("search").blur();
    search();
  }

  // ---- keys, colours, address ----

  const KEYS = new Map(
    Object.entries({
      j: () => step(1),
      k: () => step(-1),
      ArrowDown: () => step(1),
      ArrowUp: () => step(-1),
      e: () => step(1, (event) => hasFlag(event, STANDS_OUT)),
      ArrowLeft: () => move(-0.2),
      ArrowRight: () => move(0.2),
      "+": () => zoom(0.5),
      "=": () => zoom(0.5),
      "-": () => zoom(2),
      0: () => setView(...shown.whole),
      "[": () => openTest(shown.test - 1),
      "]": () => openTest(shown.test + 1),
      "/": () => $("search").focus(),
      "?": () => $("help").showModal(),
      Escape: () => endSearch(),
    }),
  );

  function onKey(event) {
    const typing = event.target.closest("input, textarea, select");
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open || !shown.data) return;
    if (typing && event.key !== "Escape") return;
    // Arrows scroll a text that has the focus, as they do everywhere.
    if (event.key.startsWith("Arrow") && event.target.closest(".block, .detail, nav")) return;
    if (!KEYS.has(event.key)) return;
    event.preventDefault();
    KEYS.get(event.key)();
  }

  function isDark() {
    const asked = document.documentElement.dataset.theme;
    return asked ? asked === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    colours = null;
    $("theme").textContent = isDark() ? "Light" : "Dark";
    charts.forEach((chart) => chart.redraw(false));
    redraw();
  }

  function toggleTheme() {
    const theme = isDark() ? "light" : "dark";
    setTheme(theme);
    quietly(() => localStorage.setItem("vmbottle-theme", theme));
  }

  /* Browsers may refuse storage and history to a page that was opened as a file; neither is worth an error. */
  function quietly(action) {
    try {
      return action();
    } catch {
      return null;
    }
  }

  function rememberPlace() {
    quietly(() => history.replaceState(null, "", `#test=${shown.test}&event=${shown.chosen}`));
  }

  function askedPlace() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const place = (name) => (/^\d{1,7}$/.test(asked.get(name) ?? "") ? Number(asked.get(name)) : -1);
    return [Math.max(0, place("test")), place("event")];
  }

  function onResize() {
    charts.forEach((chart) => chart.setSize({ width: $("timeline").clientWidth, height: CHART_HEIGHT }));
    redraw();
  }

  function start() {
    const stored = quietly(() => localStorage.getItem("vmbottle-theme"));
    setTheme(["light", "dark"].includes(stored) ? stored : null);
    showCounts();
    listTests();
    let typed = 0;
    $("search").addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(search, 120);
    });
    $("theme").addEventListener("click", toggleTheme);
    $("help-button").addEventListener("click", () => $("help").showModal());
    $("help-close").addEventListener("click", () => $("help").close());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(null));
    document.addEventListener("keydown", onKey);
    window.addEventListener("resize", onResize);
    // The tests' names are painted before the first of them is parsed.
    requestAnimationFrame(() => setTimeout(() => openTest(...askedPlace()), 0));
  }

  start();
})();
