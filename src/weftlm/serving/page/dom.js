// The page's own elements and figures; those shared with the reports are in trace.js.

import { make, percent } from "./trace.js";

export const byId = (id) => document.getElementById(id);

/** The options of a select: [value, label], or [group, [options]]; keeps the choice where it still exists. */
export function fill(select, options) {
  const before = select.value;
  const option = ([value, label]) => make("option", { value }, label);
  select.replaceChildren(...options.map(([value, inside]) =>
    Array.isArray(inside) ? make("optgroup", { label: value }, ...inside.map(option)) : option([value, inside])));
  if ([...select.options].some((one) => one.value === before)) select.value = before;
}

/** A short text in quotes, for lists. */
export function quoted(text, limit = 40) {
  const cut = text.length > limit ? `${text.slice(0, limit - 1)}…` : text;
  return JSON.stringify(cut.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd"));
}

/** A probability from its logarithm; small ones as 1.3e-5. */
export function chance(logprob) {
  const value = Math.exp(logprob);
  return value >= 0.0005 ? percent(value) : value.toExponential(1).replace("-", "−");
}

/** A change with its sign; a true minus. */
export function signed(value, digits = 3) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return `±${text}`;
  return (value < 0 ? "−" : "+") + text;
}
