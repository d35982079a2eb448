// Tokens a second by expert over the last four minutes. Drawn by uPlot.

import { byId, resolved } from "./dom.js";

const KEEP = 240;
const SPAN_S = 120;
const samples = [];
let plot = null;
let names = [];

export function startChart(experts, history) {
  names = experts.map((one) => one.name);
  samples.splice(0, samples.length, ...history);
  build();
  addEventListener("resize", () => plot?.setSize(size()));
}

export function addSample(atS, rates) {
  if (samples.length && atS - samples[samples.length - 1].at_s < 0.9) return;
  samples.push({ at_s: atS, tokens_per_s: rates });
  if (samples.length > KEEP) samples.shift();
  plot?.setData(columns());
}

export const rebuildChart = () => { if (names.length) build(); };

const size = () => ({ width: byId("chart").clientWidth, height: byId("chart").clientHeight - 34 });

// Where nobody looked nothing was counted: a gap, not a line across it.
function columns() {
  const shown = [];
  for (const one of samples) {
    const last = shown[shown.length - 1];
    if (last && one.at_s - last.at_s > 5) shown.push({ at_s: last.at_s + 1 });
    shown.push(one);
  }
  return [shown.map((one) => one.at_s), ...names.map((name) => shown.map((one) => (one.tokens_per_s ? one.tokens_per_s[name] ?? 0 : null)))];
}

function build() {
  const style = getComputedStyle(document.documentElement);
  const muted = style.getPropertyValue("--muted").trim();
  const line = style.getPropertyValue("--line").trim();
  const font = "12px " + getComputedStyle(document.body).fontFamily;
  const axis = { stroke: muted, font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
  plot?.destroy();
  plot = new uPlot({
    ...size(),
    cursor: { points: { size: 6 }, drag: { x: false, y: false } },
    legend: { live: true },
    scales: {
      x: { time: true, range: (u, low, high) => [Math.min(low ?? high, high - SPAN_S), high] },
      y: { range: (u, low, high) => [0, Math.max(10, high * 1.15)] },
    },
    axes: [{ ...axis, space: 70, values: (u, ticks) => ticks.map((t) => new Date(t * 1000).toLocaleTimeString([], { hour12: false })) }, { ...axis, size: 42 }],
    series: [
      { label: "at", value: (u, v) => (v ? new Date(v * 1000).toLocaleTimeString([], { hour12: false }) : "") },
      ...names.map((name) => ({
        label: name, stroke: resolved(name), width: 2, fill: resolved(name) + "22", points: { show: false },
        value: (u, v) => (v ? v.toFixed(0) : "0"),
      })),
    ],
  }, columns(), byId("chart"));
}
