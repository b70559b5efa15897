# SPDX-License-Identifier: Apache-2.0
"""Rows from published files and from TFDS, and what is said where there are none."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from gpt2_jax.evaluate import sources, tasks
from gpt2_jax.evaluate.sources import Source, json_lines


def row_of(record: dict) -> dict:
  return {"text": record["text"].upper()}


TOY = Source(
  "toy", ("a*.jsonl", "b.jsonl"), lambda path: json_lines(path, row_of), "https://toy.example"
)


def write(path, *texts: str):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
  return path


def one_line(error) -> str:
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture
def folder(tmp_path):
  write(tmp_path / "toy" / "b.jsonl", "last")
  write(tmp_path / "toy" / "a2.jsonl", "third")
  write(tmp_path / "toy" / "a1.jsonl", "first", "second")
  return tmp_path


def test_files_are_read_in_the_order_of_their_patterns_then_of_their_names(folder):
  rows = sources.load(TOY, str(folder))
  assert [row["text"] for row in rows] == ["FIRST", "SECOND", "THIRD", "LAST"]
  for name in ("a9", "a3", "a7", "a5"):
    write(folder / "toy" / f"{name}.jsonl", name)
  found = [row["text"] for row in sources.load(TOY, str(folder))]
  assert found == ["FIRST", "SECOND", "THIRD", "A3", "A5", "A7", "A9", "LAST"]
  assert len(rows) == 4 and rows[-1] == {"text": "LAST"}
  assert rows.origin == ", ".join(
    str(folder / "toy" / name) for name in ("a1.jsonl", "a2.jsonl", "b.jsonl")
  )


def test_the_folder_itself_or_one_file_may_be_named(folder):
  assert sources.load(TOY, str(folder / "toy")).rows == sources.load(TOY, str(folder)).rows
  assert sources.load(TOY, str(write(folder / "mine.txt", "other"))).rows == [{"text": "OTHER"}]


def test_a_file_that_is_not_there_is_never_passed_over(folder):
  (folder / "toy" / "b.jsonl").unlink()
  with pytest.raises(
    FileNotFoundError, match=r"toy: a\*.jsonl, b.jsonl not found.*https://toy.example.*/toy/"
  ) as error:
    sources.load(TOY, str(folder))
  assert "TFDS does not have it" in one_line(error)


def test_the_fingerprint_is_of_the_rows_and_of_their_order(folder):
  before = sources.load(TOY, str(folder))
  assert sources.load(TOY, str(folder / "toy")).fingerprint == before.fingerprint
  assert sources.DatasetRows(before.rows[::-1], "").fingerprint != before.fingerprint
  write(folder / "toy" / "b.jsonl", "lasT ")
  assert sources.load(TOY, str(folder)).fingerprint != before.fingerprint


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"text": "a"}\n\n{"txt": "b"}\n', "b.jsonl:3 is malformed: it has no 'text'"),
    (b'{"text": "a"}\n{"text": ', "b.jsonl:2 is malformed: Expecting value"),
    (b"[1]\n", "b.jsonl:1 is malformed: a list where an object should be"),
    (b'{"text": null}\n', "b.jsonl:1 is malformed"),
    (b'{"text": "caf\xe9"}\n', "b.jsonl is not UTF-8"),
    (b"[" * 100_000 + b"\n", "b.jsonl:1 is malformed: maximum recursion depth"),
    (b'{"text": ' + b"[" * 100_000 + b"\n", "b.jsonl:1 is malformed: maximum recursion depth"),
    (b'{"' + b"x" * 100_000 + b'": 1}\n', "b.jsonl:1 is malformed: it has no 'text'"),
  ],
)
def test_a_malformed_file_is_one_line(tmp_path, content, message):
  path = tmp_path / "b.jsonl"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    sources.load(TOY, str(path))
  one_line(error)


@pytest.mark.parametrize(
  "content, kind",
  [
    (gzip.compress(b"text"), "gzip file"),
    (b"\x28\xb5\x2f\xfd\x00", "zstd file"),
    (b"PK\x03\x04", "zip file"),
    (b"PAR1\x15", "Parquet file"),
    (b'{"text": "a"}\n', "is JSON"),
    (b'\xef\xbb\xbf [\n {"text": "a"}]', "is JSON"),
    (b'<refset setid="newstest2014">', "XML or SGML"),
    (b"<?xml version='1.0'?>", "XML or SGML"),
  ],
)
def test_what_is_no_plain_text_is_not_scored_as_one(tmp_path, content, kind):
  path = tmp_path / "mine"
  path.write_bytes(content)
  readers = [("ptb", "invertible"), ("wikitext2", "invertible"), ("wikitext2", "megatron")]
  readers += [("wikitext2", "lm_eval"), ("lm1b", "raw"), ("text", "whole")]
  readers += [("lambada", "original_last_word")]
  for reader in readers:
    with pytest.raises(ValueError, match=kind) as error:
      sources.load(tasks.get(*reader).source, str(path))
    assert str(path) in one_line(error)


def test_a_text_may_begin_as_json_does_under_a_texts_name(tmp_path):
  path = tmp_path / "mine.txt"
  path.write_text('{"a": 1}')
  assert sources.load(tasks.get("text").source, str(path)).rows == [{"text": '{"a": 1}'}]
  # these begin otherwise
  for text in ("{ braces }", "[1] a note", "<unk> of the law", '"quoted": text'):
    (tmp_path / "prose").write_text(text)
    assert len(sources.load(tasks.get("ptb").source, str(tmp_path / "prose"))) == 1


def test_rows_without_others_are_those_that_are_not_among_them():
  rows = sources.DatasetRows([{"a": 1}, {"a": 2}, {"a": 1, "b": 0}], "here")
  assert rows.without(sources.DatasetRows([{"a": 3}], "")) is rows
  left = rows.without(sources.DatasetRows([{"b": 0, "a": 1}, {"a": 2}], ""))
  assert left.rows == [{"a": 1}] and left.origin == "here"


def test_a_file_without_rows_is_no_result(tmp_path):
  with pytest.raises(ValueError, match="there are no rows in .*b.jsonl"):
    sources.load(TOY, str(write(tmp_path / "b.jsonl")))


def test_a_folder_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="not found; get it from .* and put it in .*nowhere"):
    sources.load(TOY, str(tmp_path / "nowhere"))


def test_a_home_folder_may_be_written_short(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder))
  assert len(sources.load(TOY, "~/toy")) == 4


# ---- TFDS

PASSAGES = dataclasses.replace(
  TOY, name="passages", tfds="lambada", row=lambda record: row_of({"text": record["passage"]})
)


def examples(*texts: str):
  return [(i, {"passage": text}) for i, text in enumerate(texts)]


def test_where_no_file_lies_tfds_is_read_and_a_file_comes_first(folder, prepare):
  tfds_dir = prepare("lambada", "test", examples("one", "two"))
  rows = sources.load(PASSAGES, str(folder), tfds_dir)
  assert (
    sorted(row["text"] for row in rows) == ["ONE", "TWO"] and rows.origin == "TFDS lambada, test"
  )
  for name in ("a.jsonl", "b.jsonl"):
    write(folder / "passages" / name, name)
  assert [row["text"] for row in sources.load(PASSAGES, str(folder), tfds_dir)] == [
    "A.JSONL",
    "B.JSONL",
  ]


def test_a_set_in_neither_place_says_how_to_get_it_from_both(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"https://toy.example.*--data.*download_and_prepare\(\)"
  ) as error:
    sources.load(PASSAGES, None, str(tmp_path))
  one_line(error)


def test_a_malformed_record_of_tfds_is_named(prepare):
  strange = dataclasses.replace(PASSAGES, row=lambda record: row_of({"text": record["story"]}))
  with pytest.raises(
    ValueError, match="record 0 of TFDS lambada is malformed: it has no 'story'"
  ) as error:
    sources.load(strange, None, prepare("lambada", "test", examples("one")))
  one_line(error)


def test_records_become_plain_values():
  record = {
    "text": "é".encode(),
    "label": np.int64(1),
    "texts": np.array([b"a", b"b"], object),
    "nested": {"on": np.bool_(True), "ids": np.arange(2), "parts": [b"c"]},
  }
  found = sources.decoded(record)
  expected = {
    "text": "é",
    "label": 1,
    "texts": ["a", "b"],
    "nested": {"on": True, "ids": [0, 1], "parts": ["c"]},
  }
  assert found == expected and json.loads(json.dumps(found)) == expected


# ---- records of another shape: each is an error of its task, never another text that is scored

TEXTS = {
  "lambada": {"text": "a cat sat"},
  "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"]}
  | {"label": 1},
  "arc_easy": {
    "question": {
      "stem": "a",
      "choices": [{"label": "A", "text": "b"}, {"label": "B", "text": "c"}],
    },
    "answerKey": "B",
  },
  "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"},
  "copa": {"premise": "a.", "choice1": "b", "choice2": "c", "question": "cause", "label": 0},
  "blimp_passive_1": {"sentence_good": "a", "sentence_bad": "b"},
  "natural_questions": {"question": "a", "answer": ["b"]},
}
WRONG = [None, 3, 1.5, True, [], {}, ["a", 3], "\ud800", 1e999, {"label": "A"}, [["a"]]]


@pytest.mark.parametrize("name", TEXTS)
def test_a_record_of_another_shape_is_malformed_and_never_scored(tmp_path, name):
  source = tasks.get(name).source
  path = tmp_path / "rows.jsonl"

  def rows(record) -> list[dict]:
    path.write_text(json.dumps(record) + "\n")
    return sources.load(source, str(path)).rows

  assert len(rows(TEXTS[name])) == 1
  for key, right in TEXTS[name].items():
    # A label is a whole number, or its digits.
    is_number = key in ("label", "answer") and not isinstance(right, list)
    for wrong in WRONG:
      if is_number and wrong == 3:
        continue
      with pytest.raises(ValueError, match="rows.jsonl:1 is malformed: ") as error:
        rows(TEXTS[name] | {key: wrong})
      assert len(one_line(error)) < 600, (key, wrong)


def test_a_story_of_another_shape_is_malformed(tmp_path):
  path = tmp_path / "coqa-dev-v1.0.json"
  turn = {"input_text": "a", "turn_id": 1}
  story = {"story": "b", "questions": [turn], "answers": [turn], "additional_answers": {}}
  read = tasks.get("coqa").source.read

  def rows(payload) -> list[dict]:
    path.write_text(payload if isinstance(payload, str) else json.dumps(payload))
    return list(read(path))

  assert len(rows({"data": [story]})) == 1
  wrong_texts = [[turn | {"input_text": wrong}] for wrong in WRONG]
  payloads = []
  for key in ("questions", "answers"):
    for turns in (None, 3, "ab", [], {}, *wrong_texts):
      payloads.append({"data": [story | {key: turns}]})
  payloads += [{"data": [story | {"story": wrong}]} for wrong in WRONG]
  payloads += [{"data": wrong} for wrong in (None, 3, "ab", {}, [3], ["ab"])]
  payloads += ["[" * 100_000, '{"data": ' + "[" * 100_000]
  for payload in payloads:
    with pytest.raises(ValueError, match="coqa-dev-v1.0.json"):
      list(rows(payload))


@pytest.mark.parametrize(
  ("name", "file", "content"),
  [
    ("winograd273", "WSCollection.xml", b"<a>" * 50_000),
    ("winograd273", "WSCollection.xml", b"<?xml version='1.0' encoding='nothing'?><a/>"),
    ("winograd273", "WSCollection.xml", b"<?xml version='1.0' encoding='utf-7'?><a/>"),
    ("storycloze", "cloze_test_val__spring2016.csv", b'a,b\n"' + b"x" * 200_000 + b'"\n'),
    ("storycloze", "cloze_test_val__spring2016.csv", b"a,b\n\x00,\n"),
    ("storycloze", "cloze_test_val__spring2016.csv", b"a\n1,2,3\n"),
    ("cbt_cn", "cbtest_CN_valid_2000ex.txt", b"x" * 1_000_000),
    ("enwik8", "enwik8", b"short"),
  ],
)
def test_a_published_file_of_another_kind_is_one_line(tmp_path, name, file, content):
  (tmp_path / file).write_bytes(content)
  with pytest.raises(ValueError, match=file) as error:
    sources.load(tasks.get(name).source, str(tmp_path))
  assert len(one_line(error)) < 600


@pytest.mark.parametrize("data", ["gs://bucket/data", "~nobody_of_this_name/data", "a\0b"])
def test_data_that_are_no_local_path_are_refused(data):
  with pytest.raises(ValueError, match="local path|no such user|NUL"):
    sources.load(TOY, data)
