// The data of the page: numbers come once, in rows, and are given their names here.

const DATA = JSON.parse(document.getElementById("data").textContent);

const NARROW = window.matchMedia("(max-width: 640px)");

const RUN_KEYS = ["setup", "model", "dataset", "method", "layers", "seed", "state", "recipe", "when", "folder"];
const RUNS = DATA.runs.map((values, place) => {
  const run = Object.fromEntries(RUN_KEYS.map((key, at) => [key, values[at]]));
  return { ...run, place };
});

const rowKey = (setup, { model, dataset, method, layers }) => JSON.stringify([setup, model, dataset, method, layers]);
const runsOf = Map.groupBy(RUNS, (run) => rowKey(run.setup, run));

DATA.setups.forEach((setup, place) => {
  const seen = new Set();
  setup.rows = setup.rows.map((values) => {
    const row = Object.fromEntries(DATA.keys.map((key, at) => [key, values[at]]));
    const key = rowKey(place, row);
    // Runs that are not finished have no recipe yet, and are counted in the first row of their name.
    const own = (runsOf.get(key) ?? []).filter((run) => (run.recipe === null ? !seen.has(key) : run.recipe === row.recipe));
    seen.add(key);
    row.runs = own.sort((a, b) => (a.state !== "done") - (b.state !== "done") || a.seed - b.seed).map((run) => run.place);
    row.text = [row.model, row.dataset, row.method, row.layers, row.recipe].join(" ").toLowerCase();
    row.kind = row.n === 0 ? "missing" : row.method === DATA.baseline ? "baseline" : "";
    return row;
  });
});
