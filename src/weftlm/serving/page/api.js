// Questions to the server. Whatever goes wrong comes as Trouble, with words for the person.

const KEY = "weftlm-key";

export class Trouble extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

let key = null;
try {
  key = sessionStorage.getItem(KEY);
} catch { /* no storage: the key is kept until the page is left */ }

/** Send this key from now on; null for none. */
export function keep(given) {
  key = given;
  try {
    if (given === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, given);
  } catch { /* not kept */ }
}

export async function ask(path, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server does not answer. Is weftlm serve still running?");
  }
  const answer = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (response.ok && answer !== null) return answer;
  if (response.status === 401) keep(null);
  const told = answer?.error;
  const said = told?.message ?? `The server answered ${response.status} without saying why.`;
  throw new Trouble(sentence(said), {
    status: response.status, param: told?.param ?? null,
  });
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}
