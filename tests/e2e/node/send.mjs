// Logs what its standard input says, with clients for Node: `NAME FROM TO` are the numbers of records for one of them.
// Says on its standard output what each client was told, as JSON lines: {name, accepted, refused}.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import process from "node:process";

const [folder, port] = process.argv.slice(2);
const require = createRequire(`${folder}/package.json`);
const { Client } = require("@elastic/elasticsearch");
const pino = require("pino");
const { pinoLoki } = require("pino-loki");
const winston = require("winston");

const url = `http://127.0.0.1:${port}`;
const levels = ["debug", "info", "warn", "error"];
const levelOf = (number) => levels[number % 4];
const textOf = (name, number) => `${name}/${number} Zoë said "naïve" \\ 100 % <€>`;
const tell = (name, accepted, refused) => console.log(JSON.stringify({ name, accepted, refused }));
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Elasticsearch's helper, which reports a 429 and does not retry, in an application that does.
function elastic(name) {
  const client = new Client({ node: url });
  const document = (number) => ({
    "@timestamp": `2026-01-02T03:04:05.${String(number).padStart(6, "0")}Z`,
    message: textOf(name, number),
    log: { level: levelOf(number), logger: "cart" },
    logger: "cart",
    service: { name },
    number,
    user: { name: "Zoë" },
  });
  const send = async (numbers) => {
    for (let left = numbers; left.length; ) {
      const dropped = [];
      try {
        await client.helpers.bulk({
          datasource: left.map(document),
          onDocument: () => ({ create: { _index: "shop" } }),
          onDrop: (drop) => dropped.push(drop.document.number),
        });
        tell(name, left.filter((number) => !dropped.includes(number)), []);
        left = dropped;
      } catch {
        await pause(100);
      }
    }
  };
  let chain = Promise.resolve();
  return {
    log: (numbers) => (chain = chain.then(() => send(numbers))),
    finish: async () => {
      await chain;
      await client.close();
    },
  };
}

// pino-loki, which never retries; what it makes of a response is seen where it asks for it.
function loki(name) {
  const ask = globalThis.fetch;
  globalThis.fetch = async (...call) => {
    const numbers = [...call[1].body.matchAll(/\/(\d+) Zo/g)].map((found) => Number(found[1]));
    try {
      const response = await ask(...call);
      tell(name, response.ok ? numbers : [], response.ok ? [] : numbers);
      return response;
    } catch (error) {
      tell(name, [], numbers);
      throw error;
    }
  };
  const stream = pinoLoki({ host: url, batching: { interval: 0.1 }, labels: { job: "shop" }, silenceErrors: true });
  const logger = pino({ level: "debug", base: { hostname: name } }, stream);
  const ended = new Promise((resolve) => stream.on("close", resolve));
  return {
    log: (numbers) => {
      for (const number of numbers) {
        logger[levelOf(number)]({ meta: { number, user: "Zoë" } }, textOf(name, number));
      }
    },
    finish: async () => {
      stream.end();
      await ended;
    },
  };
}

// winston's own transport by HTTP, which never retries, and says of a failure only that there was one.
function http(name) {
  let told = 0;
  let sent = 0;
  const transport = new winston.transports.Http({ host: "127.0.0.1", port, path: "/ingest/shop" });
  transport.on("logged", (info) => {
    told += 1;
    tell(name, [info.number], []);
  });
  const logger = winston.createLogger({
    level: "debug",
    format: winston.format.combine(winston.format.timestamp(), winston.format.json()),
    defaultMeta: { host: name, user: "Zoë" },
    transports: [transport],
  });
  logger.on("warn", () => {});
  transport.on("warn", () => {
    told += 1;
    tell(name, [], [-1]);
  });
  return {
    log: (numbers) => {
      for (const number of numbers) {
        sent += 1;
        logger.log(levelOf(number), textOf(name, number), { number });
      }
    },
    finish: async () => {
      while (told < sent) await pause(10);
    },
  };
}

const clients = { "elastic-js": elastic("elastic-js"), "pino-loki": loki("pino-loki"), winston: http("winston") };
for await (const line of createInterface({ input: process.stdin })) {
  const [name, from, to] = line.split(" ");
  if (from === "finish") {
    clients[name].finish().then(() => console.log(JSON.stringify({ name, finished: true })));
  } else {
    clients[name].log(Array.from({ length: to - from }, (_, index) => Number(from) + index));
  }
}
process.exit(0);
