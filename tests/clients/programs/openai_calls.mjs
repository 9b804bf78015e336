// OpenAI's client for Node.js.
import OpenAI from "openai";

const ask = JSON.parse(process.argv[1]);
const client = new OpenAI({ baseURL: `${ask.url}/v1`, apiKey: "none", maxRetries: 0 });

async function completion(model, stream) {
  const asked = { model, prompt: ask.prompt, max_tokens: ask.max_tokens, temperature: 0 };
  if (!stream) return (await client.completions.create(asked)).choices[0].text;
  let text = "";
  for await (const chunk of await client.completions.create({ ...asked, stream })) text += chunk.choices[0].text;
  return text;
}

async function chat(model, stream) {
  const asked = { model, messages: ask.messages, max_completion_tokens: ask.max_tokens, temperature: 0 };
  if (!stream) return (await client.chat.completions.create(asked)).choices[0].message.content;
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream })) {
    text += chunk.choices[0].delta.content ?? "";
  }
  return text;
}

const answers = {};
for (const model of ask.models) {
  answers[model] = {
    completion: await completion(model, false),
    "streamed completion": await completion(model, true),
    chat: await chat(model, false),
    "streamed chat": await chat(model, true),
  };
}
const errors = [];
for (const call of [completion, chat]) {
  for (const stream of [false, true]) {
    try {
      await call(ask.wrong, stream);
    } catch (error) {
      errors.push({ kind: error.constructor.name, message: error.message, code: error.code });
    }
  }
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({ answers, errors, models }));
