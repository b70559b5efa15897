# SPDX-License-Identifier: Apache-2.0
"""Datasets on gs:// are the rows of the same files on disk, and errors name the place on gs://."""

import pytest

from gpt2_jax.evaluate import remote_data, sources
from gpt2_jax.evaluate.sources import Source, json_lines

SOURCE = Source("toy", ("a*.jsonl", "b/last.jsonl"), json_lines, "https://example.org/toy")
FILES = {
  "a1.jsonl": b'{"n": 1}\n',
  "a2.jsonl": b'{"n": 2}\n{"n": 3}\n',
  "b/last.jsonl": '{"n": "é"}\n'.encode(),
}


@pytest.mark.parametrize("folder", ["toy/", ""])
def test_rows_of_a_bucket_are_those_of_the_same_files_on_disk(bucket, tmp_path, folder):
  for name, content in FILES.items():
    bucket.put(f"data/{folder}{name}", content)
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

  rows = remote_data.load(SOURCE, "gs://bucket/data")
  local = sources.load(SOURCE, str(tmp_path))
  assert list(rows) == list(local) == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": "é"}]
  assert rows.fingerprint == local.fingerprint
  assert rows.origin.startswith("gs://bucket/data/toy/a1.jsonl, ") and "/tmp" not in rows.origin


def test_the_very_file_may_be_given(bucket):
  bucket.put("rows.jsonl", FILES["a2.jsonl"])
  rows = remote_data.load(SOURCE, "gs://bucket/rows.jsonl")
  assert list(rows) == [{"n": 2}, {"n": 3}]


def test_errors_name_the_place_on_the_bucket(bucket):
  bucket.put("data/toy/a1.jsonl", b"{")
  with pytest.raises(FileNotFoundError, match=r"toy: .* put it in gs://bucket/data/toy/"):
    remote_data.load(SOURCE, "gs://bucket/data")
  bucket.put("data/toy/b/last.jsonl", b"{}\n")
  with pytest.raises(ValueError, match=r"gs://bucket/data/toy/a1.jsonl:1"):
    remote_data.load(SOURCE, "gs://bucket/data")


def test_a_local_folder_is_read_in_place(tmp_path):
  (tmp_path / "rows.jsonl").write_bytes(FILES["a1.jsonl"])
  assert remote_data.load(SOURCE, str(tmp_path / "rows.jsonl")).origin == str(
    tmp_path / "rows.jsonl"
  )
