// The experts' weights as the server packs them, and who has which colour.

const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
const VALUE = new Map([...DIGITS].map((digit, value) => [digit, value]));
const SCALE = 1000, COLOURS = 12, MEAN = "(mean of all)";
export const TIE = "xt", NOBODY = "xb", OTHERS = "xo";
/** Weights below it are not shown. */
export const LEAST = 0.0005;

/** Weights of T tokens by E experts: per token how many, then expert and weight of each. */
export function unpack(text, count, experts) {
  const weights = new Float32Array(count * experts), digits = experts < 64 ? 1 : 2;
  let place = 0;
  const take = (length) => {
    let value = 0;
    while (length--) value = 64 * value + VALUE.get(text[place++]);
    return value;
  };
  for (let token = 0; token < count; token++)
    for (let left = take(digits); left > 0; left--) {
      const expert = take(digits);
      weights[token * experts + expert] = take(2) / SCALE;
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
  if (!(own[best] >= LEAST)) return [NOBODY, 0];
  const tied = own.some((weight, expert) => expert !== best && own[best] - weight < LEAST);
  return [tied ? TIE : classes.get(names[best]), own[best]];
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
