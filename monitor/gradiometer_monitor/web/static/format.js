// Numbers as a person reads them.

const NONE = "–";

export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  const rounded = Number(value.toPrecision(digits));
  return size >= 1e6 || size < 1e-4 ? rounded.toExponential().replace("e+", "e") : String(rounded);
}

export function whole(value) {
  return value === null || value === undefined ? NONE : value.toLocaleString("en-GB").replaceAll(",", "\u202f");
}

export function times(value, usual) {
  if (!(value > 0) || !(usual > 0)) return NONE;
  const ratio = value / usual;
  return `${ratio >= 100 ? number(ratio, 3) : ratio.toFixed(ratio >= 10 ? 1 : 2)}×`;
}

export function percent(share) {
  if (share === null || share === undefined || Number.isNaN(share)) return NONE;
  const hundredths = 100 * share;
  return `${hundredths > 0 && hundredths < 0.95 ? hundredths.toPrecision(1) : Math.round(hundredths)} %`;
}

export function ago(seconds) {
  if (seconds < 2) return "now";
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

export function clock(seconds) {
  const date = new Date(seconds * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const time = date.toLocaleTimeString("en-GB");
  return today ? time : `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

export function steps(first, last) {
  return last > first ? `steps ${whole(first)}–${whole(last)}` : `step ${whole(first)}`;
}

// The ticks of an axis, with as many digits as tell them apart.
export function ticks(values) {
  const known = values.filter((value) => value !== null);
  let digits = 2;
  while (digits < 8 && new Set(known.map((value) => number(value, digits))).size < known.length) digits += 1;
  return values.map((value) => (value === null ? "" : number(value, digits)));
}
