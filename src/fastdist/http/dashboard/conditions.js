// What the banner says: a list of {level, title, text}, the worst first. Pure. It is the service's own list of what is
// wrong (`problems` of /health). No text here changes by the second, or a screen reader would never be silent; hence
// times of day and no ages.

import { Problem, Unreachable } from "./client.js";
import { clock, several } from "./format.js";

const LEVELS = { error: "error", warning: "warning", notice: "info" };
const NAMED = 3; // problems of one kind

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
// What is no word stays as it is: `queue.capacity`, `analyzers[1].weight`.
const capital = (text) => (/^\w+[.[]\w/.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1));

/** A problem of the service's list: "what: more of it". */
function condition({ level, since, detail }) {
  const at = detail.indexOf(": ");
  const what = at < 0 ? detail : detail.slice(0, at);
  const more = at < 0 ? "" : `${sentence(capital(detail.slice(at + 2)))} `;
  return { level: LEVELS[level] ?? "warning", title: sentence(capital(what)), text: `${more}Since ${clock(since)}.` };
}

function listed(problems) {
  const codes = [...new Set(problems.map((problem) => problem.code))];
  return codes.flatMap((code) => {
    const all = problems.filter((problem) => problem.code === code);
    const named = all.slice(0, all.length === NAMED + 1 ? all.length : NAMED).map(condition);
    const others = all.length - named.length;
    if (others) named.at(-1).text += ` And ${several(others, "more problem")} of this kind.`;
    return named;
  });
}

/** What the banner says about a service that responds. */
export function conditions({ health }) {
  const found = listed(health.problems);
  if (found.some(({ level }) => level !== "info")) return found;
  if (health.status !== "ok") return [{ level: "warning", title: `The service is ${health.status}.`, text: "" }, ...found];
  const { analyzers, workers } = health;
  const taken = health.problems.some(({ code }) => code === "service_draining") ? "" : ", packets are taken";
  const text = `${analyzers.online} of ${several(analyzers.total, "analyzer")} online, ${workers.running} of ${several(workers.configured, "worker")} running${taken}.`;
  return [{ level: "ok", title: "All well.", text }, ...found];
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
