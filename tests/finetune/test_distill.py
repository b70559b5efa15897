# SPDX-License-Identifier: Apache-2.0
"""Distillation: losses and gradients as Hugging Face's formula gives them in torch; any mesh, a
vocabulary that is split and never gathered, teachers of other dtypes; a run, and its resume."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import distill as distill_config
from configs import gpt2
from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.convert import pretrained
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.data import encode_corpus
from gpt2_jax.finetune.distill import Distill, DistillationWeights, as_teacher, distillation_nats
from gpt2_jax.finetune.objective import make_objective
from gpt2_jax.loss import mean_loss
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.runs.origin import resolve_planned, take_layers
from gpt2_jax.runs.teacher import abstract_objective
from gpt2_jax.sharding import BATCH, make_mesh
from gpt2_jax.tokenizer import Characters
from tests.finetune.conftest import N_CTX, N_VOCAB

TEACHER = ModelConfig(N_VOCAB, N_CTX, 24, 3, 3, dtype="float32", pad_heads=True)
STUDENT = dataclasses.replace(TEACHER, n_layer=1)


@pytest.fixture(scope="module")
def batch(tokens):
  """Eight rows, some of whose tokens do not count."""
  weights_BT = (np.random.default_rng(2).random((8, N_CTX)) < 0.8).astype(np.float32)
  return tokens(8, N_CTX + 1, N_VOCAB), weights_BT


def grads_by_name(model, gradient) -> dict[str, np.ndarray]:
  """A gradient shaped like a model, under the names and in the layout of Hugging Face's."""
  copy = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(gradient))
  weights = from_model(copy, None)
  arrays = {"wte": weights.read("wte"), "wpe": weights.read("wpe")}
  for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
    for part in ("w", "b"):
      arrays[f"h.0.{name}.{part}"] = weights.read(f"h.0.{name}.{part}")
  for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
    for part in ("g", "b"):
      arrays[f"{name}.{part}"] = weights.read(f"{name}.{part}")
  return arrays


def torch_loss_and_grads(student, teacher, tokens_BT, mask_BT, T, kl_weight, lm_weight, cos_weight):
  """distiller.py of transformers' examples/research_projects/distillation, for GPT-2."""
  torch = pytest.importorskip("torch")
  inputs, labels = torch.from_numpy(tokens_BT).long().split([N_CTX, 1], 1)
  labels = torch.cat([inputs[:, 1:], labels], 1)
  mask = torch.from_numpy(mask_BT).bool()
  with torch.no_grad():
    theirs = teacher(inputs, output_hidden_states=True)
  ours = student(inputs, output_hidden_states=True)

  kl = torch.nn.KLDivLoss(reduction="batchmean")(
    torch.nn.functional.log_softmax(ours.logits[mask] / T, dim=-1),
    torch.nn.functional.softmax(theirs.logits[mask] / T, dim=-1),
  )
  lm = torch.nn.functional.cross_entropy(ours.logits[mask], labels[mask])
  x, y = ours.hidden_states[-1][mask], theirs.hidden_states[-1][mask]
  cos = torch.nn.CosineEmbeddingLoss(reduction="mean")(x, y, torch.ones(len(x)))
  loss = kl_weight * kl * T**2 + lm_weight * lm + cos_weight * cos
  loss.backward()

  grads = {}
  for name, parameter in student.named_parameters():
    name = name.removeprefix("transformer.").replace(".bias", ".b")
    grads[re.sub(r"(ln_\w+)\.weight", r"\1.g", name).replace(".weight", ".w")] = parameter.grad
  grads["wte"], grads["wpe"] = grads.pop("wte.w"), grads.pop("wpe.w")
  return [x.item() for x in (loss, kl, lm, cos)], {n: g.numpy() for n, g in grads.items()}


@pytest.mark.parametrize("weights", [(2.0, 5.0, 2.0, 1.0), (1.0, 1.0, 0.0, 0.0)])
def test_loss_and_gradients_equal_torch(
  weights, base_folder, their_base, batch, mesh, put, tmp_path
):
  """Of a student of one layer and its teacher of two, both written by transformers."""
  transformers = pytest.importorskip("transformers")
  config = transformers.GPT2Config(**their_base.config.to_diff_dict() | {"n_layer": 1})
  config.initializer_range = 0.3
  transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
  their_student = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
  expected, their_grads = torch_loss_and_grads(their_student, their_base, *batch, *weights)

  with mesh(1, 1, 1):
    teacher, _ = pretrained.load_pretrained(str(base_folder))
    student, _ = pretrained.load_pretrained(str(tmp_path))
    loss = jax.jit(jax.value_and_grad(functools.partial(loss_of, *weights), has_aux=True))
    (nats, sums), gradient = loss(student, teacher, Batch(*(put(x, BATCH) for x in batch)))
  assert float(nats) == pytest.approx(expected[0], rel=1e-5)
  for name, value in zip(("kl", "lm", "cos"), expected[1:], strict=True):
    if name in sums:
      assert float(sums[name] / sums["tokens"]) == pytest.approx(value, abs=1e-5)
  ours = grads_by_name(student, gradient)
  assert ours.keys() == their_grads.keys()
  for name, theirs in their_grads.items():
    np.testing.assert_allclose(ours[name], theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def loss_of(temperature, kl, lm, cos, model, teacher, batch):
  return mean_loss(Distill(teacher, temperature, kl, lm, cos), model, batch)


@pytest.fixture(scope="module")
def arrays(parameters):
  return parameters(TEACHER, seed=3), parameters(STUDENT, seed=4)


@functools.partial(jax.jit, static_argnums=3)
def sums_and_gradients(model, objective, batch, microbatches):
  return train.gradients(objective, model, jax.tree.map(lambda _: None, model), batch, microbatches)


def on_mesh(arrays, batch, place, put, microbatches, sharded=True):
  """A loss by its parts and the gradient on the mesh in force, and the compiled program's text."""
  settings = ConfigDict({"dtype": "float32", "sharded": sharded})
  teacher = as_teacher(place(TEACHER, arrays[0]), settings)
  student = place(STUDENT, arrays[1])
  placed = Batch(*(put(x, BATCH) for x in batch))
  compiled = sums_and_gradients.lower(student, Distill(teacher), placed, microbatches).compile()
  sums, gradient = compiled(student, Distill(teacher), placed)
  return jax.device_get(sums), gradient, compiled.as_text()


@pytest.fixture(scope="module")
def on_one_device(arrays, batch, place, put, mesh, unpadded):
  with mesh(1, 1, 1):
    sums, gradient, _ = on_mesh(arrays, batch, place, put, 1)
    return sums, unpadded(gradient, arrays[1])


@pytest.mark.parametrize(
  "sizes, microbatches, sharded", [((1, 1, 8), 1, True), ((2, 2, 2), 2, False)]
)
def test_any_mesh_gives_one_loss_and_gathers_no_vocabulary(
  sizes, microbatches, sharded, on_one_device, arrays, batch, place, put, mesh, unpadded
):
  """With padded heads and a padded vocabulary, whose gradients are zero; in microbatches, too, and
  with a teacher that is whole on each part of the batch."""
  expected, expected_gradient = on_one_device
  with mesh(*sizes):
    sums, gradient, program = on_mesh(arrays, batch, place, put, microbatches, sharded)
    vocabulary = STUDENT.padded_vocab
  for name in expected:
    assert sums[name] == pytest.approx(expected[name], rel=1e-5), name
  for name, array in unpadded(gradient, arrays[1]).items():
    np.testing.assert_allclose(array, expected_gradient[name], atol=1e-5, err_msg=name)

  # An array of the vocabulary, whole, for each token of a row would be [b, T, V]; the table is not.
  gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", program)
  assert gathered or sizes == (1, 1, 8), "FSDP gathers parameters"
  for shape in gathered:
    dimensions = [int(size) for size in shape.split(",")]
    assert not {vocabulary, N_CTX} <= set(dimensions), shape


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(
  arrays, batch, place, put, mesh
):
  with mesh(1, 1, 1):
    teacher = place(TEACHER, arrays[0])
    loss = jax.jit(jax.value_and_grad(functools.partial(loss_of, 3.0, 1.0, 0.0, 1.0), has_aux=True))
    (nats, sums), gradient = loss(teacher, teacher, Batch(*(put(x, BATCH) for x in batch)))
  assert abs(float(nats)) < 1e-5 and abs(float(sums["cos"])) < 1e-3 and float(sums["lm"]) > 100
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-5


def test_only_the_gradient_of_the_logits_is_kept_in_the_dtype_of_its_matmul(mesh):
  shape = jax.ShapeDtypeStruct((2, 8, 128), jnp.float32)

  def pullback(logits, teacher, labels):
    weights = DistillationWeights(2.0, 5.0, 2.0)
    nats = lambda z: distillation_nats(z, teacher, labels, 100, weights, jnp.bfloat16)[0]  # noqa: E731
    return jax.vjp(nats, logits)[1]

  with mesh(1, 1, 1):
    kept = jax.eval_shape(pullback, shape, shape, jax.ShapeDtypeStruct((2, 8), jnp.int32))
  of_logits = [x.dtype for x in jax.tree.leaves(kept) if x.shape == shape.shape]
  assert of_logits == [jnp.bfloat16]


@pytest.mark.parametrize("dtype, sharded", [("float32", False), ("bfloat16", True), ("int8", True)])
def test_a_teacher_is_kept_in_its_dtype_and_sharding(dtype, sharded, arrays, place, mesh):
  """Only its matrices are rounded. It is whole on each part of a batch where it is not sharded."""
  settings = ConfigDict({"dtype": dtype, "sharded": sharded})
  with mesh(1, 2, 2):
    model = place(TEACHER, arrays[0])
    teacher = jax.eval_shape(functools.partial(as_teacher, settings=settings), model)
  leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(teacher)}
  assert (
    leaves["ln_f.g"].dtype == leaves["h.attn.c_attn.b"].dtype == leaves["wpe"].dtype == "float32"
  )
  weight = leaves["h.attn.c_attn.w.q_OI" if dtype == "int8" else "h.attn.c_attn.w"]
  assert weight.dtype == dtype
  spec = weight.sharding.spec
  assert ("data" in spec) == sharded and "model" in spec


def test_a_teacher_in_bfloat16_or_int8_teaches_nearly_the_same(arrays, batch, place, put, mesh):
  kl = {}
  with mesh(1, 1, 1):
    student, whole = place(STUDENT, arrays[1]), place(TEACHER, arrays[0])
    for dtype in ("float32", "bfloat16", "int8"):
      settings = ConfigDict({"dtype": dtype, "sharded": True})

      def teach(student, teacher, batch, settings=settings):
        return Distill(as_teacher(teacher, settings))(student, batch)

      sums = jax.jit(teach)(student, whole, Batch(*(put(x, BATCH) for x in batch)))
      kl[dtype] = float(sums["kl"] / sums["tokens"])
  assert kl["float32"] > 0.1 and len(set(kl.values())) == 3
  assert kl["bfloat16"] == pytest.approx(kl["float32"], rel=0.02)
  assert kl["int8"] == pytest.approx(kl["float32"], rel=0.05)


# Runs.


@pytest.fixture(scope="module")
def run_config(tmp_path_factory, arrays, place, mesh):
  """A config whose teacher is a Hugging Face folder of three layers. The student has two."""
  folder = tmp_path_factory.mktemp("distill")
  tokenizer = Characters("".join(map(chr, range(65, 65 + N_VOCAB))))
  others = jax.tree.map(lambda x: x * 1.1, arrays[0])
  with mesh(1, 1, 1):
    for name, values in (("teacher", arrays[0]), ("other", others)):
      weights = from_model(place(TEACHER, values), tokenizer)
      pretrained.write(weights, str(folder / name), "hf")
  text = "".join(chr(65 + i * i % 7 + i % 11) for i in range(600))
  encode_corpus([text], tokenizer, str(folder / "store"), {"made": "for a test"}, processes=1)

  config = distill_config.get_config()
  config.distill.update(teacher=str(folder / "teacher"), layers="2,0")
  config.data.update(train=str(folder / "store"), validation=str(folder / "store"))
  config.data.tokenizer = ""
  config.model.dtype = "float32"
  config.update(steps=2, batch_size=4, warmup_steps=1, log_every=1, eval_windows=4)
  config.update(eval_every=2, save_every=2)
  return config


@pytest.fixture
def one_device(monkeypatch):
  """A run takes one device: compiling for eight takes longer, and shows nothing more here."""
  monkeypatch.setattr(
    train, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:1])
  )


def copied(config: ConfigDict, **changes) -> ConfigDict:
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
  return config


def test_a_run_starts_with_the_teachers_layers_and_resumes_without_its_weights(
  run_config, one_device, tmp_path
):
  workdir = tmp_path / "run"
  train.run(run_config, str(workdir))
  lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
  start, first = lines[0], next(line for line in lines if "loss" in line)
  parts = 20 * first["kl"] + 2 * first["lm"] + first["cos"]
  assert first["loss"] == pytest.approx(parts, rel=1e-5) and start["val_lm"] > 0 < start["val_kl"]

  # The checkpoint: the student alone, and the name and hash of its teacher.
  checkpoints = Checkpoints(str(workdir), create=False)
  metadata, sums = checkpoints.metadata(2), checkpoints.sums(2)
  assert sum(name.startswith("model.") for name in sums) == 16
  assert metadata["teacher"]["name"] == run_config.distill.teacher
  assert metadata["init_from"]["name"].endswith("teacher, layers 2,0")
  model, _ = pretrained.load_pretrained(str(workdir))
  assert model.config.n_layer == 2
  teacher, _ = pretrained.load_pretrained(run_config.distill.teacher)
  assert metadata["teacher"]["sha256"] == weights_sha256(from_model(teacher, None))

  # It resumes with that teacher, wherever it is, and with no other.
  longer = copied(run_config, distill__dtype="float32", save_every=1)
  state = train.run(longer, str(workdir))
  assert int(state.step) == 2
  place = run_config.distill.teacher.replace("teacher", "other")
  other = copied(run_config, distill__teacher=place, init_from=run_config.distill.teacher)
  with pytest.raises(ValueError, match="holds a run that learned from .*learns from") as error:
    train.run(other, str(workdir))
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_the_student_has_the_layers_that_were_named(arrays, place, mesh, unpadded):
  with mesh(1, 2, 1):
    student = take_layers(place(TEACHER, arrays[0]), (2, 0))
    found = unpadded(student, {n: x[[2, 0]] if n[:2] == "h." else x for n, x in arrays[0].items()})
  for name, array in arrays[0].items():
    expected = array[[2, 0]] if name.startswith("h.") else array
    np.testing.assert_array_equal(found[name], expected.astype(np.float32), err_msg=name)


def test_distilgpt2s_recipe_is_planned_without_a_download():
  config = resolve_planned(distill_config.get_config())
  assert config.init_from == config.distill.teacher == "gpt2"
  assert config.model.n_layer == 6 and config.model.n_embd == 768

  # The student's start may be another; then the teacher stays.
  config = distill_config.get_config()
  config.init_from = "distilgpt2"
  config.distill.layers = ""
  config = resolve_planned(config)
  assert config.distill.teacher == "gpt2" and config.model.n_layer == 6


def scratch(**changes) -> ConfigDict:
  return copied(gpt2.get_config("distilgpt2"), **{"distill__teacher": "gpt2"} | changes)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model__n_vocab": 50000}, "gpt2 has 50,257 tokens, and the student 50,000"),
    ({"distill__teacher": "openai-gpt"}, "openai-gpt has 40,478 tokens, and the student 50,257"),
    ({"model__n_ctx": 2048}, "a context of 1,024, and the student 2,048"),
    ({"model__n_embd": 1024, "model__n_head": 16}, "one width: the teacher gpt2 has 768"),
    ({"distill__dtype": "int4"}, "float32, bfloat16, int8"),
    ({"distill__teacher": "gpt5"}, "gpt5"),
    ({"distill__kl_weight": 0, "distill__lm_weight": 0, "distill__cos_weight": 0}, "are all 0"),
    ({"classify__classes": 2}, "a run has one objective"),
  ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_one_line(changes, message, mesh):
  config = scratch(**changes)
  with mesh(1, 1, 1), pytest.raises((ValueError, OSError), match=message) as error:
    abstract_objective(config, ModelConfig(**config.model))
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"distill__layers": "0,12"}, "numbers of layers of gpt2, 0 to 11"),
    ({"distill__layers": "0;2"}, "numbers of layers of gpt2, 0 to 11"),
    ({"distill__layers": "-1"}, "numbers of layers of gpt2, 0 to 11"),
    ({"model__n_layer": 8}, "layers 0,2,4,7,9,11 has n_layer 6, and model.n_layer is 8"),
    ({"model__n_embd": 1024}, "has n_embd 768, and model.n_embd is 1024"),
  ],
)
def test_a_student_that_the_layers_cannot_fill_is_refused_in_one_line(changes, message):
  with pytest.raises(ValueError, match=message) as error:
    resolve_planned(copied(distill_config.get_config(), **changes))
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_layers_of_nothing_and_a_teacher_of_other_tokens_are_refused(
  run_config, one_device, tmp_path
):
  with pytest.raises(ValueError, match="layers of a checkpoint, and the run starts from none"):
    train.run(scratch(distill__layers="0,1"), str(tmp_path / "run"))
  with pytest.raises(ValueError, match="whose base is a whole checkpoint, and distill.layers"):
    train.run(copied(run_config, adapter__kind="lora"), str(tmp_path / "run"))

  # As many tokens, and other ones.
  tokenizer = Characters("".join(map(chr, range(66, 66 + N_VOCAB))))
  store = str(tmp_path / "store")
  encode_corpus(["BCDEFG" * 50], tokenizer, store, {"made": "for a test"}, processes=1)
  (tmp_path / "other.json").write_text(json.dumps(tokenizer.to_json()))
  changes = {"data__train": store, "data__validation": store, "init_from": ""}
  changes |= {"data__tokenizer": str(tmp_path / "other.json"), "distill__layers": ""}
  config = copied(run_config, **changes)
  config.model.update(dataclasses.asdict(STUDENT))
  with pytest.raises(ValueError, match="its distribution is of other tokens") as error:
    train.run(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_config_chooses_the_objective():
  objective = make_objective(scratch(distill__temperature=3.0, distill__cos_weight=0.0))
  assert objective == Distill(None, 3.0, 5.0, 2.0, 0.0)
