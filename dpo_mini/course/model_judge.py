"""A chat model as judge: which of two answers to an instruction is better, asked in both orders.

    python -m dpo_mini.course.model_judge smollm2 --data ../shared/data/human-preferences

The model is a local one (a name or a folder, by transformers) or any server that speaks OpenAI's
chat protocol (`--address http://localhost:8000/v1`; a key in DPO_MINI_JUDGE_KEY, where one is
needed). A verdict that cannot be read is counted as none. It is never taken for a tie.
"""

import argparse
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from dpo_mini.course import studies
from dpo_mini.course.human_preferences import (
    NONE,
    Comparison,
    as_dict,
    clear_agreement,
    longer_preferred,
    read_comparisons,
)
from dpo_mini.course.labels import agreement, share
from dpo_mini.data import DataError
from dpo_mini.models import load_model
from dpo_mini.tokens import tokenize_prompt

# Two wordings, after the two of Rafailov et al. 2023, appendix C.2: S asks for the better answer
# alone, C also names what makes one worse, since judges are said to like long ones.
WORDINGS = {
    "S": "Which answer follows the instruction better?",
    "C": (
        "Which answer follows the instruction better, without saying more than is needed? An "
        "answer that repeats itself or adds what was not asked for is worse."
    ),
}
ENDING = "Reply with one character only: 1 for the first answer, 2 for the second, 0 for a tie."


def judge_messages(instruction: str, first: str, second: str, wording: str = "S") -> list[dict]:
    """The conversation that asks for a verdict."""
    asked = (
        f"Instruction:\n{instruction}\n\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}\n\n"
        f"{WORDINGS[wording]} {ENDING}"
    )
    return [{"role": "user", "content": asked}]


def read_verdict(reply: str) -> str | None:
    """The verdict of a reply, "1", "2" or "tie"; None where it names none or several of them."""
    named = set(re.findall(r"(?<![\w.])[012](?![\w%]|\.\d)", reply))
    named |= {"0"} if re.search(r"\b(tie|tied|draw|equal)\b", reply.lower()) else set()
    if len(named) != 1:
        return None
    return {"0": "tie"}.get(said := named.pop(), said)


class Reply(NamedTuple):
    """What a judge said, and what it cost."""

    verdict: str | None  # "1", "2", "tie", or None: no verdict that could be read
    tokens: int  # read and written; 0 where the server does not say
    seconds: float
    problem: str = ""  # why there is no verdict


class JudgeError(RuntimeError):
    """The judge cannot be asked at all: a wrong address, a wrong key, a model that is not there."""


# --- two kinds of judge, each a function of a conversation ---


def local_judge(name: str) -> Callable[[list[dict]], Reply]:
    """A chat model by transformers. It does not write: the verdict is the most probable of the
    tokens "1", "2" and "0" after the question, so that a small model cannot fail to answer.
    """
    model, tokenizer = load_model(name)
    ids = [tokenizer(said, add_special_tokens=False)["input_ids"][-1] for said in ("1", "2", "0")]

    @torch.no_grad()
    def ask(messages: list[dict]) -> Reply:
        since = time.monotonic()
        prompt = tokenize_prompt(tokenizer, messages)
        logits = model(torch.tensor([prompt], device=model.device)).logits[0, -1, ids]
        said = ("1", "2", "tie")[int(logits.argmax())]
        return Reply(said, len(prompt), time.monotonic() - since)

    return ask


@dataclass(frozen=True)
class Endpoint:
    """A judge behind an address that speaks OpenAI's chat protocol."""

    address: str  # up to and with /v1
    model: str
    timeout: float = 30.0  # seconds for one try
    tries: int = 3
    pause: float = 1.0  # seconds before the second try; each later one waits twice as long

    def __call__(self, messages: list[dict]) -> Reply:
        """Ask. A server that fails, stalls or answers rubbish is tried again, then gives a Reply
        without verdict that says why. Raises JudgeError for what no further try can mend.
        """
        since, problem = time.monotonic(), ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                text, tokens = content_of(self.sent(messages))
                verdict = read_verdict(text)
                problem = "" if verdict else f"no verdict in {text[:60]!r}"
                return Reply(verdict, tokens, time.monotonic() - since, problem)
            except urllib.error.HTTPError as error:
                problem = f"the server answered {error.code} {error.reason}"
                if error.code in (400, 401, 403, 404, 405, 422):
                    raise JudgeError(f"{self.address}: {problem}. {ADVICE[error.code]}") from None
            except (TimeoutError, OSError, ValueError) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        return Reply(None, 0, time.monotonic() - since, f"{problem}, {self.tries} times")

    def sent(self, messages: list[dict]) -> bytes:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("DPO_MINI_JUDGE_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = self.address.rstrip("/") + "/chat/completions"
        if not url.startswith(("http://", "https://")):
            raise JudgeError(f"{self.address!r} is no address: it begins with http:// or https://.")
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(StayHere).open(request, timeout=self.timeout) as reply:
            return read_in_time(reply, self.timeout)


class StayHere(urllib.request.HTTPRedirectHandler):
    """No redirection is followed: the key is for this address alone."""

    def redirect_request(self, *arguments):
        return None


LONGEST_REPLY = 2**20  # bytes


def read_in_time(reply, timeout: float) -> bytes:
    """A reply's body. A socket's time-out is for each piece, so that a server which sends one byte
    a second could hold for ever: the whole has `timeout` seconds. Raises ValueError for a body of
    more than LONGEST_REPLY bytes.
    """
    until, body = time.monotonic() + timeout, b""
    while piece := reply.read1(65536):
        body += piece
        if time.monotonic() > until:
            raise TimeoutError("the answer did not end in time")
        if len(body) > LONGEST_REPLY:
            raise ValueError("the answer is too long to be a verdict")
    return body


ADVICE = dict.fromkeys((401, 403), "Put the right key into DPO_MINI_JUDGE_KEY.")
ADVICE |= dict.fromkeys((404, 405), "The address should end in /v1, and the model must be there.")
ADVICE |= dict.fromkeys((400, 422), "Is the model's name right, and is it a chat model?")


def content_of(body: bytes) -> tuple[str, int]:
    """The text and the tokens of a server's answer; ValueError where it is not of the protocol."""
    answer = json.loads(body)
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("the answer is not of OpenAI's chat protocol") from None
    if not isinstance(text, str):
        raise ValueError("the answer has no text")
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else 0
    return text, tokens if isinstance(tokens, int) else 0


# --- both orders ---


class Judged(NamedTuple):
    """A pair asked in both orders. Verdicts name the answer, not its place."""

    verdict: str | None  # "1", "2" or "tie"; None where a reply had none
    places: tuple[str | None, str | None]  # the place named: in this order, and in the other
    tokens: int
    seconds: float
    problem: str = ""


def both_orders(ask, instruction: str, first: str, second: str, wording: str = "S") -> Judged:
    """The verdict that holds in both orders. Two orders that contradict each other are a tie."""
    one = ask(judge_messages(instruction, first, second, wording))
    other = ask(judge_messages(instruction, second, first, wording))
    turned = {"1": "2", "2": "1"}.get(other.verdict, other.verdict)
    if None in (one.verdict, other.verdict):
        verdict = None
    else:
        verdict = one.verdict if one.verdict == turned else "tie"
    cost = one.tokens + other.tokens, one.seconds + other.seconds
    return Judged(verdict, (one.verdict, other.verdict), *cost, one.problem or other.problem)


def judged(ask, items: Sequence, wording: str = "S") -> list[Judged]:
    """Each of `items` (`human_preferences.Comparison`) judged in both orders.

    Raises JudgeError where the first three items brought no verdict at all: the judge is not there,
    and a thousand more time-outs would not bring it back.
    """
    found = []
    for item in items:
        found.append(both_orders(ask, item.instruction, *map(str, item.answers), wording))
        if len(found) == 3 and all(one.verdict is None for one in found):
            raise JudgeError(f"no verdict in three items; the last problem: {found[-1].problem}.")
    if not found:
        raise DataError("there is nothing to judge.")
    return found


def place_report(found: Sequence[Judged]) -> dict:
    """How often the same place won in both orders, first or second, of the pairs with verdicts; and
    how often the two orders agree.
    """
    places = [one.places for one in found if None not in one.places]
    n = max(1, len(places))
    count = {"first twice": ("1", "1"), "second twice": ("2", "2")}
    shares = {name: places.count(both) / n for name, both in count.items()}
    same = sum(one.verdict in ("1", "2") or one.places == ("tie", "tie") for one in found)
    return {"n": len(places), **shares, "orders agree": same / n}


# --- the study ---


def report(items: Sequence, found: Sequence[Judged]) -> dict:
    """A judge on items of which people's majority is known: n, accuracy, places, cost."""
    said = [one.verdict or NONE for one in found]
    with_it = [replace(c, judges={"it": verdict}) for c, verdict in zip(items, said)]
    return {
        "verdicts": dict(Counter(said)),
        "clear": clear_agreement(with_it, "it"),
        "agreement": as_dict(
            agreement(said, [c.majority for c in items], [c.instruction for c in items])
        ),
        "places": place_report(found),
        "longer": longer_preferred(with_it, said),
        "tokens": sum(one.tokens for one in found) / len(found),
        "problems": sum(one.verdict is None for one in found),
    }


def short_items(items: Sequence[Comparison], words: int, n: int, seed: int = 0) -> list[Comparison]:
    """`n` decided items of at most so many words, one of each instruction, in a random order."""
    drawn = random.Random(seed).sample(list(items), len(items))
    kept: dict[str, Comparison] = {}
    for item in drawn:
        texts = (item.instruction, *map(str, item.answers))
        if item.majority and sum(len(text.split()) for text in texts) <= words:
            kept.setdefault(item.instruction, item)
    return list(kept.values())[:n]


def main(argv=None) -> None:
    command = "python -m dpo_mini.course.model_judge"
    parser = argparse.ArgumentParser(command, description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a name, a folder, or the model's name at the address")
    parser.add_argument("--data", required=True, help="as in dpo_mini.course.human_preferences")
    parser.add_argument("--address", help="of a server, such as http://localhost:8000/v1")
    parser.add_argument("--items", type=int, default=60, help="how many items, one an instruction")
    parser.add_argument(
        "--words", type=int, default=150, help="of instruction and answers, at most"
    )
    parser.add_argument("--output", default="notebooks/results")
    args = parser.parse_args(argv)
    ask = Endpoint(args.address, args.model) if args.address else local_judge(args.model)
    items = short_items(read_comparisons(args.data), args.words, args.items)
    found = {wording: judged(ask, items, wording) for wording in WORDINGS}
    same = share([a.verdict == b.verdict for a, b in zip(found["S"], found["C"])])
    result = {
        "command": f"{command} {args.model} --data DATA",
        "model": args.model,
        "items": len(items),
        "words": args.words,
        "wordings agree": {"n": len(items), **same._asdict()},
        "longer, people": longer_preferred(items, [c.majority for c in items]),
        "wordings": {wording: report(items, one) for wording, one in found.items()},
    }
    with studies.written_aside(Path(args.output) / "human_judge.json") as partial:
        partial.write_text(json.dumps(studies.rounded(result), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
