// What the banner says: a list of {level, title, text}, the worst first. Pure. No text here changes by the second, or a
// screen reader would never be silent; hence times of day and no ages.

import { Problem, Unreachable } from "./client.js";
import { clock, percent, several, words } from "./format.js";

const LEVELS = ["error", "warning", "info", "ok"];
const NEARLY_FULL = 0.8;
const LATELY = 60; // seconds
const NAMED = 3;

const names = (rows) => {
  const first = rows.slice(0, NAMED).map((row) => row.id ?? row);
  const others = rows.length - first.length;
  if (others > 0) return `${first.join(", ")} and ${several(others, "other")}`;
  return first.length > 1 ? `${first.slice(0, -1).join(", ")} and ${first.at(-1)}` : first.join("");
};

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const are = (rows) => (rows.length === 1 ? "is" : "are");

function ofAnalyzers(analyzers) {
  const offline = analyzers.filter((row) => row.state === "offline");
  const draining = analyzers.filter((row) => row.state === "draining");
  const paused = analyzers.filter((row) => row.pausedForSeconds && row.state === "online");
  const tried = analyzers.filter((row) => row.probation && row.state === "online");
  const someOnline = analyzers.some((row) => row.state === "online");
  const others = someOnline ? "Their share goes to the others." : "";
  const found = [];
  if (!someOnline) {
    found.push({
      level: "error",
      title: "No analyzer is online.",
      text: "Packets are accepted and queued until one comes back.",
    });
  }
  if (offline.length === 1) {
    const [row] = offline;
    const why = row.lastError ? ` Last error: ${sentence(row.lastError)}` : "";
    found.push({ level: "warning", title: `${row.id} is offline`, text: `since ${clock(row.since)}.${why}` });
  } else if (offline.length) {
    found.push({ level: "warning", title: `${names(offline)} are offline.`, text: others });
  }
  if (draining.length) {
    const text = draining.length === 1 ? "It gets no new packets." : "They get no new packets.";
    found.push({ level: "info", title: `${names(draining)} ${are(draining)} draining.`, text });
  }
  if (paused.length) {
    const title = `${names(paused)} ${are(paused)} paused,`;
    found.push({ level: "info", title, text: "as asked for by Retry-After." });
  }
  if (tried.length) {
    const title = `${names(tried)} ${are(tried)} on probation:`;
    found.push({ level: "info", title, text: "one packet at a time until one is taken." });
  }
  return found;
}

function ofWorkers({ running, configured }, workers) {
  if (running >= configured) return [];
  const missing = workers.filter((row) => row.state !== "running" && row.state !== "draining");
  const title = `${running} of ${several(configured, "worker")} ${running === 1 ? "is" : "are"} running.`;
  const text = missing.map((row) => `Worker ${row.id} is ${row.state}${row.lastError ? `: ${row.lastError}` : ""}.`);
  return [{ level: "warning", title, text: text.slice(0, NAMED).join(" ") }];
}

function ofQueue(queue, stats, history) {
  const found = [];
  const parts = queue.backend === "jetstream" ? [queue] : queue.workers;
  const fullest = Math.max(...parts.map((row) => (row.capacityBytes ? row.bytes / row.capacityBytes : 0)));
  if (fullest >= NEARLY_FULL) {
    const text = `${queue.backend === "jetstream" ? "The stream" : "A worker’s part"} is over ${percent(NEARLY_FULL).replace(".0", "")} full. Packets are refused once it is full.`;
    found.push({ level: "warning", title: "The queue is nearly full.", text });
  }
  if (history.growth((sample) => sample.dead, LATELY)) {
    const text = "fastdist dead-letters list says why.";
    found.push({ level: "warning", title: "Packets became dead letters within the last minute.", text });
  }
  const reasons = Object.keys(stats.rejected).filter((reason) => history.growth((sample) => sample.rejected[reason], LATELY));
  if (reasons.length) {
    found.push({
      level: "info",
      title: "Requests were rejected within the last minute:",
      text: `${reasons.map(words).join(", ")}.`,
    });
  }
  if (stats.packets.corrupt) {
    const text = "fastdist’s log says where.";
    found.push({ level: "info", title: "Damaged records of the queue were skipped.", text });
  }
  return found;
}

/** What the banner says about a service that responds. */
export function conditions({ health, ready, stats, queue, analyzers }, history) {
  const found = [...ofAnalyzers(analyzers), ...ofWorkers(health.workers, stats.workers), ...ofQueue(queue, stats, history)];
  if (ready.status === 503) {
    found.push({ level: "error", title: "No packets are taken.", text: sentence(capital(ready.detail)) });
  } else if (health.storage !== "ok") {
    found.push({ level: "error", title: "The queue’s storage fails.", text: "Packets are refused until it works again." });
  }
  if (health.failing?.length) {
    const text = `${capital(health.failing.map(words).join(", "))}: fastdist’s log says why.`;
    found.push({ level: "warning", title: "A part of the upkeep fails again and again.", text });
  }
  if (health.status !== "ok" && !found.some((each) => each.level === "error" || each.level === "warning")) {
    found.push({ level: "warning", title: `The service is ${health.status}.`, text: "" });
  }
  found.sort((one, other) => LEVELS.indexOf(one.level) - LEVELS.indexOf(other.level));
  if (!found.some((each) => each.level === "error" || each.level === "warning")) {
    const { online, total } = health.analyzers;
    const text = `${online} of ${several(total, "analyzer")} online, ${health.workers.running} of ${several(health.workers.configured, "worker")} running, packets are taken.`;
    found.unshift({ level: "ok", title: "All well.", text });
  }
  return found;
}

/** What the banner says without a response; `answered` is the Date of the last one, if there was one. */
export function silence(error, answered) {
  const why =
    error instanceof Unreachable
      ? "The service does not answer; it is asked again every second."
      : error instanceof Problem
        ? sentence(error.message)
        : "This page has failed; load it again.";
  const old = answered ? ` All figures are those of ${clock(answered)}.` : "";
  return [{ level: "error", title: answered ? "Disconnected." : "Not connected.", text: why + old }];
}
