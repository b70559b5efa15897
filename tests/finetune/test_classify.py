# SPDX-License-Identifier: Apache-2.0
"""GPT-1's classification: against transformers' head and a torch loop over single examples."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.data.example_records import write_record
from gpt2_jax.data.pack_examples import encode_examples
from gpt2_jax.data.templates import PLAIN, ExampleEncoder
from gpt2_jax.finetune.classify import (
  Classifier,
  Classify,
  add_head,
  label_log_probs,
)
from gpt2_jax.finetune.objective import make_objective
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.optimizer import adamw, decayed
from gpt2_jax.sharding import BATCH, make_mesh
from gpt2_jax.tokenizer import Characters

TINY = ModelConfig(n_vocab=61, n_ctx=16, n_embd=16, n_head=2, n_layer=2, dtype="float32")
CLASSES, LM_WEIGHT, RATE, DECAY = 3, 0.5, 1e-3, 0.1

# Lengths of the examples of a row of 16: 3 and 2 positions are padding.
ROWS_OF_LENGTHS = ((5, 8), (4, 3, 7))


def config_of(classes: int, lm_weight: float = 0.5):
  classify = {"classes": classes, "form": "", "lm_weight": lm_weight}
  return ConfigDict(
    {"classify": classify, "distill": {"teacher": ""}, "z_loss": 0.0, "attention_entropy": 0.0}
  )


def names(tree) -> set[str]:
  return {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def examples(seed: int) -> list[list[tuple[list[int], int]]]:
  """(tokens, label) of each example of each row."""
  rng = np.random.default_rng(seed)
  rows = []
  for lengths in ROWS_OF_LENGTHS:
    rows.append([(rng.integers(1, 61, n).tolist(), int(rng.integers(CLASSES))) for n in lengths])
  return rows


def packed(rows, put) -> Batch:
  """Examples side by side: the last row of tokens is never an input."""
  shape = len(rows), TINY.n_ctx
  tokens = np.zeros((len(rows), TINY.n_ctx + 1), np.int32)
  segments, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
  weights, labels = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
  for row, pairs in enumerate(rows):
    begin = 0
    for segment, (ids, label) in enumerate(pairs):
      end = begin + len(ids)
      tokens[row, begin:end] = ids
      segments[row, begin:end] = segment
      positions[row, begin:end] = np.arange(len(ids))
      weights[row, begin : end - 1] = 1
      labels[row, end - 1] = label
      begin = end
  arrays = [put(x, BATCH) for x in (tokens, weights, segments, positions, labels)]
  return Batch(*arrays[:4], extras={"labels_BT": arrays[4]})


@pytest.fixture(scope="module")
def classifier(mesh, parameters, place):
  arrays = parameters(TINY)
  with mesh(1, 1, 1):
    return add_head(place(TINY, arrays), CLASSES, jax.random.key(1))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """transformers' classifier, every tensor off its init, and the folder of its trunk."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  config = transformers.GPT2Config(
    vocab_size=61, n_positions=16, n_embd=16, n_head=2, n_layer=2, num_labels=CLASSES,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, pad_token_id=0,
  )  # fmt: skip
  torch.set_num_threads(1)  # several would wait for each other, where cores are few
  draw = torch.Generator().manual_seed(0)
  model = transformers.GPT2ForSequenceClassification(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
  folder = tmp_path_factory.mktemp("trunk")
  trunk = transformers.GPT2LMHeadModel(config)
  trunk.transformer.load_state_dict(model.transformer.state_dict())
  trunk.save_pretrained(folder)
  return model, folder


def ours_of(theirs, devices: int = 1):
  """Our classifier with their weights."""
  model, folder = theirs
  mesh = make_mesh(1, devices, 1, jax.devices()[:devices])
  trunk, _ = load_pretrained(str(folder), mesh)
  with jax.set_mesh(mesh):
    ours = add_head(trunk, CLASSES, jax.random.key(0))
    head = jax.tree.leaves(ours.classifier.w)[0]
    w_DC = jax.device_put(model.score.weight.detach().numpy().T, head.sharding)
    mask = trainable_mask(ours, ("classifier",))
    return jax.tree.map(lambda x, is_head: w_DC if is_head else x, ours, mask)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_logits_are_those_of_transformers_head_on_the_last_token(theirs, devices):
  torch = pytest.importorskip("torch")
  ids = [example for row in examples(0) for example, _ in row]
  log_p = label_log_probs(ours_of(theirs, devices), ids, batch_size=3)
  with torch.no_grad():
    expected = [theirs[0](torch.tensor([row])).logits.log_softmax(-1)[0].numpy() for row in ids]
  np.testing.assert_allclose(log_p, expected, atol=1e-5)


def torch_losses(theirs, batches) -> list[float]:
  """GPT-1's loss, example by example, with AdamW."""
  torch = pytest.importorskip("torch")
  model = theirs[0]
  groups = [
    {"params": [p for p in model.parameters() if (p.ndim == 2) == is_matrix], "weight_decay": decay}
    for is_matrix, decay in ((True, DECAY), (False, 0.0))
  ]
  optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, foreach=False)

  def loss_of(ids, label):
    ids = torch.tensor([ids])
    hidden = model.transformer(ids).last_hidden_state[0]
    logits = hidden[:-1] @ model.transformer.wte.weight.T
    lm = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    label_loss = torch.nn.functional.cross_entropy(model.score(hidden[-1:]), torch.tensor([label]))
    return label_loss + LM_WEIGHT * lm

  losses = []
  for rows in batches:
    loss = torch.stack([loss_of(*example) for row in rows for example in row]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
  return losses


def test_twenty_steps_equal_a_torch_loop(theirs, put):
  """Packed rows here, single examples there; the same AdamW, without a clip."""
  model = ours_of(theirs)
  batches = [examples(seed) for seed in range(20)]
  optimizer = adamw(lambda step: RATE, 0.9, 0.95, DECAY, 0.0)
  step = jax.jit(functools.partial(train.train_step, optimizer=optimizer))
  losses = []
  with jax.set_mesh(model.mesh):
    zero = jnp.int32(0)
    state = train.TrainState(zero, zero, zero, model, jax.jit(optimizer.init)(model))
    for rows in batches:
      state, metrics = step(state, packed(rows, put), Classify(CLASSES, LM_WEIGHT))
      losses.append(float(metrics["loss"]))
      parts = metrics["label_loss"] + LM_WEIGHT * metrics["lm_loss"]
      assert losses[-1] == pytest.approx(float(parts), rel=1e-6)
  np.testing.assert_allclose(losses, torch_losses(theirs, batches), atol=1e-4)


def test_packed_examples_sum_to_those_alone_on_any_mesh(mesh, parameters, place, put):
  """Where a row is one example there are no segments; labels of none are -1."""
  rows, arrays, objective = examples(3), parameters(TINY), jax.jit(Classify(CLASSES, LM_WEIGHT))
  rows = [*rows, []]  # a row that only fills the batch
  rows.append([])
  sums = {}
  for sizes in ((1, 1, 1), (1, 2, 2)):
    with mesh(*sizes):
      model = jax.jit(add_head, static_argnums=1)(place(TINY, arrays), CLASSES, jax.random.key(1))
      sums[sizes] = jax.device_get(objective(model, packed(rows, put)))
      if sizes == (1, 1, 1):
        single = packed([[example] for row in rows for example in row], put)
        single = dataclasses.replace(single, segments_BT=None, positions_BT=None)
        alone = jax.device_get(objective(model, single))
  assert alone["tokens"] == 5 == sums[1, 2, 2]["tokens"]
  for name, value in alone.items():
    assert value == pytest.approx(sums[1, 1, 1][name], rel=1e-5), name
    assert value == pytest.approx(sums[1, 2, 2][name], rel=1e-5), name


def test_accuracy_counts_the_largest_logit(classifier, put):
  rows = examples(1)
  with jax.set_mesh(classifier.mesh):
    sums = jax.jit(Classify(CLASSES))(classifier, packed(rows, put))
  pairs = [example for row in rows for example in row]
  best = label_log_probs(classifier, [ids for ids, _ in pairs]).argmax(-1)
  assert float(sums["accuracy"]) == sum(best == [label for _, label in pairs])


def test_the_head_is_one_more_parameter_of_a_model_that_keeps_its_arrays(classifier, mesh):
  with mesh(1, 1, 1):
    _, trunk = partition(classifier, trainable_mask(classifier, ("classifier",)))
    assert names(partition(classifier, decayed(classifier))[0]) >= {"classifier.w", "wte"}
    assert add_head(classifier, CLASSES, jax.random.key(0)) is classifier
    assert add_head(classifier, 0, jax.random.key(0)) is classifier
    other = add_head(classifier, 5, jax.random.key(0))
    abstract = jax.eval_shape(lambda model: add_head(model, 4, jax.random.key(0)), classifier)
  assert names(classifier) - names(trunk) == {"classifier.w"} and other.classes == 5
  assert other.wte is classifier.wte and other.h is classifier.h
  assert isinstance(abstract, Classifier) and abstract.classes == 4


def test_without_its_weight_the_language_model_is_not_computed(classifier, put):
  with jax.set_mesh(classifier.mesh):
    batch = packed(examples(0), put)
    shapes = jax.eval_shape(Classify(CLASSES, 0.0), classifier, batch)
    program = str(jax.make_jaxpr(Classify(CLASSES, 0.0))(classifier, batch))
  assert "lm_loss" not in shapes and "128]" not in program.replace("128,16]", "")


def test_a_config_chooses_the_objective():
  assert make_objective(config_of(0)) == NextToken()
  assert make_objective(config_of(3, 0.25)) == Classify(3, 0.25)


@pytest.mark.parametrize("rows, message", [([[1], []], "row 1 has 0 t"), ([[1] * 17], "17 tokens")])
def test_rows_that_cannot_be_are_refused(classifier, rows, message):
  with pytest.raises(ValueError, match=message):
    label_log_probs(classifier, rows)


def test_one_class_and_a_model_without_a_head_are_refused(classifier):
  with pytest.raises(ValueError, match="classify.classes of 1 leaves nothing"):
    make_objective(config_of(1))
  with pytest.raises(ValueError, match="classify.classes of 1 leaves nothing"):
    add_head(classifier, 1, jax.random.key(0))
  with pytest.raises(ValueError, match="has no head for labels"):
    label_log_probs(object(), [[1]])


def write_labelled(folder, name: str, n: int, seed: int) -> str:
  """A store of texts over a to f, whose label says which of its first two characters is larger."""
  rng = np.random.default_rng(seed)
  documents = []
  for index in range(n):
    text = "".join(rng.choice(list("abcdef"), 5, replace=False))
    record = {"text": text, "label": int(text[0] > text[1])}
    documents.append(write_record(record, f"{name}.jsonl:{index + 1}"))
  encoder = ExampleEncoder(PLAIN, Characters("abcdef"))
  options = {"n_ctx": 16, "processes": 1, "source": {"kind": "list"}}
  encode_examples(documents, encoder, str(folder / name), **options)
  return str(folder / name)


@pytest.fixture
def one_device(monkeypatch):
  """A run takes one device: compiling for eight takes longer, and shows nothing more here."""
  devices = jax.devices()
  monkeypatch.setattr(jax, "devices", lambda *backend: devices[:1])


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
  """A config that trains a classifier from random weights on 400 labelled examples."""
  folder = tmp_path_factory.mktemp("labelled")
  (folder / "letters.json").write_text(json.dumps(Characters("abcdef").to_json()))
  config = gpt2.get_config("117M")
  config.model.update(dataclasses.asdict(dataclasses.replace(TINY, n_vocab=6)))
  config.data.update(
    train=write_labelled(folder, "train", 400, 0),
    validation=write_labelled(folder, "validation", 60, 1),
    tokenizer=str(folder / "letters.json"),
  )
  config.classify.update(classes=2, lm_weight=0.1)
  config.update(steps=120, warmup_steps=10, batch_size=16, learning_rate=1e-2, steps_per_call=60)
  config.update(log_every=60, eval_every=120, save_every=120)
  return config


def test_a_run_learns_labels_and_its_checkpoint_is_a_classifier(
  one_device, run_config, tmp_path, mesh
):
  state = train.run(run_config, str(tmp_path / "run"))
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  last = [line for line in map(json.loads, lines) if "accuracy" in line][-1]
  assert last["accuracy"] > 0.9 and last["label_loss"] < 0.3
  [validation] = [line for line in map(json.loads, lines) if "val_loss" in line]
  parts = validation["val_label_loss"] + 0.1 * validation["val_lm_loss"]
  assert validation["val_loss"] == pytest.approx(parts) and validation["val_accuracy"] > 0.8

  with mesh(1, 1, 1):
    model, _ = load_pretrained(str(tmp_path / "run"))
  rows = [[0, 1, 2, 3, 4], [5, 1, 2], [3, 4, 0, 1]]
  log_p = label_log_probs(model, rows)
  np.testing.assert_array_equal(log_p, label_log_probs(state.model, rows))


@pytest.mark.parametrize(
  "classes, message",
  [(5, "has no labels"), (1, "nothing to tell apart"), (2, "labels up to 2")],
)
def test_labels_that_are_not_the_heads_are_refused_at_the_start(
  classes, message, one_device, run_config, tmp_path
):
  folder = tmp_path / "store"
  labels = {} if classes == 5 else {"label": 2}
  documents = [write_record({"text": "abc"} | labels, "a.jsonl:1")]
  encoder = ExampleEncoder(PLAIN, Characters("abcdef"))
  encode_examples(documents, encoder, str(folder), n_ctx=16, processes=1, source={"kind": "list"})
  config = copy.deepcopy(run_config)
  config.data.validation = str(folder)
  config.classify.classes = classes
  with pytest.raises(ValueError, match=message) as error:
    train.run(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
