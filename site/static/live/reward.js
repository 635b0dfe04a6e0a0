// The embedded reward, `rewards.SentimentReward`: every token casts a vote, their mean is the logit
// of P(positive).

import { geluErf, layerNorm, linear, Reading } from "./gpt2.js";

export class SentimentReward {
  constructor(body, tokenizer, head) {
    this.tokenizer = tokenizer;
    this.head = head;
    this.own = new Reading(body);
    this.partLength = body.context - 1;
    this.bos = body.config.bos_token_id;
  }

  // The logit of P(positive) of a text. `reading`: what the body has read already, for its states.
  logit(text, reading) {
    const ids = this.tokenizer.encodeBare(text);
    let total = 0;
    let parts = 0;
    for (let i = 0; i === 0 || i < ids.length; i += this.partLength, parts++) {
      const part = [this.bos, ...ids.slice(i, i + this.partLength)];
      const using = reading && reading.shared(part) >= part.length - 1 ? reading : this.own;
      if (using.shared(part) < part.length) using.read(part);
      const votes = using.states.slice(0, part.length).map((states) => this.vote(states));
      total += votes.reduce((sum, vote) => sum + vote) / part.length / this.head.temperature.data[0];
    }
    return total / parts;
  }

  vote(states) {
    const take = (name) => this.head[name].data;
    const normed = layerNorm(states, take("norm.weight"), take("norm.bias"), 1e-5);
    const read = linear(take("read.weight"), take("read.bias"), normed).map(geluErf);
    return linear(take("vote.weight"), take("vote.bias"), read)[0];
  }
}
