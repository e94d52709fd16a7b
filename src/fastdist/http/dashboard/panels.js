// The smaller parts of the page: figures by name, latencies, reasons of rejection, protocols, workers, the queue's fill.

import { byId, make, reconcile, setAttribute, setFacts, setState, setText } from "./dom.js";
import * as format from "./format.js";

const PERCENTILES = { p50: "p50 (median)", p90: "p90", p99: "p99", p999: "p99.9", max: "Longest" };
const LATENCIES = ["ingest", "queueWait", "delivery"]; // as the columns stand in the page
const LOOKS = { running: "ok", draining: "draining", starting: "starting", stopped: "error" };
const COLUMNS = ["Restarts", "CPU", "Memory", "Accepted", "Delivered", "Waiting", "Loop lag, max"];

/** Fill in every element with data-figure="document:path.of.members", written as data-as says (a count unless it does). */
export function figures(documents) {
  for (const element of document.querySelectorAll("[data-figure]")) {
    const [name, path] = element.dataset.figure.split(":");
    const value = path.split(".").reduce((member, key) => member?.[key], documents[name]);
    setText(element, format[element.dataset.as ?? "count"](value));
  }
}

export function latencies({ latencyMs }) {
  const body = byId("latencies");
  if (!body.firstChild) {
    const cells = () => LATENCIES.map((name) => make("td", { class: "number", "data-latency": name }));
    body.append(...Object.values(PERCENTILES).map((label) => make("tr", {}, make("th", { scope: "row" }, label), ...cells())));
  }
  Object.keys(PERCENTILES).forEach((percentile, row) => {
    LATENCIES.forEach((name, column) => {
      setText(body.children[row].children[column + 1], format.milliseconds(latencyMs[name][percentile]));
    });
  });
}

/** The reasons that occurred, the most frequent first. */
export function rejections({ rejected }) {
  const some = Object.entries(rejected).filter(([, number]) => number).sort((one, other) => other[1] - one[1]);
  setFacts(byId("reasons"), Object.fromEntries(some.map(([reason, number]) => [format.words(reason), format.count(number)])));
  byId("reasons").hidden = !some.length;
  setText(byId("rejected-most"), some.length ? `most: ${format.words(some[0][0])}` : "none so far");
}

export function fill({ bytes, capacityBytes }) {
  const part = capacityBytes ? Math.min(bytes / capacityBytes, 1) : 0;
  setAttribute(byId("fill"), "width", `${(part * 100).toFixed(1)}%`);
  setText(byId("fill-percent"), format.percent(part));
}

/** Whose figures those of the queue are, where it is a stream that replicas share. */
export function stream({ stream }) {
  const note = byId("stream-note");
  note.hidden = !stream;
  if (!stream) return;
  const leader = stream.leader ? `led by ${stream.leader}, ` : "";
  const where = stream.connected ? `through ${stream.server}` : "not connected to any server";
  setText(
    note,
    `All replicas share this queue: stream ${stream.name}, ${leader}${stream.replicas.current} of ${stream.replicas.total} copies current, ` +
      `${where}; ${format.count(stream.inFlight)} messages claimed, ${format.count(stream.deadLetters)} dead letters. The other figures are this replica’s own.`,
  );
}

const protocolRows = new Map();

/** The protocols of log agents in which there was a request, if any. */
export function protocols({ stats }, history) {
  const some = Object.entries(stats.protocols).filter(([, counts]) => counts.requests);
  byId("protocols-card").hidden = !some.length;
  reconcile(byId("protocols"), protocolRows, some, ([name]) => name, ([name]) => new ProtocolRow(name));
  for (const [name, counts] of some) protocolRows.get(name).update(counts, history.recordsOf(name));
}

class ProtocolRow {
  constructor(name) {
    this.rate = make("td", { class: "number" });
    this.counts = ["records", "requests", "refused"].map((member) => make("td", { class: "number", "data-count": member }));
    this.element = make("tr", { "data-protocol": name }, make("th", { scope: "row" }, name), this.rate, ...this.counts);
  }

  update(counts, rate) {
    setText(this.rate, format.rate(rate));
    for (const cell of this.counts) setText(cell, format.count(counts[cell.dataset.count]));
    setAttribute(this.counts.at(-1), "data-some", counts.refused ? "" : null);
  }
}

const rows = new Map();

export function workers({ stats, queue }) {
  const waiting = new Map(queue.workers.map((row) => [row.id, row.packets]));
  reconcile(byId("workers"), rows, stats.workers, (worker) => worker.id, (worker) => new WorkerRow(worker.id));
  for (const worker of stats.workers) rows.get(worker.id).update(worker, waiting.get(worker.id));
}

class WorkerRow {
  constructor(id) {
    this.pid = make("span", { class: "endpoint" });
    this.state = make("span", { class: "state" });
    this.error = make("span", { class: "lasterror" });
    this.cells = COLUMNS.map((label) => make("td", { role: "cell", class: "number", "data-label": label }, make("span")));
    this.element = make(
      "tr",
      { role: "row", "data-worker": id },
      make("th", { role: "rowheader", scope: "row" }, `Worker ${id}`, this.pid),
      make("td", { role: "cell", class: "condition-of", "data-label": "State" }, this.state, this.error),
      ...this.cells,
    );
  }

  update(worker, waiting) {
    setAttribute(this.element, "data-state", worker.state);
    setText(this.pid, worker.pid ? `pid ${worker.pid}` : "no process");
    setState(this.state, LOOKS[worker.state], worker.state.charAt(0).toUpperCase() + worker.state.slice(1));
    setText(this.error, worker.lastError ? `${format.clock(worker.lastErrorAt)} ${worker.lastError}` : "");
    this.error.hidden = !worker.lastError;
    const figures = [
      format.count(worker.restarts),
      `${worker.cpuPercent.toFixed(0)} %`,
      format.bytes(worker.rssBytes),
      format.count(worker.accepted),
      format.count(worker.delivered),
      format.count(waiting),
      format.milliseconds(worker.loopLagMs.max),
    ];
    this.cells.forEach((cell, index) => setText(cell.firstChild, figures[index]));
  }
}
