// The models, beside the page: it never freezes. Loads once, then writes a text for each request;
// a newer request ends an older one.

import { GPT2 } from "./gpt2.js";
import { Mixture } from "./mixture.js";
import { uniforms } from "./random.js";
import { SentimentReward } from "./reward.js";
import { Tokenizer } from "./tokenizer.js";
import { added, readSafetensors } from "./weights.js";

const FILES = ["config.json", "tokenizer.json", "reference.safetensors", "difference.safetensors",
  "reward.safetensors"];
let models;
let newest = 0;

async function load() {
  let loaded = 0;
  const fetched = FILES.map(async (name) => {
    const answer = await fetch(new URL(`weights/${name}`, import.meta.url));
    if (!answer.ok) throw new Error(`${name} could not be loaded (${answer.status}).`);
    const buffer = await answer.arrayBuffer();
    loaded += buffer.byteLength;
    postMessage({ type: "progress", megabytes: loaded / 1e6 });
    return name.endsWith(".json") ? JSON.parse(new TextDecoder().decode(buffer)) : buffer;
  });
  const [config, vocabulary, ...weights] = await Promise.all(fetched);
  const [reference, difference, head] = weights.map(readSafetensors);
  const tokenizer = new Tokenizer(vocabulary);
  const body = new GPT2(config, reference);
  const mixture = new Mixture(body, new GPT2(config, added(reference, difference)));
  return { tokenizer, body, mixture, reward: new SentimentReward(body, tokenizer, head) };
}

// Lets messages in between two tokens.
const pause = () => new Promise((resume) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); resume(); };
  port2.postMessage(0);
});

async function write({ request, prompt, strength, seed, tokens }) {
  const { tokenizer, body, mixture, reward } = await models;
  const ids = tokenizer.encode(prompt);
  if (!ids.length) ids.push(body.config.bos_token_id);
  if (ids.length + tokens > body.context) {
    throw new Error(
      `The beginning has ${ids.length} tokens. With ${tokens} new ones that is more than the ` +
      `model can read (${body.context}): please shorten it.`
    );
  }
  const written = [];
  const begun = tokenizer.decode(ids);
  for (const u of uniforms(seed, tokens)) {
    if (request !== newest) return;
    written.push(mixture.next([...ids, ...written.map((token) => token.id)], strength, u));
    const last = written.at(-1);
    const said = tokenizer.decode([...ids, ...written.map((token) => token.id)]);
    last.end = said.length - begun.length; // where its text ends; half a character changes it again
    postMessage({ type: "token", request, text: said.slice(begun.length), tokens: written });
    if (last.id === body.config.eos_token_id) break;
    await pause();
  }
  if (request !== newest) return;
  const text = tokenizer.decode([...ids, ...written.map((token) => token.id)]).slice(begun.length);
  const logit = reward.logit(prompt + text, mixture.reference);
  const kl = written.reduce((sum, token) => sum + token.kl, 0);
  postMessage({ type: "done", request, promptIds: ids, text, tokens: written, kl, logit });
}

onmessage = async ({ data }) => {
  newest = data.request;
  try {
    models ??= load();
    await write(data);
  } catch (error) {
    postMessage({ type: "error", request: data.request, message: error.message });
  }
};
