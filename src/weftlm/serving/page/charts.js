// Charts along the text and by layer, drawn by hand as SVG.

import { make, percent, svg } from "./dom.js";
import { LEAST } from "./weights.js";

const HEIGHT = 100, POINTS = 600, LAYERS = 48;

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

/** One value per token as columns: upwards for more, downwards for less than nothing. */
export function columns({ values, label, unit, go }) {
  const count = values.length, known = values.filter((value) => value !== null);
  const high = Math.max(0, ...known), low = Math.min(0, ...known), span = high - low || 1;
  const y = (value) => HEIGHT * (high - value) / span;
  const path = { up: "", down: "" };
  values.forEach((value, token) => {
    if (value === null || value === 0) return;
    const [top, bottom] = value > 0 ? [y(value), y(0)] : [y(0), y(value)];
    path[value > 0 ? "up" : "down"] += `M${token + 0.06} ${top.toFixed(2)}h0.88V${bottom.toFixed(2)}h-0.88Z`;
  });
  const marks = [
    svg("path", { class: low < 0 ? "xworse" : "xloss", d: path.up || "M0 0" }),
    svg("path", { class: "xbetter", d: path.down || "M0 0" }),
    svg("line", { class: "zero", x1: 0, x2: count, y1: y(0), y2: y(0) }),
  ];
  const picture = plot(count, `0 0 ${count} ${HEIGHT}`, `${label}, from ${low.toFixed(2)} to ${high.toFixed(2)} ${unit}`, marks, go);
  return frame(picture, [high.toFixed(1), low < 0 ? low.toFixed(1) : "0"], count, `${label}, ${unit}`);
}

function plot(count, viewBox, label, marks, go) {
  const here = svg("line", { class: "here", x1: 0, x2: 0, y1: 0, y2: HEIGHT, visibility: "hidden" });
  const picture = svg("svg", { viewBox, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...marks, here);
  picture.addEventListener("click", (event) => {
    const area = picture.getBoundingClientRect();
    go(Math.max(0, Math.min(count - 1, Math.floor((event.clientX - area.left) / area.width * count))));
  });
  return picture;
}

function frame(picture, [top, bottom], count, label) {
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
  const table = make("table", { class: "usage" },
    make("thead", {}, make("tr", {}, ...["Layer", "Share of its work", "Most used"].map((head) => make("th", { scope: "col" }, head)))),
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
  const table = make("table", {},
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
