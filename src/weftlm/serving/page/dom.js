// Elements made by hand; what a model or a person wrote is set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element: `make("span", {class: "x", title: "y", onclick: f}, child, "text")`. */
export function make(name, attributes = {}, ...children) {
  return dress(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return dress(document.createElementNS(SVG, name), attributes, children);
}

function dress(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--") || key === "width%" || key === "left%" || key === "height%") measure(element, key, value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function measure(element, key, value) {
  if (key.startsWith("--")) element.style.setProperty(key, String(value));
  else element.style.setProperty(key.slice(0, -1), `${value}%`);
}

/** The options of a select: [value, label], or [group, [options]]; keeps the choice where it still exists. */
export function fill(select, options) {
  const before = select.value;
  const option = ([value, label]) => make("option", { value }, label);
  select.replaceChildren(...options.map(([value, inside]) =>
    Array.isArray(inside) ? make("optgroup", { label: value }, ...inside.map(option)) : option([value, inside])));
  if ([...select.options].some((one) => one.value === before)) select.value = before;
}

const MARKS = /(\r\n|\r|\n|\t| +)/;
const UNSEEN = /[\p{Cc}\p{Cs}\u202a-\u202e\u2066-\u2069]/gu;

/** A token's text as nodes: what has no shape of its own gets a pale mark, what would disturb the page U+FFFD. */
export function shown(text) {
  if (!text) return [mark("∅")];
  const nodes = [];
  for (const piece of text.split(MARKS)) {
    if (piece === "") continue;
    if (piece === "\n") nodes.push(mark("↵"), "\n");
    else if (piece === "\r") nodes.push(mark("␍"));
    else if (piece === "\r\n") nodes.push(mark("␍"), mark("↵"), "\n");
    else if (piece === "\t") nodes.push(mark("→", "\t"));
    else if (piece[0] === " " && (piece.length > 1 || !text.trim())) nodes.push(mark("·".repeat(piece.length), piece));
    else nodes.push(piece.replace(UNSEEN, "\ufffd"));
  }
  return nodes;
}

function mark(sign, over) {
  return make("i", { class: over ? "w over" : "w", "data-m": sign }, over);
}

/** A short text in quotes, for lists. */
export function quoted(text, limit = 40) {
  const cut = text.length > limit ? `${text.slice(0, limit - 1)}…` : text;
  return JSON.stringify(cut.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd"));
}

export const percent = (share) =>
  share >= 0.0995 ? `${Math.round(100 * share)}%`
    : share >= 0.0005 || share === 0 ? `${(100 * share).toFixed(1)}%` : "<0.1%";

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
