// What is looked at, kept in the address after the #, so that a view can be shared as a link.

const FIRST = { model: "", beside: "", text: "", view: "", without: "", at: 0 };

export function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const state = { ...FIRST };
  for (const key of Object.keys(FIRST)) if (given.has(key)) state[key] = given.get(key);
  state.at = Math.max(0, Math.floor(Number(state.at)) || 0);
  return state;
}

/** Write the state; `step` makes an entry of its own for the browser's back button. */
export function write(state, step = false) {
  const kept = new URLSearchParams();
  for (const [key, first] of Object.entries(FIRST)) if (state[key] !== first) kept.set(key, state[key]);
  const hash = `#${kept}`;
  if (hash === location.hash) return;
  history[step ? "pushState" : "replaceState"](null, "", hash);
}
