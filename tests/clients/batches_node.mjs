// Runs a batch with the official Node client and prints what it got, as JSON: node batches_node.mjs URL FROM
// (FROM: a module in whose folder the client is installed).
import { createRequire } from "node:module";

const [url, from] = process.argv.slice(2);
const require = createRequire(from);
const { default: OpenAI, toFile } = require("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });

const lines = [0, 1, 2].map((number) => JSON.stringify({
  custom_id: `c${number}`, method: "POST", url: "/v1/chat/completions",
  body: { model: "general", messages: [{ role: "user", content: `question ${number}` }] },
}));
const file = await client.files.create({
  file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch",
});
let batch = await client.batches.create({
  input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h",
  metadata: { coe: JSON.stringify({ deadline: "2h" }) },
});
const first = batch.status;
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  batch = await client.batches.retrieve(batch.id);
}
const output = await (await client.files.content(batch.output_file_id)).text();
const files = [];
for await (const each of client.files.list({ limit: 1 })) files.push(each.id);
const batches = [];
for await (const each of client.batches.list()) batches.push(each.id);
const unknown = await client.batches.retrieve("batch_x").catch((error) => error.status);
const late = await client.batches.cancel(batch.id).catch((error) => error.status);
const deleted = await client.files.delete(file.id);
console.log(JSON.stringify({
  first, status: batch.status, counts: batch.request_counts, lives_s: batch.expires_at - batch.created_at,
  ids: output.trim().split("\n").map((line) => JSON.parse(line).custom_id),
  files: files.includes(file.id) && files.includes(batch.output_file_id), batches: batches.includes(batch.id),
  unknown, late, deleted: deleted.deleted,
}));
