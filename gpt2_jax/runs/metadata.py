# SPDX-License-Identifier: Apache-2.0
"""The metadata of a checkpoint: what identifies a run (config, tokenizer, data), and its checksum.

What is read from disk is checked before anything is made of it: its shape, the step, the types of
the model's knobs.
"""

import dataclasses

from ml_collections import ConfigDict

from gpt2_jax.convert.names import MAX_SIZES, config_from_sizes
from gpt2_jax.data import TokenStore
from gpt2_jax.files import first_line, json_sha256, summarize
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs import knobs
from gpt2_jax.tokenizer import Tokenizer, from_json

GPT2_VOCAB = 50257  # tokens of the tokenizer "gpt2"


def run_metadata(config: ConfigDict, train: TokenStore, validation: TokenStore, tokenizer) -> dict:
  """The metadata of a checkpoint: config, tokenizer, and the manifests of the data (without their
  tokenizer)."""
  data = {}
  for name, store in (("train", train), ("validation", validation)):
    data[name] = {key: value for key, value in store.manifest.items() if key != "tokenizer"}
  return {"config": config.to_dict(), "tokenizer": tokenizer.to_json(), "data": data}


def run_identity(metadata: dict) -> dict:
  """The knobs, and short hashes of the data and the tokenizer: the same on all processes."""
  identity = knobs.flatten(metadata["config"])
  identity["the data"] = json_sha256(data_sums(metadata))[:12]
  identity["the tokenizer"] = _tokenizer_sha256(metadata["tokenizer"])[:12]
  return identity


def _tokenizer_sha256(payload: object) -> str:
  """SHA-256 of a tokenizer's JSON, without what changes no id: older runs do not have it."""
  if isinstance(payload, dict):
    payload = {key: value for key, value in payload.items() if key not in ("config", "limit")}
  return json_sha256(payload)


def data_sums(metadata: dict) -> dict[str, dict[str, str]]:
  """The SHA-256 of each part of each token store of a run: `train` and `validation`.

  They are the content. Where the text lay, and when it was tokenized, are not.
  """
  stores = {}
  for name, manifest in (metadata.get("data") or {}).items():
    hashes = {}
    for place, value in knobs.flatten(manifest).items():
      if place.endswith("sha256"):
        hashes[place] = value

    # A manifest without parts is older than any; then all its hashes are compared.
    parts = {place: value for place, value in hashes.items() if place.startswith("parts.")}
    stores[name] = parts or hashes
  return stores


def content_differences(saved: dict, metadata: dict) -> list[str]:
  """In which token stores, and whether in the tokenizer, two runs differ: one item for each."""
  lines = []
  old_stores, new_stores = data_sums(saved), data_sums(metadata)
  for name in sorted(old_stores.keys() | new_stores.keys()):
    old, new = old_stores.get(name, {}), new_stores.get(name, {})
    if old != new:
      same = sum(new.get(part) == value for part, value in old.items())
      hashes = f"{json_sha256(old)[:8]} -> {json_sha256(new)[:8]}"
      lines.append(f"data.{name}: other data (sha256 {hashes}, {same} of {len(old)} parts alike)")

  old, new = _tokenizer_sha256(saved.get("tokenizer")), _tokenizer_sha256(metadata.get("tokenizer"))
  if old != new:
    lines.append(f"tokenizer: another one (sha256 {old[:8]} -> {new[:8]})")
  return lines


def check_same_run(metadata: dict, saved: dict, workdir: str, branches: bool = False):
  """Raises ValueError with the differences if `metadata` would not resume the run that was
  `saved`, or with `branches` go on from it in another workdir."""
  if saved["config"].keys() == {"model"}:
    raise ValueError(
      f"{workdir} holds weights, and no run that could resume: give it as --config.init_from, "
      f"and take another --workdir"
    )
  check_same_start(saved.get("init_from"), metadata.get("init_from"), workdir)
  check_same_teacher(saved.get("teacher"), metadata.get("teacher"), workdir)
  differing = knobs.differences(saved["config"], metadata["config"], branches)
  differing += content_differences(saved, metadata)
  if differing:
    shown = [line if len(line) <= 80 else f"{line[:77]}..." for line in differing[:6]]
    if len(differing) > len(shown):
      shown.append(f"and {len(differing) - len(shown)} more")
    way_out = "or take another --workdir"
    if branches:
      way_out = f"for a branch may change only {', '.join(knobs.BRANCHABLE)} and how it is computed"
    raise ValueError(
      f"{workdir} holds a run with another config ({'; '.join(shown)}); set these back, {way_out}"
    )


def check_same_start(saved: dict | None, record: dict | None, workdir: str):
  """Raises ValueError unless a run started from the weights that it is given now.

  The same SHA-256 is the same model, wherever it lies.
  """
  if (saved or {}).get("sha256") == (record or {}).get("sha256"):
    return

  raise ValueError(
    f"{workdir} holds a run that started from {_described(saved, 'random weights')}, and this one "
    f"starts from {_described(record, 'random weights')}; set --config.init_from to what the run "
    f"started from (empty for random weights), or take another --workdir"
  )


def check_same_teacher(saved: dict | None, record: dict | None, workdir: str):
  """Raises ValueError unless a run learned from the teacher that it is given now; see
  `check_same_start`."""
  if (saved or {}).get("sha256") == (record or {}).get("sha256"):
    return
  raise ValueError(
    f"{workdir} holds a run that learned from {_described(saved, 'no teacher')}, and this one "
    f"learns from {_described(record, 'no teacher')}; set --config.distill.teacher to what the run "
    f"learned from, or take another --workdir"
  )


def _described(record: dict | None, none: str) -> str:
  """A checkpoint by its name and SHA-256, for a message."""
  if record is None:
    return none
  sha256 = f" (sha256 {record['sha256'][:12]})" if record["sha256"] else ""
  return f"{record['name'][:120]}{sha256}"


def check_metadata(metadata, step: int):
  """Raises ValueError unless it has the shape of a checkpoint's metadata, and is of this step.

  What the model's config holds is `saved_model_config`'s to check.
  """
  try:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
      raise ValueError("its metadata has no config")
    if not isinstance(metadata["config"].get("model"), dict):
      raise ValueError("its config has no model")
    stores = metadata.get("data", {})
    if not isinstance(stores, dict) or not all(isinstance(x, dict) for x in stores.values()):
      raise ValueError("its metadata has data that are no manifests")
    if not isinstance(metadata.get("tokenizer"), dict | None):
      raise ValueError("its metadata has a tokenizer that is none")
    if type(metadata.get("format", 0)) is not int:
      raise ValueError("its metadata has a format that is no number")
    for kind in ("init_from", "teacher"):
      record = metadata.get(kind, {"name": "", "sha256": ""})
      if not isinstance(record, dict) or not all(
        isinstance(record.get(key), str) for key in ("name", "sha256")
      ):
        raise ValueError(f"its metadata has {kind}, which names no checkpoint")
    knobs.flatten(metadata)
  except RecursionError as error:
    raise ValueError("its metadata is nested too deep") from error

  check_step(metadata.get("step", step), step)


def check_step(saved, step: int):
  """Raises ValueError unless a checkpoint was saved at the step that its folder's name says."""
  if saved != step:
    raise ValueError(
      f"it was saved at step {str(saved)[:20]}, and its folder is called {step}; "
      f"call it {str(saved)[:20]} again"
    )


def saved_model_config(metadata: dict) -> ModelConfig:
  """The ModelConfig in a checkpoint's metadata. Raises ValueError for what no model has."""
  model = metadata["config"]["model"]
  known = {field.name for field in dataclasses.fields(ModelConfig)}
  unknown = sorted(model.keys() - known)
  if unknown:
    raise ValueError(f"its config has {summarize(unknown, each=40)}, which no model here has")
  for name, value in model.items():
    problem = knobs.KNOBS[f"model.{name}"].problem(value)
    if problem:
      raise ValueError(f"its config has a model.{name} of {str(value)[:40]!r} that {problem}")

  sizes = {name: model[name] for name in MAX_SIZES if name in model}
  others = {name: value for name, value in model.items() if name not in sizes}
  return config_from_sizes(sizes, "its config", **others)


def saved_finetuning(metadata: dict) -> ConfigDict:
  """The knobs in a checkpoint's metadata that say what its model has besides a GPT-2's parameters.

  Runs from before these knobs have none of it. Raises ValueError for values that no run has.
  """
  saved = knobs.flatten(metadata["config"])
  values = {}
  for name, knob in knobs.KNOBS.items():
    if name.partition(".")[0] not in ("adapter", "classify", "trainable"):
      continue
    value = saved.get(name, knob.added)
    problem = knob.problem(value)
    if problem:
      raise ValueError(f"its config has a {name} of {str(value)[:40]!r} that {problem}")
    values[name] = tuple(value) if knob.type is tuple else value

  if values["adapter.kind"] and "init_from" not in metadata:
    raise ValueError("its config has an adapter, and its metadata do not name the base")
  return ConfigDict(knobs.unflatten(values))


def saved_tokenizer(metadata: dict, model_config: ModelConfig) -> Tokenizer | None:
  """The tokenizer in a checkpoint's metadata. Raises ValueError if it is not this model's."""
  payload = metadata.get("tokenizer")
  if not payload:
    return None

  # GPT-2's own vocabulary is downloaded when it is first used, and its size is known.
  try:
    tokenizer = from_json(payload)
    size = GPT2_VOCAB if payload.get("kind") == "gpt2" else tokenizer.vocab_size
  except Exception as error:
    # Any kind: the tokenizers' libraries raise their own for a damaged one.
    raise ValueError(f"its tokenizer is damaged ({first_line(error, 120)})") from error

  if size > model_config.n_vocab:
    raise ValueError(f"its tokenizer has {size:,} tokens, and its model {model_config.n_vocab:,}")
  return tokenizer
