// Speaks to a server with OpenAI's client for Node, and prints its answers as one line of JSON.
// Arguments: the package's entry, the server's URL, the key, the model, the prompt, and the tokens of an answer.
import { pathToFileURL } from "node:url";

const [entry, baseURL, apiKey, model, prompt, tokens] = process.argv.slice(2);
const { default: OpenAI } = await import(pathToFileURL(entry));
const ai = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey, maxRetries: 0 });
const asked = {
  model,
  messages: [{ role: "user", content: prompt }],
  temperature: 0,
  max_tokens: Number(tokens),
};

const chat = await ai.chat.completions.create(asked);
let streamed = "";
for await (const chunk of await ai.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0].delta.content ?? "";
}
const models = [];
for await (const card of ai.models.list()) models.push(card.id);
const error = await ai.completions.create({ model: "parrot", prompt }).catch((caught) => caught);

console.log(
  JSON.stringify({
    text: chat.choices[0].message.content,
    usage: chat.usage.completion_tokens,
    streamed,
    models,
    error: { class: error.constructor.name, status: error.status, type: error.type },
  }),
);
