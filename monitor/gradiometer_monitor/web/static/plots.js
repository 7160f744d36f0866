// Line charts over the step, by uPlot: marks for what happened, zoom by dragging, a cursor that the keyboard moves too.

import { colour, h, put, say } from "./dom.js";
import { number, ticks, whole } from "./format.js";

const uPlot = globalThis.uPlot;
const sync = uPlot.sync("steps");

export class Plot {
  // `lines` are {name, label, colour, width, dash, fill}; on.zoom(first, last) is called with what was dragged over. The axis is
  // logarithmic with `log` true, and with "wide" where all values are above 0 and span more than two decades.
  constructor({ title, note, lines, log = false, height = 220, on, marks = null }) {
    Object.assign(this, { title, lines, log, height, on, marks });
    this.plot = null;
    this.data = null;
    this.box = h("div", {
      class: "plot", tabindex: 0, role: "application", "aria-roledescription": "line chart",
      "aria-label": `${title}: arrow keys move along the steps`, onkeydown: (event) => this.key(event),
    });
    this.caption = h("p", { class: "said" });
    this.figure = h("figure", { class: "card" },
      h("figcaption", {}, h("h2", {}, title), note ? h("span", { class: "note" }, note) : null), this.box, this.caption);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.box);
  }

  // `data` is [steps, ...one list for each line]; `context` is given to the marks; `text` says it in words.
  draw(data, context, text) {
    this.context = context;
    const logarithmic = this.log === true || (this.log === "wide" && isWide(data.slice(1).flat()));
    if (logarithmic !== this.logarithmic) this.forget();
    this.logarithmic = logarithmic;
    this.data = logarithmic ? [data[0], ...data.slice(1).map((list) => list.map((y) => (y > 0 ? y : null)))] : data;
    put(this.caption, text);
    if (!this.plot) this.make();
    else this.plot.setData(this.data);
    if (this.plot) newest(this.plot);
  }

  make() {
    const width = this.box.clientWidth;
    if (!width || !this.data) return;
    const axis = {
      stroke: colour("muted"), font: "12px system-ui, sans-serif",
      grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false },
    };
    const narrow = width < 500;
    const series = this.lines.map((line) => ({
      label: line.label, stroke: colour(line.colour), width: line.width ?? 1.25, dash: line.dash, spanGaps: line.gaps ?? false,
      fill: line.fill ? colour(line.fill) : undefined, points: { show: this.data[0].length < 3, size: 5 },
      value: (_, value) => number(value),
    }));
    this.plot = new uPlot({
      width, height: narrow ? Math.min(this.height, 200) : this.height, padding: [12, 24, 0, 0], series: [{ label: "step", value: (_, value) => whole(value) }, ...series],
      scales: { x: { time: false }, y: this.logarithmic ? { distr: 3 } : { range: around } },
      axes: [
        { ...axis, size: 30, values: (_, found) => found.map((tick) => (Number.isInteger(tick) ? whole(tick) : "")) },
        { ...axis, size: (_, found) => 22 + 6.8 * Math.max(3, ...(found ?? []).map((text) => text.length)), values: (_, found) => ticks(found) },
      ],
      legend: { markers: { width: 0, fill: (_, place) => (place ? colour(this.lines[place - 1].colour) : "transparent") } },
      cursor: {
        sync: { key: sync.key, setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 6 },
        focus: { prox: -1 },
      },
      hooks: {
        draw: [(plot) => this.marks?.(plot, this.context)],
        setCursor: [(plot) => newest(plot)],
        setSelect: [(plot) => this.selected(plot)],
      },
    }, this.data, this.box);
    newest(this.plot);
  }

  selected(plot) {
    const { left, width } = plot.select;
    if (width < 6) return;
    const first = Math.floor(plot.posToVal(left, "x"));
    const last = Math.ceil(plot.posToVal(left + width, "x"));
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.on.zoom(first, last);
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.plot || !this.data[0].length) return;
    event.preventDefault();
    const last = this.data[0].length - 1;
    const from = this.plot.cursor.idx ?? last;
    const place = Math.min(last, Math.max(0, from + moves[event.key]));
    this.plot.setCursor({ left: this.plot.valToPos(this.data[0][place], "x"), top: 10 });
    const values = this.lines.map((line, at) => `${line.label} ${number(this.data[at + 1][place])}`);
    say(`step ${whole(this.data[0][place])}: ${values.join(", ")}`);
  }

  point(step) {
    if (this.plot && step !== null) this.plot.setCursor({ left: this.plot.valToPos(step, "x"), top: 10 });
  }

  resize() {
    const width = this.box.clientWidth;
    if (!this.plot) this.make();
    else if (width && Math.abs(width - this.plot.width) > 1) this.remake();
  }

  remake() {
    this.forget();
    this.make();
  }

  forget() {
    this.plot?.destroy();
    this.plot = null;
  }

  destroy() {
    this.observer.disconnect();
    this.plot?.destroy();
  }
}

// Without a cursor the legend tells of the newest step.
function newest(plot) {
  if (plot.cursor.idx === null || plot.cursor.idx === undefined) plot.setLegend({ idx: plot.data[0].length ? plot.data[0].length - 1 : null }, false);
}

// Whether a spike would press all else to the foot of a linear axis.
function isWide(values) {
  const known = values.filter((value) => value !== null);
  const [low, high] = known.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, 0]);
  return low > 0 && high > 100 * low;
}

// Room around what is drawn; a line that is constant is in the middle.
function around(_, low, high) {
  if (low === null || high === null) return [0, 1];
  const room = high > low ? 0.08 * (high - low) : Math.abs(high) * 0.5 || 1;
  return [low - room, high + room];
}

// Draw marks over a chart: what was clipped along the bottom, non-finite steps through it, the step in question.
export function drawMarks(plot, { steps, clipped, nonfinite, policies, focus }) {
  const { ctx } = plot;
  const { left, top, width, height } = plot.bbox;
  const scale = devicePixelRatio;
  const at = (step) => plot.valToPos(step, "x", true);
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
  const thick = Math.max(1.5 * scale, width / Math.max(1, steps.length));
  ctx.fillStyle = colour("clip");
  clipped.forEach((share, place) => {
    if (!share) return;
    ctx.globalAlpha = 0.25 + 0.75 * share;
    ctx.fillRect(at(steps[place]) - thick / 2, top + height - 5 * scale, thick, 5 * scale);
  });
  ctx.globalAlpha = 1;
  for (const step of nonfinite) pillar(ctx, at(step), plot.bbox, colour("bad"), scale, true);
  for (const step of policies) pillar(ctx, at(step), plot.bbox, colour("accent"), scale, false, [2 * scale, 4 * scale]);
  if (focus !== null) pillar(ctx, at(focus), plot.bbox, colour("ink"), 1.5 * scale, false);
  ctx.restore();
}

function pillar(ctx, x, box, stroke, width, flag, dash = []) {
  ctx.strokeStyle = ctx.fillStyle = stroke;
  ctx.lineWidth = width;
  ctx.setLineDash(dash);
  ctx.beginPath();
  ctx.moveTo(x, box.top);
  ctx.lineTo(x, box.top + box.height);
  ctx.globalAlpha = flag ? 0.45 : 0.9;
  ctx.stroke();
  ctx.globalAlpha = 1;
  if (!flag) return;
  const size = 5 * width;
  ctx.beginPath();
  ctx.moveTo(x - size, box.top);
  ctx.lineTo(x + size, box.top);
  ctx.lineTo(x, box.top + 1.6 * size);
  ctx.fill();
}
