// One training, every beta: at each token log-softmax(ref + strength (policy - ref)), with logits
// ref and policy (Liu et al. 2024, arXiv 2402.02992). A policy trained at beta stands for
// beta / strength: 0 is the reference, 1 the policy.

import { Reading } from "./gpt2.js";

export function logSoftmax(logits) {
  let highest = -Infinity;
  for (let i = 0; i < logits.length; i++) if (logits[i] > highest) highest = logits[i];
  let total = 0;
  for (let i = 0; i < logits.length; i++) total += Math.exp(logits[i] - highest);
  const shift = highest + Math.log(total);
  const logps = new Float64Array(logits.length);
  for (let i = 0; i < logits.length; i++) logps[i] = logits[i] - shift;
  return logps;
}

// The first token whose cumulative probability exceeds u: `sampling.inverse_cdf`.
export function inverseCdf(logps, u) {
  let sum = 0; // they add up to 1
  for (let i = 0; i < logps.length; i++) {
    sum += Math.exp(logps[i]);
    if (sum > u) return i;
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
    const mixed = new Float64Array(ref.length);
    for (let i = 0; i < ref.length; i++) mixed[i] = ref[i] + strength * (policy[i] - ref[i]);
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
