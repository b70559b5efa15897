# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax import tokenizer as tokenizer_lib
from gpt2_jax.data import tokenize_corpus, zarr_files
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.tokenizer import Characters

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [chr(97 + i % 26) * (i * 37 % 900) for i in range(60)]
ALPHABET = Characters("abcdefghijklmnopqrstuvwxyz")
SOURCE = {"kind": "list", "version": 1}
# A job of 12 documents, a part each, that takes long enough to be killed in the middle.
SLOW_JOB = """
import sys, time
from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.tokenizer import Characters

class Slow(list):
  def __getitem__(self, i):
    time.sleep(float(sys.argv[2]))
    return super().__getitem__(i)

if __name__ == "__main__":
  documents = Slow(chr(97 + i) * 5000 for i in range(12))
  tokenizer = Characters("abcdefghijkl")
  encode_corpus(documents, tokenizer, sys.argv[1], {}, processes=2, documents_per_part=1)
"""


def write(
  path: pathlib.Path | str,
  documents=DOCUMENTS,
  tokenizer=ALPHABET,
  source=SOURCE,
  processes=1,
  per_part=7,
):
  return encode_corpus(documents, tokenizer, str(path), source, processes, per_part)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def one_line(error) -> str:
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
  return write(tmp_path_factory.mktemp("stores") / "letters")


@pytest.fixture(scope="module")
def sentencepiece():
  return tokenizer_lib.train_sentencepiece([" ".join(DOCUMENTS), "a b c d"], 300)


def test_the_store_is_the_documents_one_after_another(store):
  expected = ALPHABET.encode("".join(DOCUMENTS))
  assert len(store) == len(expected) == store.manifest["tokens"]
  np.testing.assert_array_equal(store.read([0], len(store)), [expected])


def test_every_document_ends_with_eot(tmp_path, sentencepiece):
  documents = ["a b", "", "c\n"]
  store = write(tmp_path, documents, sentencepiece, per_part=2)
  assert store.read([0], len(store))[0].tolist() == [
    i for text in documents for i in [*sentencepiece.encode(text), sentencepiece.eot]
  ]
  assert (store.manifest["documents"], store.manifest["bytes"]) == (3, 5)


@given(data=st.data())
def test_windows_are_read_anywhere_across_parts(store, data):
  length = data.draw(st.integers(1, 4000))
  starts = data.draw(st.lists(st.integers(0, len(store) - length), max_size=5))
  whole = np.array(ALPHABET.encode("".join(DOCUMENTS)), np.int32)
  windows = store.read(starts, length)
  assert windows.dtype == np.int32 and windows.shape == (len(starts), length)
  for start, window in zip(starts, windows, strict=True):
    np.testing.assert_array_equal(window, whole[start : start + length])


@pytest.mark.parametrize("starts", [[-1], [0, -5], [10**9]])
def test_a_window_outside_the_store_is_refused(store, starts):
  with pytest.raises(ValueError, match="leave .* of 24,090 tokens"):
    one_line(store.read(starts, 10))


@pytest.mark.parametrize("per_part", [1, 13, 1000, None])
def test_parts_do_not_change_the_tokens(store, tmp_path, per_part):
  other = write(tmp_path, per_part=per_part)
  np.testing.assert_array_equal(other.read([0], len(other)), store.read([0], len(store)))


def test_processes_do_not_change_the_store(store, tmp_path):
  write(tmp_path, processes=2)
  assert contents(tmp_path) == contents(pathlib.Path(store.path))


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_largest_id_of_any_vocabulary_fits(tmp_path, size, dtype):
  tokenizer = Characters("".join(map(chr, range(0x10000, 0x10000 + size))))
  store = write(tmp_path, [chr(0x10000 + size - 1)] * 3, tokenizer)
  assert store.manifest["dtype"] == dtype and store.read([0], 3).tolist() == [[size - 1] * 3]


def test_the_tokenizer_travels_with_the_store(store):
  reopened = TokenStore.open(store.path)
  assert reopened.tokenizer == ALPHABET and reopened.fingerprint == ALPHABET.fingerprint


def test_a_long_document_is_written_in_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(zarr_files, "SHARD", 4 * zarr_files.CHUNK)
  text = "abcdefghij" * 10_000
  store = write(tmp_path, [text], per_part=1)
  assert store.read([0], len(store))[0].tolist() == ALPHABET.encode(text)
  store.verify()


@given(text=st.text("ab \n", max_size=300), size=st.integers(9, 50))
def test_segments_are_the_text_and_have_their_size(text, size):
  segments = list(tokenize_corpus._split_long_text(text, size, search=8))
  assert "".join(segments) == text and all(len(segment) <= size for segment in segments)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set")
def test_segments_do_not_change_gpt2s_tokens():
  text, gpt2 = pathlib.Path(os.__file__).read_text("utf-8"), tokenizer_lib.Gpt2Bpe()
  segments = list(tokenize_corpus._split_long_text(text, size=2000, search=1000))
  assert len(segments) > 10 and sum(map(gpt2.encode, segments), []) == gpt2.encode(text)


def test_a_store_on_gs_is_written_and_read_at_random(store, bucket):
  remote = write("gs://bucket/some/store")
  assert {name: remote.manifest[name] for name in ("tokens", "parts")} == {
    name: store.manifest[name] for name in ("tokens", "parts")
  }
  remote.verify()
  starts = [0, 7, len(store) - 300, len(store) // 2]
  np.testing.assert_array_equal(
    TokenStore.open(remote.path).read(starts, 300), store.read(starts, 300)
  )
  with pytest.raises(FileNotFoundError, match="no token store at gs://bucket/none"):
    TokenStore.open("gs://bucket/none")


def test_a_window_on_gs_costs_its_chunks_not_its_shard(bucket):
  remote = write("gs://bucket/large", ["abcdefghij" * 50_000])
  remote.read([0], 10)  # brings the shard's index
  before = bucket.served
  remote.read([200_000], 1025)
  assert 1025 * 2 <= bucket.served - before <= 2 * (zarr_files.CHUNK * 2 + 4)


def test_a_killed_job_is_never_taken_for_complete_and_resumes(tmp_path):
  (tmp_path / "job.py").write_text(SLOW_JOB)
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, str(tmp_path / "job.py")]
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  job = subprocess.Popen(
    [*command, str(killed), "0.15"], env=environment, stderr=subprocess.DEVNULL
  )
  while len(list(killed.glob("part-*.json"))) < 3:
    assert job.poll() is None
    time.sleep(0.02)
  workers = psutil.Process(job.pid).children(recursive=True)
  job.send_signal(signal.SIGKILL)
  job.wait()
  psutil.wait_procs(workers, timeout=10)
  assert len(workers) >= 2 and not any(worker.is_running() for worker in workers)
  with pytest.raises(
    FileNotFoundError, match=r"half-written: [3-9] of 12 parts; run the same"
  ) as error:
    TokenStore.open(str(killed))
  one_line(error)

  (killed / "part-00011").mkdir(exist_ok=True)
  (killed / "part-00011" / "zarr.json").write_text("half of a pa")
  kept = {path: path.stat().st_mtime_ns for path in killed.glob("part-*.json")}
  for folder in (killed, whole):
    subprocess.run(
      [*command, str(folder), "0"], env=environment, check=True, stderr=subprocess.DEVNULL
    )
  assert contents(killed) == contents(whole)
  assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_ctrl_c_ends_the_workers_too(tmp_path):
  (tmp_path / "job.py").write_text(SLOW_JOB)
  command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "store"), "60"]
  job = subprocess.Popen(
    command,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stderr=subprocess.DEVNULL,
    # a suite in the background hands on SIG_IGN
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  # two, and Python's resource tracker
  while len(workers := psutil.Process(job.pid).children(recursive=True)) < 3:
    assert job.poll() is None
    time.sleep(0.02)
  time.sleep(1.5)  # they are inside a document
  job.send_signal(signal.SIGINT)
  job.wait(timeout=10)
  assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_worker_that_dies_is_one_line(tmp_path):
  with pytest.raises(ValueError, match="died .* the same command resumes") as error:
    write(tmp_path, [Deadly()] * 8, processes=2, per_part=1)
  one_line(error)


class Deadly(str):
  def __reduce__(self):
    return os._exit, (9,)


def test_a_complete_store_is_left_as_it_is(store, capsys):
  before = contents(pathlib.Path(store.path))
  write(pathlib.Path(store.path))
  assert (
    "is complete already" in capsys.readouterr().err
    and contents(pathlib.Path(store.path)) == before
  )


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"source": {"kind": "list", "version": 2}}, "source's version is 1, this one's 2"),
    ({"tokenizer": Characters("abcdefghijklmnopqrstuvwxyz{")}, "tokenizer_fingerprint"),
    ({"documents": DOCUMENTS[:-1]}, "documents is 60, this one's 59"),
    ({"per_part": 8}, "documents_per_part is 7, this one's 8"),
  ],
)
def test_another_jobs_folder_is_refused(store, change, name):
  before = contents(pathlib.Path(store.path))
  with pytest.raises(ValueError, match=f"holds another job: its {name}") as error:
    write(pathlib.Path(store.path), **change)
  one_line(error)
  assert contents(pathlib.Path(store.path)) == before


def test_damage_is_found_named_and_repaired(store, tmp_path):
  folder = tmp_path / "store"
  shutil.copytree(store.path, folder)
  opened = TokenStore.open(str(folder))
  opened.verify()
  opened.read([0], len(store))  # what is in memory must not vouch for what is on disk
  (data,) = (folder / "part-00003" / "c").iterdir()
  damaged = bytearray(data.read_bytes())
  damaged[100] ^= 1
  data.write_bytes(damaged)
  shutil.rmtree(folder / "part-00005" / "c")
  with pytest.raises(
    ValueError, match=r"2 of 9 parts are damaged \(part-00003, part-00005\)"
  ) as error:
    opened.verify()
  one_line(error)
  with pytest.raises(ValueError, match="is damaged") as error:
    TokenStore.open(str(folder)).read([0], len(store))
  one_line(error)
  for name in ("manifest", "part-00003", "part-00005"):
    (folder / f"{name}.json").unlink()
  write(folder).verify()
  assert contents(folder) == contents(pathlib.Path(store.path))


def test_tokens_that_are_all_zero_are_still_written(tmp_path):
  store = write(tmp_path, ["a" * 10_000])
  assert not store.read([0], 10_000).any()
  shutil.rmtree(tmp_path / "part-00000" / "c")
  with pytest.raises(ValueError, match="is damaged"):
    TokenStore.open(str(tmp_path)).read([0], 10)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (None, None, "no token store at"),
    ("manifest.json", "{", "cannot read .*manifest.json"),
    ("manifest.json", json.dumps({"format": 99}), "format 99, this version reads 1"),
    ("part-00002/zarr.json", None, "has lost a part"),
  ],
)
def test_a_store_that_cannot_be_opened_is_one_line(store, tmp_path, name, content, message):
  folder = tmp_path / "store"
  if name:
    shutil.copytree(store.path, folder)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    TokenStore.open(str(folder))
  one_line(error)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_tokens_are_no_store(tmp_path, documents):
  with pytest.raises(ValueError, match="no tokens in"):
    write(tmp_path / "store", documents)
  with pytest.raises(FileNotFoundError):
    TokenStore.open(str(tmp_path / "store"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="cannot (read|write)") as error:
    write(tmp_path / "file" / "store")
  one_line(error)


def test_five_million_tokens_a_second(tmp_path):
  """512 windows of 1,025 tokens at random; about 40 million a second on two cores of a 2023
  server."""
  store = write(tmp_path, ["abcdefghij" * 100_000] * 10, per_part=2)
  starts = np.random.default_rng(0).integers(0, len(store) - 1025, (4, 512))
  seconds = []
  for batch in starts:
    begin = time.perf_counter()
    store.read(batch, 1025)
    seconds.append(time.perf_counter() - begin)
  assert 512 * 1024 / min(seconds) > 5e6
