// The course's pictures that follow a slider, as dpo_mini/course/widgets.py and svg.py draw them:
// each a function from numbers to SVG. A test compares both, number by number.

const [BLUE, ORANGE, VERMILION] = ["#0072B2", "#E69F00", "#D55E00"];
const [INK, GREY, PAPER] = ["#222222", "#7F7F7F", "#FFFFFF"];
// Letters need more contrast than lines do.
const DARKER = { [GREY]: "#666666", [ORANGE]: "#8A5F00", [VERMILION]: "#A84A00", [BLUE]: "#00619A" };
const FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'";

// A world of eight answers: log-probabilities of the reference, and rewards.
export const REFERENCE = [0.22, 0.18, 0.16, 0.14, 0.11, 0.09, 0.06, 0.04].map(Math.log);
export const REWARDS = [-1.0, 0.4, -0.3, 1.0, -1.6, 0.8, 2.0, 1.4];

export const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const escaped = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
const signed = (x, digits) => (x < 0 ? "" : "+") + x.toFixed(digits);

function words(x, y, text, size, anchor = "start", colour = INK, weight = "normal", turn = 0) {
  const [px, py] = [x.toFixed(1), y.toFixed(1)];
  const rotate = turn ? ` transform='rotate(${turn} ${px} ${py})'` : "";
  return (
    `<text x='${px}' y='${py}' font-size='${size}' text-anchor='${anchor}' ` +
    `fill='${DARKER[colour] ?? colour}' font-weight='${weight}' ${FONT}${rotate}>${escaped(text)}</text>`
  );
}

class Panel {
  // box: left, top, width and height in pixels; x, y: lowest and highest value.
  constructor([left, top, width, height], x, y, { title = "", xlabel = "", ylabel = "" }) {
    Object.assign(this, { left, top, width, height, x, y });
    const [right, bottom] = [left + width, top + height];
    this.parts = [
      `<path d='M${left},${top}V${bottom}H${right}' fill='none' stroke='${GREY}'/>`,
      words(left + width / 2, top - 10, title, 15, "middle", INK, "bold"),
      words(left + width / 2, bottom + 36, xlabel, 13, "middle"),
      words(left - 40, top + height / 2, ylabel, 13, "middle", INK, "normal", -90),
    ];
  }

  // Pixels of a point; what lies outside the axes is held at their edge.
  at(x, y) {
    const share = (value, [low, high]) => Math.min(1, Math.max(0, (value - low) / (high - low)));
    return [this.left + share(x, this.x) * this.width, this.top + (1 - share(y, this.y)) * this.height];
  }

  ticks(xs, ys) {
    for (const value of xs) this.label(value, String(value));
    for (const value of ys) {
      const [px, py] = this.at(this.x[0], value);
      this.parts.push(words(px - 6, py + 4, String(value), 12, "end", GREY));
    }
    return this;
  }

  label(x, text, lines = 1) {
    const [px, py] = this.at(x, this.y[0]);
    this.parts.push(words(px, py + 18 * lines, text, 13, "middle"));
    return this;
  }

  line(points, colour, dash = "", width = 2.5) {
    const path = points.map((point) => this.at(...point).map((p) => p.toFixed(1)).join(",")).join(" ");
    this.parts.push(
      `<polyline points='${path}' fill='none' stroke='${colour}' stroke-width='${width}' ` +
        `stroke-dasharray='${dash}'/>`
    );
    return this;
  }

  curve(f, colour, n = 120) {
    const [low, high] = this.x;
    const xs = Array.from({ length: n + 1 }, (_, i) => low + ((high - low) * i) / n);
    return this.line(xs.map((x) => [x, f(x)]), colour);
  }

  dots(points, colour, radius = 5, opacity = "1.0") {
    for (const point of points) {
      const [px, py] = this.at(...point);
      this.parts.push(
        `<circle cx='${px.toFixed(1)}' cy='${py.toFixed(1)}' r='${radius}' fill='${colour}' ` +
          `fill-opacity='${opacity}'/>`
      );
    }
    return this;
  }

  bar(x, y, width, colour) {
    const [x0, y0] = this.at(x - width / 2, this.y[0]);
    const [x1, y1] = this.at(x + width / 2, y);
    this.parts.push(
      `<rect x='${x0.toFixed(1)}' y='${y1.toFixed(1)}' width='${(x1 - x0).toFixed(1)}' ` +
        `height='${(y0 - y1).toFixed(1)}' fill='${colour}'/>`
    );
    return this;
  }

  note(x, y, text, colour = INK, anchor = "start") {
    this.parts.push(words(...this.at(x, y), text, 13, anchor, colour));
    return this;
  }
}

function picture(panel, caption, width = 720, height = 320) {
  return (
    `<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 ${width} ${height}' width='${width}' ` +
    `role='img' style='max-width:100%'><title>${escaped(caption)}</title>` +
    `<rect width='${width}' height='${height}' rx='8' fill='${PAPER}'/>${panel.parts.join("")}</svg>`
  );
}

// P(a beats b) on the logistic curve: only the difference of the rewards matters.
export function bradleyTerry({ reward_a: a, reward_b: b }) {
  const gap = a - b;
  const chance = sigmoid(gap);
  const panel = new Panel([70, 40, 620, 220], [-6, 6], [0, 1], {
    xlabel: "difference of rewards, r(a) - r(b)",
    ylabel: "P(a beats b)",
    title: `P(a beats b) = sigmoid(${signed(gap, 2)}) = ${chance.toFixed(3)}`,
  });
  panel.ticks([-6, -4, -2, 0, 2, 4, 6], [0, 0.5, 1]).curve(sigmoid, BLUE);
  panel.line([[-6, 0.5], [6, 0.5]], GREY, "2 4", 1);
  panel.line([[gap, 0], [gap, chance], [-6, chance]], ORANGE, "5 4", 1.5);
  panel.dots([[gap, chance]], VERMILION, 7);
  return picture(panel, `With a difference of ${gap.toFixed(2)}, a wins ${chance.toFixed(3)}`);
}

// pi* = pi_ref exp(r / beta) / Z in the world of eight answers, and what it gains and costs.
export function tilted(beta, reference = REFERENCE, rewards = REWARDS) {
  const scores = reference.map((logp, i) => logp + rewards[i] / beta);
  const highest = Math.max(...scores);
  const logZ = highest + Math.log(scores.reduce((sum, s) => sum + Math.exp(s - highest), 0));
  const optimum = scores.map((s) => Math.exp(s - logZ));
  const reward = optimum.reduce((sum, p, i) => sum + p * rewards[i], 0);
  const kl = optimum.reduce((sum, p, i) => sum + p * (scores[i] - logZ - reference[i]), 0);
  return { optimum, logZ, reward, kl };
}

export function tilting({ beta }) {
  const { optimum, logZ, reward, kl } = tilted(beta);
  const panel = new Panel([70, 40, 620, 200], [-0.6, REWARDS.length - 0.4], [0, 1], {
    ylabel: "probability",
    xlabel: "answers, each with its reward",
    title: `beta = ${beta.toFixed(2)}`,
  });
  panel.ticks([], [0, 0.5, 1]);
  REWARDS.forEach((r, i) => {
    panel.bar(i - 0.18, Math.exp(REFERENCE[i]), 0.34, GREY);
    panel.bar(i + 0.18, optimum[i], 0.34, BLUE);
    panel.label(i, signed(r, 1));
  });
  panel.note(REWARDS.length - 0.5, 0.95, "grey: pi_ref", GREY, "end");
  panel.note(REWARDS.length - 0.5, 0.86, "blue: pi*", BLUE, "end");
  const said =
    `log Z = ${logZ.toFixed(3)} · KL = ${kl.toFixed(3)} nats · E[r] = ${reward.toFixed(3)}` +
    ` · J = E[r] - beta KL = ${(reward - beta * kl).toFixed(3)} = beta log Z`;
  panel.label(3.5, said, 3);
  return picture(panel, said);
}

// A pair's weight in DPO's gradient, sigmoid(-beta margin), a constant factor beta left out.
export function gradientWeighting({ beta }, margins) {
  const weights = margins.map((m) => sigmoid(-beta * m));
  const mean = weights.reduce((sum, w) => sum + w, 0) / weights.length;
  const panel = new Panel([70, 40, 620, 220], [-30, 30], [0, 1], {
    ylabel: "weight in the gradient",
    xlabel: "margin: log-ratio of chosen minus log-ratio of rejected (nats)",
    title: `beta = ${beta.toFixed(2)}: weight = sigmoid(-beta * margin), ${mean.toFixed(3)} on average`,
  });
  panel.ticks([-30, -20, -10, 0, 10, 20, 30], [0, 0.5, 1]).line([[0, 0], [0, 1]], GREY, "2 4", 1);
  panel.curve((margin) => sigmoid(-beta * margin), BLUE);
  panel.dots(margins.map((m, i) => [m, weights[i]]), VERMILION, 4, "0.5");
  panel.note(-29, 0.08, "ranked wrongly: weight above 1/2", GREY);
  panel.note(29, 0.9, "ranked rightly: weight below 1/2", GREY, "end");
  return picture(panel, `Average weight ${mean.toFixed(3)} at beta ${beta.toFixed(2)}`);
}
