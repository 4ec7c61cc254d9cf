// What the reader has chosen, which is also what stands behind # in the address, and what follows from it.

const data = JSON.parse(byId("data").textContent);
const withBits = data.bits.length > 0;
const sum = (values) => values.reduce((total, value) => total + value, 0);

// The page opens with the contest that has the most images under attack.
const attacked = ({ n, rows }) => sum(n) * rows.length;
const FIRST = data.contests.reduce((most, one) => attacked(one) > attacked(most) ? one : most);
const BASE = { contest: FIRST.id, view: "table", without: "", off: "", sort: "robust", up: "",
  search: "", arch: "", kind: "", defense: "", trained: "", size: "", unflagged: "", complete: "",
  columns: "group,defense,arch,clean,sets,flags,evidence", a: "", b: "", model: "" };
const SIZES = [["under 50 M", 0, 50], ["50 to 150 M", 50, 150], ["150 to 500 M", 150, 500],
  ["over 500 M", 500, Infinity]];
const state = { ...BASE };
let written = "";

// Of each result: images that are right when clean, that were then attacked, that survived each stage.
for (const row of data.contests.flatMap(({ rows }) => rows)) {
  row.cells = row.cells.map((cell) => cell && cell.map((_, k) => cell[0] - sum(cell.slice(1, k + 1))));
}
data.models.forEach((model) => { model.key = `${model.id}@${model.sha256.slice(0, 8)}`; });

const millions = ({ parameters }) => parameters / 1e6;
const failed = (flags) => flags.some(([,, check]) => check);
const wordsOf = (flags) => flags.map(([word]) => word);
const modelOf = (row) => data.models[row.model];
const setOf = (name) => data.sets.indexOf(name);
const pack = (list) => list.map(encodeURIComponent).join(",");
const unpack = (text) => text ? text.split(",").map(decodeURIComponent) : [];

function readHash() {
  Object.assign(state, BASE);
  computed = null;
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (key in BASE) state[key] = value;
  written = location.hash;
}

function hashOf(values) {
  const changed = Object.entries(values).filter(([key, value]) => value !== BASE[key]);
  return "#" + new URLSearchParams(changed);
}

// Change some of what is chosen, write it into the address and draw the page again.
function choose(changes) {
  Object.assign(state, changes);
  computed = null;
  written = hashOf(state);
  location.replace(written);
  draw();
}

const contest = () => data.contests.find((one) => one.id === state.contest) || FIRST;

// Numbers of the datasets that the contest has and the reader has not taken out.
function chosenSets() {
  const without = unpack(state.without), { n } = contest();
  return data.sets.map((_, i) => i).filter((i) => n[i] && !without.includes(data.sets[i]));
}

const LEVELS = { verdicts: "verdicts only", bundle: "evidence, not verified" };
const evidenceOf = ({ evidence }) => (evidence[1] ? "mixed: " : "") + evidence.map((level) => LEVELS[level] || level).join(", ");
const decoded = new Map();

// Verdict bits of a row on a dataset as words: of clean images (0), or after the whole chain (1).
function verdicts(row, set, which) {
  const number = row.bits[set][which];
  if (!decoded.has(number)) decoded.set(number, words(data.bits[number]));
  return decoded.get(number);
}

const last = (list) => list[list.length - 1];

function flagsOf(row, sets) {
  const numbers = sets.flatMap((i) => row.flags[i] || []);
  return [...new Set(numbers)].map((number) => data.flags[number]);
}

// A row of the contest with its means over the chosen datasets.
function measured(row, sets, n) {
  const model = modelOf(row), has = sets.filter((i) => row.cells[i]);
  const found = { row, model, key: model.key, has, complete: has.length > 0 && has.length === sets.length,
    flags: flagsOf(row, has), off: unpack(state.off).includes(model.key) };
  if (found.complete) {
    found.clean = meanOf(has.map((i) => [row.cells[i][0], n[i]]), contest());
    found.robust = meanOf(has.map((i) => [last(row.cells[i]), n[i]]), contest());
  }
  return found;
}

function passes({ model, flags, complete }) {
  const size = SIZES.find(([name]) => name === state.size);
  const text = [model.id, model.sha256, model.arch, model.defense, ...model.data].join(" ").toLowerCase();
  return ["arch", "kind", "defense"].every((name) => !state[name] || model[name] === state[name])
    && (!state.trained || model.data.includes(state.trained))
    && (!size || (millions(model) >= size[1] && millions(model) < size[2]))
    && (!state.unflagged || !failed(flags)) && (!state.complete || complete)
    && (!state.search || text.includes(state.search.toLowerCase()));
}

let computed = null; // until the next choice

// The rows that are shown; those that are ranked have a standing.
const results = () => computed ||= compute();

function compute() {
  const sets = chosenSets(), { n, rows } = contest();
  const shown = rows.map((row) => measured(row, sets, n)).filter(passes);
  const ranked = shown.filter((row) => row.complete && !row.off);
  let p = null;
  if (withBits && ranked.length > 1 && !contest().stop_rule) {
    const bits = sets.map((i) => ranked.map(({ row }) => verdicts(row, i, 1)));
    p = adjustedPairs(bits, sets.map((i) => n[i]), ranked.length);
    standings(ranked.map((row) => row.robust.mean), p).forEach((standing, i) => {
      ranked[i].standing = standing;
    });
  }
  return { sets, n, shown, ranked, p };
}
