// The last minutes, as this page has seen them: a sample a second, and what two of them show.
// Times are the service's own (its uptime), so that a late or slow answer bends no rate.

export const WINDOW = 300; // seconds that are kept and drawn
const HOLE = 5; // seconds without a sample: the page was hidden, or had no answer; no line is drawn across
const RECENT = 10; // seconds over which the rate of an analyzer is taken

export class History {
  constructor() {
    this.samples = [];
  }

  /** Take in what everything() has brought. A service that was restarted begins again. */
  add({ stats, queue }) {
    const latest = this.samples.at(-1);
    if (latest && stats.uptimeSeconds < latest.at) this.samples = [];
    if (latest && stats.uptimeSeconds === latest.at) return;
    this.samples.push({
      at: stats.uptimeSeconds,
      accepted: stats.packets.accepted,
      delivered: stats.packets.delivered,
      waiting: stats.packets.queued,
      age: queue.oldestAgeSeconds,
      each: new Map(stats.analyzers.map((row) => [row.id, row.delivered])),
      records: new Map(Object.entries(stats.protocols).map(([name, counts]) => [name, counts.records])),
    });
    const since = stats.uptimeSeconds - WINDOW - 1;
    while (this.samples[0].at < since) this.samples.shift();
  }

  get latest() {
    return this.samples.at(-1);
  }

  /** The oldest sample of the last `seconds`. */
  since(seconds) {
    const from = this.latest.at - seconds;
    return this.samples.find((sample) => sample.at >= from);
  }

  /** Points of lines: {ago, values: [accepted/s, delivered/s]}; values null where a line is broken. */
  throughput() {
    return this.samples.slice(1).map((sample, index) => {
      const before = this.samples[index];
      const seconds = sample.at - before.at;
      const values =
        seconds > HOLE ? null : [(sample.accepted - before.accepted) / seconds, (sample.delivered - before.delivered) / seconds];
      return { ago: this.latest.at - sample.at, values: values?.map((value) => Math.max(value, 0)) ?? null };
    });
  }

  /** Points of {ago, values: [packets waiting, age of the oldest]}. */
  depth() {
    return this.samples.flatMap((sample, index) => {
      const point = { ago: this.latest.at - sample.at, values: [sample.waiting, sample.age] };
      const broken = index > 0 && sample.at - this.samples[index - 1].at > HOLE;
      return broken ? [{ ago: point.ago, values: null }, point] : [point];
    });
  }

  /** Packets a second that an analyzer has taken lately; null before there are two samples. */
  rateOf(id) {
    return this.rate((sample) => sample.each.get(id));
  }

  /** Records a second that were accepted lately in a protocol of log agents; null before there are two samples. */
  recordsOf(protocol) {
    return this.rate((sample) => sample.records.get(protocol));
  }

  /** How fast a count has grown lately; `pick` takes it out of a sample. */
  rate(pick) {
    const first = this.since(RECENT);
    const seconds = this.latest.at - first.at;
    if (seconds <= 0 || pick(first) === undefined) return null;
    return Math.max(pick(this.latest) - pick(first), 0) / seconds;
  }
}
