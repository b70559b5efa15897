# SPDX-License-Identifier: Apache-2.0
"""LoRA: it begins as nothing, trains as peft's does, merges, and leaves what is frozen alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.finetune.adapter import TRAINED_NAMES, adapter_arrays, add_adapter
from gpt2_jax.finetune.lora import LoraSettings, add_lora, merge_lora
from gpt2_jax.finetune.peft import stack_adapters, write_adapter
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.linear import Context
from gpt2_jax.loss import NextToken
from gpt2_jax.model import GPT2, ModelConfig, name_of
from gpt2_jax.optimizer import adamw
from gpt2_jax.quantization import quantize
from gpt2_jax.sharding import BATCH, abstract_mesh, make_mesh
from gpt2_jax.sizes import model_config

TINY = ModelConfig(n_vocab=61, n_ctx=16, n_embd=24, n_head=3, n_layer=2, dtype="float32")
ALL = LoraSettings(3, 6.0, targets=("c_attn", "c_proj", "c_fc"))


def adapter_settings(**changes):
  defaults = {"kind": "lora", "rank": 8, "alpha": 16.0, "rslora": False, "targets": ("c_attn",)}
  return ConfigDict(defaults | {"dropout": 0.0, "tokens": 20, "quantize": ""} | changes)


def with_b(model, seed: int = 0, scale: float = 0.05):
  """The model with an adapter that does something, the same on every mesh."""

  def fill(path, leaf):
    if not name_of(path).endswith("lora_b"):
      return leaf
    layers, rank, held = leaf.shape
    outputs = 72 if "c_attn" in name_of(path) else held
    rng = np.random.default_rng([seed, len(name_of(path))])
    noise_LRO = np.float32(rng.normal(size=(layers, rank, outputs)) * scale)
    padded = np.pad(noise_LRO, ((0, 0), (0, 0), (0, held - outputs)))
    return jax.device_put(padded, leaf.sharding)

  return jax.tree_util.tree_map_with_path(fill, model)


@pytest.fixture(scope="module")
def base(mesh, parameters, place):
  with mesh(1, 1, 1):
    return place(TINY, parameters(TINY))


def adapted(base, settings=ALL):
  with jax.set_mesh(base.mesh):
    return jax.jit(lambda base: add_lora(base, settings, jax.random.key(0)))(base)


def test_a_new_adapter_changes_no_bit_and_its_base_keeps_its_names(base, tokens):
  tokens_BT = tokens(2, 12, 61)
  model = adapted(base)
  np.testing.assert_array_equal(model(tokens_BT), base(tokens_BT))
  names = {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)}
  assert {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(base)} <= names
  assert len(adapter_arrays(model)) == 8 and not adapter_arrays(base)

  # peft draws a from the same interval.
  bounds = {"h.attn.c_attn.w.lora_a": 24**-0.5, "h.mlp.c_proj.w.lora_a": 96**-0.5}
  for name, bound in bounds.items():
    assert 0.9 * bound < np.abs(adapter_arrays(model)[name]).max() <= bound


def test_merging_is_the_same_model_and_int8_is_refused(base, tokens):
  tokens_BT = tokens(2, 12, 61)
  model = with_b(adapted(base))
  logits = model(tokens_BT)
  assert np.abs(logits - base(tokens_BT))[..., :61].max() > 0.1
  merged = merge_lora(model)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  limit = 1e-6 * np.abs(logits)[..., :61].max()
  np.testing.assert_allclose(merged(tokens_BT)[..., :61], logits[..., :61], atol=limit)
  with pytest.raises(ValueError, match="int8 is not merged"):
    merge_lora(adapted(quantize(base)))


def test_every_mesh_draws_the_same(mesh, parameters, place, base):
  """Three heads over a model axis of two: the padding is zero. (test_peft compares logits.)"""
  expected = with_b(adapted(base))
  arrays = parameters(TINY)
  with mesh(1, 2, 2):
    model = place(dataclasses.replace(TINY, pad_heads=True), arrays)
  model = with_b(adapted(model))
  held = adapter_arrays(model)
  assert held["h.attn.c_attn.w.lora_b"].shape == (2, 3, 96)
  for name, array in adapter_arrays(expected).items():
    inside = np.asarray(held[name])[tuple(map(slice, array.shape))]
    np.testing.assert_array_equal(inside, array, err_msg=name)
    assert np.abs(held[name]).sum() == pytest.approx(np.abs(array).sum(), rel=1e-6), name


def steps(model, batches, rates, **settings):
  """Losses of train_step with the adapter's names trained, and the model after it."""
  optimizer = adamw(lambda step: jnp.asarray(rates)[step], 0.9, 0.95, 0.1, 1.0)
  trainable = TRAINED_NAMES["lora"]
  options = {"optimizer": optimizer, "trainable": trainable} | settings
  step = jax.jit(functools.partial(train.train_step, **options))
  losses, zero = [], jnp.int32(0)
  with jax.set_mesh(model.mesh):
    trained, _ = partition(model, trainable_mask(model, trainable))
    state = train.TrainState(zero, zero, zero, model, jax.jit(optimizer.init)(trained))
    for tokens_BT in batches:
      placed = jax.device_put(tokens_BT, jax.sharding.NamedSharding(model.mesh, BATCH))
      state, metrics = step(state, Batch(placed), NextToken())
      losses.append(float(metrics["loss"]))
  return losses, state


def test_training_moves_the_adapter_and_no_bit_of_an_int8_base(base, tokens):
  """With dropout, by a key that is another in each step."""
  settings = LoraSettings(3, 6.0, targets=("c_fc",), dropout=0.5)
  model = with_b(adapted(quantize(base), settings))
  batches = [tokens(2, 13, 61)] * 3
  losses, state = steps(model, batches, [1e-2] * 4, dropout_key=jax.random.key(0))
  assert len(set(losses)) == 3 and np.isfinite(losses).all()
  for (path, old), new in zip(
    jax.tree_util.tree_leaves_with_path(model), jax.tree.leaves(state.model), strict=True
  ):
    if ".lora_" in name_of(path):
      assert (np.asarray(old) != np.asarray(new)).any(), name_of(path)
    else:
      np.testing.assert_array_equal(old, new, err_msg=name_of(path))


def test_twenty_steps_equal_peft_s(base_folder, their_base, tmp_path):
  """From the same a and b = 0: AdamW with decay and clipping, on a matrix of each kind."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  config = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=3,
    lora_alpha=6,
    target_modules=["c_attn", "c_proj"],
    fan_in_fan_out=True,
  )
  theirs = peft.get_peft_model(their_base, config).train()
  theirs.save_pretrained(tmp_path / "start")
  rng = np.random.default_rng(5)
  batches = [rng.integers(0, 61, (4, 13)).astype(np.int32) for _ in range(20)]
  rates = np.linspace(2e-2, 1e-3, 21)

  # torch's own loop: the rate is set before each step.
  parameters = [p for p in theirs.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
  expected = []
  for rate, tokens_BT in zip(rates, batches, strict=False):
    optimizer.param_groups[0]["lr"] = rate
    ids = torch.from_numpy(tokens_BT).long()
    loss = theirs(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    expected.append(loss.item())

  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  model, _ = load_pretrained(str(base_folder), mesh, adapter=str(tmp_path / "start"))
  losses, _ = steps(model, batches, rates)
  np.testing.assert_allclose(losses, expected, atol=1e-4)
  assert losses[0] - losses[-1] > 0.05


def test_each_row_goes_through_its_own_adapter(base, tokens, tmp_path):
  """Of other ranks and targets, and one row through none."""
  tokens_BT, mesh = tokens(4, 12, 61), base.mesh
  lone = [base]
  for index, targets in enumerate([("c_attn",), ("c_proj", "c_fc")]):
    model = with_b(adapted(base, LoraSettings(2 + index, 4.0, targets=targets)), seed=index)
    write_adapter(model, tmp_path / str(index), "base")
    lone.append(model)
  bank = stack_adapters(base, [None, tmp_path / "0", tmp_path / "1"])
  adapter_B = np.array([1, 0, 2, 1])

  @jax.jit
  def hidden(model, tokens_BT, adapter_B):
    context = Context(None, adapter_B)
    return model.hidden(model.embed(tokens_BT), context=context)[0]

  with jax.set_mesh(mesh):
    found = hidden(bank, tokens_BT, jnp.array(adapter_B))
    for row, index in enumerate(adapter_B):
      alone = hidden(lone[index], tokens_BT[row : row + 1], None)
      np.testing.assert_allclose(found[row], alone[0], atol=2e-5)
    with pytest.raises(ValueError, match="bank of 3 adapters"):
      hidden(bank, tokens_BT, None)
  with pytest.raises(ValueError, match="bank"):
    write_adapter(bank, tmp_path / "bank", "base")
  with pytest.raises(ValueError, match="bank"):
    merge_lora(bank)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"rank": 0}, "rank of 0"),
    ({"alpha": 0.0}, "alpha of 0"),
    ({"dropout": 1.0}, "dropout of 1"),
    ({"targets": ("q_proj",)}, "nearest are c_proj"),
    ({"targets": ("c_attn", "wte")}, "no target 'wte'"),
    ({"targets": ()}, "no targets"),
    ({"kind": "ia3"}, "adapter.kind"),
    ({"quantize": "int4"}, "int4"),
    ({"kind": "", "quantize": "int8"}, "is of LoRA"),
  ],
)
def test_settings_that_cannot_be_are_one_line(base, settings, message):
  with jax.set_mesh(base.mesh), pytest.raises(ValueError, match=message) as error:
    add_adapter(base, adapter_settings(**settings), jax.random.key(0))
  assert "\n" not in str(error.value)


def test_a_second_adapter_is_refused(base):
  with pytest.raises(ValueError, match="already"):
    adapted(adapted(base))


@pytest.mark.parametrize("quantized", ["", "int8"])
def test_gpt2_s_optimizer_state_is_below_ten_megabytes(quantized):
  """124M, r = 8 on c_attn and c_proj, without an array: its state, and what is trained."""
  settings = adapter_settings(targets=("c_attn", "c_proj"), quantize=quantized)
  optimizer = adamw(optax.constant_schedule(1e-3), 0.9, 0.95, 0.1, 1.0)

  def initial(key):
    model = add_adapter(GPT2(model_config("124M"), key), settings, key)
    trained, _ = partition(model, trainable_mask(model, TRAINED_NAMES["lora"]))
    return trained, optimizer.init(trained)

  key = jax.random.key(0)
  with jax.sharding.use_abstract_mesh(abstract_mesh(1, 8, 1)):
    trained, opt_state = jax.eval_shape(initial, key)
  sizes = {"c_attn": 768 + 2304, "attn.c_proj": 768 + 768, "mlp.c_proj": 3072 + 768}
  assert sum(x.size for x in jax.tree.leaves(trained)) == 12 * 8 * sum(sizes.values())
  assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state)) < 10e6
