// The table of analyzers: a row each, kept from one second to the next; what is looked for and in which order; and the
// dialog in which one of them is looked at closely and changed.

import { byId, make, reconcile, setAttribute, setFacts, setState, setText } from "./dom.js";
import { clock, count, milliseconds, percent, points, rate, several, weight } from "./format.js";

const MANY = 8; // from here on there is a search
const LOOKS = { online: "ok", draining: "draining", offline: "error" };
const SCALES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1];
const UNEVEN = 0.01; // a gap from here on, or from a tenth of the target on, is shown in another colour
const NOTABLE = 0.05; // by how much of its target another share for the moment has to differ to be shown
const FEW = 100; // packets: before that shares are noise
const LIST = [
  ["weight", "Weight"],
  ["rate", "Packets/s"],
  ["delivered", "Delivered"],
  ["failed", "Failed"],
  ["retried", "Retried"],
  ["inFlight", "In flight"],
  ["p50", "p50"],
  ["p99", "p99"],
];
const ORDERS = {
  state: (row) => ["offline", "draining", "online"].indexOf(row.state),
  gap: (row) => -Math.abs(row.actualShare - row.targetShare),
  failed: (row) => -row.failed,
  slow: (row) => -(row.latencyMs.p99 ?? -1),
};

const gapOf = (row) => row.actualShare - row.targetShare;
const label = (state) => state.charAt(0).toUpperCase() + state.slice(1);

/** Whether an analyzer has got so much more or less than its share that it should catch the eye. */
const isUneven = (row, total) => total >= FEW && Math.abs(gapOf(row)) > Math.max(UNEVEN, row.targetShare / 10);

/** What an override has changed, as words. */
export const overrideWords = ({ weight: changed, state }) =>
  [changed === undefined ? "" : `weight ${weight(changed)}`, state ?? ""].filter(Boolean).join(", ");

export class Analyzers {
  /** `ask(id, method, wanted, done)` has a change carried out and says how that went. */
  constructor(ask) {
    this.ask = ask;
    this.rows = new Map();
    this.list = [];
    for (const id of ["find", "order"]) byId(id).addEventListener("input", () => this.arrange());
    for (const radio of document.getElementsByName("state")) radio.addEventListener("change", () => this.arrange());
    this.dialog = new AnalyzerDialog(this);
  }

  update(list, history) {
    this.list = list;
    this.total = list.reduce((sum, row) => sum + row.delivered, 0);
    const largest = Math.max(...list.map((row) => Math.max(row.actualShare, row.targetShare)));
    this.scale = SCALES.find((scale) => scale >= Math.min(largest * 1.02, 1)) ?? 1;
    setText(byId("scale"), `0 to ${percent(this.scale).replace(".0", "")}`);
    this.rates = new Map(list.map((row) => [row.id, history.rateOf(row.id)]));
    this.countStates();
    this.arrange();
    this.dialog.update();
  }

  countStates() {
    const states = { all: this.list.length, online: 0, draining: 0, offline: 0 };
    for (const row of this.list) states[row.state] += 1;
    for (const [state, number] of Object.entries(states)) setText(document.querySelector(`[data-count=${state}]`), count(number));
    setText(byId("analyzers-note"), `${count(states.online)} of ${several(states.all, "analyzer")} online`);
    byId("tools").hidden = this.list.length <= MANY;
  }

  /** Show the rows that fit what is looked for, in the order that is wanted. */
  arrange() {
    const wanted = byId("find").value.trim().toLowerCase();
    const state = document.querySelector("[name=state]:checked").value;
    const searching = !byId("tools").hidden;
    const fits = (row) => !searching || ((!state || row.state === state) && `${row.id} ${row.endpoint}`.toLowerCase().includes(wanted));
    const order = searching && ORDERS[byId("order").value];
    const found = this.list.filter(fits);
    const body = byId("analyzers");
    if (order && body.matches(":hover, :focus-within")) found.sort(this.asTheyStand(body)); // nothing moves under a hand
    else if (order) found.sort((one, other) => order(one) - order(other));
    reconcile(body, this.rows, found, (row) => row.id, (row) => new Row(row.id, this));
    for (const row of found) this.rows.get(row.id).update(row);
    byId("none-found").hidden = found.length > 0;
  }

  asTheyStand(body) {
    const places = new Map([...body.children].map((element, index) => [element.dataset.analyzer, index]));
    const place = (row) => places.get(row.id) ?? places.size;
    return (one, other) => place(one) - place(other);
  }

  toggleDraining(row) {
    const drains = row.state === "draining";
    const done = drains ? `${row.id} takes packets again.` : `${row.id} is draining: it gets no new packets.`;
    return this.ask(row.id, "PATCH", { state: drains ? "online" : "draining" }, done);
  }

  clear(row) {
    return this.ask(row.id, "DELETE", undefined, `${row.id} is as configured again.`);
  }
}

/** One analyzer's row of the table. */
class Row {
  constructor(id, table) {
    const cell = (label, attributes, ...children) => make("td", { role: "cell", "data-label": label, ...attributes }, ...children);
    this.table = table;
    this.name = make("button", { type: "button", class: "name", "aria-haspopup": "dialog" }, id);
    this.endpoint = make("span", { class: "endpoint" });
    this.state = make("span", { class: "state" });
    this.since = make("span", { class: "since" });
    this.error = make("span", { class: "lasterror" });
    this.share = makeShare();
    this.cells = Object.fromEntries(LIST.map(([key, label]) => [key, cell(label, { class: "number" }, make("span"))]));
    this.weightOf = make("button", { type: "button", class: "plain weight", "aria-haspopup": "dialog" });
    this.cells.weight.replaceChildren(this.weightOf);
    this.override = make("span", { class: "override" }, make("span"), make("button", { type: "button", class: "plain", "aria-label": `Remove the override of ${id}` }, "Remove"));
    this.drain = make("button", { type: "button", class: "drain" });
    this.element = make(
      "tr",
      { role: "row", "data-analyzer": id },
      make("th", { role: "rowheader", scope: "row" }, this.name, this.endpoint),
      cell("State", { class: "condition-of" }, this.state, " ", this.since, this.error),
      cell("Share", { class: "share" }, this.share.bar, this.share.words, this.override),
      ...LIST.map(([key]) => this.cells[key]),
      cell("Change", { class: "change" }, this.drain),
    );
    this.name.addEventListener("click", () => table.dialog.open(this.data.id, "name"));
    this.weightOf.addEventListener("click", () => table.dialog.open(this.data.id, "weight"));
    this.drain.addEventListener("click", () => table.toggleDraining(this.data));
    this.override.lastChild.addEventListener("click", () => table.clear(this.data));
  }

  update(row) {
    this.data = row;
    setAttribute(this.element, "data-state", row.state);
    setText(this.endpoint, row.endpoint.replace(/^http:\/\//, ""));
    setAttribute(this.endpoint, "title", row.endpoint);
    setState(this.state, LOOKS[row.state], label(row.state));
    setText(this.since, sinceOf(row));
    setText(this.error, row.lastError ? `${clock(row.lastErrorAt)} ${row.lastError}` : "");
    setAttribute(this.error, "title", row.lastError);
    this.error.hidden = !row.lastError;
    updateShare(this.share, row, this.table);
    setText(this.weightOf, weight(row.weight));
    setAttribute(this.weightOf, "aria-label", `Weight of ${row.id}: ${weight(row.weight)}, change it`);
    if (!row.override && this.override.contains(document.activeElement)) this.name.focus();
    this.override.hidden = !row.override;
    if (row.override) setText(this.override.firstChild, `Override: ${overrideWords(row.override)}`);
    const figures = {
      rate: rate(this.table.rates.get(row.id)),
      delivered: count(row.delivered),
      failed: count(row.failed),
      retried: count(row.retried),
      inFlight: count(row.inFlight),
      p50: milliseconds(row.latencyMs.p50),
      p99: milliseconds(row.latencyMs.p99),
    };
    for (const [key, value] of Object.entries(figures)) setText(this.cells[key].firstChild, value);
    setAttribute(this.cells.failed, "data-some", row.failed ? "" : null);
    const drains = row.state === "draining";
    setText(this.drain, drains ? "Undrain" : "Drain");
    setAttribute(this.drain, "aria-label", `${drains ? "Undrain" : "Drain"} ${row.id}`);
  }
}

function sinceOf(row) {
  if (row.probation && row.state !== "draining") return "on probation: gets one packet at a time";
  if (row.pausedForSeconds && row.state === "online") return `paused for ${Math.ceil(row.pausedForSeconds)} s`;
  const failures = row.health.consecutiveFailures;
  if (row.state === "online" && failures) return `failed ${count(failures)} × in a row`;
  return row.since && row.state !== "draining" ? `since ${clock(row.since)}` : "";
}

function makeShare() {
  const part = (look) => make(":rect", { class: look, height: "100%" });
  const [actual, gap, target] = ["actual", "gap", "target"].map(part);
  for (const [key, value] of Object.entries({ y: 4, height: 10, rx: 2 })) actual.setAttribute(key, value);
  for (const [key, value] of Object.entries({ y: 4.75, height: 8.5 })) gap.setAttribute(key, value);
  target.setAttribute("width", 2);
  target.setAttribute("transform", "translate(-1)");
  const track = make(":rect", { class: "track", width: "100%", y: 4, height: 10, rx: 2 });
  const bar = make(":svg", { class: "bar", "aria-hidden": "true" }, track, actual, gap, target);
  const words = make("span", { class: "words" }, make("b"), make("span"), make("span", { class: "gap-words" }), make("span", { class: "effective" }));
  return { bar, actual, gap, target, words };
}

function updateShare({ bar, actual, gap, target, words }, row, { scale, total }) {
  const at = (share) => `${Math.min((share / scale) * 100, 100).toFixed(2)}%`;
  const [low, high] = [row.actualShare, row.targetShare].sort((one, other) => one - other);
  setAttribute(actual, "width", at(row.actualShare));
  setAttribute(gap, "x", at(low));
  setAttribute(gap, "width", at(high - low));
  setAttribute(target, "x", at(row.targetShare));
  setAttribute(bar, "data-gap", gapOf(row) < 0 ? "less" : "more");
  setAttribute(bar, "data-uneven", isUneven(row, total) ? "" : null);
  const [shown, wanted, difference, effective] = words.children;
  setText(shown, percent(row.actualShare));
  setText(wanted, ` of ${percent(row.targetShare)}`);
  setText(difference, total ? `${points(gapOf(row))} points` : "");
  const differs = Math.abs(row.effectiveShare - row.targetShare) > Math.max(0.0005, row.targetShare * NOTABLE);
  setText(effective, differs ? `gets ${percent(row.effectiveShare)} now` : "");
}

/** One analyzer: all that is known of it, its weight, draining, its override. */
class AnalyzerDialog {
  constructor(table) {
    this.table = table;
    this.element = byId("analyzer");
    this.weight = byId("weight");
    this.weight.addEventListener("input", () => this.preview());
    byId("weight-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.setWeight();
    });
    byId("analyzer-drain").addEventListener("click", () => this.table.toggleDraining(this.row));
    byId("analyzer-clear").addEventListener("click", () => this.table.clear(this.row));
  }

  get row() {
    return this.table.list.find((row) => row.id === this.id);
  }

  open(id, focus) {
    this.id = id;
    setText(byId("analyzer-title"), id);
    this.fill();
    this.update();
    this.element.showModal();
    if (focus === "weight") this.weight.select();
  }

  /** Put the weight in force into the field. */
  fill() {
    this.filled = this.weight.value = String(this.row.weight);
    setText(byId("weight-fault"), "");
    this.preview();
  }

  setWeight() {
    const value = this.weight.valueAsNumber;
    const fault = Number.isNaN(value) || value < 0 ? "A weight is a number, 0 or more." : "";
    setText(byId("weight-fault"), fault);
    setAttribute(this.weight, "aria-invalid", fault ? "true" : null);
    if (fault) {
      this.weight.focus();
      return;
    }
    this.table.ask(this.id, "PATCH", { weight: value }, `${this.id} has the weight ${weight(value)} now.`);
  }

  /** Say what share the weight in the field would be. */
  preview() {
    const value = this.weight.valueAsNumber;
    const others = this.table.list.filter((row) => row.id !== this.id).reduce((sum, row) => sum + row.weight, 0);
    const share = value + others > 0 ? value / (value + others) : null;
    const known = share !== null && !Number.isNaN(share) && value >= 0;
    setText(byId("weight-share"), known ? `A target share of ${percent(share)}; it is ${percent(this.row.targetShare)} now.` : "");
  }

  update() {
    if (!this.id) return;
    const { row } = this;
    if (!row) {
      this.element.close();
      return;
    }
    if (this.weight.value === this.filled && this.filled !== String(row.weight)) this.fill(); // changed by others
    setState(byId("analyzer-state"), LOOKS[row.state], [label(row.state), sinceOf(row)].filter(Boolean).join(" "));
    setText(byId("analyzer-drain"), row.state === "draining" ? "Undrain" : "Drain");
    const clear = byId("analyzer-clear");
    if (!row.override && clear === document.activeElement) byId("analyzer-drain").focus();
    clear.hidden = !row.override;
    const { health, latencyMs } = row;
    const check = health.lastCheck && `${clock(health.lastCheck)}, ${health.lastStatus ? `status ${health.lastStatus}` : "no reply"}`;
    setFacts(byId("analyzer-facts"), {
      Endpoint: row.endpoint,
      "Last check": check ?? "none yet",
      "In a row": `${count(health.consecutiveSuccesses)} checks succeeded, ${count(health.consecutiveFailures)} failures`,
      "Last error": row.lastError ? `${clock(row.lastErrorAt)} ${row.lastError}` : "none",
      "Share": `actual ${percent(row.actualShare)}, target ${percent(row.targetShare)}, now ${percent(row.effectiveShare)}`,
      Override: row.override ? overrideWords(row.override) : "none",
      Packets: `${count(row.delivered)} delivered, ${count(row.failed)} failed, ${count(row.retried)} retried`,
      Connections: `${count(row.connections)}, with ${several(row.inFlight, "packet")} in flight`,
      Latency: ["p50", "p90", "p99", "p999", "max"].map((name) => `${name.replace("999", "99.9")} ${milliseconds(latencyMs[name])}`).join(", "),
    });
  }
}
