# SPDX-License-Identifier: Apache-2.0
"""CoQA: F1 of answers to questions about a story, each after the questions before it.

Section 3.5 of the GPT-2 paper: 55 F1 at 1542M. The paper conditions on "a document, the history of
the associated conversation, and a final token A:" and decodes greedily. It does not say how the
history is written. Here it is `Q:` and `A:` lines, with the annotator's own answers.

An item is a story with all its questions, because they depend on each other. The official score
counts up to four human answers. TFDS has one of them, so that its F1 is lower than that of
`coqa-dev-v1.0.json`.
"""

import collections
import pathlib
import re
import string
from collections.abc import Iterator, Sequence

from gpt2_jax.evaluate.metric import percent
from gpt2_jax.evaluate.sources import Download, Row, Source, at_place, text_field, text_list
from gpt2_jax.evaluate.task import Generated, GenerateUntil, Task
from gpt2_jax.files import read_json_object

# An answer's most tokens. People's have 2.7 words on average (Reddy et al., 2019, table 3).
N_NEW = 40
PUBLISHED = "https://stanfordnlp.github.io/coqa"
# The SHA-256 is that of ParlAI (parlai/tasks/coqa/build.py).
DEV = Download(
  "https://nlp.stanford.edu/data/coqa/coqa-dev-v1.0.json",
  "dfa367a9733ce53222918d0231d9b3bedc2b8ee831a2845f62dfc70701f2540a",
)
TRAIN = Download(
  "https://nlp.stanford.edu/data/coqa/coqa-train-v1.0.json",
  "b0fdb2bc1bd38dd3ca2ce5fa2ac3e02c6288ac914f241ac409a655ffb6619fa6",
)

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads the stories of a published file."""

  def stories() -> list[dict]:
    published = read_json_object(path)["data"]
    if not isinstance(published, list):
      raise ValueError(f"its data are a {type(published).__name__}, where a list should be")
    return published

  for i, story in enumerate(at_place(str(path), stories)):
    yield at_place(f"{path}: story {i:,}", lambda story=story: _row(story))


def _row(story: dict) -> Row:
  questions = [text_field(question, "input_text") for question in story["questions"]]
  turns = [question["turn_id"] for question in story["questions"]]

  # 1. Every person's answers are in the order of the questions.
  people = [story["answers"], *story.get("additional_answers", {}).values()]
  for answers in people:
    if [answer["turn_id"] for answer in answers] != turns:
      raise ValueError("its answers are not to its questions: their turn_ids differ")

  # 2. From a list for each person to a list for each question.
  references = []
  for answers_to_one in zip(*people, strict=True):
    references.append([text_field(answer, "input_text") for answer in answers_to_one])
  return _checked(text_field(story, "story"), questions, references)


def _tfds_row(record: dict) -> Row:
  references = [[answer] for answer in text_list(record["answers"], "input_text")]
  return _checked(text_field(record, "story"), text_list(record, "questions"), references)


def _checked(story: str, questions: list[str], answers: list[list[str]]) -> Row:
  if not questions or len(questions) != len(answers):
    raise ValueError(f"it has {len(questions)} questions and {len(answers)} answers")
  return {"story": story, "questions": questions, "answers": answers}


# ---- rows to requests and sums


def _requests(row: Row) -> list[GenerateUntil]:
  """One request for each question, after the story and the conversation so far."""
  requests = []
  context = row["story"].strip() + "\n"
  for question, answers in zip(row["questions"], row["answers"], strict=True):
    context += f"Q: {question.strip()}\nA:"
    requests.append(GenerateUntil(context, N_NEW, stop=("\n",)))
    # The history has the person's answer, not the model's: a wrong answer does not spoil the rest.
    context += f" {answers[0].strip()}\n"
  return requests


def _example(row: Row) -> str:
  """The story and the whole conversation."""
  return f"{_requests(row)[-1].text} {row['answers'][-1][0].strip()}"


def _sums(row: Row, answers: list[Generated]) -> dict[str, float]:
  scores = []
  for answer, references in zip(answers, row["answers"], strict=True):
    scores.append(f1_of_references(answer.text, references))
  return {"f1": sum(scores), "questions": float(len(scores))}


def f1_of_references(answer: str, references: Sequence[str]) -> float:
  """F1 of an answer against several people's (`evaluate-v1.0.py` of CoQA).

  The best F1, averaged over what remains when each of the references is left out. People were
  scored that way, each against the others, so that their figures and a model's compare.
  """
  scores = [f1(answer, reference) for reference in references]
  if len(scores) == 1:
    return scores[0]

  best = []
  for left_out in range(len(scores)):
    best.append(max(scores[:left_out] + scores[left_out + 1 :]))
  return sum(best) / len(best)


def f1(answer: str, reference: str) -> float:
  """F1 over the words of both; 1 if neither has any, as in SQuAD 2.0."""
  answer_words = normalized(answer).split()
  reference_words = normalized(reference).split()
  if not answer_words or not reference_words:
    return float(answer_words == reference_words)

  # 2 P R / (P + R), with P = common / answer's words and R = common / reference's words
  common = collections.Counter(answer_words) & collections.Counter(reference_words)
  return 2 * common.total() / (len(answer_words) + len(reference_words))


def normalized(text: str) -> str:
  """SQuAD's normalization: lower case, no ASCII punctuation, no articles, single spaces."""
  text = text.lower().translate(str.maketrans("", "", string.punctuation))
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# ---- the task

EXAMPLES = Source(
  name="coqa",
  files=("coqa-train-v1.0.json",),
  read=read,
  url=PUBLISHED,
  tfds="coqa",
  split="train",
  row=_tfds_row,
  downloads=(TRAIN,),
)

TASKS = (
  Task(
    name="coqa",
    protocol="gold_history",
    description="F1 against people's answers; greedy, after the story and Q:/A: lines with "
    "people's answers (paper, 3.5)",
    source=Source(
      name="coqa",
      files=("coqa-dev-v1.0.json",),
      read=read,
      url=PUBLISHED,
      tfds="coqa",
      split="test",
      row=_tfds_row,
      examples=EXAMPLES,
      downloads=(DEV,),
    ),
    requests=_requests,
    sums=_sums,
    metrics={"f1": percent("f1", over="questions")},
    example=_example,
  ),
)
