// What is asked of the monitor: documents, and the stream of what is new. A token goes in a header, never in a URL.

const KEY = "gradiometer-token";
const SILENCE_MS = 15000; // the monitor says something every 5 s
const RETRY_MS = [500, 1000, 2000, 4000, 8000];

let asking = null;

function headers(more = {}) {
  const token = sessionStorage.getItem(KEY);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

// Ask once for a token, however many requests were refused, and say why. A dialog that is left asks again: nothing works without.
function askToken(refused, why) {
  if (refused !== undefined && refused !== sessionStorage.getItem(KEY)) return Promise.resolve();
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("token");
    const field = document.getElementById("token-value");
    if (refused) document.getElementById("token-why").textContent = why;
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", function closed() {
      if (!field.value) return dialog.showModal();
      dialog.removeEventListener("close", closed);
      sessionStorage.setItem(KEY, field.value.trim());
      field.value = "";
      asking = null;
      return resolve();
    });
    dialog.showModal();
  });
  return asking;
}

// Why a token did not do: unknown, or of a role that is for something else, which the monitor names.
async function reason(response) {
  if (response.status === 401) return "That token is not, or no longer, in the tokens file.";
  const detail = (await response.json().catch(() => ({}))).detail;
  return `This page shows runs. ${detail ? `But ${detail}.` : "That token may not see them."}`;
}

async function request(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(KEY);
    const response = await fetch(`api/v1/${path}`, { ...options, headers: headers(options.headers), cache: "no-store" });
    if (response.status !== 401 && (response.status !== 403 || !token)) return response;
    await askToken(token, await reason(response));
  }
}

// The document at a path; null where there is none.
export async function get(path, query = {}) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const each of [value].flat()) if (each !== null && each !== undefined) parameters.append(name, each);
  }
  const response = await request(`${path}?${parameters}`);
  if (response.status === 404) return null;
  if (!response.ok) {
    const detail = (await response.json().catch(() => ({}))).detail;
    throw new Error(typeof detail === "string" ? detail : `the monitor answered ${response.status}`);
  }
  return response.json();
}

// Follow the stream until closed: `on[type](data)` for each event, `told(state, since)` for how the link is.
export function stream(query, on, told) {
  const state = { closed: false, abort: null, id: null, heard: Date.now(), failures: 0 };
  const watch = setInterval(() => {
    if (Date.now() - state.heard > SILENCE_MS) state.abort?.abort();
  }, 1000);
  follow(state, query, on, told);
  return () => {
    state.closed = true;
    clearInterval(watch);
    state.abort?.abort();
  };
}

async function follow(state, query, on, told) {
  while (!state.closed) {
    state.abort = new AbortController();
    const begun = Date.now();
    try {
      const more = state.id ? { "Last-Event-ID": state.id } : {};
      const response = await request(`stream?${new URLSearchParams(query)}`, { headers: more, signal: state.abort.signal });
      if (response.status === 404) {
        state.heard = Date.now(); // no such run; it may come
        told("live");
        on.gone?.();
        await pause(RETRY_MS.at(-1));
        continue;
      }
      if (response.ok) {
        await read(response, state, on, () => told("live"));
        if (!state.closed && Date.now() - begun > 2000) continue; // it ended in order, as it does now and then
      }
    } catch {
      // The monitor is gone, or silent: said below, and tried again.
    }
    if (state.closed) return;
    told("lost", state.heard);
    await pause(RETRY_MS[Math.min(state.failures++, RETRY_MS.length - 1)]);
    if (Date.now() - state.heard > SILENCE_MS) state.heard = Math.max(state.heard, Date.now() - SILENCE_MS + 5000);
  }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function read(response, state, on, alive) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    [state.heard, state.failures] = [Date.now(), 0];
    alive();
    const frames = (text + value).split("\n\n");
    text = frames.pop();
    for (const frame of frames) dispatch(frame, state, on);
  }
}

function dispatch(frame, state, on) {
  const fields = {};
  for (const line of frame.split("\n")) {
    const at = line.indexOf(": ");
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
  }
  if (fields.id) state.id = fields.id;
  if (fields.event) on[fields.event]?.(JSON.parse(fields.data));
}
