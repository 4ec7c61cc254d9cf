// The page is drawn from the address, and again whenever the address or the look change.

function draw() {
  const views = { table: tableView, figures: figureView, compare: compareView, model: modelView };
  if (!views[state.view]) state.view = "table";
  contestBar();
  setPicker();
  inputs();
  views[state.view]();
}

addEventListener("hashchange", () => {
  if (location.hash === written) return;
  readHash();
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
byId("app").hidden = false;
listen();
readHash();
draw();
