"""15 People: ties, soft labels, a majority and its judge, and the win rate of a judge that errs."""

from collections import Counter

import sympy
import torch
import torch.nn.functional as F

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


def ties_cases(generator):
    """Strengths and a threshold factor, all different fractions; the factor is above 1."""
    cases = []
    for _ in range(4):
        a, b = [sympy.Rational(n, 7) for n in (torch.randperm(20, generator=generator)[:2] + 1).tolist()]
        cases.append((a, b, 1 + sympy.Rational(int(torch.randint(2, 12, (), generator=generator)), 5)))
    return cases


def ties_truth(a, b, nu):
    """In closed form: nu is exp of Rao and Kupper's threshold, a / b is exp of the gap."""
    tie = (nu**2 - 1) * a * b / ((a + nu * b) * (b + nu * a))
    return tie, (a * b + nu * a**2) / (2 * a * b + nu * (a**2 + b**2))


def ties(a, b, nu):
    a_wins = a / (a + nu * b)
    b_wins = b / (b + nu * a)
    tie = 1 - a_wins - b_wins
    return tie, a_wins / (a_wins + b_wins)


TIES = Exercise(
    "15.1", "What is left when ties are dropped", "derive", difficulty=2, importance=4, minutes=8,
    truth=ties_truth, cases=ties_cases,
    right=(
        ties,
        lambda a, b, nu: ((nu**2 - 1) * a * b / ((a + nu * b) * (b + nu * a)), 1 / (1 + b * (a + nu * b) / (a * (b + nu * a)))),
        lambda a, b, nu: (1 - a / (a + nu * b) - b / (b + nu * a), (a / (a + nu * b)) / (a / (a + nu * b) + b / (b + nu * a))),
    ),
    wrong=(
        Wrong("Bradley-Terry among the decided", "return tie, a_wins / (a_wins + b_wins) -> return tie, a / (a + b)", "Your first value is right. Is the share of a's wins among all decided pairs still a / (a + b)? Compute it from the two probabilities."),
        Wrong("not divided by the decided", "return tie, a_wins / (a_wins + b_wins) -> return tie, a_wins", "Your first value is right. The second is the share of a's wins among the pairs that are left, not among all."),
        Wrong("ties count half", "return tie, a_wins / (a_wins + b_wins) -> return tie, a_wins + tie / 2", "Your first value is right. In the second, ties are dropped; they do not count half."),
        Wrong("one threshold alone", "b / (b + nu * a) -> b / (a + nu * b)", "Both texts have to be ahead by the threshold. In b's win, which of the two is multiplied by nu?"),
        Wrong("the threshold helps the winner", "a / (a + nu * b) -> nu * a / (nu * a + b) | b / (b + nu * a) -> nu * b / (nu * b + a)", "With these the wins add up to more than 1. The threshold makes a win harder."),
        Wrong("the tie of Davidson", "tie = 1 - a_wins - b_wins -> tie = nu * sympy.sqrt(a * b) / (a + b + nu * sympy.sqrt(a * b))", "That is another model of ties. Here a tie is all that is no win."),
        Wrong("the chance of a decision", "tie = 1 - a_wins - b_wins -> tie = a_wins + b_wins", "That is how often there is a winner. How often is there none?"),
    ),
)  # fmt: skip


def soft_cases(generator):
    def draw(n, scale=4.0):
        return [(torch.randn(n, generator=generator, dtype=torch.float64) * scale - 9).requires_grad_() for _ in range(2)] + [
            torch.randn(n, generator=generator, dtype=torch.float64) * scale - 9 for _ in range(2)]  # fmt: skip

    def share(n):
        return torch.rand(n, generator=generator, dtype=torch.float64) * 0.9 + 0.05

    far = draw(3)
    far[0] = (far[0].detach() + torch.tensor([4e3, -4e3, 5e3], dtype=torch.float64)).requires_grad_()
    return [
        (*draw(4), share(4), 0.3),
        (*draw(5), share(5), 1.7),
        Edge("a margin is very large", (*far, share(3), 1.0)),
        Edge("all agree", (*draw(3), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), 0.5)),
    ]


def soft_truth(chosen, rejected, reference_chosen, reference_rejected, p, beta):
    """By the binary cross-entropy of torch."""
    gap = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return F.binary_cross_entropy_with_logits(gap, p, reduction="none")


def soft_loss(chosen, rejected, reference_chosen, reference_rejected, p, beta):
    h = beta * (chosen - reference_chosen - rejected + reference_rejected)
    return -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)


SOFT = Exercise(
    "15.2", "Seven of ten preferred it", "implement", difficulty=2, importance=5, minutes=8,
    truth=soft_truth, cases=soft_cases, tolerance=1e-9,
    right=(
        soft_loss,
        lambda c, r, rc, rr, p, beta: F.softplus(-beta * (c - r - rc + rr)) + (1 - p) * beta * (c - r - rc + rr),
        lambda c, r, rc, rr, p, beta: p * F.softplus(-beta * (c - r - rc + rr)) + (1 - p) * F.softplus(beta * (c - r - rc + rr)),
    ),
    wrong=(
        Wrong("p of the rejected", "p = 1 - p", "p is the share that preferred the chosen text. If all preferred it, p = 1, your loss should be that of DPO."),
        Wrong("plain DPO", "p = torch.ones_like(p)", "Where is p? This is the loss of a label that is certain."),
        Wrong("DPO weighted by p", "- (1 - p) * F.logsigmoid(-h) -> ", "This weighs the pair by p and still asks for an endless margin. What of the people who preferred the other text?"),
        Wrong("the margin scaled by p", "result = -F.logsigmoid((2 * p - 1) * beta * (chosen - reference_chosen - rejected + reference_rejected))", "A smaller gap in the same curve has no finite minimum. The cross-entropy has two terms."),
        Wrong("a squared error", "result = (torch.sigmoid(beta * (chosen - reference_chosen - rejected + reference_rejected)) - p) ** 2", "Its minimum is at the same place, but this is a squared error. The task asks for the cross-entropy."),
        Wrong("no reference", "h = beta * (chosen - reference_chosen - rejected + reference_rejected) -> h = beta * (chosen - rejected)", "h is a difference of implicit rewards: what do they subtract from each log-probability?"),
        Wrong("beta is missing", "h = beta * ( -> h = (", "h is a difference of implicit rewards, in the reward's unit. What turns nats into it?"),
        Wrong("log of sigmoid", "F.logsigmoid(h) -> torch.log(torch.sigmoid(h)) | F.logsigmoid(-h) -> torch.log(torch.sigmoid(-h))", "Right on usual margins. On a large one the sigmoid is rounded to 0 before you take its logarithm."),
        Wrong("the mean", "result = result.mean()", "The right losses, but the task asks for one of each pair."),
    ),
)  # fmt: skip


def majority_cases(generator):
    def drawn(n):
        columns = torch.randint(0, 3, (4, n), generator=generator).tolist()
        names = "1", "2", "tie"
        return [[names[v] for v in column] for column in columns]

    def case(extra=()):
        people = drawn(14)
        sure = [[said] * 4 for said in ("1", "2", "2", "1")]
        rows = [list(row) for row in zip(*people)] + sure + [list(row) for row in extra]
        order = torch.randperm(len(rows), generator=generator).tolist()
        rows = [rows[i] for i in order]
        return [tuple(row[:3]) for row in rows], [row[3] for row in rows]

    return [
        case(),
        Edge("the people's majority is a tie", case([("tie", "tie", "1", "1"), ("tie", "2", "tie", "tie"), ("tie", "tie", "tie", "2")] * 2)),
        Edge("all three people differ", case([("1", "2", "tie", "1"), ("2", "tie", "1", "2"), ("tie", "1", "2", "tie")] * 2)),
        Edge("the judge often ties", case([("1", "1", "2", "tie"), ("2", "2", "2", "tie"), ("1", "tie", "1", "tie")])),
    ]


def majority_truth(people, judge):
    """By counting the two winners apart."""
    score, n = 0.0, 0
    for said, verdict in zip(people, judge):
        ones, twos = said.count("1"), said.count("2")
        if max(ones, twos) < 2:
            continue
        n += 1
        score += 0.5 if verdict == "tie" else float(verdict == ("1" if ones > twos else "2"))
    return score / n, n


def judge_accuracy(people, judge):
    score = n = 0
    for said, verdict in zip(people, judge):
        winner, votes = Counter(said).most_common(1)[0]
        if votes >= 2 and winner != "tie":
            n += 1
            score += 1.0 if verdict == winner else 0.5 if verdict == "tie" else 0.0
    return score / n, n


MAJORITY = Exercise(
    "15.3", "A judge beside three people", "implement", difficulty=2, importance=4, minutes=8,
    truth=majority_truth, cases=majority_cases,
    right=(
        judge_accuracy,
        lambda people, judge: (sum(v) / len(v), len(v)) if (v := [1.0 if said == w else 0.5 * (said == "tie") for s, said in zip(people, judge) for w in "12" if s.count(w) >= 2]) else None,
    ),
    wrong=(
        Wrong("the judge's ties are wrong", "0.5 if verdict -> 0.0 if verdict", "A judge that says 'tie' where people have a winner is neither right nor wrong: it counts half."),
        Wrong("the judge's ties are right", "0.5 if verdict -> 1.0 if verdict", "A judge that says 'tie' everywhere would then be perfect. How much does a tie count?"),
        Wrong("the judge's ties are dropped", 'winner != "tie": -> winner != "tie" and verdict != "tie":', "Dropping what the judge does not decide makes a judge that hesitates look better."),
        Wrong("people's ties are kept", ' and winner != "tie": -> :', "Where the majority says 'tie' there is no winner that the judge could name."),
        Wrong("items without a majority are kept", "votes >= 2 and winner -> winner", "Where all three differ there is no majority; the first of the three is no more right than the others."),
        Wrong("only where all three agree", "votes >= 2 -> votes == 3", "Two of three are a majority."),
        Wrong("the first person alone", "people = [(said[0],) * 3 for said in people]", "Three people judged: what do at least two of them say?"),
        Wrong("divided by all items", "return score / n, n -> return score / len(judge), n", "The share is of the items that have a winner."),
        Wrong("all items are counted", "return score / n, n -> return score / n, len(judge)", "The share is right. The second value is how many items it is a share of."),
        Wrong("the number of points", "return score / n, n -> return score, n", "These are points; the task asks for their share."),
    ),
)  # fmt: skip


def correction_cases(generator):
    def known(right_of_wins, right_of_losses, n):
        rows = []
        for i in range(n):
            win = bool(i % 3)
            right = torch.rand((), generator=generator).item() < (right_of_wins if win else right_of_losses)
            rows.append((win, win == right))
        return [*rows, (True, True), (True, True), (False, False), (False, False), (True, False), (False, True)]

    def verdicts(share, n):
        return (torch.rand(n, generator=generator) < share).tolist() + [True, False]

    return [
        (verdicts(0.55, 20), known(0.9, 0.8, 30)),
        (verdicts(0.6, 47), known(0.8, 0.95, 60)),
        Edge("the corrected rate would be above 1", (verdicts(0.97, 40), known(0.8, 0.85, 60))),
        Edge("the corrected rate would be below 0", (verdicts(0.03, 40), known(0.85, 0.8, 60))),
    ]


def correction_truth(verdicts, known):
    """The w for which a world with this judge reports what was reported, by bisection."""
    table = Counter(known)
    hit = table[True, True] / (table[True, True] + table[True, False])
    false_alarm = table[False, True] / (table[False, True] + table[False, False])
    reported, low, high = sum(verdicts) / len(verdicts), 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = middle * hit + (1 - middle) * false_alarm < reported
        low, high = (middle, high) if below else (low, middle)
    return round(high, 12)


def corrected(verdicts, known):
    judged = sum(verdicts) / len(verdicts)
    wins = [said for truth, said in known if truth]
    losses = [not said for truth, said in known if not truth]
    s_1, s_2 = sum(wins) / len(wins), sum(losses) / len(losses)
    w = (judged + s_2 - 1) / (s_1 + s_2 - 1)
    return min(1.0, max(0.0, w))


CORRECTION = Exercise(
    "15.4", "The win rate behind a judge's", "implement", difficulty=3, importance=5, minutes=10,
    truth=correction_truth, cases=correction_cases,
    right=(
        corrected,
        lambda verdicts, known: min(1.0, max(0.0, (sum(verdicts) / len(verdicts) - (f := Counter(known)[False, True] / sum(not t for t, _ in known))) / (Counter(known)[True, True] / sum(t for t, _ in known) - f))),
    ),
    wrong=(
        Wrong("not corrected", "return min(1.0, max(0.0, w)) -> return judged", "That is what the judge reports. What would it report if the true rate were w? Solve for w."),
        Wrong("outside of 0 and 1", "return min(1.0, max(0.0, w)) -> return w", "The formula is right. A win rate lies between 0 and 1; chance in the samples can push the formula outside."),
        Wrong("the two accuracies exchanged", "s_1, s_2 = sum(wins) / len(wins), sum(losses) / len(losses) -> s_2, s_1 = sum(wins) / len(wins), sum(losses) / len(losses)", "One is how often a win is called a win, the other how often a loss is called a loss. Which stands in the numerator?"),
        Wrong("one accuracy for both", "w = (judged -> s_1 = s_2 = (sum(wins) + sum(losses)) / len(known); w = (judged", "This judge errs more often on one side. Keep the two accuracies apart."),
        Wrong("accuracy given what the judge said", "wins = [said for truth, said in known if truth] -> wins = [truth for truth, said in known if said] | losses = [not said for truth, said in known if not truth] -> losses = [not truth for truth, said in known if not said]", "That is how often a verdict is right. The correction needs how often a real win is called a win: sort by the truth."),
        Wrong("multiplied by the judge's worth", "/ (s_1 + s_2 - 1) -> * (s_1 + s_2 - 1)", "Errors draw the reported rate to one half. To undo it, the distance must grow."),
        Wrong("the denominator is missing", "(judged + s_2 - 1) / (s_1 + s_2 - 1) -> judged + s_2 - 1", "The false wins are taken off. The wins that the judge missed have to be given back too."),
        Wrong("divided by how often wins are found", "(judged + s_2 - 1) / (s_1 + s_2 - 1) -> judged / s_1", "Some of the reported wins are losses that were called wins. Take them off first."),
        Wrong("errors of losses added", "(judged + s_2 - 1) / -> (judged + 1 - s_2) /", "Losses that are called wins make the reported rate too high, not too low."),
    ),
)  # fmt: skip

EXERCISES = (TIES, SOFT, MAJORITY, CORRECTION)
