"""The embedded model's card: what made it, what it is worth, and whether it recites."""

from dpo_mini.sampling import sample_completions

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, imdb, dpo_mini]
---

# A small GPT-2 that writes the openings of movie reviews

The embedded default of dpo_mini: {parameters:,} parameters ({layers} layers, width {width},
{heads} heads, context {context}, tied embeddings), a byte-level BPE of {vocabulary:,} tokens,
float16 safetensors, `GPT2LMHeadModel`.

- **Data**: the Large Movie Review Dataset (Maas et al., ACL 2011), train and unsupervised splits:
  {reviews:,} reviews, {corpus_tokens:,} tokens; `<br />` replaced by a space, each review between
  two `<|endoftext|>`.
- **Command**: `dpo-mini pretrain --dataset stanfordnlp/imdb --steps {steps}`, or a folder with the
  same parquet files.
- **Training**: {tokens_seen:,} tokens seen in windows of {context}: random ones at a constant rate,
  then each review's opening while the rate falls to 0; Muon for matrices, AdamW for the rest.
- **Quality**: **{bits_per_byte:.4f} bits per byte** on the first 127 tokens of every 50th review of
  the test split.
- **Memorisation**: the longest run of words that {samples:,} samples share with a review it was
  trained on is {longest} words: "{shared}".

## Samples (temperature 1, no truncation)

{examples}

## Limits

It knows nothing but IMDb up to 2011, has a third of GPT-2's layers and a thousandth of its reading,
and drifts off topic within a sentence or two. It was made to write about 50 tokens after a short
beginning, for teaching, and for nothing else. It has the opinions, slurs and spoilers of its data.

## Licence and citation

Weights: Apache-2.0. No review is part of this repository. Cite the data:

> Andrew L. Maas, Raymond E. Daly, Peter T. Pham, Dan Huang, Andrew Y. Ng, and Christopher Potts.
> 2011. Learning Word Vectors for Sentiment Analysis. ACL 2011.
"""


def longest_shared_run(samples, texts, least: int = 5) -> str:
    """The longest run of words, of `least` or more, in both a sample and a text; "" for none."""
    places: dict[tuple, list] = {}
    split = [sample.split() for sample in samples]
    for words in split:
        for i in range(len(words) - least + 1):
            places.setdefault(tuple(words[i : i + least]), []).append((words, i))
    best: list[str] = []
    for text in texts:
        words = text.split()
        for j in range(len(words) - least + 1):
            for sample, i in places.get(tuple(words[j : j + least]), ()):
                n = least
                while i + n < len(sample) and j + n < len(words) and sample[i + n] == words[j + n]:
                    n += 1
                if n > len(best):
                    best = sample[i : i + n]
    return " ".join(best)


def embedded_card(model, tokenizer, texts, report: dict, samples: int = 1000) -> str:
    """The card of a pretrained model; `report` is `pretrain`'s, `texts` what it was trained on."""
    config = model.config
    longest = min(60, config.n_positions - 1)
    rows = sample_completions(model, tokenizer, [""] * samples, 1, longest, seed=11)
    drawn = [completion.text for (completion,) in rows]
    shared = longest_shared_run(drawn, texts)
    return CARD.format(
        **report, layers=config.n_layer, width=config.n_embd, heads=config.n_head,
        context=config.n_positions, vocabulary=config.vocab_size, reviews=len(texts),
        samples=samples, longest=len(shared.split()), shared=shared,
        examples="\n".join(f"- {' '.join(text.split())}" for text in drawn[:6]),
    )  # fmt: skip
