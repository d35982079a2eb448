// Drives the official Node client and prints what it got, as JSON: node openai_node.mjs URL FROM
// (FROM: a module in whose folder the client is installed).
import { createRequire } from "node:module";

const [url, from] = process.argv.slice(2);
const { default: OpenAI } = createRequire(from)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const place = {
  type: "object", properties: { city: { type: "string", maxLength: 12 } }, required: ["city"], additionalProperties: false,
};

const fault = async (body) => {
  try {
    await client.chat.completions.create(body);
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code };
  }
};

const whole = await client.chat.completions.create({ model: "auto", messages, max_tokens: 8 });
let stream = "";
for await (const chunk of await client.chat.completions.create({ model: "general", messages, max_tokens: 8, stream: true })) {
  stream += chunk.choices[0]?.delta?.content ?? "";
}
const schema = await client.chat.completions.create({
  model: "math", messages, max_tokens: 60, temperature: 0,
  response_format: { type: "json_schema", json_schema: { name: "place", schema: place } },
});
const tool = await client.chat.completions.create({
  model: "general", messages, max_tokens: 60, temperature: 0,
  tools: [{ type: "function", function: { name: "look_up", parameters: place, strict: true } }],
  tool_choice: { type: "function", function: { name: "look_up" } },
});
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({
  whole: whole.choices[0].message.content, model: whole.model, stream,
  place: JSON.parse(schema.choices[0].message.content), models,
  call: tool.choices[0].message.tool_calls[0].function,
  unknown: await fault({ model: "nobody", messages }),
  wrong: await fault({ model: "general", messages: [] }),
  embeddings: await client.embeddings.create({ model: "general", input: "x" }).catch((error) => error.constructor.name),
}));
