# SPDX-License-Identifier: Apache-2.0
"""Files of a token store on TensorStore, local or on gs://: zarr arrays of tokens, JSON objects.

Inside an array, chunks of 2,048 tokens with a crc32c each lie in shards of 16 Mi tokens. So there
are few files, and a random window reads a few KiB.
"""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

import numpy as np
import tensorstore as ts

from gpt2_jax.files import first_line, parse_json_object

# Tokens that are read at once.
CHUNK = 2048
# Tokens in one file.
SHARD = 1 << 24
# How a chunk is written: plain little-endian tokens, and a crc32c.
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def open_arrays(
  path: str, lengths: Mapping[str, int], dtype: str, cache_bytes: int
) -> list[ts.TensorStore]:
  """Opens zarr arrays of these lengths for reading. Raises ValueError if one is gone or damaged."""
  context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})

  # A store never changes once it is complete: what is in the cache needs no second look.
  options = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}

  # All are read at once and not one after another: on gs:// each costs a round trip. First their
  # metadata, as JSON: TensorStore would crash on what is nested too deep.
  folder = _folder(path)
  reading = [folder.read(f"{name}/zarr.json") for name in lengths]
  opening = {}
  for name, metadata in zip(lengths, reading, strict=True):
    with _lost_part(path, name):
      parse_json_object(metadata.result().value or "{}", "its zarr.json")
    spec = _spec(path, name) | options
    opening[name] = ts.open(spec, context=context, read=True, write=False)

  arrays = []
  for name, length in lengths.items():
    with _lost_part(path, name):
      arrays.append(opening[name].result())
      _check_metadata(arrays[-1], length, dtype)
  return arrays


@contextlib.contextmanager
def _lost_part(path: str, name: str) -> Iterator[None]:
  """Makes one line of what TensorStore raises for a part that is gone or damaged."""
  try:
    yield
  # NotImplementedError is TensorStore's answer to a codec that it does not know.
  except (ValueError, NotImplementedError) as error:
    raise ValueError(
      f"{path} has lost a part: {name}, {tensorstore_reason(error)[:300]}; "
      "the same tokenize command writes it again"
    ) from error


def _check_metadata(array: ts.TensorStore, length: int, dtype: str) -> None:
  """Raises ValueError unless the array's metadata says what `write_array` writes.

  Metadata has no checksum. Other codecs would read other tokens, or none of the chunks' crc32c.
  """
  if array.shape != (length,) or array.dtype.name != dtype:
    raise ValueError(
      f"an array of {array.dtype.name} {list(array.shape)} where {dtype} [{length}] was written"
    )
  (codec,) = array.spec().to_json()["metadata"]["codecs"]
  if codec["name"] != "sharding_indexed" or codec["configuration"]["codecs"] != _codecs(dtype):
    raise ValueError("its zarr.json names other codecs than were written")


def write_array(path: str, name: str, tokens: np.ndarray) -> None:
  """Writes tokens as a zarr array, in place of any array of that name."""
  metadata = _zarr_metadata(len(tokens), tokens.dtype)
  spec = _spec(path, name) | {"metadata": metadata}
  try:
    try:
      # Over the same array and not after removing it: where there are no locks, another process may
      # be writing the same tokens, and may have said already that they are there.
      _write_shards(ts.open(spec, open=True, create=True).result(), tokens)
    except ValueError:
      # It has another shape, or its last chunk is damaged: one that is not full is read first.
      _write_shards(ts.open(spec, create=True, delete_existing=True).result(), tokens)
  except ValueError as error:
    raise ValueError(f"cannot write {path}: {tensorstore_reason(error)}") from error


def _write_shards(array: ts.TensorStore, tokens: np.ndarray) -> None:
  # One shard at a time bounds the memory that encoded shards take.
  for shard in _shards(len(tokens)):
    array[shard].write(tokens[shard]).result()


def read_shards(array: ts.TensorStore) -> Iterator[np.ndarray]:
  """Reads a zarr array from the first token to the last, a shard at a time."""
  for shard in _shards(array.shape[0]):
    yield array[shard].read().result()


def get_json(path: str, name: str) -> dict | None:
  """Reads a JSON object; None if there is no such file. Raises ValueError if it is unreadable."""
  try:
    # TensorStore reads keys of local folders and of gs:// alike. A missing key is no error.
    answer = _folder(path).read(name).result()
  except ValueError as error:
    raise ValueError(f"cannot read {path}/{name}: {tensorstore_reason(error)}") from error

  if answer.state != "value":
    return None
  return parse_json_object(answer.value, f"{path}/{name}")


def put_json(path: str, name: str, content: dict) -> None:
  """Writes a JSON object. The write is atomic, as all of TensorStore's are."""
  _write(path, name, json.dumps(content, indent=1))


def create_json(path: str, name: str, content: dict) -> bool:
  """`put_json` unless there is such a file; says whether it was written. Of two writers, one is."""
  try:
    missing = _folder(path).read(name).result()
  except ValueError as error:
    raise ValueError(f"cannot read {path}/{name}: {tensorstore_reason(error)}") from error
  if missing.state == "value":
    return False

  stamp = _write(path, name, json.dumps(content, indent=1), if_equal=missing.stamp.generation)
  # TensorStore answers with the empty generation if the condition did not hold.
  return bool(stamp.generation)


def list_names(path: str, pattern: str) -> list[str]:
  """The files of a folder whose whole name matches a regular expression."""
  try:
    names = map(os.fsdecode, _folder(path).list().result())
    return [name for name in names if re.fullmatch(pattern, name)]
  except ValueError as error:
    raise ValueError(f"cannot list {path}: {tensorstore_reason(error)}") from error


def delete(path: str, name: str) -> None:
  """Removes a file, if it is there."""
  _write(path, name, None)


def _write(path: str, name: str, content: str | None, **options) -> object:
  """Writes a file, or removes it, and returns TensorStore's stamp of that."""
  try:
    return _folder(path).write(name, content, **options).result()
  except ValueError as error:
    raise ValueError(f"cannot write {path}/{name}: {tensorstore_reason(error)}") from error


def _folder(path: str) -> ts.KvStore:
  return ts.KvStore.open(_url(path)).result()


def tensorstore_reason(error: Exception) -> str:
  """TensorStore's message without the context that it appends in brackets."""
  return first_line(error, limit=1000).split(" [")[0].rstrip(".: ")


def _shards(n_tokens: int) -> Iterator[slice]:
  for start in range(0, n_tokens, SHARD):
    yield slice(start, min(start + SHARD, n_tokens))


def _zarr_metadata(n_tokens: int, dtype: np.dtype) -> dict:
  """Metadata of zarr3: chunks of plain little-endian tokens with a crc32c, in shards."""
  sharding = {"chunk_shape": [CHUNK], "codecs": _codecs(dtype.name), "index_codecs": CODECS}

  # A short array gets one shard of its own length, in complete chunks.
  n_chunks = max(1, math.ceil(n_tokens / CHUNK))
  shard = min(SHARD, n_chunks * CHUNK)
  return {
    "shape": [n_tokens],
    "data_type": dtype.name,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
  }


def _codecs(dtype: str) -> list[dict]:
  """How chunks of that type are written. A single byte has no order."""
  return [{"name": "bytes"}, *CODECS[1:]] if dtype == "uint8" else CODECS


def _spec(path: str, name: str) -> dict:
  return {
    "driver": "zarr3",
    "kvstore": f"{_url(path)}{name}/",
    # A chunk that is gone is an error, not zeros. So a chunk of zeros is written like any other.
    "fill_missing_data_reads": False,
    "store_data_equal_to_fill_value": True,
  }


def _url(path: str) -> str:
  """The URL of a local folder, or of one on gs://. Raises ValueError for any other URL."""
  path = str(path)
  if "://" in path and not path.startswith(("gs://", "file://")):
    raise ValueError(f"{path[:80]} is neither a local path nor gs://BUCKET/PATH; take one of these")
  url = path if "://" in path else pathlib.Path(path).absolute().as_uri()
  return url.rstrip("/") + "/"
