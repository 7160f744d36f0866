// Layers by steps as a picture: logarithmic colours, the layers in the order of the model, a cursor for mouse and keys.

import { css, isDark, ramp } from "./colors.js";
import { colour, h, put, say } from "./dom.js";
import { number, steps as said, whole } from "./format.js";

const AXIS = 26;
const FONT = "12px system-ui, sans-serif";
const MIN_ROW = 4, MAX_ROW = 22, IDEAL = 400, READABLE = 13; // pixels

export class Heatmap {
  constructor({ on }) {
    this.on = on;
    this.doc = null;
    this.at = null; // {layer, bucket} under the cursor
    this.canvas = h("canvas");
    this.box = h("div", {
      class: "heat", tabindex: 0, role: "application", "aria-roledescription": "heatmap",
      "aria-label": "Norm of each layer over the steps: arrow keys move the cursor, Enter marks the step",
      onkeydown: (event) => this.key(event), onpointermove: (event) => this.hover(event), onpointerleave: () => this.move(null),
      onpointerdown: (event) => this.hover(event), onblur: () => this.move(null), onclick: () => this.pick(),
    }, this.canvas);
    this.tip = h("div", { class: "tip", hidden: true });
    this.bar = h("canvas", { class: "ramp", width: 160, height: 10 });
    [this.low, this.high] = [h("span"), h("span")];
    this.badSwatch = h("i", { class: "swatch bad" });
    const legend = h("div", { class: "key" }, this.low, this.bar, this.high,
      h("span", { class: "pair" }, this.badSwatch, "not finite"), h("span", { class: "pair" }, h("i", { class: "swatch none" }), "no gradient"));
    this.caption = h("p", { class: "said" });
    this.figure = h("figure", { class: "card" },
      h("figcaption", {}, h("h2", {}, "Layers"), h("span", { class: "note" }, "norm before clipping, largest of each cell"), legend),
      h("div", { class: "heatbox" }, this.box, this.tip), this.caption);
    this.observer = new ResizeObserver(() => this.render());
    this.observer.observe(this.box);
  }

  draw(doc, keep, focus) {
    Object.assign(this, { doc, keep, focus });
    const pen = this.canvas.getContext("2d");
    pen.font = FONT;
    this.widest = doc.layers.reduce((most, layer) => Math.max(most, pen.measureText(layer.name).width), 0);
    this.scale();
    this.picture();
    this.render();
    const { layers } = doc;
    const bad = layers.filter((layer) => layer.nonfinite.length).length;
    const top = this.largest;
    put(this.caption, layers.length && keep.length
      ? `${whole(layers.length)} ${layers.length === 1 ? "layer" : "layers"}, ${said(doc.steps[keep[0]], doc.last_steps[keep.at(-1)])}. `
        + (top ? `Largest: ${layers[top.layer].name}, ${number(top.value)} at step ${whole(doc.steps[top.bucket])}. ` : "")
        + (bad ? `${bad} ${bad === 1 ? "layer was" : "layers were"} not finite in some step.` : "")
      : "No step yet.");
    if (this.at) this.move(this.at);
  }

  // Colours run from the second percentile to the largest value shown.
  scale() {
    const found = [];
    this.largest = null;
    this.doc.layers.forEach((layer, place) => {
      for (const bucket of this.keep) {
        const value = layer.values[bucket];
        if (!(value > 0)) continue;
        found.push(value);
        if (!this.largest || value > this.largest.value) this.largest = { value, layer: place, bucket };
      }
    });
    found.sort((a, b) => a - b);
    const [low, high] = found.length ? [found[Math.floor(0.02 * found.length)], found.at(-1)] : [1, 10];
    this.range = [Math.log(low), Math.log(Math.max(high, low * 1.001))];
    put(this.low, number(low, 2));
    put(this.high, number(high, 2));
  }

  picture() {
    const { doc, keep } = this;
    const colours = ramp(isDark());
    const [low, high] = this.range;
    const bad = pack(colour("bad"));
    const image = new ImageData(Math.max(1, keep.length), Math.max(1, doc.layers.length));
    const pixels = new Uint32Array(image.data.buffer);
    const columns = new Map(keep.map((bucket, column) => [bucket, column]));
    doc.layers.forEach((layer, row) => {
      keep.forEach((bucket, column) => {
        const value = layer.values[bucket];
        if (value === null) return; // what is behind it shows: no gradient
        const t = value > 0 ? (Math.log(value) - low) / (high - low) : 0;
        pixels[row * image.width + column] = colours[Math.max(0, Math.min(255, Math.round(255 * t)))];
      });
      for (const bucket of layer.nonfinite) {
        if (columns.has(bucket)) pixels[row * image.width + columns.get(bucket)] = bad;
      }
    });
    this.image = new OffscreenCanvas(image.width, image.height);
    this.image.getContext("2d").putImageData(image, 0, 0);
    const bar = this.bar.getContext("2d");
    for (let x = 0; x < 160; x++) {
      bar.fillStyle = css(colours[Math.round((255 * x) / 159)]);
      bar.fillRect(x, 0, 1, 10);
    }
  }

  layout() {
    const width = this.box.clientWidth;
    const rows = Math.max(1, this.doc.layers.length);
    const row = rows <= 48 ? Math.max(READABLE, Math.min(MAX_ROW, IDEAL / rows)) : Math.max(MIN_ROW, IDEAL / rows);
    const label = Math.min(Math.ceil(this.widest) + 12, 210, Math.round(width * 0.34));
    return { width, label, row, plot: Math.max(1, width - label), height: rows * row };
  }

  render() {
    if (!this.doc || !this.box.clientWidth) return;
    const { width, label, row, plot, height } = this.layout();
    this.canvas.dataset.label = label;
    const rows = this.doc.layers.length;
    const scale = devicePixelRatio;
    const [w, t] = [Math.round(width * scale), Math.round((height + AXIS) * scale)];
    if (this.canvas.width !== w || this.canvas.height !== t) [this.canvas.width, this.canvas.height] = [w, t];
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height + AXIS}px`;
    const ctx = this.canvas.getContext("2d");
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height + AXIS);
    hatch(ctx, label, plot, height);
    ctx.imageSmoothingEnabled = false;
    if (this.keep.length) ctx.drawImage(this.image, label, 0, plot, height);
    ctx.fillStyle = colour("card");
    if (row >= 8) for (let place = 1; place < this.doc.layers.length; place++) ctx.fillRect(label, place * row - 0.5, plot, 1);
    ctx.font = FONT;
    ctx.fillStyle = colour("muted");
    ctx.textBaseline = "middle";
    const every = Math.ceil(READABLE / row);
    this.doc.layers.forEach((layer, place) => {
      if (place % every === 0 && (place + every <= rows || !place)) ctx.fillText(cut(ctx, layer.name, label - 10), 0, (place + Math.min(every, rows - place) / 2) * row);
    });
    this.axis(ctx, label, plot, height);
    this.cursor(ctx, label, plot, row, height);
  }

  axis(ctx, label, plot, height) {
    const { steps, last_steps: last } = this.doc;
    if (!this.keep.length) return;
    const cell = plot / this.keep.length;
    const apart = apartBy(last[this.keep.at(-1)] - steps[this.keep[0]], Math.max(1, plot / 90));
    let free = 0;
    ctx.textAlign = "center";
    this.keep.forEach((bucket, column) => {
      const step = Math.ceil(steps[bucket] / apart) * apart;
      if (step > last[bucket]) return;
      const half = ctx.measureText(whole(step)).width / 2;
      const x = (column + (step - steps[bucket]) / (last[bucket] - steps[bucket] + 1)) * cell;
      const centre = Math.max(half, Math.min(plot - half, x));
      if (centre - half < free) return;
      free = centre + half + 24;
      ctx.fillText(whole(step), label + centre, height + AXIS / 2 + 2);
    });
    ctx.textAlign = "left";
  }

  cursor(ctx, label, plot, row, height) {
    const cell = plot / Math.max(1, this.keep.length);
    const column = this.focus === null ? -1 : this.keep.findIndex((bucket) => this.doc.last_steps[bucket] >= this.focus);
    if (column >= 0) {
      ctx.strokeStyle = colour("ink");
      ctx.lineWidth = 1.5;
      ctx.strokeRect(label + column * cell - 1, 0.75, Math.max(3, cell + 2), height - 1.5);
    }
    if (!this.at) return;
    ctx.strokeStyle = colour("card");
    ctx.lineWidth = 4;
    const x = label + this.at.column * cell;
    const box = [x - 1.5, this.at.layer * row - 1.5, Math.max(4, cell) + 3, Math.max(4, row) + 3];
    ctx.strokeRect(...box);
    ctx.strokeStyle = colour("ink");
    ctx.lineWidth = 2;
    ctx.strokeRect(...box);
  }

  hover(event) {
    if (!this.doc || !this.keep.length) return;
    const box = this.canvas.getBoundingClientRect();
    const { label, row, plot } = this.layout();
    const [x, y] = [event.clientX - box.left - label, event.clientY - box.top];
    const layer = Math.floor(y / row);
    const column = Math.min(this.keep.length - 1, Math.max(0, Math.floor((x / plot) * this.keep.length)));
    this.move(layer >= 0 && layer < this.doc.layers.length ? { layer, column } : null);
  }

  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-10, 0], PageDown: [10, 0] };
    const ends = { Home: 0, End: this.keep?.length - 1 };
    if (!this.doc || !this.keep.length) return;
    if (event.key === "Enter") return this.pick();
    if (event.key === "Escape") return this.move(null);
    if (!(event.key in moves) && !(event.key in ends)) return;
    event.preventDefault();
    const from = this.at ?? { layer: 0, column: this.keep.length - 1 };
    const [down, right] = this.at ? (moves[event.key] ?? [0, 0]) : [0, 0];
    const layer = Math.max(0, Math.min(this.doc.layers.length - 1, from.layer + down));
    const column = ends[event.key] ?? Math.max(0, Math.min(this.keep.length - 1, from.column + right));
    this.move({ layer, column });
    say(this.tip.textContent);
  }

  pick() {
    if (this.at) this.on.pick(this.doc.steps[this.keep[this.at.column]]);
  }

  move(at) {
    this.at = at && at.layer < this.doc.layers.length && at.column < this.keep.length ? at : null;
    this.tip.hidden = !this.at;
    this.render();
    if (!this.at) return;
    const layer = this.doc.layers[this.at.layer];
    const bucket = this.keep[this.at.column];
    const value = layer.values[bucket];
    const bad = layer.nonfinite.includes(bucket);
    const text = bad ? `not finite${value === null ? "" : `, else up to ${number(value)}`}` : value === null ? "no gradient" : number(value);
    this.tip.replaceChildren(h("b", {}, layer.name), h("span", {}, said(this.doc.steps[bucket], this.doc.last_steps[bucket])), h("span", { class: bad ? "bad" : "value" }, text));
    const { label, row, plot, width } = this.layout();
    const x = label + ((this.at.column + 0.5) * plot) / this.keep.length;
    const room = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(width - room, x - room / 2))}px`;
    const above = this.at.layer * row - this.box.scrollTop - this.tip.offsetHeight - 8;
    this.tip.style.top = `${above >= -40 ? above : (this.at.layer + 1) * row - this.box.scrollTop + 10}px`;
    this.on.point(this.doc.steps[bucket]);
  }

  destroy() {
    this.observer.disconnect();
  }
}

function hatch(ctx, left, width, height) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, 0, width, height);
  ctx.clip();
  ctx.fillStyle = colour("ground");
  ctx.fillRect(left, 0, width, height);
  ctx.strokeStyle = colour("hatch");
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let x = left - height; x < left + width; x += 6) {
    ctx.moveTo(x, height);
    ctx.lineTo(x + height, 0);
  }
  ctx.stroke();
  ctx.restore();
}

// A name that is too long: its modules become initials, the outermost first, while numbers stay, for they tell blocks apart;
// if that is not enough, the middle of its last part is left out.
function cut(ctx, name, width) {
  const fits = (text) => ctx.measureText(text).width <= width;
  const parts = name.split(".");
  for (let place = 0; place < parts.length - 1 && !fits(parts.join(".")); place++) {
    if (!/^\d+$/.test(parts[place])) parts[place] = parts[place].slice(0, 1);
  }
  const short = parts.join(".");
  if (fits(short)) return short;
  const last = parts.at(-1);
  const begin = short.slice(0, -last.length);
  let kept = last.length - 1;
  const text = () => `${begin}${last.slice(0, kept >> 1)}…${last.slice(last.length - ((kept + 1) >> 1))}`;
  while (kept > 1 && !fits(text())) kept -= 1;
  return text();
}

function pack(hex) {
  const value = parseInt(hex.slice(1), 16);
  return (255 << 24) | ((value & 255) << 16) | (value & 0xff00) | (value >> 16);
}

// How far apart steps are named: 1, 2 or 5 times a power of ten, so that about so many are.
function apartBy(span, names) {
  const wanted = Math.max(1, span / names);
  const power = 10 ** Math.floor(Math.log10(wanted));
  return power * [1, 2, 5, 10].find((each) => each * power >= wanted);
}
