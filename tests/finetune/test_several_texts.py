# SPDX-License-Identifier: Apache-2.0
"""Similarity and choice of GPT-1: packed in rows, against transformers one text at a time."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.data.example_records import write_record
from gpt2_jax.data.pack_examples import encode_examples
from gpt2_jax.data.templates import ExampleEncoder, Template, Turn
from gpt2_jax.finetune.classify import Classifier
from gpt2_jax.finetune.objective import add_configured_head, make_objective
from gpt2_jax.finetune.several_texts import ClassifySeveral, several_log_probs
from gpt2_jax.sharding import BATCH, make_mesh
from gpt2_jax.tokenizer import Characters

ALPHABET = Characters("".join(sorted("<|>abcdefgh")))
CLASSES, LM_WEIGHT, N_CTX = 3, 0.5, 40
TASKS = Template(
  "tasks",
  (Turn("premise", "<", "|"), Turn("hypothesis", "", ">")),
  prompt="premise",
  response="hypothesis",
  special_tokens=(),
  stop=(">",),
)

# (texts, label) of each example; one has fewer answers than there are classes.
EXAMPLES = [
  ([("ab", "cd"), ("ab", "efg"), ("ab", "h")], 2),
  ([("abc", "d"), ("abc", "hh")], 0),
  ([("a", "b"), ("a", "c"), ("a", "dddd")], 1),
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """transformers' GPT-1, off its init, and its folder."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.set_num_threads(1)
  rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
  sizes = {"vocab_size": ALPHABET.vocab_size, "n_positions": N_CTX}
  config = transformers.OpenAIGPTConfig(**sizes, n_embd=16, n_layer=2, n_head=2, **rates)
  model = transformers.OpenAIGPTLMHeadModel(config).eval()
  draw = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += torch.randn(parameter.shape, generator=draw) * 0.2
  folder = tmp_path_factory.mktemp("theirs")
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """The examples packed into rows."""
  documents = []
  for number, (texts, label) in enumerate(EXAMPLES):
    messages = []
    for premise, hypothesis in texts:
      messages.append({"role": "premise", "content": premise})
      messages.append({"role": "hypothesis", "content": hypothesis})
    documents.append(write_record({"messages": messages, "label": label}, f"a:{number}"))
  encoder = ExampleEncoder(TASKS, ALPHABET, "all")
  path = str(tmp_path_factory.mktemp("store") / "examples")
  store = encode_examples(documents, encoder, path, {"kind": "list"}, N_CTX, processes=1)
  return store.read_rows(np.arange(2))


def ids_of(text: tuple[str, str]) -> list[int]:
  premise, hypothesis = text
  return ALPHABET.encode(f"<{premise}|{hypothesis}>")


def expected_sums(theirs, form: str, head_DC) -> dict:
  """The paper's sums, example by example and text by text."""
  torch = pytest.importorskip("torch")
  model, _ = theirs
  sums = dict.fromkeys(("label_loss", "accuracy", "lm_loss", "tokens"), 0.0)
  for texts, label in EXAMPLES:
    logits, lm = [], []
    for text in texts:
      ids = torch.tensor([ids_of(text)])
      with torch.no_grad():
        hidden_TD = model.transformer(ids).last_hidden_state[0]
        predicted = model.lm_head(hidden_TD[:-1])
      lm.append(torch.nn.functional.cross_entropy(predicted, ids[0, 1:]).item())
      logits.append(hidden_TD[-1].numpy() @ head_DC)
    logits_C = np.array(logits)[:, 0] if form == "choice" else np.sum(logits, 0)
    log_p = np.asarray(jax.nn.log_softmax(logits_C))
    sums["label_loss"] -= log_p[label]
    sums["accuracy"] += float(log_p.argmax() == label)
    sums["lm_loss"] += np.mean(lm)
    sums["tokens"] += 1
  return sums | {"nats": sums["label_loss"] + LM_WEIGHT * sums["lm_loss"]}


def classifier_of(theirs, form: str, mesh) -> Classifier:
  model, _ = load_pretrained(str(theirs[1]), mesh)
  settings = ConfigDict({"classes": CLASSES, "form": form})
  with jax.set_mesh(mesh):
    head = add_configured_head(model, settings, jax.random.key(1))
    # A head of N(0, 0.02^2) would tell nothing apart.
    scaled = jax.tree.map(lambda x: x * 50, head.classifier)
  head.classifier = scaled
  return head


@pytest.mark.parametrize("form, sizes", [("choice", (1, 1, 1)), ("similarity", (1, 2, 2))])
def test_packed_rows_have_the_sums_of_single_texts(form, sizes, theirs, rows, put):
  mesh = make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
  model = classifier_of(theirs, form, mesh)
  with jax.set_mesh(mesh):
    batch = jax.tree.map(lambda x: put(x, BATCH), rows)
    sums = jax.device_get(jax.jit(ClassifySeveral(form, CLASSES, LM_WEIGHT))(model, batch))
  head_DC = np.asarray(jax.tree.leaves(model.classifier.w)[0])
  assert head_DC.shape == (16, 1 if form == "choice" else CLASSES)
  for name, value in expected_sums(theirs, form, head_DC).items():
    assert sums[name] == pytest.approx(value, abs=2e-5), name

  # What predicts labels gives the same loss.
  examples = [[ids_of(text) for text in texts] for texts, _ in EXAMPLES]
  log_probs = several_log_probs(model, examples, form)
  nats = -sum(log_p[label] for log_p, (_, label) in zip(log_probs, EXAMPLES, strict=True))
  assert nats == pytest.approx(float(sums["label_loss"]), abs=2e-5)


def config_of(form: str, classes: int) -> ConfigDict:
  classify = {"classes": classes, "form": form, "lm_weight": 0.5}
  return ConfigDict(
    {"classify": classify, "distill": {"teacher": ""}, "z_loss": 0.0, "attention_entropy": 0.0}
  )


def test_a_config_asks_for_several_texts():
  assert make_objective(config_of("choice", 2)) == ClassifySeveral("choice", 2, 0.5)
  with pytest.raises(ValueError, match="classify.form is 'both'; it is one of similarity, choice"):
    make_objective(config_of("both", 2))
  with pytest.raises(ValueError, match="there are no labels; set --config.classify.classes"):
    make_objective(config_of("similarity", 0))
