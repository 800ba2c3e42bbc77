// How numbers become words, and how elements are made: every text goes in as text, never as markup.

const MISSING = "—";

function significant(value) {
  if (value === 0) return "0";
  const exponent = Math.floor(Math.log10(Math.abs(value)));
  return value.toFixed(Math.min(Math.max(2 - exponent, 0), 12));
}

function engineering(value) {
  const power = Math.min(Math.max(Math.floor(Math.log10(Math.max(value, 1)) / 3), 0), 6);
  return significant(value / 1000 ** power) + ["", " k", " M", " G", " T", " P", " E"][power];
}

function signed(value) {
  const text = Math.abs(value).toFixed(1);
  return text === "0.0" ? text : (value > 0 ? "+" : "−") + text;
}

const mebibytes = (value) => significant(value / 2 ** 20);

// Each takes a number; what is missing never gets here.
const FORMS = {
  text: String,
  layers: String,
  runs: String,
  number: significant,
  percent: (value) => value.toFixed(1),
  share: (value) => value.toFixed(1),
  points: signed,
  mib: mebibytes,
  times: (value) => `${significant(value)}×`,
  count: engineering,
  ms: (value) => significant(1000 * value),
};
const TEXTS = new Set(["text"]);

const isMissing = (value) => value === null || value === undefined || value === "";

function written(form, value) {
  return isMissing(value) ? MISSING : FORMS[form](value);
}

// "all" layers are more than any number of them.
const order = (value) => (value === "all" ? Infinity : value);

function compareValues(a, b) {
  if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
  [a, b] = [order(a), order(b)];
  if (typeof a === "string" || typeof b === "string") {
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }
  return a < b ? -1 : a > b ? 1 : 0;
}

// el("td", { class: "left", onclick: f }, "text", element): attributes, handlers, children.
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function select(label, options, value, onchange) {
  const chosen = el("select", { onchange: (event) => onchange(event.target.value) });
  chosen.append(...options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)));
  return el("label", { class: "field" }, el("span", {}, label), chosen);
}

// Buttons of which one is pressed; `options` are [key, text, what it means].
function choice(label, options, value, onchange, shown = false) {
  const group = el("div", { class: "switch", role: "group", "aria-label": label });
  const press = (key) => {
    for (const button of group.children) button.setAttribute("aria-pressed", String(button.dataset.key === key));
  };
  for (const [key, text, note] of options) {
    const button = el("button", { type: "button", title: note, "data-key": key }, text);
    button.addEventListener("click", () => (press(key), onchange(key)));
    group.append(button);
  }
  press(value);
  return el("div", { class: "choice" }, shown ? el("span", {}, label) : null, group);
}

// A name that may be broken after each _.
function name(text) {
  const parts = String(text).split(/(?<=_)/);
  return el("span", {}, ...parts.flatMap((part, place) => (place ? [el("wbr"), part] : [part])));
}

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
