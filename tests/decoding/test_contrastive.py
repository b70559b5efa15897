# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.decoding import Completion, for_inference
from gpt2_jax.decoding.contrastive import contrastive_search
from gpt2_jax.model import ModelConfig

TINY = ModelConfig(n_vocab=97, n_ctx=96, n_embd=16, n_head=4, n_layer=2, dtype="float32")
N_NEW = 12
LENGTHS = (1, 7, 30, 64, 84)  # 84 + 12 fills the context


@pytest.fixture(scope="module")
def prompts(tokens):
  return [
    row[:length].tolist() for row, length in zip(tokens(len(LENGTHS), 96, 97), LENGTHS, strict=True)
  ]


@pytest.fixture(scope="module")
def weights(parameters):
  """Sharp attention, loud positions, small biases and no token that is likely everywhere: what
  comes next depends on all that came before."""
  arrays = parameters(TINY, scale=0.5)
  scales = {
    "h.attn.c_attn.w": 4,
    "wpe": 4,
    "wte": 2 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True),
  }
  scales |= {name: 0.3 for name in arrays if name.endswith(".b")} | {"ln_f.b": 0}
  return {name: array * scales.get(name, 1) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def decoder(mesh, weights, place):
  with mesh(1, 1, 1):
    return for_inference(place(TINY, weights))


@pytest.fixture(scope="module")
def forward(mesh, weights, place):
  """forward(tokens): probabilities and outputs of ln_f at every position of a list of tokens,
  float64."""
  with mesh(1, 1, 1):
    model = place(TINY, weights)

  @jax.jit
  def both(model, tokens_BT):
    x_BTD = model.hidden(model.embed(tokens_BT))[0]
    return jax.nn.softmax(model.head(x_BTD)[..., : TINY.n_vocab]), x_BTD

  def forward(tokens):
    with mesh(1, 1, 1):
      found = both(model, jnp.asarray([tokens + [0] * (TINY.n_ctx - len(tokens))], jnp.int32))
    return [np.array(x[0, : len(tokens)], np.float64) for x in found]

  return forward


def by_the_formula(forward, prompt, k, alpha):
  """Equation 5 of the paper, each candidate with a forward pass over all that came before."""
  tokens = list(prompt)
  for _ in range(N_NEW):
    p_V, scores = forward(tokens)[0][-1], {}
    for v in np.argsort(-p_V)[:k].tolist():
      *h_TD, h_D = forward([*tokens, v])[1]
      cosines = [h_D @ other_D / np.sqrt((h_D @ h_D) * (other_D @ other_D)) for other_D in h_TD]
      scores[v] = (1 - alpha) * p_V[v] - alpha * max(cosines)
    tokens.append(max(scores, key=scores.get))
  return Completion(tokens[len(prompt) :])


@pytest.fixture(scope="module")
def expected(forward, prompts):
  return [by_the_formula(forward, prompt, 4, 0.6) for prompt in prompts]


@pytest.fixture(scope="module")
def greedy(forward, prompts):
  return [by_the_formula(forward, prompt, 1, 0.0) for prompt in prompts]


def test_it_is_the_formula(decoder, prompts, expected, greedy):
  assert contrastive_search(decoder, prompts, N_NEW) == expected
  assert all(a != b for a, b in zip(expected, greedy, strict=True))
  assert len({token for row in expected for token in row.tokens}) > 20


@pytest.mark.parametrize("k, alpha", [(2, 0.1), (2, 1.0), (7, 0.6)])
def test_k_and_alpha_are_the_formula(k, alpha, decoder, forward, prompts, expected):
  found = contrastive_search(decoder, prompts[:3], N_NEW, k, alpha)
  assert (
    found == [by_the_formula(forward, prompt, k, alpha) for prompt in prompts[:3]] != expected[:3]
  )


@pytest.mark.parametrize("k, alpha", [(1, 0.6), (4, 0.0)])
def test_one_candidate_or_no_penalty_is_greedy(k, alpha, decoder, prompts, greedy):
  assert contrastive_search(decoder, prompts, N_NEW, k, alpha) == greedy


def test_a_prompt_alone_is_continued_as_in_company(decoder, prompts, expected):
  for prompt, row in zip(prompts, expected, strict=True):
    assert contrastive_search(decoder, [prompt], N_NEW) == [row]


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_every_mesh_finds_the_same(sizes, mesh, weights, place, prompts, expected):
  """Also 5 prompts on 4 rows of devices, and without a mesh in force."""
  with mesh(*sizes):
    model = place(TINY, weights)
  assert contrastive_search(model, prompts, N_NEW) == expected


def test_eot_ends_its_row_and_is_left_out(decoder, prompts, expected):
  rows = [row.tokens for row in expected]
  for eot in (rows[2][5], rows[0][0], rows[3][-1]):
    ended = [
      Completion(row[: row.index(eot)], finished=True) if eot in row else Completion(row)
      for row in rows
    ]
    assert contrastive_search(decoder, prompts, N_NEW, eot=eot) == ended != expected


def test_what_cannot_be_searched_is_refused(decoder):
  for kind, rule in (
    ({"k": 0}, r"k of 0 is not in \[1, 97\]"),
    ({"k": 98}, r"k of 98 is not in \[1, 97\]"),
    ({"alpha": -0.1}, r"alpha of -0.1 is not in \[0, 1\]"),
    ({"alpha": float("nan")}, r"alpha of nan is not in \[0, 1\]"),
  ):
    with pytest.raises(ValueError, match=rule):
      contrastive_search(decoder, [[1]], 3, **kind)
  with pytest.raises(ValueError, match="90 prompt and 7 new tokens exceed the context of 96"):
    contrastive_search(decoder, [[1], [1] * 90], 7)
  for prompts, n_new in (([], 3), ([[]], 3), ([[1], []], 3), ([[1]], 0)):
    with pytest.raises(ValueError, match="no empty prompt"):
      contrastive_search(decoder, prompts, n_new)
