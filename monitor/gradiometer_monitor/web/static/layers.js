// The layers that stand out, as a table with a line of its recent norms for each.

import { breakable, h, put, svg } from "./dom.js";
import { number, percent, times, whole } from "./format.js";

const FEW = 12;
const SPARK = [120, 24];
const POINTS = 60;
const ORDERS = {
  anomaly: ["Unusual", (layer) => -(layer.anomaly ?? -Infinity)],
  share: ["Largest share", (layer) => -(layer.share ?? -1)],
  model: ["Order of the model", () => 0],
};
const COLUMNS = ["Layer", "Recent", "Norm", "Largest, 60 s", "Against usual", "Share", "Update ratio", "Non-finite"];

export class LayerTable {
  constructor() {
    this.order = "anomaly";
    this.all = false;
    this.choices = Object.entries(ORDERS).map(([key, [text]]) =>
      h("button", { type: "button", "aria-pressed": String(key === this.order), onclick: () => this.choose(key) }, text));
    this.body = h("tbody", { role: "rowgroup" });
    this.more = h("button", { type: "button", class: "more", hidden: true, onclick: () => { this.all = !this.all; this.draw(); } });
    this.section = h("section", { class: "card layers-card" },
      h("div", { class: "cardhead" }, h("h2", {}, "Top layers"), h("div", { class: "segments", role: "group", "aria-label": "Order of the layers" }, ...this.choices)),
      h("table", { class: "layers", role: "table", "aria-label": "Layers" },
        h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...COLUMNS.map((title, place) => h("th", { role: "columnheader", scope: "col", class: place > 1 ? "number" : null }, title)))), this.body),
      this.more);
  }

  choose(key) {
    this.order = key;
    this.choices.forEach((button, place) => button.setAttribute("aria-pressed", String(Object.keys(ORDERS)[place] === key)));
    this.draw();
  }

  update(table, doc, places) {
    if (table) this.table = table;
    Object.assign(this, { doc, places });
    this.draw();
  }

  draw() {
    if (!this.table) return;
    const [, by] = ORDERS[this.order];
    const ordered = this.table.layers.map((layer, place) => ({ layer, place })).sort((a, b) => by(a.layer) - by(b.layer) || a.place - b.place);
    const values = new Map((this.doc?.layers ?? []).map((layer) => [layer.name, layer]));
    this.body.replaceChildren(...ordered.slice(0, this.all ? Infinity : FEW).map(({ layer }) => row(layer, values.get(layer.name), this.places)));
    this.more.hidden = ordered.length <= FEW;
    put(this.more, this.all ? "Show fewer" : `Show all ${whole(ordered.length)} layers`);
  }
}

function row(layer, series, places) {
  const often = layer.median > 0 && layer.window_max !== null ? layer.window_max / layer.median : null;
  const marks = [layer.vanishing && "vanishing", layer.exploding && "exploding"].filter(Boolean).map((text) => h("span", { class: "chip", "data-kind": text }, text));
  const cell = (title, content, level) => h("td", { role: "cell", class: "number", "data-label": title, "data-level": level }, content);
  return h("tr", { role: "row" },
    h("th", { role: "rowheader", scope: "row" }, ...breakable(layer.name), ...marks),
    h("td", { role: "cell", class: "sparkcell" }, series ? spark(series, places) : null),
    cell("Norm", number(layer.last)),
    cell("Largest", number(layer.window_max)),
    cell("Against usual", often === null ? "–" : times(layer.window_max, layer.median), layer.exploding ? "high" : often > 10 ? "raised" : null),
    cell("Share", percent(layer.share)),
    cell("Update ratio", number(layer.update_ratio, 3)),
    cell("Non-finite", whole(layer.nonfinite_steps), layer.nonfinite_steps ? "high" : null));
}

// Logarithmic, like the picture of all layers; a step that was not finite is a dot on top.
function spark(series, places) {
  const [width, height] = SPARK;
  const points = thin(places, series);
  const known = points.filter((value) => value > 0).map(Math.log);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const x = (at, count = points.length) => ((at / Math.max(1, count - 1)) * (width - 4) + 2).toFixed(1);
  const y = (value) => (high > low ? 3 + (1 - (Math.log(value) - low) / (high - low)) * (height - 6) : height / 2).toFixed(1);
  let path = "";
  let pen = "M";
  points.forEach((value, at) => {
    if (value > 0) path += `${pen}${x(at)} ${y(value)}`;
    pen = value > 0 ? "L" : "M";
  });
  const columns = new Map(places.map((place, at) => [place, at]));
  const bad = series.nonfinite.filter((place) => columns.has(place)).map((place) => svg("circle", { cx: x(columns.get(place), places.length), cy: 3, r: 2, class: "bad" }));
  return svg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, svg("path", { d: path }), ...bad);
}

// At most POINTS values, the largest of each few.
function thin(places, series) {
  const each = Math.ceil(places.length / POINTS);
  const found = [];
  for (let at = 0; at < places.length; at += each) {
    found.push(places.slice(at, at + each).reduce((top, place) => (series.values[place] > top ? series.values[place] : top), 0));
  }
  return found;
}
