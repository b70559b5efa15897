# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from gpt2_jax.decoding import (
  Completion,
  Greedy,
  PresencePenalty,
  Sample,
  Temperature,
  TopK,
  generate,
)
from gpt2_jax.decoding.speculative import Speculation, speculative
from gpt2_jax.model import ModelConfig

TARGET = ModelConfig(n_vocab=97, n_ctx=96, n_embd=16, n_head=4, n_layer=3, dtype="float32")
OTHER = dataclasses.replace(TARGET, n_ctx=100, n_embd=24, n_head=2, n_layer=1)
N_NEW = 12
LENGTHS = (1, 7, 30, 63, 64, 65, 84)  # 84 + 12 fills the context


def tokens_of(rows: list[Completion]) -> list[list[int]]:
  return [row.tokens for row in rows]


def sharp(arrays):
  """Sharp attention, loud positions, small biases and no token that is likely everywhere: what
  comes next depends on all that came before."""
  scales = {
    "h.attn.c_attn.w": 4,
    "wpe": 4,
    "wte": 4 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True),
  }
  scales |= {name: 0.3 for name in arrays if name.endswith(".b")} | {"ln_f.b": 0}
  return {name: array * scales.get(name, 1) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def prompts(tokens):
  return [
    row[:length].tolist() for row, length in zip(tokens(len(LENGTHS), 96, 97), LENGTHS, strict=True)
  ]


@pytest.fixture(scope="module")
def models(parameters):
  """Config and weights of the target, of a stranger in another shape, and of a neighbour of the
  target."""
  weights, rng = sharp(parameters(TARGET, scale=0.5)), np.random.default_rng(0)
  near = {
    name: array + 0.02 * array.std() * rng.normal(size=array.shape)
    for name, array in weights.items()
  }
  return {
    "target": (TARGET, weights),
    "stranger": (OTHER, sharp(parameters(OTHER, scale=0.5, seed=1))),
    "neighbour": (TARGET, near),
  }


@pytest.fixture(scope="module")
def greedy(mesh, models, place, prompts):
  """What the target says, by a full forward pass a token."""
  tokens_BT = np.zeros((len(prompts), TARGET.n_ctx), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt)] = prompt
  rows, lengths = np.arange(len(prompts)), np.array(LENGTHS)
  with mesh(1, 1, 1):
    model, forward = place(*models["target"]), jax.jit(lambda model, tokens: model(tokens))
    for n in range(N_NEW):
      tokens_BT[rows, lengths + n] = np.array(forward(model, tokens_BT))[
        rows, lengths + n - 1
      ].argmax(-1)
  found = [tokens_BT[row, length : length + N_NEW].tolist() for row, length in enumerate(LENGTHS)]
  assert len({token for row in found for token in row}) > 20  # not one token over and over
  return found


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("draft", ["stranger", "neighbour", "target"])
def test_greedy_is_the_targets_own(draft, n, mesh, models, place, prompts, greedy):
  """Whatever the draft says; it decides only how many of its tokens stand."""
  with mesh(1, 1, 1):
    found = speculative(place(*models["target"]), place(*models[draft]), prompts, N_NEW, n)
  assert found.completions == list(map(Completion, greedy))
  assert found.acceptance == found.accepted / found.proposed
  if draft == "target":
    assert found.acceptance == 1 and found.passes == 1 + -(-(N_NEW - 1) // (n + 1))
  else:
    assert found.acceptance < 0.1 if draft == "stranger" else 0.3 < found.acceptance < 0.95


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_every_mesh_says_and_counts_the_same(sizes, mesh, models, place, prompts, greedy):
  """Also 7 prompts on 4 rows of devices, with a mesh in force that is not the models'."""
  both = []
  for mesh_sizes in ((1, 1, 1), sizes):
    with mesh(*mesh_sizes):
      pair = place(*models["target"]), place(*models["neighbour"])
    both.append(speculative(*pair, prompts, N_NEW, 2))
  assert both[0] == both[1] and tokens_of(both[0].completions) == greedy


def test_counts_are_those_of_a_draft_without_a_cache(mesh, models, place, prompts):
  """The rounds again, with a draft that reads the whole text anew for each proposal: a draft that
  saw rejected tokens, or missed accepted ones, would have others of its tokens accepted."""
  n, prompts, proposed, accepted, longest = (
    3,
    prompts[:-1],
    0,
    0,
    0,
  )  # the last leaves no room for n more tokens
  with mesh(1, 1, 1):
    target, draft = place(*models["target"]), place(*models["neighbour"])
    said = tokens_of(generate(target, prompts, N_NEW + n))
    texts = [
      prompt + new[:c] for prompt, new in zip(prompts, said, strict=True) for c in range(1, N_NEW)
    ]
    proposals = iter(tokens_of(generate(draft, texts, n)))
    found = speculative(target, draft, prompts, N_NEW, n)
  for new in said:
    proposal_C, c, rounds = [None, *itertools.islice(proposals, N_NEW - 1)], 1, 0
    while c < N_NEW:
      same = [a == b for a, b in zip(proposal_C[c], new[c : c + n], strict=True)]
      stand = [*same, False].index(False)
      rounds, accepted, c = rounds + 1, accepted + stand, c + stand + 1
    proposed, longest = proposed + n * rounds, max(longest, rounds)
  rows = [Completion(new[:N_NEW]) for new in said]
  assert found == Speculation(rows, proposed, accepted, 1 + longest)
  assert 0.3 < found.acceptance < 0.95


def test_a_prompt_alone_is_continued_as_in_company(mesh, models, place, prompts):
  """Draws depend on the seed and the row's number, and not on the mesh."""
  sampler = Sample((Temperature(2.0), TopK(20)))
  with mesh(1, 1, 1):
    sample = functools.partial(
      speculative, place(*models["target"]), place(*models["neighbour"]), n_new=N_NEW
    )
    one, same, other = (sample(prompts, sampler=sampler, seed=seed) for seed in (0, 0, 1))
    assert sample(prompts[:1], sampler=sampler).completions == one.completions[:1]
    twins = sample([prompts[1]] * 7, sampler=sampler).completions
  assert one == same
  assert all(a != b for a, b in zip(one.completions, other.completions, strict=True))
  assert len({tuple(row.tokens) for row in twins}) == 7 and twins[1] == one.completions[1]
  with mesh(1, 4, 2):
    pair = place(*models["target"]), place(*models["neighbour"])
    assert speculative(*pair, prompts, N_NEW, sampler=sampler) == one


def test_eot_ends_its_row_and_is_left_out(mesh, models, place, prompts, greedy):
  def until(row, eot):
    return Completion(row[: row.index(eot)], finished=True) if eot in row else Completion(row)

  with mesh(1, 1, 1):
    target = place(*models["target"])
    for draft in (target, place(*models["neighbour"])):
      for eot in (greedy[2][5], greedy[0][0], greedy[3][-1]):
        expected = [until(row, eot) for row in greedy]
        assert any(row.finished for row in expected)
        assert speculative(target, draft, prompts, N_NEW, 5, eot=eot).completions == expected
    assert speculative(target, target, [prompts[0]], N_NEW, 5, eot=greedy[0][0]) == Speculation(
      [Completion([], finished=True)], 0, 0, 1
    )
    early = speculative(target, target, [prompts[2]], N_NEW, 5, eot=greedy[2][5])
  assert early[1:] == (5, 5, 2)  # the token of the prompt's pass, then a pass with six more


SMALL = ModelConfig(n_vocab=7, n_ctx=32, n_embd=16, n_head=4, n_layer=2, dtype="float32")
PROMPT, ROWS, N_JOINT = [3, 1], 8192, 3


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def no_filter(logits, new):
  return logits


def cool_top_3(logits, new):
  logits = logits / 0.7
  return np.where(logits < np.sort(logits)[-3], -np.inf, logits)


def once_is_enough(logits, new):
  return logits - 2.0 * np.isin(np.arange(7), new)


SAMPLERS = {
  no_filter: Sample(),
  cool_top_3: Sample((Temperature(0.7), TopK(3))),
  once_is_enough: Sample((PresencePenalty(2.0),)),
}


def joint(model, by_formula):
  """The probability of every continuation of PROMPT by N_JOINT tokens, from the full forward pass
  and NumPy."""
  texts = list(itertools.product(range(7), repeat=N_JOINT))
  logits_BTV = np.array(
    jax.jit(lambda model, tokens: model(tokens))(model, np.array([[*PROMPT, *t] for t in texts]))
  )
  logits_BTV = logits_BTV[:, len(PROMPT) - 1 : -1, :7].astype(np.float64)
  return np.array(
    [
      np.prod([softmax(by_formula(logits_TV[n], text[:n]))[text[n]] for n in range(N_JOINT)])
      for text, logits_TV in zip(texts, logits_BTV, strict=True)
    ]
  )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("by_formula", SAMPLERS, ids=lambda f: f.__name__)
def test_draws_follow_the_targets_distribution(by_formula, n, mesh, parameters, place):
  """Chi-square of the first three tokens together, over all 343, with a draft that thinks
  otherwise."""
  with mesh(1, 1, 1):
    target, draft = (place(SMALL, parameters(SMALL, scale=0.35, seed=seed)) for seed in (1, 5))
    p, q = (joint(model, by_formula) for model in (target, draft))
    found = speculative(target, draft, [PROMPT] * ROWS, N_JOINT, n, SAMPLERS[by_formula])
  assert np.isclose(p.sum(), 1) and np.abs(p - q).sum() / 2 > 0.4 and 0.2 < found.acceptance < 0.8
  counts = np.bincount(np.array(tokens_of(found.completions)) @ [49, 7, 1], minlength=343)
  assert not counts[p == 0].any()
  rare = ROWS * p < 5  # counted together
  counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, ROWS * p))
  kept = expected > 0
  chi2, freedom = ((counts - expected)[kept] ** 2 / expected[kept]).sum(), kept.sum() - 1
  assert freedom > 10
  assert chi2 < freedom + 4 * np.sqrt(
    2 * freedom
  )  # four standard deviations, and the draws are seeded


def test_a_draft_that_is_the_target_is_always_believed(mesh, parameters, place):
  """p / q is 1 but for rounding, at each of some 10,000 proposals."""
  with mesh(1, 1, 1):
    target = place(SMALL, parameters(SMALL, scale=0.35))
    found = speculative(target, target, [PROMPT] * 512, 16, 4, Sample((Temperature(1.5),)))
  assert found.acceptance > 0.999 and found.passes <= 6


def test_greedy_takes_filters(mesh, models, place, prompts):
  sampler = Greedy((PresencePenalty(5.0),))
  with mesh(1, 1, 1):
    target, draft = place(*models["target"]), place(*models["neighbour"])
    expected = generate(target, prompts, N_NEW, sampler)
    assert speculative(target, draft, prompts, N_NEW, 5, sampler).completions == expected
    plain = generate(target, prompts, N_NEW)
  assert plain != expected


def test_what_cannot_be_is_refused(mesh, models, parameters, place):
  def other(**changes):
    config = dataclasses.replace(OTHER, **changes)
    return place(config, parameters(config))

  with mesh(1, 1, 2):
    elsewhere = place(*models["stranger"])
  with mesh(1, 1, 1):
    target, draft = place(*models["target"]), place(*models["stranger"])
    refused = functools.partial(pytest.raises, ValueError)
    with refused(match="target has 97 tokens and the draft 96"):
      speculative(target, other(n_vocab=96), [[1]], 3)
    with refused(match="put both on one mesh"):
      speculative(target, elsewhere, [[1]], 3)
    with refused(match="0 draft tokens: propose 1 or more"):
      speculative(target, draft, [[1]], 3, 0)
    with refused(match="90 prompt and 8 new tokens exceed the context of 96"):
      speculative(target, draft, [[1], [1] * 90], 8)
    with refused(match="30 prompt and 8 new tokens exceed the context of 36"):
      speculative(target, other(n_ctx=36), [[1] * 30], 8)
    for prompts in ([], [[]]):
      with refused(match="no empty prompt"):
        speculative(target, draft, prompts, 3)
