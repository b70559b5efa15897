# SPDX-License-Identifier: Apache-2.0
"""Files of a token store on TensorStore, local or on gs://: zarr arrays of tokens, JSON objects.

Inside an array, chunks of 2,048 tokens with a crc32c each lie in shards of 16 Mi tokens. So there
are few files, and a random window reads a few KiB.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from gpt2_jax.files import first_line

# Tokens that are read at once.
CHUNK = 2048
# Tokens in one file.
SHARD = 1 << 24


def open_arrays(path: str, names: Iterable[str], cache_bytes: int) -> list[ts.TensorStore]:
  """Opens zarr arrays for reading. Raises ValueError if one is gone or damaged."""
  context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})

  # A store never changes once it is complete: what is in the cache needs no second look.
  options = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}

  # All are opened at once and not one after another: on gs:// each costs a round trip.
  opening = []
  for name in names:
    spec = _spec(path, name) | options
    opening.append(ts.open(spec, context=context, read=True, write=False))
  try:
    return [array.result() for array in opening]
  except ValueError as error:
    raise ValueError(
      f"{path} has lost a part: {tensorstore_reason(error)}; remove that folder and tokenize again"
    ) from error


def write_array(path: str, name: str, tokens: np.ndarray) -> None:
  """Writes tokens as a zarr array, in place of any array of that name."""
  metadata = _zarr_metadata(len(tokens), tokens.dtype)
  spec = _spec(path, name) | {"metadata": metadata}
  try:
    array = ts.open(spec, create=True, delete_existing=True).result()

    # One shard at a time bounds the memory that encoded shards take.
    for shard in _shards(len(tokens)):
      array[shard].write(tokens[shard]).result()
  except ValueError as error:
    raise ValueError(f"cannot write {path}: {tensorstore_reason(error)}") from error


def read_shards(array: ts.TensorStore) -> Iterator[np.ndarray]:
  """Reads a zarr array from the first token to the last, a shard at a time."""
  for shard in _shards(array.shape[0]):
    yield array[shard].read().result()


def get_json(path: str, name: str) -> dict | None:
  """Reads a JSON object; None if there is no such file. Raises ValueError if it is unreadable."""
  try:
    # TensorStore reads keys of local folders and of gs:// alike. A missing key is no error.
    answer = ts.KvStore.open(_url(path)).result().read(name).result()
    return json.loads(answer.value) if answer.state == "value" else None
  except ValueError as error:
    raise ValueError(f"cannot read {path}/{name}: {tensorstore_reason(error)}") from error


def put_json(path: str, name: str, content: dict) -> None:
  """Writes a JSON object. The write is atomic, as all of TensorStore's are."""
  text = json.dumps(content, indent=1)
  try:
    ts.KvStore.open(_url(path)).result().write(name, text.encode()).result()
  except ValueError as error:
    raise ValueError(f"cannot write {path}/{name}: {tensorstore_reason(error)}") from error


def tensorstore_reason(error: Exception) -> str:
  """TensorStore's message without the context that it appends in brackets."""
  return first_line(error, limit=1000).split(" [")[0].rstrip(".: ")


def _shards(n_tokens: int) -> Iterator[slice]:
  for start in range(0, n_tokens, SHARD):
    yield slice(start, min(start + SHARD, n_tokens))


def _zarr_metadata(n_tokens: int, dtype: np.dtype) -> dict:
  """Metadata of zarr3: chunks of plain little-endian tokens with a crc32c, in shards."""
  codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
  sharding = {"chunk_shape": [CHUNK], "codecs": codecs, "index_codecs": codecs}

  # A short array gets one shard of its own length, in complete chunks.
  n_chunks = max(1, math.ceil(n_tokens / CHUNK))
  shard = min(SHARD, n_chunks * CHUNK)
  return {
    "shape": [n_tokens],
    "data_type": dtype.name,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
  }


def _spec(path: str, name: str) -> dict:
  return {
    "driver": "zarr3",
    "kvstore": f"{_url(path)}{name}/",
    # A chunk that is gone is an error, not zeros. So a chunk of zeros is written like any other.
    "fill_missing_data_reads": False,
    "store_data_equal_to_fill_value": True,
  }


def _url(path: str) -> str:
  path = str(path)
  url = path if "://" in path else pathlib.Path(path).absolute().as_uri()
  return url.rstrip("/") + "/"
