// Everything about one row: what it is, how to measure it again, its checks, and what papers printed.

function resultsOf(row) {
  const { n, stages, chance } = contest(), sets = data.sets.map((_, i) => i).filter((i) => row.cells[i]);
  const body = sets.map((i) => {
    const [clean, , ...after] = row.cells[i], robust = last(after), [low, high] = wilson(robust, n[i], contest().z);
    const exposures = { s: "seen", u: "unseen", "?": "unknown" };
    return [data.sets[i], String(n[i]), percent(clean / n[i], 2), ...after.map((count) => percent(count / n[i], 2)),
      `[${percent(low, 2)}, ${percent(high, 2)}]`, percent(chance[i], 2), exposures[row.exposure[i]],
      wordsOf(flagsOf(row, [i])).join(", "), withBits ? el("code", row.sha256[i]) : "see the CSV"];
  });
  return plainTable(["dataset", "n", "clean, %", ...stages.map((stage) => `after ${stage}, %`), "95 %", "chance, %", "exposure",
    "flags", "result"], body);
}

function printedBeside(row) {
  const { printed, n } = contest(), there = printed.filter(([, set]) => row.cells[setOf(set)]);
  return there.map(([model, set, clean, robust, source]) => {
    const i = setOf(set), cell = row.cells[i];
    return [`${model}, ${set}`, clean, robust, percent(cell[0] / n[i]), percent(last(cell) / n[i]), source];
  });
}

const pictures = (row) => (row.pictures || []).map(({ key, text, images }) => el("figure",
  images.map(([kind, source]) => el("img", { src: source, alt: `${key}, ${kind}`, title: kind })),
  el("figcaption", { class: "soft" }, `${key}: ${text}`)));

function modelView() {
  const row = rowOf(byId("model").value), model = modelOf(row), now = contest();
  const known = { ...now, ...model, data: model.data.join(", "), evidence: evidenceOf(row),
    command: `${now.command[0]} ${model.quoted} ${now.command[1]}` };
  for (const place of every("[data-fact]")) place.textContent = known[place.dataset.fact];
  fill("name", model.id);
  fill("flags", definitions(flagsOf(row, data.sets.map((_, i) => i))));
  fill("results", resultsOf(row));
  fill("printed", tableRows(printedBeside(row)));
  fill("pictures", pictures(row));
  fill("checks", tableRows(row.checks || []));
  fill("numbers", tableRows(now.numbers.map(({ name, ...others }) => [name,
    Object.entries(others).map((pair) => pair.join(" = ")).join(", ")])));
}
