# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning and prefix tuning: as peft computes, trains and stores them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.convert.peft_files import TENSORS
from gpt2_jax.convert.pretrained import load_pretrained, open_weights
from gpt2_jax.convert.weights import from_model
from gpt2_jax.decoding import generate
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.finetune.adapter import TRAINED_NAMES, adapter_arrays, add_adapter
from gpt2_jax.finetune.peft import write_adapter
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.loss import NextToken
from gpt2_jax.optimizer import adamw
from gpt2_jax.sharding import BATCH, make_mesh
from gpt2_jax.tokenizer import train_characters

KINDS = ["prompt", "prefix"]
TOKENS = 4  # virtual ones


def one_device():
  return make_mesh(1, 1, 1, jax.devices()[:1])


def logits(model, tokens_NT) -> np.ndarray:
  return np.asarray(model(tokens_NT))[..., : model.config.n_vocab]


def new(base_folder, kind, mesh=None):
  """The base with new virtual tokens."""
  model, _ = load_pretrained(str(base_folder), mesh or one_device())
  settings = ConfigDict({"kind": kind, "tokens": TOKENS, "quantize": ""})
  with jax.set_mesh(model.mesh):
    return jax.jit(lambda model: add_adapter(model, settings, jax.random.key(0)))(model)


@pytest.fixture
def theirs(kind, their_base):
  """peft's own, with random virtual tokens."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  make = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
  torch.manual_seed(3)
  return peft.get_peft_model(their_base, make(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_with_peft(theirs, kind, base_folder, tokens_NT, tmp_path):
  torch = pytest.importorskip("torch")
  theirs.save_pretrained(tmp_path / "theirs")
  tokens_BT = tokens_NT[:, : 16 - TOKENS]
  with torch.no_grad():
    expected = theirs.eval()(input_ids=torch.from_numpy(tokens_BT).long()).logits.numpy()
  expected = expected[:, -tokens_BT.shape[1] :]  # peft has logits of virtual tokens, too

  model, _ = load_pretrained(str(base_folder), one_device(), adapter=str(tmp_path / "theirs"))
  np.testing.assert_allclose(logits(model, tokens_BT), expected, atol=1e-5)
  write_adapter(model, tmp_path / "ours", str(base_folder))
  ours, original = (load_file(tmp_path / x / TENSORS) for x in ("ours", "theirs"))
  assert ours.keys() == original.keys()
  np.testing.assert_array_equal(ours["prompt_embeddings"], original["prompt_embeddings"])

  # What is longer than they leave is refused, and so is a format without a place for them.
  with pytest.raises(ValueError, match="exceed the context of 12"):
    model(tokens_NT)
  with pytest.raises(ValueError, match=kind):
    from_model(model, None)
  with pytest.raises(ValueError, match="virtual tokens"):
    open_weights(str(base_folder), adapter=str(tmp_path / "theirs"))


def test_peft_loads_our_prefix_from_a_mesh_with_padded_heads(
  base_folder, their_base, tokens_NT, tmp_path
):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  model = new(base_folder, "prefix", make_mesh(1, 2, 2, jax.devices()[:4]))
  write_adapter(model, tmp_path / "ours", str(base_folder))
  theirs = peft.PeftModel.from_pretrained(their_base, tmp_path / "ours").eval()
  tokens_BT = tokens_NT[:, : 16 - TOKENS]
  with torch.no_grad():
    expected = theirs(input_ids=torch.from_numpy(tokens_BT).long()).logits.numpy()
  found = logits(model, tokens_BT)
  np.testing.assert_allclose(found, expected[:, -tokens_BT.shape[1] :], atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix"])
def test_twenty_steps_equal_peft_s(theirs, kind, base_folder, tmp_path):
  """AdamW with decay and clipping on the virtual tokens, from the same ones."""
  torch = pytest.importorskip("torch")
  theirs.save_pretrained(tmp_path / "start")
  model, _ = load_pretrained(str(base_folder), one_device(), adapter=str(tmp_path / "start"))
  rng = np.random.default_rng(5)
  batches = [rng.integers(0, 61, (4, 12)).astype(np.int32) for _ in range(20)]

  parameters = [p for p in theirs.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
  expected = []
  for tokens_BT in batches:
    ids = torch.from_numpy(tokens_BT).long()
    logits_BTV = theirs(input_ids=ids).logits[:, -12:-1]
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    expected.append(loss.item())

  optimizer = adamw(lambda step: jnp.float32(1e-2), 0.9, 0.95, 0.1, 1.0)
  names = TRAINED_NAMES[kind]
  step = jax.jit(functools.partial(train.train_step, optimizer=optimizer, trainable=names))
  losses, zero = [], jnp.int32(0)
  with jax.set_mesh(model.mesh):
    trained, _ = partition(model, trainable_mask(model, names))
    state = train.TrainState(zero, zero, zero, model, jax.jit(optimizer.init)(trained))
    for tokens_BT in batches:
      placed = jax.device_put(tokens_BT, jax.sharding.NamedSharding(model.mesh, BATCH))
      state, metrics = step(state, Batch(placed), NextToken())
      losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(losses, expected, atol=1e-4)
  assert list(adapter_arrays(state.model)) == [kind] and losses[0] != losses[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_share_the_virtual_tokens_as_if_each_stood_alone(kind, base_folder, tokens_NT):
  model = new(base_folder, kind)
  first, second = tokens_NT[0, :7], tokens_NT[1, :6]
  row = np.concatenate([first, second])[None]
  segments = np.repeat([0, 1], [7, 6])[None, :-1]
  positions = np.concatenate([np.arange(7), np.arange(6)])[None, :-1]
  weights = np.ones((1, 12), np.float32)
  weights[0, 6] = 0  # the first token of the second text does not follow from the first text
  objective = jax.jit(NextToken())
  with jax.set_mesh(model.mesh):
    packed = objective(model, Batch(row, weights, segments, positions))
    alone = [objective(model, Batch(text[None])) for text in (first, second)]
  assert float(packed["nats"]) == pytest.approx(sum(float(s["nats"]) for s in alone), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_continues_from_behind_the_virtual_tokens(kind, base_folder, tokens_NT):
  """Greedy texts through the cache are those of the whole model, called again for each token."""
  model = new(base_folder, kind)
  prompts = [tokens_NT[0, :5].tolist(), tokens_NT[1, :3].tolist()]
  for prompt, completion in zip(prompts, generate(model, prompts, 4), strict=True):
    text = np.array([prompt + completion.tokens])
    best = logits(model, np.pad(text, ((0, 0), (0, 9 - text.shape[1]))))[0].argmax(-1)
    np.testing.assert_array_equal(completion.tokens, best[len(prompt) - 1 : len(prompt) + 3])


def test_too_many_virtual_tokens_are_refused(base_folder, tmp_path):
  model = new(base_folder, "prompt")
  with jax.set_mesh(model.mesh), pytest.raises(ValueError, match="already"):
    add_adapter(
      model, ConfigDict({"kind": "prefix", "tokens": 1, "quantize": ""}), jax.random.key(0)
    )
  base, _ = load_pretrained(str(base_folder), one_device())
  settings = ConfigDict({"kind": "prompt", "tokens": 16, "quantize": ""})
  with jax.set_mesh(base.mesh), pytest.raises(ValueError, match="leave nothing of a context of 16"):
    add_adapter(base, settings, jax.random.key(0))


def test_continuations_of_one_context_are_scored_as_alone(base_folder, tokens_NT):
  """As the whole model does; where other models share the row of the context."""
  model = new(base_folder, "prompt")
  context, ends = tokens_NT[0, :8].tolist(), tokens_NT[1, :3].tolist()
  scores = Scorer(model, train_characters(["ab"])).loglikelihoods(
    [(context, [end]) for end in ends]
  )
  log_p = jax.nn.log_softmax(logits(model, np.array([context]))[0, -1])
  np.testing.assert_allclose([score.nats for score in scores], -log_p[np.array(ends)], rtol=1e-5)
