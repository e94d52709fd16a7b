// A log distributor of the kind one writes in an afternoon: one process per core, packets checked and queued in memory,
// answered with 202, and sent on with axios to analyzers picked at random by weight.
//
// PORT; ANALYZERS: a JSON array of {url, weight}.
'use strict';

const cluster = require('node:cluster');
const { randomUUID } = require('node:crypto');
const http = require('node:http');
const os = require('node:os');

const axios = require('axios');
const express = require('express');
const helmet = require('helmet');

const PORT = Number(process.env.PORT || 3000);
const ANALYZERS = JSON.parse(process.env.ANALYZERS || '[]');
const MAX_IN_FLIGHT = 64; // per process
const MAX_QUEUE = 1_000_000;
const MAX_ATTEMPTS = 5;

function serve() {
  const total = ANALYZERS.reduce((sum, analyzer) => sum + analyzer.weight, 0);
  const agent = new http.Agent({ keepAlive: true, maxSockets: MAX_IN_FLIGHT });
  const client = axios.create({ httpAgent: agent, timeout: 5000, proxy: false });
  let queue = [];
  let next = 0; // in queue
  let inFlight = 0;

  function pick() {
    let left = Math.random() * total;
    return ANALYZERS.find((analyzer) => (left -= analyzer.weight) < 0) || ANALYZERS[0];
  }

  async function send(job) {
    try {
      await client.post(pick().url, job.packet, { headers: { 'X-Packet-Id': job.id } });
    } catch (error) {
      job.attempts += 1;
      if (job.attempts < MAX_ATTEMPTS) queue.push(job);
      else console.error(`packet ${job.id} given up: ${error.message}`);
    } finally {
      inFlight -= 1;
      pump();
    }
  }

  function pump() {
    while (inFlight < MAX_IN_FLIGHT && next < queue.length) {
      inFlight += 1;
      send(queue[next++]);
    }
    if (next > 10_000) {
      queue = queue.slice(next);
      next = 0;
    }
  }

  function isPacket(body) {
    return (
      typeof body?.emitterId === 'string' &&
      Array.isArray(body.messages) &&
      body.messages.length > 0 &&
      body.messages.every((message) => typeof message?.message === 'string')
    );
  }

  const app = express();
  app.use(helmet());
  app.use(express.json({ limit: '10mb' }));

  app.post('/logs', (request, response) => {
    if (!isPacket(request.body)) {
      response.status(400).json({ error: 'not a log packet' });
      return;
    }
    if (queue.length - next >= MAX_QUEUE) {
      response.status(503).json({ error: 'the queue is full' });
      return;
    }
    const id = randomUUID();
    queue.push({ id, packet: request.body, attempts: 0 });
    response.status(202).json({ status: 'accepted', packetId: id, messages: request.body.messages.length });
    setImmediate(pump);
  });

  app.get('/health', (request, response) => {
    response.json({ status: 'ok', queued: queue.length - next, inFlight });
  });

  app.listen(PORT, '127.0.0.1', 4096);
}

if (cluster.isPrimary) {
  for (let i = 0; i < os.cpus().length; i += 1) cluster.fork();
  cluster.on('exit', () => cluster.fork());
  process.on('SIGTERM', () => process.exit(0));
} else {
  serve();
}
