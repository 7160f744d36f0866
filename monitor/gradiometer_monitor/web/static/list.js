// All runs: a table that sorts and filters, kept in place while it changes.

import { h, put } from "./dom.js";
import { ago, number, percent, times, whole } from "./format.js";

const ORDER = { running: 0, lost: 1, finished: 2 };
const now = () => Date.now() / 1000;
const COLUMNS = [
  { key: "run", title: "Run", text: (run) => run.run_id, by: (run) => run.run_id },
  { key: "state", title: "State", text: (run) => run.state, by: (run) => ORDER[run.state] },
  { key: "step", title: "Step", number: true, text: (run) => whole(run.last_step), by: (run) => run.last_step },
  { key: "norm", title: "Gradient norm", number: true, text: (run) => number(run.grad_norm), by: (run) => run.grad_norm },
  {
    key: "usual", title: "Against usual", number: true,
    text: (run) => times(run.grad_norm, run.grad_norm_baseline),
    by: (run) => run.grad_norm / run.grad_norm_baseline,
  },
  { key: "loss", title: "Loss", number: true, text: (run) => number(run.loss), by: (run) => run.loss },
  { key: "clipped", title: "Clipped", number: true, text: (run) => percent(run.clip_ratio), by: (run) => run.clip_ratio },
  {
    key: "nonfinite", title: "Non-finite", number: true,
    text: (run) => whole(run.nonfinite_steps), by: (run) => run.nonfinite_steps,
  },
  {
    key: "age", title: "Last step", number: true,
    text: (run) => (run.last_step_timestamp_seconds ? ago(now() - run.last_step_timestamp_seconds) : "–"),
    by: (run) => -(run.last_step_timestamp_seconds ?? 0),
  },
];

export class ListView {
  constructor(main) {
    this.list = null;
    this.sort = null;
    this.rows = new Map();
    this.filter = h("input", {
      type: "search", id: "filter", placeholder: "Filter by name or state", autocomplete: "off", spellcheck: "false",
      "aria-label": "Filter runs", oninput: () => this.draw(),
    });
    this.heads = COLUMNS.map((column) => this.head(column));
    this.body = h("tbody", { role: "rowgroup" });
    this.count = h("p", { class: "count", role: "status" });
    this.table = h("table", { class: "runs", role: "table", "aria-label": "Runs" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...this.heads)), this.body);
    this.empty = h("div", { class: "empty" });
    this.unreadable = h("section", { class: "unreadable", hidden: true });
    main.replaceChildren(
      h("div", { class: "listhead" }, h("h1", {}, "Runs"), this.count, this.filter),
      h("div", { class: "card flush" }, this.table, this.empty), this.unreadable);
    this.table.hidden = true;
    this.empty.append(h("p", { class: "wait" }, "Reading the runs…"));
    this.timer = setInterval(() => this.draw(), 1000);
  }

  head(column) {
    const press = () => {
      const falls = this.sort?.column === column ? !this.sort.falls : Boolean(column.number && column.key !== "age");
      this.sort = { column, falls };
      this.heads.forEach((cell) => cell.removeAttribute("aria-sort"));
      this.heads[COLUMNS.indexOf(column)].setAttribute("aria-sort", falls ? "descending" : "ascending");
      this.draw();
    };
    return h("th", { role: "columnheader", scope: "col", class: column.number ? "number" : null },
      h("button", { type: "button", onclick: press }, column.title));
  }

  runs(list) {
    this.list = list;
    this.draw();
  }

  ordered() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.list.runs.filter((run) => words.every((word) => `${run.run_id} ${run.state}`.toLowerCase().includes(word)));
    if (!this.sort) {
      return found.sort((a, b) => ORDER[a.state] - ORDER[b.state] || COLUMNS.at(-1).by(a) - COLUMNS.at(-1).by(b) || (a.run_id < b.run_id ? -1 : 1));
    }
    const { column, falls } = this.sort;
    const key = (run) => { const value = column.by(run); return value === null || Number.isNaN(value) ? undefined : value; };
    return found.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return (x < y ? -1 : x > y ? 1 : 0) * (falls ? -1 : 1);
    });
  }

  draw() {
    if (!this.list) return;
    const found = this.ordered();
    const kept = new Set(found.map((run) => run.run_id));
    for (const [runId, row] of this.rows) if (!kept.has(runId)) { row.remove(); this.rows.delete(runId); }
    const focused = document.activeElement;
    found.forEach((run, place) => {
      const row = this.rows.get(run.run_id) ?? this.row(run);
      if (this.body.children[place] !== row) this.body.insertBefore(row, this.body.children[place] ?? null);
      this.update(row, run);
    });
    if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    const all = this.list.runs.length;
    put(this.count, !all ? "" : found.length === all ? `${whole(all)} followed` : `${found.length} of ${all}`);
    this.table.hidden = !found.length;
    this.drawEmpty(found.length, all);
    this.drawUnreadable();
  }

  row(run) {
    const link = h("a", { href: `#${new URLSearchParams({ run: run.run_id })}` }, run.run_id);
    const cells = COLUMNS.map((column) => h("td", { role: "cell", class: `c-${column.key}${column.number ? " number" : ""}`, "data-label": column.title }));
    cells[0].append(link);
    cells[1].append(h("span", { class: "state" }));
    const open = (event) => { if (!event.target.closest("a") && !getSelection().toString()) link.click(); };
    const row = h("tr", { role: "row", onclick: open }, ...cells);
    this.rows.set(run.run_id, row);
    return row;
  }

  update(row, run) {
    COLUMNS.forEach((column, place) => {
      const cell = row.children[place];
      if (place) put(place === 1 ? cell.firstChild : cell, column.text(run));
    });
    row.children[1].firstChild.dataset.state = run.state;
    row.dataset.state = run.state;
    const usual = run.grad_norm / run.grad_norm_baseline;
    row.querySelector(".c-usual").dataset.level = usual > 10 ? "high" : usual > 3 ? "raised" : "";
    row.querySelector(".c-nonfinite").dataset.level = run.nonfinite_steps ? "high" : "";
    const silent = run.state === "running" && now() - run.last_step_timestamp_seconds > 60;
    row.querySelector(".c-age").dataset.level = silent ? "raised" : "";
  }

  drawEmpty(found, all) {
    const kind = found ? "" : all ? "filter" : "none";
    this.empty.hidden = Boolean(found);
    if (this.empty.dataset.kind === kind) return;
    this.empty.dataset.kind = kind;
    if (kind === "filter") this.empty.replaceChildren(h("p", {}, "No run fits the filter."));
    if (kind === "none") {
      this.empty.replaceChildren(
        h("h2", {}, "No runs yet"),
        h("p", {}, "A run is here as soon as it has taken a step. It ends up below the directory that this monitor was started with (--dir, GRADIOMETER_DIR)."),
        h("p", {}, "Try it: "), h("pre", {}, "gradiometer demo"),
        h("p", {}, "or in your own training loop: "), h("pre", {}, "agent = gradiometer.attach(model, optimizer)"));
    }
  }

  drawUnreadable() {
    const found = Object.entries(this.list.unreadable);
    this.unreadable.hidden = !found.length;
    const text = JSON.stringify(found);
    if (this.unreadable.dataset.text === text) return;
    this.unreadable.dataset.text = text;
    this.unreadable.replaceChildren(
      h("h2", {}, `${found.length} that cannot be read`),
      h("p", {}, "The others are not affected. The monitor's log says why, and it tries again every 30 s."),
      h("ul", {}, ...found.map(([name, error]) => h("li", {}, h("code", {}, name), ` ${error}`))));
  }

  destroy() {
    clearInterval(this.timer);
  }
}
