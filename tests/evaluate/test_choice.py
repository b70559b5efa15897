# SPDX-License-Identifier: Apache-2.0
"""Choices between texts, against lm-evaluation-harness's own definitions and against TFDS's own
readers."""

import csv
import json
import os
import pathlib

import numpy as np
import pytest

from gpt2_jax.evaluate import sources
from gpt2_jax.evaluate.task import Likelihood, Task
from gpt2_jax.evaluate.tasks import choice, pairs

TASKS = {task.name: task for task in choice.TASKS + pairs.TASKS}

# Records as they are published; no text is from the sets.
HELLASWAG = [
  {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he starts Pulling",
    "ctx": "A man is sitting on a roof. he starts Pulling",
    "endings": ["up roofing.", "rope  off.", "up [title] his hat.", "a nap."],
    "label": 3,
  },
  {
    "activity_label": "Home and Garden",
    "ctx_a": "[header] How to sit [title] Find a chair. [step] Look around.  ",
    "ctx_b": "",
    "ctx": "[header] How to sit [title] Find a chair. [step] Look around.",
    "endings": ["[substeps] Under the table.", "Sit. [title] Stand.", "é", "On [x] it"],
    "label": 0,
  },
]
PIQA = [
  {"goal": "open a jar", "sol1": "twist the lid", "sol2": "twist the bottom", "label": 0},
  {"goal": "dry a cup", "sol1": "use water", "sol2": "use a cloth.", "label": 1},
]
ARC = [
  ("What do plants need?", ["soap", "light", "noise", "paint", "glue"], list("ABCDE"), "B"),
  ("Which is hot?", ["ice", "snow", "fire", "rain"], list("1234"), "3"),
]
WINOGRANDE = [
  {
    "sentence": "Ann paid Eve because _ was owed money.",
    "option1": "Ann",
    "option2": "Eve",
    "answer": "2",
  },
  {
    "sentence": "The cup fits the box as the _ is small.",
    "option1": "cup",
    "option2": "box",
    "answer": "1",
  },
]
COPA = [
  {
    "premise": "The man fell. ",
    "choice1": "I saw it.",
    "choice2": "He slipped.",
    "question": "cause",
    "label": 1,
  },
  {
    "premise": "It rained.",
    "choice1": "We got wet.",
    "choice2": "We dried.",
    "question": "effect",
    "label": 0,
  },
]
STORYCLOZE = [
  {
    "context": "A b. C d. E f. G h.",
    "endings": ["She left.", "She flew, sang, and hid."],
    "label": 2,
  },
  {"context": "I j. K, l. M n. O p.", "endings": ["He ate.", "He slept."], "label": 1},
]
BLIMP = [
  {"sentence_good": "Some dog barks.", "sentence_bad": "Some dog bark."},
  {"sentence_good": "Who sang?", "sentence_bad": "Sang who?"},
]


def write_lines(path: pathlib.Path, records) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
  return path


def arc_records():
  for i, (stem, texts, labels, key) in enumerate(ARC):
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    yield {"id": str(i), "question": {"stem": stem, "choices": choices}, "answerKey": key}


def blimp_records():
  said = {"field": "syntax", "linguistics_term": "island_effects", "UID": "wh_island"}
  methods = dict.fromkeys(
    ("simple_LM_method", "one_prefix_method", "two_prefix_method", "lexically_identical"), True
  )
  return [record | said | methods | {"pairID": str(i)} for i, record in enumerate(BLIMP)]


def publish(name: str, folder: pathlib.Path) -> pathlib.Path:
  """A file as the set's authors publish it."""
  source = TASKS[name].source
  path = folder / source.name / source.files[0].replace("*", " - 1")
  records = {
    "hellaswag": HELLASWAG,
    "piqa": [
      {key: value for key, value in record.items() if key != "label"} | {"id": "a"}
      for record in PIQA
    ],
    "arc_easy": list(arc_records()),
    "arc_challenge": list(arc_records()),
    "winogrande": [record | {"qID": str(i)} for i, record in enumerate(WINOGRANDE)],
    "copa": [record | {"idx": i} for i, record in enumerate(COPA)],
    "blimp_wh_island": blimp_records(),
  }
  if name == "storycloze":
    path.parent.mkdir()
    fields = ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5))]
    fields += ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
    with open(path, "w", encoding="utf-8", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(fields)
      for i, row in enumerate(STORYCLOZE):
        sentences = [f"{sentence.removesuffix('.')}." for sentence in row["context"].split(". ")]
        writer.writerow([i, *sentences, *row["endings"], row["label"]])
    return path
  if name == "piqa":
    path.parent.mkdir()
    path.with_name("valid-labels.lst").write_text(
      "".join(f"{record['label']}\n" for record in PIQA)
    )
  return write_lines(path, records[name])


def harness_records(name: str) -> tuple[str, list[dict]]:
  """The harness's file for a task, and records with the fields of the datasets that it reads."""
  arc = [
    {"question": q, "choices": {"text": t, "label": names}, "answerKey": key}
    for q, t, names, key in ARC
  ]
  cloze = [
    {
      f"input_sentence_{i}": f"{part.removesuffix('.')}."
      for i, part in enumerate(row["context"].split(". "), 1)
    }
    | {f"sentence_quiz{i}": ending for i, ending in enumerate(row["endings"], 1)}
    | {"answer_right_ending": row["label"]}
    for row in STORYCLOZE
  ]
  return {
    "hellaswag": (
      "hellaswag/hellaswag.yaml",
      [record | {"label": str(record["label"])} for record in HELLASWAG],
    ),
    "piqa": ("piqa/piqa.yaml", PIQA),
    "arc_easy": ("arc/arc_easy.yaml", arc),
    "arc_challenge": ("arc/arc_challenge.yaml", arc),
    "winogrande": ("winogrande/default.yaml", WINOGRANDE),
    "copa": ("super_glue/copa/default.yaml", COPA),
    "storycloze": ("storycloze/storycloze_2016.yaml", cloze),
    "blimp_wh_island": ("blimp/wh_island.yaml", blimp_records()),
  }[name]


NAMES = (
  "hellaswag",
  "piqa",
  "arc_easy",
  "arc_challenge",
  "winogrande",
  "copa",
  "storycloze",
  "blimp_wh_island",
)


def likelihoods(nats) -> list[Likelihood]:
  return [Likelihood(float(each), 1, False, False) for each in nats]


def arguments(task: Task, row: dict) -> list[tuple[str, str]]:
  return [(request.context, request.continuation) for request in task.requests(row)]


@pytest.mark.parametrize("name", NAMES)
def test_requests_and_scores_are_the_harness_s(name, tmp_path, harness_task):
  path, records = harness_records(name)
  theirs, ours = harness_task(path, records), TASKS[name]
  rows = sources.load(ours.source, str(publish(name, tmp_path)))
  rng, seen = np.random.default_rng(0), set()
  for row, document in zip(rows, theirs.eval_docs, strict=True):
    context = theirs.fewshot_context(document, 0)
    requests = theirs.construct_requests(document, context, metadata=(name, 0, 1))
    assert arguments(ours, row) == [request.arguments for request in requests]
    for _ in range(20):
      nats = rng.integers(1, 4, len(requests)).astype(float)  # so few values that many tie
      score = theirs.process_results(document, [(-each, False) for each in nats])
      sums = ours.sums(row, likelihoods(nats))
      assert sums["correct"] == score["acc"]
      if "correct_norm" in sums:
        assert sums["correct_norm"] == score["acc_norm"]
      seen.add((sums["correct"], sums.get("correct_norm", 1.0)))
  assert {correct for correct, _ in seen} == {0.0, 1.0}
  assert ("accuracy_norm" in ours.metrics) == ("acc_norm" in score)
  assert {key for metric in ours.metrics.values() for key in metric.keys} <= {*sums, "items"}


@pytest.mark.parametrize("name", ["hellaswag", "piqa", "arc_easy", "winogrande", "copa"])
def test_an_example_is_the_harness_s(name, tmp_path, harness_task):
  path, records = harness_records(name)
  theirs, ours = harness_task(path, records[:1], records[1:] * 3), TASKS[name]
  rows = sources.load(ours.source, str(publish(name, tmp_path)))
  [document] = theirs.eval_docs
  context = theirs.fewshot_context(document, 1)
  requests = theirs.construct_requests(document, context, metadata=(name, 0, 1))
  prefix = ours.example(rows[1]) + ours.separator
  assert [(prefix + before, after) for before, after in arguments(ours, rows[0])] == [
    request.arguments for request in requests
  ]


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "arc_challenge", "winogrande", "storycloze"])
def test_tfds_has_the_rows_of_the_published_file(name, tmp_path, prepare):
  path, source = publish(name, tmp_path), TASKS[name].source
  beside = {"data_path": path, "label_path": path.with_name("valid-labels.lst")}
  tfds_dir = prepare(
    source.tfds, source.split, **(beside if name == "piqa" else {"filepath": str(path)})
  )
  same_rows(source, tmp_path, tfds_dir)


def test_tfds_has_the_pairs_of_blimp(tmp_path, prepare):
  """Its records by hand: its reader imports TensorFlow."""
  records = [record | {"pair_id": record["pairID"]} for record in blimp_records()]
  for record in records:
    del record["pairID"]
  source = TASKS["blimp_wh_island"].source
  publish("blimp_wh_island", tmp_path)
  same_rows(source, tmp_path, prepare(source.tfds, source.split, enumerate(records)))


def test_tfds_has_the_rows_of_copa(tmp_path):
  """As it gives them; its whole builder imports TensorFlow."""
  source = TASKS["copa"].source
  rows = sources.load(source, str(publish("copa", tmp_path)))
  for row, record in zip(rows, COPA, strict=True):
    texts = {key: record[key].encode() for key in ("premise", "choice1", "choice2", "question")}
    assert (
      source.row(sources.decoded(texts | {"label": np.int64(record["label"]), "idx": np.int32(0)}))
      == row
    )


def same_rows(source: sources.Source, folder: pathlib.Path, tfds_dir: str) -> None:
  from_file, from_tfds = sources.load(source, str(folder)), sources.load(source, None, tfds_dir)
  assert "TFDS" in from_tfds.origin and len(from_file) == 2
  assert sorted(map(repr, from_tfds)) == sorted(map(repr, from_file))


def test_examples_come_from_the_training_sets(prepare, tmp_path):
  """Those of TFDS by the split's name, those of a folder by the file's."""
  for name in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "copa"):
    source = TASKS[name].source
    [file] = source.examples.files
    assert "rain" in file and file != source.files[0] and "train" in source.examples.split
    assert source.examples.name == source.name and source.examples.tfds == source.tfds
  path = write_lines(
    tmp_path / "train_xl.jsonl", [record | {"qID": "a"} for record in WINOGRANDE[:1]]
  )
  source = TASKS["winogrande"].source.examples
  tfds_dir = prepare("winogrande", "train_xl", filepath=str(path))
  assert sources.load(source, str(tmp_path)).rows == sources.load(source, None, tfds_dir).rows != []


def test_by_hand_the_longer_choice_wins_per_character():
  task = TASKS["piqa"]
  row = {"goal": "g", "sol1": "ab", "sol2": "abcdefgh", "label": 1}
  assert arguments(task, row) == [
    ("Question: g\nAnswer:", " ab"),
    ("Question: g\nAnswer:", " abcdefgh"),
  ]
  # 1.5 and 0.5 a character
  assert task.sums(row, likelihoods([3.0, 4.0])) == {"correct": 0.0, "correct_norm": 1.0}
  # the first of a tie
  assert task.sums(row, likelihoods([4.0, 4.0])) == {"correct": 0.0, "correct_norm": 1.0}
  accents = row | {"sol1": "éé", "sol2": "abc"}  # 1.25 a character, or 0.625 a byte; and 1
  assert task.sums(accents, likelihoods([2.5, 3.0])) == {"correct": 0.0, "correct_norm": 1.0}
  assert task.sums(row | {"label": 0}, likelihoods([1.0, 4.0])) == {
    "correct": 1.0,
    "correct_norm": 1.0,
  }


def test_blimp_has_67_sets_and_each_is_a_task():
  names = [name for name in TASKS if name.startswith("blimp_")]
  assert len(set(names)) == len(pairs.SETS) == 67
  assert {TASKS[name].source.tfds for name in names} == {f"blimp/{name}" for name in pairs.SETS}


@pytest.mark.skipif("GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set")
def test_every_pair_of_blimp_is_asked_and_one_sentence_of_it_is_right():
  data = os.environ["GPT2_JAX_TEST_DATA"]
  names = [path.stem for path in pathlib.Path(data, "blimp").glob("*.jsonl")]
  assert len(names) == 12
  for name in names:
    task = TASKS[f"blimp_{name}"]
    rows = sources.load(task.source, data)
    assert len(rows) == 1000
    lines = pathlib.Path(data, "blimp", f"{name}.jsonl").read_text("utf-8").splitlines()
    for row, record in zip(rows, map(json.loads, lines), strict=True):
      assert arguments(task, row) == [
        ("", " " + record["sentence_good"]),
        ("", " " + record["sentence_bad"]),
      ]
      assert task.sums(row, likelihoods([1.0, 2.0])) == {"correct": 1.0}
      assert task.sums(row, likelihoods([2.0, 1.0])) == {"correct": 0.0}


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (
      "hellaswag",
      {**HELLASWAG[0], "label": 4},
      "val.jsonl:1 is malformed: it has 4 choices, and number 4 is",
    ),
    ("hellaswag", {"ctx": "a"}, "val.jsonl:1 is malformed: it has no 'activity_label'"),
    ("arc_easy", {**next(arc_records()), "answerKey": "Z"}, "Test.jsonl:1 is malformed: .*'Z'"),
    (
      "winogrande",
      {**WINOGRANDE[0], "sentence": "None here."},
      "dev.jsonl:1 is malformed: there is no blank _",
    ),
    ("winogrande", {**WINOGRANDE[0], "answer": ""}, "dev.jsonl:1 is malformed"),
    ("copa", {**COPA[0], "question": "reason"}, "val.jsonl:1 is malformed: it asks for 'reason'"),
    (
      "blimp_wh_island",
      {"sentence_good": "Yes."},
      "wh_island.jsonl:1 is malformed: it has no 'sentence_bad'",
    ),
  ],
)
def test_a_malformed_record_is_named(name, content, message, tmp_path):
  source = TASKS[name].source
  path = write_lines(tmp_path / source.files[0], [content])
  with pytest.raises(ValueError, match=message):
    sources.load(source, str(path))


def test_questions_and_labels_of_piqa_must_match(tmp_path):
  path = publish("piqa", tmp_path)
  path.with_name("valid-labels.lst").write_text("0\n")
  with pytest.raises(
    ValueError, match="valid.jsonl has 2 questions, and .*valid-labels.lst has 1 labels"
  ):
    sources.load(TASKS["piqa"].source, str(path))
  path.with_name("valid-labels.lst").unlink()
  with pytest.raises(FileNotFoundError, match="valid-labels.lst is not there.*yonatanbisk"):
    sources.load(TASKS["piqa"].source, str(path))


@pytest.mark.parametrize(
  ("name", "row"),
  [
    ("piqa", {"goal": "g", "sol1": "a", "sol2": " ", "label": 0}),
    ("copa", {"premise": "A.", "choice1": "", "choice2": "b", "question": "cause", "label": 0}),
    ("winogrande", {"sentence": "He saw _", "option1": "a", "option2": "b", "label": 0}),
  ],
)
def test_an_empty_choice_is_never_scored(name, row):
  with pytest.raises(ValueError, match="one of its choices is empty"):
    TASKS[name].requests(row)
