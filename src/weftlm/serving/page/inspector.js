// The inspector's page: asks the server, and shows what it answers.

import { ask, keep } from "./api.js";
import { columns } from "./charts.js";
import { column } from "./detail.js";
import { byId, chance, fill, quoted, signed } from "./dom.js";
import * as legends from "./legend.js";
import * as address from "./state.js";
import { compare, costOf, totalsOf } from "./differences.js";
import { coloured, course, make, NO_EXPERT, palette, Pane, shares, unpack, usage, weightLegend } from "./trace.js";

const EXAMPLE = `def area(radius):
    """The area of a circle."""
    return 3.14159 * radius ** 2

A circle has the largest area of all figures with the same circumference.
`;
const SURPRISE = "surprise", CHANGE = "change", WORK = "work";

const models = new Map();
let state = address.read();
/** Answers of the server: {base, shown, views} of one model, or {pair}; null before the first look. */
let found = null;
/** How it is drawn: panes, charts, and what belongs to a place of the text. */
let drawn = null;
let only = null, job = null, again = null, made = null;

const el = Object.fromEntries(["ask", "model", "beside", "text", "look", "generate", "example", "length", "count", "temperature", "seed",
  "status", "about", "unlock", "key", "error", "result", "totals", "view", "without", "legend", "panes", "detail",
  "course", "usage", "leave", "costs"].map((id) => [id, byId(id)]));

// ------------------------------------------------------------------------------------------------------------- asking

/** Do one thing with the server; what was under way is given up. */
async function run(label, work) {
  job?.abort();
  const mine = job = new AbortController();
  again = () => run(label, work);
  el.error.hidden = true;
  el.text.removeAttribute("aria-invalid");
  el.status.textContent = label;
  document.body.setAttribute("aria-busy", "true");
  try {
    el.status.textContent = await work(mine.signal) ?? "";
  } catch (trouble) {
    if (mine.signal.aborted) return;
    el.status.textContent = "";
    clear();
    explain(trouble);
  } finally {
    if (job === mine) document.body.removeAttribute("aria-busy");
  }
}

/** Take old results away: they belong to another question. */
function clear() {
  found = drawn = null;
  el.result.hidden = true;
}

/** Whether the text can be looked at; says how much too long it is. */
function fits() {
  const most = models.get(el.model.value)?.max_characters ?? Infinity, size = [...el.text.value].length;
  el.length.hidden = size <= 0.9 * most;
  el.length.textContent = size > most
    ? `The text has ${size} characters, ${size - most} more than the ${most} that can be looked at; shorten it.`
    : `${size} of ${most} characters.`;
  el.length.classList.toggle("bad", size > most);
  if (size > most) el.text.setAttribute("aria-invalid", "true");
  else el.text.removeAttribute("aria-invalid");
  return size <= most;
}

function explain(trouble) {
  if (trouble.status === 401) {
    el.unlock.hidden = false;
    el.key.focus();
  }
  if (trouble.param === "text") el.text.setAttribute("aria-invalid", "true");
  el.error.textContent = trouble.message;
  el.error.hidden = false;
  if (trouble.status === undefined) throw trouble;
}

async function begin(signal) {
  const told = await ask("api/models", null, signal);
  models.clear();
  for (const one of told.models) models.set(one.name, one);
  fill(el.model, [...models.keys()].map((name) => [name, name]));
  return settle(signal);
}

/** Bring the form and the page to the state, asking where a text is given. */
async function settle(signal) {
  if (!models.size) return "This server serves no model.";
  if (!models.has(state.model)) state.model = models.keys().next().value;
  el.model.value = state.model;
  offer(state.beside);
  if (el.text.value !== state.text) el.text.value = state.text;
  return state.text ? inspect(signal) : "";
}

/** What can be chosen for the model at hand; a model beside it that is still there stays. */
function offer(beside = el.beside.value) {
  const facts = models.get(el.model.value);
  fill(el.beside, [["", "no other model"], ...[...models.keys()].filter((name) => name !== facts.name).map((name) => [name, name])]);
  el.beside.value = models.has(beside) && beside !== facts.name ? beside : "";
  el.beside.closest("label").hidden = models.size < 2;
  fits();
  const parts = {
    plain: ["one set of weights, no experts"],
    routed: [`${facts.experts.length} experts routed by ${facts.by}`],
    gated: [`${facts.experts.length} experts under the gate ${facts.by}`],
  }[facts.kind];
  el.about.textContent = [...parts, `up to ${facts.max_tokens} tokens`].join(" · ");
}

function take() {
  const text = el.text.value, model = el.model.value;
  if (model !== state.model || el.beside.value !== state.beside) Object.assign(state, { view: "", without: "" });
  if (text !== state.text) {
    state.at = 0;
    made = null;
  }
  Object.assign(state, { text, model, beside: el.beside.value });
  address.write(state, true);
}

function look() {
  if (!fits()) return clear();
  return run("Looking …", (signal) => {
    take();
    return inspect(signal);
  });
}

function generate() {
  if (!fits()) return null;
  for (const input of [el.count, el.temperature, el.seed]) if (!input.reportValidity()) return null;
  return run("Generating …", async (signal) => {
    const before = el.text.value;
    const { choices: [{ text }] } = await ask("v1/completions", {
      model: el.model.value, prompt: before, max_tokens: Number(el.count.value),
      temperature: Number(el.temperature.value), seed: Number(el.seed.value), add_special_tokens: false,
    }, signal);
    if (!text) return "The model ends the text here.";
    el.text.value = before + text;
    take();
    made = before.length;
    return inspect(signal);
  });
}

/** Ask about the state's text and draw the answer. */
async function inspect(signal) {
  const begun = performance.now();
  const { model, beside, text, without } = state;
  if (beside && models.has(beside)) {
    const a = await ask("api/inspect", { model, text }, signal);
    found = { pair: compare(a, await ask("api/inspect", { model: beside, text }, signal)) };
  } else {
    state.beside = "";
    const known = found?.base && found.base.model === model && found.text === text ? found.base : null;
    const base = known ?? await ask("api/inspect", { model, text }, signal);
    const shown = without ? await ask("api/inspect", { model, text, without }, signal) : base;
    found = { base, shown, text, views: viewsOf(shown) };
    if (!known) el.costs.replaceChildren();
  }
  only = null;
  el.result.hidden = false;
  draw();
  const seconds = (performance.now() - begun) / 1000;
  const count = found.pair ? found.pair.a.tokens.length : found.base.tokens.length;
  return `${count} tokens in ${seconds.toFixed(2)} s`;
}

/** The weights of each view, unpacked when drawn: `all` or `gate`, `layer:NAME`, and `module:NAME` if held one by one. */
function viewsOf({ kind, tokens, trace }) {
  const views = new Map();
  if (!trace) return views;
  const row = (text) => unpack(text, tokens.length, trace.experts.length);
  views.set(kind === "gated" ? "gate" : "all", () => row(trace.mean));
  if (kind === "routed") trace.layers.forEach((layer, place) => {
    const inside = trace.parts.filter((part) => part.layer === place);
    if (inside.length) views.set(`layer:${layer.name}`, () => averaged(inside.map((part) => row(trace.rows[part.row]))));
    if (trace.kind === "modules")
      for (const part of inside) views.set(`module:${layer.name}.${part.name}`, () => row(trace.rows[part.row]));
  });
  return views;
}

function averaged(rows) {
  const [first, ...others] = rows, weights = first.weights.map((value) => value / rows.length);
  for (const other of others) other.weights.forEach((value, place) => { weights[place] += value / rows.length; });
  return { ...first, weights };
}

// ------------------------------------------------------------------------------------------------------------ drawing

function draw() {
  if (found.pair) drawPair();
  else drawOne();
  const last = drawn.places - 1;
  state.at = Math.min(state.at, last);
  el.detail.classList.remove("chosen");
  drawn.settle(state.at);
  address.write(state);
}

/** On a narrow screen the details are shown below the text, once a token is chosen. */
const choose = () => el.detail.classList.add("chosen");

function weights(inspection, view) {
  const held = view();
  return { held, names: inspection.trace.experts, share: shares(held) };
}

/** The weights over the whole model; null for a plain one. */
function wholeWeights(inspection) {
  const [first] = viewsOf(inspection).values();
  return first ? weights(inspection, first) : null;
}

const surprise = (tokens) => tokens.map((token) => (token.logprob === null ? null : -token.logprob));

const surpriseColours = (values, most) => values.map((value) => (value === null ? [NO_EXPERT, 0] : ["xloss", value / most]));

const changeColours = (values, most) => values.map((value) =>
  value === null || Math.abs(value) < 5e-4 ? ["none", 0] : [value > 0 ? "xworse" : "xbetter", Math.abs(value) / most]);

function press(group) {
  only = only === group ? null : group;
  const place = [...el.legend.querySelectorAll("button")].indexOf(document.activeElement);
  draw();
  el.legend.querySelectorAll("button")[place]?.focus();
}

function drawOne() {
  const { base, shown, views } = found, facts = models.get(base.model);
  const off = shown.without;
  el.totals.replaceChildren(legends.losses(
    [[off ? "With all experts" : base.model, totalsOf(base.tokens)], ...(off ? [[`Without ${off}`, totalsOf(shown.tokens)]] : [])], [1, 0]));

  const { layers, parts, kind } = shown.trace ?? {};
  const work = base.kind === "routed"
    ? [["all", "experts, all modules"],
      ["Layers", layers.map((layer) => [`layer:${layer.name}`, layer.label])],
      ...(kind === "modules" ? layers : []).map((layer, place) => [`Modules of ${layer.label}`,
        parts.filter((part) => part.layer === place).map((part) => [`module:${layer.name}.${part.name}`, `${layer.label} ${part.name}`])])]
    : base.kind === "gated" ? [["gate", "experts, weighed by the gate"]] : [];
  fill(el.view, [...(off ? [[CHANGE, `what changes without ${off}`]] : []), ...work, [SURPRISE, "surprise"]]);
  const offered = [...el.view.options].map((option) => option.value);
  if (!offered.includes(state.view)) state.view = offered[0];
  el.view.value = state.view;
  byId("without-field").hidden = facts.experts.length < 2;
  fill(el.without, [["", "no expert"], ...facts.experts.map((name) => [name, name])]);
  el.without.value = off ?? "";

  const tokens = shown.tokens;
  const classes = palette([{ names: facts.experts, share: wholeWeights(base)?.share ?? [] }, { names: shown.trace?.experts ?? [], share: [] }]);
  const chosen = views.get(state.view) ?? views.get("all") ?? views.get("gate");
  const told = chosen ? weights(shown, chosen) : null;
  const change = off ? tokens.map((token, place) =>
    (token.logprob === null ? null : base.tokens[place].logprob - token.logprob)) : null;
  const loss = surprise(tokens);

  let colours, legend;
  if (state.view === CHANGE) {
    const most = legends.scaleOf(change, 0.05);
    colours = changeColours(change, most);
    legend = legends.changeRamp(most, `easier without ${off}`, `harder without ${off}`, "Change of each token's loss.");
  } else if (state.view === SURPRISE) {
    const most = legends.scaleOf(loss, 1);
    colours = surpriseColours(loss, most);
    legend = legends.surpriseRamp(most);
  } else {
    const one = coloured(told, classes, only);
    colours = one.colours;
    legend = weightLegend([told], classes, { only, tie: one.tie, press,
      unrouted: one.unrouted ? (base.kind === "gated" ? "context" : "base alone") : "" });
  }
  el.legend.replaceChildren(...legend);

  const pane = new Pane(`${tokens.length} tokens`, tokens.map((token) => token.text), { point, settle });
  pane.paint(colours);
  if (made !== null) pane.madeFrom(tokenAt(tokens, made));
  el.panes.replaceChildren(pane.box);

  const label = el.view.selectedOptions[0].textContent;
  const where = base.kind === "gated" ? "gate" : views.has(state.view) ? label.replace(/^experts, /, "") : "all modules";
  const charts = [];
  if (told) {
    const title = base.kind === "gated" ? "Weights of the gate" : `Shares of the experts, ${where}`;
    charts.push(course({ held: told.held, names: told.names, classes, exact: base.kind === "gated", label: title, only, go }));
  }
  charts.push(change ? columns({ values: change, label: `Change without ${off}`, unit: "nats", go })
    : columns({ values: loss, label: "Surprise", unit: "nats", go }));
  el.course.replaceChildren(...charts);
  byId("usage-section").hidden = base.kind !== "routed";
  el.usage.replaceChildren(...(base.kind === "routed" ? usage({ modules: shown.trace.modules, layers, names: shown.trace.experts, classes }) : []));
  byId("costs-section").hidden = facts.experts.length < 2;

  drawn = {
    places: tokens.length, classes,
    settle(place) {
      pane.mark(place, place + 1);
      this.point(place);
    },
    point(place) {
      charts.forEach((chart) => chart.point(place));
      el.detail.classList.remove("two");
      el.detail.replaceChildren(column({ tokens, first: place, last: place + 1, held: told?.held, names: told?.names, classes,
        where, without: off, before: off ? base.tokens : null }), ...(place === tokens.length - 1 ? [nextOf(shown)] : []));
    },
    focus: (place) => pane.go(place),
  };

  function go(token) {
    pane.go(token);
  }
  function settle(token) {
    choose();
    remember(token);
  }
  function point(token) {
    drawn.point(token ?? state.at);
  }
}

function nextOf(inspection) {
  return make("p", { class: "muted" }, "After the text, most likely: ",
    ...inspection.next.flatMap((guess, place) => [place ? ", " : "", make("code", {}, quoted(guess.text, 24)),
      ` ${chance(guess.logprob)}`]));
}

function tokenAt(tokens, offset) {
  let end = 0;
  return tokens.findIndex((token) => (end += token.text.length) > offset);
}

function drawPair() {
  const { a, b, segments, totals_a: totalsA, totals_b: totalsB } = found.pair, both = [a, b];
  el.totals.replaceChildren(legends.losses([[a.model, totalsA], [b.model, totalsB]], [0, 1]));
  fill(el.view, [[WORK, "experts at work"], [SURPRISE, "surprise"]]);
  if (![WORK, SURPRISE].includes(state.view)) state.view = both.some((one) => one.trace) ? WORK : SURPRISE;
  el.view.value = state.view;
  for (const id of ["without-field", "usage-section", "costs-section"]) byId(id).hidden = true;

  const told = both.map(wholeWeights);
  const classes = palette(told.filter(Boolean));
  const differences = segments.map((one) => (one.nats_a === null ? null : one.nats_a - one.nats_b));
  const most = legends.scaleOf(differences, 0.05), loudest = legends.scaleOf(both.flatMap((one) => surprise(one.tokens)), 1);
  const painted = both.map((one, place) => (told[place] && state.view === WORK ? coloured(told[place], classes, only)
    : { colours: surpriseColours(surprise(one.tokens), loudest) }));
  const working = told.filter((one) => one && state.view === WORK);
  el.legend.replaceChildren(...(working.length ? weightLegend(working, classes,
    { only, tie: painted.some((one) => one.tie), unrouted: painted.some((one) => one.unrouted) ? "context or base alone" : "", press,
      models: both.filter((_, place) => told[place]).map((one) => one.model) }) : []),
  ...(working.length < 2 ? legends.surpriseRamp(loudest) : []));

  const toSegment = both.map((one, place) => {
    const map = new Array(one.tokens.length);
    segments.forEach((segment, number) => {
      const [from, to] = place ? segment.b : segment.a;
      for (let token = from; token < to; token++) map[token] = number;
    });
    return map;
  });
  const split = new Pane("Difference of the two models", segments.map((one) => one.text), {
    point: (place) => drawn.point(place ?? state.at), settle: (place) => [choose(), drawn.settle(place, null)],
  });
  split.paint(changeColours(differences, most));
  const panes = both.map((one, place) => {
    const pane = new Pane(`Tokens of ${one.model}`, one.tokens.map((token) => token.text), {
      point: (token) => drawn.point(token === null ? state.at : toSegment[place][token]),
      settle: (token) => [choose(), drawn.settle(toSegment[place][token], pane)],
    });
    pane.paint(painted[place].colours);
    return pane;
  });
  el.panes.replaceChildren(
    make("div", { class: "pair" }, ...panes.map((pane, place) => make("div", {}, make("h3", {}, both[place].model), pane.box))),
    make("h3", {}, `${a.model} less ${b.model}`), split.box,
    make("div", { class: "legends" }, ...legends.changeRamp(most, `${a.model} predicts better`, `${b.model} predicts better`,
      "Difference of the losses of each piece of text.")));

  const go = (place) => split.go(place);
  const charts = [columns({ values: differences, label: `${a.model} less ${b.model}`, unit: "nats", go })];
  told.forEach((one, place) => {
    if (!one) return;
    const chart = course({ held: one.held, names: one.names, classes, exact: both[place].kind === "gated", only,
      label: `${both[place].model}: shares of the experts`, go: (token) => panes[place].go(token) });
    const { point } = chart;
    chart.point = (number) => point((place ? segments[number].b : segments[number].a)[0]);
    charts.push(chart);
  });
  el.course.replaceChildren(...charts);

  drawn = {
    places: segments.length, classes,
    settle(number, from = null) {
      remember(number);
      const segment = segments[number];
      split.mark(number, number + 1);
      panes.forEach((pane, place) => pane === from || pane.mark(...(place ? segment.b : segment.a)));
      this.point(number);
    },
    point(number) {
      const segment = segments[number], ranges = [segment.a, segment.b];
      panes.forEach((pane, place) => pane.hint(...ranges[place]));
      split.hint(number, number + 1);
      charts.forEach((chart) => chart.point(number));
      el.detail.classList.add("two");
      el.detail.replaceChildren(apart(segment, a.model, b.model), ...both.map((one, place) => column({
        title: one.model, tokens: one.tokens, first: ranges[place][0], last: ranges[place][1], held: told[place]?.held,
        names: told[place]?.names, classes, where: one.kind === "gated" ? "gate" : "all modules",
      })));
    },
    focus: go,
  };
}

function apart(segment, a, b) {
  if (segment.nats_a === null) return make("p", { class: "muted" }, "The first token is context; nothing is compared here.");
  const nats = segment.nats_a - segment.nats_b, size = new TextEncoder().encode(segment.text).length;
  const better = Math.abs(nats) < 5e-4 ? "Both predict it alike" : `${nats < 0 ? a : b} predicts it better`;
  return make("p", { class: "likelihood" }, make("code", {}, quoted(segment.text, 60)), ` ${better}: `,
    make("span", { class: `change ${nats > 0 ? "xworse" : "xbetter"}` }, `${signed(nats)} nats`),
    ` (${signed(legends.bits(nats, size))} bits per byte).`);
}

function remember(place) {
  state.at = place;
  address.write(state);
  if (!found.pair) drawn?.point(place);
}

// ------------------------------------------------------------------------------------------------------------- acting

// Following the link would put its own # in the place of what is looked at.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  el.text.focus();
});
el.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  look();
});
el.generate.addEventListener("click", generate);
el.text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (event.shiftKey) generate();
  else look();
});
el.text.addEventListener("input", fits);
el.example.addEventListener("click", () => {
  el.text.value = EXAMPLE;
  look();
});
for (const select of [el.model, el.beside]) select.addEventListener("change", () => {
  offer();
  if (found && el.text.value) look();
});
el.view.addEventListener("change", () => {
  state.view = el.view.value;
  only = null;
  draw();
});
el.without.addEventListener("change", () => switchOff(el.without.value));

function switchOff(name, at = state.at) {
  Object.assign(state, { without: name, view: name ? CHANGE : "", at });
  address.write(state, true);
  return run("Looking …", inspect);
}

el.leave.addEventListener("click", () => run("Leaving each expert out …", async (signal) => {
  const told = { totals: totalsOf(found.base.tokens), costs: [] };
  for (const name of models.get(found.base.model).experts) {
    el.status.textContent = `Leaving ${name} out …`;
    const rest = await ask("api/inspect", { model: found.base.model, text: found.text, without: name }, signal);
    told.costs.push(costOf(name, found.base, rest));
  }
  told.costs.sort((one, other) => other.change - one.change);
  el.costs.replaceChildren(legends.costs(told, found.base.tokens, drawn.classes, {
    off: (name) => switchOff(name),
    show: async (name, token) => {
      await switchOff(name, token);
      drawn.focus(token);
    },
  }));
  return "";
}));
el.unlock.addEventListener("submit", (event) => {
  event.preventDefault();
  keep(el.key.value);
  el.key.value = "";
  el.unlock.hidden = true;
  again?.();
});
window.addEventListener("popstate", () => {
  state = address.read();
  made = null;
  if (!state.text) clear();
  run("Looking …", settle);
});

// ------------------------------------------------------------------------------------------------------------- colours

run("", begin);
