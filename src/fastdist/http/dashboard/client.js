// What is asked of the service: the figures, and changes. Addresses are relative to the page, so that it also works
// behind a proxy that has it below a path. The admin token is asked for when the service wants one, sent with changes
// only, and kept in this tab (sessionStorage) only.

const PATIENCE = 4000; // ms for an answer
const KEY = "fastdist-admin-token";

/** An unexpected response: `status`, and what the problem document says. */
export class Problem extends Error {
  constructor(status, document) {
    const faults = (document.errors ?? []).map((fault) => `${fault.pointer} ${fault.detail}`.trim());
    super([document.detail ?? `the service answered ${status}`, ...faults].join("; "));
    this.status = status;
  }
}

/** There was no answer. */
export class Unreachable extends Error {}

/** The change was given up: no token was given. */
export class Cancelled extends Error {}

async function exchange(path, options) {
  try {
    const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE), ...options });
    const body = await response.text();
    return { status: response.status, body: body.startsWith("{") ? JSON.parse(body) : {} };
  } catch (error) {
    throw new Unreachable(error.message);
  }
}

export async function get(path) {
  const { status, body } = await exchange(path, {});
  if (status !== 200 || !Object.keys(body).length) throw new Problem(status, { detail: `/${path} answered ${status}, and not as it should` });
  return body;
}

/** Everything the page shows, asked for side by side. */
export async function everything() {
  const [health, stats, queue, { analyzers }, deadLetters] = await Promise.all([
    get("health"),
    get("stats"),
    get("queue"),
    get("analyzers"),
    get("dead-letters"),
  ]);
  return { health, stats, queue, analyzers, deadLetters };
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  keep: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** A header takes bytes only: whatever was typed is sent as UTF-8, and it is for the service to refuse it. */
const bearer = (value) => `Bearer ${String.fromCharCode(...new TextEncoder().encode(value))}`;

/**
 * Ask for a change. `askForToken(refused)` resolves to a token, or to null; it is asked as long as the service answers
 * 401. Any other refusal is a Problem: where no token is configured, none would help.
 */
export async function change(method, path, wanted, askForToken) {
  for (;;) {
    const held = token.get();
    const headers = { "Content-Type": "application/json", ...(held && { Authorization: bearer(held) }) };
    const body = wanted === undefined ? undefined : JSON.stringify(wanted);
    const answer = await exchange(path, { method, headers, body });
    if (answer.status === 200) return answer.body;
    if (answer.status !== 401) throw new Problem(answer.status, answer.body);
    token.forget();
    const given = await askForToken(held !== null);
    if (!given) throw new Cancelled("no token was given");
    token.keep(given);
  }
}
