// What comes first: how much there is, and the best of every data set against the baseline.

const CARDS = NARROW.matches ? 3 : 9;
const NEAR = 1; // points below the baseline's best that count as equally accurate
const COMPARISONS = {
  depth: ["depth", "At equal depth: against the baseline with as many trained layers", "difference", "saved_measured_times_less", "step_median_times_less"],
  memory: ["memory", "At equal memory: against the baseline's best, at any depth, where it keeps at most as much memory", "equal_saved_difference_points", null, null],
  accuracy: ["accuracy", "At equal accuracy: against the baseline's least, at any depth, where it is at least as accurate", null, "equal_accuracy_saved_times_less", "equal_accuracy_step_times_less"],
};

function least(rows, key, sign = 1) {
  const known = rows.filter((row) => !isMissing(row[key]));
  return known.reduce((best, row) => (best && sign * best[key] <= sign * row[key] ? best : row), null);
}

// The rows of one model and data set that matter most, each with what it is.
function bests(rows) {
  const own = rows.filter((row) => row.n && row.method === DATA.baseline);
  // Of equals the one that keeps least comes first.
  const others = rows.filter((row) => row.n && row.method !== DATA.baseline).sort((a, b) => compareValues(a.saved_measured_bytes, b.saved_measured_bytes));
  const baseline = least(own, "main", -1);
  const near = baseline ? others.filter((row) => row.main >= baseline.main - NEAR) : [];
  const chosen = [
    [`Best of ${DATA.baseline}`, baseline],
    ["Most accurate", least(others, "main", -1)],
    ["Least memory *", least(near, "saved_measured_bytes")],
    ["Fastest *", least(near, "step_median_s")],
  ];
  const merged = new Map();
  for (const [name, row] of chosen) if (row) merged.set(row, [...(merged.get(row) ?? []), name]);
  return [...merged].map(([row, names]) => [names.map((name, place) => (place ? name[0].toLowerCase() + name.slice(1) : name)).join(", "), row]);
}

// Three times less, or so many times more.
const times = (ratio) => (ratio >= 1 ? `${significant(ratio)}× less` : `${significant(1 / ratio)}× more`);

function card(setup, rows, mode) {
  const [, , points, memory, time] = COMPARISONS[mode];
  const [{ model, dataset }] = rows;
  const compared = (row, value, key, form) => {
    const known = key && row.method !== DATA.baseline && !isMissing(row[key]);
    return [value, el("span", { class: "sub" }, known ? (form === "times" ? times(row[key]) : written(form, row[key])) : "")];
  };
  const lines = bests(rows).map(([what, row]) =>
    el(
      "tr",
      { onclick: () => openRuns(row.runs) },
      el("th", { scope: "row", class: "left" }, el("span", { class: "sub" }, what), el("button", { type: "button", class: "link" }, name(row.method)), el("span", { class: "faint" }, ` ${row.layers === "all" ? "all layers" : `last ${row.layers}`}`)),
      el("td", {}, ...compared(row, written("share", row.main), points, "points")),
      el("td", {}, ...compared(row, written("mib", row.saved_measured_bytes), memory, "times")),
      el("td", {}, ...compared(row, written("ms", row.step_median_s), time, "times")),
    ),
  );
  const runs = rows.reduce((sum, row) => sum + row.n, 0);
  const titles = ["", `${setup.accuracy[0]} (%)`, "Kept (MiB)", "Step (ms)"];
  return el(
    "article",
    { class: "card" },
    el("h3", {}, dataset, el("span", { class: "faint" }, ` ${model}, ${setup.title.replace("Setup ", "")}`)),
    el("table", {}, el("thead", {}, el("tr", {}, ...titles.map((title) => el("th", { scope: "col" }, title)))), el("tbody", {}, ...lines)),
    el("p", { class: "faint" }, `${runs} finished run${runs === 1 ? "" : "s"}`),
  );
}

function overview(mode, all = false) {
  const groups = [];
  for (const setup of DATA.setups) {
    for (const rows of Map.groupBy(setup.rows.filter((row) => row.n), (row) => JSON.stringify([row.model, row.dataset])).values()) {
      groups.push([setup, rows]);
    }
  }
  // Pretraining and the like compare nothing.
  const comparing = groups.filter(([, rows]) => new Set(rows.map((row) => row.method)).size > 1);
  const told = comparing.length ? comparing : groups;
  const cards = el("div", { class: "cards" }, ...told.slice(0, all ? told.length : CARDS).map(([setup, rows]) => card(setup, rows, mode)));
  const further = !all && told.length > CARDS ? el("button", { type: "button", onclick: () => fillOverview(true) }, `All ${told.length} data sets and models`) : "";
  return [cards, further, el("p", { class: "faint" }, `${COMPARISONS[mode][1]}. * Of those at most ${NEAR} point below the best of ${DATA.baseline}.`)];
}

function fillOverview(all = false) {
  document.getElementById("bests").replaceChildren(...overview(view.mode, all));
}

function headline() {
  const counts = stateCounts(RUNS);
  const times = RUNS.filter((run) => run.state === "done" && run.when).map((run) => run.when).sort();
  const day = (time) => time.slice(0, 10);
  const span = times.length ? (day(times[0]) === day(times.at(-1)) ? day(times[0]) : `${day(times[0])} to ${day(times.at(-1))}`) : "";
  const machines = DATA.made_by.hardware;
  const on = machines.length > 2 ? `${machines.length} kinds of machines` : machines.join("; ");
  const versions = DATA.made_by.code_version.length;
  const code = versions > 1 ? `${versions} versions of the code` : "";
  return [`${counts.done ?? 0} finished runs`, span, on, code].filter(Boolean).join(" · ");
}
