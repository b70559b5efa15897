# SPDX-License-Identifier: Apache-2.0
"""Canaries: random secrets that are planted in a corpus, and their exposure.

After Carlini et al. 2019, "The Secret Sharer". A canary is a fixed text with a random part, such as
"My ID is 9075". It is planted into the corpus some times before training. Afterwards all texts of
the space R, whatever their random part, are ranked by their likelihood. Exposure is log2 |R| -
log2 rank, in bits: how much the model helps to guess the secret. A canary that was never trained on
has any rank with the same probability. Its exposure is log2(e) = 1.44 bits on average.

The rank is exact: the whole space is scored. Texts that begin alike share what they have in common
(tree attention), so that a secret costs about as many tokens as differ in it.
"""

import dataclasses
import math
import os.path
from collections.abc import Sequence

import numpy as np

from gpt2_jax.evaluate.metric import mean
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sweep.bootstrap import Interval, intervals
from gpt2_jax.files import progress
from gpt2_jax.tokenizer import Tokenizer

SLOT = "{}"
DIGITS = "0123456789"
MOST_SECRETS = 10**7  # of a space: all of them are scored
SECRETS_AT_ONCE = 20_000  # that are scored at once; their tokens are in memory


@dataclasses.dataclass(frozen=True)
class CanarySpace:
  """The texts of a template with each secret of `length` characters of an alphabet in its `{}`.

  Secrets have numbers: 17 of four digits is "0017".
  """

  template: str
  length: int = 4
  alphabet: str = DIGITS

  def __post_init__(self):
    template, alphabet = self.template[:80], self.alphabet[:80]
    if self.template.count(SLOT) != 1:
      raise ValueError(f"the template {template!r} has to have one {SLOT}, for the secret")
    if len(set(self.alphabet)) != len(self.alphabet) or len(self.alphabet) < 2:
      raise ValueError(
        f"the alphabet {alphabet!r} has to have two characters or more, each of them once"
      )
    longest = int(math.log(MOST_SECRETS) / math.log(len(self.alphabet)) + 1e-9)
    if not 1 <= self.length <= longest:
      raise ValueError(
        f"secrets of {self.length:,} characters: an exact rank takes a score of every secret, and "
        f"at most {MOST_SECRETS:,} are scored; give 1 to {longest}"
      )

  def __len__(self) -> int:
    return len(self.alphabet) ** self.length

  def text(self, number: int) -> str:
    """The canary with the secret of this number."""
    secret = ""
    for _ in range(self.length):
      number, digit = divmod(number, len(self.alphabet))
      secret = self.alphabet[digit] + secret
    return self.template.replace(SLOT, secret)

  def check(self, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless the tokenizer gives back each character of the canaries."""
    for character in dict.fromkeys(self.alphabet):
      text = self.template.replace(SLOT, character)
      try:
        read_back = repr(tokenizer.decode(tokenizer.encode(text))[:80])
      except ValueError as error:
        read_back = str(error)[:150]
      if read_back != repr(text[:80]):
        raise ValueError(
          f"the tokenizer cannot hold the canary {text[:80]!r}: it reads {read_back}; choose "
          f"another template or alphabet"
        )


def draw_secrets(
  space: CanarySpace, repeats: Sequence[int], each: int, seed: int
) -> dict[int, int]:
  """Draws `each` secrets for each number of repeats, all different: the repeats by the secret.

  Those of 0 repeats are never trained on. The same seed gives the same secrets. Raises ValueError
  if the space has too few.
  """
  n = each * len(repeats)
  if n > len(space):
    raise ValueError(
      f"{n:,} canaries do not fit a space of {len(space):,}; take longer secrets, or fewer canaries"
    )
  numbers = np.random.default_rng(seed).choice(len(space), n, replace=False).tolist()
  return dict(zip(numbers, np.repeat(repeats, each).tolist(), strict=True))


def plant(
  documents: Sequence[str], space: CanarySpace, secrets: dict[int, int], seed: int
) -> list[str]:
  """The documents with the canaries among them, each as many times as it is repeated.

  Each repeat is a document of its own, at a place that the seed draws. A long text may be planted
  by its lines.
  """
  planted = [number for number, repeats in secrets.items() for _ in range(repeats)]
  # Independent of what draw_secrets draws by the same seed.
  rng = np.random.default_rng([seed, 1])
  before = rng.integers(0, len(documents) + 1, len(planted))

  # A random order of those at one place, too.
  result = []
  order = np.lexsort((rng.permutation(len(planted)), before)).tolist()
  begin = 0
  for i in order:
    result += documents[begin : before[i]]
    result.append(space.text(planted[i]))
    begin = before[i]
  return [*result, *documents[begin:]]


def score_space(scorer: Scorer, space: CanarySpace) -> np.ndarray:
  """-log p of each canary of the space after its first token, in nats, by its secret's number.

  Raises ValueError for a tokenizer that cannot hold the canaries, and for a template that is too
  long, or begins with the secret.
  """
  space.check(scorer.tokenizer)
  n_ctx = scorer.model.config.n_ctx
  siblings = _siblings(scorer.tokenizer, space, n_ctx)
  at_once = max(1, SECRETS_AT_ONCE // siblings) * siblings
  parts = []
  for begin in progress(range(0, len(space), at_once), f"scoring {len(space):,} canaries"):
    # 1. Neighbours are a context and what follows it; the contexts are scored by themselves.
    contexts, pairs = [], []
    for first in range(begin, min(begin + at_once, len(space)), siblings):
      context, tails = _split(scorer.tokenizer, space, first, siblings)
      longest = len(context) + max(map(len, tails))
      if longest > n_ctx + 1:
        raise ValueError(
          f"a canary of {longest:,} tokens exceeds the model's context of {n_ctx:,}; shorten the "
          f"template"
        )
      contexts.append(context)
      pairs += [(context, tail) for tail in tails]
    heads = [(context[:1], context[1:]) for context in contexts if context[1:]]

    # 2. Score both, and add them up.
    answers = scorer.loglikelihoods(pairs + heads)
    nats = np.array([answer.nats for answer in answers])
    head_nats = np.zeros(len(contexts))
    head_nats[[len(context) > 1 for context in contexts]] = nats[len(pairs) :]
    parts.append(nats[: len(pairs)] + np.repeat(head_nats, siblings))
  return np.concatenate(parts)


def _siblings(tokenizer: Tokenizer, space: CanarySpace, n_ctx: int) -> int:
  """How many neighbours share the row of their context: a power of the alphabet's size."""
  n = len(space.alphabet)
  while n * len(space.alphabet) <= len(space):
    context, tails = _split(tokenizer, space, 0, n * len(space.alphabet))
    if len(context) + sum(map(len, tails)) > n_ctx:
      break
    n *= len(space.alphabet)
  return n


def _split(
  tokenizer: Tokenizer, space: CanarySpace, first: int, n: int
) -> tuple[list[int], list[list[int]]]:
  """The tokens that n canaries begin with, and those of each after them."""
  tokens = tokenizer.encode_batch([space.text(number) for number in range(first, first + n)])
  shared = os.path.commonprefix(tokens)
  if not shared or shared[0] != tokenizer.encode(space.text(0))[0]:
    raise ValueError(
      f"canaries of {space.template[:80]!r} begin with different tokens: nothing predicts those; "
      f"put more text before {SLOT}"
    )
  return shared, [ids[len(shared) :] for ids in tokens]


def exposure(nats_R: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
  """The exposure of secrets, in bits, by the -log p of the whole space; ties share their mean rank.

  Raises ValueError where a -log p is not finite.
  """
  if not np.isfinite(nats_R).all():
    raise ValueError("the -log p of some canaries is not finite, so that they have no rank")
  sorted_R = np.sort(nats_R)
  nats_N = nats_R[np.asarray(numbers, np.int64)]
  low_N = np.searchsorted(sorted_R, nats_N, "left")
  high_N = np.searchsorted(sorted_R, nats_N, "right")
  return np.log2(len(nats_R)) - np.log2((low_N + 1 + high_N) / 2)


def mean_exposure(bits_N: np.ndarray, seed: int = 0) -> Interval:
  """The mean exposure of some canaries, and its bootstrap interval over them."""
  items = {"exposure": bits_N, "items": np.ones(len(bits_N))}
  return intervals({"exposure": mean("exposure", unit="bits")}, items, seed=seed)["exposure"]
