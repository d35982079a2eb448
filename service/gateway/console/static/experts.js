// Every expert: which tier holds its weights, what waits for it, how fast it answers.

import { ago, byId, bytes, el, ms, swatch } from "./dom.js";
import { bearer, key } from "./keys.js";

const TIERS = ["device", "host", "loading", "draining", "disk", "failed"];
const SAYS = { device: "device", host: "host", loading: "loading", draining: "draining", disk: "disk", failed: "failed" };

// One account of each expert, out of every pool that may hold it.
export function gather(experts, state) {
  return experts.map((expert) => {
    const held = state.pools.map((pool) => ({ pool, ...pool.experts[expert.name] })).filter((one) => one.state);
    const remote = state.remotes[expert.name];
    const best = remote || held.slice().sort((a, b) => TIERS.indexOf(a.state) - TIERS.indexOf(b.state))[0]
      || { state: "disk", reason: "no pool that holds it runs yet" };
    const sum = (name) => held.reduce((total, one) => total + (one[name] || 0), 0);
    return {
      ...expert, state: best.state, reason: best.reason, released: Boolean(best.released), etaS: best.eta_s || 0, pools: held.length,
      waiting: sum("waiting"), running: sum("running"), tokensPerS: sum("tokens_per_s"),
      bytes: best.host_bytes || best.weight_bytes || 0, swapS: best.swap_s || 0, chunkS: best.chunk_s || 0,
      pinned: held.some((one) => one.pinned), lastSwap: best.last_swap,
      movable: held.some((one) => one.last_swap !== undefined || "pinned" in one),
    };
  });
}

// The GPUs of all pools, each once: pools that share one both count it, and their shares add up.
export function gatherGpus(state) {
  const found = new Map();
  for (const pool of state.pools) {
    for (const gpu of pool.gpus || []) {
      const before = found.get(gpu.uuid);
      found.set(gpu.uuid, { ...gpu, reserved_bytes: gpu.reserved_bytes + (before?.reserved_bytes || 0) });
    }
  }
  return [...found.values()].sort((a, b) => a.index - b.index);
}

export function drawGpus(gpus) {
  const list = byId("gpus");
  list.hidden = !gpus.length;
  list.replaceChildren(...gpus.map((gpu) => el("li", {},
    el("span", { class: "meter" }, el("b", { style: { width: `${(100 * gpu.used_bytes) / gpu.total_bytes}%` } })),
    el("span", {}, `GPU ${gpu.index}, ${gpu.name}: `, el("b", {}, bytes(gpu.used_bytes)), ` used of ${bytes(gpu.total_bytes)} · `,
      el("b", {}, bytes(gpu.reserved_bytes)), " reserved · ", el("b", {}, bytes(gpu.free_bytes)), " free"))));
}

export function drawExperts(all) {
  const list = byId("experts");
  const focused = document.activeElement?.closest?.("#experts button");
  const was = focused && [focused.dataset.expert, focused.dataset.act];
  list.replaceChildren(...all.map(row));
  if (was) list.querySelector(`button[data-expert="${CSS.escape(was[0])}"][data-act="${CSS.escape(was[1])}"]`)?.focus();
  const ready = all.filter((one) => one.state === "device").length;
  byId("experts-note").textContent = `${ready} of ${all.length} answer at once`;
}

function row(one) {
  const kind = { full: "full weights", lora: one.form === "merged" ? `merged into ${one.base}` : `LoRA on ${one.base}`, remote: "remote", command: "by command", variant: `asks ${one.base}` }[one.kind];
  const facts = [];
  if (one.bytes) facts.push(el("span", {}, el("b", {}, bytes(one.bytes))));
  facts.push(el("span", {}, el("b", {}, String(one.running)), " running · ", el("b", {}, String(one.waiting)), " waiting"));
  if (one.tokensPerS >= 0.05) facts.push(el("span", {}, el("b", {}, one.tokensPerS.toFixed(1)), " tokens/s"));
  else if (one.chunkS) facts.push(el("span", {}, el("b", {}, (1 / one.chunkS).toFixed(0)), " tokens/s alone"));
  if (one.lastSwap) facts.push(el("span", {}, `swapped in ${ago(one.lastSwap.ago_s)}, ${ms(one.lastSwap.swap_s * 1000)}`));
  if (one.pinned) facts.push(el("span", {}, el("b", {}, "pinned")));
  if (one.pools > 1 && one.kind !== "remote") facts.push(el("span", {}, `${one.pools} pools`));
  if (one.reason) facts.push(el("span", {}, one.reason));
  const says = one.state === "loading" && one.etaS >= 1 ? `in ${Math.ceil(one.etaS)} s` : one.released ? "unloaded, comes when asked" : SAYS[one.state];
  return el("li", { class: "expert", dataset: { name: one.name, state: one.state } },
    el("div", { class: "name", title: one.description }, swatch(one.name), el("span", {}, one.name), el("span", { class: "kind" }, kind)),
    el("div", { class: "tier", dataset: { state: one.state }, title: "disk, host memory, device" }, el("i"), el("i"), el("i"), el("span", {}, says)),
    el("div", { class: "facts" }, ...facts),
    key("admin") && (one.movable || one.kind === "command") ? acts(one) : null);
}

function acts(one) {
  const able = one.movable ? ["load", "evict", one.pinned ? "unpin" : "pin"] : [];
  if (one.kind === "command") able.push("log");
  return el("div", { class: "acts" }, ...able.map((act) =>
    el("button", { type: "button", dataset: { expert: one.name, act }, "aria-label": `${act} ${one.name}`, onclick: () => (act === "log" ? showLog(one.name) : operate(one.name, act)) }, act)));
}

async function showLog(name) {
  const box = byId("server-log");
  const lines = byId("server-log-lines");
  byId("server-log-title").textContent = `Log of ${name}`;
  lines.textContent = "…";
  if (!box.open) box.showModal();
  try {
    const path = `/admin/experts/${encodeURIComponent(name).replaceAll("%2F", "/")}/log`;
    const reply = await fetch(path, { headers: bearer("admin") });
    const told = await reply.json();
    if (!reply.ok) throw new Error(told.error?.message || `status ${reply.status}`);
    const pools = Object.entries(told.pools);
    lines.textContent = pools.map(([pool, said]) => [...(pools.length > 1 ? [`# ${pool}`] : []), ...(said.length ? said : ["(nothing yet)"])].join("\n")).join("\n\n");
    lines.scrollTop = lines.scrollHeight;
  } catch (error) {
    lines.textContent = error.message;
  }
}

async function operate(name, act) {
  const said = byId("admin-said");
  said.className = "said";
  said.textContent = `${act} ${name} …`;
  try {
    const path = `/admin/experts/${encodeURIComponent(name).replaceAll("%2F", "/")}/${act}`;
    const reply = await fetch(path, { method: "POST", headers: bearer("admin") });
    const told = await reply.json();
    if (!reply.ok) throw new Error(told.error?.message || `status ${reply.status}`);
    said.textContent = `${act} ${name}: done in ${told.pools} ${told.pools === 1 ? "pool" : "pools"}`;
  } catch (error) {
    said.className = "said bad";
    said.textContent = `${act} ${name}: ${error.message}`;
  }
}
