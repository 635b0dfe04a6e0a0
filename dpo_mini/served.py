"""Completions from a server that speaks OpenAI's completions protocol (vLLM, llama.cpp, Ollama).

The server only samples. Log-probabilities are always taken here, by the model itself: a server's
own are of another precision, often after truncation, and not for every token.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence

from dpo_mini.data import DataError
from dpo_mini.sampling import Completion, check_characters
from dpo_mini.settings import MOST_ITEMS, MOST_TOKENS, check_real, check_whole
from dpo_mini.tokens import tokenize_prompt, with_one_eos


class ServerError(OSError):
    """The server cannot be reached, or answers what no such server would; a sentence says which."""


def served_completions(
    url: str, served_model: str, tokenizer, prompts: Sequence, n: int = 1, max_new_tokens: int = 48,
    temperature: float = 1.0, seed: int = 0, timeout: float = 600,
) -> list[list[Completion]]:  # fmt: skip
    """`n` completions of each prompt from the server at `url`, such as http://localhost:8000/v1.

    Prompts are sent as token ids, so that BOS and the template are ours. Every truncation of the
    distribution is switched off by name (top_p, top_k, min_p, penalties): servers have defaults of
    their own. Where the server gives token ids back (vLLM does), they are the completion's; else
    its text is tokenised, and one EOS added where the server says that the completion ended.

    Raises ServerError where the server fails or gives another number of completions.
    """
    check_whole("n", n, 1, MOST_ITEMS, "It is the number of completions of each prompt.")
    check_whole("max_new_tokens", max_new_tokens, 1, MOST_TOKENS, "Try 48.")
    check_real("temperature", temperature, 0, "1 is the model's own distribution, 0 is greedy.")
    check_characters(prompts)
    wanted = {
        "model": served_model, "n": n, "max_tokens": max_new_tokens, "temperature": temperature,
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "return_token_ids": True,
    }  # fmt: skip
    rows = []
    for i, prompt in enumerate(prompts):
        ids = tokenize_prompt(tokenizer, prompt)
        body = {**wanted, "prompt": ids, "seed": seed + i}
        answer = posted(f"{url.rstrip('/')}/completions", body, timeout)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != n:
            raise ServerError(
                f"{url} gave {choices!r:.80} for prompt {i + 1}, expected {n} choices. Is it a "
                "server of OpenAI's completions protocol?"
            )
        rows.append([completion(tokenizer, prompt, ids, choice) for choice in choices])
    return rows


def completion(tokenizer, prompt, prompt_ids: list[int], choice: dict) -> Completion:
    """One of a server's choices. Raises ServerError where it does not say how it ended."""
    ended = choice.get("finish_reason")
    if ended not in ("stop", "length") or not isinstance(choice.get("text"), str):
        raise ServerError(
            f"the server's choice has text {choice.get('text')!r:.40} and finish_reason {ended!r}, "
            "expected a text, and 'stop' or 'length'."
        )
    text, ids = choice["text"], choice.get("token_ids")
    if ids is None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ended == "stop":
        ids = with_one_eos(ids, tokenizer.eos_token_id)
    if not ids:
        raise DataError("the server gave a completion without a token. Ask for more new tokens.")
    return Completion(prompt, text, prompt_ids, list(ids))


def posted(url: str, body: dict, timeout: float):
    """The JSON that the server answers. Raises ServerError in a sentence."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read()[:200].decode("utf-8", "replace")
        raise ServerError(f"{url} refused the request ({error.code}): {said}") from error
    except (OSError, ValueError) as error:
        raise ServerError(
            f"{url} cannot be asked ({error}). Is the server running, and does --server end in /v1?"
        ) from error
