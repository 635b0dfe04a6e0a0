// Safetensors in the browser: float16 and float32 tensors, and matrices in eight bits with a
// float16 scale for each group of numbers (`name` and `name.scale`, dpo_mini/embedded/eight_bits.py).

const SCALE = ".scale";

// One float32 for each of the 65,536 bit patterns of a float16.
function halfTable() {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31) table[bits] = fraction ? NaN : sign * Infinity;
    else if (exponent) table[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
    else table[bits] = (sign * fraction) / 1024 / 2 ** 14;
  }
  return table;
}

const HALF = halfTable();

// {name: {shape, data: Float32Array}} of a file's bytes.
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const raw = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    const kinds = { F16: Uint16Array, F32: Float32Array, I8: Int8Array };
    if (!kinds[dtype]) throw new Error(`${name} is ${dtype}; expected F16, F32 or I8.`);
    const bytes = buffer.slice(8 + length + start, 8 + length + end); // aligned
    raw[name] = { dtype, shape, data: new kinds[dtype](bytes) };
  }
  const tensors = {};
  for (const [name, { dtype, shape, data }] of Object.entries(raw)) {
    if (name.endsWith(SCALE)) continue;
    let numbers = data;
    if (dtype === "F16") {
      numbers = new Float32Array(data.length);
      for (let i = 0; i < data.length; i++) numbers[i] = HALF[data[i]];
    }
    if (dtype === "I8") numbers = scaled(data, raw[name + SCALE].data);
    tensors[name] = { shape, data: numbers };
  }
  return tensors;
}

function scaled(whole, scales) {
  const group = whole.length / scales.length;
  const numbers = new Float32Array(whole.length);
  for (let g = 0; g < scales.length; g++) {
    const scale = HALF[scales[g]];
    for (let i = g * group; i < (g + 1) * group; i++) numbers[i] = whole[i] * scale;
  }
  return numbers;
}

// Tensor by tensor, one file's numbers added to another's.
export function added(tensors, difference) {
  const sum = {};
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    const more = difference[name]?.data;
    if (more?.length !== data.length) throw new Error(`The difference does not fit ${name}.`);
    sum[name] = { shape, data: data.map((value, i) => value + more[i]) };
  }
  return sum;
}
