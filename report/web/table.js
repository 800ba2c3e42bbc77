// A table of many rows: sorted, filtered, with the columns that are wanted; rows are made as they come into sight.

const PAGE = 100;

class Table {
  // columns: [{key, title, form, note}], the first of which stays in sight; rows: objects;
  // shown: keys of the columns at first; open: what a click on a row does, if anything;
  // sub: a second line in the first column, for narrow screens; cell: (row, column) => text, if not as its form says.
  constructor({ label, columns, rows, shown, open = null, sub = null, cell = null, sort = null }) {
    Object.assign(this, { label, columns, rows, open, sub, cell });
    this.shown = new Set(shown);
    this.sorted = sort;
    this.keep = () => true;
    this.head = el("thead");
    this.body = el("tbody");
    this.count = el("p", { class: "count", role: "status" });
    this.box = el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": label });
    this.box.append(el("table", {}, this.head, this.body));
    this.box.addEventListener("scroll", () => this.#more(), { passive: true });
    this.box.addEventListener("keydown", (event) => this.#arrow(event));
    this.element = el("div", {}, this.box, this.count);
    this.render();
  }

  render() {
    this.visible = this.columns.filter((column) => this.shown.has(column.key));
    this.#renderHead();
    this.found = this.rows.filter(this.keep);
    if (this.sorted) {
      const { key, down } = this.sorted;
      const sign = down ? -1 : 1;
      // What is missing comes last in either direction.
      this.found.sort((a, b) => {
        const missing = isMissing(a[key]) - isMissing(b[key]);
        return missing || sign * compareValues(a[key], b[key]);
      });
    }
    this.body.replaceChildren();
    this.made = 0;
    this.box.scrollTop = 0;
    this.#append();
    const all = this.rows.length === this.found.length;
    this.count.textContent = `${all ? "" : `${this.found.length} of `}${this.rows.length} rows`;
  }

  #renderHead() {
    const cells = this.visible.map((column, place) => {
      const direction = this.sorted?.key === column.key ? (this.sorted.down ? "descending" : "ascending") : "none";
      const mark = { none: "", ascending: " ▲", descending: " ▼" }[direction];
      const button = el("button", { type: "button", title: column.note, onclick: () => this.#sortBy(column) });
      button.append(column.title, el("span", { class: "mark", "aria-hidden": "true" }, mark));
      const kind = place === 0 ? "first left" : TEXTS.has(column.form) ? "left" : "";
      return el("th", { scope: "col", class: kind, "aria-sort": direction, "data-key": column.key }, button);
    });
    this.head.replaceChildren(el("tr", {}, ...cells));
  }

  #sortBy(column) {
    const again = this.sorted?.key === column.key;
    // Numbers begin with the largest, texts with the first.
    const first = !TEXTS.has(column.form) && column.form !== "layers";
    if (again && this.sorted.down !== first) this.sorted = null;
    else this.sorted = { key: column.key, down: again ? !this.sorted.down : first };
    this.render();
    this.head.querySelector(`th[data-key="${CSS.escape(column.key)}"] button`).focus();
  }

  #append() {
    const next = this.found.slice(this.made, this.made + PAGE);
    this.body.append(...next.map((row) => this.#row(row)));
    this.made += next.length;
  }

  #more() {
    const below = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight;
    if (below < 600 && this.made < this.found.length) this.#append();
  }

  #row(row) {
    const element = el("tr", { class: row.kind || false });
    this.visible.forEach((column, place) => {
      const text = this.cell?.(row, column) ?? written(column.form, row[column.key]);
      if (place > 0) {
        element.append(el("td", { class: TEXTS.has(column.form) ? "left" : false }, text));
        return;
      }
      const title = this.open ? el("button", { type: "button", class: "link" }, name(text)) : name(text);
      const further = this.sub ? el("span", { class: "sub" }, this.sub(row)) : null;
      element.append(el("th", { scope: "row", class: "first left" }, title, further));
    });
    if (this.open) element.addEventListener("click", () => this.open(row));
    return element;
  }

  // Up and down go from row to row.
  #arrow(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = event.target.closest?.("tbody tr");
    if (!step || !row) return;
    const beside = step > 0 ? row.nextElementSibling : row.previousElementSibling;
    const button = beside?.querySelector("button.link");
    if (button) {
      event.preventDefault();
      button.focus();
      this.#more();
    }
  }

  // A list of all columns, to choose from.
  chooser() {
    const list = el("div", { class: "columns" });
    const fill = () =>
      list.replaceChildren(
        ...this.columns.slice(1).map((column) => {
          const box = el("input", { type: "checkbox", checked: this.shown.has(column.key), value: column.key });
          box.addEventListener("change", () => {
            if (box.checked) this.shown.add(column.key);
            else this.shown.delete(column.key);
            this.render();
          });
          return el("label", { title: column.note }, box, ` ${column.title}`);
        }),
      );
    const details = el("details", { class: "chooser" }, el("summary", {}, "Columns"), list);
    details.addEventListener("toggle", fill);
    return details;
  }
}
