# SPDX-License-Identifier: Apache-2.0
"""CoQA: questions about a story, each after those before it (section 3.5 of the GPT-2 paper; 55 F1 at 1542M).

The paper conditions on "a document, the history of the associated conversation, and a final token A:" and decodes
greedily. It does not say how the history is written; here it is `Q:` and `A:` lines, with the annotator's own answers.
An item is a story with all its questions, as its questions depend on each other. TFDS has one of the up to four human
answers that the official score counts, so its F1 is lower than that of `coqa-dev-v1.0.json`.
"""

import collections
import json
import pathlib
import re
import string
from collections.abc import Iterator, Sequence

from gpt2_jax.evaluate.metric import percent
from gpt2_jax.evaluate.sources import Row, Source, at_place
from gpt2_jax.evaluate.task import Generated, Prompt, Task

N_NEW = 40  # tokens of an answer at most; people's answers have 2.7 words on average (Reddy et al., 2019, Table 3)
PUBLISHED = "https://stanfordnlp.github.io/coqa"


def read(path: pathlib.Path) -> Iterator[Row]:
  """Stories of a published file."""
  stories = at_place(str(path), lambda: list(json.loads(path.read_text(encoding="utf-8"))["data"]))
  for i, story in enumerate(stories):
    yield at_place(f"{path}: story {i:,}", lambda story=story: _row(story))


def _row(story: dict) -> Row:
  people = [story["answers"], *story.get("additional_answers", {}).values()]
  turns = [question["turn_id"] for question in story["questions"]]
  for answers in people:
    if [answer["turn_id"] for answer in answers] != turns:
      raise ValueError(f"its answers are not to its questions, turns {turns[:1]} to {turns[-1:]}")
  answers = [[answer["input_text"] for answer in given] for given in zip(*people, strict=True)]
  return _checked(story["story"], [question["input_text"] for question in story["questions"]], answers)


def _tfds_row(record: dict) -> Row:
  return _checked(record["story"], record["questions"], [[answer] for answer in record["answers"]["input_text"]])


def _checked(story: str, questions: list[str], answers: list[list[str]]) -> Row:
  if not questions or len(questions) != len(answers):
    raise ValueError(f"it has {len(questions)} questions and {len(answers)} answers")
  return {"story": story, "questions": questions, "answers": answers}


def requests(row: Row) -> list[Prompt]:
  """One for each question, after the story and the conversation so far."""
  before, asked = row["story"].strip() + "\n", []
  for question, answers in zip(row["questions"], row["answers"], strict=True):
    before += f"Q: {question.strip()}\nA:"
    asked.append(Prompt(before, N_NEW, stop=("\n",)))
    before += f" {answers[0].strip()}\n"
  return asked


def example(row: Row) -> str:
  """The story and the whole conversation."""
  return f"{requests(row)[-1].text} {row['answers'][-1][0].strip()}"


def sums(row: Row, answers: list[Generated]) -> dict[str, float]:
  scores = [against_people(answer.text, references) for answer, references in zip(answers, row["answers"], strict=True)]
  return {"f1": sum(scores), "questions": float(len(scores))}


def against_people(answer: str, references: Sequence[str]) -> float:
  """The best F1 of an answer, averaged over what remains when each of several references is left out.

  People were scored that way, each against the others, so that theirs and a model's figures compare
  (`evaluate-v1.0.py` of CoQA).
  """
  scores = [f1(answer, reference) for reference in references]
  if len(scores) == 1:
    return scores[0]
  return sum(max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))) / len(scores)


def f1(answer: str, reference: str) -> float:
  """F1 over the words of both; 1 if neither has any, as in SQuAD 2.0."""
  given, wanted = normalized(answer).split(), normalized(reference).split()
  if not given or not wanted:
    return float(given == wanted)
  common = (collections.Counter(given) & collections.Counter(wanted)).total()
  return 2 * common / (len(given) + len(wanted))


def normalized(text: str) -> str:
  """SQuAD's normalization: lower case, without ASCII punctuation and articles, single spaces."""
  text = text.lower().translate(str.maketrans("", "", string.punctuation))
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


TASKS = (
  Task(
    name="coqa",
    protocol="gold_history",
    about="F1 against people's answers; greedy, after the story and Q:/A: lines with people's answers (paper, 3.5)",
    source=Source(
      name="coqa",
      files=("coqa-dev-v1.0.json",),
      read=read,
      url=PUBLISHED,
      tfds="coqa",
      split="test",
      row=_tfds_row,
      examples=Source("coqa", ("coqa-train-v1.0.json",), read, PUBLISHED, "coqa", "train", _tfds_row),
    ),
    requests=requests,
    sums=sums,
    metrics={"f1": percent("f1", over="questions")},
    example=example,
  ),
)
