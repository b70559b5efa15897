# SPDX-License-Identifier: Apache-2.0
import dataclasses
import os
import pathlib
import pickle

import numpy as np
import pytest

from gpt2_jax.convert import nanogpt, parity, pretrained
from gpt2_jax.convert.weights import weights_sha256
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, Gpt2Bpe

torch = pytest.importorskip("torch")

DATA = os.environ.get("GPT2_JAX_TEST_DATA", "")
needs_data = pytest.mark.skipif(
  not DATA, reason="GPT2_JAX_TEST_DATA is not set: no checkpoint of nanoGPT"
)
CHECKPOINT = pathlib.Path(DATA) / "checkpoints" / "nanogpt"
TRANSPOSED = (
  "c_attn.weight",
  "c_proj.weight",
  "c_fc.weight",
)  # torch.nn.Linear there, Conv1D in transformers


@pytest.fixture(scope="module")
def theirs(random_gpt2):
  """A transformers model with the erf GELU, which is what nanoGPT's is."""
  return random_gpt2(activation_function="gelu")


def as_nanogpt(model) -> dict:
  """The state of nanoGPT's model with the weights of transformers', by its own names and
  layouts."""
  state = {
    name: x.clone() for name, x in model.state_dict().items() if not name.endswith(".attn.bias")
  }
  return {name: x.T.contiguous() if name.endswith(TRANSPOSED) else x for name, x in state.items()}


def checkpoint(model, /, **changes) -> dict:
  """A ckpt.pt as nanoGPT's train.py saves it, its optimizer left out."""
  c = model.config
  args = {
    "n_layer": c.n_layer,
    "n_head": c.n_head,
    "n_embd": c.n_embd,
    "block_size": c.n_positions,
    "bias": True,
  }
  args |= {"vocab_size": c.vocab_size, "dropout": 0.2}
  about = {
    "model_args": args,
    "iter_num": 5,
    "best_val_loss": torch.tensor(2.5),
    "config": {"dataset": "x"},
  }
  return {"model": as_nanogpt(model), "optimizer": {}} | about | changes


@needs_data
def test_nanogpts_own_checkpoint(logits):
  """Its logits, and its loss over all windows of the validation text."""
  expected = np.load(CHECKPOINT / "expected.npz")
  assert np.abs(logits(CHECKPOINT, expected["tokens"]) - expected["logits"]).max() <= 2e-5
  model = parity.load_ours(str(CHECKPOINT / "ckpt.pt"))
  assert (model.config.gelu, model.config.use_bias, model.config.n_ctx) == ("erf", False, 64)
  tokens = expected["val_tokens"][: int(expected["windows"]) * 64 + 1].astype(np.int32)
  measured = parity.measure(model, *parity.token_windows(tokens, 64), rows=134)
  assert len(measured.logits_NTV) == parity.KEPT
  assert np.count_nonzero(measured.nats_NT) == len(tokens) - 1
  assert abs(measured.nats_NT.sum() / (len(tokens) - 1) - float(expected["val_loss_nats"])) <= 1e-4
  tokenizer = pretrained.open_weights(str(CHECKPOINT)).tokenizer
  assert tokenizer.vocab_size == 65 and tokenizer.encode("\n !") == [0, 1, 2]


def test_logits_are_transformers(theirs, logits, their_logits, tmp_path):
  torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
  assert np.abs(logits(tmp_path) - their_logits(theirs)).max() <= 1e-4


def test_what_is_written_is_nanogpts(theirs, their_logits, tmp_path):
  """Its names, layouts and bytes, for transformers wrote the same; the head is one tensor with the
  embedding."""
  torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
  nanogpt.write(nanogpt.read(tmp_path), tmp_path / "ours")
  found = torch.load(tmp_path / "ours" / "ckpt.pt", weights_only=True)
  expected = as_nanogpt(theirs)
  assert found["model"].keys() == expected.keys()
  assert all(torch.equal(found["model"][name], expected[name]) for name in expected)
  assert (
    found["model"]["lm_head.weight"].data_ptr()
    == found["model"]["transformer.wte.weight"].data_ptr()
  )
  given = checkpoint(theirs)["model_args"] | {"dropout": 0.0}
  assert found["model_args"] == given


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, theirs, tmp_path):
  torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
  nanogpt.write(nanogpt.read(tmp_path), tmp_path / "ours", dtype)
  found = torch.load(tmp_path / "ours" / "ckpt.pt", weights_only=True)["model"]
  assert all(
    torch.equal(x, as_nanogpt(theirs)[name].to(getattr(torch, dtype))) for name, x in found.items()
  )
  again = nanogpt.read(tmp_path / "ours").read("h.1.mlp.c_fc.w")
  assert np.array_equal(again, found["transformer.h.1.mlp.c_fc.weight"].float().numpy().T)


def test_compiled_models_and_masks_are_read(theirs, tmp_path):
  plain = checkpoint(theirs)
  masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
  torch.save(plain, tmp_path / "ckpt.pt")
  expected = weights_sha256(nanogpt.read(tmp_path))
  for state in (
    {f"_orig_mod.{name}": x for name, x in plain["model"].items()},
    plain["model"] | masks,
  ):
    torch.save(checkpoint(theirs, model=state), tmp_path / "ckpt.pt")
    assert weights_sha256(nanogpt.read(tmp_path)) == expected


def test_without_biases(made, tmp_path):
  weights = made(ModelConfig(131, 16, 16, 4, 2, use_bias=False, gelu="erf"))
  nanogpt.write(weights, tmp_path / "ours")
  found = torch.load(tmp_path / "ours" / "ckpt.pt", weights_only=True)
  assert (
    not [name for name in found["model"] if name.endswith("bias")]
    and not found["model_args"]["bias"]
  )
  again = nanogpt.read(tmp_path / "ours")
  assert not again.config.use_bias and weights_sha256(again) == weights_sha256(weights)


def test_another_gelu_needs_its_flag_and_is_restored(made, tmp_path):
  weights = made(ModelConfig(131, 16, 16, 4, 2))
  with pytest.raises(
    ValueError, match="the tanh GELU, and nanoGPT computes the erf one.*--other_gelu"
  ):
    nanogpt.write(weights, tmp_path / "ours")
  nanogpt.write(weights, tmp_path / "ours", other_gelu=True)
  assert nanogpt.read(tmp_path / "ours").config.gelu == "tanh"


def test_characters_of_meta_pkl(theirs, made, tmp_path):
  """Read, written, and read again; nanoGPT's sample.py takes stoi and itos."""
  alphabet = "".join(map(chr, range(32, 127)))
  torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
  itos = dict(enumerate(alphabet))
  stoi = {character: i for i, character in itos.items()}
  (tmp_path / "meta.pkl").write_bytes(
    pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi})
  )
  assert nanogpt.read(tmp_path).tokenizer == Characters(alphabet)
  nanogpt.write(nanogpt.read(tmp_path), tmp_path / "ours")
  assert pickle.loads((tmp_path / "ours" / "meta.pkl").read_bytes()) == {
    "vocab_size": 95,
    "itos": itos,
    "stoi": stoi,
  }


def test_gpt2s_tokenizer_is_the_default_for_its_vocabulary_size(made, tmp_path):
  for n_vocab, expected in ((50304, Gpt2Bpe()), (50257, Gpt2Bpe()), (131, None)):
    weights = made(ModelConfig(n_vocab, 4, 2, 1, 1, gelu="erf"))
    nanogpt.write(dataclasses.replace(weights, tokenizer=None), tmp_path / str(n_vocab))
    assert nanogpt.read(tmp_path / str(n_vocab)).tokenizer == expected


@pytest.mark.parametrize(
  ("meta", "message"),
  [
    (b"", "more than plain values, or damaged"),
    (b"\x80\x04junk", "more than plain values, or damaged"),
    (pickle.dumps([1]), "no vocabulary of characters"),
    (pickle.dumps({"itos": {1: "a"}}), "no vocabulary of characters"),
    (pickle.dumps({"itos": {0: "ab"}}), "has no single characters"),
    (pickle.dumps({"itos": {0: 5}}), "characters, each a string, once"),
    (pickle.dumps({"itos": {0: "a", 1: "a"}}), "characters, each a string, once"),
    (pickle.dumps({"itos": {0: "a", 1: ""}}), "characters, each a string, once"),
    (pickle.dumps({"itos": "ab"}), "no vocabulary of characters"),
    (
      pickle.dumps({"itos": dict(enumerate(map(chr, range(132))))}),
      "at most 131 characters",
    ),
    (pickle.dumps({"itos": {0: "b", 1: "a"}, "stoi": {"a": 0, "b": 1}}), "do not agree"),
    (pickle.dumps({"itos": {0: "a", 1: "\ud800"}}), "lone surrogate"),
  ],
)
def test_an_invalid_meta_pkl_is_one_line(meta, message, theirs, tmp_path, refused):
  torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
  (tmp_path / "meta.pkl").write_bytes(meta)
  refused(tmp_path, message)


def test_code_in_a_pickle_is_not_run(theirs, payload, tmp_path, refused):
  for saved in (checkpoint(theirs, best_val_loss=payload), payload, {"model": payload}):
    torch.save(saved, tmp_path / "ckpt.pt")
    refused(tmp_path, "ckpt.pt is refused: .*a pickle may run code")
  torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
  (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: payload}}))
  refused(tmp_path, "meta.pkl is refused")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_args": {"n_layer": 2}}, "say nothing of block_size, n_embd, n_head"),
    ({"model_args": 3}, "say nothing of block_size, n_embd, n_head, n_layer"),
    ({"model": [1]}, "no dictionary of tensors"),
    ({"model": {"transformer.wte.weight": 1}}, "no dictionary of tensors"),
    ({"model": {}}, "missing: wte.weight, wpe.weight, h.0-1.ln_1.weight"),
    ({"config": {"gelu": "relu"}}, "gelu is 'relu'; it is one of tanh, erf"),
    ({"config": [1]}, None),
  ],
)
def test_an_invalid_checkpoint_is_one_line(changes, message, theirs, tmp_path, refused):
  torch.save(checkpoint(theirs, **changes), tmp_path / "ckpt.pt")
  if message:
    refused(tmp_path, message)
  else:
    nanogpt.read(tmp_path)


@pytest.mark.parametrize(
  "changes", [{"n_head": 0}, {"n_embd": "16"}, {"n_layer": 20_001}, {"block_size": 16.0}]
)
def test_invalid_sizes_are_one_line(changes, theirs, tmp_path, refused):
  saved = checkpoint(theirs)
  torch.save(saved | {"model_args": saved["model_args"] | changes}, tmp_path / "ckpt.pt")
  refused(tmp_path, "model_args states sizes that no GPT-2 has")


def test_an_untied_head_and_a_wrong_shape_are_refused(theirs, tmp_path, refused):
  state = as_nanogpt(theirs)
  torch.save(
    checkpoint(theirs, model=state | {"lm_head.weight": state["lm_head.weight"] + 1}),
    tmp_path / "ckpt.pt",
  )
  refused(tmp_path, "an lm_head that is not wte")
  transposed = state["transformer.h.0.mlp.c_fc.weight"].T.contiguous()
  torch.save(
    checkpoint(theirs, model=state | {"transformer.h.0.mlp.c_fc.weight": transposed}),
    tmp_path / "ckpt.pt",
  )
  refused(tmp_path, r"misshapen: h.0.mlp.c_fc.weight is \[16, 64\], not \[64, 16\]")


def test_a_folders_weights_alone_are_no_checkpoint(theirs, tmp_path, refused):
  torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
  refused(
    tmp_path / "pytorch_model.bin", "no nanoGPT checkpoint .*; give a Hugging Face folder whole"
  )


@pytest.mark.parametrize("bias", [torch.ones(3), "yes", None, [True]], ids=str)
def test_a_bias_that_is_no_bool_is_one_line(bias, theirs, tmp_path, refused):
  saved = checkpoint(theirs)
  torch.save(saved | {"model_args": saved["model_args"] | {"bias": bias}}, tmp_path / "ckpt.pt")
  refused(tmp_path, "bias in the model_args of .*ckpt.pt is .*; it is a bool")


def test_a_head_of_another_dtype_or_with_nan_is_tied_by_its_values(theirs, tmp_path, refused):
  state = as_nanogpt(theirs)
  half = state["transformer.wte.weight"].half()
  half[2, 2] = torch.nan
  changes = {"transformer.wte.weight": half.float(), "lm_head.weight": half}
  torch.save(checkpoint(theirs, model=state | changes), tmp_path / "ckpt.pt")
  assert np.isnan(nanogpt.read(tmp_path).read("wte")).sum() == 1
  changes["lm_head.weight"] = half[:-1].clone()
  torch.save(checkpoint(theirs, model=state | changes), tmp_path / "ckpt.pt")
  refused(tmp_path, "an lm_head that is not wte")
