# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding import (
  Completion,
  Generation,
  Greedy,
  LogitBias,
  MinNewTokens,
  NoRepeatNgram,
  RepetitionPenalty,
  Sample,
  SlidingWindow,
  Temperature,
  TopK,
  TopP,
  for_inference,
  generate,
)
from gpt2_jax.decoding.generate import (
  _advance,
  _start,
  advance,
  check_generation,
  completions,
  start,
)
from gpt2_jax.linear import Dense
from gpt2_jax.model import ModelConfig

TINY = ModelConfig(n_vocab=97, n_ctx=96, n_embd=16, n_head=4, n_layer=2, dtype="float32")
N_NEW = 12
LENGTHS = (1, 7, 30, 63, 64, 65, 84)  # 84 + 12 fills the context


def tokens_of(rows: list[Completion]) -> list[list[int]]:
  return [row.tokens for row in rows]


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
    "wte": 4 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True),
  }
  scales |= {name: 0.3 for name in arrays if name.endswith(".b")} | {"ln_f.b": 0}
  return {name: array * scales.get(name, 1) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def model(mesh, weights, place):
  """On one device. No mesh is in force where it is used: generating brings the model's own."""
  with mesh(1, 1, 1):
    return place(TINY, weights)


@pytest.fixture(scope="module")
def greedy(model, prompts):
  """The continuations of all prompts in one batch, on one device."""
  return tokens_of(generate(model, prompts, N_NEW))


@functools.partial(jax.jit, static_argnames="size")
def _logits(model, tokens_BT, size):
  return model(tokens_BT[:, :size])


def full_logits(model, contexts: list[list[int]]):
  """The next token's logits by the whole forward pass, [B, V]."""
  tokens_BT = np.zeros((len(contexts), model.config.n_ctx), np.int32)
  for row, context in enumerate(contexts):
    tokens_BT[row, : len(context)] = context
  with jax.set_mesh(model.mesh):
    logits_BTV = np.array(_logits(model, tokens_BT, model.config.n_ctx))
  return np.stack([logits_BTV[row, len(context) - 1] for row, context in enumerate(contexts)])[
    :, : model.config.n_vocab
  ]


def test_cached_decoding_is_the_full_forward_pass(model, prompts, greedy):
  texts = [list(prompt) for prompt in prompts]
  for _ in range(N_NEW):
    for text, token in zip(texts, full_logits(model, texts).argmax(-1).tolist(), strict=True):
      text.append(token)
  assert greedy == [text[length:] for text, length in zip(texts, LENGTHS, strict=True)]
  assert len({token for row in greedy for token in row}) > 20  # not one token over and over


def test_a_prompt_alone_is_continued_as_in_company(model, prompts, greedy):
  for prompt, expected in zip(prompts, greedy, strict=True):
    assert generate(model, [prompt], N_NEW) == [Completion(expected)]


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_every_mesh_generates_the_same(sizes, mesh, weights, place, prompts, greedy):
  """Also 7 prompts on 4 rows of devices."""
  with mesh(*sizes):
    model = place(TINY, weights)
  assert tokens_of(generate(model, prompts, N_NEW)) == greedy


def test_eot_ends_its_row_and_is_left_out(model, prompts, greedy):
  for eot in (greedy[2][5], greedy[0][0], greedy[3][-1]):
    expected = [
      Completion(row[: row.index(eot)], finished=True) if eot in row else row for row in greedy
    ]
    assert expected != greedy
    found = generate(model, prompts, N_NEW, eot=eot)
    assert [row if row.finished else row.tokens for row in found] == expected


def test_what_cannot_be_continued_is_refused(model):
  with pytest.raises(
    ValueError,
    match=r"90 prompt and 8 new tokens exceed the context of 96 and the one token behind it; "
    r"ask for fewer, or slide a window: SlidingWindow\(",
  ):
    generate(model, [[1], [1] * 90], 8)
  for prompts in ([], [[]], [[1], []]):
    with pytest.raises(ValueError, match="no empty prompt"):
      generate(model, prompts, 3)
  for n_new in (0, -3, 2**24 + 1):
    with pytest.raises(ValueError, match=f"n_new is {n_new}; it is from 1 to 16,777,216"):
      generate(model, [[1]], n_new, window=SlidingWindow(8))
  with pytest.raises(ValueError, match="samples is 0; it is from 1 to"):
    generate(model, [[1]], 3, samples=0)
  for texts in ("text", ["text"], [3]):
    with pytest.raises(
      ValueError, match="prompts are lists of token ids; encode the texts, or call complete"
    ):
      generate(model, texts, 3)
  with pytest.raises(ValueError, match="104,857,600 texts of 64 tokens need .* GB or more"):
    generate(model, [[1]] * 100, 3, samples=2**20)
  for seed in (-1, 2**32, 10**30):
    with pytest.raises(ValueError, match=f"a seed of {seed} is not from 0 to 4294967295"):
      generate(model, [[1]], 3, seed=seed)
  for prompt in ([3, 97], [-1, 97]):
    with pytest.raises(ValueError, match=f"tokens {prompt[0]} to 97, the vocabulary 97"):
      generate(model, [[3], prompt], 3)
  with pytest.raises(ValueError, match="stride 90 and keep 6 leave nothing of a context of 96"):
    generate(model, [[1]], 3, window=SlidingWindow(90, 6))
  for stride, keep in ((0, 0), (1, -1)):
    with pytest.raises(ValueError, match="they are 1 and 0 or more"):
      SlidingWindow(stride, keep)


def test_options_are_keywords_or_one_value(model, prompts, greedy):
  """Both give the same; two answers to one question are refused."""
  assert tokens_of(generate(model, prompts, N_NEW, greedy=True)) == greedy
  assert tokens_of(generate(model, prompts, generation=Generation(N_NEW, Greedy()))) == greedy
  sampler = Sample((Temperature(2.0), TopK(5)))
  drawn = generate(model, prompts, N_NEW, sampler, seed=3, samples=2, eot=5)
  assert (
    generate(model, prompts, N_NEW, temperature=2.0, top_k=5, seed=3, samples=2, eot=5) == drawn
  )
  generation = Generation(N_NEW, sampler, seed=3, samples=2, eot=5)
  assert generate(model, prompts, generation=generation) == drawn
  for options, names in (
    ({"n_new": 3}, "n_new"),
    ({"sampler": Greedy()}, "sampler"),
    ({"seed": 1, "top_k": 5}, "seed, top_k"),
  ):
    with pytest.raises(ValueError, match=f"generation= together with {names}: give one of both"):
      generate(model, prompts, generation=generation, **options)
  with pytest.raises(ValueError, match="sampler= together with top_k, greedy: give one of both"):
    generate(model, prompts, 3, Greedy(), top_k=5, greedy=True)
  with pytest.raises(TypeError, match="no keyword 'temprature'; did you mean 'temperature'"):
    generate(model, prompts, 3, temprature=0.8)
  with pytest.raises(ValueError, match="stop strings end texts, and generate works on tokens"):
    generate(model, prompts, 3, stop=["a"])


def test_new_tokens_are_128_unless_the_context_has_room_for_fewer(model):
  """Behind the longest prompt; with a window there is always room. A full context predicts one."""
  decoder = for_inference(model)
  for prompts, window, n_new in (
    ([[1], [1] * 90], None, 7),
    ([[1] * 95], None, 2),
    ([[1] * 96], None, 1),
    ([[1] * 95], SlidingWindow(16), 128),
  ):
    generation = check_generation(decoder, prompts, Generation(window=window))
    assert generation == Generation(n_new, window=window)
  assert Generation().with_n_new(longest=100, n_ctx=1024).n_new == 128
  with pytest.raises(ValueError, match="97 prompt and 1 new tokens exceed the context of 96"):
    generate(model, [[1] * 97])


def test_padding_of_the_vocabulary_is_never_predicted(mesh, weights, place, put, prompts, greedy):
  """Not even when its rows are loud."""
  for sizes in ((1, 1, 1), (2, 2, 2)):
    with mesh(*sizes):
      model = place(TINY, weights)
      loud = np.full((128, 16), 100, np.float32)
      loud[:97] = weights["wte"]
      model.wte = nnx.Param(Dense(put(loud, P(("model", "data"), None)), outputs_are_rows=True))
    assert tokens_of(generate(model, prompts, N_NEW)) == greedy


def test_padded_heads_generate_the_same(mesh, parameters, place, prompts):
  config = dataclasses.replace(TINY, n_embd=40, n_head=5, pad_heads=True)
  arrays, found = parameters(config, scale=0.3), []
  for sizes in ((1, 1, 1), (1, 1, 2)):
    with mesh(*sizes):
      found.append(generate(place(config, arrays), prompts, N_NEW))
  assert found[0] == found[1]


def test_the_cache_is_split_as_the_model_is(mesh, weights, place, prompts):
  """Rows over replica and data, heads over model, before and after steps: no device holds more than
  its eighth."""
  generation = Generation(N_NEW, Greedy())
  with mesh(2, 2, 2):
    decoder = for_inference(place(TINY, weights))
  state = start(decoder, prompts, generation)
  for n in (0, 2):
    state = advance(decoder, state, n, generation) if n else state
    for x_BHSK in jax.tree.leaves(state.caches):
      assert x_BHSK.shape == (8, 4, 128, 4)
      assert {shard.data.shape for shard in x_BHSK.addressable_shards} == {(2, 2, 128, 4)}
      assert len({str(shard.index) for shard in x_BHSK.addressable_shards}) == 8


# ---- draws


def test_sampling_is_seeded(mesh, model, weights, place, prompts):
  """A row's tokens depend on the seed and its place, not on its company or the mesh."""
  sampler = Sample((Temperature(2.0), TopP(0.95)))
  sample = functools.partial(generate, model, n_new=N_NEW, sampler=sampler)
  one, same, other = (sample(prompts, seed=seed) for seed in (0, 0, 1))
  twins = sample([prompts[1]] * 7)
  assert sample(prompts[:1]) == one[:1]
  with mesh(1, 1, 1):
    flat = place(TINY, weights | {"wte": weights["wte"] * 0})
  even = generate(flat, prompts, N_NEW, sampler=sampler)
  assert all(len(set(row.tokens)) > 6 for row in even), (
    "each position draws its own number, where nothing else differs"
  )
  assert one == same
  assert all(a != b for a, b in zip(one, other, strict=True))
  assert len({tuple(row.tokens) for row in twins}) == 7, "rows draw their own numbers"
  assert twins[1] == one[1]
  with mesh(2, 2, 2):
    assert generate(place(TINY, weights), prompts, N_NEW, sampler=sampler) == one


def test_samples_of_a_prompt_follow_each_other(model, prompts):
  sample = functools.partial(generate, model, n_new=N_NEW, sampler=Sample((Temperature(2.0),)))
  first, three = sample(prompts), sample(prompts, samples=3)
  assert len({tuple(row.tokens) for row in three}) == 21
  assert three[::3] == first
  assert sample(prompts[:2], samples=3) == three[:6]


def test_steps_in_any_portions_draw_the_same(model, prompts):
  """One portion, and many, with a row that ends on the way."""
  sampler = Sample((Temperature(2.0), RepetitionPenalty(1.2)))
  whole = generate(model, prompts, N_NEW, sampler, seed=5, logprobs=True)
  eot = whole[3].tokens[6]
  expected = generate(model, prompts, N_NEW, sampler, seed=5, eot=eot, logprobs=True)
  generation = Generation(N_NEW, sampler, seed=5, eot=eot, logprobs=True)
  decoder = for_inference(model)
  state = start(decoder, prompts, generation)
  parts, made = [], 0
  for n in (1, 3, 0, 7, 1):
    state = advance(decoder, state, n, generation)
    parts.append(completions(state, made))
    made += n
  joined = [
    Completion(
      sum((p.tokens for p in row), []),
      sum((p.logprobs for p in row), []),
      finished=row[-1].finished,
    )
    for row in zip(*parts, strict=True)
  ]
  assert joined == expected and expected[3].finished and expected != whole


def test_draws_follow_the_distribution_of_the_model(model):
  """Chi-square over 4,096 first tokens; four standard deviations, and the draws are seeded."""
  logits = full_logits(model, [[5, 6]])[0].astype(np.float64) / 3
  p, n = np.exp(logits) / np.exp(logits).sum(), 4096
  rows = generate(model, [[5, 6]], 1, Sample((Temperature(3.0),)), samples=n)
  counts = np.bincount([row.tokens[0] for row in rows], minlength=97)
  assert ((counts - n * p) ** 2 / (n * p)).sum() < 96 + 4 * np.sqrt(2 * 96)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_logprobs_are_of_the_model_without_filters(sizes, mesh, parameters, place, prompts):
  arrays = parameters(TINY)  # calm ones: logits are small, so 1e-5 is what float32 can do
  with mesh(1, 1, 1):
    model = place(TINY, arrays)
  with mesh(*sizes):
    placed = place(TINY, arrays)
  sampler = Sample((RepetitionPenalty(1.5), Temperature(2.0), TopP(0.9)))
  found = generate(placed, prompts, N_NEW, sampler, logprobs=True)
  for n in range(N_NEW):
    logits = full_logits(
      model, [prompt + row.tokens[:n] for prompt, row in zip(prompts, found, strict=True)]
    )
    logits = logits.astype(np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, logp in zip(found, logps, strict=True):
      assert row.logprobs[n] == pytest.approx(logp[row.tokens[n]], abs=1e-5)
  alone = generate(placed, prompts[:1], N_NEW, sampler, logprobs=True)[0]
  assert alone.tokens == found[0].tokens and alone.logprobs == pytest.approx(
    found[0].logprobs, abs=1e-5
  )


def test_few_shapes_are_compiled(model):
  """Lengths go up to a multiple of 32; how many steps, the seed and eot compile nothing."""
  generate(model, [[1] * 5] * 3, 9)
  sizes = _start._cache_size(), _advance._cache_size()
  for length, n_new, seed, eot in ((1, 1, 0, None), (33, 30, 1, 5), (20, 32, 2, 96)):
    generate(model, [[1] * length] * 3, n_new, seed=seed, eot=eot)
  assert (_start._cache_size(), _advance._cache_size()) == sizes


# ---- beyond the context

SHORT = dataclasses.replace(TINY, n_ctx=48)
LONG = (1, 20, 40, 47, 48, 49, 130)


@pytest.fixture(scope="module")
def long_prompts(tokens):
  return [
    row[:length].tolist() for row, length in zip(tokens(len(LONG), 130, 97), LONG, strict=True)
  ]


def policy(model, prompts, n_new, window):
  """The window, simulated: a list that loses its oldest tokens, and the whole forward pass over
  what is left."""
  contexts, new = [list(prompt) for prompt in prompts], [[] for _ in prompts]
  for _ in range(n_new):
    for context in contexts:
      while len(context) > model.config.n_ctx:
        del context[window.keep : window.keep + window.stride]
    for row, token in enumerate(full_logits(model, contexts).argmax(-1).tolist()):
      contexts[row].append(token)
      new[row].append(token)
  return new


@pytest.mark.parametrize(
  "window", [SlidingWindow(16), SlidingWindow(30, keep=7), SlidingWindow(1, keep=1)], ids=str
)
def test_a_window_slides_as_its_policy_says(window, mesh, weights, place, long_prompts):
  """More new tokens than the context has places, with rows that are full at different steps; also
  alone and split."""
  arrays, n_new = weights | {"wpe": weights["wpe"][:48]}, 60
  with mesh(1, 1, 1):
    model = place(SHORT, arrays)
  expected = policy(model, long_prompts, n_new, window)
  assert tokens_of(generate(model, long_prompts, n_new, window=window)) == expected
  assert len({token for row in expected for token in row[-20:]}) > 10
  if window.keep == 7:  # one is enough: each takes seconds to compile
    assert tokens_of(generate(model, long_prompts[2:3], n_new, window=window)) == expected[2:3]
    with mesh(1, 4, 2):
      assert (
        tokens_of(generate(place(SHORT, arrays), long_prompts, n_new, window=window)) == expected
      )


def test_a_window_that_is_not_needed_changes_nothing(model, prompts, greedy):
  assert tokens_of(generate(model, prompts, N_NEW, window=SlidingWindow(32))) == greedy
  assert tokens_of(generate(model, prompts[:3], N_NEW, window=SlidingWindow(32))) == greedy[:3]


def test_a_window_ends_rows_and_draws_as_ever(mesh, weights, place, long_prompts):
  """Also with logprobs, after eot has ended some rows, and with filters that remember what the row
  forgot."""
  sampler, window = Sample((NoRepeatNgram(1), Temperature(2.0))), SlidingWindow(8, 2)
  with mesh(1, 1, 1):
    model = place(SHORT, weights | {"wpe": weights["wpe"][:48]})
  sample = functools.partial(
    generate, model, long_prompts[:5], 40, sampler, window=window, logprobs=True
  )
  whole = sample()
  for prompt, row in zip(long_prompts, whole, strict=False):
    assert len(set(row.tokens)) == 40 and not set(prompt) & set(row.tokens), (
      "what was forgotten still counts"
    )
  eot = whole[4].tokens[3]
  found = sample(eot=eot)
  for row, before in zip(found, whole, strict=True):
    end = before.tokens.index(eot) if eot in before.tokens else 40
    assert row == Completion(before.tokens[:end], before.logprobs[:end], finished=end < 40)
  assert any(row.finished for row in found) and not all(row.finished for row in found)


# ---- transformers

HF = ModelConfig(n_vocab=97, n_ctx=272, n_embd=32, n_head=4, n_layer=3, dtype="float32")
HF_LENGTHS = (1, 2, 3, 8, 15, 31, 32, 33, 34, 48, 63, 64, 65, 98, 100, 127, 128, 129, 195, 200)


@pytest.fixture(scope="module")
def theirs():
  """A random transformers GPT-2 with sharp attention and weights of all sizes."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(1)  # one is fastest for a model as small as this
  torch.manual_seed(0)
  sizes = {
    "vocab_size": 97,
    "n_positions": HF.n_ctx,
    "n_embd": HF.n_embd,
    "n_layer": HF.n_layer,
    "n_head": HF.n_head,
  }
  ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
  model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(**sizes, **ends, initializer_range=0.3)
  ).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        parameter.add_(0.2 * torch.randn_like(parameter))
      if "c_attn.weight" in name or "wpe" in name:
        parameter.mul_(2)
    wte = model.transformer.wte.weight
    wte.div_(wte.norm(dim=1, keepdim=True) / 4)
  return model


def arrays_of(theirs) -> dict[str, np.ndarray]:
  """Their weights by our names; their c_attn holds q of all heads, then k, then v, ours goes head
  by head."""
  state, arrays = (
    {name: value.detach().numpy() for name, value in theirs.transformer.named_parameters()},
    {},
  )
  for name, value in state.items():
    *where, last = name.split(".")
    kind = {"weight": "g" if where[-1].startswith("ln") else "w", "bias": "b"}[last]
    if where[-1] in ("wte", "wpe"):
      arrays[where[-1]] = value
    elif where[0] == "h":
      if where[-1] == "c_attn":
        split = value.reshape(*value.shape[:-1], 3, HF.n_head, HF.n_embd // HF.n_head)
        value = split.swapaxes(-3, -2).reshape(value.shape)
      arrays.setdefault(".".join(["h", *where[2:], kind]), []).append(value)
    else:
      arrays[f"{where[-1]}.{kind}"] = value
  return {
    name: np.stack(value) if isinstance(value, list) else value for name, value in arrays.items()
  }


def their_generate(theirs, prompt, n_new, **how):
  import torch

  ids = torch.tensor([prompt])
  how |= {"max_new_tokens": n_new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
  return theirs.generate(ids, **how)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def hf_prompts(tokens):
  return [
    row[:n].tolist() for row, n in zip(tokens(len(HF_LENGTHS), 200, 97), HF_LENGTHS, strict=True)
  ]


@pytest.fixture(scope="module")
def hf_greedy(theirs, hf_prompts):
  return [their_generate(theirs, prompt, 64) for prompt in hf_prompts]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_greedy_is_that_of_transformers(sizes, theirs, hf_prompts, hf_greedy, mesh, place):
  """20 prompts of 1 to 200 tokens in one batch, 64 tokens each, token for token; and prompts
  alone."""
  expected = hf_greedy
  assert len({token for row in expected for token in row}) > 60
  with mesh(*sizes):
    model = place(HF, arrays_of(theirs))
  assert tokens_of(generate(model, hf_prompts, 64)) == expected
  alone = range(20) if sizes == (1, 1, 1) else (0, 19)
  for row in alone:
    assert tokens_of(generate(model, [hf_prompts[row]], 64)) == [expected[row]]


def test_greedy_with_filters_is_that_of_transformers(theirs, hf_prompts, mesh, place):
  eot = 7
  how = {
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 20,
    "eos_token_id": eot,
  }
  biased = how | {"sequence_bias": {(3,): 3.0, (eot,): 5.0}}
  filters = (
    LogitBias({3: 3.0, eot: 5.0}),
    RepetitionPenalty(1.4),
    NoRepeatNgram(2),
    MinNewTokens(20, eot),
  )
  expected = [their_generate(theirs, prompt, 40, **biased) for prompt in hf_prompts]
  expected = [row[:-1] if row[-1] == eot else row for row in expected]
  assert 3 < sum(len(row) < 40 for row in expected) < 20 and min(map(len, expected)) >= 20
  with mesh(1, 4, 2):
    model = place(HF, arrays_of(theirs))
  assert tokens_of(generate(model, hf_prompts, 40, Greedy(filters), eot=eot)) == expected


@pytest.mark.parametrize(
  "options, message",
  [
    ({"window": 16}, r"window is 16; give SlidingWindow\(stride\)"),
    ({"sampler": TopK(4)}, r"sampler is TopK\(k=4\); give Greedy\(\), Sample"),
    ({"n_new": 2.5}, "n_new is 2.5; it is a whole number"),
    ({"seed": 1.5}, "seed is 1.5; it is a whole number"),
    ({"eot": [5, 6]}, r"eot is \[5, 6\]; it is a whole number"),
    ({"generation": {"n_new": 8}}, r"generation is a dict; give Generation\(...\)"),
    ({"temperature": math.inf}, "temperature of inf is not a finite number of 1e-30 or more"),
    ({"temperature": 1e-45}, "temperature of 1e-45 is not a finite number of"),
  ],
)
def test_an_option_of_another_type_is_one_line(model, options, message):
  with pytest.raises(ValueError, match=message) as raised:
    generate(model, [[5, 6]], **options)
  assert "\n" not in str(raised.value)
