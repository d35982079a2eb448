// Traffic as a picture: category → recipe → expert, each ribbon as wide as its share.

import { byId, colour, svg } from "./dom.js";

const GAP = 12;
const NODE = 9;
let drawn = "";

export function drawFlow(flows, experts) {
  const box = byId("flow");
  const width = Math.max(280, box.clientWidth);
  const shape = JSON.stringify([flows, width, experts.map((one) => one.name)]);
  if (shape === drawn) return;
  drawn = shape;
  const total = flows.reduce((sum, flow) => sum + flow.count, 0);
  byId("flow-note").textContent = total ? "" : "No requests in the last five minutes: the dashed lines are what the config says.";
  const links = total ? flows.map((flow) => ({ ...flow, recipe: flow.recipe === "single" ? flow.expert : flow.recipe })) : experts.flatMap((one) => one.categories.map((category) => ({ category, recipe: one.name, expert: one.name, count: 1 })));
  const recipes = links.some((link) => link.recipe && link.recipe !== link.expert);
  const columns = recipes ? ["category", "recipe", "expert"] : ["category", "expert"];
  const height = box.clientHeight;
  const label = Math.min(130, width * 0.26);
  const at = columns.map((_, i) => label + (i * (width - 2 * label - NODE)) / (columns.length - 1));
  const sizes = columns.map((column) => stack(links, column, height));
  box.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  for (let i = 0; i + 1 < columns.length; i++) parts.push(...ribbons(links, columns[i], columns[i + 1], sizes[i], sizes[i + 1], at[i] + NODE, at[i + 1], total));
  columns.forEach((column, i) => {
    for (const [name, node] of sizes[i]) {
      const fill = column === "category" ? "var(--cold)" : colour(column === "recipe" ? node.expert : name);
      parts.push(svg("rect", { x: at[i], y: node.top, width: NODE, height: Math.max(2, node.size), rx: 3, fill }));
      if (column === "recipe") continue;
      const left = i === 0;
      const middle = node.top + node.size / 2 + 4;
      const text = svg("text", { x: left ? at[i] - 10 : at[i] + NODE + 10, y: middle, "text-anchor": left ? "end" : "start" }, (name || "named").slice(0, 18));
      parts.push(text);
      if (total) parts.push(svg("text", { class: "count", x: left ? at[i] - 10 : at[i] + NODE + 10, y: middle + 16, "text-anchor": left ? "end" : "start" }, `${node.count}`));
    }
  });
  box.replaceChildren(...parts);
}

function stack(links, column, height) {
  const nodes = new Map();
  for (const link of links) {
    const node = nodes.get(link[column]) || { count: 0, used: { in: 0, out: 0 }, expert: link.expert };
    node.count += link.count;
    nodes.set(link[column], node);
  }
  const total = links.reduce((sum, link) => sum + link.count, 0) || 1;
  const least = 6;
  const room = height - 28 - GAP * (nodes.size - 1) - least * nodes.size;
  let top = 6;
  // Room for two lines of text beside every node.
  const pad = Math.max(GAP, Math.min(40, (height - 28) / Math.max(1, nodes.size) - least - 8) * 0.5);
  const share = Math.max(10, room - (pad - GAP) * (nodes.size - 1));
  for (const node of nodes.values()) {
    node.size = least + (share * node.count) / total;
    node.top = top;
    top += node.size + pad;
  }
  return nodes;
}

function ribbons(links, from, to, left, right, x0, x1, total) {
  const pairs = new Map();
  for (const link of links) {
    const id = `${link[from]}\0${link[to]}`;
    const pair = pairs.get(id) || { from: link[from], to: link[to], expert: link.expert, count: 0 };
    pair.count += link.count;
    pairs.set(id, pair);
  }
  const bend = (x1 - x0) / 2;
  return [...pairs.values()].map((pair) => {
    const a = left.get(pair.from);
    const b = right.get(pair.to);
    const ha = (a.size * pair.count) / a.count;
    const hb = (b.size * pair.count) / b.count;
    const ya = a.top + a.used.out;
    const yb = b.top + b.used.in;
    a.used.out += ha;
    b.used.in += hb;
    if (!total) {
      const [ca, cb] = [ya + ha / 2, yb + hb / 2];
      return svg("path", { class: "idle", d: `M${x0} ${ca}C${x0 + bend} ${ca} ${x1 - bend} ${cb} ${x1} ${cb}` });
    }
    const d = `M${x0} ${ya}C${x0 + bend} ${ya} ${x1 - bend} ${yb} ${x1} ${yb}V${yb + hb}C${x1 - bend} ${yb + hb} ${x0 + bend} ${ya + ha} ${x0} ${ya + ha}Z`;
    const path = svg("path", { class: "ribbon", d, fill: colour(pair.expert) });
    path.append(svg("title", {}, `${pair.from || "named"} → ${pair.to}: ${pair.count}`));
    return path;
  });
}
