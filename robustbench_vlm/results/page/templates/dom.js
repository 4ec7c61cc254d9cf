// Elements. Every text of the data enters the page as a text node, never as markup.

const solid = (children) => children.flat(4).filter((child) => child !== null && child !== undefined);
const byId = (id) => document.getElementById(id);
const every = (selector) => document.querySelectorAll(selector);

// An element; its properties may be left out.
function el(tag, ...content) {
  const made = document.createElement(tag), given = content[0]?.constructor === Object;
  const [properties, ...children] = given ? content : [{}, ...content];
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...solid(children));
  return made;
}

const percent = (share, digits = 1) => (100 * share).toFixed(digits);
const interval = (value, digits = 1) => value
  ? `${percent(value.mean, digits)} [${percent(value.low, digits)}, ${percent(value.high, digits)}]` : "–";
const number = (p) => p < 1e-4 ? p.toExponential(1) : p.toFixed(4);

const button = (id, text, onclick) => el("button", { id, type: "button", onclick }, text);
const definitions = (entries) => entries.map(([name, value]) => [el("dt", name), el("dd", value)]);

function tick(id, text, checked, change) {
  const box = el("input", { type: "checkbox", id, onchange: () => change(box.checked) });
  box.checked = checked;
  return el("label", { for: id }, box, " ", text);
}

// Give a select its options, [value, text]; a value that is not among them shows as the first.
function offer(box, options, value) {
  box.replaceChildren(...options.map(([of, shown]) => el("option", { value: of }, shown)));
  box.value = options.some(([of]) => of === value) ? value : options[0][0];
  return box;
}

const textual = (entry) => typeof entry === "string" && /^[^\d[+\-–]/.test(entry) ? "text" : "";

const tableRows = (body) => body.map((line) => el("tr", line.map((entry, i) =>
  i ? el("td", { class: textual(entry) }, entry) : el("th", { scope: "row" }, entry))));

// A table whose first column names the rows; heads and entries are texts or elements.
function plainTable(heads, body) {
  return el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": heads.join(", ") }, el("table",
    el("thead", el("tr", heads.map((head, i) => el("th", { scope: "col", class: i ? textual(body[0]?.[i]) : "text" }, head)))),
    el("tbody", tableRows(body))));
}

// Replace what an element holds without losing the place of the keyboard; a section without content is hidden.
function fill(name, ...children) {
  const place = byId(name), id = place.contains(document.activeElement) && document.activeElement.id;
  const open = [...place.querySelectorAll("details[open]")].map((one) => one.id);
  const content = solid(children);
  place.replaceChildren(...content);
  const section = place.closest("section");
  if (section?.querySelector(":scope > h3")) section.hidden = !content.length;
  open.forEach((one) => byId(one)?.setAttribute("open", ""));
  if (id) byId(id)?.focus();
}
