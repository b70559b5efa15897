# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors

from gpt2_jax.convert import hf, pretrained
from gpt2_jax.convert.weights import weights_sha256
from gpt2_jax.model import ModelConfig
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Gpt2Bpe, HuggingFace

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

# Heads as published, narrow and of few layers; the last with the erf GELU.
SHAPES = {
  "gpt2": {"n_head": 12, "K": 2, "n_layer": 3},
  "gpt2-medium": {"n_head": 16, "K": 2, "n_layer": 4},
  "gpt2-large": {"n_head": 20, "K": 2, "n_layer": 3},
  "gpt2-xl": {"n_head": 25, "K": 2, "n_layer": 3},
  "distilgpt2": {"n_head": 12, "K": 4, "n_layer": 2, "attn_pdrop": 0.0},
  "erf": {"n_head": 4, "K": 4, "n_layer": 2, "activation_function": "gelu"},
}


@pytest.fixture(scope="module", params=SHAPES)
def published(request, random_gpt2, tmp_path_factory):
  """One of the shapes: transformers' model, and the folder that transformers wrote."""
  model, folder = random_gpt2(**SHAPES[request.param]), tmp_path_factory.mktemp("theirs")
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope="module")
def small(random_gpt2, tmp_path_factory):
  model, folder = random_gpt2(), tmp_path_factory.mktemp("small")
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture
def copy(small, tmp_path):
  return shutil.copytree(small[1], tmp_path / "copy")


def raw(folder) -> dict:
  """Shape, dtype and bytes of every tensor in a folder's safetensors files, by name."""
  found = [
    safetensors.deserialize(file.read_bytes()) for file in sorted(folder.glob("*.safetensors"))
  ]
  return {
    name: (x["shape"], x["dtype"], bytes(x["data"])) for tensors in found for name, x in tensors
  }


def through_ours(source, target, dtype: str = "float32") -> None:
  """Hugging Face's folder to a model on four devices, which pad 25 heads, and back."""
  model, tokenizer = pretrained.load_pretrained(str(source), make_mesh(1, 2, 2, jax.devices()[:4]))
  pretrained.save_pretrained(model, tokenizer, str(target), dtype=dtype)


def edit(folder, **changes) -> None:
  """Sets entries of config.json; Ellipsis takes one away."""
  config = json.loads((folder / "config.json").read_text()) | changes
  (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_logits_are_transformers(published, logits, their_logits):
  model, folder = published
  theirs = their_logits(model)
  assert theirs.std(axis=1).mean() > 0.3, "the positions differ, so that an error would show"
  assert np.abs(logits(folder) - theirs).max() <= 1e-4


def test_a_round_trip_is_byte_identical(published, their_logits, tmp_path):
  """And transformers loads what was written: the same config, the same logits."""
  model, folder = published
  through_ours(folder, tmp_path / "back")
  assert raw(tmp_path / "back") == raw(folder)
  again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
  np.testing.assert_array_equal(their_logits(again), their_logits(model))
  fields = "n_embd n_head n_layer n_positions vocab_size activation_function n_inner".split()
  fields += "embd_pdrop attn_pdrop resid_pdrop layer_norm_epsilon tie_word_embeddings".split()
  for name in fields:
    assert getattr(again.config, name) == getattr(model.config, name), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_round_trips_byte_for_byte(dtype, random_gpt2, tmp_path):
  random_gpt2().to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
  through_ours(tmp_path / "theirs", tmp_path / "back", dtype)
  assert raw(tmp_path / "back") == raw(tmp_path / "theirs")
  assert {kind for _, kind, _ in raw(tmp_path / "back").values()} == {
    "F16" if dtype == "float16" else "BF16"
  }
  assert transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype == getattr(torch, dtype)


def masks(n_layer: int) -> dict:
  """The buffers of old files, of every dtype that they had."""
  square = torch.ones(1, 1, 16, 16).tril()
  kinds = [torch.uint8, torch.bool, torch.float32]
  found = {f"h.{i}.attn.bias": square.to(kinds[i % 3]).clone() for i in range(n_layer)}
  return found | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(n_layer)}


def prefixed(tensors: dict) -> dict:
  return {"transformer." + name: tensor for name, tensor in tensors.items()}


def in_shards(tensors: dict, stem: str, save) -> None:
  folder, name = os.path.split(stem)
  base, kind = name.split(".")
  of = {key: f"{base}-0000{1 + i % 3}-of-00003.{kind}" for i, key in enumerate(tensors)}
  for file in set(of.values()):
    save({key: tensors[key] for key in of if of[key] == file}, os.path.join(folder, file))
  with open(f"{stem}.index.json", "w") as file:
    json.dump({"metadata": {}, "weight_map": of}, file)


def old_torch_save(tensors: dict, path) -> None:
  torch.save(tensors, path, _use_new_zipfile_serialization=False)


LAYOUTS = {  # what to do with the tensors by their bare names
  "bare names and masks, as openai-community/gpt2": lambda x, to: save_file(
    x | masks(2), to / "model.safetensors"
  ),
  "prefix and masks": lambda x, to: save_file(prefixed(x | masks(2)), to / "model.safetensors"),
  "an lm_head": lambda x, to: save_file(
    x | {"lm_head.weight": x["wte.weight"].clone()}, to / "model.safetensors"
  ),
  "shards": lambda x, to: in_shards(prefixed(x), f"{to}/model.safetensors", save_file),
  "bin": lambda x, to: torch.save(
    prefixed(x) | {"lm_head.weight": x["wte.weight"]}, to / "pytorch_model.bin"
  ),
  "bin, bare, masks, before torch 1.6": lambda x, to: old_torch_save(
    x | masks(2), to / "pytorch_model.bin"
  ),
  "bin in shards": lambda x, to: in_shards(
    prefixed(x | masks(2)), f"{to}/pytorch_model.bin", torch.save
  ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout, small, copy, tmp_path):
  model, folder = small
  (copy / "model.safetensors").unlink()
  LAYOUTS[layout](
    {name: x.detach().clone() for name, x in model.transformer.named_parameters()}, copy
  )
  through_ours(copy, tmp_path / "back")
  assert raw(tmp_path / "back") == raw(folder)


def test_a_large_model_is_written_in_shards(small, their_logits, tmp_path, monkeypatch):
  model, folder = small
  monkeypatch.setattr(hf, "SHARD", "6KB")
  through_ours(folder, tmp_path / "back")
  index, held = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text()), {}
  for file in (tmp_path / "back").glob("model-*-of-*.safetensors"):
    held |= {name: file.name for name, _ in safetensors.deserialize(file.read_bytes())}
  assert index["weight_map"] == held and len(set(held.values())) > 2
  assert index["metadata"]["total_size"] == sum(len(x) for _, _, x in raw(folder).values())
  assert raw(tmp_path / "back") == raw(folder)
  assert weights_sha256(pretrained.open_weights(str(tmp_path / "back"))) == weights_sha256(
    pretrained.open_weights(str(folder))
  )
  again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
  np.testing.assert_array_equal(their_logits(again), their_logits(model))


def test_a_model_without_biases_gets_zeros(made, logits, their_logits, tmp_path):
  weights = made(ModelConfig(131, 16, 16, 4, 2, use_bias=False, gelu="erf"))
  hf.write(weights, tmp_path / "folder")
  again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder").eval()
  assert not any(x.any() for name, x in again.named_parameters() if name.endswith("bias"))
  assert weights_sha256(hf.read(tmp_path / "folder")) == weights_sha256(weights)
  np.testing.assert_allclose(logits(tmp_path / "folder"), their_logits(again), atol=1e-5)


def test_written_files_are_as_readable_as_any(small, tmp_path):
  through_ours(small[1], tmp_path / "back")
  (tmp_path / "usual").write_text("")
  modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "back").iterdir()}
  assert modes == {(tmp_path / "usual").stat().st_mode & 0o777}


@pytest.mark.skipif(
  "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set: no vocabulary"
)
def test_transformers_finds_the_tokenizer(made, tmp_path):
  """A model of GPT-2's vocabulary gets its files; AutoTokenizer, and we, read tiktoken's ids from
  them."""
  hf.write(
    dataclasses.replace(made(ModelConfig(50257, 8, 4, 2, 1)), tokenizer=Gpt2Bpe()),
    tmp_path / "folder",
  )
  theirs, ours = (
    transformers.AutoTokenizer.from_pretrained(tmp_path / "folder"),
    hf.read(tmp_path / "folder").tokenizer,
  )
  text = "Hello world!  It's 12,345\n\n\tna\u00efve \u65e5\u672c \U0001f600<|endoftext|>d'oh"
  assert theirs(text)["input_ids"] == Gpt2Bpe().encode(text, allow_eot=True)
  assert theirs.decode(theirs(text)["input_ids"]) == text
  assert (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (50256, 50256, 8)
  assert isinstance(ours, HuggingFace) and ours.fingerprint == Gpt2Bpe().fingerprint
  config = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
  assert (config.bos_token_id, config.eos_token_id) == (50256, 50256)
  (tmp_path / "folder" / "tokenizer.json").unlink()  # the older pair of files says the same
  assert hf.read(tmp_path / "folder").tokenizer.fingerprint == Gpt2Bpe().fingerprint


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "llama"}, "holds a model of type 'llama', not gpt2"),
    (
      {"model_type": ..., "architectures": ["LlamaForCausalLM"]},
      "of type .'LlamaForCausalLM'., not",
    ),
    ({"model_type": ..., "architectures": ..., "n_head": ...}, "of type None, not gpt2"),
    ({"n_head": ...}, "says nothing of 'n_head'"),
    (
      {"scale_attn_by_inverse_layer_idx": True},
      r"departs from GPT-2 \(scale_attn_by_inverse_layer_idx=True\)",
    ),
    ({"scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ({"layer_norm_epsilon": 1e-6, "n_inner": 32}, r"layer_norm_epsilon=1e-06, n_inner=32"),
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"activation_function": ["gelu"]}, "activation_function="),
    ({"n_embd": "16"}, "n_embd is '16'"),
    ({"n_embd": None}, "n_embd is 'None'"),
    ({"n_head": 0, "n_layer": -2}, "n_head is '0', n_layer is '-2'"),
    ({"n_head": 3}, "config.json .*n_embd of 16 does not divide by n_head of 3"),
    ({"n_layer": 2.0}, r"n_layer is '2\.0'"),
    ({"n_layer": True}, "n_layer is 'True'"),
    ({"n_layer": 20_001}, "n_layer is '20001'"),
    ({"vocab_size": 10**300}, "n_vocab is '1000"),
    ({"n_positions": []}, r"n_ctx is '\[\]'"),
    ({"embd_pdrop": "0.1"}, "config.json is of no GPT-2"),
    ({"resid_pdrop": 1.5}, "resid_pdrop is 1.5; a dropout rate"),
    (
      {"vocab_size": 132, "n_positions": 15},
      r"wte.weight is \[131, 16\], not \[132, 16\], wpe.weight is \[16, 16\]",
    ),
    ({"n_layer": 5}, r"missing: h\.2-4\.ln_1\.weight, .*, and 7 more\)"),
    ({"n_layer": 1}, r"extra: h\.1\.attn\.c_attn\.bias, .*, and 7 more"),
  ],
)
def test_a_config_of_no_gpt2_is_one_line(changes, message, copy, refused):
  edit(copy, **changes)
  refused(copy, message)


@pytest.mark.parametrize("content", ["", "{", "[]", '"gpt2"', "\x00\x01", '{"model_type": "gpt2"}'])
def test_a_damaged_config_is_one_line(content, copy, refused):
  (copy / "config.json").write_text(content)
  refused(copy, "config.json")


def test_all_faults_of_the_names_are_one_message(small, copy, refused):
  tensors = {name: x.detach().clone() for name, x in small[0].transformer.named_parameters()}
  for layer in (0, 1):
    del tensors[f"h.{layer}.ln_2.bias"]
    tensors[f"h.{layer}.attn.rotary.weight"] = torch.ones(3)
  tensors["ln_f.weight"] = tensors["ln_f.weight"][:-1].clone()
  tensors["emb_norm.weight"] = torch.ones(3)
  save_file(tensors, copy / "model.safetensors")
  faults = r"\(missing: h\.0-1\.ln_2\.bias; "
  faults += r"extra: emb_norm\.weight, h\.0-1\.attn\.rotary\.weight; "
  faults += r"misshapen: ln_f\.weight is \[15\], not \[16\]\)$"
  refused(copy, faults)


def test_a_truncated_safetensors_is_one_line_wherever_it_ends(copy, refused):
  whole = (copy / "model.safetensors").read_bytes()
  for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
    (copy / "model.safetensors").write_bytes(whole[:size])
    refused(copy, "model.safetensors is no whole safetensors file .*; fetch it again")
  (copy / "model.safetensors").write_bytes(os.urandom(2000))
  refused(copy, "is no whole safetensors file")


def test_a_damaged_torch_file_is_one_line(small, copy, refused):
  (copy / "model.safetensors").unlink()
  rng = np.random.default_rng(0)
  for save in (torch.save, old_torch_save):
    save(small[0].state_dict(), copy / "pytorch_model.bin")
    whole = (copy / "pytorch_model.bin").read_bytes()
    for size in rng.integers(0, len(whole) // 2, 20):
      (copy / "pytorch_model.bin").write_bytes(whole[:size])
      refused(copy, "pytorch_model.bin (cannot be read|is refused)")


def test_code_in_a_pickle_is_not_run(small, copy, payload, refused):
  (copy / "model.safetensors").unlink()
  for save in (torch.save, old_torch_save):
    save(small[0].state_dict() | {"extra": payload}, copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin is refused: .*a pickle may run code")


@pytest.mark.parametrize(
  "found", [[1, 2], {"wte.weight": 3}, {3: torch.ones(1)}, torch.ones(2)], ids=str
)
def test_a_torch_file_of_something_else_is_one_line(found, copy, refused):
  (copy / "model.safetensors").unlink()
  torch.save(found, copy / "pytorch_model.bin")
  refused(copy, "no dictionary of tensors")


@pytest.mark.parametrize(
  ("weight_map", "message"),
  [
    ({"wte.weight": "../theirs.safetensors"}, "or some outside of its folder"),
    ({"wte.weight": "/etc/passwd"}, "or some outside of its folder"),
    ({"wte.weight": "a/b.safetensors"}, "or some outside of its folder"),
    ({"wte.weight": 3}, "or some outside of its folder"),
    ({}, "names no files"),
    (["model.safetensors"], "names no files"),
    ({"wte.weight": ".."}, r"\.\. is not there; the checkpoint is not complete"),
    (
      {"wte.weight": "gone.safetensors"},
      "gone.safetensors is not there; the checkpoint is not complete",
    ),
  ],
)
def test_an_index_stays_in_its_folder(weight_map, message, copy, refused):
  (copy / "model.safetensors").rename(copy.parent / "theirs.safetensors")
  (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  refused(copy, message)


def test_an_untied_head_is_refused(small, copy, refused):
  tensors = {name: x.detach().clone() for name, x in small[0].transformer.named_parameters()}
  head = tensors["wte.weight"].clone()
  head[130, 15] += 1e-3
  save_file(tensors | {"lm_head.weight": head}, copy / "model.safetensors")
  refused(copy, "has an lm_head that is not wte")


def test_integers_are_no_weights(small, copy, refused):
  tensors = {name: x.detach().clone() for name, x in small[0].transformer.named_parameters()}
  save_file(
    tensors | {"wpe.weight": tensors["wpe.weight"].to(torch.int8)}, copy / "model.safetensors"
  )
  refused(copy, r"no plain floats of 16, 32 or 64 bits: .*wpe.weight.*I8")


def test_a_folder_without_weights_is_one_line(copy, refused):
  (copy / "model.safetensors").unlink()
  refused(copy, "neither model.safetensors nor pytorch_model.bin, whole or in shards")


@pytest.mark.parametrize("kind", ["int32", "complex64", "sparse", "meta"])
def test_tensors_that_are_no_plain_floats_are_one_line(kind, random_gpt2, tmp_path, refused):
  model = random_gpt2()
  model.save_pretrained(tmp_path)
  (tmp_path / "model.safetensors").unlink()
  tensors = dict(
    model.transformer.named_parameters()
  )  # which are no bare tensors, and are read all the same
  torch.save(tensors, tmp_path / "pytorch_model.bin")
  weights_sha256(pretrained.open_weights(str(tmp_path)))
  x = tensors["wte.weight"].detach()
  odd = {"sparse": x.to_sparse(), "meta": x.to("meta")}.get(kind)
  torch.save(
    tensors | {"wte.weight": x.to(getattr(torch, kind)) if odd is None else odd},
    tmp_path / "pytorch_model.bin",
  )
  refused(tmp_path, "no plain floats of 16, 32 or 64 bits: 'wte.weight' is torch.*")


def test_a_text_ends_as_the_config_says(random_gpt2, tmp_path):
  """Where the tokenizer's own end is another, and back."""
  random_gpt2().save_pretrained(tmp_path / "theirs")
  tokenizer = HuggingFace.from_merges({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")])
  (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer.payload)
  config = json.loads((tmp_path / "theirs" / "config.json").read_text())
  (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
  model, found = pretrained.load_pretrained(str(tmp_path / "theirs"))
  assert found.eot == 3
  pretrained.save_pretrained(model, found, str(tmp_path / "ours"))
  assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == 3
  assert (
    json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
  )


def test_numbers_too_large_for_float16_are_refused(random_gpt2, tmp_path):
  model = random_gpt2()
  model.transformer.wpe.weight.data[0, 0] = 1e6
  model.save_pretrained(tmp_path / "theirs")
  weights = pretrained.open_weights(str(tmp_path / "theirs"))
  with pytest.raises(
    ValueError, match="wpe of .* has numbers too large for float16; take bfloat16 or float32"
  ):
    pretrained.write(weights, str(tmp_path / "half"), "hf", "float16")
  assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
  pretrained.write(weights, str(tmp_path / "half"), "hf", "bfloat16")


def own_shards(folder, tmp_path, monkeypatch):
  """The folder written anew in shards: their index, and its content."""
  monkeypatch.setattr(hf, "SHARD", "6KB")
  hf.write(hf.read(folder), tmp_path / "shards")
  index = tmp_path / "shards" / "model.safetensors.index.json"
  return index, json.loads(index.read_text())


def test_an_index_holds_what_its_shards_do(small, tmp_path, monkeypatch, refused):
  """Each tensor in the shard that it names, no other, and as many bytes in all."""
  index, content = own_shards(small[1], tmp_path, monkeypatch)
  shards = sorted(set(content["weight_map"].values()))
  first, last = (
    next(name for name, shard in content["weight_map"].items() if shard == wanted)
    for wanted in (shards[0], shards[-1])
  )
  fault = "and its shards do not hold the same tensors"
  for change in ({first: shards[-1]}, {last: shards[0]}, {"extra": shards[0]}):
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | change}))
    refused(index.parent, fault)
  del content["weight_map"][first]
  index.write_text(json.dumps(content))
  refused(index.parent, f"{fault}|bytes in all, and its shards hold")

  # A second copy of a tensor, with other numbers, in a shard that comes later.
  index, content = own_shards(small[1], tmp_path / "again", monkeypatch)
  late = index.parent / shards[-1]
  tensors = safetensors.torch.load_file(late)
  save_file(tensors | {first: torch.ones(3)}, late)
  refused(index.parent, f"{fault}.*{first}")


@pytest.mark.parametrize("total", [0, 1, "1000", -5, [], 10**30])
def test_an_index_states_the_bytes_of_its_shards(total, small, tmp_path, monkeypatch, refused):
  index, content = own_shards(small[1], tmp_path, monkeypatch)
  index.write_text(json.dumps(content | {"metadata": {"total_size": total}}))
  refused(index.parent, "bytes in all, and its shards hold .*fetch them again")
  for metadata in ({}, None, {"total_size": None}):
    index.write_text(json.dumps(content | {"metadata": metadata}))
    assert hf.read(index.parent).config.n_layer == 2, "an index need not state it"


def test_a_tied_head_with_nan_is_tied(small, copy):
  """Broken weights are converted, and said to be broken; that is no reason to call them untied."""
  tensors = {name: x.detach().clone() for name, x in small[0].transformer.named_parameters()}
  tensors["wte.weight"][3, 3] = torch.nan
  save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, copy / "model.safetensors")
  assert np.isnan(hf.read(copy).read("wte")).sum() == 1


def test_only_a_mask_may_be_of_integers(small, copy, refused):
  """A bias's name ends as a mask's does."""
  (copy / "model.safetensors").unlink()
  tensors = {name: x.detach().clone() for name, x in small[0].transformer.named_parameters()}
  for name in ("ln_f.bias", "h.0.attn.c_attn.bias"):
    integers = {name: tensors[name].to(torch.int64)}
    torch.save(tensors | masks(2) | integers, copy / "pytorch_model.bin")
    refused(copy, f"{name}. is torch.int64")


def test_messages_of_a_config_have_a_length(copy, refused):
  long = "x" * 9_000
  changes = [
    {"model_type": long},
    {"activation_function": long},
    {"n_inner": [long]},
    {"layer_norm_epsilon": long, "scale_attn_weights": {"a": long}, "add_cross_attention": long},
    {"embd_pdrop": long},
    {"vocab_size": long, "n_layer": long, "n_head": [long], "n_embd": None, "n_positions": long},
    {"activation_function": "a\nb"},
  ]
  for change in changes:
    edit(copy, **{"model_type": "gpt2", "vocab_size": 131, "n_layer": 2, "n_head": 4} | change)
    with pytest.raises(ValueError) as error:
      hf.read(copy)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
