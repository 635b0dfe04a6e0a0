// torch.rand with a seed: the Mersenne Twister (Matsumoto and Nishimura 1998), 24 bits a number.
// `uniforms(seed, n)` equals torch.rand(n, generator=torch.Generator().manual_seed(seed)).

const N = 624;
const M = 397;

export function uniforms(seed, n) {
  const state = new Uint32Array(N);
  state[0] = seed;
  for (let i = 1; i < N; i++) {
    const before = state[i - 1] ^ (state[i - 1] >>> 30);
    state[i] = Math.imul(1812433253, before) + i;
  }
  const drawn = [];
  for (let at = N; drawn.length < n; at++) {
    if (at === N) {
      refresh(state);
      at = 0;
    }
    let y = state[at];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    drawn.push((y & 0xffffff) / 2 ** 24);
  }
  return drawn;
}

function refresh(state) {
  for (let i = 0; i < N; i++) {
    const y = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
    state[i] = state[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
  }
}
