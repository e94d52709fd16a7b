// A line chart of the last minutes, drawn as SVG. Its legend shows the newest figures, or those at the cursor: the
// pointer sets it, or the arrow keys do (the chart is a slider over time, and says its values as one).

import { make, setAttribute, setText } from "./dom.js";
import { duration } from "./format.js";

const TOP = 10;
const BOTTOM = 24; // room for the times
const LEFT = 46; // room for the figures
const RIGHT = 8;
const STEPS = [1, 2, 2.5, 5, 10];
const GRID = 4; // lines at most
const SPANS = [60, 120, 300]; // seconds; the shortest that holds all there is
const FLAT = 1; // the least that the axis reaches up to
const KEYS = { ArrowLeft: 1, ArrowRight: -1, PageUp: 30, PageDown: -30 };

/** The distance of grid lines for values up to `most`. */
export function gridStep(most) {
  const rough = Math.max(most, FLAT) / GRID;
  const power = 10 ** Math.floor(Math.log10(rough));
  return STEPS.find((step) => step * power >= rough * 0.9999) * power;
}

const ago = (seconds) => (seconds < 1.5 ? "now" : `${duration(Math.round(seconds))} ago`);

export class Chart {
  /** `series`: [{name, look, format}], the first `drawn` of which have lines; `axis` writes the figures of the axis. */
  constructor(svg, legend, { name, series, drawn, axis, area }) {
    Object.assign(this, { svg, series, drawn, axis, area, points: [], cursor: null, width: 0, height: 0, span: SPANS[0] });
    this.cells = series.map(({ look, name: label }) => {
      const cell = make("dd");
      const sample = look && make(":svg", { class: "sample", "aria-hidden": "true", width: 20, height: 8 }, make(":path", { class: look, d: "M1 4h18" }));
      legend.append(make("div", {}, make("dt", {}, ...(sample ? [sample, " "] : []), label), cell));
      return cell;
    });
    this.when = make("dd");
    legend.append(make("div", { class: "when" }, make("dt", { class: "unseen" }, "When"), this.when));
    this.grid = make(":g", { class: "grid", "aria-hidden": "true" });
    this.lines = series.slice(0, drawn).map(({ look }) => make(":path", { class: look }));
    this.fills = area ? [make(":path", { class: "area" })] : [];
    this.rule = make(":line", { class: "rule", y1: TOP });
    this.dots = series.slice(0, drawn).map(({ look }) => make(":circle", { class: `dot ${look}`, r: 3.5 }));
    svg.append(this.grid, ...this.fills, ...this.lines, this.rule, ...this.dots);
    for (const [key, value] of Object.entries({ role: "slider", tabindex: 0, "aria-label": name, "aria-valuemax": 0 })) {
      svg.setAttribute(key, value);
    }
    svg.addEventListener("pointermove", (event) => this.point(this.secondsAt(event.clientX)));
    svg.addEventListener("pointerleave", () => this.point(null));
    svg.addEventListener("blur", () => this.point(null));
    svg.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.resize()).observe(svg);
  }

  resize() {
    this.width = this.svg.clientWidth;
    this.height = this.svg.clientHeight;
    this.svg.setAttribute("viewBox", `0 0 ${Math.max(this.width, 1)} ${Math.max(this.height, 1)}`);
    setAttribute(this.rule, "y2", this.height - BOTTOM);
    this.draw(this.points);
  }

  secondsAt(clientX) {
    const x = clientX - this.svg.getBoundingClientRect().left;
    return Math.min(Math.max(((this.width - RIGHT - x) / (this.width - LEFT - RIGHT)) * this.span, 0), this.span);
  }

  press(event) {
    const steps = { ...KEYS, Home: this.points[0]?.ago ?? 0, End: -this.span, Escape: null }[event.key];
    if (steps === undefined) return;
    event.preventDefault();
    this.point(steps === null ? null : Math.min(Math.max((this.cursor ?? 0) + steps, 0), this.points[0]?.ago ?? 0));
  }

  /** Show the figures of so many seconds ago; null: the newest. */
  point(seconds) {
    this.cursor = seconds;
    this.say(this.drawCursor());
  }

  x(seconds) {
    return this.width - RIGHT - (seconds / this.span) * (this.width - LEFT - RIGHT);
  }

  y(value) {
    return this.height - BOTTOM - (value / this.top) * (this.height - BOTTOM - TOP);
  }

  draw(points) {
    this.points = points;
    if (!this.width) return;
    const oldest = points[0]?.ago ?? 0;
    this.span = SPANS.find((span) => span >= oldest) ?? SPANS.at(-1);
    setAttribute(this.svg, "aria-valuemin", -this.span);
    const whole = points.filter((point) => point.values);
    const most = Math.max(0, ...whole.map((point) => Math.max(...point.values.slice(0, this.drawn))));
    const step = gridStep(most);
    this.top = Math.max(step * Math.ceil((most / step) * 0.9999), FLAT);
    this.drawGrid(step);
    this.lines.forEach((line, index) => line.setAttribute("d", this.path(index)));
    this.fills.forEach((fill) => fill.setAttribute("d", this.runs().map((run) => this.areaOf(run)).join("")));
    const point = this.drawCursor();
    if (this.svg !== document.activeElement) this.say(point);
  }

  /** Points in rows without a break. */
  runs() {
    const runs = [[]];
    for (const point of this.points) {
      if (point.values) runs.at(-1).push(point);
      else runs.push([]);
    }
    return runs.filter((run) => run.length);
  }

  place(point, index) {
    return `${this.x(point.ago).toFixed(1)} ${this.y(point.values[index]).toFixed(1)}`;
  }

  path(index) {
    return this.runs().map((run) => `M${run.map((point) => this.place(point, index)).join("L")}`).join("");
  }

  areaOf(run) {
    const floor = this.height - BOTTOM;
    return `M${this.x(run[0].ago).toFixed(1)} ${floor}L${run.map((point) => this.place(point, 0)).join("L")}V${floor}Z`;
  }

  drawGrid(step) {
    const part = this.span / (this.width > 420 ? 5 - (this.span < 300) : 2);
    const key = [this.width, this.height, this.top, step, this.span].join(" ");
    if (this.gridKey === key) return;
    this.gridKey = key;
    this.grid.replaceChildren();
    for (let value = 0; value <= this.top * 1.0001; value += step) {
      const y = this.y(value).toFixed(1);
      this.grid.append(make(":line", { x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }));
      this.grid.append(make(":text", { x: LEFT - 8, y, dy: "0.35em", "text-anchor": "end" }, this.axis(value)));
    }
    for (let seconds = 0; seconds <= this.span; seconds += part) {
      const anchor = seconds === 0 ? "end" : seconds === this.span ? "start" : "middle";
      const label = seconds ? `−${duration(seconds)}` : "now";
      this.grid.append(make(":text", { x: this.x(seconds).toFixed(1), y: this.height - 6, "text-anchor": anchor }, label));
    }
  }

  /** Show legend and cursor; return the point whose figures are shown. */
  drawCursor() {
    const whole = this.points.filter((point) => point.values);
    const pointed = this.cursor !== null;
    const point = pointed
      ? whole.reduce((best, each) => (Math.abs(each.ago - this.cursor) < Math.abs(best?.ago - this.cursor) ? each : best), whole[0])
      : whole.at(-1);
    const shown = Boolean(pointed && point && this.width);
    for (const mark of [this.rule, ...this.dots]) setAttribute(mark, "visibility", shown ? null : "hidden");
    this.series.forEach(({ format }, index) => setText(this.cells[index], point ? format(point.values[index]) : "–"));
    setText(this.when, point ? ago(point.ago) : "");
    if (shown) {
      const x = this.x(point.ago);
      setAttribute(this.rule, "x1", x);
      setAttribute(this.rule, "x2", x);
      this.dots.forEach((dot, index) => {
        setAttribute(dot, "cx", x);
        setAttribute(dot, "cy", this.y(point.values[index]));
      });
    }
    return point;
  }

  /** Update screen readers. Not by the second while they are here, only when the cursor moves. */
  say(point) {
    const values = this.series.map(({ name, format }, index) => `${name} ${point ? format(point.values[index]) : "–"}`);
    setAttribute(this.svg, "aria-valuenow", point ? -Math.round(point.ago) : 0);
    setAttribute(this.svg, "aria-valuetext", point ? `${ago(point.ago)}: ${values.join(", ")}` : "nothing yet");
  }
}
