// The page of a Shunt agent, a module. Every text from outside goes in by textContent: a service may be called anything.

const PERIOD = 1000;
const KEPT = 60;
const LIMIT = 50;
const SVG = "http://www.w3.org/2000/svg";

const at = (id) => document.getElementById(id);
const wanted = { find: "", sort: "name", reverse: false, offset: 0 };
const opened = new Map();
const past = { total: [], services: new Map() };

/** An element with a class, a text and children. */
function element(name, { className = "", text, children = [], ...attributes } = {}) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const UNITS = ["", "k", "M", "G", "T", "P"];

/** A number in three digits, with its unit. */
function short(number, name = "", base = 1000) {
  let unit = 0;
  while (number >= base && unit < UNITS.length - 1) {
    number /= base;
    unit += 1;
  }
  const digits = number >= 100 || (unit === 0 && Number.isInteger(number)) ? 0 : number >= 10 ? 1 : 2;
  return number.toFixed(digits).replace(/\.0+$/, "") + (unit || name ? ` ${UNITS[unit]}${name}` : "");
}

const rateText = (number) => (number === undefined || number === null ? "–" : short(Math.round(number * 10) / 10));
const plural = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;

function age(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** A line of the newest values, the newest on the right. */
function spark(values, label) {
  const svg = drawn("svg", { viewBox: `0 0 ${KEPT - 1} 20`, preserveAspectRatio: "none", role: "img", "aria-label": label, class: "spark" });
  const top = Math.max(1e-9, ...values);
  const start = KEPT - values.length;
  const points = values.map((value, index) => `${start + index},${(19 - (value / top) * 17.5).toFixed(2)}`);
  if (points.length > 1) {
    svg.append(drawn("polygon", { class: "area", points: `${start},20 ${points.join(" ")} ${KEPT - 1},20` }));
    svg.append(drawn("polyline", { class: "line", points: points.join(" ") }));
  }
  return svg;
}

function remember(list, value) {
  list.push(value);
  if (list.length > KEPT) list.shift();
}

/** Children are replaced only where they differ: what has the focus, or is scrolled, stays. */
function fill(target, children) {
  const focused = document.activeElement && target.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  children.forEach((child, index) => {
    const old = target.children[index];
    if (!old) target.append(child);
    else if (!old.isEqualNode(child)) old.replaceWith(child);
  });
  while (target.children.length > children.length) target.lastElementChild.remove();
  if (focused && !target.contains(document.activeElement)) {
    target.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }
}

function setText(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

function card(name, value, unit, more, values) {
  const number = element("div", { className: "value", text: value });
  if (unit) number.append(element("small", { text: unit }));
  const children = [element("div", { className: "name", text: name }), number, element("div", { className: "more", text: more })];
  if (values) children.push(spark(values, `${name}, the last minute`));
  return element("div", { className: "card", children });
}

function showCards(overview) {
  const { counts, traffic, rates } = overview;
  if (rates) remember(past.total, rates);
  const series = (key) => past.total.map((rates) => rates[key]);
  const flows = overview.flows === null ? "" : `, ${short(overview.flows)} open by packets`;
  const idle = counts.without_backends ? `${short(counts.without_backends)} without backends` : "all have backends";
  fill(at("cards"), [
    card("Service ports", counts.services.toLocaleString("en"), "", counts.services ? idle : "none yet"),
    card("Backends", counts.backends.toLocaleString("en"), "", plural(counts.frontends, "frontend")),
    card("Connections", rateText(rates?.connections), "/s", `${short(traffic.sockets + traffic.flows)} so far${flows}`, series("connections")),
    card("Translated packets", rateText(rates?.packets), "/s", `${short(traffic.packets)} so far`, series("packets")),
    card("Translated traffic", rates ? short(Math.round(rates.bytes * 8), "bit") : "–", "/s", `${short(traffic.bytes, "B")} so far`, series("bytes")),
  ]);
}

function troubles(report) {
  const list = [];
  for (const source of report.sources) {
    for (const outage of source.outages) list.push([source.name, `no news of ${outage.what} for ${age(outage.age)}: ${outage.why}; what was known stays`]);
    for (const one of source.rejected) list.push([`${source.name}: ${one.subject}`, one.message]);
  }
  for (const source of report.pending_sources) list.push([source, "has not listed everything yet; what was programmed for it stays"]);
  for (const one of report.refused) list.push([one.subject, one.message]);
  for (const one of report.problems) list.push([one.subject, one.message]);
  for (const one of report.nearly_full) list.push([one.subject, `nearly full: ${one.message}`]);
  for (const one of report.families_off) list.push([one.subject, `not served: ${one.message}`]);
  for (const one of report.xdp_refused) list.push([one.subject, `no XDP: ${one.message}`]);
  return list;
}

function showTroubles(report) {
  const list = troubles(report);
  at("trouble").hidden = list.length === 0;
  const shown = list.slice(0, 100).map(([subject, message]) => element("li", { children: [element("b", { text: subject }), ` ${message}`] }));
  if (list.length > 100) shown.push(element("li", { text: `and ${list.length - 100} more: shunt status` }));
  fill(at("trouble-list"), shown);
  return list.length;
}

function setState(text, kind) {
  setText("state", text);
  at("state").className = `pill ${kind}`;
}

const KINDS = { added: "good", up: "good", removed: "bad", down: "bad", changed: "warn", many: "" };

function showChanges(changes) {
  const rows = changes.map((change) => {
    const moment = new Date(change.at);
    const time = element("time", { text: moment.toLocaleTimeString("en-GB"), datetime: change.at, title: change.at });
    const what = element("span", { className: "what", children: [element("b", { text: change.service }), ` ${change.what}`] });
    return element("li", { children: [time, element("span", { className: `kind ${KINDS[change.kind] ?? ""}`, text: change.kind }), what] });
  });
  fill(at("changes"), rows.length ? rows : [element("li", { className: "empty", text: "Nothing has changed since the agent started." })]);
}

function showDrops(drops) {
  const rows = drops.map((drop) =>
    element("tr", {
      children: [
        element("td", { text: drop.reason.replaceAll("_", " ") }),
        element("td", { className: "number", text: drop.count.toLocaleString("en") }),
        element("td", { className: "number", text: rateText(drop.rate) }),
      ],
    }),
  );
  const none = element("tr", { children: [element("td", { className: "empty", colspan: "3", text: "Nothing was refused or dropped." })] });
  fill(at("drop-rows"), rows.length ? rows : [none]);
}

const COLUMNS = [
  { title: "Service", sort: "name" },
  { title: "Frontends" },
  { title: "Backends", sort: "backends", number: true },
  { title: "Connections/s", sort: "rate", number: true },
  { title: "Last minute", wide: true },
  { title: "Packets/s", sort: "packets", number: true, wide: true },
  { title: "Traffic/s", sort: "bytes", number: true, wide: true },
  { title: "Connections", sort: "connections", number: true },
  { title: "Refused", sort: "refused", number: true, wide: true },
];

const classes = (column) => [column.number ? "number" : "", column.wide ? "wide" : ""].join(" ").trim();

function showTitles() {
  const titles = COLUMNS.map((column) => {
    if (!column.sort) return element("th", { scope: "col", className: classes(column), text: column.title });
    const button = element("button", { type: "button", text: column.title, "data-key": `sort ${column.sort}` });
    button.addEventListener("click", () => {
      wanted.reverse = wanted.sort === column.sort ? !wanted.reverse : false;
      Object.assign(wanted, { sort: column.sort, offset: 0 });
      showTitles();
      refresh();
    });
    const title = element("th", { scope: "col", className: classes(column), children: [button] });
    if (wanted.sort === column.sort) title.setAttribute("aria-sort", (column.sort === "name") !== wanted.reverse ? "ascending" : "descending");
    return title;
  });
  fill(at("titles"), titles);
}

/** `kubernetes/default/web:http/TCP/IPv4` is shown as `default/web:http`, with the rest below. */
function nameParts(name) {
  const parts = name.split("/");
  if (parts.length < 5) return [name, ""];
  const [source, ...rest] = parts;
  const [proto, family] = rest.splice(-2);
  return [rest.join("/").replace(/:$/, ""), `${proto} ${family}, ${source}`];
}

function serviceRow(row) {
  const [name, origin] = nameParts(row.name);
  const button = element("button", { type: "button", className: "open", children: [element("span", { text: name })], "aria-expanded": String(opened.has(row.id)), "data-key": `row ${row.id}` });
  button.addEventListener("click", () => toggle(row.id));
  const frontends = row.frontends.slice(0, 4).map((frontend) => element("span", { className: "addr", text: frontend.replace(/^0\.0\.0\.0:|^\[::\]:/, "every node address:") }));
  if (row.frontends.length > 4) frontends.push(element("span", { className: "quiet", text: `+${row.frontends.length - 4}` }));
  const series = past.services.get(row.id) ?? [];
  const backends = row.backends ? element("span", { text: row.backends.toLocaleString("en") }) : element("span", { className: "bad", text: row.refusal ?? "none" });
  if (row.local) backends.append(element("span", { className: "quiet", text: ` (${row.local} here)` }));
  const cell = (column, children) => element("td", { className: classes(COLUMNS[column]), "data-title": COLUMNS[column].title, children });
  return element("tr", {
    className: "service",
    children: [
      cell(0, [button, element("div", { className: "origin", text: origin })]),
      cell(1, [element("div", { className: "addrs", children: frontends })]),
      cell(2, [backends]),
      cell(3, [rateText(row.rates?.connections)]),
      cell(4, [spark(series, "connections a second, the last minute")]),
      cell(5, [rateText(row.rates?.packets)]),
      cell(6, [row.rates ? short(Math.round(row.rates.bytes * 8), "bit") : "–"]),
      cell(7, [short(row.traffic.sockets + row.traffic.flows)]),
      cell(8, [row.traffic.refused ? element("span", { className: "bad", text: short(row.traffic.refused) }) : "0"]),
    ],
  });
}

function detailRow(backends) {
  const items = backends.map((backend) => {
    const item = element("li", { className: "addr", text: backend.address });
    if (backend.local) item.append(element("span", { className: "here", text: "this node" }));
    return item;
  });
  const content = items.length ? element("ul", { children: items }) : element("span", { className: "quiet", text: "No backend." });
  return element("tr", { className: "detail", children: [element("td", { colspan: String(COLUMNS.length), children: [content] })] });
}

function showServices(answer) {
  const shown = new Set(answer.rows.map((row) => row.id));
  for (const id of past.services.keys()) if (!shown.has(id)) past.services.delete(id);
  for (const row of answer.rows) {
    if (!past.services.has(row.id)) past.services.set(row.id, []);
    if (row.rates) remember(past.services.get(row.id), row.rates.connections);
  }
  const rows = answer.rows.flatMap((row) => (opened.has(row.id) ? [serviceRow(row), detailRow(opened.get(row.id))] : [serviceRow(row)]));
  const none = wanted.find ? "Nothing is called so, and no address holds this." : "No service is programmed yet.";
  const empty = element("tr", { children: [element("td", { className: "empty", colspan: String(COLUMNS.length), text: none })] });
  fill(at("rows"), rows.length ? rows : [empty]);
  setText("found", wanted.find ? `${answer.matched.toLocaleString("en")} of ${answer.total.toLocaleString("en")}` : answer.total.toLocaleString("en"));
  const last = Math.min(answer.offset + LIMIT, answer.matched);
  setText("place", answer.matched ? `${(answer.offset + 1).toLocaleString("en")}–${last.toLocaleString("en")} of ${answer.matched.toLocaleString("en")}` : "");
  at("first").disabled = at("back").disabled = answer.offset === 0;
  at("next").disabled = last >= answer.matched;
  document.querySelector(".pages").hidden = answer.matched <= LIMIT && answer.offset === 0;
  // Rows went away behind the page that is shown.
  if (answer.offset > 0 && answer.rows.length === 0) wanted.offset = 0;
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", credentials: "omit" });
  if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
  return answer.json();
}

async function toggle(id) {
  if (opened.has(id)) opened.delete(id);
  else opened.set(id, await ask(`api/v1/backends?service=${id}`).catch(() => []));
  refresh();
}

/** A click is not taken from under the pointer, nor a text from who selects it. */
let isPressed = false;
const isBusy = () => isPressed || !getSelection().isCollapsed;

async function showAll() {
  const question = new URLSearchParams({ find: wanted.find, sort: wanted.sort, reverse: wanted.reverse ? "1" : "0", offset: wanted.offset, limit: LIMIT });
  const [overview, services] = await Promise.all([ask("api/v1/overview"), ask(`api/v1/services?${question}`)]);
  for (const id of opened.keys()) opened.set(id, await ask(`api/v1/backends?service=${id}`).catch(() => []));
  if (isBusy()) return;
  setText("node", overview.node);
  document.title = `${overview.node} · Shunt`;
  setText("version", overview.version);
  setText("uptime", age((Date.now() - Date.parse(overview.started)) / 1000));
  setText("sources", overview.report.sources.map((source) => source.name).join(", ") || "none");
  const count = showTroubles(overview.report);
  if (!overview.report.ready) setState("not everything is programmed", "warn");
  else if (count) setState(`serving, ${count} need${count === 1 ? "s" : ""} attention`, "warn");
  else setState("serving", "good");
  showCards(overview);
  showDrops(overview.drops);
  showChanges(overview.changes);
  showServices(services);
  document.body.dataset.rounds = String(Number(document.body.dataset.rounds ?? 0) + 1);
}

let turn = null;
let again = false;

/** One round at a time; what is asked for meanwhile is one more round. */
async function refresh() {
  if (turn) {
    again = true;
    return;
  }
  turn = showAll().catch((error) => setState(error instanceof TypeError ? "the agent does not answer" : error.message, "bad"));
  await turn;
  turn = null;
  if (again) {
    again = false;
    refresh();
  }
}

let pause;
at("find").addEventListener("input", (event) => {
  clearTimeout(pause);
  pause = setTimeout(() => {
    Object.assign(wanted, { find: event.target.value, offset: 0 });
    refresh();
  }, 150);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== at("find")) {
    event.preventDefault();
    at("find").focus();
  }
});
const move = (offset) => {
  wanted.offset = Math.max(0, offset);
  refresh();
};
at("first").addEventListener("click", () => move(0));
at("back").addEventListener("click", () => move(wanted.offset - LIMIT));
at("next").addEventListener("click", () => move(wanted.offset + LIMIT));
document.addEventListener("visibilitychange", () => document.hidden || refresh());

document.addEventListener("pointerdown", () => (isPressed = true));
for (const end of ["pointerup", "pointercancel", "blur"]) window.addEventListener(end, () => (isPressed = false));

showTitles();
refresh();
setInterval(() => document.hidden || refresh(), PERIOD);
