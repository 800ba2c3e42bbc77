// One run: a dialog over the page, with the runs of the same row to change to. `#run=12` in the address opens it.

const chunks = new Map();

async function detailsOf(place) {
  const chunk = Math.floor(place / DATA.chunk);
  if (!chunks.has(chunk)) chunks.set(chunk, unpacked(DATA.details[chunk]).then(JSON.parse));
  return (await chunks.get(chunk))[place % DATA.chunk];
}

const dialog = document.getElementById("run");
dialog.addEventListener("close", () => {
  if (location.hash.startsWith("#run=")) history.replaceState(null, "", location.pathname + location.search);
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

// `places` are of the runs of one row; the first is shown.
function openRuns(places) {
  if (places.length) showRun(places, places[0]);
}

async function showRun(places, place) {
  const run = RUNS[place];
  history.replaceState(null, "", `#run=${place}`);
  const seeds = places.map((each) => [String(each), `seed ${RUNS[each].seed}`, RUNS[each].state]);
  const content = el("div", { class: "content" }, el("p", {}, "…"));
  dialog.replaceChildren(
    el(
      "header",
      {},
      el("h2", {}, `${run.method}, layers ${run.layers}`),
      el("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => dialog.close() }, "✕"),
      el("p", {}, `${run.model} on ${run.dataset}, ${DATA.setups[run.setup].title}`),
    ),
    places.length > 1 ? choice("Seed", seeds, String(place), (key) => showRun(places, Number(key))) : el("p", { class: "faint" }, `seed ${run.seed}`),
    content,
  );
  if (!dialog.open) dialog.showModal();
  const found = await detailsOf(place);
  content.replaceChildren(...runParts(run, found));
  dialog.scrollTop = 0;
}

function part(title, ...children) {
  return el("section", {}, el("h3", {}, title), ...children);
}

function runParts(run, found) {
  const state = el("span", { class: `state ${run.state}` }, run.state);
  const parts = [el("p", {}, state, ` ${run.when ? `${run.when} UTC` : ""}`), el("p", { class: "faint path" }, run.folder)];
  if (found.accuracy) parts.push(numbers(found));
  if (found.log) parts.push(part("Log", el("pre", { tabindex: "0" }, found.log)));
  if (found.curves) parts.push(part("Training", curves(found.curves)));
  if (found.ranks) parts.push(part("Ranks and memory by layer", ranks(found.ranks)));
  if (found.memory) parts.push(part("Kept memory by module", memory(found.memory)));
  const left = ["ranks", "memory"].filter((name) => !found[name]);
  if (found.accuracy && left.length) parts.push(el("p", { class: "faint" }, `This run left no ${left.map((name) => `${name}.json`).join(" and no ")}.`));
  if (found.recipe && Object.keys(found.recipe).length) parts.push(part("Recipe", pairs(found.recipe)));
  if (found.provenance && Object.keys(found.provenance).length) parts.push(part("Provenance", pairs(found.provenance)));
  if (found.config) parts.push(el("section", {}, el("details", {}, el("summary", {}, el("h3", {}, "Config")), el("pre", { tabindex: "0" }, found.config))));
  return parts;
}

function numbers(found) {
  const mib = (name) => written("mib", found.memory_bytes[name]);
  const told = [
    ...Object.entries(found.accuracy).map(([name, value]) => [name.replace(/^val_/, "validation, ").replaceAll("_", " "), `${(100 * value).toFixed(1)} %`]),
    ["kept", `${mib("saved_measured")} MiB`],
    ["peak", `${mib("peak_measured")} MiB`],
    ["by formula", `${mib("activation_formula")} MiB`],
    ["step", `${written("ms", found.time_s.step_median)} ms`],
    ["FLOPs", written("count", found.flops.corrected)],
  ];
  return el("dl", { class: "tiles" }, ...told.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function curves(found) {
  const names = Object.keys(found);
  const panels = [
    [names.filter((name) => name.endsWith("loss")), 1, "Loss"],
    [names.filter((name) => /accuracy$|^miou$|^macc$/.test(name)), 100, "%"],
    [names.filter((name) => name === "activation_bytes"), 2 ** -20, "Inputs by formula (MiB)"],
  ];
  const boxes = panels.filter(([chosen]) => chosen.length).map(([chosen, unit, title]) => {
    const box = plotBox(`${title} over the training`, { class: "plot small" });
    draw(box, () => lines(found, chosen, unit, title));
    return box;
  });
  return el("div", { class: "panels" }, ...boxes);
}

const list = (value) => (Array.isArray(value) ? value.map((each) => (isMissing(each) ? MISSING : each)).join(" × ") : isMissing(value) ? MISSING : String(value));

// A value with a bar as long as its share of the largest.
function bar(value, largest, text) {
  const fill = el("span", { class: "fill" });
  fill.style.width = `${largest ? (100 * value) / largest : 0}%`;
  return el("span", { class: "bar" }, fill, el("span", {}, text));
}

function grid(titles, rows) {
  const head = el("tr", {}, ...titles.map(([title, kind], place) => el("th", { scope: "col", class: place === 0 ? "first left" : kind }, title)));
  const body = rows.map((cells) => el("tr", {}, ...cells.map((cell, place) => (place === 0 ? el("th", { scope: "row", class: "first left" }, cell) : el("td", { class: titles[place][1] }, cell)))));
  return el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": titles[0][0] }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}

function ranks(layers) {
  const bytes = (layer) => (typeof layer.activation_bytes === "number" ? layer.activation_bytes : 0);
  const largest = Math.max(...layers.map(bytes));
  const share = (value) => (typeof value === "number" ? `${(100 * value).toFixed(1)} %` : MISSING);
  const titles = [["Layer"], ["Input", "left"], ["Ranks", "left"], ["Energy", "left"], ["Captured"], ["MiB by formula", "left"], ["FLOPs"]];
  return grid(titles, layers.map((layer) => [
    list(layer.name), list(layer.shape), (isMissing(layer.derived) ? list(layer.ranks) : `from ${list(layer.derived)}`) + (isMissing(layer.weight_rank) ? "" : ` (weight ${layer.weight_rank})`), list(layer.energy),
    share(layer.captured), bar(bytes(layer), largest, mebibytes(bytes(layer))), typeof layer.flops === "number" ? engineering(layer.flops) : MISSING,
  ]));
}

function memory(modules) {
  const largest = Math.max(...modules.map((row) => row[2]));
  const titles = [["Module"], ["Kind", "left"], ["MiB", "left"], ["Why", "left why"]];
  const all = modules.map(([name, kind, bytes, reason]) => [list(name), list(kind), bar(bytes, largest, mebibytes(bytes)), list(reason)]);
  const few = 12;
  const box = el("div", {}, grid(titles, all.slice(0, few)));
  if (all.length > few) {
    box.append(el("button", { type: "button", onclick: () => box.replaceChildren(grid(titles, all)) }, `All ${all.length} modules`));
  }
  return box;
}

function pairs(content) {
  const rows = Object.entries(content).map(([name, value]) => {
    const text = value !== null && typeof value === "object" && !Array.isArray(value) ? Object.entries(value).map(([key, inner]) => `${key} ${list(inner)}`).join(", ") : list(value);
    return el("div", {}, el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, text));
  });
  return el("dl", { class: "pairs" }, ...rows);
}
