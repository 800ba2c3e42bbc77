// Puts the page together. What is chosen is in `view`.

const view = { mode: "depth", setup: 0, axis: Object.keys(DATA.axes)[0], group: null, filters: {} };
const NARROW_COLUMNS = new Set(["method", "layers", "main", "saved_measured_bytes"]);
const BROAD_FILTERS = [["model", "Model"], ["dataset", "Data set"], ["method", "Method"], ["layers", "Layers"]];

function stateCounts(runs) {
  const counts = {};
  for (const run of runs) counts[run.state] = (counts[run.state] ?? 0) + 1;
  return counts;
}

function columnsOf(setup) {
  const [main, other] = setup.accuracy;
  return DATA.columns
    .map((column) => ({ ...column, title: column.title.replace("{other}", other).replace("{}", main) }))
    .filter((column) => setup.rows.some((row) => !isMissing(row[column.key])));
}

function shownOf(setup, mode) {
  const chosen = columnsOf(setup).filter((column) => column.modes.includes(mode));
  const recipe = setup.rows.some((row) => row.recipe) ? ["recipe"] : [];
  if (!NARROW.matches) return [...chosen.map((column) => column.key), ...recipe];
  const compared = { depth: "saved_measured_times_less", memory: "equal_saved_difference_points", accuracy: "equal_accuracy_saved_times_less" }[mode];
  return [...[...NARROW_COLUMNS].filter((key) => key !== "saved_measured_bytes"), compared];
}

function cellOf(row, column) {
  if (column.key === "n") return row.missing ? `${row.n} of ${row.n + row.missing}` : String(row.n);
  if (column.key === "main" && !row.n) return "missing";
  const spread = { main: row.main_std, other: row.other_std }[column.key];
  return isMissing(spread) || isMissing(row[column.key]) ? null : `${row[column.key].toFixed(1)} ± ${spread.toFixed(1)}`;
}

function matches(row) {
  const { text = "", ...exact } = view.filters;
  if (Object.entries(exact).some(([key, value]) => value !== "" && String(row[key]) !== value)) return false;
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => row.text.includes(word));
}

function groupsOf(setup) {
  return [...new Map(setup.rows.filter(matches).map((row) => [JSON.stringify([row.model, row.dataset]), row])).keys()];
}

// Plot and table of the chosen setup.
function fillSetup() {
  const setup = DATA.setups[view.setup];
  const table = new Table({
    label: setup.title,
    columns: columnsOf(setup),
    rows: setup.rows,
    shown: shownOf(setup, view.mode),
    open: (row) => openRuns(row.runs),
    sub: (row) => `${row.model}, ${row.dataset}`,
    cell: cellOf,
  });
  table.keep = matches;
  const plot = plotBox("Accuracy against a cost; the table has the same numbers. Enter opens the runs of a point", { class: "plot", id: "pareto" });
  const groups = el("span");
  const fill = () => {
    table.render();
    const found = groupsOf(setup);
    if (!found.includes(view.group)) view.group = found[0] ?? null;
    groups.replaceChildren(select("Plot of", found.map((key) => [key, JSON.parse(key).join(" on ")]), view.group, (key) => ((view.group = key), fillPlot())));
    fillPlot();
  };
  const fillPlot = () => {
    const group = view.group === null ? [] : JSON.parse(view.group);
    const rows = setup.rows.filter((row) => matches(row) && row.model === group[0] && row.dataset === group[1]);
    draw(plot, () => pareto(setup, rows, view.axis, group), (point) => point.customdata && openRuns(point.customdata.runs));
  };
  const filters = BROAD_FILTERS.map(([key, label]) => {
    const values = [...new Set(setup.rows.map((row) => row[key]))].sort(compareValues).map(String);
    if (!["", ...values].includes(view.filters[key] ?? "")) view.filters[key] = "";
    return select(label, [["", "all"], ...values.map((value) => [value, value])], view.filters[key] ?? "", (value) => ((view.filters[key] = value), fill()));
  });
  const search = el("input", { type: "search", placeholder: "words in any of them", value: view.filters.text ?? "", id: "search" });
  search.addEventListener("input", () => ((view.filters.text = search.value), fill()));
  const axes = Object.entries(DATA.axes).map(([key, [title]]) => [key, title]);
  document.getElementById("setup").replaceChildren(
    el("div", { class: "bar-of-fields" }, ...filters, el("label", { class: "field grow" }, el("span", {}, "Text"), search)),
    el("div", { class: "bar-of-fields" }, groups, select("against", axes, view.axis, (key) => ((view.axis = key), fillPlot()))),
    plot,
    el("p", { class: "faint" }, "A point is a row of the table, its label the number of trained layers; hollow where another is better at no more cost. Click one for its runs; or press Tab, arrow keys and Enter."),
    table.chooser(),
    table.element,
    el("p", { class: "faint" }, setup.note, ` Rows of ${DATA.baseline} are bold. Every further number is among the columns, and in table.csv beside this page.`),
  );
  fill();
}

function fillStates() {
  const names = ["done", "running", "failed", "interrupted", "planned"];
  const counts = stateCounts(RUNS);
  const bars = el("div", { class: "progress", "aria-hidden": "true" });
  for (const name of names.filter((name) => counts[name])) {
    const share = el("span", { class: `share ${name}` });
    share.style.flexGrow = counts[name];
    bars.append(share);
  }
  const told = names.filter((name) => counts[name]).map((name) => el("span", {}, el("span", { class: `state ${name}` }, name), ` ${counts[name]}  `));
  const waiting = RUNS.filter((run) => run.state !== "done");
  const section = document.getElementById("states");
  section.replaceChildren(bars, el("p", {}, ...told));
  if (!waiting.length) return;
  const columns = [["method", "Method", "text"], ["state", "State", "text"], ["model", "Model", "text"], ["dataset", "Data set", "text"], ["layers", "Layers", "layers"], ["seed", "Seed", "runs"], ["when", "Last written (UTC)", "text"]];
  const table = new Table({
    label: "Runs that are not finished",
    columns: columns.map(([key, title, form]) => ({ key, title, form, note: "" })),
    rows: waiting,
    shown: NARROW.matches ? ["method", "state", "layers", "seed"] : columns.map(([key]) => key),
    open: (run) => openRuns([run.place]),
    sub: (run) => `${run.model}, ${run.dataset}`,
  });
  section.append(table.element);
}

const COMPARED = [
  ["method", "Method", "text"], ["setup", "Setup", "text"], ["model", "Model", "text"], ["dataset", "Data set", "text"], ["layers", "Layers", "layers"],
  ["main", "Here (%)", "share"], ["main_other", "There (%)", "share"], ["points", "Δ", "points"],
  ["kept", "Kept here (MiB)", "mib"], ["kept_other", "There (MiB)", "mib"], ["kept_times", "Kept, × of there", "times"],
  ["step", "Step here (ms)", "ms"], ["step_other", "There (ms)", "ms"], ["step_times", "Step, × of there", "times"],
];

function fillCompared() {
  const section = document.getElementById("compared");
  section.hidden = !DATA.compared;
  if (!DATA.compared) return;
  const keys = ["task", "setup", "model", "dataset", "layers", "method", "recipe", "n", "n_other", "main", "main_other", "kept", "kept_other", "step", "step_other"];
  const ratio = (one, other) => (isMissing(one) || !other ? null : one / other);
  const rows = DATA.compared.rows.map((values) => {
    const row = Object.fromEntries(keys.map((key, place) => [key, values[place]]));
    const points = isMissing(row.main) || isMissing(row.main_other) ? null : row.main - row.main_other;
    return { ...row, points, kept_times: ratio(row.kept, row.kept_other), step_times: ratio(row.step, row.step_other) };
  });
  const table = new Table({
    label: `Compared with ${DATA.compared.name}`,
    columns: COMPARED.map(([key, title, form]) => ({ key, title, form, note: "" })),
    rows,
    shown: NARROW.matches ? ["method", "layers", "points", "kept_times"] : COMPARED.map(([key]) => key).filter((key) => key !== "setup" || new Set(rows.map((row) => row.setup)).size > 1),
    sub: (row) => `${row.model}, ${row.dataset}`,
  });
  section.append(el("p", {}, `Here: these runs. There: ${DATA.compared.name}. ${rows.length} rows are in both.`), table.chooser(), table.element);
}

function themeSwitch() {
  const apply = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    redraw();
  };
  let theme = "auto";
  try {
    theme = localStorage.getItem("theme") ?? theme;
  } catch {
    // Not allowed in some places; then nothing is remembered.
  }
  apply(theme);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return choice("Colours", [["auto", "Auto", "as the system"], ["light", "Light", ""], ["dark", "Dark", ""]], theme, (chosen) => {
    apply(chosen);
    try {
      localStorage.setItem("theme", chosen);
    } catch {
      // As above.
    }
  });
}

function start() {
  document.getElementById("theme").append(themeSwitch());
  document.getElementById("headline").textContent = headline();
  const modes = Object.entries(COMPARISONS).map(([key, [title, note]]) => [key, title, note]);
  for (const place of document.querySelectorAll(".mode")) {
    place.replaceChildren(choice("at equal", modes, view.mode, (mode) => {
      view.mode = mode;
      for (const button of document.querySelectorAll(".mode button")) button.setAttribute("aria-pressed", String(button.dataset.key === mode));
      fillOverview();
      fillSetup();
    }, true));
  }
  const setups = DATA.setups.map((setup, place) => [String(place), setup.title]);
  document.getElementById("which").replaceChildren(select("Setup", setups, "0", (place) => ((view.setup = Number(place)), fillSetup())));
  fillOverview();
  fillSetup();
  fillStates();
  fillCompared();
  NARROW.addEventListener("change", () => (fillSetup(), fillStates()));
  const linked = /^#run=(\d+)$/.exec(location.hash);
  if (linked && RUNS[Number(linked[1])]) openRuns([Number(linked[1])]);
}

start();
