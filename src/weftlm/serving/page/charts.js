// One value per token along the text, as columns.

import { frame, HEIGHT, plot, svg } from "./trace.js";

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
