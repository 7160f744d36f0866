// Beside the charts: what happened to the run, and by which policy it is clipped.

import { breakable, h, put } from "./dom.js";
import { clock, number, percent, whole } from "./format.js";

const GRAVE = new Set(["nonfinite", "run_lost", "callback_failed", "policy_rejected", "request_failed", "request_unanswered", "clip_misuse"]);
const MILD = new Set(["policy_action", "alert_action", "request_refused", "scalar_refused", "backward_order", "rows_not_pushed", "series_not_pushed"]);
const RUNBOOKS = { nonfinite: "NonFinite", run_lost: "AgentLost" }; // of the alerts that tell the same
const KEPT = 500, SHOWN = 60;

export class Incidents {
  constructor({ pick }) {
    this.pick = pick;
    this.found = new Map();
    this.list = h("ol", { class: "incidents" });
    this.none = h("p", { class: "none" }, "Nothing happened so far.");
    this.count = h("span", { class: "note" });
    this.section = h("section", { class: "card" }, h("div", { class: "cardhead" }, h("h2", {}, "Incidents"), this.count), this.none, this.list);
  }

  add(events) {
    for (const event of events) this.found.set(event.id, event);
    const ordered = [...this.found.values()].sort((a, b) => b.time_ns - a.time_ns || b.number - a.number).slice(0, KEPT);
    this.found = new Map(ordered.map((event) => [event.id, event]));
    const focused = document.activeElement?.dataset?.event;
    this.list.replaceChildren(...ordered.slice(0, SHOWN).map((event) => this.item(event)));
    if (focused) [...this.list.querySelectorAll("button")].find((button) => button.dataset.event === focused)?.focus({ preventScroll: true });
    this.none.hidden = ordered.length > 0;
    put(this.count, ordered.length ? `${whole(ordered.length)}${ordered.length > SHOWN ? `, newest ${SHOWN} shown` : ""}` : "");
  }

  item(event) {
    const level = GRAVE.has(event.kind) ? "high" : MILD.has(event.kind) ? "raised" : "";
    const seconds = event.time_ns / 1e9;
    const parts = [
      h("span", { class: "when" }, h("time", { datetime: new Date(seconds * 1000).toISOString() }, clock(seconds)), event.step === null ? null : h("span", {}, `step ${whole(event.step)}`)),
      h("span", { class: "chip", "data-level": level }, event.kind.replaceAll("_", " ")),
      h("span", { class: "what" }, ...breakable(event.message || JSON.stringify(event.data))),
    ];
    const book = RUNBOOKS[event.kind] ? h("a", { class: "book", href: `runbooks/${RUNBOOKS[event.kind]}` }, "What to do") : null;
    if (event.step === null) return h("li", {}, h("div", { class: "incident" }, ...parts), book);
    return h("li", {}, h("button", { type: "button", class: "incident", "data-event": event.id, title: "Show this step", onclick: () => this.pick(event.step) }, ...parts), book);
  }

  // Steps from which on another policy was in force.
  changes() {
    return [...this.found.values()].filter((event) => event.kind === "policy_changed" && event.step !== null).map((event) => event.step);
  }
}

export class PolicyPanel {
  constructor() {
    this.body = h("div");
    this.note = h("span", { class: "note" });
    this.section = h("section", { class: "card" }, h("div", { class: "cardhead" }, h("h2", {}, "Policy in force"), this.note), this.body);
  }

  // `policy` is the answer of the policy route, or null; `doc` the rows shown, which tell what each stage did.
  update(policy, doc) {
    if (!doc) return;
    const force = policy?.in_force;
    put(this.note, force ? `revision ${force.revision}${force.step ? ` since step ${whole(force.step)}` : ""}${force.by ? `, by ${force.by}` : ""}` : "");
    const stages = [...written(force?.policy?.pipeline, "act"), ...written(force?.policy?.shadow, "shadow")];
    for (const each of doc.policies) {
      const newest = each.threshold.at(-1);
      const stage = stages.find((one) => one.name === each.name && one.mode === each.mode);
      const found = stage ?? { name: each.name, mode: each.mode, settings: {} };
      if (!stage && (!force || newest !== null)) stages.push(found);
      found.threshold = newest;
      found.share = sum(each.clipped_steps) / Math.max(1, sum(doc.rows));
    }
    const text = JSON.stringify(stages);
    if (text === this.text) return;
    this.text = text;
    this.body.replaceChildren(stages.length ? h("ol", { class: "stages" }, ...stages.map(item)) : h("p", { class: "none" }, "None: the run is only observed."));
  }
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function written(stages, mode) {
  return (stages ?? []).map((stage) => {
    const [kind, settings] = typeof stage === "string" ? [stage, {}] : Object.entries(stage)[0];
    const { name, ...rest } = settings ?? {};
    return { name: name ?? kind, kind, mode, settings: rest };
  });
}

function item(stage) {
  const settings = Object.entries(stage.settings).map(([name, value]) => h("span", { class: "setting" }, `${name} `, h("b", {}, typeof value === "number" ? number(value) : typeof value === "string" ? value : JSON.stringify(value))));
  const facts = [];
  if (stage.threshold > 0) facts.push(`threshold ${number(stage.threshold)}`);
  if (stage.share !== undefined) facts.push(`${stage.mode === "shadow" ? "would have acted" : "acted"} in ${percent(stage.share)} of the steps shown`);
  return h("li", {},
    h("p", { class: "stage" }, h("b", {}, stage.name), stage.kind && stage.kind !== stage.name ? ` ${stage.kind}` : "", stage.mode === "shadow" ? h("span", { class: "chip" }, "shadow") : null),
    settings.length ? h("p", { class: "settings" }, ...settings) : null,
    facts.length ? h("p", { class: "did" }, facts.join(", ")) : null);
}
