// Batches of the tenant whose key is typed in. The stream of events says when something has changed;
// the batches themselves come from the API, by its rules: nobody sees or cancels another tenant's.

import { byId, colour, duration, el, isKnown } from "./dom.js";
import { bearer } from "./keys.js";

// Each look counts as a request of its tenant.
const BUSY_MS = 2000;
const IDLE_MS = 15000;
const MOST = 20;
const MOST_MODELS = 8;
const ENDED = ["completed", "failed", "expired", "cancelled"];

let unit = "";
let seen;
// What the stream said at the last look: batches by state, and lines with a result.
let states = "";
let lines = -1;
let found = [];
let missing = "";
let looking = false;
let looked = 0;
let pause = BUSY_MS;
let confirming = "";

export function startBatches(costUnit) { unit = costUnit || ""; }

// Looks where there is news of the tenant's batches. `open` is what the stream says of those of all
// tenants; null where the service has none, and undefined without a stream.
export function followBatches(open) {
  if (open === null) { byId("batches-card").hidden = true; return; }
  seen = open;
  const since = Date.now() - looked;
  if (looking || since < pause) return;
  if (missing) { draw(); return; }
  const changed = open && JSON.stringify(open.states) !== states;
  const running = found.some((one) => !ENDED.includes(one.status));
  const advanced = running && (!open || open.lines !== lines);
  if (changed || advanced || since >= IDLE_MS) look();
}

// Looks with the next event, for another key.
export function reloadBatches() {
  states = missing = "";
  looked = 0;
}

async function look() {
  looking = true;
  const now = [JSON.stringify(seen?.states), seen?.lines ?? -1];
  pause = BUSY_MS;
  try {
    const reply = await fetch(`/v1/batches?limit=${MOST}`, { headers: bearer("api"), cache: "no-store" });
    if (reply.status === 429 || reply.status >= 500) pause = IDLE_MS;
    else {
      found = reply.ok ? (await reply.json()).data : [];
      missing = reply.status === 401 || reply.status === 403 ? "an API key shows its tenant's" : "";
      [states, lines] = now;
    }
  } catch { /* the next event looks again */ }
  looked = Date.now();
  looking = false;
  draw();
}

function draw() {
  const open = Object.values(seen?.states || {}).reduce((sum, count) => sum + count, 0);
  byId("batches-card").hidden = !found.length && !(missing && open);
  const all = seen ? `${open} under way, of all tenants together` : "";
  byId("batches-note").textContent = [missing, all].filter(Boolean).join(" · ");
  const list = byId("batches");
  list.hidden = !found.length;
  const focused = document.activeElement?.closest?.("#batches button")?.dataset.batch;
  list.replaceChildren(...found.map(row));
  if (focused) list.querySelector(`button[data-batch="${CSS.escape(focused)}"]`)?.focus();
}

const count = (value) => value.toLocaleString("en");
const money = (value) => String(Number(value.toPrecision(3)));
const share = (part, whole) => `${whole ? Math.max(0, Math.min(100, (100 * part) / whole)) : 0}%`;

function row(one) {
  const { total, completed, failed } = one.request_counts;
  const coe = one.coe;
  const ended = ENDED.includes(one.status);
  const facts = [el("span", {}, el("b", {}, count(completed + failed)), total ? ` of ${count(total)} lines` : " lines")];
  if (failed) facts.push(el("span", { class: "bad" }, `${count(failed)} failed`));
  facts.push(el("span", {}, el("b", {}, count(one.usage.total_tokens)), " tokens"));
  const most = coe.max_cost === null ? "" : ` of at most ${money(coe.max_cost)}`;
  facts.push(el("span", {}, "cost ", el("b", {}, money(coe.cost)), `${most}${unit ? ` ${unit}` : ""}`));
  if (coe.seconds_left !== null) facts.push(el("span", {}, el("b", {}, duration(coe.seconds_left)), " to go"));
  else if (!ended) facts.push(el("span", {}, `ends ${when(one.expires_at)} at the latest`));
  if (one.errors?.data.length) facts.push(el("span", { class: "bad" }, one.errors.data[0].message));
  const name = `batch ${one.id.slice(-8)}`;
  return el("li", { class: "batch", dataset: { id: one.id, status: one.status } },
    el("div", { class: "name", title: one.id }, el("span", {}, name), el("span", { class: "kind" }, `${one.endpoint.slice(4)} · ${when(one.created_at)}`)),
    el("span", { class: "state" }, one.status.replaceAll("_", " ")),
    el("span", { class: "meter", role: "img", "aria-label": `${completed + failed} of ${total} lines` },
      el("b", { style: { width: share(completed, total) } }), el("b", { class: "failed", style: { width: share(failed, total) } })),
    el("div", { class: "facts" }, ...facts),
    models(coe.models),
    one.status === "validating" || one.status === "in_progress" ? cancelButton(one.id, name) : null);
}

// The share of each expert in the lines, and how many of them have a result.
function models(given) {
  const most = Object.entries(given).sort((a, b) => b[1].total - a[1].total);
  if (!most.length) return null;
  const rest = most.slice(MOST_MODELS);
  return el("div", { class: "shares" },
    el("div", { class: "split", "aria-hidden": "true" }, ...most.map(([name, model]) =>
      el("b", { style: { "flex-grow": String(model.total), background: shade(name) } }))),
    el("div", { class: "legend" }, ...most.slice(0, MOST_MODELS).map(([name, model]) => {
      const parts = [`${count(model.input_tokens + model.output_tokens)} tokens`, `cost ${money(model.cost)}`];
      if (model.failed) parts.unshift(`${count(model.failed)} failed`);
      if (model.seconds_left) parts.push(`${duration(model.seconds_left)} to go`);
      return el("span", { title: parts.join(" · ") }, el("i", { class: "dot", style: { background: shade(name) } }),
        `${name.slice(0, 40)} `, el("b", {}, `${count(model.completed + model.failed)} of ${count(model.total)}`));
    }), rest.length ? el("span", {}, `and ${rest.length} more`) : null));
}

// Recipes have no colour of their own.
const shade = (name) => (isKnown(name) ? colour(name) : "var(--cold)");

function when(atS) {
  const time = new Date(atS * 1000);
  const today = time.toDateString() === new Date().toDateString();
  return time.toLocaleString([], { hour12: false, hour: "2-digit", minute: "2-digit", ...(today ? {} : { day: "numeric", month: "short" }) });
}

// The first press asks, the second one cancels: there is no way back.
function cancelButton(id, name) {
  const asks = confirming === id;
  return el("div", { class: "acts" },
    el("button", { type: "button", dataset: { batch: id }, "aria-label": `${asks ? "really cancel" : "cancel"} ${name}`, onclick: () => press(id, name) },
      asks ? "really cancel?" : "cancel"));
}

async function press(id, name) {
  if (confirming !== id) {
    confirming = id;
    setTimeout(() => { if (confirming === id) { confirming = ""; draw(); } }, 5000);
    draw();
    return;
  }
  confirming = "";
  const said = byId("batches-said");
  said.className = "said";
  said.textContent = `cancel ${name} …`;
  try {
    const reply = await fetch(`/v1/batches/${encodeURIComponent(id)}/cancel`, { method: "POST", headers: bearer("api") });
    const batch = await reply.json();
    if (!reply.ok) throw new Error(batch.error?.message || `status ${reply.status}`);
    said.textContent = `cancel ${name}: its answers so far will be in its output`;
    found = found.map((one) => (one.id === id ? batch : one));
    draw();
  } catch (error) {
    said.className = "said bad";
    said.textContent = `cancel ${name}: ${error.message}`;
  }
}
