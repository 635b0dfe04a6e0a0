// The page of one training and every beta: a beginning, a slider, and the text that two models in
// a worker write. The same random numbers at every place of the slider, so that words change one by
// one as it moves.

const place = document.getElementById("every-beta");
const find = (name) => place.querySelector(`[name=${name}]`);
const [prompt, strength, seed] = ["prompt", "strength", "seed"].map(find);
const [said, text, numbers] = ["status", "text", "numbers"].map((c) => place.querySelector(`.${c}`));
const betaOfTraining = Number(place.dataset.beta);
const tokensWanted = Number(place.dataset.tokens);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let request = 0;
let before = []; // the words of the last finished text, to say which are new
let asked = 0;

function sayStrength() {
  const value = strength.valueAsNumber;
  place.querySelector("output[for=strength]").textContent = value.toFixed(2);
  let meaning = `beta = ${betaOfTraining} / ${value.toFixed(2)} = ${(betaOfTraining / value).toFixed(2)}`;
  if (value === 0) meaning = "beta = infinity: the reference";
  if (value < 0) meaning = "below 0: towards what was rejected; no beta does that";
  if (value === 1) meaning = `beta = ${betaOfTraining}: the policy as it was trained`;
  place.querySelector(".meaning").textContent = meaning;
}

function ask() {
  sayStrength();
  request += 1;
  asked = performance.now();
  place.dataset.state = "writing";
  worker.postMessage({
    request,
    prompt: prompt.value,
    strength: strength.valueAsNumber,
    seed: Math.max(0, Math.trunc(seed.valueAsNumber || 0)),
    tokens: tokensWanted,
  });
}

// The text, each token shaded by how much likelier the mixture made it than the reference does.
function show(written, whole) {
  text.replaceChildren();
  const opening = document.createElement("b");
  opening.textContent = prompt.value;
  text.append(opening);
  let from = 0;
  written.forEach((token, i) => {
    const piece = document.createElement("span");
    piece.textContent = whole.slice(from, token.end);
    from = token.end;
    const shift = token.logp - token.referenceLogp;
    const strong = Math.min(1, Math.abs(shift) / 4).toFixed(2);
    piece.style.setProperty("--strong", strong);
    piece.className = shift < 0 ? "less" : "more";
    if (before[i] !== undefined && before[i] !== token.id) piece.classList.add("new");
    piece.title = `${shift < 0 ? "" : "+"}${shift.toFixed(2)} nats against the reference`;
    text.append(piece);
  });
}

worker.onmessage = ({ data }) => {
  if (data.type === "progress" && !text.textContent) {
    said.textContent = `Loading the models: ${data.megabytes.toFixed(1)} MB so far.`;
    return;
  }
  if (data.request !== request) return;
  if (data.type === "error") {
    said.textContent = data.message;
    place.dataset.state = "error";
    return;
  }
  if (data.type === "token" || data.type === "done") show(data.tokens, data.text);
  if (data.type !== "done") return;
  const positive = 1 / (1 + Math.exp(-data.logit));
  numbers.textContent =
    `P(positive) = ${positive.toFixed(3)} · KL from the reference = ${data.kl.toFixed(2)} nats`;
  said.textContent = `${data.tokens.length} tokens in ${Math.round(performance.now() - asked)} ms.`;
  before = data.tokens.map((token) => token.id);
  place.dataset.state = "done";
  place.result = data; // for the tests
};
worker.onerror = (event) => {
  said.textContent = `This browser could not start the models: ${event.message ?? "unknown error"}.`;
  place.dataset.state = "error";
};

for (const control of [strength, prompt, seed]) control.addEventListener("input", ask);
place.querySelector("button.another").addEventListener("click", () => {
  seed.value = Math.trunc(seed.valueAsNumber || 0) + 1;
  ask();
});
for (const button of place.querySelectorAll("button[data-strength]")) {
  button.addEventListener("click", () => {
    strength.value = button.dataset.strength;
    ask();
  });
}
ask();
