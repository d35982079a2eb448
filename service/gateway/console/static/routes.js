// What was answered lately, and the four figures at the top.

import { byId, el, ms, swatch } from "./dom.js";
import { elsewhere, units } from "./frontier.js";

const MOST = 40;
let unit = "";

// The heads of columns with costs name their unit.
export function nameUnit(told) {
  unit = told;
  for (const head of document.querySelectorAll("[data-cost]")) {
    const words = head.dataset.cost;
    head.textContent = words.endsWith("/") ? `${words} ${unit}` : `${words}, ${unit}`;
  }
}

export function addRoutes(routes) {
  if (!routes.length) return;
  const body = byId("routes");
  body.prepend(...routes.map(row).reverse());
  while (body.children.length > MOST) body.lastChild.remove();
  byId("routes-note").hidden = true;
}

export const clearRoutes = () => byId("routes").replaceChildren();

function row(one) {
  const time = new Date(one.at_s * 1000).toLocaleTimeString([], { hour12: false });
  const sure = one.category ? `${one.category} ${Math.round(one.confidence * 100)} %` : "named";
  const by = one.recipe && one.recipe !== "single" && one.recipe !== one.expert ? `${one.expert} · ${one.recipe}` : one.expert;
  const num = (value) => el("td", { class: "num" }, value ? ms(value) : "–");
  const outcome = { ok: "ok", client_gone: "client left" }[one.outcome] || one.outcome.replaceAll("_", " ");
  return el("tr", { dataset: { request: one.request } },
    el("td", {}, time), el("td", {}, one.asked.slice(0, 40)), el("td", {}, sure),
    el("td", {}, one.expert ? swatch(one.expert) : "", ` ${by || "nobody"}`),
    num(one.route_ms), num(Math.max(0, one.queue_ms - one.swap_ms)), num(one.swap_ms), num(one.first_ms), num(one.total_ms), ...costs(one),
    el("td", { class: `outcome ${one.outcome === "ok" ? "ok" : one.outcome === "client_gone" ? "" : "bad"}` }, outcome));
}

// What it cost, and what its tokens would have cost by the other experts.
function costs(one) {
  const others = elsewhere(one.expert, one.prompt_tokens, one.completion_tokens);
  const text = others.length ? [...new Set([others[0], others.at(-1)].map((other) => units(other.cost)))].join(" to ") : "–";
  const title = others.map((other) => `${other.name} ${units(other.cost)}`).join(", ");
  return [el("td", { class: "num" }, one.cost ? units(one.cost) : "–"), el("td", { class: "num", title }, text)];
}

export function drawTotals(state, experts) {
  const rate = experts.reduce((sum, one) => sum + one.tokensPerS, 0);
  const figure = (id, value, unit) => byId(id).replaceChildren(value, unit ? el("small", {}, unit) : "");
  figure("t-requests", String(state.totals.requests), state.totals.failed ? `${state.totals.failed} failed` : "");
  figure("t-tokens", rate >= 100 ? rate.toFixed(0) : rate.toFixed(1));
  const [value, unit] = state.totals.first_ms ? ms(state.totals.first_ms).split(" ") : ["–", ""];
  figure("t-first", value, unit);
  figure("t-flight", String(state.in_flight));
}

export function drawBudgets(budgets) {
  byId("budgets-card").hidden = !budgets?.length;
  if (!budgets?.length) return;
  byId("budgets").replaceChildren(...budgets.map((one) =>
    el("div", { class: "budget" }, el("span", {}, one.name),
      el("span", { class: "meter" }, el("b", { style: { width: `${Math.max(0, Math.min(1, one.left)) * 100}%` } })),
      el("span", {}, `${Math.max(0, one.left * 100).toFixed(0)} % left`),
      el("span", { class: "note" }, one.price ? `1 ${unit} is worth ${one.price.toPrecision(2)} of quality` : "not short"))));
}

export function drawAliases(aliases) {
  const shared = Object.entries(aliases || {});
  byId("aliases-card").hidden = !shared.length;
  if (!shared.length) return;
  byId("aliases").replaceChildren(...shared.flatMap(([alias, targets]) => {
    const all = Object.values(targets).reduce((sum, one) => sum + (one.rolled_back ? 0 : one.weight), 0);
    return Object.entries(targets).map(([target, one]) => {
      const share = one.rolled_back ? 0 : one.weight / all;
      return el("div", { class: "budget" }, el("span", {}, `${alias} → ${target}`),
        el("span", { class: "meter" }, el("b", { style: { width: `${share * 100}%` } })),
        el("span", {}, one.rolled_back ? "rolled back" : `${(share * 100).toFixed(0)} %`),
        el("span", { class: "note" }, one.rolled_back ? one.rolled_back.text : `${one.requests} requests · ${one.errors} errors · ${one.refusals} refusals`));
    });
  }));
}

export function drawSavings(savings) {
  byId("savings-card").hidden = !savings?.length;
  if (!savings?.length) return;
  byId("savings").replaceChildren(...savings.map((one) => {
    const share = one.baseline_cost > 0 ? one.saved_cost / one.baseline_cost : 0;
    const points = 100 * one.quality_gain;
    return el("div", { class: "budget" }, el("span", {}, one.against),
      el("span", { class: "meter" }, el("b", { style: { width: `${Math.max(0, Math.min(1, share)) * 100}%` } })),
      el("span", {}, `${(share * 100).toFixed(0)} % of the cost`),
      el("span", { class: "note" }, `expected quality ${points >= 0 ? "+" : "−"}${Math.abs(points).toFixed(1)} points · ${one.requests} requests`));
  }));
}
