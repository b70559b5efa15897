# SPDX-License-Identifier: Apache-2.0
import re

import jax
import numpy as np
import pytest

from gpt2_jax.decoding import for_inference, generate
from gpt2_jax.evaluate.generation import _ends, _merged, next_words
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import EOT, HuggingFace, byte_alphabet

PIECES = [*byte_alphabet().values(), "ab", "abc", "\u0120a", EOT]
TINY = ModelConfig(n_vocab=260, n_ctx=32, n_embd=16, n_head=4, n_layer=2, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFace:
  vocab = {piece: i for i, piece in enumerate(PIECES)}
  return HuggingFace.from_merges(vocab, [("a", "b"), ("ab", "c"), ("\u0120", "a")])


@pytest.fixture(scope="module")
def decoder(mesh, parameters, place):
  """Whose likely tokens are letters, so that there are words, and spaces, so that they end."""
  arrays = parameters(TINY, scale=0.5)
  scale_V = np.full((260, 1), 0.5)
  scale_V[[*range(64, 90), *range(256, 259), PIECES.index("\u0120"), PIECES.index(".")]] = 3
  length_V1 = np.linalg.norm(arrays["wte"], axis=1, keepdims=True)
  with mesh(1, 1, 1):
    return for_inference(
      place(TINY, arrays | {"wte": scale_V * arrays["wte"] / length_V1, "wpe": 4 * arrays["wpe"]})
    )


def test_words_are_greedy_completions_of_the_likeliest_tokens(decoder, tokenizer):
  """Each alone, by `generate`, cut with a regular expression."""
  contexts, n = [tokenizer.encode(text) for text in ("ab", "abc abc", "hello")], 6
  found = next_words(decoder, tokenizer, contexts, n, (4, 8))
  sizes = set()
  for context, (words, nats) in zip(contexts, found, strict=True):
    wanted = {}
    for piece in likeliest(decoder, context, n):
      [after] = generate(decoder, [[*context, piece]], 7, eot=259, logprobs=True)
      ids, text = [piece, *after.tokens], ""
      for size in range(1, len(ids) + 1):
        longer = tokenizer.decode([*context, *ids[:size]])[len(tokenizer.decode(context)) :]
        if not re.fullmatch(r"(?s)(\s|[^\w\s]|_)*([^\W_]|\ufffd)*", longer) and size > 1:
          break
        if size > 1 and re.search(r"\s", longer[len(text) :]):
          break
        text, count = longer, size
      sizes.add(count)
      cost = cost_of(decoder, context, piece) - sum(after.logprobs[: count - 1])
      wanted[text.strip()] = min(cost, wanted.get(text.strip(), np.inf))
    assert dict(zip(words, nats, strict=True)) == pytest.approx(wanted, abs=1e-4)
    assert list(nats) == sorted(nats)
  assert len(sizes) > 2, "words of several lengths"


@jax.jit
def _logits(decoder, tokens_BT):
  from gpt2_jax.decoding.kv_cache import logits, prefill

  return logits(decoder, prefill(decoder, tokens_BT, tokens_BT.shape[1])[0])


def log_p(decoder, context) -> np.ndarray:
  with jax.set_mesh(decoder.mesh):
    logits_V = np.asarray(
      _logits(decoder, np.array([context + [0] * (8 - len(context))])), np.float64
    )[0, len(context) - 1]
  return logits_V - np.log(np.exp(logits_V).sum())


def likeliest(decoder, context, n):
  return np.argsort(-log_p(decoder, context))[:n].tolist()


def cost_of(decoder, context, piece):
  return -log_p(decoder, context)[piece]


def test_where_words_end():
  for text, character in (
    ("ab", " "),
    ("ab", "."),
    ("ab", "'"),
    ("", "\n"),
    ('"a', "-"),
    ("7", ","),
    ("(", " "),
  ):
    assert _ends(text, character), (text, character)
  for text, character in (
    ("ab", "c"),
    ("(", "("),
    ('"', "a"),
    ("", "."),
    ("ab", "\ufffd"),
    ("a\ufffd", ""),
    ("a", "7"),
  ):
    assert not _ends(text, character), (text, character)


def test_the_same_word_counts_once_as_its_likeliest():
  class Word:
    def __init__(self, text, nats):
      self.text, self.nats = text, nats

  words = [Word(" the", 2.0), Word("the", 1.5), Word(" a", 0.5), Word("\n", 3.0), Word(" ", 4.0)]
  assert _merged(words) == (("a", "the", ""), (0.5, 1.5, 3.0))
