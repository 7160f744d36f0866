// One run: what it does now, its norm, its layers, its incidents and its policy; fed by the stream.

import { get } from "./api.js";
import { colour, h, put, say } from "./dom.js";
import { ago, clock, number, percent, steps as said, times, whole } from "./format.js";
import { Heatmap } from "./heatmap.js";
import { LayerTable } from "./layers.js";
import { Incidents, PolicyPanel } from "./panels.js";
import { Plot, drawMarks } from "./plots.js";
import { Series, current } from "./series.js";

const RANGES = { whole: "Whole run", 10000: "Last 10 000 steps", 1000: "Last 1000 steps", 200: "Last 200 steps" };
const SCALARS = ["grad_norm_preclip", "grad_norm_baseline", "loss", "learning_rate", "step_seconds"];
const REFRESH_MS = 500, SLOW_MS = 3000;
const AROUND = 200; // steps shown on either side of an incident that was out of sight

export class RunView {
  constructor(main, runId, query) {
    Object.assign(this, { main, runId, rank: Number(query.get("rank") ?? 0), paused: false, focus: null, closed: false });
    this.range = readRange(query);
    this.focus = query.has("step") ? Number(query.get("step")) : null;
    this.scalars = new Series(runId, this.rank, { columns: SCALARS });
    this.cells = new Series(runId, this.rank, { columns: ["grad_norm_preclip"], layers: "*" });
    this.build();
    this.start();
    this.timer = setInterval(() => this.drawAge(), 1000);
    this.slow = setInterval(() => this.refreshSlow(), SLOW_MS);
  }

  build() {
    const on = { zoom: (first, last) => this.zoom(first, last), pick: (step) => this.go(step), point: (step) => this.norm.point(step) };
    this.state = h("span", { class: "state" });
    this.tiles = tiles(["Step", "Steps a second", "Gradient norm", "Against usual", "Loss", "Clipped", "Non-finite", "Skipped", "Last step"]);
    this.facts = h("p", { class: "facts" });
    this.toolbar();
    this.notice = h("p", { class: "notice", role: "status", hidden: true });
    this.norm = new Plot({
      title: "Gradient norm", log: true, height: 280, on, marks: drawMarks,
      lines: [
        { label: "norm", colour: "line", width: 1.5 },
        { label: "usual", colour: "usual", width: 1.5, gaps: true },
        { label: "threshold", colour: "clip", width: 1.5, dash: [6, 4], gaps: true },
      ],
    });
    this.norm.figure.querySelector("figcaption").append(h("div", { class: "key" },
      h("span", { class: "pair" }, h("i", { class: "swatch clip" }), "clipped"), h("span", { class: "pair" }, h("i", { class: "swatch bad" }), "not finite")));
    this.loss = new Plot({ title: "Loss", log: "wide", height: 180, on, marks: drawFocus, lines: [{ label: "loss", colour: "line", gaps: true }] });
    this.rate = new Plot({ title: "Learning rate", height: 180, on, marks: drawFocus, lines: [{ label: "rate", colour: "line", gaps: true }] });
    this.heat = new Heatmap({ on });
    this.table = new LayerTable();
    this.incidents = new Incidents({ pick: (step) => this.go(step) });
    this.policy = new PolicyPanel();
    this.main.replaceChildren(
      h("div", { class: "runhead" },
        h("p", { class: "crumb" }, h("a", { href: "#" }, "All runs")),
        h("div", { class: "name" }, h("h1", {}, this.runId), this.state),
        this.facts, this.tiles.list),
      this.bar, this.notice,
      h("div", { class: "board" },
        h("div", { class: "column" }, this.norm.figure, this.heat.figure, h("div", { class: "two" }, this.loss.figure, this.rate.figure), this.table.section),
        h("aside", { class: "column", "aria-label": "Incidents and policy" }, this.policy.section, this.incidents.section)));
  }

  toolbar() {
    this.choice = h("select", { id: "range", onchange: () => this.setRange(this.choice.value === "whole" ? {} : { last: Number(this.choice.value) }) },
      ...Object.entries(RANGES).sort((a, b) => (a[0] === "whole" ? -1 : b[0] === "whole" ? 1 : b[0] - a[0])).map(([value, text]) => h("option", { value }, text)),
      h("option", { value: "custom", hidden: true }, "Chosen steps"));
    this.pause = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.setPaused(!this.paused) }, "Pause");
    this.reset = h("button", { type: "button", hidden: true, onclick: () => this.setRange({}) }, "Show the whole run");
    this.span = h("p", { class: "span" });
    this.bar = h("div", { class: "toolbar", role: "group", "aria-label": "Range of steps" }, h("label", { for: "range" }, "Show"), this.choice, this.pause, this.reset, this.span);
    this.drawRange();
  }

  async start() {
    try {
      this.detail = await get(`runs/${encodeURIComponent(this.runId)}`).catch(() => null);
      this.drawFacts();
      const { events } = (await get("events", { run_id: this.runId, limit: 200 })) ?? { events: [] };
      this.incidents.add(events);
      await this.reload();
      await this.refreshSlow(true);
      if (this.focus !== null) this.go(this.focus);
    } catch (error) {
      this.tell(error.message);
    }
  }

  tell(text) {
    this.notice.hidden = !text;
    put(this.notice, text ?? "");
  }

  async reload() {
    const width = this.main.clientWidth;
    const newest = this.summary?.last_step ?? this.detail?.last_step ?? (await this.newestStep());
    const wide = Math.max(500, Math.min(1000, Math.round(width / 1.4)));
    const range = this.range;
    const docs = await Promise.all([
      this.scalars.load(range, wide, newest), this.cells.load(range, Math.max(100, Math.min(360, Math.round(width / 3.5))), newest),
    ]);
    if (range !== this.range || this.closed) return;
    if (docs.includes(null)) this.tell("This run is not followed any more: it is over, or its directory is gone. Its rows stay on disk: gradiometer show.");
    else this.draw();
  }

  async newestStep() {
    return (await get(this.scalars.path, { rank: this.rank, points: 1, columns: "loss" }))?.last_step ?? 0;
  }

  // Take in what came, at most twice a second, one refresh at a time.
  refresh() {
    if (this.paused || this.waiting || document.hidden || !this.scalars.doc) return;
    this.waiting = setTimeout(async () => {
      try {
        await Promise.all([this.scalars.extend(), this.cells.extend()]);
        if (!this.closed && !this.paused && this.scalars.doc) this.draw();
      } catch (error) {
        this.tell(error.message);
      } finally {
        this.waiting = null;
        if (this.again) this.refresh();
        this.again = false;
      }
    }, Math.max(0, REFRESH_MS - (Date.now() - (this.drawnAt ?? 0))));
  }

  async refreshSlow(first = false) {
    if (this.closed || document.hidden || (this.paused && !first) || (this.summary && this.summary.state !== "running" && !first && this.settled)) return;
    this.settled = this.summary && this.summary.state !== "running";
    const path = `runs/${encodeURIComponent(this.runId)}`;
    const [layers, policy] = await Promise.all([get(`${path}/layers`, { rank: this.rank }), get(`${path}/policy`)].map((asked) => asked.catch(() => null)));
    if (this.closed) return;
    this.table.update(layers, this.cells.doc, this.shown ?? []);
    this.policy.update(policy, this.scalars.doc);
  }

  // From the stream.
  runs(list) {
    const found = list.runs.find((run) => run.run_id === this.runId);
    this.summary = found ?? this.summary;
    this.vanished = !found;
    if (this.summary) this.drawSummary();
    if (found && this.missing) this.start();
    if (found) this.missing = false;
  }

  rows(doc) {
    if (this.latest && doc.created_ns !== this.latest.created_ns) this.reload();
    this.latest = doc;
    this.drawSummary();
    if (this.waiting) this.again = true;
    this.refresh();
  }

  event(event) {
    this.incidents.add([event]);
    if (event.kind.startsWith("policy")) this.refreshSlow(true);
  }

  gone() {
    if (this.scalars.doc) return;
    this.tell(`No run ${this.runId} is followed here. It has not begun, or has been over for a while: gradiometer show ${this.runId} reads what it left.`);
    this.missing = true;
    this.main.classList.add("unknown");
  }

  drawSummary() {
    const run = this.summary;
    const row = this.latest;
    const last = (name) => row?.columns[name]?.findLast((value) => value !== null);
    const norm = row ? row.columns.grad_norm_preclip.at(-1) : run?.grad_norm;
    const loss = last("loss") ?? run?.loss;
    const set = (name, text, level = "") => { put(this.tiles.at[name], text); this.tiles.at[name].dataset.level = level; };
    set("Step", whole(Math.max(row?.steps.length ? row.last_steps.at(-1) : -1, row ? -1 : (run?.last_step ?? -1)) < 0 ? null : row?.steps.length ? row.last_steps.at(-1) : run.last_step));
    set("Gradient norm", norm === null && row ? "not finite" : number(norm), norm === null && row ? "high" : "");
    set("Loss", number(loss));
    if (run) {
      const usual = norm / run.grad_norm_baseline;
      put(this.state, run.state);
      this.state.dataset.state = run.state;
      set("Against usual", times(norm, run.grad_norm_baseline), usual > 10 ? "high" : usual > 3 ? "raised" : "");
      set("Clipped", percent(run.clip_ratio));
      set("Non-finite", whole(run.nonfinite_steps), run.nonfinite_steps ? "high" : "");
      set("Skipped", whole(run.skipped_steps), run.skipped_steps ? "raised" : "");
    }
    this.drawAge();
  }

  drawAge() {
    const time = Math.max(this.latest?.times.at(-1) ?? 0, this.summary?.last_step_timestamp_seconds ?? 0);
    if (!time) return;
    const silent = Date.now() / 1000 - time;
    const cell = this.tiles.at["Last step"];
    put(cell, ago(silent));
    cell.dataset.level = this.summary?.state === "running" && silent > 60 ? "raised" : "";
  }

  drawFacts() {
    const detail = this.detail;
    if (!detail) return;
    const labels = Object.entries(detail.labels ?? {}).map(([name, value]) => `${name}=${value}`);
    const world = detail.world_size > 1 ? `${detail.world_size} ranks, this is rank ${this.rank}` : null;
    const found = [detail.job, detail.host && `on ${detail.host}`, detail.device, world, detail.torch_version && `torch ${detail.torch_version}`,
      detail.created && `since ${clock(detail.created)}`, ...labels];
    put(this.facts, found.filter(Boolean).join("  ·  "));
  }

  draw() {
    this.drawnAt = Date.now();
    this.main.classList.remove("unknown");
    const { doc } = this.scalars;
    this.tell(doc.complete || !doc.steps.length || this.range.last ? null : `The ring holds the run from ${said(doc.first_step, doc.first_step)} on; what came before is overwritten.`);
    this.notice.classList.toggle("mild", true);
    const places = current(doc);
    const pick = (list) => places.map((place) => list[place]);
    const x = pick(doc.steps);
    const { threshold, clipped } = acting(doc);
    const context = {
      steps: x, focus: this.focus, clipped: places.map((place) => (clipped[place] ? doc.clipped_steps[place] / doc.rows[place] : 0)),
      nonfinite: x.filter((_, at) => doc.nonfinite_steps[places[at]]), policies: this.incidents.changes(),
    };
    const columns = doc.columns;
    this.norm.draw([x, pick(columns.grad_norm_preclip), pick(columns.grad_norm_baseline), pick(threshold)], context, inWords(doc, places));
    this.loss.draw([x, pick(columns.loss)], context, extremes("Loss", x, pick(columns.loss), pick(doc.loss_nonfinite)));
    this.rate.draw([x, pick(columns.learning_rate)], context, extremes("Learning rate", x, pick(columns.learning_rate)));
    const heat = this.cells.doc;
    this.shown = current(heat);
    this.heat.draw(heat, this.shown, this.focus);
    put(this.tiles.at["Steps a second"], speed(doc, places));
    const each = doc.bucket_steps > 1 ? `, a point is the largest of ${whole(doc.bucket_steps)} steps` : "";
    put(this.span, x.length ? `${said(x[0], doc.last_steps[places.at(-1)])}${each}` : "no step yet");
  }

  zoom(first, last) {
    this.setRange({ from: Math.max(0, first), to: last });
    say(`${said(first, last)} shown`);
  }

  setRange(range) {
    this.range = range;
    this.drawRange();
    this.route();
    this.reload().catch((error) => this.tell(error.message));
  }

  drawRange() {
    const custom = this.range.to !== undefined || this.range.from !== undefined;
    this.choice.querySelector("[value=custom]").hidden = !custom;
    this.choice.value = custom ? "custom" : String(this.range.last ?? "whole");
    this.reset.hidden = !custom;
  }

  setPaused(paused) {
    this.paused = paused;
    this.pause.setAttribute("aria-pressed", String(paused));
    put(this.pause, paused ? "Resume" : "Pause");
    document.body.classList.toggle("paused", paused);
    if (!paused) this.refresh();
  }

  // Mark a step, and bring it into sight.
  go(step) {
    this.focus = step;
    const { doc } = this.scalars;
    const inside = doc?.steps.length && step >= doc.first_step && step <= doc.last_step;
    if (inside || !doc) {
      this.draw();
      this.norm.point(step);
      this.route();
    } else {
      this.setRange({ from: Math.max(0, step - AROUND), to: step + AROUND });
    }
    say(`step ${whole(step)} marked`);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.norm.figure.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
  }

  // The address says what is shown, without a place in the history for each look.
  route() {
    const query = new URLSearchParams({ run: this.runId });
    if (this.rank) query.set("rank", this.rank);
    for (const [name, value] of Object.entries(this.range)) if (value !== undefined) query.set(name, value);
    if (this.focus !== null) query.set("step", this.focus);
    history.replaceState(null, "", `#${query}`);
  }

  routed(query) {
    if (Number(query.get("rank") ?? 0) !== this.rank) location.reload();
    this.focus = query.has("step") ? Number(query.get("step")) : null;
    this.setRange(readRange(query));
  }

  themed() {
    [this.norm, this.loss, this.rate].forEach((plot) => plot.remake());
    if (this.cells.doc) this.heat.draw(this.cells.doc, this.shown, this.focus);
  }

  linked(state) {
    document.body.classList.toggle("stale", state !== "live");
    if (state === "live") this.refresh();
  }

  destroy() {
    this.closed = true;
    clearInterval(this.timer);
    clearInterval(this.slow);
    clearTimeout(this.waiting);
    document.body.classList.remove("paused", "stale");
    this.main.classList.remove("unknown");
    [this.norm, this.loss, this.rate, this.heat].forEach((part) => part.destroy());
  }
}

function tiles(names) {
  const at = Object.fromEntries(names.map((name) => [name, h("dd", {}, "–")]));
  const list = h("dl", { class: "tiles" }, ...names.map((name) => h("div", {}, h("dt", {}, name), at[name])));
  return { list, at };
}

function readRange(query) {
  const of = (name) => (/^\d{1,15}$/.test(query.get(name) ?? "") ? Number(query.get(name)) : undefined);
  if (of("last")) return { last: of("last") };
  return of("from") !== undefined || of("to") !== undefined ? { from: of("from"), to: of("to") } : {};
}

// The threshold that binds, and where anything that acts has clipped.
function acting(doc) {
  const found = doc.policies.filter((policy) => policy.mode === "act");
  const lowest = (place) => found.reduce((low, { threshold }) => (threshold[place] > 0 && (low === null || threshold[place] < low) ? threshold[place] : low), null);
  return { threshold: doc.steps.map((_, place) => lowest(place)), clipped: doc.clipped_steps };
}

function drawFocus(plot, context) {
  drawMarks(plot, { ...context, clipped: [], policies: [] });
}

function speed(doc, places) {
  const recent = places.slice(-30);
  if (recent.length < 2) return "–";
  const [first, last] = [recent[0], recent.at(-1)];
  const seconds = doc.times[last] - doc.times[first];
  return seconds > 0 ? number((doc.last_steps[last] - doc.last_steps[first]) / seconds, 3) : "–";
}

function inWords(doc, places) {
  if (!places.length) return "No step yet.";
  const norms = doc.columns.grad_norm_preclip;
  const sum = (name) => places.reduce((total, place) => total + doc[name][place], 0);
  const top = places.reduce((best, place) => (norms[place] !== null && (best === null || norms[place] > norms[best]) ? place : best), null);
  const last = places.at(-1);
  const now = norms[last] === null ? "not finite" : number(norms[last]);
  const peak = top === null ? "" : ` Largest ${number(norms[top])} ${doc.bucket_steps > 1 ? "near" : "at"} step ${whole(doc.steps[top])}.`;
  const bad = sum("nonfinite_steps");
  return `Now ${now}, usually ${number(doc.columns.grad_norm_baseline[last])}.${peak} Clipped in ${percent(sum("clipped_steps") / sum("rows"))} of the steps`
    + `${bad ? `, not finite in ${whole(bad)}` : ""}.`;
}

function extremes(title, x, values, bad = []) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return title === "Loss" ? "No loss was logged: agent.log(loss=loss)." : "Not known.";
  const worse = bad.reduce((total, count) => total + count, 0);
  const [low, high] = known.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  return `${title} ${number(known.at(-1))} now; ${number(low)} to ${number(high)} in what is shown${worse ? `; not finite in ${whole(worse)} ${worse === 1 ? "step" : "steps"}` : ""}.`;
}
