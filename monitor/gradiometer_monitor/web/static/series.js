// Rows of a run as the API gives them, kept up to date by asking for what came since.

import { get } from "./api.js";

// One resolution of one range. `range` is {from, to, last}: steps from..to, or the last so many.
export class Series {
  constructor(runId, rank, query) {
    Object.assign(this, { path: `runs/${encodeURIComponent(runId)}/rows`, rank, query, doc: null });
  }

  async load(range, points, newest) {
    this.range = range;
    this.points = points;
    const from = range.last ? Math.max(0, (newest ?? 0) - range.last + 1) : range.from;
    this.doc = await get(this.path, { ...this.query, rank: this.rank, points, from_step: from, to_step: range.to });
    return this.doc;
  }

  // Take in what came since; load anew where that is not a continuation, or has become too long.
  async extend() {
    const { doc, range } = this;
    if (!doc || range.to !== undefined) return doc;
    const query = { ...this.query, rank: this.rank, points: this.points, bucket_steps: doc.bucket_steps };
    const after = doc.sequences.length ? doc.last_sequence - 1 : doc.last_sequence;
    const more = await get(this.path, { ...query, after_sequence: Math.max(0, after) });
    if (!more) return null;
    const length = doc.steps.length + more.steps.length;
    const same = more.created_ns === doc.created_ns && more.bucket_steps === doc.bucket_steps && doc.steps.length;
    if (!same || (!range.last && length > 1.6 * this.points + 2) || !continues(doc, more)) {
      return this.load(range, this.points, more.last_step ?? doc.last_step);
    }
    if (more.steps.length) join(doc, more);
    if (range.last) trim(doc, doc.last_steps.at(-1) - range.last);
    return doc;
  }
}

const sought = (doc, policy) => doc.policies.find((each) => each.name === policy.name && each.mode === policy.mode);
const continues = (doc, more) => more.policies.every((each) => sought(doc, each)) && doc.layers.length === more.layers.length;

const LISTS = ["sequences", "steps", "last_steps", "times", "rows", "flags", "nonfinite_steps", "skipped_steps", "clipped_steps", "loss_nonfinite"];

function join(doc, more) {
  let keep = doc.sequences.findIndex((sequence) => sequence >= more.sequences[0]);
  if (keep < 0) keep = doc.sequences.length;
  const append = (list, tail) => { list.length = keep; list.push(...tail); };
  for (const name of LISTS) append(doc[name], more[name]);
  for (const [name, list] of Object.entries(doc.columns)) append(list, more.columns[name]);
  for (const policy of doc.policies) {
    const tail = sought(more, policy);
    append(policy.threshold, tail?.threshold ?? more.steps.map(() => null));
    append(policy.clipped_steps, tail?.clipped_steps ?? more.steps.map(() => 0));
  }
  doc.layers.forEach((layer, place) => {
    append(layer.values, more.layers[place].values);
    layer.nonfinite = [...layer.nonfinite.filter((at) => at < keep), ...more.layers[place].nonfinite.map((at) => at + keep)];
  });
  doc.last_sequence = more.last_sequence;
  doc.last_step = more.last_step ?? doc.last_step;
}

// Forget the buckets that end at or before a step.
function trim(doc, step) {
  const gone = doc.last_steps.findIndex((last) => last > step);
  if (gone <= 0) return;
  for (const name of LISTS) doc[name].splice(0, gone);
  for (const list of Object.values(doc.columns)) list.splice(0, gone);
  for (const policy of doc.policies) [policy.threshold, policy.clipped_steps].forEach((list) => list.splice(0, gone));
  for (const layer of doc.layers) {
    layer.values.splice(0, gone);
    layer.nonfinite = layer.nonfinite.map((at) => at - gone).filter((at) => at >= 0);
  }
}

// Places of the buckets that count: where a job went back to a checkpoint, what it took back is left out.
export function current(doc) {
  const kept = [];
  let next = Infinity;
  for (let place = doc.steps.length - 1; place >= 0; place--) {
    if (doc.steps[place] < next) {
      kept.push(place);
      next = doc.steps[place];
    }
  }
  return kept.reverse();
}
