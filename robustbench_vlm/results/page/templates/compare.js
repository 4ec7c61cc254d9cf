// Two rows of a contest on the same images.

const rowOf = (key) => contest().rows.find((row) => modelOf(row).key === key);

// Names of the images of a dataset, in the order of the bits.
function imageNames(set) {
  const [common, rest] = data.images[contest().images[set]];
  return rest.split("\n").map((end) => common + end);
}

// Images by what becomes of them: [both, only A, only B, neither].
function fourCounts(a, b, n) {
  const [onlyA, onlyB] = discordant(a, b);
  const both = a.reduce((sum, word, i) => sum + ones(word & b[i]), 0);
  return [both, onlyA, onlyB, n - both - onlyA - onlyB];
}

function survivors(a, b, set) {
  return imageNames(set).filter((_, i) => (a[i >> 5] & ~b[i >> 5]) >>> (i & 31) & 1);
}

function lists(a, b, sets, names) {
  return sets.map((i) => {
    const bits = [a, b].map((row) => verdicts(row, i, 1));
    const [onlyA, onlyB] = [survivors(bits[0], bits[1], i), survivors(bits[1], bits[0], i)];
    return el("details", { id: `only-${i}` }, el("summary", `${data.sets[i]}: ${onlyA.length} and ${onlyB.length}`),
      [onlyA, onlyB].map((keys, k) => el("p", `only ${names[k]} survives: `, el("code", keys.join(" ") || "none"))));
  });
}

function compareView() {
  const keys = ["a", "b"].map((name) => byId(`compare-${name}`).value), [a, b] = keys.map(rowOf);
  const { n } = contest(), sets = chosenSets().filter((i) => a.cells[i] && b.cells[i]);
  if (!withBits || !sets.length) {
    fill("verdict", withBits ? "The two rows have no dataset in common." : "This file holds no verdicts of single images.");
    return ["counts", "only"].forEach((name) => fill(name));
  }
  const points = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(2)}`;
  const [clean, robust] = [0, 1].map((which) => sets.map((i) => fourCounts(verdicts(a, i, which), verdicts(b, i, which), n[i])));
  const line = (name, size, four, other) => [name, ...[size, ...four].map(String), points((four[1] - four[2]) / size),
    number(mcnemar(four[1], four[2])), points((other[1] - other[2]) / size)];
  const total = (counts) => [0, 1, 2, 3].map((k) => sum(counts.map((four) => four[k])));
  const mean = (counts) => sum(counts.map((four, k) => (four[1] - four[2]) / n[sets[k]])) / sets.length;
  const body = sets.map((i, k) => line(data.sets[i], n[i], robust[k], clean[k]));
  if (sets.length > 1) body.push(line("all images, pooled", sum(sets.map((i) => n[i])), total(robust), total(clean)));
  const p = pairedTest(robust.map((four, k) => [four[1], four[2], n[sets[k]]])), difference = mean(robust);
  fill("verdict", `A − B on the mean over ${sets.length} datasets: ${points(difference)} points robust, ${points(mean(clean))} points clean; `
    + `p = ${number(p)} robust: ${p < LEVEL ? `${difference > 0 ? "A" : "B"} is more robust` : "no difference can be claimed"}.`);
  fill("counts", tableRows(body));
  fill("only", lists(a, b, sets, ["A", "B"]));
}
