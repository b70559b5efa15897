# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gpt2_jax.decoding import Completion, for_inference
from gpt2_jax.decoding.beam import beam_search
from gpt2_jax.model import ModelConfig
from tests.test_model import reference

TINY = ModelConfig(n_vocab=97, n_ctx=96, n_embd=16, n_head=4, n_layer=2, dtype="float32")
N_NEW = 12
LENGTHS = (1, 7, 30, 64, 84)  # 84 + 12 fills the context
EOT = 61  # ends about half of what the searches below find
RULES = (
  (1.0, False),
  (1.0, True),
  (1.0, "never"),
  (0.0, "never"),
  (0.0, True),
  (2.0, False),
  (2.0, "never"),
)
RULES += ((-1.0, False),)  # length_penalty, early_stopping


@pytest.fixture(scope="module")
def prompts(tokens):
  return [
    row[:length].tolist() for row, length in zip(tokens(len(LENGTHS), 96, 97), LENGTHS, strict=True)
  ]


@pytest.fixture(scope="module")
def weights(parameters):
  """Sharp attention, loud positions, small biases and no token that is likely everywhere: what
  comes next depends on all that came before, and no two continuations tie."""
  arrays = parameters(TINY, scale=0.5)
  scales = {
    "h.attn.c_attn.w": 4,
    "wpe": 4,
    "wte": 4 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True),
  }
  scales |= {name: 0.3 for name in arrays if name.endswith(".b")} | {"ln_f.b": 0}
  return {name: array * scales.get(name, 1) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def decoder(mesh, weights, place):
  with mesh(1, 1, 1):
    return for_inference(place(TINY, weights))


@pytest.fixture(scope="module")
def theirs(weights):
  """transformers' model with the same weights."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  sizes = {
    "n_embd": TINY.n_embd,
    "n_layer": TINY.n_layer,
    "n_head": TINY.n_head,
    "n_positions": TINY.n_ctx,
  }
  ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
  model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=TINY.n_vocab, **sizes, **ends)
  ).eval()

  def of_kinds(x):  # q, k, v of each head -> q of all heads, k, v
    return x.reshape(*x.shape[:-1], TINY.n_head, 3, -1).swapaxes(-3, -2).reshape(x.shape)

  for name, parameter in model.transformer.named_parameters():
    parts = name.split(".")
    ours = ".".join(part for part in parts if part not in ("weight", "bias") and not part.isdigit())
    kind = (
      ""
      if ours in ("wte", "wpe")
      else ".b"
      if parts[-1] == "bias"
      else ".g"
      if "ln_" in ours
      else ".w"
    )
    array = weights[ours + kind]
    array = array[int(parts[1])] if parts[0] == "h" else array
    parameter.data = torch.from_numpy(of_kinds(array) if "c_attn" in parts else array).float()
  return model


def their_search(model, prompts, beams, length_penalty, early_stopping, eot, n_new=N_NEW):
  """All hypotheses of a batch that is padded on the left, as ours are given."""
  torch = pytest.importorskip("torch")
  size = max(map(len, prompts))
  mask = torch.tensor([[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts])
  kind = {"length_penalty": length_penalty, "early_stopping": early_stopping} if beams > 1 else {}
  found = model.generate(
    torch.tensor([[0] * (size - len(prompt)) + prompt for prompt in prompts]),
    attention_mask=mask,
    max_new_tokens=n_new,
    num_beams=beams,
    num_return_sequences=beams,
    do_sample=False,
    eos_token_id=eot,
    pad_token_id=96,
    output_scores=True,
    return_dict_in_generate=True,
    **kind,
  )
  rows = [
    row[: row.index(eot) + 1] if eot in row else row for row in found.sequences[:, size:].tolist()
  ]
  if beams > 1:
    scores = found.sequences_scores.tolist()
  else:  # greedy decoding, which has none
    log_p = [step.log_softmax(-1) for step in found.scores]
    scores = [
      sum(log_p[n][b, token].item() for n, token in enumerate(row)) / len(row) ** length_penalty
      for b, row in enumerate(rows)
    ]
  hypotheses = [
    Completion([t for t in row if t != eot], score=score, finished=eot in row)
    for row, score in zip(rows, scores, strict=True)
  ]
  return [hypotheses[i : i + beams] for i in range(0, len(rows), beams)]


def compare(found, expected):
  """The same tokens and ends; scores to 2e-5, a few roundings of twelve float32 log-probabilities
  behind sharp attention."""
  assert [[h.tokens for h in row] for row in found] == [[h.tokens for h in row] for row in expected]
  assert [[h.finished for h in row] for row in found] == [
    [h.finished for h in row] for row in expected
  ]
  for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
    assert ours.score == pytest.approx(theirs.score, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("beams", [1, 2, 3, 4, 5])
def test_every_hypothesis_is_transformers(beams, decoder, theirs, prompts):
  """Under every rule, with and without an end."""
  seen = set()
  for length_penalty, early_stopping in RULES:
    found = beam_search(
      decoder, prompts, N_NEW, beams, length_penalty, EOT, early_stopping, returned=beams
    )
    compare(found, their_search(theirs, prompts, beams, length_penalty, early_stopping, EOT))
    seen.add(tuple(tuple(h.tokens) for row in found for h in row))
  assert len({len(row) for case in seen for row in case}) > 2, "hypotheses end at several lengths"
  assert len(seen) == 1 if beams == 1 else len(seen) > 2, "the rules matter"
  found = beam_search(decoder, prompts, N_NEW, beams)
  assert all(len(h.tokens) == N_NEW for row in found for h in row)
  compare(found, [row[:1] for row in their_search(theirs, prompts, beams, 1.0, False, None)])


@pytest.mark.parametrize("length, n_new", [(96, 1), (93, 4)])
def test_a_context_filled_to_the_last_token_is_searched(length, n_new, decoder, theirs, tokens):
  """The last new token is never read, so it may lie behind the context, as with transformers."""
  [prompt] = tokens(1, 96, 97)[:, :length].tolist()
  for beams in (1, 4):
    found = beam_search(decoder, [prompt], n_new, beams, returned=beams)
    compare(found, their_search(theirs, [prompt], beams, 1.0, False, None, n_new))


def test_a_prompt_alone_is_continued_as_in_company(decoder, theirs, prompts):
  together = beam_search(decoder, prompts, N_NEW, 3, eot=EOT, returned=2)
  for prompt, expected in zip(prompts, together, strict=True):
    compare(beam_search(decoder, [prompt], N_NEW, 3, eot=EOT, returned=2), [expected])
    compare([expected], [their_search(theirs, [prompt], 3, 1.0, False, EOT)[0][:2]])


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_every_mesh_finds_the_same(sizes, mesh, weights, place, decoder, prompts):
  """Also 5 prompts on 4 rows of devices, and without a mesh in force."""
  with mesh(*sizes):
    model = place(TINY, weights)
  expected = beam_search(decoder, prompts, N_NEW, 3, eot=EOT, early_stopping="never", returned=3)
  compare(
    beam_search(model, prompts, N_NEW, 3, eot=EOT, early_stopping="never", returned=3), expected
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_is_the_log_probability_of_the_full_forward_pass(
  dtype, mesh, weights, place, prompts
):
  """Over the number of tokens, `eot` among them. In float32, of the forward pass in float64: one in
  float32 is off by as much as the search, up to 2e-5 behind attention this sharp, and their errors
  add up. bfloat16 rounds activations to 1 in 256; a score feels a few of those."""
  exact = {name: array.astype(np.float32).astype(np.float64) for name, array in weights.items()}
  with mesh(1, 1, 1):
    model = place(dataclasses.replace(TINY, dtype=dtype), weights)
    found = beam_search(model, prompts, N_NEW, 3, eot=EOT, returned=3)
    forward = jax.jit(lambda model, tokens_BT: model(tokens_BT))

    for prompt, row in zip(prompts, found, strict=True):
      for hypothesis in row:
        new = hypothesis.tokens + [EOT] * hypothesis.finished
        tokens_BT = np.zeros((1, TINY.n_ctx), np.int32)
        tokens_BT[0, : len(prompt + new)] = prompt + new
        if dtype == "float32":
          logits_TV = reference(TINY, exact, tokens_BT)[0]
        else:
          logits_TV = np.array(forward(model, tokens_BT))[0, :, : TINY.n_vocab]

        predicted = np.arange(len(new)) + len(prompt) - 1
        log_p_T = logits_TV[predicted, new] - np.logaddexp.reduce(logits_TV[predicted], axis=1)
        bound = 2e-5 if dtype == "float32" else 0.05
        assert hypothesis.score == pytest.approx(log_p_T.mean(), rel=bound)


def test_one_new_token_is_the_likeliest(mesh, weights, place, decoder, prompts):
  """Not a step is decoded; ends and all."""
  with mesh(1, 1, 1):
    logits_V = np.array(
      jax.nn.log_softmax(place(TINY, weights)(np.array(prompts[1:2], np.int32))[0, -1])
    )
  order = np.argsort(-logits_V)[:4]
  for eot in (None, int(order[2])):
    found = beam_search(decoder, prompts[1:2], 1, 4, eot=eot, returned=4)[0]
    assert [h.tokens for h in found] == [[] if token == eot else [token] for token in order]
    np.testing.assert_allclose([h.score for h in found], logits_V[order], rtol=2e-5)


def test_what_cannot_be_searched_is_refused(decoder):
  for kind, rule in (
    ({"beams": 0}, "1 returned of 0 beams"),
    ({"beams": 3, "returned": 4}, "no more returned than beams"),
    ({"returned": 0}, "0 returned of 4 beams"),
    ({"beams": 49}, "49 beams over 97 tokens"),
    ({"early_stopping": "soon"}, "early_stopping is 'soon'; it is one of True, False, 'never'"),
    ({"length_penalty": float("nan")}, "a length_penalty of nan is not a finite number"),
  ):
    with pytest.raises(ValueError, match=rule):
      beam_search(decoder, [[1]], 3, **kind)
  with pytest.raises(ValueError, match="90 prompt and 8 new tokens exceed the context of 96"):
    beam_search(decoder, [[1], [1] * 90], 8)
  for prompts, n_new in (([], 3), ([[]], 3), ([[1], []], 3), ([[1]], 0)):
    with pytest.raises(ValueError, match="no empty prompt"):
      beam_search(decoder, prompts, n_new)
