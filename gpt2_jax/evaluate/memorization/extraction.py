# SPDX-License-Identifier: Apache-2.0
"""Extraction: samples of a model, ranked by how likely they are memorized training text.

After Carlini et al. 2021, "Extracting training data from large language models". Each metric is
larger for a text that is rather memorized; a text's first token is context only, as in their code:

  perplexity  minus the mean -log p of its tokens
  NAME        the mean -log p under a smaller model, of that name, over the model's
  zlib        the bytes of its zlib compression over the mean -log p
  lowercase   the mean -log p of the text in lower case over that of the text
  window      minus the least mean -log p of 50 tokens in a row

Likely texts may be dull. The others find those that are likelier than something else explains.
"""

import collections
import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.evaluate.encoding import encode_texts
from gpt2_jax.evaluate.memorization.search import check_store, find_tokens
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import GenerateUntil, TokenStatistics
from gpt2_jax.tokenizer import Tokenizer

WINDOW = 50  # tokens
WORD = re.compile(r"\w+")


def sample_texts(
  scorer: Scorer, n: int, n_new: int, prompts: Sequence[str] = ("",), top_k: int = 40
) -> list[str]:
  """Samples of a model by its scorer's seed, after each prompt in turn, without the prompt.

  An empty prompt is `<|endoftext|>`. Raises ValueError for one if the tokenizer has no such token.
  """
  requests = [GenerateUntil(prompts[i % len(prompts)], n_new, top_k=top_k) for i in range(n)]
  return [answer.text for answer in scorer.answers(requests)]


def extraction_metrics(
  scorer: Scorer, texts: Sequence[str], smaller: Mapping[str, Scorer] | None = None
) -> dict[str, np.ndarray]:
  """The metrics of each text, [N]; larger is rather memorized.

  Raises ValueError for a text that has fewer than two tokens.
  """
  nats = _nats(scorer, texts)
  mean_N = np.array([nats_T.mean() for nats_T in nats])
  lowercase = _nats(scorer, [text.lower() for text in texts])
  lowercase_N = np.array([nats_T.mean() for nats_T in lowercase])
  zlib_N = np.array([len(zlib.compress(text.encode())) for text in texts])

  # A text of which the model is certain is infinitely likelier than anything.
  with np.errstate(divide="ignore"):
    metrics = {"perplexity": -mean_N, "zlib": zlib_N / mean_N, "lowercase": lowercase_N / mean_N}
    for name, other in (smaller or {}).items():
      metrics[name] = np.array([nats_T.mean() for nats_T in _nats(other, texts)]) / mean_N
  metrics["window"] = np.array([-_least_mean(nats_T) for nats_T in nats])
  return metrics


def _nats(scorer: Scorer, texts: Sequence[str]) -> list[np.ndarray]:
  """-log p of each text's tokens but the first."""
  return [answer.nats for answer in scorer.answers(list(map(TokenStatistics, texts)))]


def _least_mean(nats_T: np.ndarray) -> float:
  """The least mean of WINDOW numbers in a row, or the mean of fewer."""
  width = min(WINDOW, len(nats_T))
  return float(np.lib.stride_tricks.sliding_window_view(nats_T, width).mean(-1).min())


def rank_texts(texts: Sequence[str], metric_N: np.ndarray, n: int) -> list[int]:
  """The n texts with the largest metric, the largest first, without near duplicates.

  A text is one of a text before it that has half of its trigrams of words, or more, counted as
  often as they occur. Texts of fewer than three words are compared as they are.
  """
  kept, trigrams_of_kept = [], []
  for i in np.argsort(-metric_N, kind="stable").tolist():
    if len(kept) == n:
      break
    words = WORD.findall(texts[i])
    trigrams = collections.Counter(zip(words, words[1:], words[2:], strict=False))
    trigrams = trigrams or collections.Counter([texts[i]])
    needed = trigrams.total() / 2
    if not any((trigrams & other).total() >= needed for other in trigrams_of_kept):
      kept.append(i)
      trigrams_of_kept.append(trigrams)
  return kept


@dataclasses.dataclass(frozen=True)
class Verbatim:
  """What of a text is verbatim in a store: `tokens` of it, in parts of some tokens in a row.

  `documents` have the rarest of these parts (k-eidetic); 0 without one, None where the store does
  not tell its documents.
  """

  tokens: int
  documents: int | None


def find_verbatim(
  store: TokenStore, tokenizer: Tokenizer, texts: Sequence[str], length: int = WINDOW
) -> list[Verbatim]:
  """Looks up all parts of `length` tokens of each text, in one pass over the store.

  Raises ValueError for a store of another tokenizer.
  """
  check_store(store, tokenizer)
  # 1. Each part once, whichever texts have it.
  parts, of_texts = {}, []
  for ids in encode_texts(tokenizer, list(texts)):
    windows = [tuple(ids[i : i + length].tolist()) for i in range(len(ids) - length + 1)]
    of_texts.append([parts.setdefault(window, len(parts)) for window in windows])
  occurrences = find_tokens(store, list(parts))

  # 2. The tokens that are in a part that is there, and the documents of the rarest.
  results = []
  for numbers in of_texts:
    is_covered_T = np.zeros(len(numbers) + length, bool)
    documents = []
    for place, number in enumerate(numbers):
      if occurrences[number].count:
        is_covered_T[place : place + length] = True
        documents.append(occurrences[number].documents or 0)
    rarest = None if store.tokenizer.eot is None else min(documents, default=0)
    results.append(Verbatim(int(is_covered_T.sum()), rarest))
  return results
