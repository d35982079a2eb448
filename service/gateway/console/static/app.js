// The page: one stream of events in, everything drawn from it.

import { followBatches, reloadBatches, startBatches } from "./batches.js";
import { addSample, rebuildChart, startChart } from "./chart.js";
import { byId, el, setOrder } from "./dom.js";
import { drawExperts, drawGpus, gather, gatherGpus } from "./experts.js";
import { follow } from "./feed.js";
import { drawFlow } from "./flow.js";
import { drawFrontier, startFrontier } from "./frontier.js";
import { bearer, key, setKey } from "./keys.js";
import { explain, listen, startPlayground, stop } from "./playground.js";
import { addRoutes, clearRoutes, drawAliases, drawBudgets, drawSavings, drawTotals, nameUnit } from "./routes.js";

let experts = [];
let state = null;
let wasReady = 0;

function status(kind, text) {
  byId("status").className = `pill ${kind}`;
  byId("status").lastElementChild.textContent = text;
}

function draw() {
  const all = gather(experts, state);
  drawExperts(all);
  drawGpus(gatherGpus(state));
  drawTotals(state, all);
  drawFlow(state.flows, experts);
  drawFrontier(state.flows, state.budgets);
  drawBudgets(state.budgets);
  drawAliases(state.aliases);
  drawSavings(state.savings);
  followBatches(state.batches);
  const rates = Object.fromEntries(all.map((one) => [one.name, one.tokensPerS]));
  addSample(state.at_s, rates);
  const ready = all.filter((one) => one.state === "device" || one.state === "host" || one.released).length;
  if (ready !== wasReady) { wasReady = ready; explain(); }
  const loading = all.filter((one) => one.state === "loading");
  const eta = Math.max(0, ...loading.map((one) => one.etaS));
  const pools = state.pools.filter((pool) => pool.boot).length;
  if (ready) status("up", `serving · ${pools} ${pools === 1 ? "pool" : "pools"}`);
  else if (loading.length) status("", `loading ${loading.map((one) => one.name).slice(0, 3).join(", ")}${eta >= 1 ? ` · about ${Math.ceil(eta)} s` : ""}`);
  else status("down", "no expert answers");
}

function waiting(on) {
  document.body.classList.toggle("waiting", on);
  byId("starting").hidden = !on;
}

follow({
  hello(told) {
    waiting(false);
    experts = told.experts;
    state = told.state;
    setOrder(experts.map((one) => one.name));
    startPlayground(experts);
    startChart(experts, told.history);
    nameUnit(told.cost_unit);
    startBatches(told.cost_unit);
    startFrontier(told.routing);
    clearRoutes();
    addRoutes(told.routes);
    draw();
  },
  state(told) { state = told; draw(); },
  routes(told) { addRoutes(told.routes); },
  // Before there is a gateway, `coe serve` itself tells how far it is.
  progress(told) {
    waiting(true);
    status("", `starting · ${Math.round(told.elapsed_s)} s`);
    byId("steps").replaceChildren(...told.steps.map((step) =>
      el("li", { class: step.done_s !== null ? "done" : step.now ? "now" : "" }, step.name,
        el("span", {}, step.done_s !== null ? `${step.done_s.toFixed(1)} s` : step.now ? "…" : ""))));
  },
  lost(why) {
    if (why === "key") { status("", "the admin key shows traffic"); withoutFeed(); return; }
    status(state ? "down" : "", state ? "no connection, trying again" : "connecting");
  },
});

// Whoever has an API key only sees no traffic of others, and can ask all the same.
let asked = false;
async function withoutFeed() {
  if (asked) return;
  asked = true;
  waiting(false);
  const reply = await fetch("/v1/models", { headers: bearer("api") });
  if (!reply.ok) { asked = false; if (!offered) { offered = true; openKeys(); } return; }
  experts = (await reply.json()).data.filter((one) => one.id !== "auto").map((one) => ({ name: one.id, categories: [] }));
  setOrder(experts.map((one) => one.name));
  startPlayground(experts);
  followBatches();
  setInterval(followBatches, 1000);
}
let offered = false;

// --- theme, keys, shortcuts

function switchTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("coe-theme", root.dataset.theme); } catch { /* only for this page, then */ }
  rebuildChart();
}

function openKeys() {
  byId("api-key").value = key("api");
  byId("admin-key").value = key("admin");
  byId("keys").showModal();
}

byId("keys").addEventListener("close", () => {
  if (byId("keys").returnValue === "keep") {
    setKey("api", byId("api-key").value.trim());
    setKey("admin", byId("admin-key").value.trim());
    reloadBatches();
  }
  byId("api-key").value = byId("admin-key").value = byId("keys").returnValue = "";
  if (state) draw();
});
byId("forget").addEventListener("click", () => {
  setKey("api", "");
  setKey("admin", "");
  reloadBatches();
  byId("keys").close();
});

byId("theme").addEventListener("click", switchTheme);
byId("keys-open").addEventListener("click", openKeys);
byId("help-open").addEventListener("click", () => byId("help").showModal());
addEventListener("resize", () => {
  if (!state) return;
  drawFlow(state.flows, experts);
  drawFrontier(state.flows, state.budgets);
});

const SHORTCUTS = {
  "/": () => byId("prompt").focus(), t: switchTheme, k: openKeys, "?": () => byId("help").showModal(),
  c: () => byId("compare").click(),
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape") { stop(); return; }
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = SHORTCUTS[event.key];
  if (act) { event.preventDefault(); act(); }
});
listen();
