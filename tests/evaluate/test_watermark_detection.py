# SPDX-License-Identifier: Apache-2.0
"""Detection of watermarks: p-values of other texts, power on marked ones, and transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.decoding import History
from gpt2_jax.decoding.watermark import (
  GreenListWatermark,
  GumbelWatermark,
  SynthIdWatermark,
)
from gpt2_jax.decoding.watermark_transformers import (
  TransformersGreenList,
  TransformersSynthId,
  torch_permutation,
  torch_words,
)
from gpt2_jax.evaluate.watermark_detection import detect

KEY = 20_230_124
WATERMARKS = {
  "green": GreenListWatermark(KEY, gamma=0.25, context=1),
  "selfhash": GreenListWatermark(KEY, gamma=0.25, context=3, self_hash=True),
  "gumbel": GumbelWatermark(KEY),
  "synthid": SynthIdWatermark(KEY),
}
V = 50_257


def random_text(n: int, seed: int = 0, n_vocab: int = V) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, n_vocab, n)


def write(watermark, n: int, n_vocab: int = 64, seed: int = 1) -> list[int]:
  """A text of a model that finds all tokens equally likely, after 4 tokens of a prompt."""

  @jax.jit
  def step(tokens_W, end, key):
    logits_V = watermark(jnp.zeros(n_vocab), History(tokens_W, 0, 4, end))
    return tokens_W.at[end].set(jax.random.categorical(key, logits_V))

  tokens_W = jnp.zeros(n + 4, jnp.int32).at[:4].set(random_text(4, seed, n_vocab))
  keys = jax.random.split(jax.random.key(seed), n)
  for i in range(n):
    tokens_W = step(tokens_W, 4 + i, keys[i])
  return tokens_W.tolist()


@pytest.mark.parametrize("name", WATERMARKS)
def test_p_values_of_other_texts_are_uniform(name):
  """600 texts and keys: as many below 1 %, 10 % and 50 % as that, or a little fewer.

  Tokens are as frequent as words are, so that n-grams repeat, and their parts still more.
  """
  texts = np.random.default_rng(0).zipf(1.4, (600, 60)) % V
  p_values = []
  for key, text in enumerate(texts):
    p_values.append(detect(dataclasses.replace(WATERMARKS[name], key=key), text).p_value)
  for level in (0.01, 0.1, 0.5):
    deviation = np.sqrt(600 * level * (1 - level))
    below = sum(p <= level for p in p_values)
    assert below < 600 * level + 4 * deviation
    # A count of green tokens takes few values, and the p-values only so many.
    assert below > 600 * level * 0.4 - 4 * deviation


@pytest.mark.parametrize("name", WATERMARKS)
def test_a_marked_text_is_detected_by_its_key_alone(name):
  text = write(WATERMARKS[name], 120)
  found = detect(WATERMARKS[name], text, n_prompt=4)
  assert found.p_value < 1e-5 and found.z > 4 and found.mean > found.expected
  assert found.n_scored <= 120 and not found.is_too_short
  other = type(WATERMARKS[name])(KEY + 1)
  assert detect(other, text, n_prompt=4).p_value > 1e-3
  assert detect(WATERMARKS[name], text[:20], n_prompt=4).is_too_short


def test_repeated_ngrams_count_once():
  """A text that says one thing 30 times has no more evidence than one that says it once."""
  once = random_text(12).tolist()
  for watermark in WATERMARKS.values():
    a, b = detect(watermark, once), detect(watermark, once * 30)
    # Where one ends and the next begins there are other n-grams.
    assert a.n_scored <= b.n_scored <= 12
    assert detect(watermark, once * 30, count_repeated=True).n_scored == 360 - watermark.context


def test_a_prompt_is_not_scored():
  watermark = WATERMARKS["gumbel"]
  text = write(watermark, 60)
  prompt = random_text(200, 3, 64).tolist()
  after = detect(watermark, prompt + text, n_prompt=204)
  assert after.n_scored <= 60
  assert after.p_value < 1e-6 * detect(watermark, prompt + text).p_value
  with pytest.raises(ValueError, match="204 of them of the prompt, have none to score"):
    detect(watermark, prompt + text[:4], n_prompt=204)


def test_exact_tails():
  """By hand: of 3 bits 2 ones; and a sum of exponentials against the series of Gamma's tail."""
  from gpt2_jax.evaluate.watermark_detection import _detect_bits, _detect_gumbel

  found = _detect_bits(np.array([[1], [0], [1]]), 0.25)
  assert found.p_value == pytest.approx(3 * 0.25**2 * 0.75 + 0.25**3)
  assert found.z == pytest.approx((2 - 0.75) / np.sqrt(3 * 0.25 * 0.75))
  assert _detect_bits(np.zeros((5, 1), bool), 0.25).p_value == 1
  words = np.array([2**31, 2**30, 2**20], np.uint32)
  total = -np.log((words + 0.5) / 2**32).sum()
  assert _detect_gumbel(words).p_value == pytest.approx(np.exp(-total) * (1 + total + total**2 / 2))


# ---- transformers


@pytest.fixture(scope="module")
def theirs():
  """(torch, transformers)."""
  return pytest.importorskip("torch"), pytest.importorskip("transformers")


def test_torchs_generator_needs_no_torch(theirs):
  torch, _ = theirs
  for seed in (0, 12345, 2**40 + 7):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randint(0, 2, (65_536,), generator=generator).numpy()
    np.testing.assert_array_equal(torch_words(seed, 65_536) & 1, expected)
    permutation = torch.randperm(V, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_array_equal(torch_permutation(seed, V), permutation)
    np.testing.assert_array_equal(torch_permutation(seed, V, first=100), permutation[:100])


@pytest.mark.parametrize("scheme, context", [("lefthash", 1), ("lefthash", 2), ("selfhash", 3)])
def test_green_lists_and_z_scores_are_transformers(scheme, context, theirs):
  torch, transformers = theirs
  config = transformers.WatermarkingConfig(seeding_scheme=scheme, context_width=context)
  model_config = transformers.GPT2Config(vocab_size=V)
  ours = TransformersGreenList(V, context=context, self_hash=scheme == "selfhash")

  # 1. Lists.
  processor = config.construct_processor(V, "cpu")
  for prefix in random_text((8, 3)):
    expected = processor._get_greenlist_ids(torch.tensor(prefix)).numpy()
    np.testing.assert_array_equal(ours.green_ids(prefix.tolist()), expected)

  # 2. What is added to the logits.
  logits_V = np.random.default_rng(0).normal(size=V).astype(np.float32)
  prompt = random_text(5, 1)
  expected = processor(torch.tensor(prompt)[None], torch.tensor(logits_V)[None])[0].numpy()
  actual = jax.jit(lambda logits_V: ours(logits_V, History.of(prompt.tolist())))(logits_V)
  np.testing.assert_array_equal(actual, expected)

  # 3. Scores of a text that repeats itself.
  text = np.concatenate([random_text(12, 2), random_text(12, 2)])
  for ignore_repeated in (False, True):
    detector = transformers.WatermarkDetector(
      model_config, "cpu", config, ignore_repeated_ngrams=ignore_repeated
    )
    expected = detector(torch.tensor(text)[None], return_dict=True)
    actual = detect(ours, text, count_repeated=not ignore_repeated)
    assert actual.n_scored == expected.num_tokens_scored[0]
    assert actual.z == pytest.approx(expected.z_score[0], abs=1e-6)


def test_synthid_is_transformers(theirs):
  torch, transformers = theirs
  keys = (654, 400, 836, 123, 340, 443, 597, 160, 57, 2**40 + 3)
  config = transformers.SynthIDTextWatermarkingConfig(ngram_len=5, keys=list(keys))
  processor = config.construct_processor(97, "cpu")
  ours = TransformersSynthId(keys)

  # 1. g-values of 10,000 n-grams.
  text = random_text(10_004)
  ngrams = np.lib.stride_tricks.sliding_window_view(text, 5).astype(np.uint32)
  expected = processor.compute_g_values(torch.tensor(text)[None])[0].numpy()
  np.testing.assert_array_equal(ours.bits(list(ngrams[:, :-1].T), ngrams[:, -1]), expected)

  # 2. The tournament. Their context begins when the text does.
  logits_V = torch.tensor(np.random.default_rng(0).normal(size=97).astype(np.float32))
  tokens = random_text(6, 4, 97).tolist()
  for n in range(2, 7):
    scores = processor(torch.tensor(tokens[:n])[None], logits_V[None])
  actual = jax.nn.softmax(ours(jnp.asarray(logits_V.numpy()), History.of(tokens)))
  np.testing.assert_allclose(actual, scores[0].softmax(-1).numpy(), atol=1e-6)


def test_texts_of_either_side_are_detected_by_the_other(theirs, tmp_path):
  """transformers' detector finds what was written here; that of here what transformers wrote."""
  torch, transformers = theirs
  config = transformers.WatermarkingConfig(bias=4.0)
  model_config = transformers.GPT2Config(
    vocab_size=64, n_positions=128, n_embd=16, n_layer=1, n_head=2
  )
  ours = TransformersGreenList(64, delta=4.0)

  text = write(ours, 80)[4:]
  detector = transformers.WatermarkDetector(model_config, "cpu", config)
  assert detector(torch.tensor([text]), return_dict=True).p_value[0] < 1e-5

  model = transformers.GPT2LMHeadModel(model_config).eval()
  torch.manual_seed(0)
  options = {"do_sample": True, "top_k": 0, "max_new_tokens": 80, "pad_token_id": 0}
  ids = model.generate(torch.tensor([[1, 2, 3, 4]]), watermarking_config=config, **options)
  assert detect(ours, ids[0].tolist(), n_prompt=4).p_value < 1e-5


def test_what_transformers_forms_cannot_be_is_refused():
  with pytest.raises(ValueError, match="has to be a power of two"):
    TransformersSynthId((1, 2), table_size=1000)
  with pytest.raises(ValueError, match="wants a key for each layer"):
    TransformersSynthId(())
  with pytest.raises(ValueError, match="gamma is in"):
    TransformersGreenList(9, gamma=1.5)
  with pytest.raises(ValueError, match="the model has 7 tokens, and the watermark's lists 9"):
    TransformersGreenList(9)(jnp.zeros(7), History.of([1]))
