// GPT-2 (Radford et al. 2019), a token at a time with stored keys and values. Its shape is read
// from config.json, its numbers are float32.

export const ACTIVATIONS = {
  gelu_new: geluTanh,
  gelu_pytorch_tanh: geluTanh,
  gelu_fast: geluTanh,
  gelu: geluErf,
  relu: (x) => Math.max(0, x),
  silu: (x) => x / (1 + Math.exp(-x)),
};

function geluTanh(x) {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)));
}

export function geluErf(x) {
  return 0.5 * x * (1 + erf(x * Math.SQRT1_2));
}

// Abramowitz and Stegun 7.1.26: off by at most 1.5e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series =
    t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const value = 1 - series * Math.exp(-x * x);
  return x < 0 ? -value : value;
}

// y = W x + b, W [out, in] row by row. Four sums at once keep the processor busy.
export function linear(weights, bias, x) {
  const width = x.length;
  const y = new Float32Array(weights.length / width);
  for (let i = 0, row = 0; i < y.length; i++, row += width) {
    let a = 0;
    let b = 0;
    let c = 0;
    let d = 0;
    let j = 0;
    for (; j + 3 < width; j += 4) {
      a += weights[row + j] * x[j];
      b += weights[row + j + 1] * x[j + 1];
      c += weights[row + j + 2] * x[j + 2];
      d += weights[row + j + 3] * x[j + 3];
    }
    for (; j < width; j++) a += weights[row + j] * x[j];
    y[i] = a + b + (c + d) + (bias ? bias[i] : 0);
  }
  return y;
}

export function layerNorm(x, weight, bias, epsilon) {
  let mean = 0;
  for (let i = 0; i < x.length; i++) mean += x[i];
  mean /= x.length;
  let variance = 0;
  for (let i = 0; i < x.length; i++) variance += (x[i] - mean) ** 2;
  const scale = 1 / Math.sqrt(variance / x.length + epsilon);
  const y = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
  return y;
}

// transformers stores GPT-2's linear layers as [in, out].
function transposed({ shape: [rows, columns], data }) {
  const turned = new Float32Array(data.length);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) turned[j * rows + i] = data[i * columns + j];
  }
  return turned;
}

export class GPT2 {
  constructor(config, tensors) {
    if (config.model_type !== "gpt2") throw new Error(`Expected a GPT-2, got ${config.model_type}.`);
    this.activation = ACTIVATIONS[config.activation_function];
    if (!this.activation) throw new Error(`Unknown activation ${config.activation_function}.`);
    this.config = config;
    this.layers = config.n_layer;
    this.width = config.n_embd;
    this.heads = config.n_head;
    this.context = config.n_positions;
    this.vocabulary = config.vocab_size;
    this.epsilon = config.layer_norm_epsilon;
    const take = (name) => {
      if (!tensors[name]) throw new Error(`The weights have no ${name}.`);
      return tensors[name].data;
    };
    const affine = (name) => ({ weight: take(`${name}.weight`), bias: take(`${name}.bias`) });
    const layer = (name) => ({ ...affine(name), weight: transposed(tensors[`${name}.weight`]) });
    this.embedding = take("transformer.wte.weight");
    this.positions = take("transformer.wpe.weight");
    this.head = tensors["lm_head.weight"]?.data ?? this.embedding;
    this.last = affine("transformer.ln_f");
    this.blocks = [];
    for (let i = 0; i < this.layers; i++) {
      const at = `transformer.h.${i}`;
      this.blocks.push({
        before: affine(`${at}.ln_1`),
        attention: layer(`${at}.attn.c_attn`),
        mixed: layer(`${at}.attn.c_proj`),
        between: affine(`${at}.ln_2`),
        wide: layer(`${at}.mlp.c_fc`),
        narrow: layer(`${at}.mlp.c_proj`),
      });
    }
  }

  // Logits [vocabulary] of the token after a hidden state [width].
  logits(hidden) {
    return linear(this.head, null, hidden);
  }
}

// What a model has read: one token after the other. What two texts share is read once.
export class Reading {
  constructor(model) {
    this.model = model;
    this.ids = [];
    this.states = []; // of each token: the embedding and each layer's output, side by side
    const room = model.context * model.width;
    this.keys = model.blocks.map(() => new Float32Array(room));
    this.values = model.blocks.map(() => new Float32Array(room));
    this.logits = [];
  }

  // How many tokens of `ids` have been read already, from the first on.
  shared(ids) {
    let n = 0;
    while (n < ids.length && n < this.ids.length && ids[n] === this.ids[n]) n++;
    return n;
  }

  read(ids) {
    if (ids.length > this.model.context) {
      throw new Error(`The text is longer than the model's context of ${this.model.context} tokens.`);
    }
    const n = this.shared(ids);
    this.ids.length = this.states.length = this.logits.length = n;
    for (const id of ids.slice(n)) this.step(id);
  }

  // Logits of the token after `ids`.
  logitsAfter(ids) {
    if (this.shared(ids) < ids.length) this.read(ids);
    const last = ids.length - 1;
    this.logits[last] ??= this.model.logits(this.states[last].subarray(-this.model.width));
    return this.logits[last];
  }

  step(id) {
    const { model } = this;
    const { width, layers, epsilon, activation } = model;
    const at = this.ids.length;
    let x = new Float32Array(width);
    for (let i = 0; i < width; i++) {
      x[i] = model.embedding[id * width + i] + model.positions[at * width + i];
    }
    const states = new Float32Array((layers + 1) * width);
    states.set(x);
    model.blocks.forEach((block, l) => {
      const normed = layerNorm(x, block.before.weight, block.before.bias, epsilon);
      const qkv = linear(block.attention.weight, block.attention.bias, normed);
      this.keys[l].set(qkv.subarray(width, 2 * width), at * width);
      this.values[l].set(qkv.subarray(2 * width), at * width);
      const mixed = linear(block.mixed.weight, block.mixed.bias, this.attend(qkv, l, at));
      for (let i = 0; i < width; i++) x[i] += mixed[i];
      const again = layerNorm(x, block.between.weight, block.between.bias, epsilon);
      const wide = linear(block.wide.weight, block.wide.bias, again).map(activation);
      const narrow = linear(block.narrow.weight, block.narrow.bias, wide);
      for (let i = 0; i < width; i++) x[i] += narrow[i];
      states.set(x, (l + 1) * width);
    });
    // As transformers gives them: the last layer's output is the normed one.
    states.set(layerNorm(x, model.last.weight, model.last.bias, epsilon), layers * width);
    this.ids.push(id);
    this.states.push(states);
  }

  attend(query, l, at) {
    const { width, heads, config } = this.model;
    const size = width / heads;
    let scale = config.scale_attn_weights === false ? 1 : 1 / Math.sqrt(size);
    if (config.scale_attn_by_inverse_layer_idx) scale /= l + 1;
    const [keys, values] = [this.keys[l], this.values[l]];
    const output = new Float32Array(width);
    const weights = new Float32Array(at + 1);
    for (let first = 0; first < width; first += size) {
      let highest = -Infinity;
      for (let t = 0; t <= at; t++) {
        let product = 0;
        for (let i = first; i < first + size; i++) product += query[i] * keys[t * width + i];
        weights[t] = product * scale;
        highest = Math.max(highest, weights[t]);
      }
      let total = 0;
      for (let t = 0; t <= at; t++) total += weights[t] = Math.exp(weights[t] - highest);
      for (let t = 0; t <= at; t++) {
        const share = weights[t] / total;
        for (let i = first; i < first + size; i++) output[i] += share * values[t * width + i];
      }
    }
    return output;
  }
}
