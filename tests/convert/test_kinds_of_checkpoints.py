# SPDX-License-Identifier: Apache-2.0
"""The kinds of GPT-2 checkpoints that people have: each loads with transformers' logits, and says
what was left out or assumed; or it is refused in one line."""

import argparse
import dataclasses
import functools
import json
import pathlib
import pickle
import re

import numpy as np
import pytest

from gpt2_jax.convert import parity, pretrained
from gpt2_jax.convert.weights import weights_sha256

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.torch  # noqa: E402

KINDS = {}  # name: (what writes it, how its model differs, a regular expression of what is said)
REFUSED = {}  # name: (what writes it, a regular expression of the error)


def kind(name, says=None, **config):
  """Enters a writer(model, folder) of one kind of checkpoint; `folder` has transformers' config."""

  def enter(write):
    KINDS[name] = (write, config, says)
    return write

  return enter


def refused_kind(name, says):
  def enter(write):
    REFUSED[name] = (write, says)
    return write

  return enter


def state(model) -> dict:
  return {name: x.detach().clone() for name, x in model.state_dict().items()}


def untied(model) -> dict:
  """The state with the embedding under the head's name alone."""
  tensors = state(model)
  del tensors["transformer.wte.weight"]
  return tensors


def renamed(tensors: dict, prefix: str, inner: str = "transformer.") -> dict:
  return {prefix + name.replace("transformer.", inner, 1): x for name, x in tensors.items()}


def save(tensors: dict, folder) -> None:
  torch.save(tensors, folder / "pytorch_model.bin")


def edit(folder, **changes) -> None:
  """Sets entries of config.json; Ellipsis takes one away."""
  payload = json.loads((folder / "config.json").read_text()) | changes
  kept = {name: value for name, value in payload.items() if value is not ...}
  (folder / "config.json").write_text(json.dumps(kept))


# Hugging Face: names.


@kind("save_pretrained")
def _(model, folder):
  model.save_pretrained(folder)


@kind("GPT2Model alone, bare names")
def _(model, folder):
  model.transformer.save_pretrained(folder)


@kind("safetensors' save_model: lm_head without wte")
def _(model, folder):
  safetensors.torch.save_model(model, folder / "model.safetensors", metadata={"format": "pt"})
  assert "transformer.wte.weight" not in safetensors.torch.load_file(folder / "model.safetensors")


@kind("lm_head without wte, pickled in shards")
def _(model, folder):
  tensors = untied(model)
  files = {}
  for i, name in enumerate(tensors):
    files[name] = f"pytorch_model-0000{1 + i % 2}-of-00002.bin"
  for file in set(files.values()):
    torch.save({name: tensors[name] for name in files if files[name] == file}, folder / file)
  index = {"metadata": {}, "weight_map": files}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@kind("2019: lm_head.decoder.weight")
def _(model, folder):
  tensors = state(model)
  tensors["lm_head.decoder.weight"] = tensors.pop("lm_head.weight")
  save(tensors, folder)


for _prefix in (
  "_orig_mod.",  # torch.compile
  "module.",  # DataParallel
  "module._orig_mod.",
  "_orig_mod.module.",
  "model.",  # Lightning
  "base_model.model.",  # peft, merged by hand
  "model.gpt2.",
):
  _said = "read without '" + _prefix + "transformer.'"
  KINDS["prefix " + _prefix] = (
    lambda model, folder, prefix=_prefix: save(renamed(state(model), prefix), folder),
    {},
    _said,
  )


@kind("Lightning's dictionary, as pytorch_model.bin", "read without 'model.transformer.'")
def _(model, folder):
  saved = {"state_dict": renamed(state(model), "model."), "epoch": 3, "loops": {"a": [1]}}
  torch.save(saved, folder / "pytorch_model.bin")


@kind("bare names under gpt2., of a module of one's own", "read without 'gpt2.'")
def _(model, folder):
  save(renamed(untied(model), "gpt2.", ""), folder)


@kind("bare names under backbone., without a head", "read without 'backbone.'")
def _(model, folder):
  save(renamed(state(model.transformer), "backbone."), folder)


@kind("activation checkpointing and FSDP", "without '_fsdp_wrapped_module.*_checkpoint_wrapped_mod")
def _(model, folder):
  tensors = {}
  for name, x in state(model).items():
    name = name.replace(".h.0.", ".h.0._checkpoint_wrapped_module.")
    tensors["_fsdp_wrapped_module." + name] = x
  save(tensors, folder)


# Hugging Face: other heads.


@kind("trl's value head", "2 tensors are left out.*'v_head.summary.weight'")
def _(model, folder):
  head = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
  save(state(model) | head, folder)


@kind("trl's wrapper, saved whole", "without 'pretrained_model.transformer.'")
def _(model, folder):
  head = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
  save(renamed(state(model), "pretrained_model.") | head, folder)


@kind("bare names beside a head", "1 tensor is left out.*'score.weight'")
def _(model, folder):
  save(state(model.transformer) | {"score.weight": torch.ones(2, 16)}, folder)


for _class, _said in (
  ("GPT2ForSequenceClassification", "1 tensor is left out.*'score.weight'"),
  ("GPT2DoubleHeadsModel", "2 tensors are left out.*'multiple_choice_head.summary"),
  ("GPT2ForTokenClassification", "2 tensors are left out.*'classifier"),
  ("GPT2ForQuestionAnswering", "2 tensors are left out.*'qa_outputs"),
):

  def _write(model, folder, class_name=_class):
    other = getattr(transformers, class_name)(transformers.GPT2Config(**model.config.to_dict()))
    other.transformer.load_state_dict(model.transformer.state_dict())
    other.save_pretrained(folder)

  KINDS[_class] = (_write, {}, _said)


# Hugging Face: dtypes, config.json, the Trainer's folders.


@kind("bfloat16")
def _(model, folder):
  model.to(torch.bfloat16).save_pretrained(folder)


@kind("float16, pickled")
def _(model, folder):
  save(state(model.half()), folder)


@kind("float64", "28 tensors are float64, and are rounded to float32")
def _(model, folder):
  model.double().save_pretrained(folder)


@kind("float64, pickled, lm_head without wte", "28 tensors are float64")
def _(model, folder):
  save(untied(model.double()), folder)


@kind("no model_type, as old files")
def _(model, folder):
  model.save_pretrained(folder)
  edit(folder, model_type=...)


@kind("neither model_type nor architectures; n_ctx for n_positions")
def _(model, folder):
  model.save_pretrained(folder)
  edit(folder, model_type=..., architectures=..., n_positions=..., n_ctx=16)


@kind("tie_word_embeddings is false, and the head equals the embedding")
def _(model, folder):
  save(state(model), folder)
  edit(folder, tie_word_embeddings=False)


for _gelu in (
  *("gelu", "gelu_python", "gelu_new", "gelu_fast"),
  *("gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
):
  KINDS[_gelu] = (
    lambda model, folder: model.save_pretrained(folder),
    {"activation_function": _gelu},
    None,
  )


@kind("a checkpoint-500 of the Trainer's")
def _(model, folder):
  model.save_pretrained(folder)
  for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
    torch.save({"state": torch.ones(3)}, folder / file)
  (folder / "trainer_state.json").write_text("{}")


@kind("a folder checkpoints/ of somebody else's beside the weights")
def _(model, folder):
  model.save_pretrained(folder)
  (folder / "checkpoints").mkdir()
  (folder / "checkpoints" / "epoch=1.ckpt").write_bytes(b"x")


# nanoGPT.


def as_nanogpt(model) -> dict:
  """The state of nanoGPT's model: torch.nn.Linear's layout, where transformers has Conv1D's."""
  matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
  tensors = state(model)
  return {name: x.T.contiguous() if name.endswith(matrices) else x for name, x in tensors.items()}


def model_args(model, **more) -> dict:
  c = model.config
  sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
  return sizes | {"block_size": c.n_positions, "vocab_size": c.vocab_size, "dropout": 0.0} | more


def save_nanogpt(model, folder, args, tensors=None, **more) -> None:
  checkpoint = {"model": tensors or as_nanogpt(model), "model_args": args, "iter_num": 5}
  torch.save(checkpoint | {"best_val_loss": torch.tensor(2.5)} | more, folder / "ckpt.pt")
  (folder / "config.json").unlink(missing_ok=True)


def optimizer(n_decayed: int) -> dict:
  groups = [{"params": list(range(n_decayed))}, {"params": [99]}]
  return {"state": {}, "param_groups": groups}


@kind("nanoGPT before 27 January 2023: no bias in model_args", "before 27 January.*tanh GELU")
def _(model, folder):
  save_nanogpt(model, folder, model_args(model))


@kind("nanoGPT before 6 May 2023: the embeddings do not decay", "before 6 May 2023.*tanh GELU")
def _(model, folder):
  save_nanogpt(model, folder, model_args(model, bias=True), optimizer=optimizer(8))


@kind("nanoGPT since", "erf GELU.*--gelu=tanh", activation_function="gelu")
def _(model, folder):
  save_nanogpt(model, folder, model_args(model, bias=True), optimizer=optimizer(10))


@kind("nanoGPT under DDP and compile", "without 'module._orig_mod", activation_function="gelu")
def _(model, folder):
  tensors = renamed(as_nanogpt(model), "module._orig_mod.")
  save_nanogpt(model, folder, model_args(model, bias=True), tensors)


@kind("a Namespace, NumPy's loss and state, a path", activation_function="gelu")
def _(model, folder):
  more = {
    "config": argparse.Namespace(lr=1e-3, out=pathlib.Path("out")),
    "best_val_loss": np.float64(2.5),
    "rng": np.random.default_rng(0).bit_generator.state,
    "old_rng": np.random.RandomState(0).get_state(),
  }
  args = argparse.Namespace(**model_args(model, bias=True))
  save_nanogpt(model, folder, args, **more)


@dataclasses.dataclass
class GPTConfig:
  """As Karpathy's build-nanogpt has it, which computes the tanh GELU."""

  block_size: int
  vocab_size: int
  n_layer: int
  n_head: int
  n_embd: int


@kind("build-nanogpt: a GPTConfig in place of model_args", "tanh GELU")
def _(model, folder):
  sizes = model_args(model)
  del sizes["dropout"]
  checkpoint = {
    "model": as_nanogpt(model),
    "config": GPTConfig(**sizes),
    "step": 3,
    "val_loss": 2.5,
  }
  torch.save(checkpoint, folder / "ckpt.pt")
  (folder / "config.json").unlink()


@kind("a loss of NumPy's, before torch 1.6", activation_function="gelu")
def _(model, folder):
  checkpoint = {"model": as_nanogpt(model), "model_args": model_args(model, bias=True)}
  checkpoint["best_val_loss"] = np.float64(2.5)
  torch.save(checkpoint, folder / "ckpt.pt", _use_new_zipfile_serialization=False)
  (folder / "config.json").unlink()


# What is no GPT-2, or not one alone.


@refused_kind("two models in one", "holds 2 models, under 'transformer.', 'ref_model.transformer.'")
def _(model, folder):
  tensors = state(model)
  save(tensors | {"ref_model." + name: x.clone() for name, x in tensors.items()}, folder)


@refused_kind("peft's adapter, not merged", "5 tensors of an adapter that is not merged.*merge_and")
def _(model, folder):
  tensors = renamed(state(model), "base_model.model.")
  name = "base_model.model.transformer.h.0.attn.c_attn."
  for part in ("weight", "bias"):
    tensors[f"{name}base_layer.{part}"] = tensors.pop(name + part)
  for part in ("lora_A.default", "lora_B.default", "lora_magnitude_vector"):
    tensors[f"{name}{part}.weight"] = torch.ones(2, 16)
  save(tensors, folder)


@refused_kind("a head with a bias", "extra: lm_head.bias")
def _(model, folder):
  save(state(model) | {"lm_head.bias": torch.ones(131)}, folder)


@refused_kind("a norm of the embeddings", "extra: transformer.emb_norm.weight")
def _(model, folder):
  save(renamed(state(model), "", "") | {"transformer.emb_norm.weight": torch.ones(16)}, folder)


@refused_kind("an untied head", "an lm_head that is not wte")
def _(model, folder):
  save(state(model) | {"lm_head.weight": torch.ones(131, 16)}, folder)


@refused_kind(
  "untied by its config, without a head", "tie_word_embeddings=False, without an lm_head"
)
def _(model, folder):
  model.save_pretrained(folder)
  edit(folder, tie_word_embeddings=False)


@refused_kind("one tensor under two names", "two tensors for 'transformer.wpe.weight'")
def _(model, folder):
  tensors = state(model)
  save(tensors | {"module.transformer.wpe.weight": tensors["transformer.wpe.weight"] + 1}, folder)


@refused_kind("quantized", "quantization_config: its weights are quantized")
def _(model, folder):
  model.save_pretrained(folder)
  edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


for _gelu in ("gelu_10", "quick_gelu", "silu"):
  REFUSED[_gelu] = (
    lambda model, folder, name=_gelu: (
      model.save_pretrained(folder),
      edit(folder, activation_function=name),
    ),
    f"activation_function='{_gelu}'",
  )


@refused_kind("GPT-J, whose config has the same fields", "does not hold the tensors of its config")
def _(model, folder):
  tensors = state(model)
  del tensors["transformer.wpe.weight"]
  save(tensors, folder)
  edit(folder, model_type=..., architectures=...)


@refused_kind(
  "the Trainer's root", "folders checkpoint-500, checkpoint-1000: give theirs/checkpoint-1000"
)
def _(model, folder):
  for step in (1000, 500):
    model.save_pretrained(folder / f"checkpoint-{step}")
  (folder / "config.json").unlink()


@refused_kind("the Trainer's root with a config", "no.*checkpoint-500: give theirs/checkpoint-500")
def _(model, folder):
  model.save_pretrained(folder / "checkpoint-500")


@refused_kind("TensorFlow's weights alone", "neither model.safetensors.*it has tf_model.h5, which")
def _(model, folder):
  (folder / "tf_model.h5").write_bytes(b"x")


@refused_kind(
  "a folder checkpoints/ of somebody else's, and nothing else", "is no GPT-2 checkpoint"
)
def _(model, folder):
  (folder / "config.json").unlink()
  (folder / "checkpoints").mkdir()
  (folder / "checkpoints" / "epoch=1.ckpt").write_bytes(b"x")


@refused_kind("Lightning's file", "no nanoGPT checkpoint .*, but 'state_dict', 'hyper_parameters'")
def _(model, folder):
  (folder / "config.json").unlink()
  torch.save({"state_dict": state(model), "hyper_parameters": {}}, folder / "ckpt.pt")


@refused_kind("nanoGPT's first two weeks: the head is not tied", "an lm_head that is not wte")
def _(model, folder):
  tensors = as_nanogpt(model) | {"lm_head.weight": torch.ones(131, 16)}
  save_nanogpt(model, folder, model_args(model), tensors)


@refused_kind("nanoGPT's first default of the vocabulary", r"\[131, 16\], not \[50257, 16\]")
def _(model, folder):
  args = model_args(model)
  del args["vocab_size"]
  save_nanogpt(model, folder, args)


@pytest.fixture(scope="module")
def models(random_gpt2, their_logits):
  """models(activation): transformers' model, made once, and its logits."""

  @functools.cache
  def make(activation_function="gelu_new"):
    model = random_gpt2(activation_function=activation_function)
    return model, their_logits(model)

  return make


def written(write, model, folder):
  """Writes a checkpoint of a copy of the model, which is returned: some writers round it."""
  copy = transformers.GPT2LMHeadModel(model.config).eval()
  copy.load_state_dict(model.state_dict())
  folder.mkdir()
  model.config.architectures = ["GPT2LMHeadModel"]
  model.config.save_pretrained(folder)
  write(copy, folder)
  return copy


def notes(capsys) -> list[str]:
  return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_transformers(name, models, logits, their_logits, tmp_path, capsys):
  write, config, says = KINDS[name]
  model, expected = models(**config)
  copy = written(write, model, tmp_path / "theirs")
  if copy.dtype in (torch.float16, torch.bfloat16):
    expected = their_logits(copy.float())

  ours = logits(tmp_path / "theirs")
  assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
  told = notes(capsys)
  assert all(len(line) < 600 for line in told)
  if says:
    assert any(re.search(says, line) for line in told), told
  else:
    assert all("GELU" in line for line in told), "what is read as it stands needs no word"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gpt2_is_one_line(name, models, refused, tmp_path):
  write, says = REFUSED[name]
  written(write, models()[0], tmp_path / "theirs")
  refused(tmp_path / "theirs", says)


def test_gelu_of_nanogpt_is_the_callers_where_the_file_does_not_say(models, tmp_path, capsys):
  """By load_pretrained, and by convert, whose copy says it from then on."""
  model, _ = models()
  written(
    lambda copy, to: save_nanogpt(copy, to, model_args(copy, bias=True)), model, tmp_path / "a"
  )
  weights = pretrained.open_weights(str(tmp_path / "a"), gelu="tanh")
  assert weights.config.gelu == "tanh" and not notes(capsys)
  pretrained.write(weights, str(tmp_path / "hf"), "hf")
  pretrained.write(weights, str(tmp_path / "nanogpt"), "nanogpt", other_gelu=True)
  for form in ("hf", "nanogpt"):
    assert pretrained.open_weights(str(tmp_path / form)).config.gelu == "tanh"
    assert not notes(capsys)

  # Where the file says it, or the value is none, it is one line.
  for path, gelu, says in (
    ("hf", "erf", "states its GELU"),
    ("nanogpt", "erf", "states the GELU 'tanh', and gelu is 'erf'"),
    ("a", "relu", "gelu is 'relu'; it is 'tanh', 'erf', or None"),
  ):
    with pytest.raises(ValueError, match=says):
      pretrained.open_weights(str(tmp_path / path), gelu=gelu)


def test_characters_of_any_order_and_special_tokens(models, tmp_path, capsys):
  """As nanoGPT's sample.py: a text by its characters, ids by itos."""
  tokens = ["b", "a", "\n", "<pad>", " ", "\u65e5", "<", "p", "d", ">", "<|endoftext|>"]
  stoi = {token: i for i, token in enumerate(tokens)}
  folder = tmp_path / "theirs"
  written(lambda copy, to: save_nanogpt(copy, to, model_args(copy, bias=True)), models()[0], folder)
  for itos in (tokens, {i: token for token, i in reversed(stoi.items())}):
    meta = {"vocab_size": len(tokens), "itos": itos, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = pretrained.open_weights(str(folder)).tokenizer
    text = "ab\n <pad>\u65e5"
    assert tokenizer.encode(text) == [stoi[character] for character in text]
    assert tokenizer.decode(range(len(tokens))) == "".join(tokens)
    assert (tokenizer.vocab_size, tokenizer.special_id("<pad>"), tokenizer.eot) == (11, 3, 10)
    with pytest.raises(ValueError, match="UNK"):
      tokenizer.encode("abc")
  assert "2 of its 11 tokens are no single characters" in "".join(notes(capsys))

  # The ids stay through both formats that hold them.
  for form in ("nanogpt", "hf"):
    weights = pretrained.open_weights(str(folder), gelu="erf")
    pretrained.write(weights, str(tmp_path / form), form)
    again = pretrained.open_weights(str(tmp_path / form)).tokenizer
    assert again.encode(text) == tokenizer.encode(text)


def test_a_run_is_told_by_what_lies_in_its_checkpoints(models, tmp_path):
  model, _ = models()
  model.save_pretrained(tmp_path / "hf")
  weights = pretrained.open_weights(str(tmp_path / "hf"))
  pretrained.write(weights, str(tmp_path / "run"), "orbax")
  assert pretrained.is_workdir(tmp_path / "run")
  expected = weights_sha256(weights)

  # A run that has saved nothing yet is one, with or without Orbax's unfinished step.
  (tmp_path / "new" / "checkpoints").mkdir(parents=True)
  assert pretrained.is_workdir(tmp_path / "new")
  (tmp_path / "new" / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir()
  assert not pretrained.is_workdir(tmp_path / "new")
  (tmp_path / "new" / "train_config.json").write_text("{}")
  assert pretrained.is_workdir(tmp_path / "new")

  # A folder with weights is none, whatever its checkpoints/ holds, if that is not a run's.
  (tmp_path / "hf" / "checkpoints").mkdir()
  assert not pretrained.is_workdir(tmp_path / "hf")
  (tmp_path / "hf" / "checkpoints" / "500").mkdir()
  (tmp_path / "hf" / "checkpoints" / "500" / "config.json").write_text("{}")
  assert not pretrained.is_workdir(tmp_path / "hf")
  assert weights_sha256(pretrained.open_weights(str(tmp_path / "hf"))) == expected


def test_the_oracle_compares_no_weights_of_its_own_making(models, tmp_path):
  """Of names behind a prefix transformers draws all weights anew, and only warns."""
  KINDS["prefix module."][0](models()[0], tmp_path)
  models()[0].config.save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="cannot load .*it finds no .*, and .* more there; convert"):
    parity.load_transformers(str(tmp_path)).load()

  # A head that has the embedding's name is none that is missing.
  KINDS["safetensors' save_model: lm_head without wte"][0](models()[0], tmp_path)
  parity.load_transformers(str(tmp_path)).load()
