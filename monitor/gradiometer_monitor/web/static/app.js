// The page: which view is shown, the one stream that feeds it, the theme, and how the link to the monitor is.

import { stream } from "./api.js";
import { isDark } from "./colors.js";
import { put, say } from "./dom.js";
import { clock } from "./format.js";
import { ListView } from "./list.js";
import { RunView } from "./run.js";

const main = document.getElementById("main");
const link = document.getElementById("link");
let view = null;
let close = () => {};
let shown;

function told(state, heard) {
  const text = state === "live" ? "live" : `monitor not reachable, last heard ${clock(heard / 1000)}; trying again`;
  if (link.dataset.state === state && state === "live") return;
  link.dataset.state = state;
  put(link, text);
  view?.linked?.(state);
}

function open() {
  const query = new URLSearchParams(location.hash.slice(1));
  const runId = query.get("run");
  if (view && shown === runId) {
    view.routed?.(query);
    return;
  }
  close();
  view?.destroy();
  const first = shown === undefined;
  shown = runId;
  view = runId ? new RunView(main, runId, query) : new ListView(main);
  document.title = runId ? `${runId} · gradiometer` : "gradiometer";
  if (!first) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
    say(runId ? `Run ${runId}` : "All runs");
  }
  const mine = view;
  const on = Object.fromEntries(["runs", "event", "rows", "gone"].map((kind) => [kind, (data) => mine[kind]?.(data)]));
  close = stream(runId ? { run_id: runId, rank: query.get("rank") ?? 0 } : {}, on, told);
}

document.getElementById("skip").addEventListener("click", () => main.focus());
document.getElementById("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("gradiometer-theme", theme);
  say(`${theme} theme`);
  view?.themed?.();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view?.themed?.());
addEventListener("hashchange", open);
open();
