"""07 Preference data: pairs, agreement, a judge's taste for a place, and how many prompts."""

import itertools
import math
from collections import Counter

import sympy
import torch

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


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


def one_good(p_a, p_b, p_c):
    a = p_a * (1 - p_b) * (1 - p_c)
    b = (1 - p_a) * p_b * (1 - p_c)
    c = (1 - p_a) * (1 - p_b) * p_c
    return a / (a + b + c)


ONE_GOOD = Exercise(
    "07.1", "The one good text of three", "derive", difficulty=2, importance=4, minutes=7,
    truth=one_good_truth, cases=one_good_cases,
    right=(
        one_good,
        lambda a, b, c: sympy.exp(logit(a)) / (sympy.exp(logit(a)) + sympy.exp(logit(b)) + sympy.exp(logit(c))),
        lambda a, b, c: 1 / (1 + (b / (1 - b) + c / (1 - c)) * (1 - a) / a),
    ),
    wrong=(
        Wrong("not normalised", "a / (a + b + c) -> a", "That is how probable this outcome was before you knew that exactly one is positive. By what do you divide, now that you know?"),
        Wrong("the probabilities as weights", "result = p_a / (p_a + p_b + p_c)", "If a is the positive one, b and c are negative. Where does your weight of a say that?"),
        Wrong("the exponentials of the probabilities", "result = sympy.exp(p_a) / (sympy.exp(p_a) + sympy.exp(p_b) + sympy.exp(p_c))", "A softmax is right, but of the rewards, and the reward is not p: which function of p is it in this chapter?"),
        Wrong("the logits as weights", "result = logit(p_a) / (logit(p_a) + logit(p_b) + logit(p_c))", "Logits can be negative, weights cannot. What turns a logit into a weight in Bradley-Terry?"),
        Wrong("only against b", "p_c = sympy.Integer(0)", "That is the notebook's formula for two texts. What does it say if c is nearly certain to be positive?"),
        Wrong("only against c", "p_b = sympy.Integer(0)", "That is the notebook's formula for two texts. What does it say if b is nearly certain to be positive?"),
        Wrong("the product of two duels", "result = one_good(p_a, p_b, 0) * one_good(p_a, 0, p_c)", "The two duels share a, so they are not independent. Check with three equal p: do your three probabilities sum to 1?"),
        Wrong("the mean of two duels", "result = (one_good(p_a, p_b, 0) + one_good(p_a, 0, p_c)) / 2", "With three equal p each text has probability 1/3. Yours gives 1/2."),
        Wrong("against the mean of the others", "result = 1 / (1 + sympy.exp((logit(p_b) + logit(p_c)) / 2 - logit(p_a)))", "With three equal p each text has probability 1/3. Two rivals are more than one average rival."),
        Wrong("all three turned round", "(a + b + c) -> (a + (1 - p_a) * p_b * p_c)", "With a negative and both others positive there would be two positive texts. Which outcomes does 'exactly one' leave?"),
        Wrong("at least one is positive", "(a + b + c) -> (1 - (1 - p_a) * (1 - p_b) * (1 - p_c))", "Your denominator also counts the outcomes with two or three positive texts."),
        Wrong("a positive, at least one positive", "result = p_a / (1 - (1 - p_a) * (1 - p_b) * (1 - p_c))", "Above and below there are still outcomes with several positive texts, and we know that there is exactly one."),
        Wrong("nothing is known of the others", "(a + b + c) -> (a + 1 - p_a)", "If a is negative, that alone does not mean that exactly one text is positive: which of the others is, and which is not?"),
        Wrong("b and c are not negative", "a / (a + b + c) -> p_a / (p_a + b + c)", "The other two outcomes are complete. What else must be true, if a is the only positive text?"),
        Wrong("one of the others is not asked", "a = p_a * (1 - p_b) * (1 - p_c) -> a = p_a * (1 - p_b) | b = (1 - p_a) * p_b * (1 - p_c) -> b = p_b * (1 - p_c) | c = (1 - p_a) * (1 - p_b) * p_c -> c = (1 - p_a) * p_c", "If a is the only positive text, both others are negative. How many factors has each outcome?"),
        Wrong("the only negative one", "p_a, p_b, p_c = 1 - p_a, 1 - p_b, 1 - p_c", "That is the probability that a is the only negative text. Raise p_a: does your probability rise?"),
        Wrong("odds, not a probability", "a + b -> b", "This compares a with the others only. A probability compares it with all outcomes that are left, its own among them."),
        Wrong("log-odds, not a probability", "a / (a + b + c) -> sympy.log(a / (b + c))", "These are the right log-odds. The logistic function turns log-odds into a probability."),
        Wrong("as if nobody had looked", "result = sympy.Rational(1, 3)", "A third is right before looking. The labeller's numbers say more."),
        Wrong("p_a itself", "result = p_a", "That is what the labeller says of a alone. We also know that exactly one of the three is positive."),
    ),
)  # fmt: skip


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
        Edge("a pair misses the gap by a hair", (shuffled([low, low + gap - 2.0**-40, low + 9]), gap)),
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


def labelled_pairs(rewards, gap):
    pairs = []
    for i, j in itertools.combinations(range(len(rewards)), 2):
        difference = rewards[i] - rewards[j]
        if difference != 0 and abs(difference) >= gap:
            pairs.append((i, j) if difference > 0 else (j, i))
    return pairs


PAIRS = Exercise(
    "07.2", "Every pair of one prompt", "implement", difficulty=1, importance=4, minutes=7,
    truth=pairs_truth, cases=pairs_cases,
    right=(
        labelled_pairs,
        lambda r, g: [(i, j) if r[i] > r[j] else (j, i) for i in range(len(r)) for j in range(i + 1, len(r)) if r[i] >= r[j] + g and r[i] > r[j] or r[j] >= r[i] + g and r[j] > r[i]],
        lambda r, g: [pair for pair in (max((i, j), (j, i), key=lambda p: r[p[0]] - r[p[1]]) for i, j in itertools.combinations(range(len(r)), 2)) if r[pair[0]] > r[pair[1]] and r[pair[0]] - r[pair[1]] >= g],
    ),
    wrong=(
        Wrong("rejected before chosen", "result = [(l, w) for w, l in result]", "The higher reward is the chosen one, and the chosen one stands first."),
        Wrong("not labelled", "result = [tuple(sorted(pair)) for pair in result]", "The right comparisons, but the lower index always stands first. Which of the two has the higher reward?"),
        Wrong("the gap is ignored", "gap = 0", "Ties are gone, but pairs closer than `gap` are still there."),
        Wrong("ties are kept, the first one chosen", "difference != 0 and  ->  | difference > 0 else -> difference >= 0 else", "With a gap of 0 two equal rewards are 'at least 0' apart. What would DPO learn from such a label?"),
        Wrong("ties are kept, the second one chosen", "difference != 0 and  -> ", "With a gap of 0 two equal rewards are 'at least 0' apart. What would DPO learn from such a label?"),
        Wrong("ties are kept, the gap ignored", "difference != 0 and abs(difference) >= gap -> True | difference > 0 else -> difference >= 0 else", "Every comparison gets a label here. Two kinds of them should be dropped."),
        Wrong("a gap that is just met is dropped", ">= gap -> > gap", "'At least `gap`' includes a difference of exactly `gap`."),
        Wrong("the wide pairs are dropped", "abs(difference) >= gap -> abs(difference) <= gap", "A wide gap is a sure label: those are the pairs to keep."),
        Wrong("the difference keeps its sign", "abs(difference) -> difference", "You keep a pair only where the first of the two is better. What of those in which the second one is?"),
        Wrong("nearly equal counts as equal", "difference != 0 -> not math.isclose(rewards[i], rewards[j], rel_tol=1e-9)", "Only exact ties are dropped. Does something (a tolerance, rounding, float32 tensors) make close rewards equal?"),
        Wrong("both orders", "combinations -> permutations", "Each comparison comes twice, once the wrong way round, so the labels contradict each other."),
        Wrong("from the best to the worst", "result = sorted(result, key=lambda pair: (-rewards[pair[0]], -rewards[pair[1]]))", "The right pairs, but sorted by reward. They are wanted in the order in which itertools.combinations gives the indices."),
        Wrong("only the best and the worst", "result = [max(result, key=lambda pair: rewards[pair[0]] - rewards[pair[1]])] if result else []", "That is one pair of each prompt, a good choice at times. Here every comparison is wanted."),
        Wrong("only the best against the rest", "result = [pair for pair in result if pair[0] == rewards.index(max(rewards))]", "The others can be compared with each other as well: n completions give n (n - 1) / 2 comparisons."),
        Wrong("only neighbours", "result = [pair for pair in result if abs(pair[0] - pair[1]) == 1]", "Each completion is compared with all that follow it, not only with the next one."),
        Wrong("the last completion is left out", "result = [pair for pair in result if len(rewards) - 1 not in pair]", "One completion occurs in no pair. Where does your inner loop stop?"),
        Wrong("rewards, not indices", "result = [(rewards[w], rewards[l]) for w, l in result]", "These are the right pairs by their rewards. The task asks where they stand in the list."),
        Wrong("the index looked up by its reward", "result = [(rewards.index(rewards[w]), rewards.index(rewards[l])) for w, l in result]", "list.index finds the first completion with that reward. What if two of them have it?"),
        Wrong("all in one list", "result = [i for pair in result for i in pair]", "The right numbers; keep each pair together, as a tuple."),
    ),
)  # fmt: skip


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
    return [
        lists(two),
        Edge("there are more than two labels", lists(stars)),
        Edge("each labeller has a label that the other lacks", lists(own)),
        Edge("they agree less than by chance", lists(worse)),
    ]


def kappa_truth(a, b):
    """Disagreement with the right partner, over that with a partner from anywhere in the list."""
    observed = sum(x != y for x, y in zip(a, b)) / len(a)
    anywhere = sum(x != y for x in a for y in b) / (len(a) * len(b))
    return 1 - observed / anywhere


def cohens_kappa(a, b):
    n = len(a)
    observed = sum(x == y for x, y in zip(a, b)) / n
    count_a, count_b = Counter(a), Counter(b)
    by_chance = sum(count_a[x] * count_b[x] for x in count_a) / n**2
    return (observed - by_chance) / (1 - by_chance)


KAPPA = Exercise(
    "07.3", "Agreement beyond chance", "implement", difficulty=2, importance=4, minutes=8,
    truth=kappa_truth, cases=kappa_cases,
    right=(
        cohens_kappa,
        lambda a, b: (len(a) * sum(map(lambda x, y: x == y, a, b)) - (total := sum(n * Counter(b)[x] for x, n in Counter(a).items()))) / (len(a) ** 2 - total),
        lambda a, b: 1 - (1 - sum(x == y for x, y in zip(a, b)) / len(a)) / (1 - sum(a.count(x) * b.count(x) for x in {*a, *b}) / len(a) / len(b)),
    ),
    wrong=(
        Wrong("agreement alone", "return (observed - by_chance) / (1 - by_chance) -> return observed", "That is p_o. Two labellers who always say 'good' agree perfectly and know nothing: what has to be taken off?"),
        Wrong("agreement by chance alone", "return (observed - by_chance) / (1 - by_chance) -> return by_chance", "That is p_e, how often they would agree without looking. Kappa says how much better they do."),
        Wrong("disagreement", "return (observed - by_chance) / (1 - by_chance) -> return 1 - observed", "Kappa is 1 where they always agree."),
        Wrong("not divided", "/ (1 - by_chance) -> ", "This is how much they agree beyond chance. Two labellers who always agree must get 1: what is the largest value that yours can have?"),
        Wrong("divided by chance", "/ (1 - by_chance) -> / by_chance", "The scale is the room above chance, from p_e up to perfect agreement. How large is that?"),
        Wrong("a ratio to chance", "(observed - by_chance) / (1 - by_chance) -> observed / by_chance", "Labellers who agree as often as chance would get 1 from you; kappa is then 0."),
        Wrong("divided by the disagreement", "/ (1 - by_chance) -> / (1 - observed)", "Below the line stands what chance leaves open, 1 - p_e, not what the labellers leave open."),
        Wrong("chance is a half", "sum(count_a[x] * count_b[x] for x in count_a) / n**2 -> 0.5", "With two labels, each used half of the time, p_e is 1/2. Here there may be more labels, and they are not equally frequent."),
        Wrong("all labels equally frequent", "sum(count_a[x] * count_b[x] for x in count_a) / n**2 -> 1 / len(set(a + b))", "If 90 of 100 texts are called good by both, chance agrees often. How frequent is each label with each labeller?"),
        Wrong("frequencies of both together", "sum(count_a[x] * count_b[x] for x in count_a) / n**2 -> sum((m / (2 * n)) ** 2 for m in Counter(a + b).values())", "That is Scott's pi: it gives both labellers one common habit. For Cohen's kappa each keeps their own frequencies."),
        Wrong("Krippendorff's alpha", "sum(count_a[x] * count_b[x] for x in count_a) / n**2 -> sum(m * (m - 1) for m in Counter(a + b).values()) / (2 * n * (2 * n - 1))", "That counts all labels in one heap. For Cohen's kappa each labeller keeps their own frequencies."),
        Wrong("the first one's frequencies only", "count_a[x] * count_b[x] -> count_a[x] ** 2", "By chance the first says x with the first's frequency of x, and the second does so with whose?"),
        Wrong("the second one's frequencies only", "count_a[x] * count_b[x] for x in count_a -> count_b[x] ** 2 for x in count_b", "By chance the second says x with the second's frequency of x, and the first does so with whose?"),
        Wrong("frequencies matched by rank", "sum(count_a[x] * count_b[x] for x in count_a) / n**2 -> sum(p * q for p, q in zip(*(sorted(c.values(), reverse=True) for c in (count_a, count_b)))) / n**2",
              "Each frequency must meet that of the same label, not the next one in a list. The two labellers may use different labels."),
        Wrong("only the most frequent label", "sum(count_a -> max(count_a", "They can agree by chance on every label, so p_e is a sum over all labels."),
        Wrong("summed over texts, not labels", "sum(count_a[x] * count_b[x] for x in count_a) / n**2 -> sum(count_a[x] * count_b[y] for x, y in zip(a, b)) / n**3", "Chance does not look at the texts: p_e is a sum over the different labels, each counted once."),
        Wrong("counts for one of the frequencies", "/ n**2 -> / n", "A probability of agreement is at most 1. Are both frequencies shares of the list's length?"),
        Wrong("a label that only one of them uses", "count_b[x] -> dict(count_b)[x]", "One labeller may never use a label that the other does. How frequent is it then?"),
    ),
)  # fmt: skip


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


def both_orders(a_first, b_first):
    winner = {(1, 2): "a", (2, 1): "b", (1, 1): "tie", (2, 2): "tie"}
    couples = list(zip(a_first, b_first))
    bias = (couples.count((1, 1)) - couples.count((2, 2))) / len(couples)
    return [winner[couple] for couple in couples], bias


BOTH_ORDERS = Exercise(
    "07.4", "Noise, or a taste for a place?", "implement", difficulty=2, importance=4, minutes=8,
    truth=orders_truth, cases=orders_cases,
    right=(
        both_orders,
        lambda x, y: (["ab"[p - 1] if p + q == 3 else "tie" for p, q in zip(x, y)], (x + y).count(1) / len(x) - 1),
        lambda x, y: (["tie" if p == q else "a" if p == 1 else "b" for p, q in zip(x, y)], ((x + y).count(1) - (x + y).count(2)) / len(x + y)),
    ),
    wrong=(
        Wrong("the second list read as if a still stood first", "(1, 2): \"a\", (2, 1): \"b\", (1, 1): \"tie\", (2, 2): \"tie\" -> (1, 2): \"tie\", (2, 1): \"tie\", (1, 1): \"a\", (2, 2): \"b\"", "In the second list the texts have changed places. Which text won there, if place 1 won?"),
        Wrong("only the first list decides", "(1, 1): \"tie\" -> (1, 1): \"a\" | (2, 2): \"tie\" -> (2, 2): \"b\"", "These labels contain the judge's taste for a place. When do the two verdicts name different texts?"),
        Wrong("only the second list decides", "(1, 1): \"tie\" -> (1, 1): \"b\" | (2, 2): \"tie\" -> (2, 2): \"a\"", "These labels contain the judge's taste for a place. When do the two verdicts name different texts?"),
        Wrong("one win is enough for a", "\"tie\" -> \"a\"", "A text that wins in one order only has won by its place, or by luck."),
        Wrong("one win is enough for b", "\"tie\" -> \"b\"", "A text that wins in one order only has won by its place, or by luck."),
        Wrong("ties are left out of the list", "for couple in couples] -> for couple in couples if couple[0] != couple[1]]", "The list has one entry for each pair, so that it can be matched with the pairs; a tie is \"tie\"."),
        Wrong("places, not texts", "(1, 2): \"a\", (2, 1): \"b\" -> (1, 2): 1, (2, 1): 2", "The label names the text that won, not the place in which it stood."),
        Wrong("the share of contradictions", ")) - couples -> )) + couples", "A judge without any taste contradicts itself too, when it is unsure. In which direction do these contradictions lean?"),
        Wrong("place 1 only", "(couples.count((1, 1)) - couples.count((2, 2))) -> couples.count((1, 1))", "A judge without any taste lets place 1 win twice now and then, by noise. What does the same noise do to place 2?"),
        Wrong("place 2 only", "(couples.count((1, 1)) - couples.count((2, 2))) -> couples.count((2, 2))", "That is how often place 2 wins twice. Compare it with place 1."),
        Wrong("a share of the contradictions", "/ len(couples) -> / max(1, couples.count((1, 1)) + couples.count((2, 2)))", "Both shares are of all pairs, not only of those in which the verdict follows the place."),
        Wrong("divided by contradictions that may not exist", "/ len(couples) -> / (couples.count((1, 1)) + couples.count((2, 2)))", "Both shares are of all pairs. There may be no contradiction at all, and the bias is then 0."),
        Wrong("a share of the clear pairs", "/ len(couples) -> / sum(x != y for x, y in couples)", "Both shares are of all pairs, ties among them."),
        Wrong("how often place 1 wins", "couples], bias -> couples], (a_first + b_first).count(1) / (2 * len(couples))", "A fair judge gets 1/2 here; its bias should be 0."),
        Wrong("one order only", "couples], bias -> couples], 2 * a_first.count(1) / len(couples) - 1", "If a is usually the better text, place 1 wins often in the first list, and rightly so. Only both lists together tell a taste from a better text."),
        Wrong("how much better a is", "couples], bias -> couples], (a_first.count(1) - b_first.count(1)) / len(couples)", "This difference is large where a is better than b: the verdicts that follow the text are left, those that follow the place cancel. You want it the other way round."),
        Wrong("always place 1", "couples], bias -> couples], 1.0", "That is the bias of a judge that never reads. Count how often each place wins in both orders."),
    ),
)  # fmt: skip


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


def plan(agree, prompts, half):
    n, mean = len(agree), sum(agree) / len(agree)
    sums = Counter()
    for value, prompt in zip(agree, prompts):
        sums[prompt] += value - mean
    G = len(sums)
    s = math.sqrt(G / (G - 1)) / n * math.sqrt(sum(total**2 for total in sums.values()))
    return s, math.ceil(G * (1.96 * s / half) ** 2)


PLAN = Exercise(
    "07.5", "How many prompts?", "design", difficulty=3, importance=5, minutes=12,
    truth=plan_truth, cases=plan_cases,
    right=(
        plan,
        lambda v, p, h: (lambda e: (e, int(len(set(p)) * (1.96 * e / h) ** 2) + 1))(math.sqrt(sum((sum(x for x, q in zip(v, p) if q == g) - p.count(g) * sum(v) / len(v)) ** 2 for g in set(p)) * len(set(p)) / (len(set(p)) - 1)) / len(v)),
    ),
    wrong=(
        Wrong("every pair counted as independent", "sums[prompt] -> sums[len(sums)] | math.ceil(G -> math.ceil(len(set(prompts))", "This standard error does not look at the prompts. Pairs of one prompt tend to be right or wrong together: sum their residuals before you square."),
        Wrong("the formula for coins", "math.sqrt(G / (G - 1)) / n * math.sqrt(sum(total**2 for total in sums.values())) -> math.sqrt(mean * (1 - mean) / n)", "p (1 - p) / n holds for n independent coins. Pairs of one prompt are not independent."),
        Wrong("squared before they are summed", "sum(total**2 for total in sums.values()) -> sum((value - mean) ** 2 for value in agree)", "A square of a sum is not a sum of squares. Which of the two lets the residuals of one prompt reinforce each other?"),
        Wrong("deviations within the prompts", "sum(total**2 for total in sums.values()) -> sum((v - sum(x for x, q in zip(agree, prompts) if q == p) / prompts.count(p)) ** 2 for v, p in zip(agree, prompts))",
              "A residual is the distance to the mean of all pairs. It is the difference between prompts that you want to see."),
        Wrong("the mean of the prompts' means", "sum(agree) / len(agree) -> sum(v / prompts.count(p) for v, p in zip(agree, prompts)) / len(set(prompts))", "The agreement rate counts each pair once, so its mean is over pairs. A prompt with six pairs weighs more than one with a single pair."),
        Wrong("the spread of the prompts' means", "math.sqrt(G / (G - 1)) / n * math.sqrt(sum(total**2 for total in sums.values())) -> statistics.stdev(sum(v for v, q in zip(agree, prompts) if q == p) / prompts.count(p) for p in set(prompts)) / math.sqrt(G)",
              "That is right for equally many pairs per prompt. Here a prompt with six pairs weighs more than one with a single pair: sums, not means."),
        Wrong("no correction for few prompts", "math.sqrt(G / (G - 1)) / n -> 1 / n", "The mean was fitted to the same prompts, which makes the residuals a little too small. Which factor of the formula is for that?"),
        Wrong("the correction counts pairs", "math.sqrt(G / (G - 1)) -> math.sqrt(n / (n - 1))", "In the factor in front, what is counted is prompts."),
        Wrong("the correction without its root", "math.sqrt(G / (G - 1)) -> G / (G - 1)", "G / (G - 1) corrects the square of the error, so it stands under the root."),
        Wrong("divided by the number of prompts", "/ n * -> / G *", "The mean is the sum over n, the number of pairs; the error of that sum is divided by the same n."),
        Wrong("divided by the root of n", "/ n * -> / math.sqrt(n) *", "The sum of the squares grows with n already. By what is the sum of the values divided to give the mean?"),
        Wrong("not divided by n", "/ n * -> *", "That is the error of the sum. The agreement rate is a mean."),
        Wrong("the variance", "return s, -> s = s * s; return s,", "That is the square of the standard error."),
        Wrong("only neighbours share a prompt", "for value, prompt in zip(agree, prompts): -> for i, (value, prompt) in enumerate(zip(agree, prompts)): | sums[prompt] -> sums[sum(a != b for a, b in zip(prompts[: i + 1], prompts[1 : i + 1]))] | G = len(sums) -> G = len(set(prompts))",
              "The pairs of a prompt need not stand together in the list. Collect them by the prompt's number."),
        Wrong("only neighbours, each run a prompt", "for value, prompt in zip(agree, prompts): -> for i, (value, prompt) in enumerate(zip(agree, prompts)): | sums[prompt] -> sums[sum(a != b for a, b in zip(prompts[: i + 1], prompts[1 : i + 1]))] | math.ceil(G -> math.ceil(len(set(prompts))",
              "The pairs of a prompt need not stand together in the list. Collect them by the prompt's number."),
        Wrong("prompts that stand apart are counted twice", "for value, prompt in zip(agree, prompts): -> for i, (value, prompt) in enumerate(zip(agree, prompts)): | sums[prompt] -> sums[sum(a != b for a, b in zip(prompts[: i + 1], prompts[1 : i + 1]))]",
              "The pairs of a prompt need not stand together in the list. Collect them by the prompt's number."),
        Wrong("prompts are thought to be numbered from 0", "G = len(sums) -> G = max(prompts) + 1", "The numbers are names: they may begin anywhere and leave gaps. How many different ones are there?"),
        Wrong("the planned error, not the pilot's", "return s, -> return half / 1.96,", "The first number is the standard error of the pilot, computed from its pairs."),
        Wrong("1.96 is missing", "1.96 * s -> s", "The error is right. A 95% interval reaches 1.96 standard errors to either side."),
        Wrong("1.96 is not squared", "(1.96 * s / half) ** 2 -> 1.96 * (s / half) ** 2", "The error is right. Solve 1.96 s sqrt(G / k) = half for k: what is squared?"),
        Wrong("2 for 1.96", "1.96 -> 2", "A good rule of thumb, but it asks for 4% more prompts. Use 1.96."),
        Wrong("not squared", "(1.96 * s / half) ** 2 -> 1.96 * s / half", "The error is right. Half the interval needs four times as many prompts, not twice."),
        Wrong("the pilot's size left out", "G * (1.96 -> (1.96", "The error is right. It belongs to G prompts: if the interval were narrow enough by now, you would need just those."),
        Wrong("pairs, not prompts", "ceil(G * -> ceil(n *", "The error is right. This is how many pairs you need; the task asks for prompts."),
        Wrong("only the prompts to be added", "math.ceil(G * (1.96 * s / half) ** 2) -> math.ceil(G * (1.96 * s / half) ** 2) - G", "The error is right. The task asks for all prompts, those of the pilot included."),
        Wrong("rounded to the nearest", "math.ceil -> round", "The error is right. If 60.3 prompts are needed, 60 are too few."),
        Wrong("not rounded", "math.ceil( -> (", "The error is right. Prompts come in whole numbers; which is the smallest that will do?"),
        Wrong("the plan counts independent coins", "math.ceil(G * (1.96 * s / half) ** 2) -> math.ceil(1.96**2 * mean * (1 - mean) / half**2)", "The error is right, but the plan does not use it: p (1 - p) counts independent pairs."),
        Wrong("the plan from the worst case", "math.ceil(G * (1.96 * s / half) ** 2) -> math.ceil((0.98 / half) ** 2)", "The error is right, but the plan does not use it: p = 1/2 and independent pairs are assumed instead."),
    ),
)  # fmt: skip

EXERCISES = (ONE_GOOD, PAIRS, KAPPA, BOTH_ORDERS, PLAN)
