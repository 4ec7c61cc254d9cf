"use strict";
// Counts, intervals and tests of the page; the package has the same functions in Python.

const Z = 1.959963984540054; // 97.5 % point of the normal distribution
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

// 95 % Wilson score interval of hits out of n.
function wilson(hits, n) {
  const share = hits / n, size = 2 * (n + Z * Z);
  const centre = (2 * n * share + Z * Z) / size;
  const half = (Z / size) * Math.sqrt(4 * n * share * (1 - share) + Z * Z);
  return [hits ? Math.max(0, centre - half) : 0, hits < n ? Math.min(1, centre + half) : 1];
}

// Mean of independent proportions [hits, n] with its 95 % interval: MOVER over Wilson limits.
function meanOf(counts) {
  let mean = 0, below = 0, above = 0;
  for (const [hits, n] of counts) {
    const [low, high] = wilson(hits, n);
    mean += hits / n;
    below += (hits / n - low) ** 2;
    above += (high - hits / n) ** 2;
  }
  mean /= counts.length;
  return { mean, low: Math.max(0, mean - Math.sqrt(below) / counts.length),
    high: Math.min(1, mean + Math.sqrt(above) / counts.length) };
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
  let distance = 0, variance = 0, step = 0;
  for (const [onlyA, onlyB, n] of sets) {
    distance += (onlyA - onlyB) / n;
    variance += (onlyA + onlyB) / n ** 2;
    if (onlyA + onlyB) step = Math.max(step, 1 / n);
  }
  return variance ? beyond(Math.max(0, Math.abs(distance) - step) / Math.sqrt(variance)) : 1;
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
