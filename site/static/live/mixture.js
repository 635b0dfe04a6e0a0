// One training, every beta: at each token log-softmax(ref + strength (policy - ref)), with logits
// ref and policy (Liu et al. 2024, arXiv 2402.02992). A policy trained at beta stands for
// beta / strength: 0 is the reference, 1 the policy.

import { Reading } from "./gpt2.js";

export function logSoftmax(logits) {
  let highest = -Infinity;
  for (const value of logits) if (value > highest) highest = value;
  let total = 0;
  for (const value of logits) total += Math.exp(value - highest);
  const shift = highest + Math.log(total);
  return Float64Array.from(logits, (value) => value - shift);
}

// The first token whose cumulative probability exceeds u: `sampling.inverse_cdf`.
export function inverseCdf(logps, u) {
  let total = 0;
  for (const value of logps) total += Math.exp(value);
  let sum = 0;
  for (let i = 0; i < logps.length; i++) {
    sum += Math.exp(logps[i]);
    if (sum > u * total) return i;
  }
  return logps.length - 1;
}

export class Mixture {
  constructor(reference, policy) {
    this.reference = new Reading(reference);
    this.policy = new Reading(policy);
  }

  // What each token after `ids` is given: log-probabilities of the mixture and of the reference.
  after(ids, strength) {
    const ref = this.reference.logitsAfter(ids);
    const policy = this.policy.logitsAfter(ids);
    const mixed = Float64Array.from(ref, (value, i) => value + strength * (policy[i] - value));
    return { mixed: logSoftmax(mixed), reference: logSoftmax(ref) };
  }

  // The next token for a uniform u: its id, its log-probabilities under mixture and reference, and
  // KL(mixture || reference) of the whole distribution, in nats.
  next(ids, strength, u) {
    const { mixed, reference } = this.after(ids, strength);
    let kl = 0;
    for (let i = 0; i < mixed.length; i++) kl += Math.exp(mixed[i]) * (mixed[i] - reference[i]);
    const id = inverseCdf(mixed, u);
    return { id, logp: mixed[id], referenceLogp: reference[id], kl };
  }
}
