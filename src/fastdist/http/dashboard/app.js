// The dashboard of fastdist: asks the service for its figures once a second, as long as the page is looked at, and
// draws them. No part of it writes markup: what comes from the service only ever becomes text.

import { Analyzers } from "./analyzers.js";
import { Chart } from "./chart.js";
import { Cancelled, change, everything, Problem, token, Unreachable } from "./client.js";
import { conditions, silence } from "./conditions.js";
import { deadLetters } from "./deadletters.js";
import { byId, icon, make, setAttribute, setText } from "./dom.js";
import { brief, clock, count, duration, rate } from "./format.js";
import { History, WINDOW } from "./history.js";
import * as panels from "./panels.js";

const PERIOD = 1000; // ms
const PATIENCE = 2500; // ms without an answer, and the page says so
const SHOWN = 6000; // ms that a message about something done stays

const history = new History();
const analyzers = new Analyzers(ask);
const perSecond = (value) => `${rate(value)}/s`;
const throughput = new Chart(byId("throughput"), byId("throughput-legend"), {
  name: "Throughput over the last five minutes",
  series: [
    { name: "in", look: "in", format: perSecond },
    { name: "out", look: "out", format: perSecond },
  ],
  drawn: 2,
  axis: brief,
});
const depth = new Chart(byId("depth"), byId("depth-legend"), {
  name: "Packets waiting over the last five minutes",
  series: [
    { name: "waiting", look: "waiting", format: count },
    { name: "oldest", format: duration },
  ],
  drawn: 1,
  axis: (value) => (Number.isInteger(value) ? brief(value) : ""),
  area: true,
});

let timer = 0;
let asking = false;
let answered = null; // when the last answer came
let version = null; // of the service that this page came from

// ---- looking

async function look() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  const begun = Date.now();
  const late = setTimeout(() => showSilence(new Unreachable("late")), PATIENCE);
  try {
    const documents = await everything();
    clearTimeout(late);
    answered = new Date();
    show(documents);
  } catch (error) {
    if (!(error instanceof Unreachable) && !(error instanceof Problem)) console.error(error);
    showSilence(error);
  } finally {
    clearTimeout(late);
    asking = false;
    if (!document.hidden) timer = setTimeout(look, Math.max(PERIOD - (Date.now() - begun), 50));
  }
}

function show(documents) {
  history.add(documents);
  panels.figures(documents);
  panels.latencies(documents.stats);
  panels.rejections(documents.stats);
  panels.fill(documents.queue);
  panels.stream(documents.stats);
  panels.protocols(documents, history);
  deadLetters(documents.deadLetters);
  panels.workers(documents);
  analyzers.update(documents.analyzers, history);
  drawCharts();
  version ??= documents.health.version;
  const found = conditions(documents);
  if (version !== documents.health.version) {
    found.push({ level: "info", title: "The service was upgraded.", text: "Load this page again to see all of it." });
  }
  showConditions(found);
  showLive("live", "live");
}

function drawCharts() {
  const points = history.throughput();
  throughput.draw(points);
  depth.draw(history.depth());
  const whole = points.filter((point) => point.values);
  const peak = (index) => perSecond(Math.max(...whole.map((point) => point.values[index])));
  const minutes = WINDOW / 60;
  setText(byId("throughput-note"), whole.length ? `Peaks seen here in the last ${minutes} minutes: in ${peak(0)}, out ${peak(1)}` : "");
}

function showSilence(error) {
  showConditions(silence(error, answered));
  showLive("silent", answered ? "disconnected" : "no answer");
}

function showLive(state, word) {
  byId("live").dataset.state = state;
  document.body.classList.toggle("stale", state === "silent");
  setText(byId("live-word"), word);
  setText(byId("live-time"), answered ? clock(answered) : "");
}

function showConditions(found) {
  const list = byId("conditions");
  const key = JSON.stringify(found);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  byId("banner").dataset.level = found[0].level;
  list.replaceChildren(
    ...found.map(({ level, title, text }) =>
      make("p", { class: "condition", "data-level": level }, icon(level), make("span", {}, make("b", {}, title), text ? ` ${text}` : "")),
    ),
  );
  const worst = found[0].level;
  document.title = worst === "ok" ? "fastdist" : `${found[0].title.replace(/[.,:]$/, "")} – fastdist`;
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (document.hidden) return;
  showLive("waiting", "updating"); // what is shown may be of long ago
  look();
});

// ---- changing

/** Ask for a change of an analyzer, say how that went, and return whether it was made. */
async function ask(id, method, wanted, done) {
  const path = `analyzers/${encodeURIComponent(id)}${method === "DELETE" ? "/override" : ""}`;
  try {
    await change(method, path, wanted, askForToken);
  } catch (error) {
    if (!(error instanceof Cancelled)) say("failed", `${id} was not changed: ${error instanceof Problem ? error.message : "the service does not answer"}.`);
    return false;
  } finally {
    showToken();
  }
  say("done", done);
  await look();
  return true;
}

let silencing = 0;

/** Say it where it is seen: what lies behind an open dialog is not. */
function say(kind, text) {
  clearTimeout(silencing);
  const within = byId("analyzer").open ? "analyzer-" : "";
  for (const element of document.querySelectorAll("[data-says]")) {
    const shown = element.id === within + kind;
    element.hidden = !shown;
    setText(element, shown ? text : "");
  }
  silencing = setTimeout(() => say("", ""), kind === "failed" ? 3 * SHOWN : SHOWN);
}

function askForToken(refused) {
  const [dialog, form, field] = [byId("token"), byId("token-form"), byId("token-value")];
  setText(byId("token-fault"), refused ? "The service does not know this token." : "");
  setAttribute(field, "aria-invalid", refused ? "true" : null);
  field.value = "";
  return new Promise((resolve) => {
    let given = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      given = field.value.trim();
      if (given) dialog.close();
      else setText(byId("token-fault"), "A token is needed.");
    };
    dialog.onclose = () => {
      field.value = "";
      resolve(given);
    };
    dialog.showModal();
    field.focus();
  });
}

function showToken() {
  byId("forget-token").hidden = token.get() === null;
}

byId("forget-token").addEventListener("click", () => {
  token.forget();
  showToken();
  say("done", "The admin token is forgotten.");
});

for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
}

setText(byId("where"), location.host);
showToken();
look();
