// Figures as people read them. Pure: numbers in, text out; what is not known (null, undefined) is a dash.

const NONE = "–";
const MINUS = "−";
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });
const small = new Intl.NumberFormat("en-US", { maximumFractionDigits: 2 });
const UNITS = ["KiB", "MiB", "GiB", "TiB"];

export const text = (value) => (value == null ? NONE : String(value));

export const count = (value) => (value == null ? NONE : whole.format(value));

/** A figure of an axis. */
export const brief = (value) => (value < 1 ? small : short).format(value);

export function rate(value) {
  if (value == null) return NONE;
  if (value === 0) return "0";
  if (value < 0.995) return value.toFixed(2);
  return value < 99.95 ? tenths.format(value) : whole.format(value);
}

export function bytes(value) {
  if (value == null) return NONE;
  if (value < 1024) return `${value} B`;
  let unit = -1;
  do {
    value /= 1024;
    unit += 1;
  } while (value >= 1023.95 && unit < UNITS.length - 1);
  return `${value < 99.95 ? tenths.format(value) : whole.format(value)} ${UNITS[unit]}`;
}

export function milliseconds(value) {
  if (value == null) return NONE;
  if (value < 0.9995) return `${whole.format(value * 1000)} µs`;
  if (value < 9.995) return `${value.toFixed(2)} ms`;
  if (value < 99.95) return `${value.toFixed(1)} ms`;
  return value < 999.5 ? `${whole.format(value)} ms` : duration(value / 1000);
}

export function duration(seconds) {
  if (seconds == null) return NONE;
  if (seconds < 0.0005) return "0 s";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${tenths.format(seconds)} s`;
  const rounded = Math.round(seconds);
  if (rounded < 60) return `${rounded} s`;
  if (rounded < 3600) return pair(Math.floor(rounded / 60), "min", rounded % 60, "s");
  if (rounded < 86_400) return pair(Math.floor(rounded / 3600), "h", Math.floor((rounded % 3600) / 60), "min");
  return pair(Math.floor(rounded / 86_400), "d", Math.floor((rounded % 86_400) / 3600), "h");
}

const pair = (large, unit, small, smaller) => `${large} ${unit}${small ? ` ${small} ${smaller}` : ""}`;

/** When the queue will be empty: null means never, as things are. */
export const estimate = (seconds) => (seconds == null ? "nothing is delivered" : duration(seconds));

export function percent(fraction) {
  if (fraction == null) return NONE;
  const value = fraction * 100;
  if (value === 0) return "0 %";
  return `${value < 0.095 ? value.toFixed(2) : value.toFixed(1)} %`;
}

/** The difference of two shares, in percentage points, with its sign. */
export function points(fraction) {
  const value = Math.abs(fraction * 100).toFixed(1);
  return `${value === "0.0" ? "±" : fraction < 0 ? MINUS : "+"}${value}`;
}

/** A weight as it was given: no digits are made up, and none are lost that matter. */
export const weight = (value) => (value == null ? NONE : String(Number(value.toPrecision(6))));

/** The time of day of a Date or an ISO time; with the date if it is another day's. */
export function clock(time) {
  if (time == null) return NONE;
  const moment = new Date(time);
  const day = moment.toDateString() === new Date().toDateString() ? "" : `${moment.toLocaleDateString("en-CA")} `;
  return day + moment.toLocaleTimeString("en-GB");
}

/** camelCase as words. */
export const words = (name) => name.replace(/[A-Z]/g, (capital) => ` ${capital.toLowerCase()}`);

export const several = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
