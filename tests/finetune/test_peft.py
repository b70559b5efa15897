# SPDX-License-Identifier: Apache-2.0
"""Adapters against peft: it loads ours, we load its, and the logits are the same."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt2_jax.convert import names
from gpt2_jax.convert.pretrained import load_pretrained, open_weights, save_pretrained
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.finetune.adapter import adapter_arrays
from gpt2_jax.finetune.classify import label_log_probs
from gpt2_jax.finetune.lora import LoraSettings, add_lora, merge_lora
from gpt2_jax.finetune.peft import read_adapter, write_adapter
from gpt2_jax.model import name_of
from gpt2_jax.sharding import make_mesh

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

# What peft may ask for, and this model has: each of its ways to name modules, ranks and alphas.
CONFIGS = {
  "a list": {"target_modules": ["c_attn"], "r": 3, "lora_alpha": 5},
  "rslora, one attention matrix": {
    "target_modules": ["attn.c_proj", "c_fc"],
    "use_rslora": True,
    "r": 3,
  },
  "patterns": {
    "target_modules": ["c_attn", "c_proj"],
    "rank_pattern": {"h.0.attn.c_attn": 5, r"mlp\.c_proj": 2},
    "alpha_pattern": {"^transformer.h.1.attn.c_proj": 3.5},
  },
  "one layer, by a regular expression": {
    "target_modules": r".*\.h\.1\..*c_(attn|fc)",
    "modules_to_save": ["ln_f", "wpe", "h.0.ln_1"],
  },
}


def logits(model, tokens_NT) -> np.ndarray:
  return np.asarray(model(tokens_NT))[..., : model.config.n_vocab]


def their_logits(model, tokens_NT) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(tokens_NT).long()).logits.numpy()


def one_device():
  return make_mesh(1, 1, 1, jax.devices()[:1])


def trained(model, seed: int = 3):
  """The model with random numbers in its adapter, padding excepted."""
  rng = np.random.default_rng(seed)

  def randomize(path, leaf):
    name = name_of(path)
    if ".lora_" not in name:
      return leaf
    noise = np.float32(rng.normal(size=leaf.shape) * 0.1)
    if name.endswith("attn.c_attn.w.lora_b"):
      noise[..., 3 * 24 :] = 0
    if name.endswith("attn.c_proj.w.lora_a"):
      noise[:, 24:] = 0
    return jax.device_put(np.asarray(leaf) + noise, leaf.sharding)

  return jax.tree_util.tree_map_with_path(randomize, model)


@pytest.fixture(params=CONFIGS)
def theirs(request, their_base, randomized, tmp_path):
  """peft's own adapter, and the folder that it wrote."""
  config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **CONFIGS[request.param])
  model = randomized(peft.get_peft_model(their_base, config)).eval()
  model.save_pretrained(tmp_path / "theirs")
  return model, tmp_path / "theirs"


def test_we_load_merge_and_write_what_peft_wrote(theirs, base_folder, tokens_NT, tmp_path):
  their_model, path = theirs
  model, _ = load_pretrained(str(base_folder), one_device(), adapter=str(path))
  expected = their_logits(their_model, tokens_NT)
  np.testing.assert_allclose(logits(model, tokens_NT), expected, atol=1e-5)

  # Merged where the model lies, and where the files are read.
  here = from_model(merge_lora(model), None)
  there = open_weights(str(base_folder), adapter=str(path))
  for name in names.shapes(model.config):
    np.testing.assert_allclose(here.read(name), there.read(name), atol=1e-6, err_msg=name)

  # Written again, each of its tensors has the same bits.
  whole = ("ln_f", "wpe", "ln_1") if "ln_f" in (path / "adapter_config.json").read_text() else ()
  write_adapter(model, tmp_path / "ours", "base", trained=whole)
  written, original = (
    load_file(x / "adapter_model.safetensors") for x in (tmp_path / "ours", path)
  )
  assert {name for name in written if "lora" in name} == {
    name for name in original if "lora" in name
  }
  for name, tensor in original.items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_peft_loads_ours_from_a_mesh_with_padded_heads(
  base_folder, their_base, tokens_NT, tmp_path
):
  """Every matrix, with rsLoRA, dropout and an alpha that is no whole number, from eight shards."""
  mesh = make_mesh(1, 4, 2)
  base, _ = load_pretrained(str(base_folder), mesh)
  settings = LoraSettings(3, 7.3, True, ("c_attn", "c_proj", "c_fc"), 0.25)
  with jax.set_mesh(mesh):
    model = trained(add_lora(base, settings, jax.random.key(0)))
  base_sha256 = weights_sha256(open_weights(str(base_folder)))
  write_adapter(model, tmp_path / "ours", str(base_folder), base_sha256)

  with warnings.catch_warnings(action="error", category=peft.utils.warning.PeftWarning):
    theirs = peft.PeftModel.from_pretrained(their_base, tmp_path / "ours").eval()
  config = theirs.peft_config["default"]
  assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7.3, 0.25)
  ours = logits(model, tokens_NT)
  np.testing.assert_allclose(their_logits(theirs, tokens_NT), ours, atol=1e-5)

  # Back on one device it is the same adapter.
  again, _ = load_pretrained(str(base_folder), one_device(), adapter=str(tmp_path / "ours"))
  np.testing.assert_allclose(logits(again, tokens_NT), ours, atol=1e-5)


@pytest.fixture
def ours(base_folder, tmp_path):
  """A small adapter of ours in peft's format, with the SHA-256 of its base."""
  model, _ = load_pretrained(str(base_folder), one_device())
  with jax.set_mesh(model.mesh):
    model = add_lora(model, LoraSettings(2), jax.random.key(0))
  base_sha256 = weights_sha256(open_weights(str(base_folder)))
  write_adapter(model, tmp_path / "adapter", "base", base_sha256)
  return tmp_path / "adapter"


def changed(path, config=None, tensors=None, metadata=None):
  """Changes values of an adapter's config, its tensors, or its file's metadata."""
  if config:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
  if tensors is not None or metadata:
    file = path / "adapter_model.safetensors"
    save_file(load_file(file) if tensors is None else tensors, file, metadata=metadata)


@pytest.mark.parametrize(
  "config, message",
  [
    ({"peft_type": "IA3"}, "kind 'IA3'"),
    ({"use_dora": True}, "'use_dora': True"),
    ({"bias": "all"}, "'bias': 'all'"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"init_lora_weights": "pissa"}, "changes the base"),
    ({"a_new_variant": {"x": 1}}, "a_new_variant"),
    ({"r": 0}, "rank 0"),
    ({"r": 4}, "says rank 4"),
    ({"r": "two"}, "r='two'"),
    ({"lora_alpha": [1]}, r"lora_alpha=\[1\]"),
    ({"lora_alpha": True}, "lora_alpha=True"),
    ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
    ({"use_rslora": "yes"}, "use_rslora='yes'"),
    ({"alpha_pattern": {"(a*)*b": 1}}, "alpha_pattern"),
    ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
    ({"rank_pattern": ["c_attn"]}, "rank_pattern"),
    ({"alpha_pattern": {"c_attn": "x" * 9000}}, "alpha_pattern"),
  ],
)
def test_a_config_that_cannot_be_is_one_line(ours, config, message):
  changed(ours, config)
  with pytest.raises(ValueError, match=message) as error:
    read_adapter(ours)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


PREFIX = "base_model.model.transformer."
MATRIX = np.ones((2, 24), np.float32)


@pytest.mark.parametrize(
  "change, message",
  [
    ({f"{PREFIX}wte.weight": np.ones((61, 24), np.float32)}, "wte.weight"),
    ({f"{PREFIX}wte.lora_embedding_A": MATRIX}, "lora_embedding_A"),
    ({f"{PREFIX}h.0.attn.c_attn.lora_magnitude_vector": MATRIX}, "magnitude_vector"),
    ({f"{PREFIX}h.0.attn.c_attn.lora_B.weight": MATRIX}, "are they of one adapter"),
    ({f"{PREFIX}h.0.attn.c_attn.lora_B.weight": None}, "not lora_A and lora_B"),
    ({"score.weight\n" * 50: MATRIX}, "is not built"),
  ],
)
def test_tensors_that_are_no_adapter_of_this_model_are_one_line(ours, change, message):
  tensors = load_file(ours / "adapter_model.safetensors") | change
  changed(ours, tensors={name: x for name, x in tensors.items() if x is not None})
  with pytest.raises(ValueError, match=message) as error:
    read_adapter(ours)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_an_adapter_of_another_base_is_refused_by_both_hashes_or_by_shapes(ours, base_folder):
  other = "1" * 64
  changed(ours, metadata={"gpt2_jax.base_sha256": other})
  here = weights_sha256(open_weights(str(base_folder)))
  for opens in (load_pretrained, open_weights):
    with pytest.raises(ValueError, match=f"{other}.*{here}"):
      opens(str(base_folder), adapter=str(ours))

  # peft's own files say nothing of their base.
  tensors = load_file(ours / "adapter_model.safetensors")
  changed(ours, tensors={name.replace("h.1", "h.7"): x for name, x in tensors.items()})
  with pytest.raises(ValueError, match="h.7.attn.c_attn"):
    load_pretrained(str(base_folder), adapter=str(ours))


def test_nothing_drops_an_adapter_without_a_word(ours, base_folder, tmp_path):
  # An adapter's folder is no model, nor is one where both lie.
  with pytest.raises(ValueError, match="--adapter="):
    load_pretrained(str(ours))
  both = shutil.copytree(base_folder, tmp_path / "both")
  shutil.copytree(ours, both, dirs_exist_ok=True)
  with pytest.raises(ValueError, match="--adapter="):
    open_weights(str(both))

  # A model with an adapter is not written as if it had none.
  model, _ = load_pretrained(str(both), one_device(), adapter=str(both))
  assert len(adapter_arrays(model)) == 2
  for form in ("hf", "nanogpt", "llmc", "orbax"):
    with pytest.raises(ValueError, match="merge it"):
      save_pretrained(model, None, tmp_path / form, form)
    assert not (tmp_path / form).exists()


def test_a_classifier_s_adapter_and_head_go_both_ways(base_folder, randomized, tokens_NT, tmp_path):
  """transformers' classifier over the last token, with peft's LoRA: its `score` is our head."""
  transformers = pytest.importorskip("transformers")
  theirs = transformers.GPT2ForSequenceClassification.from_pretrained(
    base_folder, num_labels=3, pad_token_id=0
  )
  config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
  theirs = randomized(peft.get_peft_model(theirs, config)).eval()
  theirs.save_pretrained(tmp_path / "theirs")

  model, _ = load_pretrained(str(base_folder), one_device(), adapter=str(tmp_path / "theirs"))
  expected = their_logits(theirs, tokens_NT[:, :8] % 60 + 1)
  rows = (tokens_NT[:, :8] % 60 + 1).tolist()
  found = label_log_probs(model, rows, batch_size=2)
  np.testing.assert_allclose(found, jax.nn.log_softmax(expected), atol=1e-5)

  write_adapter(model, tmp_path / "ours", "base")
  ours, original = (
    load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "theirs")
  )
  assert ours.keys() == original.keys()
  for name, tensor in original.items():
    np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
  with pytest.raises(ValueError, match="classification head"):
    open_weights(str(base_folder), adapter=str(tmp_path / "theirs"))
  with pytest.raises(ValueError, match="merge it"):
    from_model(model, None)
  with pytest.raises(ValueError, match="classifier.w"):
    from_model(merge_lora(model), None)


def test_a_pickled_adapter_runs_nothing(ours, tmp_path):
  class Payload:
    def __reduce__(self):
      return open, (str(tmp_path / "ran"), "w")

  (ours / "adapter_model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
    read_adapter(ours)
  torch.save({"x": Payload()}, ours / "adapter_model.bin")
  with pytest.raises(ValueError, match="refused"):
    read_adapter(ours)
  assert not (tmp_path / "ran").exists()


def test_an_adapter_s_folder_is_never_overwritten(ours):
  model = None
  with pytest.raises(FileExistsError):
    write_adapter(model, ours, "base")
