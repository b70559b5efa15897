# SPDX-License-Identifier: Apache-2.0
"""GPT-1 against transformers: logits, gradients, greedy text, files; training through a config."""

import dataclasses
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

from configs import gpt1, gpt2
from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.convert import gpt1_files, names
from gpt2_jax.convert.pretrained import load_pretrained, open_weights, write
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.data import encode_corpus
from gpt2_jax.decoding import generate
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.finetune.classify import add_head, label_log_probs
from gpt2_jax.finetune.init_from import open_origin, resolve_model
from gpt2_jax.gpt1 import GPT1, new_model
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import GPT2, ModelConfig, name_of
from gpt2_jax.sharding import BATCH, abstract_mesh, make_mesh
from gpt2_jax.sizes import GPT1_CONFIG, SIZES
from gpt2_jax.tokenizer import Characters, train_characters

# Heads of 64 columns, as OpenAI's files take for granted.
SIZES_OF_TINY = {"n_embd": 128, "n_head": 2, "n_layer": 2}
RATES = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
TINY = ModelConfig(n_vocab=97, n_ctx=24, **SIZES_OF_TINY, dtype="float32", family="gpt1")


@pytest.fixture(scope="module")
def theirs():
  """transformers' GPT-1 with every tensor off its init."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.set_num_threads(1)
  config = transformers.OpenAIGPTConfig(vocab_size=97, n_positions=24, **SIZES_OF_TINY, **RATES)
  model = transformers.OpenAIGPTLMHeadModel(config).eval()
  draw = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += torch.randn(parameter.shape, generator=draw) * 0.1
  return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
  path = tmp_path_factory.mktemp("theirs") / "openai-gpt"
  theirs.save_pretrained(path)
  return path


def their_loss_and_gradients(theirs, tokens_BT):
  """Loss and gradients by canonical names, matrices as they lie in Hugging Face's files."""
  torch = pytest.importorskip("torch")
  ids = torch.tensor(tokens_BT).long()
  theirs.zero_grad()
  logits = theirs(ids[:, :-1]).logits
  loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
  loss.backward()
  tensors = dict(theirs.transformer.named_parameters())
  canonical = {}
  for name in names.shapes(TINY):
    canonical[name] = tensors[names.hugging_face_name(name, TINY)].grad.numpy()
  return loss.item(), canonical


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_logits_loss_and_gradients_are_transformers(sizes, theirs, folder, tokens, put):
  tokens_BT = tokens(4, 25, 97)
  mesh = make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
  model, _ = load_pretrained(str(folder), mesh)

  @jax.jit
  def logits_and_gradients(model, tokens_BT):
    loss = lambda model: mean_loss(NextToken(), model, Batch(tokens_BT))[0]  # noqa: E731
    return model(tokens_BT[:, :-1]), *jax.value_and_grad(loss)(model)

  with jax.set_mesh(mesh):
    logits_BTV, loss, gradients = logits_and_gradients(model, put(tokens_BT, BATCH))
  expected_loss, expected = their_loss_and_gradients(theirs, tokens_BT)
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    their_logits = theirs(torch.tensor(tokens_BT[:, :-1]).long()).logits.numpy()
  np.testing.assert_allclose(np.asarray(logits_BTV)[..., :97], their_logits, atol=1e-5)
  assert float(loss) == pytest.approx(expected_loss, abs=1e-5)
  actual = from_model(gradients, None)
  for name, gradient in expected.items():
    np.testing.assert_allclose(actual.read(name), gradient, atol=1e-5, err_msg=name)


def test_greedy_text_is_transformers(theirs, folder):
  torch = pytest.importorskip("torch")
  model, _ = load_pretrained(str(folder), make_mesh(1, 1, 1, jax.devices()[:1]))
  prompts = [[5, 17, 3], [60, 2, 9, 9, 31]]
  for prompt, completion in zip(prompts, generate(model, prompts, 10), strict=True):
    ids = torch.tensor([prompt])
    text = theirs.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert completion.tokens == text[0, len(prompt) :].tolist()


def test_scores_are_transformers(theirs, folder):
  """Continuations that share a context in one row, too."""
  torch = pytest.importorskip("torch")
  model, _ = load_pretrained(str(folder), make_mesh(1, 1, 1, jax.devices()[:1]))
  context = [5, 17, 3, 40, 41, 42, 43, 44]
  pairs = [(context, [9, 2]), (context, [60]), ([8], [1, 1, 1])]
  scores = Scorer(model, train_characters(["ab"]), batch_size=2).loglikelihoods(pairs)
  for (before, after), score in zip(pairs, scores, strict=True):
    with torch.no_grad():
      log_p_TV = theirs(torch.tensor([before + after])).logits[0].log_softmax(-1)
    expected = sum(log_p_TV[len(before) - 1 + i, token].item() for i, token in enumerate(after))
    assert score.nats == pytest.approx(-expected, abs=1e-4)


# A layer's variables in the order in which OpenAI's train.py makes them, by transformers' names.
ORDER = ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")


def test_shards_as_openai_lays_them_out_are_the_model(theirs, folder, tmp_path):
  """Flat float32 arrays, cut anywhere: positions, tokens, and for each variable its w or g, then
  its b."""
  state = theirs.transformer.state_dict()
  tensors = [state["positions_embed.weight"], state["tokens_embed.weight"]]
  for layer in range(2):
    for module in ORDER:
      weight, bias = (state[f"h.{layer}.{module}.{kind}"] for kind in ("weight", "bias"))
      tensors += [weight[None] if weight.ndim == 2 else weight, bias]
  shapes = [list(tensor.shape) for tensor in tensors]
  (tmp_path / "params_shapes.json").write_text(json.dumps(shapes))
  flat = np.concatenate([tensor.numpy().ravel() for tensor in tensors])
  for number, part in enumerate(np.split(flat, [1000, 1001, 60_000])):
    np.save(tmp_path / f"params_{number}.npy", part)
  weights = open_weights(str(tmp_path))
  assert weights.config == dataclasses.replace(GPT1_CONFIG, n_vocab=97, n_ctx=24, **SIZES_OF_TINY)
  assert weights_sha256(weights) == weights_sha256(open_weights(str(folder)))


def test_shards_become_a_folder_and_shards_again(folder, tmp_path):
  """The same SHA-256 in every format, and in the shards the same bytes."""
  expected = weights_sha256(open_weights(str(folder)))
  write(open_weights(str(folder)), str(tmp_path / "shards"), "gpt1")
  write(open_weights(str(tmp_path / "shards")), str(tmp_path / "hf"), "hf")
  weights = dataclasses.replace(open_weights(str(tmp_path / "hf")), tokenizer=Characters("ab"))
  write(weights, str(tmp_path / "again"), "gpt1")
  assert open_weights(str(tmp_path / "again")).tokenizer == Characters("ab")
  for name in ("shards", "hf", "again"):
    assert weights_sha256(open_weights(str(tmp_path / name))) == expected
  for number in range(10):
    file = f"params_{number}.npy"
    assert (tmp_path / "shards" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_what_is_written_transformers_loads_whole(folder, theirs, tmp_path, tokens):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  write(open_weights(str(folder)), str(tmp_path / "hf"), "hf")
  loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "hf", output_loading_info=True
  )
  assert type(loaded) is type(theirs)
  assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  ids = torch.tensor(tokens(1, 24, 97)).long()
  with torch.no_grad():
    assert torch.equal(loaded.eval()(ids).logits, theirs(ids).logits)


def test_the_published_shapes_are_gpt1s():
  if "GPT2_JAX_TEST_DATA" not in os.environ:
    pytest.skip("GPT2_JAX_TEST_DATA is not set: no shapes of OpenAI's files")
  published = pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"], "gpt1", gpt1_files.SHAPES)
  shapes = json.loads(published.read_text())
  assert list(gpt1_files._file_shapes(GPT1_CONFIG).values()) == shapes
  assert GPT1_CONFIG.n_params == sum(map(np.prod, shapes)) == 116_534_784
  assert gpt1_files._model_config(shapes, published) == GPT1_CONFIG


def test_the_init_is_0_02_for_every_matrix_and_table(mesh):
  narrow = dataclasses.replace(TINY, n_embd=64)
  with mesh(1, 1, 1):
    model = jax.jit(new_model, static_argnums=0)(narrow, jax.random.key(0))
  assert isinstance(model, GPT1)
  n_params = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    name = name_of(path)
    values = np.asarray(leaf)[:97] if name == "wte" else np.asarray(leaf)
    n_params += values.size
    if name in ("wte", "wpe") or name.endswith(".w"):
      assert values.std() == pytest.approx(0.02, rel=0.05), name
    else:
      assert (values == name.endswith(".g")).all(), name
  assert n_params == narrow.n_params


def test_the_family_decides_which_model_is_built():
  with jax.sharding.use_abstract_mesh(abstract_mesh(1, 1, 1)):
    built = [
      jax.eval_shape(lambda c=c: new_model(c, jax.random.key(0))) for c in (TINY, SIZES["117M"])
    ]
  assert [type(model) for model in built] == [GPT1, GPT2]
  with pytest.raises(ValueError, match="family is 'gpt3'; it is one of gpt2, gpt1"):
    dataclasses.replace(TINY, family="gpt3")


def test_a_head_reads_the_last_block(folder, theirs):
  """GPT-1's own fine-tuning: the head is on what transformers calls the last hidden state."""
  torch = pytest.importorskip("torch")
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  model, _ = load_pretrained(str(folder), mesh)
  with jax.set_mesh(mesh):
    classifier = add_head(model, 3, jax.random.key(0))
  w_DC = np.asarray(jax.tree.leaves(classifier.classifier.w)[0])
  with torch.no_grad():
    hidden_D = theirs.transformer(torch.tensor([[4, 8, 15]])).last_hidden_state[0, -1].numpy()
  expected = jax.nn.log_softmax(hidden_D @ w_DC)
  np.testing.assert_allclose(label_log_probs(classifier, [[4, 8, 15]])[0], expected, atol=1e-5)


# ---- a run


TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(2000))


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  tokenizer = train_characters([TEXT])
  (folder / "characters.json").write_text(json.dumps(tokenizer.to_json()))
  encode_corpus([TEXT], tokenizer, str(folder / "text"), {"made": "for a test"}, processes=1)
  config = gpt1.get_config()
  sizes = {"n_vocab": 23, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
  config.model.update(sizes | RATES, dtype="float32")
  config.data.update(train=str(folder / "text"), validation=str(folder / "text"))
  config.data.tokenizer = str(folder / "characters.json")
  config.update(steps=40, batch_size=8, learning_rate=1e-2, warmup_steps=5, steps_per_call=10)
  config.update(log_every=10, eval_every=40, eval_windows=8, save_every=40)
  return config


@pytest.fixture
def one_device(monkeypatch):
  """A run takes one device: compiling for eight takes longer, and shows nothing more here."""
  devices = jax.devices()
  monkeypatch.setattr(jax, "devices", lambda *backend: devices[:1])


def test_a_run_trains_a_gpt1_and_its_workdir_is_one(one_device, run_config, tmp_path):
  workdir = tmp_path / "run"
  state = train.run(run_config, str(workdir))
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if "loss" in line]
  assert isinstance(state.model, GPT1) and losses[-1] < losses[0] - 0.1

  # 1. It loads as what it is.
  model, tokenizer = load_pretrained(str(workdir))
  assert isinstance(model, GPT1) and tokenizer.vocab_size == 23
  loaded, trained = (weights_sha256(from_model(x, None)) for x in (model, state.model))
  assert loaded == trained

  # 2. It goes on as no other model.
  other = run_config.copy_and_resolve_references()
  other.model.family = "gpt2"
  with pytest.raises(ValueError, match="model.family: gpt1 -> gpt2"):
    train.run(other, str(workdir))

  # 3. Fine-tuning takes its architecture from it, and refuses another.
  origin = open_origin(str(workdir))
  finetune = gpt2.get_config()
  finetune.model.update(dict(run_config.model), family="gpt2")
  with pytest.raises(ValueError, match="has family gpt1, and model.family is gpt2"):
    resolve_model(finetune, origin)


# ---- bad input: one line each


@pytest.fixture
def shards(folder, tmp_path):
  """A folder of OpenAI's files that a test may damage."""
  path = tmp_path / "shards"
  write(open_weights(str(folder)), str(path), "gpt1")
  return path


def refused(path, message: str) -> None:
  with pytest.raises(ValueError, match=message) as error:
    weights_sha256(open_weights(str(path)))
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def change_shapes(path, index: int, shape) -> None:
  shapes = json.loads((path / gpt1_files.SHAPES).read_text())
  shapes[index] = shape
  (path / gpt1_files.SHAPES).write_text(json.dumps(shapes))


@pytest.mark.parametrize(
  "index, shape, message",
  [
    (4, [1, 128, 127], r"has \[1, 128, 127\] as tensor 4, .* h.0.attn.c_proj.w, \[1, 128, 128\]"),
    (1, [98, 128], "has 412,032 numbers in its 10 files params_.*npy, and .* asks for 412,160"),
    (0, [24, 100], "positions .n_ctx, D., tokens .n_vocab, D. and 12 a layer"),
    (3, "384", "has 384 where the shape of a tensor has to be"),
    (3, [True], "where the shape of a tensor has to be"),
    (3, [10**9], "where the shape of a tensor has to be"),
  ],
)
def test_shapes_of_no_gpt1_are_refused(index, shape, message, shards):
  change_shapes(shards, index, shape)
  refused(shards, message)


def test_files_that_are_not_there_or_not_floats_are_refused(shards):
  (shards / "params_9.npy").unlink()
  refused(shards, "numbers in its 9 files")
  (shards / "params_3.npy").rename(shards / "params_10.npy")
  refused(shards, "files params_.*npy number 0; 1; 2; 4|number 0, 1, 2, 4")
  (shards / "params_10.npy").rename(shards / "params_3.npy")
  np.save(shards / "params_3.npy", np.arange(5))
  refused(shards, "params_3.npy is int64 .5., and a part of GPT-1 is one row of floats")
  np.save(shards / "params_3.npy", np.array([{}]), allow_pickle=True)
  refused(shards, "params_3.npy is no whole .npy file")
  content = (shards / "params_2.npy").read_bytes()
  (shards / "params_2.npy").write_bytes(content[:-100])
  refused(shards, "params_2.npy is no whole .npy file")


def test_a_file_of_shapes_that_is_none_is_refused(shards):
  for text in ("", "{}", "[]", "[[1, 2], 3]", "[[]]", "nonsense"):
    (shards / gpt1_files.SHAPES).write_text(text)
    refused(shards, re.escape(gpt1_files.SHAPES))


def test_formats_that_have_no_place_for_a_model_are_refused(folder, tmp_path):
  gpt1_weights = open_weights(str(folder))
  for form in ("nanogpt", "llmc"):
    with pytest.raises(ValueError, match=f"{form} computes a GPT-2, and this is a GPT-1"):
      write(gpt1_weights, str(tmp_path / form), form)
  narrow = ModelConfig(n_vocab=23, n_ctx=8, n_embd=16, n_head=2, n_layer=1, dtype="float32")
  with pytest.raises(ValueError, match="hold a GPT-1, and this is a GPT-2"):
    write(dataclasses.replace(gpt1_weights, config=narrow), str(tmp_path / "a"), "gpt1")
  narrow = dataclasses.replace(narrow, family="gpt1")
  with pytest.raises(ValueError, match="64 columns there, and the model's have 8"):
    write(dataclasses.replace(gpt1_weights, config=narrow), str(tmp_path / "b"), "gpt1")
  with pytest.raises(ValueError, match="no bfloat16 in NumPy's files; take float32 or float16"):
    write(gpt1_weights, str(tmp_path / "c"), "gpt1", "bfloat16")
  assert not any((tmp_path / name).exists() for name in ("nanogpt", "llmc", *"abc"))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"afn": "relu"}, "departs from GPT-2 .afn='relu'"),
    ({"layer_norm_epsilon": 1e-6}, "departs from GPT-2 .layer_norm_epsilon=1e-06"),
    ({"n_layer": 3}, "missing: h.2.ln_1"),
    ({"model_type": "gpt2"}, "missing: wte.weight, wpe.weight, ln_f"),
  ],
)
def test_a_config_of_another_model_is_refused(fields, message, folder, tmp_path):
  (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
  payload = json.loads((folder / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(payload | fields))
  refused(tmp_path, message)
