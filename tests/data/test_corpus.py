# SPDX-License-Identifier: Apache-2.0
import glob
import hashlib
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.data import corpus, encode_corpus, globs
from gpt2_jax.data.import_tfds import import_tfds
from gpt2_jax.data.skipped import Skipped
from gpt2_jax.tokenizer import Characters

tfds = import_tfds()

TEXTS = {
  "a.txt": "first\r\nline\tand \0 \u2581\n",
  "deep/er/b.py": "\ufeffdef f():\n  return 1",
  "deep/c.txt": "no end of line \U0001f600",
}


class Texts(list):
  source: dict = {}
  skipped = Skipped()


class ToyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Two texts and a number; one of the other split is not UTF-8."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None

  def _info(self):
    features = {
      "body": tfds.features.Text(),
      "title": tfds.features.Text(),
      "stars": tfds.features.Scalar(np.int64),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples([b"one", b"two"]),
      "broken": self._generate_examples([b"ab\xff"]),
    }

  def _generate_examples(self, bodies):
    yield from ((i, {"body": body, "title": "t", "stars": 5}) for i, body in enumerate(bodies))


@pytest.fixture
def files(tmp_path) -> pathlib.Path:
  for name, text in TEXTS.items():
    path = tmp_path / "files" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
  return tmp_path / "files"


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory) -> str:
  data_dir = str(tmp_path_factory.mktemp("toy"))
  ToyTexts(data_dir=data_dir, file_format="array_record").download_and_prepare()
  return data_dir


def read(patterns: str, tmp_path: pathlib.Path, **kwargs) -> corpus.Documents:
  return corpus.file_documents(patterns, data_dir=str(tmp_path / "prepared"), **kwargs)


def one_line(error) -> str:
  assert "\n" not in str(error.value)
  return str(error.value)


def test_files_are_documents_byte_for_byte(files, tmp_path):
  documents = read(f"{files}/*.txt, {files}/deep/**/*", tmp_path)
  assert sorted(documents) == sorted(TEXTS.values())
  assert len(documents) == 3 and documents[-1] == documents[2]


def test_files_are_read_without_tensorflow(files, tmp_path):
  """In a process of its own, for other tests import it."""
  code = (
    "import sys; from gpt2_jax.data import corpus; "
    "documents = corpus.file_documents(sys.argv[1], data_dir=sys.argv[2]); "
    "print(len(documents), 'tensorflow' in sys.modules)"
  )
  command = [sys.executable, "-c", code, f"{files}/**/*", str(tmp_path / "prepared")]
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
  assert done.stdout.split() == ["3", "False"]


def test_tfds_and_the_libraries_of_tokenizers_are_imported_where_they_are_used():
  """In a process of its own, for other tests import them."""
  names = ["tensorflow_datasets", "sentencepiece", "tokenizers", "tiktoken"]
  code = (
    "import sys, gpt2_jax, gpt2_jax.train; print([n for n in sys.argv[1:] if n in sys.modules])"
  )
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  done = subprocess.run(
    [sys.executable, "-c", code, *names],
    env=environment,
    check=True,
    capture_output=True,
    text=True,
  )
  assert done.stdout == "[]\n"


def test_lines_of_jsonl_are_documents(tmp_path):
  texts = ["one\ntwo", "\u2028 three", "four"]
  lines = [json.dumps({"body": text}, ensure_ascii=False) for text in texts] + [
    "",
    json.dumps({"body": ""}),
  ]
  (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
  assert sorted(read(f"{tmp_path}/a.jsonl", tmp_path, text_key="body")) == sorted(texts)


def test_a_changed_file_is_never_served_stale(files, tmp_path):
  before = os.stat(files / "a.txt")
  first = read(f"{files}/a.txt", tmp_path)
  (files / "a.txt").write_bytes(TEXTS["a.txt"].replace("first", "FIRST").encode())
  # the same size and time, another text
  os.utime(files / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
  second = read(f"{files}/a.txt", tmp_path)
  assert second[0].startswith("FIRST") and first[0].startswith("first")
  assert first.source != second.source


def test_unchanged_files_are_prepared_once(files, tmp_path):
  first = read(f"{files}/**/*", tmp_path)
  written = {
    path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*") if path.is_file()
  }
  assert read(f"{files}/**/*", tmp_path) == first and written
  assert written == {
    path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*") if path.is_file()
  }


def test_files_that_are_not_utf8_are_skipped_aloud(files, tmp_path, capsys):
  (files / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
  assert len(read(f"{files}/**/*", tmp_path)) == 3
  assert "4 files; skipped 1 record: " in (err := capsys.readouterr().err)
  assert "latin.txt is not UTF-8 at byte 3" in err


def test_a_file_that_many_names_lead_to_is_read_once(files, tmp_path, capsys):
  """Two loops: Python's own glob would follow 2 ** 40 names."""
  whole = list(read(f"{files}/**/*", tmp_path))
  (files / "deep" / "loop").symlink_to(files)
  (files / "deep" / "er" / "loop").symlink_to(files / "deep")
  (files / "deep" / "er" / "other.txt").symlink_to(files / "a.txt")
  (files / "zz").symlink_to(files / "deep" / "er")
  documents = read(f"{files}/**/*", tmp_path)
  assert list(documents) == whole
  assert "4 names lead to 3 files; each is read once" in capsys.readouterr().err
  assert list(read(f"{files}/*/*/*.py, {files}/**/b.py", tmp_path)) == [TEXTS["deep/er/b.py"]]


def test_folders_behind_a_symlink_are_read(files, tmp_path):
  (tmp_path / "corpus").mkdir()
  (tmp_path / "corpus" / "link").symlink_to(files)
  assert sorted(read(f"{tmp_path}/corpus/**/*", tmp_path)) == sorted(TEXTS.values())


@given(pattern=st.lists(st.sampled_from(["**", "*", "a*", "d?", "**x", ".h"]), max_size=4))
def test_globs_match_what_pythons_match(tree, pattern):
  pattern = os.path.join(str(tree), *pattern)
  expected = filter(os.path.isfile, glob.glob(pattern, recursive=True))
  ours = filter(os.path.isfile, globs._glob(pattern))
  assert set(map(os.path.abspath, ours)) == set(map(os.path.abspath, expected))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("tree")
  for name in ("a", "a1/a", "a1/d2/a.x", ".h/a", "d1/.h/b", "d1/.b", "d1/a[1]/a", "d1/a1/d2/x"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(name)
  return root


def test_symlinks_that_lead_nowhere_are_told(files, tmp_path, capsys):
  (files / "gone.txt").symlink_to(files / "nothing")
  assert len(read(f"{files}/*.txt", tmp_path)) == 1
  told = capsys.readouterr().err
  assert "symlinks that lead nowhere, left out: " in told and "gone.txt" in told


def test_the_extension_is_read_in_any_case(tmp_path):
  (tmp_path / "a.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
  assert sorted(read(f"{tmp_path}/*", tmp_path)) == ["one", "two"]


def test_the_same_text_in_another_folder_is_the_same_corpus(files, tmp_path):
  copy = tmp_path / "elsewhere" / "copy"
  shutil.copytree(files, copy)
  first = read(f"{files}/**/*", tmp_path)
  second = read(f"{copy}/**/*", tmp_path)
  assert first.source["sha256"] == second.source["sha256"]
  assert corpus.is_same_source(first.source, second.source)
  assert list(first) == list(second)
  (copy / "a.txt").rename(copy / "c.txt")
  assert not corpus.is_same_source(first.source, read(f"{copy}/**/*", tmp_path).source)


def test_what_an_older_version_said_of_the_files_is_told(files, tmp_path):
  digest = hashlib.sha256()
  for name in sorted(TEXTS):
    content = hashlib.sha256(TEXTS[name].encode()).hexdigest()
    digest.update(f"{files / name}\n{content}\n".encode())
  older = hashlib.sha256(f"text\n{digest.hexdigest()}".encode()).hexdigest()
  documents = read(f"{files}/**/*", tmp_path)
  assert documents.former_source == documents.source | {"sha256": older}
  part = corpus.slice_characters(documents, ":50%")
  assert corpus.is_same_source(
    part.source | {"sha256": older, "patterns": "x"}, part.source, part.former_source
  )

  # It read this file otherwise.
  (files / "d.JSONL").write_text('{"text": "one"}')
  assert read(f"{files}/**/*", tmp_path).former_source["sha256"] is None


BAD_LINES = {
  b'{"text": "caf\xe9"}': "is not UTF-8 at byte 13 of the line",
  b'{"text": null}': r"has NoneType under 'text' \(of text\)",
  b'{"text": 5}': "has int under 'text'",
  b'{"body": "b"}': r"has no text under 'text' \(of body\)",
  b'{"text": "a\\ud800b"}': "has a lone surrogate in its text",
  b'{"text": ': "is no JSON",
  b"null": "holds a NoneType, not an object",
  b"[" * 100_000: "is JSON that is nested too deep",
  b'{"text": {"text": "a"}}': "has dict under 'text'",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: BAD_LINES[line][:20])
def test_a_line_that_is_no_text_costs_no_other_line(tmp_path, capsys, line):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
  documents = read(f"{tmp_path}/a.jsonl", tmp_path)
  assert sorted(documents) == ["one", "two"] and documents.skipped.count == 1
  assert re.fullmatch(f"a.jsonl:3 {BAD_LINES[line]}.*", documents.skipped.first)
  assert documents.skipped.first in capsys.readouterr().err

  # Prepared already, it is told again. So it is by a copy of `documents`.
  again = read(f"{tmp_path}/a.jsonl", tmp_path)
  assert again.skipped == pickle.loads(pickle.dumps(documents)).skipped == documents.skipped

  for folder in (tmp_path, tmp_path / "new"):
    with pytest.raises(ValueError, match=f"a.jsonl:3 {BAD_LINES[line]}") as error:
      read(f"{tmp_path}/a.jsonl", folder, strict=True)
    assert len(one_line(error)) < 600
  assert not list((tmp_path / "new").rglob("dataset_info.json"))


def test_a_file_that_is_not_utf8_stops_a_strict_job(files, tmp_path):
  (files / "latin.txt").write_bytes(b"caf\xe9")
  with pytest.raises(ValueError, match="latin.txt is not UTF-8 at byte 3; without --strict"):
    read(f"{files}/**/*", tmp_path, strict=True)


def test_a_line_that_is_mended_does_not_shuffle_the_others(tmp_path):
  lines = [json.dumps({"text": str(i)}) for i in range(20)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  whole = list(read(f"{tmp_path}/a.jsonl", tmp_path))
  (tmp_path / "a.jsonl").write_text("\n".join([*lines[:3], "{", *lines[4:]]))
  assert list(read(f"{tmp_path}/a.jsonl", tmp_path)) == [text for text in whole if text != "3"]


def test_two_processes_prepare_one_corpus_side_by_side(files, tmp_path):
  """Both succeed, and what a killed one left is gone."""
  for i in range(300):
    (files / f"{i}.txt").write_text(f"document {i}")
  code = (
    "import sys; from gpt2_jax.data import corpus; input();"
    "documents = corpus.file_documents(sys.argv[1], data_dir=sys.argv[2]);"
    "print(len(documents), documents.folder)"
  )
  command = [sys.executable, "-c", code, f"{files}/**/*", str(tmp_path / "prepared")]
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  jobs = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
  time.sleep(1)
  for job in jobs:
    job.stdin.write("\n")
    job.stdin.flush()
  answers = {job.communicate()[0] for job in jobs}
  (answer,) = answers
  assert answer.startswith("303 ") and [job.returncode for job in jobs] == [0, 0]

  folder = pathlib.Path(answer.split()[1])
  shutil.rmtree(folder)
  (folder.parent / "incomplete.ABCDEF_1.0.0").mkdir()
  assert len(read(f"{files}/**/*", tmp_path)) == 303
  assert sorted(path.name for path in folder.parent.iterdir()) == ["1.0.0", "lock"]


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 9**5, "\xff", '{"skipped": []}'])
@pytest.mark.parametrize(
  "name", ["dataset_info.json", "features.json", "metadata.json", "*.array*"]
)
def test_a_prepared_dataset_that_is_damaged_is_one_line(files, tmp_path, name, content):
  documents = read(f"{files}/**/*", tmp_path)
  (path,) = pathlib.Path(documents.folder).glob(name)
  path.write_text(content, "latin-1")
  try:
    assert sorted(read(f"{files}/**/*", tmp_path)) == sorted(TEXTS.values())
  except (ValueError, OSError) as error:
    assert str(tmp_path / "prepared") in str(error)
    assert "\n" not in str(error) and len(str(error)) < 600


def test_slices_of_a_split_share_out_the_documents(tmp_path):
  for i in range(20):
    (tmp_path / f"{i:02d}.txt").write_text(f"document {i}")
  whole = list(read(f"{tmp_path}/*.txt", tmp_path))
  head, tail = (
    list(read(f"{tmp_path}/*.txt", tmp_path, split=split))
    for split in ("train[:90%]", "train[90%:]")
  )
  assert (len(head), len(tail)) == (18, 2) and head + tail == whole
  assert whole != sorted(whole, key=lambda text: int(text.split()[1]))


@given(
  texts=st.lists(st.text(max_size=30), min_size=1, max_size=9).filter(
    lambda texts: len("".join(texts)) > 1
  )
)
def test_ninety_per_cent_of_the_characters_is_nanogpts_split(texts):
  data = "".join(texts)
  head, tail = (corpus.slice_characters(Texts(texts), bounds) for bounds in (":90%", "90%:"))
  assert "".join(head) == data[: int(len(data) * 0.9)]
  assert "".join(tail) == data[int(len(data) * 0.9) :]


@given(texts=st.lists(st.text(max_size=9), min_size=1), data=st.data())
def test_a_slice_in_characters_is_pythons(texts, data):
  whole = "".join(texts)
  low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(whole) + 3)] * 2)))
  if whole[low:high]:
    part = corpus.slice_characters(Texts(texts), f"{low}:{high}")
    assert "".join(part[i] for i in range(len(part))) == whole[low:high]
    assert list(pickle.loads(pickle.dumps(part))) == list(part)
  else:
    with pytest.raises(ValueError, match="are none"):
      corpus.slice_characters(Texts(texts), f"{low}:{high}")


@pytest.mark.skipif("GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set")
def test_tiny_shakespeare_is_split_as_nanogpt_does(tmp_path):
  path = pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"], "shakespeare", "tinyshakespeare.txt")
  documents, data = read(str(path), tmp_path), path.read_text("utf-8")
  assert list(corpus.slice_characters(documents, ":90%")) == [data[: int(len(data) * 0.9)]]
  assert list(corpus.slice_characters(documents, "90%:")) == [data[int(len(data) * 0.9) :]]


@pytest.mark.parametrize("bounds", ["90%", "0.9:", "-1:", "10%:5%", ":0", "a:b", "5.5:"])
def test_bad_bounds_are_one_line(bounds):
  with pytest.raises(ValueError, match="^characters") as error:
    corpus.slice_characters(Texts(["some text"]), bounds)
  one_line(error)


def test_documents_pickle_as_a_folder(files, tmp_path):
  documents = read(f"{files}/**/*", tmp_path)
  copy = pickle.loads(pickle.dumps(documents))
  assert list(copy) == list(documents) and copy.source == documents.source
  assert len(pickle.dumps(documents)) < 2000


def test_any_prepared_dataset_is_read_by_name(toy_dir):
  documents = corpus.tfds_documents("toy_texts", "train", "body", toy_dir)
  assert sorted(documents) == ["one", "two"]
  assert documents.source == {
    "kind": "tfds",
    "name": "toy_texts/1.0.0",
    "split": "train",
    "text_key": "body",
  }


def test_text_that_is_not_utf8_is_named(toy_dir):
  with pytest.raises(ValueError, match="document 0 of .* is not UTF-8 at byte 2"):
    corpus.tfds_documents("toy_texts", "broken", "body", toy_dir)[0]


def test_text_that_is_not_utf8_is_skipped_by_whoever_reads_all(toy_dir, tmp_path):
  documents = corpus.tfds_documents("toy_texts", "train+broken", "body", toy_dir)
  assert sorted(corpus.readable(documents)) == ["one", "two"] and len(documents) == 3
  part = corpus.slice_characters(documents, "0%:100%")
  store = encode_corpus(
    documents, Characters("enotw"), str(tmp_path), documents.source, processes=1
  )
  assert list(part) == list(corpus.readable(documents)) and part.skipped == store.skipped
  assert store.manifest["tokens"] == 6 and store.skipped.count == 1
  assert "is not UTF-8 at byte 2" in store.skipped.first


@pytest.mark.parametrize(
  ("name", "split", "text_key", "message"),
  [
    ("toy_texts", "test", "body", r"no documents in split 'test'; it has train of 2, broken of 1"),
    ("toy_texts", "train[:0%]", "body", "no documents in split"),
    ("toy_texts", "train", "stars", "no text under 'stars'; --text_key is one of body, title"),
    ("ag_news_subse", "train", "text", "the nearest names are ag_news_subset"),
    ("ag_news_subset", "train", "text", r"is not prepared in .*download_and_prepare\(\)"),
    ("ag_news_subset/none", "train", "text", "cannot open"),
  ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(toy_dir, name, split, text_key, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    corpus.tfds_documents(name, split, text_key, toy_dir)
  one_line(error)


def test_a_dataset_without_random_access_says_how_to_prepare_it(tmp_path):
  ToyTexts(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
  (info,) = tmp_path.rglob("dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(
    ValueError, match="prepared as tfrecord, .*file_format='array_record'"
  ) as error:
    corpus.tfds_documents("toy_texts", "train", "body", str(tmp_path))
  one_line(error)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (None, b"", "no file matches"),
    ("empty.txt", b" \n", "none holds text"),
    ("latin.txt", b"\xff", "none holds text"),
    ("a.jsonl", b'\n{"body": "b"}', r"a.jsonl:2 has no text under 'text' \(of body\)"),
    ("a.jsonl", b'{"text": "a', "skipped 1 record: a.jsonl:1 is no JSON"),
    ("a.jsonl", b"[1]\n[2]", "skipped 2 records, the first: a.jsonl:1 holds a list"),
    ("a.jsonl", b'{"text": ""}', "none holds text"),
  ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, name, content, message):
  if name:
    (tmp_path / name).write_bytes(content)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    read(str(tmp_path / (name or "*.txt")), tmp_path)
  one_line(error)
  assert not list((tmp_path / "prepared").rglob("dataset_info.json"))
