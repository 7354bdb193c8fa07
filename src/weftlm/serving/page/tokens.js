// A text as a row of tokens that can be pointed at and walked through.

import { make, shown } from "./dom.js";

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

  /** Colour every token: [class, strength from 0 to 1, what a screen reader is told]. */
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
