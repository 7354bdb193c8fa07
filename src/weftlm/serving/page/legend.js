// What the colours of losses mean; and the tables of losses.

import { signed } from "./dom.js";
import { LEAST, make, NO_EXPERT } from "./trace.js";

/** Samples of a colour: [class, strength, text]. */
export function ramp(samples, note) {
  return [make("ul", { class: "legend", "aria-label": "Meaning of the colours" }, ...samples.map(([group, strength, text]) =>
    make("li", {}, make("span", { class: `t key ${group}`, "--a": Math.pow(strength, 0.6).toFixed(2) }, text)))),
  make("p", { class: "muted" }, note)];
}

export function surpriseRamp(most) {
  const samples = [0, 0.125, 0.25, 0.5, 1].map((part) => ["xloss", part, (part * most).toFixed(part * most < 1 && part ? 2 : 1)]);
  return ramp(samples, `Negative log-probability of each token, nats; ${most.toFixed(1)} and more in full colour.`);
}

export function changeRamp(most, less, more, note) {
  const number = (value) => signed(value, 2);
  return ramp([
    ["xbetter", 1, number(-most)], ["xbetter", 0.25, number(-most / 4)], ["none", 0, "0"],
    ["xworse", 0.25, number(most / 4)], ["xworse", 1, number(most)],
  ], `${note} Blue, dashed: ${less}. Orange, solid: ${more}. Nats; the ends in full colour.`);
}

/** The scale of a coloured quantity: 19 of 20 tokens lie within. */
export function scaleOf(values, least) {
  const sizes = values.filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  return Math.max(least, sizes.length ? sizes[Math.floor(0.95 * (sizes.length - 1))] : 0);
}

/** Losses: [name, totals], and differences between the first and the others. */
export function losses(rows, difference) {
  const cells = ({ tokens, bytes, nats }) => [
    String(tokens), nats.toFixed(2), tokens ? (nats / tokens).toFixed(4) : "–", bytes ? bits(nats, bytes).toFixed(4) : "–",
  ];
  const body = rows.map(([name, totals]) => make("tr", {}, make("th", { scope: "row" }, name),
    ...cells(totals).map((text) => make("td", {}, text))));
  if (rows.length > 1) {
    const [a, b] = difference.map((place) => rows[place][1]);
    const nats = a.nats - b.nats;
    const group = Math.abs(nats) < 5e-4 ? "" : nats > 0 ? "xworse" : "xbetter";
    body.push(make("tr", { class: "difference" }, make("th", { scope: "row" }, "Difference"), make("td", {}, ""),
      make("td", {}, make("span", { class: `change ${group}` }, signed(nats, 2))),
      make("td", {}, a.tokens === b.tokens && a.tokens ? signed(nats / a.tokens, 4) : "–"),
      make("td", {}, a.bytes ? signed(bits(nats, a.bytes), 4) : "–")));
  }
  const heads = ["", "Tokens scored", "Loss, nats", "Per token", "Bits per byte"];
  return make("table", {}, make("caption", { class: "unseen" }, "Loss of the text"),
    make("thead", {}, make("tr", {}, ...heads.map((head) => make(head ? "th" : "td", head ? { scope: "col" } : {}, head)))),
    make("tbody", {}, ...body));
}

export const bits = (nats, bytes) => nats / Math.LN2 / bytes;

/** What leaving each expert out costs. */
export function costs(told, tokens, classes, { off, show }) {
  const most = Math.max(...told.costs.map((cost) => Math.abs(cost.change)), 1e-9);
  const rows = told.costs.map((cost) => {
    const share = 50 * Math.abs(cost.change) / most, worse = cost.change >= 0;
    return make("tr", {},
      make("th", { scope: "row" }, make("span", { class: `swatch ${classes.get(cost.expert) ?? NO_EXPERT}` }), cost.expert),
      make("td", {}, signed(cost.change, 2)),
      make("td", {}, told.totals.bytes ? signed(bits(cost.change, told.totals.bytes), 4) : "–"),
      make("td", { class: "wide", "aria-hidden": "true" }, make("span", { class: "balance" },
        make("i", { class: worse ? "xworse" : "xbetter", "left%": worse ? 50 : 50 - share, "width%": share }))),
      make("td", { class: "text" }, cost.worst === null || cost.worst_change < LEAST ? "–"
        : make("button", { type: "button", class: "quiet", onclick: () => show(cost.expert, cost.worst) },
          make("code", {}, JSON.stringify(tokens[cost.worst].text)), ` ${signed(cost.worst_change, 2)}`)),
      make("td", {}, make("button", { type: "button", class: "quiet", onclick: () => off(cost.expert),
        "aria-label": `Switch off ${cost.expert}` }, "Switch off")));
  });
  const heads = ["Without", "Nats", "Bits per byte", "", "Hurts most", ""];
  return make("table", { class: "costs" },
    make("thead", {}, make("tr", {}, ...heads.map((head) => make(head ? "th" : "td", head ? { scope: "col" } : {}, head)))),
    make("tbody", {}, ...rows));
}
