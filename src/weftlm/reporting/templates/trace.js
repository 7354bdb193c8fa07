// The chart of the expert or gate weight of each token: legend, coloured text, course along the text, usage by layer.
// Reports and `weftlm route trace --html` hold it with their data (blocks.html.j2, `show` at the end); the inspector
// imports its parts. What a model or a person wrote is set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

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

export const percent = (share) =>
  share >= 0.0995 ? `${Math.round(100 * share)}%`
    : share >= 0.0005 || share === 0 ? `${(100 * share).toFixed(1)}%` : "<0.1%";

const SCALE = 1000, COLOURS = 12, MEAN = "(mean of all)";
export const TIE = "xt", NO_EXPERT = "xb", OTHERS = "xo";
/** Weights below it are not shown. */
export const LEAST = 0.0005;

/** Weights of T tokens by E experts, from a list: per token how many, then expert and weight of each. */
export function unpack(list, count, experts) {
  const weights = new Float32Array(count * experts);
  let place = 0;
  for (let token = 0; token < count; token++)
    for (let left = list[place++]; left > 0; left--) {
      const expert = list[place++];
      weights[token * experts + expert] = list[place++] / SCALE;
    }
  return { weights, count, experts };
}

/** Mean weight of each expert over the tokens. */
export function shares({ weights, count, experts }) {
  const sums = new Array(experts).fill(0);
  for (let place = 0; place < weights.length; place++) sums[place % experts] += weights[place] / count;
  return sums;
}

/** A colour class by expert: twelve names at most have one of their own, those with the largest share. */
export function palette(lists) {
  const total = new Map();
  for (const { names, share } of lists)
    names.forEach((name, place) => total.set(name, (total.get(name) ?? 0) + (share[place] ?? 0)));
  const names = [...total.keys()].filter((name) => name !== MEAN);
  let own = names;
  if (names.length > COLOURS) {
    const most = [...names].sort((a, b) => total.get(b) - total.get(a)).slice(0, COLOURS - 1);
    own = names.filter((name) => most.includes(name));
  }
  const classes = new Map(names.map((name) => [name, own.includes(name) ? `x${own.indexOf(name)}` : OTHERS]));
  if (total.has(MEAN)) classes.set(MEAN, "xm");
  return classes;
}

/** Class and weight a token is coloured by: its leading expert's, or those of one class alone. */
export function leader(held, names, classes, token, only) {
  const own = held.weights.subarray(token * held.experts, (token + 1) * held.experts);
  if (only !== null) {
    let sum = 0;
    own.forEach((weight, expert) => { if (classes.get(names[expert]) === only) sum += weight; });
    return [sum >= LEAST ? only : "none", sum];
  }
  let best = 0;
  for (let expert = 1; expert < held.experts; expert++) if (own[expert] > own[best]) best = expert;
  if (!(own[best] >= LEAST)) return [NO_EXPERT, 0];
  const tied = own.some((weight, expert) => expert !== best && own[best] - weight < LEAST);
  return [tied ? TIE : classes.get(names[best]), own[best]];
}

/** How a model's tokens are coloured: {colours, tie, unrouted}. */
export function coloured({ held, names }, classes, only) {
  let tie = false, unrouted = false;
  const colours = [];
  for (let token = 0; token < held.count; token++) {
    const one = leader(held, names, classes, token, only);
    tie ||= one[0] === TIE;
    unrouted ||= one[0] === NO_EXPERT;
    colours.push(one);
  }
  return { colours, tie, unrouted };
}

/** The experts at work on a token: [name, weight], the largest first. */
export function atWork(held, names, token) {
  const found = [];
  for (let expert = 0; expert < held.experts; expert++) {
    const weight = held.weights[token * held.experts + expert];
    if (weight >= LEAST) found.push([names[expert], weight]);
  }
  return found.sort((a, b) => b[1] - a[1]);
}

export const HEIGHT = 100;
const POINTS = 600, LAYERS = 48;

/** Tokens a course is averaged over: odd, a 24th of the text, between 3 and 31; 1 for short texts. */
export function windowOf(count, exact) {
  if (exact && count <= POINTS) return 1;
  return count < 8 ? 1 : Math.min(31, Math.max(3, Math.floor(count / 24) | 1));
}

/** Classes in the order of a stack, with their experts. */
export function groups(names, classes) {
  const found = new Map();
  names.forEach((name, expert) => {
    const group = classes.get(name);
    if (!found.has(group)) found.set(group, []);
    found.get(group).push(expert);
  });
  const rank = (group) => (/^x\d+$/.test(group) ? Number(group.slice(1)) : group === "xm" ? 1000 : 1001);
  return new Map([...found].sort((a, b) => rank(a[0]) - rank(b[0])));
}

/** Shares of the experts along the text as stacked areas. */
export function course({ held, names, classes, exact, label, only, go }) {
  const { count, experts, weights } = held, width = windowOf(count, exact), half = width >> 1;
  const stride = Math.ceil(count / POINTS), places = [];
  for (let token = 0; token < count; token += stride) places.push(token);
  const x = [0, ...places.map((token) => token + 0.5), count];
  let below = x.map(() => 0);
  const paths = [];
  for (const [group, members] of groups(names, classes)) {
    const sums = new Float64Array(count + 1);
    for (let token = 0; token < count; token++) {
      let sum = 0;
      for (const expert of members) sum += weights[token * experts + expert];
      sums[token + 1] = sums[token] + sum;
    }
    if (sums[count] < LEAST) continue;
    const values = places.map((token) => {
      const low = Math.max(token - half, 0), high = Math.min(token + half + 1, count);
      return (sums[high] - sums[low]) / (high - low);
    });
    values.unshift(values[0]);
    values.push(values[values.length - 1]);
    const above = values.map((value, place) => Math.min(1, below[place] + value));
    const point = (place, line) => `${x[place]} ${(HEIGHT * (1 - line[place])).toFixed(2)}`;
    const order = x.map((_, place) => place), low = below;
    const d = `M${order.map((place) => point(place, above)).join("L")}L${
      order.reverse().map((place) => point(place, low)).join("L")}Z`;
    const told = members.length > 1 ? `${members.length} others` : names[members[0]];
    paths.push(svg("path", { class: `${group}${only !== null && only !== group ? " faded" : ""}`, d },
      svg("title", {}, `${told} ${percent(sums[count] / count)}`)));
    below = above;
  }
  const picture = plot(count, `0 0 ${count} ${HEIGHT}`, label, paths, go);
  const mean = width > 1 ? `, mean over ${width} tokens` : "";
  return frame(picture, ["1", "0"], count, `${label}${mean}`);
}

export function plot(count, viewBox, label, marks, go) {
  const here = svg("line", { class: "here", x1: 0, x2: 0, y1: 0, y2: HEIGHT, visibility: "hidden" });
  const picture = svg("svg", { viewBox, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...marks, here);
  picture.addEventListener("click", (event) => {
    const area = picture.getBoundingClientRect();
    go(Math.max(0, Math.min(count - 1, Math.floor((event.clientX - area.left) / area.width * count))));
  });
  return picture;
}

export function frame(picture, [top, bottom], count, label) {
  const here = picture.querySelector(".here");
  const chart = make("figure", { class: "chart" },
    make("figcaption", {}, label),
    make("div", { class: "plot" },
      make("div", { class: "scale", "aria-hidden": "true" }, make("span", {}, top), make("span", {}, bottom)), picture),
    make("div", { class: "axis", "aria-hidden": "true" }, make("span", {}, "token 0"), make("span", {}, String(count - 1))));
  chart.point = (token) => {
    here.setAttribute("visibility", token === null ? "hidden" : "visible");
    if (token !== null) for (const end of ["x1", "x2"]) here.setAttribute(end, token + 0.5);
  };
  return chart;
}

/** Usage of the experts in each layer as stacked bars, and the entropy of every module's usage as columns. */
export function usage({ modules, layers, names, classes }) {
  const stacks = groups(names, classes);
  const label = new Map(layers.map((layer) => [layer.name, layer.label]));
  const byLayer = new Map();
  for (const module of modules) {
    if (!byLayer.has(module.layer)) byLayer.set(module.layer, []);
    byLayer.get(module.layer).push(module);
  }
  const rows = [...byLayer].map(([layer, inside]) => {
    const mean = names.map((_, expert) => inside.reduce((sum, one) => sum + one.usage[expert], 0) / inside.length);
    const order = mean.map((_, expert) => expert).sort((a, b) => mean[b] - mean[a]).filter((expert) => mean[expert] >= LEAST);
    const said = order.map((expert) => `${names[expert]} ${percent(mean[expert])}`).join(", ") || "base alone";
    const pieces = [...stacks].map(([group, members]) => [group, members, members.reduce((sum, e) => sum + mean[e], 0)])
      .filter(([, , share]) => share >= LEAST)
      .map(([group, members, share]) => make("span", { class: group, "width%": (100 * share).toFixed(2),
        title: members.filter((e) => mean[e] >= LEAST).map((e) => `${names[e]} ${percent(mean[e])}`).join(", ") }));
    return make("tr", {},
      make("th", { scope: "row" }, label.get(layer) ?? layer),
      make("td", {}, make("span", { class: "bar", role: "img", "aria-label": said }, ...pieces)),
      make("td", {}, order.length ? `${names[order[0]]} ${percent(mean[order[0]])}` : "–"));
  });
  const table = make("table", { class: "usage" }, make("caption", {}, "Share of each expert in a layer's weight, mean over its modules and all tokens."),
    make("thead", {}, make("tr", {}, ...["Layer", "Share of its weight", "Most used"].map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows));
  return [make("div", { class: "scroll" }, table), ...entropy(modules, byLayer, label, names.length)];
}

function entropy(modules, byLayer, label, experts) {
  if (experts < 2 || !modules.length) return [];
  const most = Math.log(experts), values = modules.map((module) => module.entropy);
  const said = `Entropy of the usage of ${modules.length} modules, from ${Math.min(...values).toFixed(2)} to ${
    Math.max(...values).toFixed(2)} nats; ${most.toFixed(2)} where all experts work alike.`;
  const layers = [...byLayer].map(([layer, inside]) => make("div", { class: "layer", "--modules": inside.length },
    make("div", { class: "columns" }, ...inside.map((module) => make("span", {
      "height%": (100 * Math.min(1, module.entropy / most)).toFixed(1), title: `${module.name}: ${module.entropy.toFixed(3)} nats`,
    }))),
    make("div", { class: "below" }, byLayer.size <= LAYERS ? label.get(layer) ?? layer : "")));
  const table = make("table", {}, make("caption", {}, `Usage by module; ln ${experts} = ${most.toFixed(3)} nats.`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Module"), make("th", { scope: "col" }, "Entropy, nats"), make("th", { scope: "col" }, "Of the most"))),
    make("tbody", {}, ...modules.map((module) => make("tr", {}, make("th", { scope: "row" }, module.name),
      make("td", {}, module.entropy.toFixed(3)), make("td", {}, percent(module.entropy / most))))));
  return [
    make("h3", {}, "Entropy by module"),
    make("p", { class: "muted" }, "Low: a module keeps to few experts over this text. At the top: it uses all alike."),
    make("div", { class: "entropy", role: "img", "aria-label": said },
      make("div", { class: "most" }, `ln ${experts} = ${most.toFixed(2)} nats`), ...layers),
    make("details", {}, make("summary", {}, "All modules as a table"), make("div", { class: "scroll" }, table)),
  ];
}

const PAGE = 50;

export class Pane {
  /**
   * @param {string} label what the pane shows, for screen readers
   * @param {string[]} texts of the tokens
   * @param {{point: function(number|null), settle: function(number)}} told while the pointer is on a token (null: gone);
   *   when the cursor settles on one
   */
  constructor(label, texts, told) {
    this.told = told;
    this.at = 0;
    this.box = make("div", { class: "tokens", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
    this.spans = texts.map((text) => make("span", { class: "t", role: "option", tabindex: -1 }, ...shown(text)));
    this.number = new Map(this.spans.map((span, token) => [span, token]));
    this.marked = [];
    if (this.spans.length) this.spans[0].tabIndex = 0;
    this.box.append(...this.spans);
    this.box.addEventListener("mouseover", (event) => {
      const token = this.tokenOf(event);
      if (token !== undefined) this.told.point(token);
    });
    this.box.addEventListener("mouseleave", () => this.told.point(null));
    this.box.addEventListener("click", (event) => {
      const token = this.tokenOf(event);
      if (token !== undefined) this.go(token);
    });
    this.box.addEventListener("focusin", (event) => {
      const token = this.tokenOf(event);
      if (token !== undefined) this.settle(token);
    });
    this.box.addEventListener("keydown", (event) => this.walk(event));
  }

  tokenOf(event) {
    return this.number.get(event.target.closest(".t"));
  }

  /** Colour every token: [class, strength from 0 to 1, text for screen readers]. */
  paint(colours) {
    this.spans.forEach((span, token) => {
      const [group, strength] = colours[token];
      const kept = ["at", "with", "made"].filter((name) => span.classList.contains(name));
      span.className = ["t", group, ...kept].join(" ");
      span.style.setProperty("--a", Math.pow(Math.min(1, strength), 0.6).toFixed(2));
    });
  }

  /** Where what a model made begins. */
  madeFrom(token) {
    if (token > 0 && token < this.spans.length) this.spans[token].classList.add("made");
  }

  settle(token) {
    this.mark(token, token + 1);
    this.told.settle(token);
  }

  /** Put the cursor on tokens without taking the focus. */
  mark(from, to) {
    for (const span of this.marked) {
      span.classList.remove("at");
      span.removeAttribute("aria-selected");
    }
    this.spans[this.at].tabIndex = -1;
    this.at = Math.max(0, Math.min(this.spans.length - 1, from));
    this.spans[this.at].tabIndex = 0;
    this.marked = this.spans.slice(from, to);
    for (const span of this.marked) {
      span.classList.add("at");
      span.setAttribute("aria-selected", "true");
    }
  }

  /** Hint at tokens that belong to what another pane points at. */
  hint(from, to) {
    for (const span of this.hinted ?? []) span.classList.remove("with");
    this.hinted = this.spans.slice(from, to);
    for (const span of this.hinted) span.classList.add("with");
  }

  go(token) {
    this.spans[Math.max(0, Math.min(this.spans.length - 1, token))].focus();
  }

  walk(event) {
    const to = {
      ArrowRight: () => this.at + 1, ArrowLeft: () => this.at - 1,
      ArrowDown: () => this.line(1), ArrowUp: () => this.line(-1),
      Home: () => 0, End: () => this.spans.length - 1,
      PageDown: () => this.at + PAGE, PageUp: () => this.at - PAGE,
    }[event.key];
    if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.go(to());
  }

  /** The token above or below: the nearest across among those of the next line. */
  line(step) {
    const area = this.spans[this.at].getClientRects()[0], middle = (area.left + area.right) / 2;
    let top = null, best = this.at, away = Infinity;
    for (let token = this.at + step; token >= 0 && token < this.spans.length; token += step) {
      const other = this.spans[token].getClientRects()[0];
      if (Math.abs(other.top - area.top) < 4) continue;
      if (top === null) top = other.top;
      if (Math.abs(other.top - top) >= 4) break;
      const distance = Math.abs((other.left + other.right) / 2 - middle);
      if (distance < away) [best, away] = [token, distance];
    }
    return best;
  }
}

/**
 * Experts with their share of the work; pressing one shows its weight alone.
 * `held` are lists of {names, share}, one per model.
 */
export function weightLegend(held, classes, { only, tie, unrouted, press, models = [] }) {
  const rows = new Map();
  held.forEach(({ names, share }, place) => {
    for (const [group, members] of groups(names, classes)) {
      if (!rows.has(group)) rows.set(group, { names: new Set(), shares: held.map(() => null) });
      const row = rows.get(group);
      members.forEach((expert) => row.names.add(names[expert]));
      row.shares[place] = members.reduce((sum, expert) => sum + share[expert], 0);
    }
  });
  const largest = (row) => Math.max(...row.shares.map((share) => share ?? 0));
  const items = [...rows].sort((a, b) => (a[0] === "xo") - (b[0] === "xo") || largest(b[1]) - largest(a[1]))
    .map(([group, row]) => {
      const told = row.names.size > 1 ? `${row.names.size} others` : [...row.names][0];
      const share = row.shares.map((one) => (one === null ? "–" : percent(one))).join(" | ");
      return make("li", { class: group, title: [...row.names].join(", ") },
        make("button", { type: "button", "aria-pressed": String(only === group), onclick: () => press(group) },
          make("span", { class: "dot" }), make("span", {}, told), make("span", { class: "share" }, share)));
    });
  if (tie) items.push(plainItem(TIE, "several alike"));
  if (unrouted) items.push(plainItem(NO_EXPERT, unrouted));
  const hint = models.length > 1 ? `Shares: ${models.join(" | ")}. ` : "";
  return [make("ul", { class: "legend", "aria-label": "Experts and their share of the work" }, ...items),
    make("p", { class: "muted" }, `${hint}Colour: the expert with the largest weight; strength: that weight. Press an expert to see its weight alone.`)];
}

function plainItem(group, text) {
  return make("li", { class: group }, make("span", { class: "dot" }), make("span", {}, text));
}

export function bar(group, name, share, number, hit = false) {
  return make("li", { class: group },
    make("span", { class: "name", title: name }, name, hit ? make("span", { class: "hit" }, " in the text") : null),
    make("span", { class: "part", "aria-hidden": "true" }, make("i", { "width%": (100 * Math.min(1, share)).toFixed(1) })),
    make("span", { class: "number" }, number));
}

/** The experts of a token as bars, the largest weight first. */
export function workers(held, names, classes, token, none, limit = 14) {
  const working = atWork(held, names, token);
  const rows = working.slice(0, limit).map(([name, weight]) => bar(classes.get(name) ?? NO_EXPERT, name, weight, weight.toFixed(3)));
  if (working.length > limit) rows.push(make("li", { class: "muted" }, `and ${working.length - limit} with less`));
  if (!rows.length) rows.push(make("li", { class: "muted" }, none));
  return make("ul", { class: "bars" }, ...rows);
}

// ---------------------------------------------------------------------------------------- a trace that a page holds

/** Draw one trace in its place; `classes` are the colours by expert. */
function show(root, told, classes) {
  const names = told.experts, count = told.tokens.length, rows = new Map();
  const part = (name) => root.querySelector(`.${name}`);
  const tip = part("tip"), select = root.querySelector("select");
  let only = null, chart = null, held = null, view = "";

  const row = (number) => {
    if (!rows.has(number)) rows.set(number, unpack(told.rows[number], count, names.length));
    return rows.get(number);
  };
  const mean = (parts) => {
    if (parts.length === 1) return row(parts[0].row);
    const weights = new Float32Array(count * names.length);
    for (const one of parts) row(one.row).weights.forEach((value, place) => { weights[place] += value / parts.length; });
    return { weights, count, experts: names.length };
  };

  // Views: the mean over all modules; every layer; every module of a layer, where modules are held one by one.
  const views = [["all modules", unpack.bind(null, told.mean, count, names.length)]];
  const offered = [["per layer", []]];
  told.layers.forEach((layer, place) => {
    const inside = told.parts.filter((one) => one.layer === place);
    if (!inside.length) return;
    offered[0][1].push([layer.label, () => mean(inside)]);
    if (told.kind === "modules")
      offered.push([`modules of ${layer.label}`, inside.map((one) => [`${layer.label} ${one.name}`, () => mean([one])])]);
  });
  const option = ([name, weights]) => make("option", { value: views.push([name, weights]) - 1 }, name);
  select.append(make("option", { value: 0 }, views[0][0]));
  for (const [label, inside] of offered) if (inside.length) select.append(make("optgroup", { label }, ...inside.map(option)));
  select.closest("label").hidden = views.length === 1;

  const pane = new Pane(`${count} tokens coloured by expert`, told.tokens, {
    point: (token) => (token === null ? rest() : explain(token)), settle: explain,
  });
  part("tokens").replaceWith(pane.box);
  pane.box.addEventListener("focusout", rest);

  function explain(token) {
    chart.point(token);
    tip.replaceChildren(
      make("p", { class: "what" }, make("code", {}, JSON.stringify(told.tokens[token].replace(UNSEEN, "\ufffd"))),
        make("span", { class: "muted" }, `token ${token}`)),
      workers(held, names, classes, token, "the base alone", names.length), make("p", { class: "muted" }, view));
  }
  function rest() {
    if (pane.box.contains(document.activeElement)) return explain(pane.at);
    chart.point(null);
    return tip.replaceChildren(make("p", { class: "muted" }, "Point at a token, or walk with the arrow keys, to see its experts."));
  }
  function press(group) {
    only = only === group ? null : group;
    const pressed = [...part("key").querySelectorAll("button")].indexOf(document.activeElement);
    draw();
    part("key").querySelectorAll("button")[pressed]?.focus();
  }
  function draw() {
    const { colours, tie, unrouted } = coloured({ held, names }, classes, only), share = shares(held);
    const base = 1 - share.reduce((sum, one) => sum + one, 0);
    pane.paint(colours);
    part("key").replaceChildren(...weightLegend([{ names, share }], classes,
      { only, tie, unrouted: unrouted ? `base alone ${percent(Math.max(0, base))}` : "", press }));
    chart = course({ held, names, classes, exact: false, label: `Shares of the experts, ${view}`, only, go: (token) => pane.go(token) });
    part("course").replaceChildren(chart);
  }
  function look() {
    const [name, weights] = views[Number(select.value)];
    view = name;
    held = weights();
    draw();
  }
  select.addEventListener("change", look);
  look();
  tip.hidden = false;
  rest();
  part("usage").replaceChildren(...usage({ modules: told.modules, layers: told.layers, names, classes }));
}

/** An expert has one colour on the whole page; only where there are more experts than colours has each pool its own. */
function showAll(roots) {
  const held = roots.map((root) => {
    const told = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    return { root, told, names: told.experts, share: shares(unpack(told.mean, told.tokens.length, told.experts.length)) };
  });
  const few = new Set(held.flatMap((one) => one.names).filter((name) => name !== MEAN)).size <= COLOURS;
  for (const one of held) {
    const pool = held.filter((other) => few || String(other.names) === String(one.names));
    show(one.root, one.told, palette(pool));
  }
}

showAll([...document.querySelectorAll(".trace")]);
