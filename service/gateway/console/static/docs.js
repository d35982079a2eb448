// The API's description, drawn from /openapi.json, and a way to try each endpoint.

import { byId, el } from "./dom.js";
import { bearer } from "./keys.js";

const HELLO = [{ role: "user", content: "Say hello." }];
const EXAMPLES = {
  messages: HELLO, prompt: "Say hello.", input: "Say hello.", max_tokens: 32, tokens: [1, 2, 3], model: "auto", name: "auto",
};

function kind(schema) {
  if (!schema || !Object.keys(schema).length) return "anything";
  if (schema.oneOf) return schema.oneOf.map(kind).join(" or ");
  if (schema.type === "array") return `list of ${schema.items ? kind(schema.items) : "anything"}`;
  return [schema.type].flat().join(" or ");
}

function example(path, schema) {
  const wanted = Object.keys(schema.properties).filter((name) => schema.required?.includes(name) || name === "model" || (path.includes("token") && name in EXAMPLES));
  const body = Object.fromEntries(wanted.map((name) => [name, EXAMPLES[name] ?? ""]));
  if (path === "/v1/chat/completions" || path === "/v1/completions") body.max_tokens = 32;
  return JSON.stringify(body, null, 2);
}

function fields(schema) {
  const rows = Object.entries(schema.properties).map(([name, one]) =>
    el("tr", {}, el("td", {}, name), el("td", {}, kind(one) + (schema.required?.includes(name) ? ", needed" : "")), el("td", {}, one.description || "")));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...["field", "type", ""].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows)));
}

function endpoint(path, verb, operation) {
  const schema = operation.requestBody?.content?.["application/json"]?.schema;
  const out = el("pre", { hidden: true, tabindex: "0", "aria-label": "Reply" });
  const input = schema?.properties ? el("textarea", { rows: "6", spellcheck: "false", "aria-label": `Body for ${path}` }) : null;
  if (input) input.value = example(path, schema);
  const part = path.includes("{") ? el("input", { "aria-label": "Name in the path" }) : null;
  if (part) part.value = "auto";
  const send = el("button", { type: "button", class: "primary", onclick: () => attempt(path, verb, input, part, out) }, "Send");
  const headers = (operation.parameters || []).filter((one) => one.in === "header");
  return el("section", { class: "card endpoint", id: anchor(path, verb) },
    el("h2", {}, el("span", { class: `verb ${verb}` }, verb.toUpperCase()), path), el("p", {}, operation.summary || ""),
    schema?.properties ? fields(schema) : null,
    schema ? el("p", { class: "note" }, "Other fields are the engine's and pass through.") : null,
    headers.length ? el("h3", {}, "Headers") : null,
    ...headers.map((one) => el("p", { class: "note" }, el("code", {}, one.name), ` ${one.description}`)),
    el("h3", {}, "Try it"), input, el("div", { class: "row" }, part, send), out);
}

const anchor = (path, verb) => `${verb}${path.replace(/[^a-z0-9]+/gi, "-")}`;

async function attempt(path, verb, input, part, out) {
  out.hidden = false;
  out.textContent = "…";
  try {
    const where = part ? path.replace(/\{[^}]+\}/, encodeURIComponent(part.value)) : path;
    const headers = { ...bearer("api", "admin"), ...(input ? { "content-type": "application/json" } : {}) };
    const reply = await fetch(where, { method: verb.toUpperCase(), headers, body: input?.value });
    const told = [...reply.headers].filter(([name]) => name.startsWith("x-")).map(([name, value]) => `${name}: ${value}`);
    const text = await reply.text();
    let body = text;
    try { body = JSON.stringify(JSON.parse(text), null, 2); } catch { /* no JSON */ }
    out.textContent = [`${reply.status} ${reply.statusText}`, ...told, "", body.slice(0, 20000)].join("\n");
  } catch (error) {
    out.textContent = error.message;
  }
}

const spec = await (await fetch("/openapi.json", { headers: bearer("api", "admin") })).json();
byId("version").textContent = spec.info.version;
for (const [path, verbs] of Object.entries(spec.paths)) {
  for (const [verb, operation] of Object.entries(verbs)) {
    byId("endpoints").append(endpoint(path, verb, operation));
    byId("list").append(el("a", { href: `#${anchor(path, verb)}` }, el("span", { class: `verb ${verb}` }, verb.toUpperCase()), path));
  }
}
