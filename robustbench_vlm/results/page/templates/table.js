// The table: its columns, their order, and how an entry is drawn.

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const rect = (x, y, width, height, more) => shape("rect", { x, y, width, height, fill: "currentColor", ...more });

// A strip of 0 to 100 %: a line from low to high and a mark at the value.
const strip = (low, high, value) => shape("svg", { width: 72, height: 9, "aria-hidden": "true" },
  rect(0, 4, 72, 1, { opacity: .25 }), rect(72 * low, 3, Math.max(1, 72 * (high - low)), 3, { opacity: .6 }),
  value === undefined ? "" : rect(72 * value - 1, 0, 2, 9));

function rankText({ standing }) {
  if (!standing) return "–";
  return standing.low === standing.high ? `${standing.low}` : `${standing.low}–${standing.high}`;
}

function rankCell(row) {
  if (!row.standing) return "–";
  const count = results().ranked.length, { low, high } = row.standing;
  return [rankText(row), strip((low - 1) / count, high / count)];
}

const meanCell = (value) => value ? [interval(value), strip(value.low, value.high, value.mean)] : "–";

// A column: key, head, value to sort by, text for exports, entry of a row in the page.
function columnsShown() {
  const { sets, n } = results(), wanted = state.columns.split(",");
  const text = (key, head, of) => ({ key, head, value: of, text: of, entry: of, kind: "text" });
  const share = (key, head) => ({ key, head, value: (row) => row[key]?.mean, entry: (row) => meanCell(row[key]),
    text: (row) => row[key] ? percent(row[key].mean, 2) : "", bounds: true });
  const all = [
    { key: "rank", head: "rank", value: ({ standing }) => standing && -(standing.low + standing.high),
      text: rankText, entry: rankCell },
    { ...text("model", "model", ({ key }) => key), name: true, entry: modelCell },
    text("group", "tie group", ({ standing }) => standing ? standing.group : ""),
    share("robust", "robust, %"),
    share("clean", "clean, %"),
    ...[["kind", "kind of defense"], ["defense", "defense"], ["arch", "architecture"], ["trained", "trained against"]].map(
      ([key, head]) => text(key, head, ({ model }) => model[key])),
    { ...text("size", "parameters, M", ({ model }) => millions(model).toFixed(3)), value: ({ model }) => millions(model), kind: "" },
    text("data", "training data", ({ model }) => model.data.join(" ")),
    ...sets.map((i) => setColumn(i, n[i])),
    { ...text("flags", "flags", ({ flags }) => wordsOf(flags).join(" ")), entry: ({ flags }) =>
      flags.map(([word, sentence], i) => [i ? ", " : "", el("abbr", { title: sentence }, word)]) },
    text("evidence", "evidence", ({ row }) => evidenceOf(row)),
  ];
  wanted.push("rank", "model", "robust");
  return all.filter((column) => wanted.includes(column.set === undefined ? column.key : "sets"));
}

function setColumn(i, n) {
  const share = ({ row }) => row.cells[i] ? last(row.cells[i]) / n : undefined;
  return { key: `set:${data.sets[i]}`, head: data.sets[i], set: i, value: share,
    text: (row) => row.row.cells[i] ? percent(share(row), 2) : "",
    entry: (row) => row.row.cells[i] ? [percent(share(row)), failed(flagsOf(row.row, [i])) ? el("b", " !") : ""] : "–",
    note: ({ row }) => {
      if (!row.cells[i]) return "not measured";
      const count = last(row.cells[i]), [low, high] = wilson(count, n, contest().z);
      return [`${data.sets[i]}: clean ${percent(row.cells[i][0] / n)} %, robust ${percent(count / n)} % `
        + `[${percent(low)}, ${percent(high)}], ${count} of ${n}`, ...wordsOf(flagsOf(row, [i]))].join(", ");
    } };
}

function modelCell(row) {
  const id = `pick-${data.models.indexOf(row.model)}`;
  const box = el("input", { type: "checkbox", id, "aria-label": `rank ${row.key}`, onchange: () => {
    const off = unpack(state.off).filter((key) => key !== row.key);
    choose({ off: pack(box.checked ? off : [...off, row.key]) });
  } });
  box.checked = !row.off;
  return [box, " ", el("a", { href: hashOf({ ...state, view: "model", model: row.key }) }, row.model.id), " ",
    el("span", { class: "soft" }, row.model.sha256.slice(0, 6))];
}

function ordered(columns) {
  const column = columns.find(({ key }) => key === state.sort) || columns.find(({ key }) => key === "robust");
  const sign = state.up ? 1 : -1;
  return [...results().shown].sort((a, b) => {
    const x = column.value(a), y = column.value(b);
    const none = (x === undefined || x === "") - (y === undefined || y === "");
    if (a.off !== b.off) return a.off - b.off;
    if (none || x === undefined || x === "") return none;
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || a.key.localeCompare(b.key);
  });
}

function headCell(column) {
  const active = column.key === state.sort;
  const sort = active ? (state.up ? "ascending" : "descending") : "none";
  const arrow = active ? (state.up ? " ▲" : " ▼") : "";
  return el("th", { scope: "col", "aria-sort": sort, class: column.name ? "name" : column.kind || "" },
    button(`sort-${column.key}`, column.head + arrow, () => choose({ sort: column.key,
      up: active ? (state.up ? "" : "1") : (column.kind === "text" ? "1" : "") })));
}

function bodyCell(column, row) {
  const content = column.entry(row), list = Array.isArray(content) ? content : [content];
  if (column.name) return el("th", { scope: "row" }, list);
  const cell = el("td", { class: column.key === "flags" ? "flags text" : column.kind || "" }, list);
  if (column.set !== undefined) {
    cell.title = column.note(row);
    const share = column.value(row);
    if (share !== undefined) { cell.classList.add("heat"); cell.style.setProperty("--share", `${55 * share}%`); }
  }
  return cell;
}

function tableView() {
  const columns = columnsShown(), rows = ordered(columns), { ranked, sets } = results(), count = ranked.length;
  const test = sets.length === 1 ? "exact McNemar test" : "stratified paired test of the mean";
  fill("summary", `${contest().title}: ${rows.length} of ${contest().rows.length} rows, ${sets.length} datasets. `,
    results().p ? `Ranks: ${count} rows, ${count * (count - 1) / 2} pairs, ${test}, Holm, 5 %.` : "");
  const scrolled = byId("board").scrollLeft;
  fill("board", el("table", el("thead", el("tr", columns.map(headCell))),
    el("tbody", rows.map((row) => el("tr", { class: row.off ? "off" : "" }, columns.map((column) => bodyCell(column, row)))))));
  byId("board").scrollLeft = scrolled;
  fill("legend", definitions([...new Map(rows.flatMap(({ flags }) => flags))].sort()));
}
