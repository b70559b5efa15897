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
  **options,
):
  return encode_corpus(documents, tokenizer, str(path), source, processes, per_part, **options)


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


def test_random_kills_lose_nothing(tmp_path):
  """GPT2_JAX_KILLS gives another number of them."""
  (tmp_path / "job.py").write_text(SLOW_JOB)
  command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "store"), "0.3"]
  options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stderr": subprocess.DEVNULL}
  documents = [chr(97 + i) * 5000 for i in range(12)]
  tokenizer = Characters("abcdefghijkl")
  whole = write(tmp_path / "whole", documents, tokenizer, source={}, per_part=1)

  random = np.random.default_rng(int(os.environ.get("GPT2_JAX_KILLS", 2)))
  for _ in range(int(os.environ.get("GPT2_JAX_KILLS", 2))):
    job = subprocess.Popen([*command], **options)
    while not (tmp_path / "store" / "lock").exists():
      assert job.poll() is None
      time.sleep(0.01)
    time.sleep(random.uniform(0, 3))
    job.kill()
    job.wait()
    try:
      TokenStore.open(str(tmp_path / "store")).verify()
    except FileNotFoundError as error:
      assert "run the same tokenize command" in str(error) or "no token store" in str(error)
  store = write(tmp_path / "store", documents, tokenizer, source={}, per_part=1)
  assert store.manifest == whole.manifest
  assert contents(tmp_path / "store") == contents(tmp_path / "whole")


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
  # the same command is the way out
  write(folder).verify()
  assert contents(folder) == contents(pathlib.Path(store.path))


def change_json(folder: pathlib.Path, name: str, change) -> None:
  content = json.loads((folder / name).read_text())
  change(content)
  (folder / name).write_text(json.dumps(content))


def rename_part(manifest: dict) -> None:
  names = {name: name.replace("00003", "00033") for name in manifest["parts"]}
  manifest["parts"] = {names[name]: entry for name, entry in manifest["parts"].items()}


def lead_outside(manifest: dict) -> None:
  parts = list(manifest["parts"].values())
  manifest["parts"] = {f"../letters/part-{i:05d}": entry for i, entry in enumerate(parts)}


def move_a_token(manifest: dict) -> None:
  manifest["parts"]["part-00000"]["tokens"] += 1
  manifest["parts"]["part-00001"]["tokens"] -= 1


CONTRADICTIONS = {
  "no parts": lambda manifest: manifest.update(parts={}),
  "a part less": lambda manifest: manifest["parts"].popitem(),
  "another name": rename_part,
  "outside": lead_outside,
  "totals": lambda manifest: manifest.update(tokens=manifest["tokens"] - 1),
  "bytes": lambda manifest: manifest.update(bytes=1),
  "lengths": move_a_token,
  "dtype": lambda manifest: manifest.update(dtype="uint32"),
  "documents": lambda manifest: manifest.update(documents=61),
  "many documents": lambda manifest: manifest.update(documents=10**18, documents_per_part=1),
  "no documents a part": lambda manifest: manifest.update(documents_per_part=0),
  "hash": lambda manifest: manifest["parts"]["part-00002"].update(sha256="0" * 64),
  "tokenizer": lambda manifest: manifest.update(tokenizer=Characters(DIGITS).to_json()),
  "no tokenizer": lambda manifest: manifest.pop("tokenizer"),
  "fingerprint": lambda manifest: manifest.update(tokenizer_fingerprint="0" * 64),
  "source": lambda manifest: manifest.update(source={"kind": "list", "version": 2}),
}
DIGITS = "0123456789abcdefghijklmnop"


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_the_parts_is_refused_and_repaired(store, tmp_path, name):
  folder = tmp_path / "store"
  shutil.copytree(store.path, folder)
  change_json(folder, "manifest.json", CONTRADICTIONS[name])
  with pytest.raises(ValueError) as error:
    TokenStore.open(str(folder)).verify()
  assert str(folder) in one_line(error) and len(one_line(error)) < 600
  write(folder).verify()
  assert contents(folder) == contents(pathlib.Path(store.path))


@pytest.mark.parametrize("content", ["{", "[]", "7", "{}", '{"tokens": "x"}', "[" * 9**5, "\xff"])
@pytest.mark.parametrize("name", ["job.json", "manifest.json", "part-00004.json"])
def test_json_of_another_shape_is_one_line_and_repaired(store, tmp_path, name, content):
  folder = tmp_path / "store"
  shutil.copytree(store.path, folder)
  (folder / name).write_text(content, "latin-1")
  with pytest.raises(ValueError) as error:
    TokenStore.open(str(folder)).verify()
  assert len(one_line(error)) < 600
  write(folder).verify()
  assert contents(folder) == contents(pathlib.Path(store.path))


@pytest.mark.parametrize(
  "content", ["{", "[]", "{}", '{"documents": 5, "documents_per_part": "x"}']
)
def test_a_folder_whose_job_nobody_tells_is_refused(store, tmp_path, content):
  folder = tmp_path / "store"
  shutil.copytree(store.path, folder)
  (folder / "manifest.json").unlink()
  (folder / "job.json").write_text(content)
  before = contents(folder)
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    TokenStore.open(str(folder))
  one_line(error)
  with pytest.raises(ValueError, match="choose another --out, or remove it") as error:
    write(folder)
  assert len(one_line(error)) < 600 and contents(folder) == before


def break_codecs(metadata: dict) -> None:
  metadata["codecs"][0]["configuration"]["codecs"][0]["configuration"]["endian"] = "big"


def no_crc(metadata: dict) -> None:
  metadata["codecs"][0]["configuration"]["codecs"].pop()


@pytest.mark.parametrize(
  "change", [break_codecs, no_crc, lambda m: m.update(shape=[2]), lambda m: m.update(shape=[9999])]
)
def test_metadata_of_an_array_is_held_against_what_is_written(store, tmp_path, change):
  folder = tmp_path / "store"
  shutil.copytree(store.path, folder)
  change_json(folder, "part-00001/zarr.json", change)
  with pytest.raises(ValueError, match="has lost a part: part-00001") as error:
    TokenStore.open(str(folder))
  assert len(one_line(error)) < 600
  write(folder).verify()
  assert contents(folder) == contents(pathlib.Path(store.path))


@pytest.mark.parametrize("name", ["manifest.json", "part-00001.json", "part-00001/zarr.json"])
def test_mutants_of_a_store_are_refused_or_the_same(store, tmp_path, name):
  """Flipped, removed and doubled bytes. GPT2_JAX_MUTANTS gives another number of them."""
  folder = tmp_path / "store"
  shutil.copytree(store.path, folder)
  whole = (folder / name).read_bytes()
  tokens = store.read([0], len(store))
  random = np.random.default_rng(len(whole))
  for _ in range(int(os.environ.get("GPT2_JAX_MUTANTS", 60))):
    place, length = random.integers(len(whole)), random.integers(1, 9)
    change = [bytes(random.integers(0, 256, 1, np.uint8)), b"", whole[place : place + length] * 2]
    kept = whole[place + [1, length, length][kind := random.integers(3)] :]
    (folder / name).write_bytes(whole[:place] + change[kind] + kept)
    try:
      opened = TokenStore.open(str(folder))
      np.testing.assert_array_equal(opened.read([0], len(store)), tokens)
      opened.verify()
      assert opened.manifest["parts"] == store.manifest["parts"]
    except (ValueError, OSError) as error:
      assert len(str(error)) < 600 and "\n" not in str(error)


def test_a_store_of_an_older_version_is_complete_and_left_as_it_is(store, tmp_path):
  folder = tmp_path / "store"
  shutil.copytree(store.path, folder)
  (folder / "lock").unlink()
  change_json(folder, "manifest.json", lambda manifest: manifest.pop("skipped"))
  before = contents(folder)
  write(folder).verify()
  assert contents(folder) == before and not TokenStore.open(str(folder)).skipped.count


def test_a_half_written_store_of_an_older_version_is_resumed(store, tmp_path):
  shutil.copytree(store.path, tmp_path / "store")
  (tmp_path / "store" / "manifest.json").unlink()
  (tmp_path / "store" / "part-00002.json").unlink()
  newer = SOURCE | {"patterns": "elsewhere/*", "sha256": "new"}
  with pytest.raises(ValueError, match="holds another job"):
    write(tmp_path / "store", source=newer)
  assert write(tmp_path / "store", source=newer, former_source=SOURCE).manifest == store.manifest


def test_a_document_that_is_no_text_is_skipped_and_counted(tmp_path, sentencepiece):
  documents = ["a b", "a\ud800b", "c", "\udfff"]
  store = write(tmp_path / "store", documents, sentencepiece, per_part=2)
  whole = write(tmp_path / "whole", ["a b", "c"], sentencepiece)
  np.testing.assert_array_equal(store.read([0], len(store)), whole.read([0], len(whole)))
  assert store.manifest["skipped"] == {
    "count": 2,
    "first": "document 1 has a lone surrogate: no UTF-8 writes it",
  }
  assert store.manifest["bytes"] == 4 and whole.manifest["skipped"]["count"] == 0
  for folder in ("store", "strict"):
    with pytest.raises(ValueError, match="document 1 has a lone surrogate") as error:
      write(tmp_path / folder, documents, sentencepiece, per_part=2, strict=True)
    one_line(error)


def test_a_character_that_the_alphabet_lacks_names_the_document(tmp_path):
  with pytest.raises(ValueError, match="document 1 of the corpus: character '!' at position 2"):
    write(tmp_path, ["ab", "cd!"])


def test_a_store_that_another_process_writes_is_refused(store, tmp_path):
  (tmp_path / "job.py").write_text(SLOW_JOB)
  command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "store"), "0.4"]
  job = subprocess.Popen(
    command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
  )
  while not (tmp_path / "store" / "part-00000.json").exists():
    assert job.poll() is None
    time.sleep(0.02)
  documents = [chr(97 + i) * 5000 for i in range(12)]
  options = {"tokenizer": Characters("abcdefghijkl"), "source": {}, "per_part": 1}
  with pytest.raises(OSError, match="another process is writing .*store; wait") as error:
    write(tmp_path / "store", documents, **options)
  one_line(error)
  assert job.wait() == 0
  TokenStore.open(str(tmp_path / "store")).verify()


def test_of_two_jobs_that_start_at_once_on_gs_one_is_refused(bucket):
  job = {"documents": 1}
  assert zarr_files.create_json("gs://bucket/store", "job.json", job)
  assert not zarr_files.create_json("gs://bucket/store", "job.json", {"documents": 2})
  assert zarr_files.get_json("gs://bucket/store", "job.json") == job


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
    ("manifest.json", "{", "manifest.json is no JSON"),
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
  with pytest.raises((ValueError, OSError), match="cannot (read|write)|Not a directory") as error:
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


def test_array_metadata_that_is_nested_too_deep_is_one_line(tmp_path):
  """TensorStore would end the process."""
  write(tmp_path / "store")
  deep = "[" * 100_000 + "]" * 100_000
  (tmp_path / "store/part-00000/zarr.json").write_text(
    f'{{"codecs": [{{"configuration": {deep}}}]}}'
  )
  with pytest.raises(ValueError, match="part-00000, its zarr.json .*nested too deep") as error:
    TokenStore.open(str(tmp_path / "store"))
  assert len(str(error.value)) < 600
