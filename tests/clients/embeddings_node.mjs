// Asks the official Node client for embeddings and prints what it got, as JSON:
// node embeddings_node.mjs URL FROM EXPERT NOT_ONE (FROM: a module in whose folder the client is installed).
import { createRequire } from "node:module";

const [url, from, model, other] = process.argv.slice(2);
const { default: OpenAI } = createRequire(from)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const input = ["one text", "another"];

const told = await client.embeddings.create({ model, input }); // the client asks for base64
const again = await client.embeddings.create({ model, input: input[1], encoding_format: "float" });
let fault;
try {
  await client.embeddings.create({ model: other, input });
} catch (error) {
  fault = { kind: error.constructor.name, status: error.status, param: error.param };
}
console.log(JSON.stringify({
  model: told.model, usage: told.usage, indices: told.data.map((one) => one.index),
  sizes: told.data.map((one) => one.embedding.length), values: told.data.map((one) => one.embedding),
  again: again.data[0].embedding, fault,
}));
