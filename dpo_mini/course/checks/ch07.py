"""07 Preference data: pairs, agreement, a judge's taste for a place, and how many prompts."""

import itertools
import math
from collections import Counter

import sympy
import torch

from dpo_mini.course.checks.engine import Exercise, Wrong
from dpo_mini.evaluation import mean_interval

# --- 07.1 exactly one of three is positive ---


def one_good_cases(generator):
    """Three different fractions, none of them 1/2, whose logits do not sum to 0."""
    cases = []
    while len(cases) < 4:
        drawn = (torch.randperm(19, generator=generator) + 1).tolist()
        drawn = [sympy.Rational(n, 20) for n in drawn if n != 10][:3]
        if len(cases) == 3:
            drawn[int(torch.randint(3, (), generator=generator))] = sympy.Rational(99, 100)
        if math.prod(p / (1 - p) for p in drawn) != 1:
            cases.append(tuple(drawn))
    return cases


def one_good_truth(*probabilities):
    """All eight outcomes are listed; those with one positive text are kept."""
    weights = {}
    for outcome in itertools.product((True, False), repeat=3):
        terms = (p if positive else 1 - p for p, positive in zip(probabilities, outcome))
        weights[outcome] = sympy.prod(list(terms))
    kept = {outcome: weight for outcome, weight in weights.items() if sum(outcome) == 1}
    return kept[True, False, False] / sum(kept.values())


def odds(p):
    return p / (1 - p)


def logit(p):
    return sympy.log(odds(p))


def only_first(a, b, c):
    return a * (1 - b) * (1 - c)


def logistic(x):
    return 1 / (1 + sympy.exp(-x))


def duel(a, b):
    return odds(a) / (odds(a) + odds(b))


def others_first(a, b, c):
    return only_first(b, a, c) + only_first(c, a, b)


EXP = sympy.exp
ONE_GOOD = Exercise(
    id="07.1",
    title="The one good text of three",
    kind="derive",
    truth=one_good_truth,
    cases=one_good_cases,
    wrong=(
        Wrong("not normalised", only_first,
              "That is how probable this outcome was before you knew that exactly one is positive. By what do you divide, now that you know?"),
        Wrong("the probabilities as weights", lambda a, b, c: a / (a + b + c),
              "If a is the positive one, b and c are negative. Where does your weight of a say that?"),
        Wrong("the exponentials of the probabilities", lambda a, b, c: EXP(a) / (EXP(a) + EXP(b) + EXP(c)),
              "A softmax is right, but of the rewards, and the reward is not p: which function of p is it in this chapter?"),
        Wrong("the logits as weights", lambda a, b, c: logit(a) / (logit(a) + logit(b) + logit(c)),
              "Logits can be negative, weights cannot. What turns a logit into a weight in Bradley-Terry?"),
        Wrong("only against b", lambda a, b, c: duel(a, b),
              "That is the notebook's formula for two texts. What does it say if c is nearly certain to be positive?"),
        Wrong("only against c", lambda a, b, c: duel(a, c),
              "That is the notebook's formula for two texts. What does it say if b is nearly certain to be positive?"),
        Wrong("the product of two duels", lambda a, b, c: duel(a, b) * duel(a, c),
              "The two duels share a, so they are not independent. Check with three equal p: do your three probabilities sum to 1?"),
        Wrong("the mean of two duels", lambda a, b, c: (duel(a, b) + duel(a, c)) / 2,
              "With three equal p each text has probability 1/3. Yours gives 1/2."),
        Wrong("against the mean of the others", lambda a, b, c: logistic(logit(a) - (logit(b) + logit(c)) / 2),
              "With three equal p each text has probability 1/3. Two rivals are more than one average rival."),
        Wrong("all three turned round", lambda a, b, c: only_first(a, b, c) / (only_first(a, b, c) + (1 - a) * b * c),
              "With a negative and both others positive there would be two positive texts. Which outcomes does 'exactly one' leave?"),
        Wrong("at least one is positive", lambda a, b, c: only_first(a, b, c) / (1 - (1 - a) * (1 - b) * (1 - c)),
              "Your denominator also counts the outcomes with two or three positive texts."),
        Wrong("a positive, at least one positive", lambda a, b, c: a / (1 - (1 - a) * (1 - b) * (1 - c)),
              "Above and below there are still outcomes with several positive texts, and we know that there is exactly one."),
        Wrong("nothing is known of the others", lambda a, b, c: only_first(a, b, c) / (only_first(a, b, c) + (1 - a)),
              "If a is negative, that alone does not mean that exactly one text is positive: which of the others is, and which is not?"),
        Wrong("b and c are not negative", lambda a, b, c: a / (a + others_first(a, b, c)),
              "The other two outcomes are complete. What else must be true, if a is the only positive text?"),
        Wrong("the only negative one", lambda a, b, c: (1 - a) * b * c / ((1 - a) * b * c + (1 - b) * a * c + (1 - c) * a * b),
              "That is the probability that a is the only negative text. Raise p_a: does your probability rise?"),
        Wrong("a is not the one", lambda a, b, c: others_first(a, b, c) / (only_first(a, b, c) + others_first(a, b, c)),
              "That is the probability that one of the others is the positive one."),
        Wrong("odds, not a probability", lambda a, b, c: only_first(a, b, c) / others_first(a, b, c),
              "This compares a with the others only. A probability compares it with all outcomes that are left, its own among them."),
        Wrong("log-odds, not a probability", lambda a, b, c: sympy.log(only_first(a, b, c) / others_first(a, b, c)),
              "These are the right log-odds. The logistic function turns log-odds into a probability."),
        Wrong("as if nobody had looked", lambda a, b, c: sympy.Rational(1, 3),
              "A third is right before looking. The labeller's numbers say more."),
        Wrong("p_a itself", lambda a, b, c: a,
              "That is what the labeller says of a alone. We also know that exactly one of the three is positive."),
    ),
    others=(
        lambda a, b, c: EXP(logit(a)) / (EXP(logit(a)) + EXP(logit(b)) + EXP(logit(c))),
        lambda a, b, c: 1 / (1 + (b / (1 - b) + c / (1 - c)) * (1 - a) / a),
        lambda a, b, c: logistic(logit(a) - sympy.log(odds(b) + odds(c))),
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=4,
    minutes=7,
)  # fmt: skip

# --- 07.2 all pairs of one prompt ---


def pairs_cases(generator):
    """Quarters, so that differences are exact; among them ties, and a gap that is just met."""

    def quarters(n):
        return [(i - 20) / 4 for i in torch.randperm(41, generator=generator).tolist()[:n]]

    def shuffled(values):
        return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]

    x, y = [value for value in quarters(3) if value][:2]
    gap = 0.75 + 0.25 * int(torch.randint(4, (), generator=generator))
    low = -3 + 0.25 * int(torch.randint(8, (), generator=generator))
    clear = [low, low + gap, low + gap, low + gap + 0.25, low + 6, low + 6.5]
    while sorted(mixed := shuffled(clear)) in (mixed, mixed[::-1]):
        pass
    return [
        (sorted(quarters(3)), 0.0),
        (quarters(4), 0.0),
        (shuffled([x, x, x + 2.0**-40, y]), 0.0),
        (mixed, gap),
        (quarters(7), 3.0),
        ([x, x, x], 0.0),
        ([y], 0.25),
    ]


def pairs_truth(rewards, gap):
    """By a table of who beats whom, read row by row above the diagonal."""
    values = torch.tensor(rewards, dtype=torch.float64)
    difference = values[:, None] - values[None, :]
    wins = (difference > 0) & (difference >= gap)
    above = torch.triu(wins | wins.T, diagonal=1).nonzero().tolist()
    return [(i, j) if wins[i, j] else (j, i) for i, j in above]


def duels(n):
    return list(itertools.combinations(range(n), 2))


def by_reward(r, i, j):
    """(chosen, rejected) of two indices; the first of them where they are equal."""
    return (i, j) if r[i] >= r[j] else (j, i)


def kept(r, gap):
    return [
        by_reward(r, i, j) for i, j in duels(len(r)) if r[i] != r[j] and abs(r[i] - r[j]) >= gap
    ]


def best_against_the_rest(r, gap):
    best = max(range(len(r)), key=lambda i: r[i])
    return [pair for pair in kept(r, gap) if pair[0] == best]


def best_and_worst(r, gap):
    pairs = kept(r, gap)
    return [max(pairs, key=lambda pair: r[pair[0]] - r[pair[1]])] if pairs else []


def found_by_reward(r, gap):
    return [(r.index(r[w]), r.index(r[l])) for w, l in kept(r, gap)]


PAIRS = Exercise(
    id="07.2",
    title="Every pair of one prompt",
    kind="implement",
    truth=pairs_truth,
    cases=pairs_cases,
    wrong=(
        Wrong("rejected before chosen", lambda r, g: [(l, w) for w, l in kept(r, g)],
              "The higher reward is the chosen one, and the chosen one stands first."),
        Wrong("not labelled", lambda r, g: [tuple(sorted(pair)) for pair in kept(r, g)],
              "The right comparisons, but the lower index always stands first. Which of the two has the higher reward?"),
        Wrong("the gap is ignored", lambda r, g: kept(r, 0),
              "Ties are gone, but pairs closer than `gap` are still there."),
        Wrong("ties are kept, the first one chosen", lambda r, g: [by_reward(r, i, j) for i, j in duels(len(r)) if abs(r[i] - r[j]) >= g],
              "With a gap of 0 two equal rewards are 'at least 0' apart. What would DPO learn from such a label?"),
        Wrong("ties are kept, the second one chosen", lambda r, g: [(i, j) if r[i] > r[j] else (j, i) for i, j in duels(len(r)) if abs(r[i] - r[j]) >= g],
              "With a gap of 0 two equal rewards are 'at least 0' apart. What would DPO learn from such a label?"),
        Wrong("ties are kept, the gap ignored", lambda r, g: [by_reward(r, i, j) for i, j in duels(len(r))],
              "Every comparison gets a label here. Two kinds of them should be dropped."),
        Wrong("a gap that is just met is dropped", lambda r, g: [pair for pair in kept(r, 0) if r[pair[0]] - r[pair[1]] > g],
              "'At least `gap`' includes a difference of exactly `gap`."),
        Wrong("the wide pairs are dropped", lambda r, g: [pair for pair in kept(r, 0) if r[pair[0]] - r[pair[1]] <= g],
              "A wide gap is a sure label: those are the pairs to keep."),
        Wrong("the difference keeps its sign", lambda r, g: [(i, j) for i, j in duels(len(r)) if r[i] - r[j] >= g and r[i] != r[j]],
              "You keep a pair only where the first of the two is better. What of those in which the second one is?"),
        Wrong("nearly equal counts as equal", lambda r, g: [pair for pair in kept(r, g) if not math.isclose(r[pair[0]], r[pair[1]], rel_tol=1e-9)],
              "Only exact ties are dropped. Does something (a tolerance, rounding, float32 tensors) make close rewards equal?"),
        Wrong("both orders", lambda r, g: [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if r[i] != r[j] and abs(r[i] - r[j]) >= g],
              "Each comparison comes twice, once the wrong way round, so the labels contradict each other."),
        Wrong("row by row of the winners", lambda r, g: sorted(kept(r, g)),
              "The right pairs in another order. Go through the comparisons first, and decide which is chosen inside the loop."),
        Wrong("from the best to the worst", lambda r, g: sorted(kept(r, g), key=lambda pair: (-r[pair[0]], -r[pair[1]])),
              "The right pairs, but sorted by reward. They are wanted in the order in which itertools.combinations gives the indices."),
        Wrong("only the best and the worst", best_and_worst,
              "That is one pair of each prompt, a good choice at times. Here every comparison is wanted."),
        Wrong("only the best against the rest", best_against_the_rest,
              "The others can be compared with each other as well: n completions give n (n - 1) / 2 comparisons."),
        Wrong("only neighbours", lambda r, g: [pair for pair in kept(r, g) if abs(pair[0] - pair[1]) == 1],
              "Each completion is compared with all that follow it, not only with the next one."),
        Wrong("the last completion is left out", lambda r, g: [pair for pair in kept(r, g) if len(r) - 1 not in pair],
              "One completion occurs in no pair. Where does your inner loop stop?"),
        Wrong("rewards, not indices", lambda r, g: [(r[w], r[l]) for w, l in kept(r, g)],
              "These are the right pairs by their rewards. The task asks where they stand in the list."),
        Wrong("indices from 1", lambda r, g: [(w + 1, l + 1) for w, l in kept(r, g)],
              "Python counts from 0."),
        Wrong("the index looked up by its reward", found_by_reward,
              "list.index finds the first completion with that reward. What if two of them have it?"),
        Wrong("all in one list", lambda r, g: [i for pair in kept(r, g) for i in pair],
              "The right numbers; keep each pair together, as a tuple."),
    ),
    others=(
        lambda r, g: [(i, j) if r[i] > r[j] else (j, i) for i in range(len(r)) for j in range(i + 1, len(r)) if r[i] >= r[j] + g and r[i] > r[j] or r[j] >= r[i] + g and r[j] > r[i]],
        lambda r, g: [pair for pair in (max((i, j), (j, i), key=lambda p: r[p[0]] - r[p[1]]) for i, j in duels(len(r))) if r[pair[0]] > r[pair[1]] and r[pair[0]] - r[pair[1]] >= g],
    ),
    tolerance=1e-9,
    difficulty=1,
    importance=4,
    minutes=7,
)  # fmt: skip

# --- 07.3 Cohen's kappa ---


def kappa_cases(generator):
    def counts(low, high, n):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    def lists(cells):
        rows = [pair for pair, n in cells.items() for _ in range(n)]
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        return tuple(map(list, zip(*rows)))

    same, different = counts(4, 8, 2), counts(1, 3, 2)
    two = {("yes", "yes"): same[0] + 3, ("no", "no"): same[1] - 2,
           ("yes", "no"): different[0] + 2, ("no", "yes"): different[1]}  # fmt: skip
    stars = {
        (i, j): n for (i, j), n in zip(itertools.product(range(1, 5), repeat=2), counts(0, 4, 16))
    }
    stars |= {(1, 1): 9, (2, 2): 5, (3, 3): 2, (4, 4): 3, (1, 3): 6, (4, 1): 1}
    names = ("good", "bad", "unclear", "mixed")  # the first says unclear, the second mixed
    own = {
        (a, b): n
        for (a, b), n in zip(itertools.product(names[:3], (*names[:2], names[3])), counts(1, 7, 9))
    }
    own |= {("good", "good"): 12, ("bad", "bad"): 7}
    worse = {
        ("a", "b"): counts(4, 9, 1)[0],
        ("b", "a"): counts(3, 8, 1)[0] + 6,
        ("a", "a"): 1,
        ("b", "b"): 3,
    }
    return [lists(cells) for cells in (two, stars, own, worse)]


def kappa_truth(a, b):
    """Disagreement with the right partner, over that with a partner from anywhere in the list."""
    observed = sum(x != y for x, y in zip(a, b)) / len(a)
    anywhere = sum(x != y for x in a for y in b) / (len(a) * len(b))
    return 1 - observed / anywhere


def shares(labels):
    return {x: labels.count(x) / len(labels) for x in labels}


def agreement(a, b):
    return sum(x == y for x, y in zip(a, b)) / len(a)


def chance(a, b):
    return sum(p * shares(b).get(x, 0) for x, p in shares(a).items())


def kappa_with(expected):
    """Kappa with another agreement by chance, `expected(a, b)`."""
    return lambda a, b: (agreement(a, b) - expected(a, b)) / (1 - expected(a, b))


def squares(labels):
    return sum(p * p for p in shares(labels).values())


def ranked(labels):
    return sorted(shares(labels).values(), reverse=True)


def cohen(a, b):
    return kappa_with(chance)(a, b)


def without_replacement(a, b):
    n = len(a + b)
    return sum(count * (count - 1) for count in Counter(a + b).values()) / (n * (n - 1))


KAPPA = Exercise(
    id="07.3",
    title="Agreement beyond chance",
    kind="implement",
    truth=kappa_truth,
    cases=kappa_cases,
    wrong=(
        Wrong("agreement alone", agreement,
              "That is p_o. Two labellers who always say 'good' agree perfectly and know nothing: what has to be taken off?"),
        Wrong("agreement by chance alone", chance,
              "That is p_e, how often they would agree without looking. Kappa says how much better they do."),
        Wrong("disagreement", lambda a, b: 1 - agreement(a, b),
              "Kappa is 1 where they always agree."),
        Wrong("not divided", lambda a, b: agreement(a, b) - chance(a, b),
              "This is how much they agree beyond chance. Two labellers who always agree must get 1: what is the largest value that yours can have?"),
        Wrong("divided by chance", lambda a, b: (agreement(a, b) - chance(a, b)) / chance(a, b),
              "The scale is the room above chance, from p_e up to perfect agreement. How large is that?"),
        Wrong("a ratio to chance", lambda a, b: agreement(a, b) / chance(a, b),
              "Labellers who agree as often as chance would get 1 from you; kappa is then 0."),
        Wrong("divided by the disagreement", lambda a, b: (agreement(a, b) - chance(a, b)) / (1 - agreement(a, b)),
              "Below the line stands what chance leaves open, 1 - p_e, not what the labellers leave open."),
        Wrong("the sign", lambda a, b: -cohen(a, b),
              "Labellers who agree more than chance have a positive kappa."),
        Wrong("negative values cut off", lambda a, b: max(0.0, cohen(a, b)),
              "Two labellers can agree less than chance would, and kappa is then negative. Tell the reader so."),
        Wrong("the absolute value", lambda a, b: abs(cohen(a, b)),
              "Two labellers can agree less than chance would, and kappa is then negative. Tell the reader so."),
        Wrong("in percent", lambda a, b: 100 * cohen(a, b),
              "Perfect agreement is 1, not 100."),
        Wrong("chance is a half", lambda a, b: 2 * agreement(a, b) - 1,
              "With two labels, each used half of the time, p_e is 1/2. Here there may be more labels, and they are not equally frequent."),
        Wrong("all labels equally frequent", kappa_with(lambda a, b: 1 / len(set(a + b))),
              "If 90 of 100 texts are called good by both, chance agrees often. How frequent is each label with each labeller?"),
        Wrong("frequencies of both together", kappa_with(lambda a, b: squares(a + b)),
              "That is Scott's pi: it gives both labellers one common habit. For Cohen's kappa each keeps their own frequencies."),
        Wrong("Krippendorff's alpha", kappa_with(without_replacement),
              "That counts all labels in one heap. For Cohen's kappa each labeller keeps their own frequencies."),
        Wrong("the first one's frequencies only", kappa_with(lambda a, b: squares(a)),
              "By chance the first says x with the first's frequency of x, and the second does so with whose?"),
        Wrong("the second one's frequencies only", kappa_with(lambda a, b: squares(b)),
              "By chance the second says x with the second's frequency of x, and the first does so with whose?"),
        Wrong("frequencies matched by rank", kappa_with(lambda a, b: sum(p * q for p, q in zip(ranked(a), ranked(b)))),
              "Each frequency must meet that of the same label, not the next one in a list. The two labellers may use different labels."),
        Wrong("only the most frequent label", kappa_with(lambda a, b: max(p * shares(b).get(x, 0) for x, p in shares(a).items())),
              "They can agree by chance on every label, so p_e is a sum over all labels."),
        Wrong("summed over texts, not labels", kappa_with(lambda a, b: sum(shares(a)[x] * shares(b)[y] for x, y in zip(a, b)) / len(a)),
              "Chance does not look at the texts: p_e is a sum over the different labels, each counted once."),
        Wrong("counts for one of the frequencies", kappa_with(lambda a, b: chance(a, b) * len(a)),
              "A probability of agreement is at most 1. Are both frequencies shares of the list's length?"),
        Wrong("a label that only one of them uses", kappa_with(lambda a, b: sum(p * shares(b)[x] for x, p in shares(a).items())),
              "One labeller may never use a label that the other does. How frequent is it then?"),
    ),
    others=(
        lambda a, b: (len(a) * sum(map(lambda x, y: x == y, a, b)) - (total := sum(n * Counter(b)[x] for x, n in Counter(a).items()))) / (len(a) ** 2 - total),
        lambda a, b: 1 - (1 - agreement(a, b)) / (1 - sum(a.count(x) * b.count(x) for x in {*a, *b}) / len(a) / len(b)),
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=4,
    minutes=8,
)  # fmt: skip

# --- 07.4 verdicts in both orders ---

PLACES = {"a": (1, 2), "b": (2, 1), "place 1": (1, 1), "place 2": (2, 2)}


def orders_cases(generator):
    """How many pairs are won twice by a, by b, by the first place, by the second."""
    extra = int(torch.randint(1, 4, (), generator=generator))
    cases = []
    for counts in ((1, 1, 1, 0), (3 + extra, 2, 5, 1), (2, 4 + extra, 1, 4), (5 + extra, 3, 0, 0)):
        rows = [row for row, n in zip(PLACES.values(), counts) for _ in range(n)]
        order = torch.randperm(len(rows), generator=generator).tolist()
        cases.append(tuple(map(list, zip(*(rows[i] for i in order)))))
    return cases


def orders_truth(a_first, b_first):
    """x y - (1 - x)(1 - y) = x + y - 1: the bias from the two shares of place 1."""
    words = {places: who if who in "ab" else "tie" for who, places in PLACES.items()}
    n = len(a_first)
    bias = a_first.count(1) / n + b_first.count(1) / n - 1
    return [words[x, y] for x, y in zip(a_first, b_first)], bias


def verdicts(x, y):
    return ["tie" if p == q else "a" if p == 1 else "b" for p, q in zip(x, y)]


def twice(x, y, place):
    return sum(p == q == place for p, q in zip(x, y))


def bias(x, y):
    return (twice(x, y, 1) - twice(x, y, 2)) / len(x)


def with_labels(label):
    """From a formula of two verdicts to an answer with the right bias."""
    return lambda x, y: ([label(p, q) for p, q in zip(x, y)], bias(x, y))


def with_bias(value):
    """From a formula of two lists to an answer with the right labels."""
    return lambda x, y: (verdicts(x, y), value(x, y))


BOTH_ORDERS = Exercise(
    id="07.4",
    title="Noise, or a taste for a place?",
    kind="implement",
    truth=orders_truth,
    cases=orders_cases,
    wrong=(
        Wrong("the second list read as if a still stood first", with_labels(lambda p, q: "tie" if p != q else "a" if p == 1 else "b"),
              "In the second list the texts have changed places. Which text won there, if place 1 won?"),
        Wrong("a and b exchanged", with_labels(lambda p, q: "tie" if p == q else "b" if p == 1 else "a"),
              "Ties are right. Who stood in place 1 in the first list?"),
        Wrong("only the first list decides", with_labels(lambda p, q: "a" if p == 1 else "b"),
              "These labels contain the judge's taste for a place. When do the two verdicts name different texts?"),
        Wrong("only the second list decides", with_labels(lambda p, q: "a" if q == 2 else "b"),
              "These labels contain the judge's taste for a place. When do the two verdicts name different texts?"),
        Wrong("one win is enough for a", with_labels(lambda p, q: "a" if p == 1 or q == 2 else "b"),
              "A text that wins in one order only has won by its place, or by luck."),
        Wrong("one win is enough for b", with_labels(lambda p, q: "b" if p == 2 or q == 1 else "a"),
              "A text that wins in one order only has won by its place, or by luck."),
        Wrong("ties are left out of the list", lambda x, y: ([w for w in verdicts(x, y) if w != "tie"], bias(x, y)),
              "The list has one entry for each pair, so that it can be matched with the pairs; a tie is \"tie\"."),
        Wrong("places, not texts", with_labels(lambda p, q: "tie" if p == q else p),
              "The label names the text that won, not the place in which it stood."),
        Wrong("the share of contradictions", with_bias(lambda x, y: (twice(x, y, 1) + twice(x, y, 2)) / len(x)),
              "A judge without any taste contradicts itself too, when it is unsure. In which direction do these contradictions lean?"),
        Wrong("place 1 only", with_bias(lambda x, y: twice(x, y, 1) / len(x)),
              "A judge without any taste lets place 1 win twice now and then, by noise. What does the same noise do to place 2?"),
        Wrong("place 2 only", with_bias(lambda x, y: twice(x, y, 2) / len(x)),
              "That is how often place 2 wins twice. Compare it with place 1."),
        Wrong("the sign of the bias", with_bias(lambda x, y: -bias(x, y)),
              "A judge that always takes place 1 has a bias of 1."),
        Wrong("the size of the bias only", with_bias(lambda x, y: abs(bias(x, y))),
              "A judge can also prefer place 2. Its bias is negative."),
        Wrong("a share of the contradictions", with_bias(lambda x, y: (twice(x, y, 1) - twice(x, y, 2)) / max(1, twice(x, y, 1) + twice(x, y, 2))),
              "Both shares are of all pairs, not only of those in which the verdict follows the place."),
        Wrong("divided by contradictions that may not exist", with_bias(lambda x, y: (twice(x, y, 1) - twice(x, y, 2)) / (twice(x, y, 1) + twice(x, y, 2))),
              "Both shares are of all pairs. There may be no contradiction at all, and the bias is then 0."),
        Wrong("a share of the clear pairs", with_bias(lambda x, y: (twice(x, y, 1) - twice(x, y, 2)) / (len(x) - twice(x, y, 1) - twice(x, y, 2))),
              "Both shares are of all pairs, ties among them."),
        Wrong("counts, not shares", with_bias(lambda x, y: twice(x, y, 1) - twice(x, y, 2)),
              "A bias that grows with the number of pairs cannot be compared. Divide by it."),
        Wrong("halved", with_bias(lambda x, y: bias(x, y) / 2),
              "There are two verdicts for each pair, but the shares are of pairs. A judge that always takes place 1 has a bias of 1."),
        Wrong("how often place 1 wins", with_bias(lambda x, y: (x.count(1) + y.count(1)) / len(x + y)),
              "A fair judge gets 1/2 here; its bias should be 0."),
        Wrong("one order only", with_bias(lambda x, y: 2 * x.count(1) / len(x) - 1),
              "If a is usually the better text, place 1 wins often in the first list, and rightly so. Only both lists together tell a taste from a better text."),
        Wrong("how much better a is", with_bias(lambda x, y: (x.count(1) - y.count(1)) / len(x)),
              "This difference is large where a is better than b: the verdicts that follow the text are left, those that follow the place cancel. You want it the other way round."),
        Wrong("always place 1", with_bias(lambda x, y: 1.0),
              "That is the bias of a judge that never reads. Count how often each place wins in both orders."),
        Wrong("no bias", with_bias(lambda x, y: 0.0),
              "The labels are right. Now count how often each place wins in both orders."),
    ),
    others=(
        lambda x, y: (["ab"[p - 1] if p + q == 3 else "tie" for p, q in zip(x, y)], (x + y).count(1) / len(x) - 1),
        lambda x, y: (verdicts(x, y), ((x + y).count(1) - (x + y).count(2)) / len(x + y)),
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=4,
    minutes=8,
)  # fmt: skip

# --- 07.5 how many prompts ---


PILOTS = (  # pairs of each prompt, ties, the least k, and by how much it exceeds a whole number
    ((3, 2), 0, 60, 0.3),
    ((6, 1, 3, 4), 0, 60, 0.7),
    ((2, 6, 3, 1, 6, 4, 3), 3, 60, 0.3),
    ((6, 3, 1, 2, 6, 6, 4, 1, 3, 6, 2), 4, 60, 0.6),
    ((5, 3, 4, 2, 6, 1, 3, 4), 2, 2, 0.4),  # fewer prompts than the pilot had are enough
)


def plan_cases(generator):
    """Unequal prompts, shuffled; `half` such that rounding down or to the nearest is wrong."""
    cases = []
    for sizes, ties, least, fraction in PILOTS:
        names = (torch.randperm(90, generator=generator) + 10).tolist()
        rates = [1.0, 0.0, *torch.rand(len(sizes), generator=generator).tolist()]
        rows = [
            (float(draw < rate), name)
            for size, rate, name in zip(sizes, rates, names)
            for draw in torch.rand(size, generator=generator).tolist()
        ]
        first_tie = len(rows) - ties
        rows = [(0.5 if i >= first_tie else value, name) for i, (value, name) in enumerate(rows)]
        order = torch.randperm(len(rows), generator=generator).tolist()
        values, prompts = map(list, zip(*(rows[i] for i in order)))
        needed = int(torch.randint(least, 5 * least, (), generator=generator)) + fraction
        half = 1.96 * grouped_error(values, prompts) * math.sqrt(len(sizes) / needed)
        cases.append((values, prompts, round(half, 6)))
    return cases


def grouped_error(values, prompts):
    """All products of two residuals of the same prompt, summed."""
    mean = math.fsum(values) / len(values)
    rows = [(value - mean, prompt) for value, prompt in zip(values, prompts)]
    products = math.fsum(e * f for e, p in rows for f, q in rows if p == q)
    count = len(set(prompts))
    return math.sqrt(count / (count - 1) * products) / len(values)


def plan_truth(values, prompts, half):
    """Prompts are added one at a time until the interval is narrow enough."""
    error, needed = grouped_error(values, prompts), 1
    while 1.96 * error * math.sqrt(len(set(prompts)) / needed) > half:
        needed += 1
    return error, needed


def residual_sums(v, p, centre=None):
    """The sum of each prompt's residuals."""
    centre = sum(v) / len(v) if centre is None else centre
    return [sum(x - centre for x, q in zip(v, p) if q == prompt) for prompt in dict.fromkeys(p)]


def root_of_squares(numbers):
    return math.sqrt(sum(x * x for x in numbers))


def few(count):
    return math.sqrt(count / (count - 1))


def residuals(v):
    mean = sum(v) / len(v)
    return [x - mean for x in v]


def prompt_means(v, p):
    groups = [[x for x, q in zip(v, p) if q == prompt] for prompt in dict.fromkeys(p)]
    return [sum(group) / len(group) for group in groups]


def runs(v, p):
    """Sums of residuals over neighbours of one prompt, as itertools.groupby gives them."""
    rows = itertools.groupby(zip(residuals(v), p), key=lambda row: row[1])
    return [sum(e for e, _ in group) for _, group in rows]


def with_error(error):
    """From another standard error to an answer; the number of prompts follows from it."""

    def answer(v, p, h):
        found = error(v, p)
        return found, math.ceil(len(set(p)) * (1.96 * found / h) ** 2)

    return answer


def with_needed(needed):
    """From another number of prompts to an answer with the right error e: `needed(e, v, p, h)`."""

    def answer(v, p, h):
        error = root_of_squares(residual_sums(v, p)) / len(v) * few(len(set(p)))
        return error, needed(error, v, p, h)

    return answer


def mean_of_means(v, p):
    means = prompt_means(v, p)
    return sum(means) / len(means)


def within_prompts(v, p):
    means = dict(zip(dict.fromkeys(p), prompt_means(v, p)))
    return root_of_squares([x - means[q] for x, q in zip(v, p)]) / len(v) * few(len(set(p)))


PLAN = Exercise(
    id="07.5",
    title="How many prompts?",
    kind="design",
    truth=plan_truth,
    cases=plan_cases,
    wrong=(
        Wrong("every pair counted as independent", with_error(lambda v, p: root_of_squares(residuals(v)) / len(v) * few(len(v))),
              "This standard error does not look at the prompts. Pairs of one prompt tend to be right or wrong together: sum their residuals before you square."),
        Wrong("the formula for coins", with_error(lambda v, p: math.sqrt(sum(v) / len(v) * (1 - sum(v) / len(v)) / len(v))),
              "p (1 - p) / n holds for n independent coins. Pairs of one prompt are not independent."),
        Wrong("squared before they are summed", with_error(lambda v, p: root_of_squares(residuals(v)) / len(v) * few(len(set(p)))),
              "A square of a sum is not a sum of squares. Which of the two lets the residuals of one prompt reinforce each other?"),
        Wrong("deviations within the prompts", with_error(within_prompts),
              "A residual is the distance to the mean of all pairs. It is the difference between prompts that you want to see."),
        Wrong("each prompt's own mean", with_error(lambda v, p: 0.0),
              "The residuals of a prompt, taken from its own mean, sum to 0. Which mean does the formula take?"),
        Wrong("the mean of the prompts' means", with_error(lambda v, p: root_of_squares(residual_sums(v, p, mean_of_means(v, p))) / len(v) * few(len(set(p)))),
              "The agreement rate counts each pair once, so its mean is over pairs. A prompt with six pairs weighs more than one with a single pair."),
        Wrong("the spread of the prompts' means", with_error(lambda v, p: float(torch.tensor(prompt_means(v, p), dtype=torch.float64).std()) / math.sqrt(len(set(p)))),
              "That is right for equally many pairs per prompt. Here a prompt with six pairs weighs more than one with a single pair: sums, not means."),
        Wrong("no correction for few prompts", with_error(lambda v, p: root_of_squares(residual_sums(v, p)) / len(v)),
              "The mean was fitted to the same prompts, which makes the residuals a little too small. Which factor of the formula is for that?"),
        Wrong("the correction counts pairs", with_error(lambda v, p: root_of_squares(residual_sums(v, p)) / len(v) * few(len(v))),
              "In the factor in front, what is counted is prompts."),
        Wrong("the correction without its root", with_error(lambda v, p: root_of_squares(residual_sums(v, p)) / len(v) * len(set(p)) / (len(set(p)) - 1)),
              "G / (G - 1) corrects the square of the error, so it stands under the root."),
        Wrong("divided by the number of prompts", with_error(lambda v, p: root_of_squares(residual_sums(v, p)) / len(set(p)) * few(len(set(p)))),
              "The mean is the sum over n, the number of pairs; the error of that sum is divided by the same n."),
        Wrong("divided by the root of n", with_error(lambda v, p: root_of_squares(residual_sums(v, p)) / math.sqrt(len(v)) * few(len(set(p)))),
              "The sum of the squares grows with n already. By what is the sum of the values divided to give the mean?"),
        Wrong("not divided by n", with_error(lambda v, p: root_of_squares(residual_sums(v, p)) * few(len(set(p)))),
              "That is the error of the sum. The agreement rate is a mean."),
        Wrong("the variance", with_error(lambda v, p: (root_of_squares(residual_sums(v, p)) / len(v) * few(len(set(p)))) ** 2),
              "That is the square of the standard error."),
        Wrong("only neighbours share a prompt", with_error(lambda v, p: root_of_squares(runs(v, p)) / len(v) * few(len(set(p)))),
              "The pairs of a prompt need not stand together in the list. Collect them by the prompt's number."),
        Wrong("only neighbours, each run a prompt", with_error(lambda v, p: root_of_squares(runs(v, p)) / len(v) * few(len(runs(v, p)))),
              "The pairs of a prompt need not stand together in the list. Collect them by the prompt's number."),
        Wrong("the planned error, not the pilot's", lambda v, p, h: (h / 1.96, with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * (1.96 * e / h) ** 2))(v, p, h)[1]),
              "The first number is the standard error of the pilot, computed from its pairs."),
        Wrong("the two numbers exchanged", lambda v, p, h: plan_truth(v, p, h)[::-1],
              "The standard error comes first, then the number of prompts."),
        Wrong("1.96 is missing", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * (e / h) ** 2)),
              "The error is right. A 95% interval reaches 1.96 standard errors to either side."),
        Wrong("1.96 is not squared", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * 1.96 * (e / h) ** 2)),
              "The error is right. Solve 1.96 s sqrt(G / k) = half for k: what is squared?"),
        Wrong("2 for 1.96", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * (2 * e / h) ** 2)),
              "A good rule of thumb, but it asks for 4% more prompts. Use 1.96."),
        Wrong("not squared", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * 1.96 * e / h)),
              "The error is right. Half the interval needs four times as many prompts, not twice."),
        Wrong("the pilot's size left out", with_needed(lambda e, v, p, h: math.ceil((1.96 * e / h) ** 2)),
              "The error is right. It belongs to G prompts: if the interval were narrow enough by now, you would need just those."),
        Wrong("pairs, not prompts", with_needed(lambda e, v, p, h: math.ceil(len(v) * (1.96 * e / h) ** 2)),
              "The error is right. This is how many pairs you need; the task asks for prompts."),
        Wrong("only the prompts to be added", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * (1.96 * e / h) ** 2) - len(set(p))),
              "The error is right. The task asks for all prompts, those of the pilot included."),
        Wrong("half of it is the interval's whole width", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * (2 * 1.96 * e / h) ** 2)),
              "The error is right. `half` is the distance from the mean to one end, not from end to end."),
        Wrong("twice the half-width", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * (1.96 * e / h / 2) ** 2)),
              "The error is right. `half` is the distance from the mean to one end already."),
        Wrong("rounded down", with_needed(lambda e, v, p, h: math.floor(len(set(p)) * (1.96 * e / h) ** 2)),
              "The error is right. With one prompt fewer than needed the interval is a little too wide."),
        Wrong("rounded to the nearest", with_needed(lambda e, v, p, h: round(len(set(p)) * (1.96 * e / h) ** 2)),
              "The error is right. If 60.3 prompts are needed, 60 are too few."),
        Wrong("not rounded", with_needed(lambda e, v, p, h: len(set(p)) * (1.96 * e / h) ** 2),
              "The error is right. Prompts come in whole numbers; which is the smallest that will do?"),
        Wrong("one too many", with_needed(lambda e, v, p, h: math.ceil(len(set(p)) * (1.96 * e / h) ** 2) + 1),
              "The error is right, and the number is one more than is needed."),
        Wrong("the plan counts independent coins", with_needed(lambda e, v, p, h: math.ceil(1.96**2 * sum(v) / len(v) * (1 - sum(v) / len(v)) / h**2)),
              "The error is right, but the plan does not use it: p (1 - p) counts independent pairs."),
        Wrong("the plan from the worst case", with_needed(lambda e, v, p, h: math.ceil((0.98 / h) ** 2)),
              "The error is right, but the plan does not use it: p = 1/2 and independent pairs are assumed instead."),
    ),
    others=(
        with_error(lambda v, p: (lambda e: (e.high - e.mean) / 1.96)(mean_interval(torch.tensor(v), p))),
        lambda v, p, h: (lambda e: (e, int(len(set(p)) * (1.96 * e / h) ** 2) + 1))(math.sqrt(sum((sum(x for x, q in zip(v, p) if q == g) - p.count(g) * sum(v) / len(v)) ** 2 for g in set(p)) * len(set(p)) / (len(set(p)) - 1)) / len(v)),
    ),
    tolerance=1e-9,
    difficulty=3,
    importance=5,
    minutes=12,
)  # fmt: skip

EXERCISES = (ONE_GOOD, PAIRS, KAPPA, BOTH_ORDERS, PLAN)
