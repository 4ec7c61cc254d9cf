// The figures: of each its numbers as a table, and a function that draws it.

const inTable = () => ordered(columnsShown()).filter((row) => row.complete && !row.off);
const hundred = (value) => [value.mean, value.low, value.high].map((share) => 100 * share);

// Rows that no other row beats or equals in clean and robust accuracy while being better in one of them.
const front = (rows) => rows.filter((a) => !rows.some((b) => b.clean.mean >= a.clean.mean
  && b.robust.mean >= a.robust.mean && (b.clean.mean > a.clean.mean || b.robust.mean > a.robust.mean)));

function scatter() {
  const rows = inTable(), best = front(rows).sort((a, b) => a.clean.mean - b.clean.mean);
  return { heads: ["model", "clean, %", "robust, %", "on the front"],
    body: rows.map((row) => [row.key, interval(row.clean, 2), interval(row.robust, 2), best.includes(row) ? "yes" : "no"]),
    paint(look) {
      const plot = axes(rows.length, look, percentAxis, "clean accuracy, %");
      const steps = best.map((row) => `${plot.px(100 * row.clean.mean)} ${plot.py(100 * row.robust.mean)}`);
      if (steps.length) plot.made.append(path(`M${steps.join("L")}`, { stroke: look.soft, "stroke-dasharray": "5 4" }));
      rows.forEach((row, i) => {
        const [x, left, right] = hundred(row.clean).map(plot.px), [y, low, high] = hundred(row.robust).map(plot.py);
        plot.made.append(path(`M${left} ${y}H${right}M${x} ${low}V${high}`, { stroke: colourOf(i), opacity: .7, "stroke-width": 1.2 }),
          mark(i, `${x} ${y}`));
      });
      legend(plot, rows.map((row) => row.model.id), look);
      return plot.made;
    } };
}

// Contests that differ from the present one in the radius alone, and of which one ladder begins with the other.
function ladder() {
  const now = contest(), same = FACETS.map(([name]) => name).filter((name) => !["eps", "eps_ladder"].includes(name));
  const within = (one) => one.radii.every((radius, i) => i >= now.radii.length || radius === now.radii[i]);
  return data.contests.filter((one) => same.every((name) => String(one[name]) === String(now[name])) && within(one))
    .sort((a, b) => a.radius - b.radius);
}

function againstRadius() {
  const contests = ladder(), rows = inTable(), { sets } = results();
  const series = rows.map(({ model, clean }) => {
    const points = contests.flatMap((one) => {
      const row = one.rows.find((other) => modelOf(other) === model);
      if (!row || !sets.every((i) => row.cells[i])) return [];
      return [[one.radius, ...hundred(meanOf(sets.map((i) => [last(row.cells[i]), one.n[i]]), one))]];
    });
    return { name: model.id, key: model.key, points: [[0, ...hundred(clean)], ...points] };
  });
  const ticks = [0, ...contests.map(({ radius }) => radius)], names = ["0", ...contests.map(({ eps }) => eps)];
  return { heads: ["model", ...names],
    body: series.map(({ key, points }) => [key, ...ticks.map((radius) => {
      const point = points.find(([x]) => x === radius);
      return point ? `${point[1].toFixed(2)} [${point[2].toFixed(2)}, ${point[3].toFixed(2)}]` : "–";
    })]),
    paint: (look) => lines(axes(rows.length, look, { high: last(ticks), ticks, names }, `${contest().norm} radius`), series, look) };
}

// How many images end how: wrong when clean, broken at a smaller radius, by each stage, or not at all.
function byAttack() {
  const rows = inTable(), { sets, n } = results(), { stages } = contest(), total = sum(sets.map((i) => n[i]));
  const parts = ["wrong when clean", "smaller radius or error", ...stages, "survived"];
  const counts = rows.map(({ row }) => {
    const steps = row.cells[sets[0]].map((_, k) => sum(sets.map((i) => row.cells[i][k])));
    return [total - steps[0], ...steps.slice(1).map((value, k) => steps[k] - value), last(steps)];
  });
  return { heads: ["model", ...parts],
    body: rows.map((row, i) => [row.key, ...counts[i].map(String)]),
    paint(look) {
      const width = 760, made = canvas(width, 50 + 30 * rows.length, look), left = 170, room = width - left - 10;
      parts.forEach((part, k) => {
        const x = 10 + k * (width - 20) / parts.length, fill = k === parts.length - 1 ? look.line : colourOf(k);
        made.append(rect(x, 8, 12, 12, { fill }), label(x + 16, 18, `${k + 1} ${part}`, look.ink));
      });
      rows.forEach((row, i) => {
        const y = 34 + 30 * i;
        let x = left;
        made.append(label(left - 6, y + 14, row.model.id.slice(0, 26), look.ink, atEnd));
        counts[i].forEach((count, k) => {
          const wide = room * count / total, fill = k === parts.length - 1 ? look.line : colourOf(k);
          if (count) made.append(rect(x, y, wide, 20, { fill, stroke: look.paper }));
          if (wide > 26) made.append(label(x + wide / 2, y + 14, `${k + 1}: ${count}`.slice(0, Math.max(1, wide / 7)), look.ink, { ...middle, stroke: look.paper, "stroke-width": 2.5, "paint-order": "stroke" }));
          x += wide;
        });
      });
      return made;
    } };
}

// Share of the broken images that had been broken when each octave of iterations ended.
function byIteration() {
  const rows = inTable(), { sets } = results();
  const bins = rows.map(({ row }) => {
    const stages = sets.flatMap((i) => row.iterations[i]), most = Math.max(...stages.map((stage) => stage.length));
    return Array.from({ length: most }, (_, k) => sum(stages.map((stage) => stage[k] || 0)));
  });
  const most = Math.max(2, ...bins.map((one) => one.length)), ends = Array.from({ length: most }, (_, k) => k ? 2 ** k - 1 : 0);
  const series = rows.map((row, i) => {
    return { name: row.model.id, key: row.key, points: ends.map((_, k) => [k, 100 * sum(bins[i].slice(0, k + 1)) / (sum(bins[i]) || 1)]) };
  });
  return { heads: ["model", ...ends.map((end) => `up to ${end}`)], body: series.map(({ key, points }) => [key, ...points.map(([, y]) => y.toFixed(1))]),
    paint: (look) => lines(axes(rows.length, look, { high: most - 1, ticks: ends.map((_, k) => k), names: ends },
      "model evaluation of the stage, up to", "share of broken images, %"), series, look) };
}

const FIGURES = { "clean-robust": scatter, "robust-radius": againstRadius, "by-attack": byAttack, "by-iteration": byIteration };

function figureView() {
  const empty = !inTable().length;
  byId("figures").hidden = empty;
  byId("no-rows").hidden = !empty;
  if (empty) return;
  for (const [name, make] of Object.entries(FIGURES)) {
    if (!byId(`drawn-${name}`)) continue; // a figure of verdicts, in a page without them
    const { heads, body, paint } = make(), drawn = paint(screenColours());
    drawn.setAttribute("aria-labelledby", `caption-${name}`);
    fill(`drawn-${name}`, drawn);
    fill(`numbers-${name}`, plainTable(heads, body));
  }
}
