// What quality costs: the best that `auto` can reach at each price of cost, and where its presets
// stand. The categories are weighed by the traffic of the last five minutes, if there is any.

import { byId, colour, el, svg, swatch } from "./dom.js";

// As in the gateway's own frontier: from nothing to all that is given up to save the best's cost.
const WEIGHTS = [0, ...Array.from({ length: 49 }, (_, i) => 10 ** (-3 + (6 * i) / 48))];
const LEFT = 44;
const BOTTOM = 34;
let routing = null;
let drawn = "";

export const units = (value) => (value ? String(Number(value.toPrecision(2))) : "0");

export function startFrontier(told) {
  routing = told;
  drawn = "";
  byId("frontier-card").hidden = !told;
}

// The cost of an answer of so many tokens by each expert but one.
export function elsewhere(expert, promptTokens, answerTokens) {
  if (!routing || promptTokens + answerTokens === 0) return [];
  return Object.entries(routing.prices).filter(([name]) => name !== expert)
    .map(([name, [prompt, answer]]) => ({ name, cost: (prompt * promptTokens + answer * answerTokens) / 1e6 }))
    .sort((a, b) => a.cost - b.cost);
}

function shares(flows) {
  const counts = routing.categories.map((name) => flows.reduce((sum, flow) => sum + (flow.category === name ? flow.count : 0), 0));
  const total = counts.reduce((sum, count) => sum + count, 0);
  return { measured: total, share: total ? counts.map((count) => count / total) : routing.share };
}

const mean = (share, values) => values.reduce((sum, value, c) => sum + share[c] * value, 0);

// The mean over the categories of what is chosen at a weight of cost, and at the price that budgets
// add to it, in quality per unit of cost.
function point(share, weight, shadow) {
  const found = { quality: 0, cost: 0, price: 0, used: new Map() };
  routing.quality.forEach((row, c) => {
    const cost = routing.cost[c];
    const price = (routing.reference[c] > 0 ? weight / routing.reference[c] : 0) + shadow;
    let best = 0;
    row.forEach((quality, r) => {
      const gain = quality - price * cost[r] - (row[best] - price * cost[best]);
      if (gain > 1e-12 || (gain > -1e-12 && cost[r] < cost[best])) best = r;
    });
    found.price += share[c] * price;
    found.quality += share[c] * row[best];
    found.cost += share[c] * cost[best];
    found.used.set(best, (found.used.get(best) || 0) + share[c]);
  });
  return found;
}

export function drawFrontier(flows, budgets) {
  if (!routing) return;
  const box = byId("frontier");
  const width = Math.max(280, box.clientWidth);
  const shadow = (budgets || []).reduce((sum, one) => sum + one.price, 0);
  const shape = JSON.stringify([flows.map((flow) => [flow.category, flow.count]), width, shadow]);
  if (shape === drawn) return;
  drawn = shape;
  const { measured, share } = shares(flows);
  const curve = WEIGHTS.map((weight) => point(share, weight, 0));
  const presets = Object.entries(routing.presets).map(([name, one]) => ({ name, ...one, ...point(share, one.cost_weight, shadow) }));
  const singles = routing.recipes.map((recipe, r) => ({ recipe, r })).filter(({ recipe }) => recipe.experts.length === 1)
    .map(({ recipe, r }) => ({ name: recipe.name, quality: mean(share, routing.quality.map((row) => row[r])), cost: mean(share, routing.cost.map((row) => row[r])) }));
  const best = singles.reduce((a, b) => (b.quality > a.quality || (b.quality === a.quality && b.cost < a.cost) ? b : a));
  picture(box, width, curve, presets, singles);
  byId("frontier-mix").textContent = measured ? `for the mix of the last five minutes, ${measured} ${measured === 1 ? "prompt" : "prompts"}` : "for the mix that the router was fitted on";
  byId("frontier-note").textContent = note(presets.find((one) => one.name === "auto"), best, curve);
  const relative = (cost) => (best.cost > 0 ? `${Math.round((100 * cost) / best.cost)} %` : "–");
  byId("presets").replaceChildren(...presets.map((one) => el("tr", {},
    el("td", {}, one.name), el("td", { class: "num" }, `${(100 * one.quality).toFixed(1)} %`), el("td", { class: "num" }, relative(one.cost)),
    el("td", { class: "num" }, units(one.price)), el("td", { class: "num" }, units(one.time_price)), el("td", {}, ...usedBy(one.used)))));
}

function usedBy(used) {
  const most = [...used.entries()].filter(([, share]) => share >= 0.005).sort((a, b) => b[1] - a[1]);
  const shown = most.slice(0, 3).flatMap(([r, share]) => [swatch(routing.recipes[r].experts[0]), ` ${routing.recipes[r].name} ${Math.round(100 * share)} % `]);
  return most.length > 3 ? [...shown, `and ${most.length - 3} more`] : shown;
}

function note(auto, best, curve) {
  const lead = 100 * (auto.quality - best.quality);
  const against = `auto is expected at ${(100 * auto.quality).toFixed(1)} %, ${lead >= 0 ? "+" : "−"}${Math.abs(lead).toFixed(1)} points beside always ${best.name}.`;
  const one = new Set(curve.map((at) => at.quality.toFixed(6))).size === 1;
  const guess = routing.measured ? "" : " These are no measured figures: record outcomes and fit a map.";
  return `${against}${one ? " Cost changes nothing here." : ""}${guess}`;
}

function picture(box, width, curve, presets, singles) {
  const height = box.clientHeight || 230;
  const all = [...curve, ...presets, ...singles];
  const range = (key, pad) => {
    const [low, high] = [Math.min(...all.map((one) => one[key])), Math.max(...all.map((one) => one[key]))];
    const room = Math.max(1e-12, high - low, high * 0.02) * pad;
    return [Math.max(0, low - room), high + room];
  };
  const [c0, c1] = range("cost", 0.12);
  const [q0, q1] = range("quality", 0.14);
  const x = (cost) => LEFT + ((cost - c0) / (c1 - c0)) * (width - LEFT - 12);
  const y = (quality) => height - BOTTOM - ((quality - q0) / (q1 - q0)) * (height - BOTTOM - 10);
  const parts = [];
  for (let i = 0; i <= 3; i++) {
    const quality = q0 + ((q1 - q0) * i) / 3;
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - 12, y1: y(quality), y2: y(quality) }));
    parts.push(svg("text", { class: "count", x: LEFT - 8, y: y(quality) + 4, "text-anchor": "end" }, `${Math.round(100 * quality)} %`));
    const cost = c0 + ((c1 - c0) * i) / 3;
    // Where all costs are about equal, one label says it.
    if (i === 0 || units(cost) !== units(c0 + ((c1 - c0) * (i - 1)) / 3)) {
      parts.push(svg("text", { class: "count", x: x(cost), y: height - BOTTOM + 18, "text-anchor": i === 3 ? "end" : "middle" }, units(cost)));
    }
  }
  parts.push(svg("text", { class: "count", x: width - 12, y: height - 2, "text-anchor": "end" }, `${routing.unit} for ${routing.recorded ? "an answer" : "a usual prompt and answer"}`));
  parts.push(svg("polyline", { class: "frontier", points: curve.map((at) => `${x(at.cost)},${y(at.quality)}`).join(" ") }));
  for (const one of singles) {
    const dot = svg("circle", { cx: x(one.cost), cy: y(one.quality), r: 5, fill: colour(one.name) });
    dot.append(svg("title", {}, `always ${one.name}: ${(100 * one.quality).toFixed(1)} % at ${units(one.cost)}`));
    parts.push(dot);
  }
  // Presets that choose alike stand at one place, with one label.
  const places = new Map();
  for (const one of presets) {
    const at = `${Math.round(x(one.cost))},${Math.round(y(one.quality))}`;
    places.set(at, { one, names: [...(places.get(at)?.names || []), one.name] });
  }
  for (const { one, names } of places.values()) {
    const end = x(one.cost) > width * 0.7;
    parts.push(svg("circle", { class: names.includes("auto") ? "preset auto" : "preset", cx: x(one.cost), cy: y(one.quality), r: 7 }));
    parts.push(svg("text", { x: x(one.cost) + (end ? -12 : 12), y: y(one.quality) - 8, "text-anchor": end ? "end" : "start" }, names.join(", ")));
  }
  box.replaceChildren(...parts);
}
