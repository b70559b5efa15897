# SPDX-License-Identifier: Apache-2.0
"""The moderation filter over GPT-2's tokens: what leaves, what is taken for a match, what it costs.

COMMAND   python experiments/moderation.py --data=data
HARDWARE  one CPU core, some minutes
EXPECT    README.md, "Moderation filter": no banned word leaves, no clean sentence is touched

Under --data lie wikitext2/wiki.*.tokens, ptb/ptb.*.txt, shakespeare/tinyshakespeare.txt,
sst2/*.tsv, lambada/*.jsonl, e2e/*.txt and blimp/*.jsonl.

  leaks            10,000 texts of 40 words, in which one in five words is exchanged for a banned
                   one, often written so that it lies over the borders of tokens. They are decoded
                   token by token; a regular expression looks for what left
  false positives  sentences of all these files that have none of the words by a regular
                   expression, and words that hold a banned one: they must leave as they are
  time             a token of StreamDecoder alone and with the filter, taking turns
"""

import json
import pathlib
import re
import statistics
import time

import numpy as np
from absl import app, flags

from gpt2_jax.decoding.moderation import Moderator, Policy, Rule
from gpt2_jax.decoding.stream import StreamDecoder
from gpt2_jax.files import progress
from gpt2_jax.tokenizer import load_tokenizer

_DATA = flags.DEFINE_string("data", "data", "Folder of the published files.")
_TEXTS = flags.DEFINE_integer("texts", 10_000, "Texts that are looked through for leaks.")
_SENTENCES = flags.DEFINE_integer("sentences", 100_000, "Clean sentences, at most.")

# Short words that many others hold, long ones of several tokens, and phrases.
WORDS = ("ass", "hell", "damn", "cock", "scunthorpe", "antidisestablishmentarianism")
WORDS += ("gobbledygook", "as it were", "flibbertigibbet nonsense", "zyx")
ANY = "|".join(word.replace(" ", r"\s+") for word in WORDS)
BANNED = re.compile(rf"(?<![^\W_])(?:{ANY})(?![^\W_])", re.IGNORECASE)
POLICY = Policy((Rule("words", "redact", WORDS),))
FILES = ("wikitext2/wiki.*.tokens", "ptb/ptb.*.txt", "shakespeare/tinyshakespeare.txt")
FILES += ("sst2/*.tsv", "lambada/*.jsonl", "e2e/*.txt", "blimp/*.jsonl")


def sentences_of(data: pathlib.Path) -> list[str]:
  """Sentences of the files, without those that have a banned word; each once."""
  sentences = {}
  for pattern in FILES:
    for file in sorted(data.glob(pattern)):
      text = file.read_text(encoding="utf-8")
      if file.suffix == ".jsonl":
        fields = [json.loads(line).values() for line in text.splitlines()]
        text = "\n".join(str(value) for values in fields for value in values)
      text = re.sub(r"[ \n]*\n[ \n]*", "\n", text)
      for sentence in re.split(r"(?<=[.!?]) +|\n", text):
        if len(sentence) > 20 and not BANNED.search(sentence):
          sentences[sentence] = None
  return list(sentences)


def leaks(tokenizer, sentences: list[str]) -> None:
  """Texts with banned words through the filter, token by token."""
  draw, words = np.random.default_rng(0), " ".join(sentences[:20_000]).split()
  n_tokens = n_banned = n_leaked = n_over = 0
  for _ in progress(range(_TEXTS.value), "texts", "text"):
    start = int(draw.integers(0, len(words) - 40))
    text = " ".join(
      _written(draw, WORDS[draw.integers(len(WORDS))]) if draw.random() < 0.2 else word
      for word in words[start : start + 40]
    )
    ids = tokenizer.encode(text)
    banned = [match.span() for match in BANNED.finditer(text)]
    ends = set(np.cumsum([len(tokenizer.decode([token])) for token in ids]).tolist())
    n_over += sum(any(begin < end < stop for end in ends) for begin, stop in banned)
    out = "".join(moderated(tokenizer, ids, POLICY))
    n_tokens, n_banned = n_tokens + len(ids), n_banned + len(banned)
    n_leaked += len(BANNED.findall(out))
    assert out == BANNED.sub("[redacted]", text)
  print(
    f"{_TEXTS.value:,} texts of {n_tokens:,} tokens: {n_banned:,} banned words, {n_over:,} of them "
    f"over the borders of tokens; {n_leaked} left"
  )


def _written(draw, word: str) -> str:
  """A word in one of several ways; some break it into more tokens."""
  ways = (word, word.upper(), word.title(), f'"{word}"', f"-{word}.", word[0].upper() + word[1:])
  mixed = "".join(c.upper() if draw.random() < 0.5 else c for c in word)
  return (*ways, mixed)[draw.integers(len(ways) + 1)]


def moderated(tokenizer, ids: list[int], policy: Policy | None):
  """The text of tokens that come one by one."""
  decoder = StreamDecoder(tokenizer)
  moderator = None if policy is None else Moderator(policy)
  for index, token in enumerate(ids):
    last = index == len(ids) - 1
    chunk = decoder.push([token], last)
    yield chunk if moderator is None else moderator.push(chunk, last)


def false_positives(sentences: list[str]) -> None:
  holders = re.compile("|".join(WORDS), re.IGNORECASE)
  sentences = sentences[: _SENTENCES.value]
  n_touched = n_holding = 0
  for sentence in progress(sentences, "sentences", "sentence"):
    n_touched += Moderator(POLICY).push(sentence, last=True) != sentence
    n_holding += bool(holders.search(sentence))
  print(
    f"{len(sentences):,} clean sentences, {n_holding:,} with a word that holds a banned one: "
    f"{n_touched} touched"
  )


def price(tokenizer, sentences: list[str]) -> None:
  ids = tokenizer.encode(" ".join(sentences[:400]))[:5000]
  many = Policy((Rule("words", "redact", tuple(f"{w}{i}" for i in range(500) for w in WORDS)),))
  kinds = {
    "no filter": None,
    "10 words": Policy((Rule("a", "redact", WORDS),)),
    "5,000 words": many,
  }
  times = {name: [] for name in kinds}
  for _ in range(5):
    for name, policy in kinds.items():
      begin = time.process_time()
      for _ in moderated(tokenizer, ids, policy):
        pass
      times[name].append((time.process_time() - begin) / len(ids) * 1e6)
  for name, t in times.items():
    print(f"{name}: {statistics.median(t):.1f} us a token ({min(t):.1f}-{max(t):.1f})")


def main(_) -> None:
  tokenizer = load_tokenizer("gpt2")
  sentences = sentences_of(pathlib.Path(_DATA.value))
  price(tokenizer, sentences)
  leaks(tokenizer, sentences)
  false_positives(sentences)


if __name__ == "__main__":
  app.run(main)
