# SPDX-License-Identifier: Apache-2.0
"""Cards of a run that is trained, evaluated and planned: every number is in the file that its row
cites, read here by rules of its own, and huggingface_hub reads the card back."""

import hashlib
import json
import math
import pathlib
import re

import huggingface_hub
import numpy as np
import pytest
import tokenizers

import gpt2_jax
from configs import zero_shot
from gpt2_jax.cli import shell
from gpt2_jax.configs import gpt2
from gpt2_jax.data import stores
from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.evaluate import cards, contamination, sources, tasks
from gpt2_jax.evaluate.energy import Power
from gpt2_jax.evaluate.sweep import compute, report
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.runs.metadata import run_metadata

WORDS = "the cat sat on a mat while many birds sang over old green hills and no one heard".split()
NUMBER = re.compile(r"-?(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")


def byte_bpe() -> gpt2_jax.HuggingFace:
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  made.train_from_iterator([" ".join(WORDS)] * 9, trainer)
  return gpt2_jax.HuggingFace(made.to_str())


def sentence(i: int) -> str:
  return " ".join(WORDS[(i * i + k) % len(WORDS)] for k in range(4 + i % 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mesh, parameters, place):
  """A run's workdir with its store, results of two tasks, an overlap and a plan; relative paths, as
  people type them."""
  folder = tmp_path_factory.mktemp("card")
  tokenizer = byte_bpe()
  texts = [sentence(i) for i in range(40)]
  source = {"kind": "files", "patterns": "a|b*.txt", "split": "train"}
  store = encode_corpus(texts, tokenizer, str(folder / "store"), source, 1, 7)

  # 1. The run: two checkpoints, and the losses of four steps.
  config = gpt2.get_config("117M")
  sizes = {"n_vocab": tokenizer.vocab_size, "n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 2}
  config.model.update(sizes, dtype="float32")
  model_config = gpt2_jax.ModelConfig(**sizes, dtype="float32")
  with mesh(1, 1, 1):
    checkpoints = Checkpoints(str(folder / "run"), last=2)
    for step in (2, 4):
      model = place(model_config, parameters(model_config, seed=step))
      metadata = run_metadata(config, store, store, tokenizer)
      checkpoints.save(step, {"model": model}, metadata, 3.0 / step)
    checkpoints.close()
  losses = [{"step": step, "loss": 4.0, "val_loss": 3.125 / step} for step in range(1, 7)]
  (folder / "run/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in losses))

  # 2. Its results, beside those of the other checkpoint.
  pairs = [{"sentence_good": text, "sentence_bad": text[::-1]} for text in texts]
  write(folder / "data/blimp/passive_1.jsonl", map(json.dumps, pairs))
  write(folder / "data/ptb/ptb.test.txt", [f" {text} " for text in texts[:9]])
  sweep = zero_shot.get_config()
  sweep.models = (f"{folder}/run@all",)
  sweep.update(tasks=("blimp_passive_1", "ptb"), data=str(folder / "data"), resamples=100)
  sweep.update(limit=20, batch_size=32)
  (folder / "eval").mkdir()
  outcome = compute.run(compute.prepare(sweep, str(folder / "eval")))
  report.write(outcome, str(folder / "eval"), sweep)

  # 3. What else a card may be given.
  bloom = contamination.build_filter(texts[:10], 200, source={"kind": "files"})
  task = tasks.get("ptb")
  rows = sources.load(task.source, str(folder / "data"))
  items = (contamination.request_texts(task, row) for row in rows)
  overlap = contamination.measure_overlap(items, bloom)
  contamination.write_overlap(str(folder / "overlap.json"), overlap, bloom, task, rows.fingerprint)
  plan = {"topology": "v5e:2x4", "estimates": {"chip_hours": [10.25, 14.5]}}
  (folder / "plan.json").write_text(json.dumps(plan))
  return folder


def write(path, lines) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(line + "\n" for line in lines))


ALL = cards.CardOptions(
  license="mit",
  language=("en",),
  results=("eval",),
  overlaps=("overlap.json",),
  plan="plan.json",
  power=Power(170, 0.37, 1.1),
)


# ---- the reader: a card against the files that it cites


def tables(text: str) -> list[list[list[str]]]:
  """The rows of each Markdown table, without its head."""
  blocks = re.findall(r"(?m)(?:^\|.*\|\n?)+", text)
  split = [[re.split(r"(?<!\\) \| ", line[2:-2]) for line in b.splitlines()] for b in blocks]
  return [rows[2:] for rows in split]


def check_card(text: str) -> None:
  """Raises AssertionError unless every number of a card is in the file that its row cites."""
  # 1. The sources are the files, as they lie there.
  _, _, body = text.split("---\n", 2)
  *facts, cited = tables(body)
  files = {}
  for number, path, digest in cited:
    path = re.sub(r"\\(.)", r"\1", path)
    if not digest:
      files[number] = {"watts": 170, "pue": 1.1, "kg_per_kwh": 0.37}
      continue
    content = pathlib.Path(path).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    lines = content.splitlines() if path.endswith(".jsonl") else [content]
    files[number] = list(map(json.loads, lines)) if path.endswith(".jsonl") else json.loads(content)

  # 2. The rows.
  assert len(facts) >= 1
  for title, value, citation in (row for rows in facts for row in rows):
    expected = cited_values(title, citation, files)
    value = re.sub(r"\\(.)", r"\1", value)
    texts = sorted((x for x in expected if isinstance(x, str)), key=len, reverse=True)
    for cited_text in texts:
      shown = cited_text if cited_text in value else cited_text[:12]
      assert shown in value, (value, cited_text)
      value = value.replace(shown, "", 1)
    numbers = [float(x.replace(",", "")) for x in NUMBER.findall(value)]
    wanted = [x for x in expected if not isinstance(x, str)]
    assert len(numbers) == len(wanted) and np.allclose(numbers, wanted, 1e-4, 1e-9), value

  # 3. No sentence has a number.
  prose = re.sub(r"(?m)^(\|.*|#.*)$", "", body)
  assert not re.search(r"\d", re.sub("CO2|SHA-256|GPT-2", "", prose)), prose


def cited_values(title: str, citation: str, files: dict) -> list:
  """The values that a row cites, in their order; of what is computed, computed again."""
  cited = re.findall(r"(\[\d+\]) `([^`]+)`", citation)
  assert cited, citation
  (number, keys), *more = cited
  content = files[number]
  if more:
    watts, pue, intensity = values_of(*more[0], files)
    factor = {"Energy, kWh": 1, "CO2 eq., kg": intensity}[title]
    return [hours * watts / 1000 * pue * factor for hours in values_of(number, keys, files)]
  if keys == "computed of config/model":
    model = content["config"]["model"]
    D, L = model["n_embd"], model["n_layer"]
    return [(model["n_vocab"] + model["n_ctx"]) * D + L * (12 * D * D + 13 * D) + 2 * D]
  if keys == "computed of all but seal":
    sums = {name: total for name, total in content.items() if name != "seal"}
    return [hashlib.sha256(json.dumps(sums).encode()).hexdigest()]
  if keys == "100 sum(found) / sum(ngrams)":
    return [100 * sum(content["found"]) / sum(content["ngrams"])]
  if keys.startswith("number of "):
    return [len(at(content, keys.removeprefix("number of ")))]
  return values_of(number, keys, files)


def values_of(number: str, keys: str, files: dict) -> list:
  stem, _, names = keys.partition("{")
  names = names.rstrip("}").split(", ") if names else [""]
  values = [at(files[number], stem + name) for name in names]
  return list(values[0].values()) if isinstance(values[0], dict) else values


def at(value, key: str):
  for i, name in enumerate(key.split("/")):
    if isinstance(value, list):
      value = value[int(name) - (i == 0)]  # lines count from 1
    else:
      value = value[name]
  return value


# ---- the tests


def test_every_number_of_a_model_card_is_in_the_file_that_it_cites(folder, monkeypatch):
  monkeypatch.chdir(folder)
  text = str(cards.make_card("run", ALL))
  check_card(text)

  # The reader would see one wrong digit, in any row.
  begin = text.index("## Model details")
  end = text.index("## Sources")
  places = [m.start() for m in re.finditer(r"(?<=\| )\d[\d,.]*(?= [|\[])", text[begin:end])]
  assert len(places) > 20
  for at_digit in places:
    i = begin + at_digit
    wrong = text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :]
    with pytest.raises(AssertionError):
      check_card(wrong)


def test_huggingface_hub_reads_a_model_card_back(folder, monkeypatch, tmp_path):
  monkeypatch.chdir(folder)
  path = tmp_path / "README.md"
  path.write_text(str(cards.make_card("run", ALL)))
  card = huggingface_hub.ModelCard.load(path)
  assert (card.data.license, card.data.language) == ("mit", ["en"])
  assert card.data.co2_eq_emissions["emissions"] == pytest.approx(
    1000 * 14.5 * 0.17 * 1.1 * 0.37, 1e-3
  )

  # The scores are those of the newest checkpoint, all and unrounded.
  lines = map(json.loads, (folder / "eval/results.jsonl").read_text().splitlines())
  lines = [line for line in lines if line["identity"]["model"].endswith("@4")]
  results = {(x.dataset_type, x.metric_type): x for x in card.data.eval_results}
  assert len(lines) == 2 and len(results) == sum(len(line["metrics"]) for line in lines)
  for line in lines:
    identity = line["identity"]
    for name, metric in line["metrics"].items():
      result = results[identity["task"], name]
      assert result.metric_value == metric["value"]
      assert (result.dataset_config, result.dataset_revision) == (
        f"{identity['protocol']}:0",
        identity["rows"],
      )
      assert result.metric_args.get("low") == metric["low"]
      assert result.metric_args["items"] == line["items"] > 0
    assert line["commit"] in str(card)
  headings = re.findall("(?m)^## (.*)", card.text)
  assert headings[:8] == [
    "Model details",
    "Intended use",
    "Factors",
    "Metrics",
    "Evaluation data",
    "Training data",
    "Quantitative analyses",
    "Ethical considerations",
  ]


def test_a_card_says_what_was_not_measured(folder, monkeypatch):
  monkeypatch.chdir(folder)
  bare, full = (str(cards.make_card("run", x)) for x in (cards.CardOptions(), ALL))
  check_card(bare)
  absent = {
    name: re.findall("(?m)^- (.*)$", text) for name, text in (("bare", bare), ("full", full))
  }
  assert {"Bias", "Memorization", "Detection of machine text"} <= set(absent["full"])
  assert set(absent["bare"]) - set(absent["full"]) == {
    "Language modeling and tasks",
    "Contamination",
    "Chip-hours",
    "Energy and CO2",
    "License",
    "Language",
  }
  # an older checkpoint has its own loss and weights
  older = str(cards.make_card("run", cards.CardOptions(step="2", results=("eval",))))
  check_card(older)
  assert "| 1.5625, 2 |" in older and "| 0.78125, 4 |" in bare


def test_a_data_card_is_of_the_manifest(folder, monkeypatch, tmp_path):
  monkeypatch.chdir(folder)
  text = str(cards.make_card("store", cards.CardOptions(license="mit")))
  check_card(text)
  (tmp_path / "data.md").write_text(text)
  data = huggingface_hub.DatasetCard.load(tmp_path / "data.md").data
  assert (data.size_categories, data.license, data.pretty_name) == ("n<1K", "mit", "store")
  assert f"| tokens | {len(stores.open_store('store')):,} |" in text
  # a pipe in a text ends no column
  assert "a\\|b\\*.txt" in text


def test_co2_is_distilgpt2s_published_figure():
  """Its card: 149.2 kg; 8 16GB V100, 168 hours, Azure, East US (co2_eq_emissions: 149200)."""
  assert round(Power(watts=300, kg_per_kwh=0.37).co2_kg(8 * 168), 1) == 149.2
  assert Power(300, 0.37).kwh(1) == 0.3 and Power(300, 0.37, pue=1.5).kwh(1) == pytest.approx(0.45)
  for bad in ((-1, 0.37, 1), (300, math.nan, 1), (300, 0.37, 0.9), (math.inf, 0.37, 1)):
    with pytest.raises(ValueError, match="a finite number of at least"):
      Power(*bad)


@pytest.mark.parametrize(("n", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**12, "n>1T")])
def test_sizes_have_the_hubs_names(n, name):
  assert cards.size_category(n) == name


@pytest.mark.parametrize(
  ("path", "options", "message"),
  [
    ("data", {}, "neither checkpoints nor a manifest.json"),
    ("run", {"results": ("nowhere",)}, "nowhere/results.jsonl"),
    ("run", {"step": "3"}, "no checkpoint of step 3"),
    ("run", {"plan": "overlap.json"}, "no plan of a training run"),
    ("run", {"overlaps": ("plan.json",)}, "no overlap"),
    ("run", {"results": ("other",)}, "no result in other is of checkpoint 4"),
    ("run", {"results": ("broken",)}, "line 1, is no result"),
    ("run", {"results": ("torn",)}, "line 2, is no JSON"),
  ],
)
def test_what_makes_no_card_is_one_line(folder, monkeypatch, path, options, message):
  monkeypatch.chdir(folder)
  lines = (folder / "eval/results.jsonl").read_text().splitlines()
  write(
    folder / "other/results.jsonl", [x for x in lines if "@2" in json.loads(x)["identity"]["model"]]
  )
  write(folder / "broken/results.jsonl", [lines[0].replace('"value"', '"val|ue"')])
  write(folder / "torn/results.jsonl", [lines[0], lines[1][:99]])
  with pytest.raises((ValueError, OSError), match=message) as caught:
    cards.make_card(path, cards.CardOptions(**options))
  assert "\n" not in shell.message(caught.value)


def test_energy_needs_chip_hours_once():
  with pytest.raises(ValueError, match="energy is of chip-hours"):
    cards.CardOptions(power=Power(300, 0.37))
  with pytest.raises(ValueError, match="leave --plan or --chip_hours out"):
    cards.CardOptions(plan="plan.json", chip_hours=3.0)
