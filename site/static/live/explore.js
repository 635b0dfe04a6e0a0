// Puts the sliders of a page on top of its picture: <div class="live" data-picture="tilting"> with
// <input type="range"> in it, each named for an argument.

import * as pictures from "./pictures.js";

function connect(place, draw) {
  const view = place.querySelector(".view");
  const sliders = [...place.querySelectorAll("input[type=range]")];
  const redraw = () => {
    const values = Object.fromEntries(sliders.map((s) => [s.name, s.valueAsNumber]));
    for (const s of sliders) {
      place.querySelector(`output[for=${s.id}]`).textContent = s.valueAsNumber.toFixed(2);
    }
    view.innerHTML = draw(values);
  };
  for (const slider of sliders) slider.addEventListener("input", redraw);
  redraw();
}

// The two pairs that weigh most and least, in words.
function extremes(beta, pairs) {
  const ordered = [...pairs].sort((a, b) => a.margin - b.margin);
  return [["most", ordered[0]], ["least", ordered.at(-1)]].map(([which, pair]) => {
    const block = document.createElement("p");
    block.className = `pair ${which}`;
    const weight = pictures.sigmoid(-beta * pair.margin).toFixed(3);
    for (const text of [
      `Weighs ${which}: ${weight} (margin ${pair.margin.toFixed(1)} nats)`,
      `chosen: ${pair.prompt}${pair.chosen}`,
      `rejected: ${pair.prompt}${pair.rejected}`,
    ]) {
      block.append(text, document.createElement("br"));
    }
    return block.outerHTML;
  }).join("");
}

for (const place of document.querySelectorAll(".live[data-picture]")) {
  const name = place.dataset.picture;
  if (name !== "gradientWeighting") {
    connect(place, pictures[name]);
    continue;
  }
  const answer = await fetch(new URL("weights/margins.json", import.meta.url));
  const pairs = await answer.json();
  const margins = pairs.map((pair) => pair.margin);
  connect(place, (values) => pictures.gradientWeighting(values, margins) + extremes(values.beta, pairs));
}
