// A prompt: who could answer it and why, then the answer, and where its time went.

import { byId, colour, el, ms, swatch } from "./dom.js";
import { serverEvents } from "./feed.js";
import { elsewhere, units } from "./frontier.js";
import { bearer } from "./keys.js";

const STEPS = ["route", "queue", "swap", "prefill", "decode"];
let running = null;
let asking = null;

const json = () => ({ "content-type": "application/json", ...bearer("api") });
const bodyOf = (model) => ({ model, messages: [{ role: "user", content: byId("prompt").value }] });

export function startPlayground(experts) {
  const names = ["auto", "auto:fast", "auto:best", ...experts.map((one) => one.name)];
  const fill = (id, chosen) => {
    const kept = byId(id).value;
    byId(id).replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    byId(id).value = names.includes(kept) && kept ? kept : chosen;
  };
  fill("model-a", "auto");
  fill("model-b", experts[0]?.name || "auto");
  explainSoon(0);
}

export function listen() {
  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  byId("stop").addEventListener("click", stop);
  byId("prompt").addEventListener("input", () => explainSoon(250));
  byId("model-a").addEventListener("change", () => explainSoon(0));
  byId("compare").addEventListener("change", (event) => { byId("field-b").hidden = !event.target.checked; });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
  });
}

export function stop() { running?.abort(); }

// --- why

let timer = 0;
function explainSoon(afterMs) {
  clearTimeout(timer);
  timer = setTimeout(explain, afterMs);
}

export async function explain() {
  if (!byId("prompt").value.trim()) return;
  asking?.abort();
  asking = new AbortController();
  try {
    const body = JSON.stringify({ ...bodyOf(byId("model-a").value), max_tokens: tokens() });
    const reply = await fetch("/v1/route", { method: "POST", headers: json(), body, signal: asking.signal });
    const told = await reply.json();
    if (!reply.ok) throw new Error(told.error?.message || `status ${reply.status}`);
    drawWhy(told);
  } catch (error) {
    if (error.name !== "AbortError") byId("posterior-note").textContent = error.message;
  }
}

function drawWhy(told) {
  const ranked = Object.entries(told.posterior || {}).sort((a, b) => b[1] - a[1]).slice(0, 6);
  byId("posterior").replaceChildren(...ranked.map(([label, p], i) =>
    el("div", { class: i ? "" : "first" }, el("span", {}, label),
      el("span", { class: "meter" }, el("b", { style: { width: `${p * 100}%` } })), el("span", {}, `${(p * 100).toFixed(0)} %`))));
  const about = { classified: "", named: "The expert was named: nothing to classify.", "no classifier": "This config names no router.", "named category": `Category ${told.category}, as asked.` };
  const novelty = told.novelty >= 0.01 ? `${Math.round(told.novelty * 100)} % of it was never seen in training.` : "";
  byId("posterior-note").textContent = [about[told.reason] ?? told.reason, novelty].filter(Boolean).join(" ");
  const cost = told.cost_price ? ` − ${told.cost_price.toPrecision(2)} · c` : "";
  byId("formula").textContent = `U = Q${cost} − ${told.time_price} · (W + X)`;
  byId("candidates").replaceChildren(...told.candidates.slice(0, 8).map((one) => candidate(one, told)));
}

function candidate(one, told) {
  const num = (value, digits = 2) => el("td", { class: "num" }, typeof value === "number" ? value.toFixed(digits) : "–");
  const who = el("td", { title: one.why }, swatch(one.expert), ` ${one.recipe ?? one.expert}`);
  const known = typeof one.utility === "number";
  const share = known ? Math.max(0, Math.min(1, one.utility)) * 100 : 0;
  return el("tr", { class: (one.recipe ?? one.expert) === told.chosen ? "chosen" : "" }, who, num(one.quality),
    el("td", { class: "num" }, one.cost === null ? "–" : one.cost ? one.cost.toPrecision(2) : "0"), num(one.wait_s), num(one.answer_s), num(one.displaced_s),
    el("td", {}, known ? el("span", { class: "meter" }, el("b", { style: { width: `${share}%`, background: colour(one.expert) } })) : "", known ? one.utility.toFixed(3) : one.why));
}

// --- the answer

const tokens = () => Math.max(1, Math.min(4096, Number(byId("tokens").value) || 96));

async function ask() {
  if (!byId("prompt").value.trim()) return;
  stop();
  const control = new AbortController();
  running = control;
  explainSoon(0);
  const models = [byId("model-a").value];
  if (byId("compare").checked) models.push(byId("model-b").value);
  byId("stop").hidden = false;
  const panes = models.map((model) => new Pane(model));
  byId("answers").replaceChildren(...panes.map((pane) => pane.box));
  await Promise.all(panes.map((pane) => pane.run(control.signal)));
  if (running === control) { running = null; byId("stop").hidden = true; }
}

class Pane {
  constructor(model) {
    this.model = model;
    this.head = el("header", {}, el("b", {}, model), el("span", { class: "note" }, "routing …"));
    this.text = el("pre", { tabindex: "0" });
    this.split = el("div", { class: "split", role: "img", "aria-label": "Where the time went" });
    this.legend = el("div", { class: "legend" });
    this.box = el("article", { class: "answer busy", "aria-label": `Answer of ${model}` }, this.head, this.text, this.split, this.legend);
  }

  async run(signal) {
    const began = performance.now();
    const body = JSON.stringify({ ...bodyOf(this.model), max_tokens: tokens(), stream: true, stream_options: { include_usage: true } });
    try {
      const reply = await fetch("/v1/chat/completions", { method: "POST", headers: json(), body, signal });
      if (!reply.ok) throw new Error((await reply.json()).error?.message || `status ${reply.status}`);
      this.answeredBy(reply.headers);
      await this.read(reply, began);
    } catch (error) {
      this.text.append(el("span", { class: "fault" }, error.name === "AbortError" ? "stopped" : error.message));
    }
    this.box.classList.remove("busy");
  }

  answeredBy(headers) {
    const expert = headers.get("x-coe-expert") || this.model;
    const category = headers.get("x-coe-category");
    const sure = category ? `${category}, ${Math.round(Number(headers.get("x-coe-confidence")) * 100)} % sure` : "named";
    this.head.replaceChildren(el("b", {}, swatch(expert), expert), el("span", { class: "note" }, this.model === expert ? sure : `${this.model} · ${sure}`));
  }

  async read(reply, began) {
    const header = (name) => Number(reply.headers.get(name)) || 0;
    const times = { route: header("x-coe-route-ms"), swap: header("x-coe-swap-ms"), prefill: 0, decode: 0 };
    times.queue = Math.max(0, header("x-coe-queue-ms") - times.swap);
    let first = 0;
    let pieces = 0;
    let usage = null;
    for await (const event of serverEvents(reply.body)) {
      if (event.data === "[DONE]") break;
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      const delta = chunk.choices?.[0]?.delta;
      const piece = delta?.content || delta?.reasoning_content || "";
      if (!piece) continue;
      const now = performance.now();
      if (!first) { first = now; times.prefill = Math.max(0, now - began - times.route - times.queue - times.swap); }
      pieces += 1;
      times.decode = now - first;
      this.text.append(piece);
      this.text.scrollTop = this.text.scrollHeight;
      this.drawTimes(times, usage?.completion_tokens || pieces);
    }
    if (usage?.coe) this.measured(usage.coe, times);
    if (usage?.coe?.recipe && usage.coe.recipe !== usage.coe.expert) this.head.append(el("span", { class: "note" }, `${usage.coe.recipe}, ${usage.coe.calls.length} calls`));
    this.drawTimes(times, usage?.completion_tokens || pieces, usage?.coe);
    if (usage?.coe) this.drawElsewhere(usage);
  }

  // The same tokens at the other experts' prices.
  drawElsewhere(usage) {
    const others = elsewhere(usage.coe.expert, usage.prompt_tokens || 0, usage.completion_tokens || 0);
    if (!others.length) return;
    this.legend.append(el("span", { class: "elsewhere" }, "elsewhere ", ...others.slice(0, 6).flatMap((one, i) =>
      [i ? ", " : "", swatch(one.name), ` ${one.name} `, el("b", {}, units(one.cost))])));
  }

  // Where the service tells its own figures, they count, not this page's clock.
  measured(coe, times) {
    for (const step of STEPS) if (typeof coe[`${step}_ms`] === "number") times[step] = coe[`${step}_ms`];
    if (typeof coe.queue_ms === "number" && typeof coe.swap_ms === "number") times.queue = Math.max(0, coe.queue_ms - coe.swap_ms);
  }

  drawTimes(times, count, coe) {
    this.split.replaceChildren(...STEPS.map((step) => el("b", { title: `${step} ${ms(times[step])}`, style: { "flex-grow": String(Math.max(0.001, times[step])), background: `var(--s-${step})` } })));
    const speed = times.decode > 0 && count > 1 ? `${(((count - 1) * 1000) / times.decode).toFixed(1)} tokens/s` : "";
    this.legend.replaceChildren(...STEPS.map((step) =>
      el("span", {}, el("i", { class: "dot", style: { background: `var(--s-${step})` } }), step, " ", el("b", {}, ms(times[step])))),
    el("span", {}, el("b", {}, String(count)), " tokens ", speed), coe?.cost > 0 ? el("span", {}, "cost ", el("b", {}, coe.cost.toPrecision(3))) : "");
  }
}
