# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness through this project's models, against its own `hf` model on the same
weights."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import runpy
import sys
import warnings

import jax
import numpy as np
import pytest
import tokenizers

lm_eval = pytest.importorskip("lm_eval")
for oracle in ("torch", "transformers", "accelerate"):
  pytest.importorskip(oracle)
if "GPT2_JAX_TEST_DATA" not in os.environ:
  pytest.skip("GPT2_JAX_TEST_DATA is not set", allow_module_level=True)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model, model_registry  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

import gpt2_jax  # noqa: E402
from gpt2_jax.batch import Batch  # noqa: E402
from gpt2_jax.evaluate import harness, loglikelihood, runner, sources, tasks  # noqa: E402
from gpt2_jax.evaluate.scorers import Scorer  # noqa: E402
from gpt2_jax.loss import NextToken  # noqa: E402
from gpt2_jax.model import ModelConfig  # noqa: E402
from gpt2_jax.optimizer import adamw  # noqa: E402
from gpt2_jax.schedules import cosine  # noqa: E402
from gpt2_jax.sharding import make_mesh  # noqa: E402
from gpt2_jax.tokenizer import EOT, Gpt2Bpe, HuggingFace  # noqa: E402
from gpt2_jax.train import init_state, scan_steps  # noqa: E402

DATA = pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"])
THEIRS = pathlib.Path(lm_eval.__file__).parent / "tasks"
BLIMP = ("wh_island", "passive_1", "only_npi_scope")
N_CTX = 128
MESHES = {"random": (1, 4, 2), "trained": (1, 8, 1)}
ITEMS = {"lambada": 12, "wikitext": 3} | {
  f"blimp_{name}": 8 for name in BLIMP
}  # how many of each are scored here

OWN = {"wikitext": ("wikitext2", "lm_eval")}  # the project's task, where its name is another
METRICS = (  # the harness's name of each, and the project's
  ("acc,none", "accuracy"),
  ("perplexity,none", "perplexity"),
  ("word_perplexity,none", "perplexity"),
  ("bits_per_byte,none", "bits_per_byte"),
)


def learn(text: str) -> tuple[gpt2_jax.GPT2, HuggingFace]:
  """A byte-level BPE of 512 tokens, and a model that has seen 150 small batches of its text."""
  level = tokenizers.pre_tokenizers.ByteLevel
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer, made.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
  kinds = {"initial_alphabet": level.alphabet(), "special_tokens": [EOT], "show_progress": False}
  made.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=512, **kinds))
  tokenizer = HuggingFace(made.to_str())
  ids, config = (
    np.array(tokenizer.encode(text), np.int32),
    ModelConfig(512, N_CTX, 48, 4, 2, dtype="float32"),
  )
  optimizer = adamw(cosine(1e-2, 151, 10, 0.1), 0.9, 0.99, 0.1, 1.0)
  starts_SB = np.random.default_rng(0).integers(0, len(ids) * 9 // 10 - N_CTX, (151, 8))
  starts_SB[150] += len(ids) // 10  # the last batch is text that was not seen before
  tokens_SBT = ids[starts_SB[..., None] + np.arange(N_CTX + 1)]
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    state = jax.jit(init_state, static_argnums=(1, 2))(jax.random.key(0), config, optimizer)
    state, metrics = jax.jit(
      lambda state, tokens: scan_steps(state, Batch(tokens), NextToken(), optimizer=optimizer)
    )(state, jax.numpy.array(tokens_SBT))
  loss = float(metrics["loss"][150])  # before that batch's update
  assert loss < np.log(512) - 1.5, f"{loss:.2f} nats a token: it has learned"
  return state.model, tokenizer


@pytest.fixture(scope="module")
def checkpoint(mesh, parameters, place, tmp_path_factory):
  """checkpoint(name): Hugging Face's folder of the random model or of the trained one."""
  folder = tmp_path_factory.mktemp("checkpoints")

  @functools.cache
  def write(name):
    if name == "random":
      config = ModelConfig(50257, N_CTX, 64, 4, 2, dtype="float32")
      with mesh(1, 1, 1):
        made = place(config, parameters(config)), Gpt2Bpe()
    else:
      made = learn((DATA / "shakespeare/tinyshakespeare.txt").read_text())
    gpt2_jax.save_pretrained(*made, str(folder / name))
    return str(folder / name)

  return write


@pytest.fixture(scope="module")
def model(checkpoint):
  """model(kind, name): the harness's model of that kind with the weights of that name."""

  def make(kind, name, **kwargs):
    if kind == "hf":
      kwargs |= {"dtype": "float32", "device": "cpu"}
    else:
      kwargs |= dict(zip(("mesh_replica", "mesh_data", "mesh_model"), MESHES[name], strict=True))
    return get_model(kind)(pretrained=checkpoint(name), batch_size=32, **kwargs)

  return functools.cache(make)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The harness's own definitions of tasks, fed from local files."""
  path = tmp_path_factory.mktemp("tasks")
  lines = (DATA / "wikitext2/wiki.test.tokens").read_text().splitlines(keepends=True)
  pages = [{"page": line} for line in lines if len(line) > 600]
  (path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
  define(path, "lambada", "lambada/lambada_openai.yaml", test=DATA / "lambada/lambada_test.jsonl")
  define(path, "wikitext", "wikitext/wikitext.yaml", test=path / "pages.jsonl")
  for name in BLIMP:
    define(path, f"blimp_{name}", f"blimp/{name}.yaml", train=DATA / f"blimp/{name}.jsonl")
  return path


def define(path, name: str, definition: str, **files) -> None:
  """Writes a task of the harness under another name; files are given by the name of their split."""
  splits = {"training_split": None} | ({"validation_split": None} if "test" in files else {})
  source = {"dataset_path": "json", "dataset_name": None}
  source["dataset_kwargs"] = {
    "data_files": {k: str(v) for k, v in files.items()},
    "cache_dir": str(path / "cache"),
  }
  config = {"include": str(THEIRS / definition), "task": f"local_{name}"} | source | splits
  (path / f"{name}.yaml").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def evaluated(model, folder):
  """evaluated(kind, name): what the harness finds for all tasks."""

  @functools.cache
  def run(kind, name):
    return lm_eval.simple_evaluate(
      model=model(kind, name),
      tasks=[f"local_{task}" for task in ITEMS],
      samples={f"local_{task}": list(range(n)) for task, n in ITEMS.items()},
      task_manager=TaskManager(include_path=str(folder), include_defaults=False),
      bootstrap_iters=0,
    )

  return run


def answers(found, task: str) -> tuple[np.ndarray, list]:
  """All log-likelihoods of a task in the order of its documents, and whether each was greedy."""
  samples = sorted(found["samples"][f"local_{task}"], key=lambda sample: sample["doc_id"])
  given = [answer for sample in samples for (answer,) in sample["resps"]]
  given = [answer if isinstance(answer, tuple) else (answer, None) for answer in given]
  return np.array([nats for nats, _ in given]), [greedy for _, greedy in given]


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("task", ITEMS)
def test_scores_are_those_of_hf(task, name, evaluated):
  ours, theirs = evaluated("gpt2_jax", name), evaluated("hf", name)
  (our_nats, our_greedy), (their_nats, their_greedy) = answers(ours, task), answers(theirs, task)
  assert len(our_nats) == ITEMS[task] * (2 if "blimp" in task else 1)
  assert their_nats.std() > 1, "the items differ, so that another order would show"
  np.testing.assert_allclose(our_nats, their_nats, rtol=0, atol=1e-3)
  assert our_greedy == their_greedy
  metrics = {
    key
    for key in theirs["results"][f"local_{task}"]
    if key.endswith(",none") and "stderr" not in key
  }
  assert metrics
  for key in metrics:
    our, their = (found["results"][f"local_{task}"][key] for found in (ours, theirs))
    assert our == their if key == "acc,none" else our == pytest.approx(their, rel=1e-5), key


@dataclasses.dataclass
class Listener:
  """A scorer, and what it answered last."""

  scorer: Scorer
  last_answers: list = ()

  def answers(self, requests, contiguous):
    self.last_answers = self.scorer.answers(requests, contiguous)
    return self.last_answers


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("task", ITEMS)
def test_the_runner_agrees_with_the_harness(task, name, evaluated, model, folder):
  """The project's own task on the same rows: each log-likelihood, and each metric that both
  have."""
  own, scorer = tasks.get(*OWN.get(task, (task,))), model("gpt2_jax", name).scorer
  if task == "wikitext":
    rows = [
      {"text": json.loads(line)["page"]}
      for line in (folder / "pages.jsonl").read_text().splitlines()
    ]
  else:
    rows = sources.load(own.source, str(DATA))
  rows, found = rows[: ITEMS[task]], evaluated("gpt2_jax", name)
  listener = Listener(scorer)
  sums = runner.totals(runner.run(own, rows, listener))
  results = found["results"][f"local_{task}"]
  np.testing.assert_allclose(
    [-answer.nats for answer in listener.last_answers],
    answers(found, task)[0],
    rtol=1e-6,
    atol=1e-4,
  )
  shared = [(theirs, ours) for theirs, ours in METRICS if theirs in results]
  assert shared
  for theirs, ours in shared:
    unit = 100 if ours == "accuracy" else 1
    assert own.metrics[ours].value(sums) == pytest.approx(unit * results[theirs], rel=1e-6), theirs


@pytest.mark.parametrize("name", MESHES)
def test_odd_pairs_are_scored_as_hf_does(name, model):
  """Nothing before, spaces at the end, the end of a text inside one, more than fits."""
  words = "It was the best of times, it was the worst of times. " * 30
  pairs = [
    ("", "Hello"),
    ("", EOT + "Hello"),
    ("The cat ", "sat"),
    ("a \n ", "b"),
    (f"x{EOT}", " y"),
    (words, " end"),
  ]
  pairs += [(words[:50], words[50:150]), ("Wie geht’s, ", "Größe?")]
  first = Instance("generate_until", {}, (words[:51], {"max_gen_toks": 1}), 0)
  pairs += [(words[:51], model("hf", name).generate_until([first])[0])]
  requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
  ours, theirs = (model(kind, name).loglikelihood(requests) for kind in ("gpt2_jax", "hf"))
  np.testing.assert_allclose(
    [nats for nats, _ in ours], [nats for nats, _ in theirs], rtol=0, atol=1e-3
  )
  assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] == [False] * 8 + [True]


def test_a_shorter_context_is_that_of_hf(model):
  """`max_length`, which is shorter than the texts."""
  text = (DATA / "wikitext2/wiki.test.tokens").read_text()[:500]
  ours, theirs = (model(kind, "trained", max_length=48) for kind in ("gpt2_jax", "hf"))
  assert ours.max_length == theirs.max_length == 48
  for call, args in (("loglikelihood", (text, " the")), ("loglikelihood_rolling", (text,))):
    (our,), (their,) = (
      getattr(side, call)([Instance(call, {}, args, 0)]) for side in (ours, theirs)
    )
    assert our == pytest.approx(their, abs=1e-3)
  with pytest.raises(
    ValueError, match="max_length of 200 is not from 1 to the model's context of 128"
  ):
    model("gpt2_jax", "trained", max_length=200)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 17, 30])
def test_windows_are_the_harness_s(length):
  text = list(range(1, length + 1))
  theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(text, 0, 8, 1)]
  ours = loglikelihood.sliding_windows(np.array([0, *text]), 8, 8)
  assert [row.inputs.tolist() for row in ours] == [[*a, *b][:-1] for a, b in theirs]
  assert [row.labels.tolist() for row in ours] == [b for _, b in theirs]


@pytest.mark.parametrize("name", MESHES)
def test_texts_are_those_of_hf(name, model):
  """Greedy, with stop strings of one letter and of several, and a prompt that loses its
  beginning."""
  arguments = [
    ("ROMEO:\nMy lord, ", {"until": ["\n"], "max_gen_toks": 24}),
    (
      "First Citizen:\nBefore we proceed any further, hear me speak.",
      {"until": ["e the", "zz"], "max_gen_toks": 24},
    ),
    ("All:\nSpeak, speak. " * 20, {"until": [], "max_gen_toks": 24}),
    ("The king", {"until": "a", "max_gen_toks": 7, "do_sample": False, "temperature": 0.0}),
  ]
  requests = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(arguments)]
  ours, theirs = (model(kind, name).generate_until(requests) for kind in ("gpt2_jax", "hf"))
  assert ours == theirs
  assert "\n" not in ours[0] and "a" not in ours[3] and len(set(ours)) > 2


def test_draws_are_drawn_among_what_the_filters_leave(model):
  side = model("gpt2_jax", "trained")
  kwargs = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.7}

  def write(**more):
    return side.generate_until(
      [Instance("generate_until", {}, ("The king", kwargs | more), i) for i in range(6)]
    )

  assert len(set(write())) > 1
  assert (
    set(write(top_k=1)) == set(write(top_p=1e-6)) == set(write(do_sample=False)) != set(write())
  )


def test_what_cannot_be_done_is_refused(model, place, parameters, mesh, tmp_path):
  side = model("gpt2_jax", "trained")
  for kwargs, message in (
    ({"num_beams": 4}, "generation with num_beams is not supported; it takes until"),
    (
      {"max_gen_toks": N_CTX},
      "128 new tokens leave no room for a prompt in 128; set max_gen_toks lower",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      side.generate_until([Instance("generate_until", {}, ("The king", kwargs), 0)])
  with pytest.raises(ValueError, match="leave --apply_chat_template out"):
    side.apply_chat_template([{"role": "user", "content": "Hello"}])
  config = ModelConfig(3, 8, 8, 2, 1, dtype="float32")
  with mesh(1, 1, 1):
    gpt2_jax.save_pretrained(
      place(config, parameters(config)), gpt2_jax.Characters("abc"), str(tmp_path / "abc")
    )
  with pytest.raises(ValueError, match=r"the tokenizer of .*abc has no <\|endoftext\|>"):
    harness.Gpt2Jax(str(tmp_path / "abc"))


def test_each_answer_is_offered_to_the_cache(model):
  """Under the key by which the harness looks it up."""
  kept = {}

  class Hook:
    def add_partial(self, call, args, answer):
      kept[call, json.dumps(args)] = answer

  side = model("gpt2_jax", "trained")
  side.set_cache_hook(Hook())
  requests = {
    "loglikelihood": [("The", " king"), ("", "is")],
    "loglikelihood_rolling": [("The king is dead",)],
    "generate_until": [("The king", {"until": ["."], "max_gen_toks": 4})],
  }
  for call, args in requests.items():
    found = getattr(side, call)([Instance(call, {}, request, i) for i, request in enumerate(args)])
    assert [kept[call, json.dumps(request)] for request in args] == found


def test_the_command_is_the_harness_s(checkpoint, folder, evaluated, monkeypatch, capsys):
  """With its arguments and its table; only its own thousands of tasks, which take long to list, are
  left out."""
  command = [
    "lm_eval",
    "--model",
    "gpt2_jax",
    "--batch_size",
    "8",
    "--tasks",
    "local_blimp_passive_1",
  ]
  command += [
    "--model_args",
    f"pretrained={checkpoint('trained')},mesh_model=1",
    "--include_path",
    str(folder),
  ]
  monkeypatch.setattr(sys, "argv", [*command, "--limit", str(ITEMS["blimp_passive_1"])])
  others = {name: kind for name, kind in model_registry.items() if name != "gpt2_jax"}
  monkeypatch.setattr(model_registry, "_objs", others)  # as they are before the command
  monkeypatch.setattr(
    TaskManager, "__init__", functools.partialmethod(TaskManager.__init__, include_defaults=False)
  )
  monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # which outlives the test
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the module was imported before
    runpy.run_module("gpt2_jax.evaluate.harness", run_name="__main__")
  printed = capsys.readouterr().out
  accuracy = evaluated("hf", "trained")["results"]["local_blimp_passive_1"]["acc,none"]
  found = re.search(r"\|local_blimp_passive_1\|.*\|acc +\|↑ +\| *([\d.]+)\|", printed)
  assert found and float(found[1]) == pytest.approx(accuracy, abs=1e-4), printed
