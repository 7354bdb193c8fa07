// What is known of one token: its experts, its probability, and the alternatives.

import { chance, quoted, signed } from "./dom.js";
import { bar, make, workers } from "./trace.js";

/**
 * One column: a token (or the piece of text) of one model.
 * `told` is {title, tokens, first, last, held, names, classes, where, before}: tokens first..last-1 are meant;
 * `before` are the same model's tokens with all experts, where one is switched off.
 */
export function column(told) {
  const { tokens, first, last } = told;
  const parts = [];
  if (told.title) parts.push(make("h3", {}, told.title));
  for (let token = first; token < last; token++) {
    if (token - first >= 6) {
      parts.push(make("p", { class: "muted" }, `and ${last - token} more tokens`));
      break;
    }
    parts.push(...one(told, token, last - first > 1));
  }
  return make("div", { class: "column" }, ...parts);
}

function one(told, token, several) {
  const facts = told.tokens[token], before = told.before?.[token];
  const parts = [
    make("p", { class: "what" }, make("code", {}, quoted(facts.text, 60)),
      make("span", { class: "muted" }, `token ${token}, id ${facts.id}`)),
    likelihood(facts, before, told.without),
  ];
  if (told.held) parts.push(make("div", {}, ...experts(told, token)));
  if (facts.top.length && !several) {
    const likely = [make("h4", {}, before ? `Most likely here without ${told.without}` : "Most likely here"), guesses(facts)];
    if (before) likely.push(make("h4", {}, "With all experts"), guesses(before));
    parts.push(make("div", {}, ...likely));
  }
  return parts;
}

function likelihood(facts, before, without) {
  if (facts.logprob === null) return make("p", { class: "muted" }, "The first token is context; nothing is predicted of it.");
  const line = make("p", { class: "likelihood" },
    make("b", {}, `${(-facts.logprob).toFixed(3)} nats`), ` of surprise, probability ${chance(facts.logprob)}`);
  if (before && before.logprob !== null) {
    const change = before.logprob - facts.logprob;
    line.append(make("span", { class: `change ${change > 0 ? "xworse" : "xbetter"}` },
      `${signed(change)} without ${without}`));
  }
  return line;
}

function experts(told, token) {
  const gate = told.where === "gate";
  return [make("h4", {}, gate ? "Experts, weighed by the gate" : `Experts, ${told.where}`),
    workers(told.held, told.names, told.classes, token, gate ? "no gate yet: it is context" : "the base worked alone")];
}

function guesses(facts) {
  return make("ul", { class: "bars" }, ...facts.top.map((guess) =>
    bar(guess.id === facts.id ? "xhit" : "xguess", quoted(guess.text, 24), Math.exp(guess.logprob),
      chance(guess.logprob), guess.id === facts.id)));
}
