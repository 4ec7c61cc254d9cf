// Ranks of rows on the same images; the package has the same functions in results/ranks.py.

// p-values of all pairs of rows, adjusted by Holm: a function of two row numbers.
// bits[k][i] are the words of row i on dataset k; n[k] is the number of its images.
function adjustedPairs(bits, n, rows) {
  const raw = [], place = (i, j) => i < j ? i * rows - i * (i + 1) / 2 + j - i - 1 : place(j, i);
  for (let i = 0; i < rows; i++) {
    for (let j = i + 1; j < rows; j++) {
      raw.push(pairedTest(bits.map((rowsOfSet, k) => [...discordant(rowsOfSet[i], rowsOfSet[j]), n[k]])));
    }
  }
  const adjusted = holm(raw);
  return (i, j) => i === j ? 1 : adjusted[place(i, j)];
}

// Rank set [low, high] and letters of the tie groups of every row, from means and adjusted p-values.
function standings(means, p) {
  const differ = (i, j) => p(i, j) < LEVEL;
  const groups = tieGroups(means, differ);
  return means.map((mean, i) => {
    let low = 1, high = means.length;
    means.forEach((other, j) => {
      if (differ(i, j) && other > mean) low++;
      if (differ(i, j) && other < mean) high--;
    });
    return { low, high, group: groups[i] };
  });
}

// From each row a run reaches down to the last row that it does not differ from; runs inside others are dropped.
function tieGroups(means, differ) {
  const order = means.map((_, i) => i).sort((i, j) => means[j] - means[i] || i - j);
  const letters = means.map(() => []);
  let end = -1, count = 0;
  order.forEach((row, first) => {
    let last = first;
    for (let at = first + 1; at < order.length; at++) if (!differ(row, order[at])) last = at;
    if (last <= end) return;
    end = last;
    for (let at = first; at <= last; at++) letters[order[at]].push(letter(count));
    count++;
  });
  return letters.map((found) => found.join(" "));
}

function letter(number) {
  let text = "";
  for (number++; number; number = Math.floor((number - 1) / 26)) {
    text = String.fromCharCode(97 + (number - 1) % 26) + text;
  }
  return text;
}
