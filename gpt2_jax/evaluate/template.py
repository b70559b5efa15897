# SPDX-License-Identifier: Apache-2.0
"""A task of your own, to copy and change: which of two cities is a country's capital.

  gpt2-jax evaluate --template > capitals.py
  mkdir -p data/capitals
  echo '{"country": "France", "capital": "Paris", "other": "Lyon"}' > data/capitals/capitals.jsonl
  gpt2-jax evaluate --include=capitals.py --task=capitals --model=gpt2 --data=data --out=runs/own

A task is two pure functions: `requests`, from a row to what the model is asked, and `sums`, from
its answers to numbers, which are added up over the rows. A metric divides those sums, last. Error
bars, few-shot examples, comparisons of models, the table and the plots come with it.
"""

from gpt2_jax.evaluate.metric import percent
from gpt2_jax.evaluate.sources import Source, json_lines
from gpt2_jax.evaluate.task import Loglikelihood, Task


def read(path):
  """Reads the data file. A row is a dict of what JSON has: texts, numbers, lists."""
  for row in json_lines(path):
    yield {key: row[key] for key in ("country", "capital", "other")}


def requests(row):
  """Asks the model. GPT-2's words begin with a space: it belongs to the continuation.

  Besides Loglikelihood, the requests in gpt2_jax/evaluate/task.py are RollingLoglikelihood (of a
  text of any length), GenerateUntil and NextWords.
  """
  context = f"The capital of {row['country']} is"
  return [Loglikelihood(context, f" {row['capital']}"), Loglikelihood(context, f" {row['other']}")]


def sums(row, answers):
  """Counts. `nats` is -log p: the likelier continuation has fewer."""
  capital, other = answers
  return {"correct": float(capital.nats < other.nats)}


def example(row):
  """Writes a row with its solution, for few-shot contexts: --task=capitals::5 puts five before."""
  return f"The capital of {row['country']} is {row['capital']}"


TASKS = (
  Task(
    name="capitals",
    protocol="pair",  # another way to ask the same rows is another protocol of the same name
    description="whether the capital is likelier than another city",
    # The file lies in data/capitals/. With downloads=(Download("https://...", "SHA-256"),),
    # --download fetches it.
    source=Source("capitals", ("capitals.jsonl",), read, url="this template"),
    requests=requests,
    sums=sums,
    metrics={"accuracy": percent("correct")},  # the first one is drawn
    example=example,
    separator="\n",
    chance={"accuracy": 50.0},
  ),
)
