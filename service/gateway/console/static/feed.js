// The stream of events. fetch, and not EventSource, because a key goes into a header.

import { bearer } from "./keys.js";

const SILENT_MS = 12000;

export async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export async function* serverEvents(body) {
  let name = "message";
  let data = [];
  for await (const raw of lines(body)) {
    const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
    if (line === "") {
      if (data.length) yield { name, data: data.join("\n") };
      name = "message";
      data = [];
    } else if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
}

// Calls `on[name](data)` for each event, for ever; `on.lost(why)` when there is none.
export async function follow(on) {
  let wait = 300;
  for (;;) {
    const control = new AbortController();
    let watch = setTimeout(() => control.abort(), SILENT_MS);
    try {
      const reply = await fetch("/console/events", {
        headers: { accept: "text/event-stream", ...bearer("admin") }, signal: control.signal, cache: "no-store",
      });
      const events = (reply.headers.get("content-type") || "").startsWith("text/event-stream");
      if (reply.status === 401 || reply.status === 403) on.lost("key");
      else if (!reply.ok || !events) on.lost("away");
      else {
        for await (const event of serverEvents(reply.body)) {
          clearTimeout(watch);
          watch = setTimeout(() => control.abort(), SILENT_MS);
          wait = 300;
          on[event.name]?.(JSON.parse(event.data));
        }
      }
    } catch { on.lost("away"); }
    clearTimeout(watch);
    await new Promise((done) => setTimeout(done, wait));
    wait = Math.min(wait * 1.6, 3000);
  }
}
