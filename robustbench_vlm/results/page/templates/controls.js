// What the reader chooses with: contest, datasets, rows, columns.

// Columns of a contest, what they are called, and whether they are named only where the others leave a choice.
const FACETS = [["protocol", "protocol"], ["attack", "attack"], ["norm", "norm"], ["eps", "radius"],
  ["n_requested", "images"], ["engine", "engine"], ["precision", "precision"], ["stop_rule", "stopped by", 1], ["eps_ladder", "radii", 1],
  ["attack_config_sha256", "chain", 1]];

// The contest with one value changed that agrees with the present one in most of the others.
function nearest(facet, value) {
  const now = contest();
  const agreed = (one) => FACETS.filter(([name]) => String(one[name]) === String(now[name])).length;
  const fitting = data.contests.filter((one) => String(one[facet]) === value);
  return fitting.reduce((best, one) => agreed(one) > agreed(best) ? one : best);
}

function contestBar() {
  const now = contest();
  fill("contest", FACETS.map(([name, text, quiet]) => {
    const rivals = quiet ? data.contests.filter((one) => FACETS.every(([other,, more]) => more || one[other] === now[other])) : data.contests;
    const values = [...new Set(rivals.map((one) => String(one[name])))];
    const shown = (value) => name === "attack_config_sha256" ? value.slice(0, 6)
      : name === "n_requested" && value === "0" ? "all" : value || "none";
    if (values.length > 1) {
      const box = el("select", { id: `contest-${name}`, onchange: () => choose({ contest: nearest(name, box.value).id }) });
      return el("label", `${text} `, offer(box, values.map((value) => [value, shown(value)]), String(now[name])));
    }
    return quiet || !values[0] ? null : el("span", el("span", { class: "soft" }, `${text} `), shown(values[0]));
  }));
}

function setPicker() {
  const there = data.sets.filter((_, i) => contest().n[i]), without = unpack(state.without);
  const only = (names) => choose({ without: pack(there.filter((name) => !names.includes(name))) });
  const unseen = there.filter((name) => contest().rows.every((row) => row.exposure[setOf(name)] !== "s"));
  const groups = Object.entries({ all: there, "seen by no model": unseen, ...data.means }).filter(([, names]) => names.length);
  fill("sets-count", `datasets: ${chosenSets().length} of ${there.length}`);
  fill("sets", groups.map(([name, names], i) => button(`sets-${i}`, name, () => only(names))),
    there.map((name) => tick(`set-${setOf(name)}`, name, !without.includes(name), (on) => choose({
      without: pack(on ? without.filter((one) => one !== name) : [...without, name]) }))));
}

// What the fixed inputs of the page offer, and what they show now.
function inputs() {
  const models = contest().rows.map((row) => modelOf(row));
  const choices = (of) => [["", "all"], ...[...new Set(models.flatMap(of))].sort().map((value) => [value, value])];
  const keys = models.map(({ key }) => [key, key]), [first, second] = ordered(columnsShown()).map(({ key }) => key);
  const offered = { size: [["", "all"], ...SIZES.map(([name]) => [name, name])], trained: choices((model) => model.data),
    a: keys, b: keys, model: keys };
  for (const name of ["arch", "kind", "defense"]) offered[name] = choices((model) => model[name]);
  const shown = { ...state, a: state.a || first, b: state.b || second, model: state.model || first };
  for (const box of every("[data-state]")) {
    const name = box.dataset.state;
    if (offered[name]) offer(box, offered[name], shown[name]);
    else if (box.type === "checkbox") box.checked = !!shown[name];
    else if (box.value !== shown[name]) box.value = shown[name];
  }
  for (const box of every("[data-column]")) box.checked = state.columns.split(",").includes(box.dataset.column);
  for (const tab of every("[role=tab]")) {
    const open = tab.id === `tab-${state.view}`;
    tab.setAttribute("aria-selected", open);
    tab.tabIndex = open ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !open;
  }
}

function listen() {
  for (const box of every("[data-state]")) box.addEventListener("input", () =>
    choose({ [box.dataset.state]: box.type !== "checkbox" ? box.value : box.checked ? "1" : "" }));
  for (const box of every("[data-column]")) box.addEventListener("input", () => {
    const others = state.columns.split(",").filter((one) => one && one !== box.dataset.column);
    choose({ columns: [...others, ...(box.checked ? [box.dataset.column] : [])].join(",") });
  });
  const all = [...every("[role=tab]")];
  all.forEach((tab, i) => {
    tab.addEventListener("click", () => choose({ view: tab.id.slice(4) }));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], next = all[(i + step + all.length) % all.length];
      if (step) { next.click(); next.focus(); }
    });
  });
  for (const one of every("[data-figure]")) one.addEventListener("click", () => saveFigure(one.dataset.figure, one.dataset.kind));
  const files = { csv: () => csv(onScreen().lines), json, tex: latex };
  for (const [end, make] of Object.entries(files)) byId(`save-${end}`).addEventListener("click", () =>
    save(`${data.suite.name}-${contest().id}.${end}`, "text/plain", make()));
}
