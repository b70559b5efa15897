# SPDX-License-Identifier: Apache-2.0
"""GPT-1 through every command, from OpenAI's shards and its own vocabulary to its paper's tasks."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.data.examples import ExampleStore
from gpt2_jax.gpt1 import new_model
from gpt2_jax.tokenizer import read_tokenizer_folder
from tests.launch.bad_inputs.runner import Sandbox, Worker

START, DELIMITER, CLASSIFY = 40478, 40479, 40480
STEPS = "steps=2 steps_per_call=2 batch_size=2 warmup_steps=1 log_every=1 eval_every=2"
STEPS += " eval_windows=4 save_every=2 learning_rate=1e-3"
DATA = os.environ.get("GPT2_JAX_TEST_DATA", "")
KNOBS = [f"--config.{knob}" for knob in STEPS.split()]
TEXT = "It was a bright day. 'Who's there?' said the old man -- nobody answered him.\n" * 12


class FastWorker(Worker):
  """A worker that compiles as the tests do: with less of LLVM's optimization."""

  def environment(self) -> dict[str, str]:
    return super().environment() | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
  """A worker in a folder with OpenAI's files of a small GPT-1, one that knows the tasks, a text."""
  if not DATA:
    pytest.skip("GPT2_JAX_TEST_DATA is not set: no vocabulary of GPT-1")
  pytest.importorskip("ftfy")
  pytest.importorskip("spacy")
  top = tmp_path_factory.mktemp("gpt1")
  (top / "streams").mkdir()
  worker = FastWorker(Sandbox(top).folder, top / "streams")

  # Heads of 64 columns, since the shards do not state how many there are.
  sizes = {"n_vocab": 40478, "n_ctx": 128, "n_embd": 64, "n_head": 1, "n_layer": 1}
  config = gpt2_jax.ModelConfig(**sizes, dtype="float32", family="gpt1")
  with jax.set_mesh(gpt2_jax.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    model = jax.jit(new_model, static_argnums=0)(config, jax.random.key(0))
  tokenizer = read_tokenizer_folder(pathlib.Path(DATA, "gpt1"))
  gpt2_jax.save_pretrained(model, tokenizer, str(worker.folder / "gpt1"), form="gpt1")

  (worker.folder / "text.txt").write_text(TEXT)
  run(worker, "convert", "--from=./gpt1", "--to=tasks", "--task_tokens")
  yield worker
  worker.close()


def run(worker: Worker, command: str, *flags: str) -> str:
  """What a command that has to work prints."""
  result = worker.run(command, flags, seconds=120)
  assert result.status == 0, (command, flags, result)
  return result.out


def refused(worker: Worker, command: str, *flags: str) -> str:
  """The one line with which a command refuses its flags."""
  result = worker.run(command, flags)
  errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
  assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err, result
  assert len(errors[0]) < 600
  return errors[0]


def losses(workdir: pathlib.Path) -> dict[str, float]:
  """The last value of each name in metrics.jsonl."""
  last = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    last |= json.loads(line)
  return last


def test_shards_become_a_folder_and_shards_again(worker):
  out = run(worker, "convert", "--from=./gpt1", "--to=hf", "--format=hf")
  back = run(worker, "convert", "--from=./hf", "--to=shards", "--format=gpt1")
  [sha256] = re.findall("weights sha256 (.{64}): read back", out)
  assert sha256 in back and "own form" not in out + back
  for name in os.listdir(worker.folder / "gpt1"):
    written, again = ((worker.folder / x / name).read_bytes() for x in ("gpt1", "shards"))
    assert written == again, name


def test_a_text_is_tokenized_learned_continued_and_scored(worker):
  """By OpenAI's own tokens, which a run's workdir has, too; and within the context."""
  run(worker, "tokenize", "--files=text.txt", "--tokenizer=./gpt1", "--processes=1", "--out=text")
  data = ("--config.data.train=text", "--config.data.validation=text", "--config.init_from=./gpt1")
  run(worker, "train", "--config=finetune", "--workdir=run", *data, *KNOBS)
  assert losses(worker.folder / "run")["val_loss"] < np.log(40478) + 0.1
  flags = ("--model=run", "--prompt=The old man", "--greedy")
  assert run(worker, "sample", *flags, "--n_new=8").startswith("The old man")
  refusal = refused(worker, "sample", "--model=run", f"--prompt={TEXT}")
  assert "context of 128" in refusal and "window" in refusal
  assert "no <|endoftext|> for an empty prompt" in refused(worker, "sample", "--model=./gpt1")

  # LAMBADA's last word has to be found among GPT-1's tokens.
  knobs = ("--config.resamples=10", "--config.batch_size=8", "--config.limit=4")
  scored = ("--model=./gpt1", "--task=lambada", f"--data={DATA}", "--out=sweep")
  table = run(worker, "evaluate", *scored, *knobs)
  assert "lambada" in table and len(list((worker.folder / "sweep/cells").glob("*.json"))) == 1


def turns(*texts: tuple[str, str], label: int) -> dict:
  messages = [{"role": role, "content": content} for role, content in texts]
  return {"messages": messages, "label": label}


PREMISE, HYPOTHESIS = ("premise", "A man sleeps."), ("hypothesis", "He rests.")
OTHER = ("hypothesis", "He runs.")
# Of each task of the paper: a record, the knobs, how many texts an example has, and pairs.
TASKS = {
  "classification": (turns(("text", "A fine film."), label=1), "classes=2", 1, 0),
  "entailment": (
    {"prompt": "A man sleeps.", "completion": "He rests.", "label": 2},
    "classes=3",
    1,
    1,
  ),
  "similarity": (
    turns(
      *(PREMISE, HYPOTHESIS), ("premise", "He rests."), ("hypothesis", "A man sleeps."), label=1
    ),
    "classes=2 form=similarity",
    2,
    2,
  ),
  "choice": (
    turns(PREMISE, HYPOTHESIS, PREMISE, OTHER, label=0),
    "classes=2 form=choice",
    2,
    2,
  ),
}


@pytest.fixture(scope="module")
def rows(worker):
  """The folder of each task, whose examples are tokenized in it."""
  flags = ("--template=gpt1", "--loss=all", "--tokenizer=tasks", "--n_ctx=32", "--processes=1")
  folders = {}
  for task, (record, *_) in TASKS.items():
    folders[task] = worker.folder / task
    folders[task].mkdir()
    (folders[task] / "examples.jsonl").write_text((json.dumps(record) + "\n") * 4)
    run(worker, "tokenize", f"--examples={task}/examples.jsonl", *flags, f"--out={task}/rows")
  return folders


def test_each_text_has_its_start_and_its_end_and_a_pair_a_delimiter(rows):
  for task, (_, _, n_texts, n_pairs) in TASKS.items():
    store = ExampleStore.open(str(rows[task] / "rows"))
    tokens = store.read_rows(np.arange(store.count_rows(32))).tokens_BT
    n_tokens = [(tokens == token).sum() for token in (START, DELIMITER, CLASSIFY)]
    assert n_tokens == [4 * n_texts, 4 * n_pairs, 4 * n_texts], task


# The command of entailment stands in configs/README.md, whose commands tests/pages runs; and
# classification has its program.
@pytest.mark.parametrize("task", ["similarity", "choice"])
def test_the_papers_tasks_train(task, rows, worker):
  """Both losses and the accuracy are reported."""
  data = (f"--config.data.train={task}/rows", f"--config.data.validation={task}/rows")
  heads = [f"--config.classify.{knob}" for knob in TASKS[task][1].split()]
  model = ("--config.init_from=./tasks", "--config.model.n_ctx=32")
  workdir = f"--workdir={task}/run"
  run(worker, "train", "--config=finetune", workdir, *model, *data, *heads, *KNOBS)
  last = losses(rows[task] / "run")
  assert 0 < last["label_loss"] < 5 and 0 <= last["val_accuracy"] <= 1
  assert last["lm_loss"] > 1


def test_what_gpt1_cannot_do_is_one_line(worker):
  twice = refused(worker, "convert", "--from=tasks", "--to=new", "--task_tokens")
  assert "has '_start_' already; leave it out" in twice
  flags = ("--examples=examples.jsonl", "--template=gpt1", "--out=new", "--n_ctx=32")
  (worker.folder / "examples.jsonl").write_text('{"prompt": "a", "completion": "b", "label": 0}\n')
  line = refused(worker, "tokenize", *flags, "--tokenizer=./gpt1", "--processes=1")
  assert "inserts '_start_', and the tokenizer has no such token" in line

  # Rows of the tokenizer with the tasks' tokens are none for the model without them.
  run(worker, "tokenize", *flags, "--tokenizer=tasks", "--processes=1", "--loss=all")
  data = ("--config.data.train=new", "--config.data.validation=new", "--config.init_from=./gpt1")
  line = refused(worker, "train", "--config=finetune", "--workdir=no", *data, *KNOBS)
  assert "tokenizer" in line and not (worker.folder / "no").exists()
