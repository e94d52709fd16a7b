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
    const cell = (label, shown, look) => make("td", { role: "cell", class: look, "data-label": label }, shown);
    this.element = make(
      "tr",
      { role: "row", "data-packet": each.id },
      make("th", { role: "rowheader", scope: "row" }, each.id),
      cell("Given up", clock(each.deadLetteredAt)),
      cell("Reason", each.reason),
      cell("Analyzer", text(each.analyzer)),
      cell("Error", text(each.error)),
      cell("Attempts", count(each.attempts), "number"),
      cell("Messages", count(each.messages), "number"),
      cell("Size", bytes(each.bytes), "number"),
    );
  }
}
