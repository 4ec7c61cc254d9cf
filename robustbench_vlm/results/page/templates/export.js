// What is on screen as files.

function save(name, type, content) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  byId("status").textContent = `saved: ${name}`;
}

// No field of the file is a formula to a spreadsheet.
function field(text) {
  const safe = /^\s*[=+\-@]/.test(text) && !/^-?[\d.]+$/.test(text) ? `'${text}` : text;
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

const csv = (lines) => lines.map((line) => line.map(field).join(",") + "\n").join("");

// Heads and texts of the table on screen, in its order; means with their limits in columns of their own.
function onScreen() {
  const columns = columnsShown().flatMap((column) => column.bounds ? [column, ...["low", "high"].map((end) => ({
    head: `${column.key} ${end}, %`, text: (row) => row[column.key] ? percent(row[column.key][end], 2) : "" }))] : [column]);
  const rows = ordered(columnsShown());
  return { columns, rows, lines: [columns.map(({ head }) => head), ...rows.map((row) => columns.map(({ text }) => text(row)))] };
}

const LATEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "–": "--", "−": "$-$" };
const latexText = (text) => text.replace(/[\\~^–−{}&%$#_]/g, (sign) => LATEX[sign] || `\\${sign}`);

// Only a row that alone has rank 1 is set in bold: never one of several that cannot be told apart.
function latex() {
  const { columns, rows, lines } = onScreen(), places = columns.map(({ kind, name }) => kind === "text" || name ? "l" : "r").join("");
  const [heads, ...body] = lines.map((line, i) => line.map((text, k) => {
    const first = i && columns[k].key === "robust" && rows[i - 1].standing?.high === 1;
    return first ? `\\textbf{${latexText(text)}}` : latexText(text);
  }).join(" & ") + " \\\\");
  return [`% ${contest().title}`, `\\begin{tabular}{${places}}`, "\\toprule", heads, "\\midrule", ...body, "\\bottomrule",
    "\\end{tabular}", ""].join("\n");
}

function json() {
  const { n, sets, p, ranked } = results();
  const rows = ordered(columnsShown()).map((row) => ({ model: row.model.id, sha256: row.model.sha256, clean: row.clean,
    robust: row.robust, standing: row.standing, flags: wordsOf(row.flags),
    datasets: Object.fromEntries(row.has.map((i) => [data.sets[i], { n: n[i], clean: row.row.cells[i][0], robust: last(row.row.cells[i]) }])) }));
  const pairs = p ? ranked.flatMap((a, i) => ranked.slice(i + 1).map((b, k) => [a.key, b.key, p(i, i + 1 + k)])) : [];
  return JSON.stringify({ suite: data.suite, contest: contest().title, datasets: sets.map((i) => data.sets[i]), rows,
    adjusted_p: pairs }, null, 1);
}

function saveFigure(name, kind) {
  const { heads, body, paint } = FIGURES[name](), file = `${name}.${kind}`;
  if (kind === "csv") return save(file, "text/csv", csv([heads, ...body]));
  const text = new XMLSerializer().serializeToString(paint(PAPER)), image = new Image();
  if (kind === "svg") return save(file, "image/svg+xml", text);
  image.onload = () => {
    const picture = el("canvas", { width: 2 * image.width, height: 2 * image.height });
    picture.getContext("2d").drawImage(image, 0, 0, picture.width, picture.height);
    picture.toBlob((blob) => save(file, "image/png", blob));
  };
  image.src = `data:image/svg+xml,${encodeURIComponent(text)}`;
}
