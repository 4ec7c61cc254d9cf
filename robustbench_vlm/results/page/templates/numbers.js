"use strict";
// Counts, intervals and tests of the page; the package has the same functions in Python.

const LEVEL = 0.05; // family-wise error of all pairs that are shown

// The bits of a base64 text as 32-bit words; image i is bit i % 32 of word i / 32.
function words(text) {
  const bytes = atob(text);
  const found = new Uint32Array((bytes.length + 3) >> 2);
  for (let i = 0; i < bytes.length; i++) found[i >> 2] |= bytes.charCodeAt(i) << (8 * (i & 3));
  return found;
}

function ones(word) {
  word -= (word >>> 1) & 0x55555555;
  word = (word & 0x33333333) + ((word >>> 2) & 0x33333333);
  return (((word + (word >>> 4)) & 0x0f0f0f0f) * 0x01010101) >>> 24;
}

// How many images only the first model gets right, and how many only the second.
function discordant(a, b) {
  let onlyA = 0, onlyB = 0;
  for (let i = 0; i < a.length; i++) {
    const different = a[i] ^ b[i];
    if (different) { onlyA += ones(different & a[i]); onlyB += ones(different & b[i]); }
  }
  return [onlyA, onlyB];
}

// Wilson score interval of hits out of n; z is the normal quantile of its confidence.
function wilson(hits, n, z) {
  const share = hits / n, size = 2 * (n + z * z);
  const centre = (2 * n * share + z * z) / size;
  const half = (z / size) * Math.sqrt(4 * n * share * (1 - share) + z * z);
  return [hits ? Math.max(0, centre - half) : 0, hits < n ? Math.min(1, centre + half) : 1];
}

// Stirling's series, after the argument is raised to where it is exact.
function logGamma(x) {
  let product = 1;
  for (; x < 16; x++) product *= x;
  const s = 1 / (x * x);
  return (x - 0.5) * Math.log(x) - x + Math.log(2 * Math.PI) / 2
    + (1 / 12 - s * (1 / 360 - s * (1 / 1260 - s / 1680))) / x - Math.log(product);
}

// Distribution function of the beta distribution, as a continued fraction.
function beta(x, a, b) {
  if (x > (a + 1) / (a + b + 2)) return 1 - beta(1 - x, b, a);
  let c = 1, d = 1 / (1 - (a + b) * x / (a + 1)), value = d;
  const next = (factor) => {
    d = 1 / (1 + factor * d);
    c = 1 + factor / c;
    value *= c * d;
  };
  for (let m = 1; m < 2000 && Math.abs(c * d - 1) > 1e-15; m++) {
    next(m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)));
    next(-(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)));
  }
  return value / a * Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x));
}

function betaQuantile(level, a, b) {
  let low = 0, high = 1;
  for (let i = 0; i < 55; i++) {
    const middle = (low + high) / 2;
    if (beta(middle, a, b) < level) low = middle; else high = middle;
  }
  return (low + high) / 2;
}

// Mean and variance of a beta distribution.
const moments = (a, b) => [a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))];

// One-sided upper limit of the mean of proportions [hits, n]: see results/mean_interval.py.
function upperLimit(counts, level, z) {
  const number = counts.length, before = counts.map(([hits, n]) => moments(hits, n - hits));
  const [mean, variance] = [0, 1].map((k) => before.reduce((total, one) => total + one[k], 0));
  let best = { limit: -1 };
  counts.forEach(([hits, n], i) => {
    const after = moments(hits + 1, n - hits), m = (mean - before[i][0] + after[0]) / number;
    const v = (variance - before[i][1] + after[1]) / number ** 2, limit = m + z * Math.sqrt(v);
    if (limit > best.limit) best = { limit, m, v, hits };
  });
  if (best.v <= 0) return 1;
  const all = (test) => counts.filter(test).length;
  const floor = all(([hits, n]) => hits === n) / number;
  const width = 1 - (all(([hits]) => !hits) - !best.hits) / number - floor;
  const share = (best.m - floor) / width, size = share * (1 - share) / (best.v / width ** 2) - 1;
  return floor + width * betaQuantile(level, share * size, (1 - share) * size);
}

// Mean of independent proportions [hits, n] with its interval; one proportion has Wilson's at 95 %.
function meanOf(counts, { level, z }) {
  const mean = counts.reduce((total, [hits, n]) => total + hits / n, 0) / counts.length;
  const [low, high] = counts.length === 1 && Math.abs(level - 0.975) < 1e-9 ? wilson(...counts[0], z)
    : [1 - upperLimit(counts.map(([hits, n]) => [n - hits, n]), level, z), upperLimit(counts, level, z)];
  return { mean, low, high };
}

// C(m, floor(m / 2)) / 2^m: as a product, or for large m by the asymptotic series of C(2h, h) / 4^h.
function centralTerm(m) {
  const h = (m + 1) >> 1; // for odd m, C(m, h) / 2^m equals C(2h, h) / 4^h
  if (h < 200) {
    let term = 1;
    for (let i = 1; i <= h; i++) term *= (2 * i - 1) / (2 * i);
    return term;
  }
  const x = 1 / h;
  return Math.sqrt(x / Math.PI) * (1 - x / 8 * (1 - x / 16 * (1 + x * 5 / 8 * (1 - x * 21 / 160))));
}

const known = new Map();

// Two-sided exact McNemar p-value: k of m fair coins, or more unequal. Summed outwards from the centre.
function mcnemar(onlyA, onlyB) {
  const m = onlyA + onlyB, k = Math.min(onlyA, onlyB);
  if (2 * k >= m - 1) return 1;
  const key = m * 1048576 + k;
  if (known.has(key)) return known.get(key);
  let at = m >> 1, term = centralTerm(m), sum = 0;
  while (at > k) { term *= at / (m - at + 1); at--; }
  for (; at >= 0 && term > sum * 1e-18; at--) { sum += term; term *= at / (m - at + 1); }
  const p = Math.min(1, 2 * sum);
  known.set(key, p);
  return p;
}

// Probability that a normal variable is farther than |x| standard deviations from its mean.
function beyond(x) {
  const z = Math.abs(x), density = Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI);
  if (z < 3) {
    let term = z, sum = z;
    for (let i = 3; term > sum * 1e-17; i += 2) { term *= z * z / i; sum += term; }
    return 1 - 2 * density * sum;
  }
  let tail = 0;
  for (let i = 120; i; i--) tail = i / (z + tail);
  return 2 * density / (z + tail);
}

// p-value of two models with the same mean over datasets, from [only A, only B, n] of each dataset: the exact
// test for one dataset, otherwise the stratified test with continuity correction.
function pairedTest(sets) {
  if (sets.length === 1) return mcnemar(sets[0][0], sets[0][1]);
  const one = 1 / Math.min(...sets.map(([,, n]) => n));
  let distance = 0, variance = one ** 2;
  for (const [onlyA, onlyB, n] of sets) {
    distance += (onlyA - onlyB) / n;
    variance += (onlyA + onlyB) / n ** 2;
  }
  return beyond(Math.max(0, Math.abs(distance) - one) / Math.sqrt(variance));
}

// p-values adjusted by Holm for all of them together.
function holm(values) {
  const order = values.map((_, i) => i).sort((i, j) => values[i] - values[j]);
  const adjusted = new Array(values.length);
  let largest = 0;
  order.forEach((i, place) => {
    largest = Math.max(largest, Math.min(1, (values.length - place) * values[i]));
    adjusted[i] = largest;
  });
  return adjusted;
}
