// The dead letters that are there: how many, by reason and analyzer, and the last of them. Never a packet.

import { byId, make, reconcile, setText } from "./dom.js";
import { bytes, clock, count, several, text } from "./format.js";

const kinds = new Map();
const rows = new Map();

/** Show them, if there are any; or if there were and were discarded. */
export function deadLetters({ packets, bytes: size, files, counts, discarded, last }) {
  const gone = discarded.maxBytes + discarded.maxAge;
  byId("dead-letters-card").hidden = !packets && !gone;
  const lost = gone ? `; ${count(gone)} discarded since the start, being over a bound` : "";
  setText(byId("dead-letters-note"), `${several(packets, "dead letter")} in ${several(files, "file")}, ${bytes(size)}${lost}`);
  const some = counts.filter((kind) => kind.packets);
  const keyOf = (kind) => `${kind.reason} ${kind.analyzer ?? ""}`;
  reconcile(byId("dead-letters-counts"), kinds, some, keyOf, (kind) => new Kind(kind));
  for (const kind of some) setText(kinds.get(keyOf(kind)).packets, count(kind.packets));
  reconcile(byId("dead-letters-last"), rows, last, (each) => `${each.id} ${each.deadLetteredAt}`, (each) => new Row(each));
}

class Kind {
  constructor({ reason, analyzer }) {
    this.packets = make("td", { class: "number", "data-count": "packets" });
    this.element = make(
      "tr",
      { "data-reason": reason },
      make("th", { scope: "row" }, reason),
      make("td", {}, text(analyzer)),
      this.packets,
    );
  }
}

class Row {
  constructor(each) {
    const cell = (shown, attributes = {}) => make("td", attributes, shown);
    this.element = make(
      "tr",
      { "data-packet": each.id },
      make("th", { scope: "row" }, each.id),
      cell(clock(each.deadLetteredAt)),
      cell(each.reason),
      cell(text(each.analyzer)),
      cell(text(each.error)),
      cell(count(each.attempts), { class: "number" }),
      cell(count(each.messages), { class: "number" }),
      cell(bytes(each.bytes), { class: "number" }),
    );
  }
}
