// Plots. The library comes compressed in the page, and is unpacked when the first plot comes into sight.

let loading = null;

function plotly() {
  loading ??= unpacked(document.getElementById("plotly").textContent).then((source) => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    script.remove();
    return window.Plotly;
  });
  return loading;
}

// The library reads markup and %{...} in its texts.
function plain(text) {
  const signs = { "&": "&amp;", "<": "&lt;", ">": "&gt;", "%": "&#37;" };
  return String(text).replace(/[&<>%]/g, (sign) => signs[sign]);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const MARKERS = {
  o: "circle", s: "square", "^": "triangle-up", D: "diamond", v: "triangle-down",
  p: "pentagon", P: "cross", X: "x", h: "hexagon",
};
const DASHES = { "-": "solid", "--": "dash", ":": "dot", "-.": "dashdot" };
// Black is not seen on dark ground.
const ink = (method) => (DATA.looks[method][0] === "#000000" ? colour("--ink") : DATA.looks[method][0]);

const drawn = new Map(); // the drawings in the page, to be made again when the colours change

function layout(horizontal, vertical, further = {}) {
  const line = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 14, r: 22, t: 22, b: 14 },
    dragmode: NARROW.matches ? false : "zoom", // a finger scrolls the page
    hoverlabel: { align: "left", bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    legend: { orientation: "h", yref: "container", y: 0.01, yanchor: "bottom", x: 0, font: { size: 12 }, ...(NARROW.matches ? { entrywidth: 0.5, entrywidthmode: "fraction" } : {}) },
    ...further,
    xaxis: { ...line, title: { text: horizontal, standoff: 8 }, ...further.xaxis },
    yaxis: { ...line, title: { text: vertical, standoff: 8 }, ...further.yaxis },
  };
}

// What a plot is drawn into: reached by Tab, its points by arrow keys.
function plotBox(label, attributes) {
  const told = { role: "application", "aria-roledescription": "plot", "aria-label": `${label}. Arrow keys go from point to point` };
  return el("div", { tabindex: "0", ...told, ...attributes });
}

// Draw into an element once it is in sight; `make` gives [traces, layout] in the colours of the moment.
function draw(box, make, onclick = null) {
  drawn.set(box, make);
  const now = async () => {
    const library = await plotly();
    const [traces, arrangement] = drawn.get(box)();
    await library.react(box, traces, arrangement, { responsive: true, displaylogo: false, displayModeBar: false });
    if (!box.dataset.listening) {
      box.dataset.listening = "yes";
      if (onclick) box.on("plotly_click", (event) => onclick(event.points[0]));
      walk(box, library, onclick);
    }
    box.dataset.drawn = "yes";
  };
  if (box.dataset.drawn) return now();
  const watcher = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watcher.disconnect();
    now();
  }, { rootMargin: "400px" });
  watcher.observe(box);
  return null;
}

// A plot's points by keyboard: left and right go along a line, up and down to another, Enter is a click.
const STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Enter: [0, 0] };

function walk(box, library, onclick) {
  const told = el("p", { class: "unseen", role: "status" });
  const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
  let at = null; // the line, of those that are shown, and the point in it
  box.after(told);
  const say = () => {
    const parts = [...box.querySelectorAll(".hoverlayer text")].flatMap((text) => (text.children.length ? [...text.children] : [text]));
    told.textContent = parts.map((part) => part.textContent).join(", ");
  };
  box.addEventListener("blur", () => library.Fx.unhover(box));
  box.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    const lines = box.data.flatMap((trace, place) => (trace.visible === "legendonly" || !trace.x.length ? [] : [place]));
    if (!step || !lines.length) return;
    event.preventDefault();
    const entered = at !== null && event.key === "Enter";
    at = at === null ? [0, 0] : [within(at[0] + step[0], lines.length), at[1] + step[1]];
    const line = lines[at[0]];
    at[1] = within(at[1], box.data[line].x.length);
    if (entered) onclick?.({ customdata: box.data[line].customdata?.[at[1]] });
    else library.Fx.hover(box, [{ curveNumber: line, pointNumber: at[1] }]);
    setTimeout(say, 100); // the library draws a tooltip at most every 50 ms
  });
}

function redraw() {
  for (const box of drawn.keys()) {
    if (!box.isConnected) drawn.delete(box);
    else if (box.dataset.drawn) draw(box, drawn.get(box));
  }
}

const UNITS = { mib: 2 ** -20, ms: 1000, count: 1 };

const against = (ratio) => (isMissing(ratio) ? "" : ` (${times(ratio)})`);

function tooltip(row, accuracy) {
  const spread = isMissing(row.main_std) ? "" : ` ± ${row.main_std.toFixed(1)}`;
  const lines = [
    `<b>${plain(row.method)}</b>, layers ${plain(row.layers)}${row.recipe ? `, ${plain(row.recipe)}` : ""}`,
    `${plain(accuracy)} ${written("share", row.main)}${spread} % (${row.n} run${row.n === 1 ? "" : "s"})`,
    `kept ${written("mib", row.saved_measured_bytes)} MiB${against(row.saved_measured_times_less)}`,
    `step ${written("ms", row.step_median_s)} ms${against(row.step_median_times_less)}`,
  ];
  return lines.join("<br>");
}

// An axis with ticks at 1, 2 and 5, or only at tenfolds where there are many.
function logarithmic(values) {
  if (!values.length) return {};
  const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log10);
  const ticks = [];
  for (let power = Math.floor(low) - 1; power <= Math.ceil(high) + 1; power += 1) {
    for (const first of high - low > (NARROW.matches ? 1 : 3) ? [1] : [1, 2, 5]) ticks.push(first * 10 ** power);
  }
  const padding = Math.max(0.07 * (high - low), 0.15);
  return { type: "log", range: [low - padding, high + padding], tickvals: ticks, ticktext: ticks.map((tick) => (tick >= 1e6 ? engineering(tick) : String(Number(tick.toPrecision(1))))) };
}

// Accuracy against one cost, a line a method, hollow where another row is better at no more cost.
function pareto(setup, rows, axis, group) {
  const [title, form] = DATA.axes[axis];
  const place = Object.keys(DATA.axes).indexOf(axis);
  const there = rows.filter((row) => row[axis] > 0 && !isMissing(row.main));
  const methods = [...new Set(there.map((row) => row.method))];
  const traces = methods.map((method) => {
    const points = there.filter((row) => row.method === method).sort((a, b) => a[axis] - b[axis]);
    const [, marker, dash] = DATA.looks[method];
    const symbols = points.map((row) => MARKERS[marker] + (row.dominated[place] ? "-open" : ""));
    return {
      name: plain(method),
      x: points.map((row) => row[axis] * UNITS[form]),
      y: points.map((row) => row.main),
      error_y: { type: "data", array: points.map((row) => row.main_std ?? 0), thickness: 1, width: 3, visible: points.some((row) => row.main_std > 0) },
      text: points.map((row) => plain(row.layers)),
      hovertext: points.map((row) => tooltip(row, setup.accuracy[2])),
      hoverinfo: "text",
      customdata: points,
      cliponaxis: false,
      mode: there.length <= (NARROW.matches ? 16 : 60) ? "lines+markers+text" : "lines+markers",
      textposition: "top center",
      textfont: { size: 11 },
      line: { color: ink(method), width: 1.3, dash: DASHES[dash] },
      marker: { color: ink(method), size: 9, symbol: symbols },
    };
  });
  const published = { activation_formula_bytes: 5, flops_paper: 6 }[axis];
  const printed = setup.published.filter((point) => point[0] === group[0] && point[1] === group[1] && point[published] > 0);
  for (const method of new Set(printed.map((point) => point[2]))) {
    const points = printed.filter((point) => point[2] === method).sort((a, b) => a[published] - b[published]);
    traces.push({
      name: `${plain(method)}, published`,
      x: points.map((point) => point[published] * UNITS[form]),
      y: points.map((point) => point[4]),
      hovertext: points.map((point) => `<b>${plain(method)}</b>, layers ${plain(point[3])}, published<br>${point[4].toFixed(1)} % (${plain(setup.published_accuracy)})`),
      hoverinfo: "text",
      mode: "lines+markers",
      visible: "legendonly",
      line: { color: ink(method), width: 0.8, dash: "dot" },
      marker: { color: ink(method), size: 6, symbol: "x-thin-open" },
    });
  }
  return [traces, layout(title, `${setup.accuracy[2]} (%)`, { hovermode: "closest", xaxis: logarithmic(traces.flatMap((trace) => trace.x)) })];
}

// Curves over epochs or iterations.
function lines(curves, names, unit, title) {
  const along = Object.keys(curves)[0];
  const shades = [colour("--mark"), colour("--second"), colour("--third")];
  const traces = names.map((name, place) => ({
    name: plain(name.replaceAll("_", " ")),
    x: curves[along],
    y: curves[name].map((value) => value * unit),
    mode: curves[along].length > 1 ? "lines" : "markers",
    line: { color: shades[place % 3], width: 2 },
    marker: { color: shades[place % 3], size: 8 },
  }));
  return [traces, layout(plain(along), title, { hovermode: "x unified", showlegend: names.length > 1, yaxis: { rangemode: unit === 2 ** -20 ? "tozero" : "normal" } })];
}
