// Differences of two inspections of one text: of two models, or with and without an expert.

const nats = (tokens) =>
  (tokens.some((token) => token.logprob === null) ? null : -tokens.reduce((sum, token) => sum + token.logprob, 0));

const bytes = (text) => new TextEncoder().encode(text).length;

/** Loss of a text: tokens scored, their bytes, and the sum of their losses. */
export function totalsOf(tokens) {
  const scored = tokens.filter((token) => token.logprob !== null);
  return {
    tokens: scored.length,
    bytes: bytes(scored.map((token) => token.text).join("")),
    nats: -scored.reduce((sum, token) => sum + token.logprob, 0),
  };
}

/** Where in the text each token ends. */
function ends(tokens) {
  let end = 0;
  return tokens.map((token) => (end += token.text.length));
}

/** The first token that ends beyond a place of the text. */
function after(ends, place) {
  const token = ends.findIndex((end) => end > place);
  return token < 0 ? ends.length : token;
}

/**
 * Two models on one text, in segments: the pieces between two places where tokens of both end. Losses are null where a
 * token is not scored; the totals are over the segments both score.
 */
export function compare(a, b) {
  const text = a.tokens.map((token) => token.text).join(""), endsA = ends(a.tokens), endsB = ends(b.tokens);
  const segments = [];
  let start = 0, fromA = 0, fromB = 0;
  for (const end of [...new Set(endsA)].filter((one) => one > 0 && endsB.includes(one))) {
    const toA = after(endsA, end), toB = after(endsB, end);
    let natsA = nats(a.tokens.slice(fromA, toA)), natsB = nats(b.tokens.slice(fromB, toB));
    if (natsA === null || natsB === null) natsA = natsB = null;
    segments.push({ text: text.slice(start, end), a: [fromA, toA], b: [fromB, toB], nats_a: natsA, nats_b: natsB });
    [start, fromA, fromB] = [end, toA, toB];
  }
  const scored = segments.filter((one) => one.nats_a !== null);
  const totals = (range, loss) => ({
    tokens: scored.reduce((sum, one) => sum + one[range][1] - one[range][0], 0),
    bytes: scored.reduce((sum, one) => sum + bytes(one.text), 0),
    nats: scored.reduce((sum, one) => sum + one[loss], 0),
  });
  return { a, b, segments, totals_a: totals("a", "nats_a"), totals_b: totals("b", "nats_b") };
}

/** What leaving an expert out costs: nats in all, and the token that suffers most. */
export function costOf(expert, whole, rest) {
  let change = 0, worst = null, worstChange = -Infinity;
  whole.tokens.forEach(({ logprob }, place) => {
    if (logprob === null) return;
    const more = logprob - rest.tokens[place].logprob;
    change += more;
    if (more > worstChange) [worst, worstChange] = [place, more];
  });
  return { expert, change, worst, worst_change: worst === null ? 0 : worstChange };
}
