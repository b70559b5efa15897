# SPDX-License-Identifier: Apache-2.0
"""Cards: a model card of a run and a data card of a token store, of what was measured and told.

A model card has the sections of Model Cards for Model Reporting (Mitchell et al. 2019), a data card
those of Datasheets for Datasets (Gebru et al. 2018) that a store can answer. Each number is in a
row that cites its file and key; sentences have none. What was neither measured nor told is a list.
The YAML at the top is what the Hugging Face Hub reads; huggingface_hub writes it and reads it back.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from gpt2_jax.data.stores import open_store
from gpt2_jax.evaluate.card_scores import CardScore, read_scores
from gpt2_jax.evaluate.card_sources import (
  CardSource,
  CardSources,
  Row,
  fill_card,
  markdown_table,
  plain,
  show,
)
from gpt2_jax.evaluate.contamination import read_overlap
from gpt2_jax.evaluate.energy import Power
from gpt2_jax.evaluate.sweep.cells import RESULTS
from gpt2_jax.evaluate.sweep.models import resolve_models
from gpt2_jax.evaluate.sweep.page import KINDS
from gpt2_jax.files import summarize, user_path
from gpt2_jax.runs.checkpoint import open_saved
from gpt2_jax.runs.workdir import exists

# The knobs of a run that a card shows, the counts of a token store, and how many of its parts.
MODEL_KNOBS = ("family", "n_layer", "n_embd", "n_head", "n_ctx", "n_vocab", "dtype")
RUN_KNOBS = (
  "steps",
  "batch_size",
  "optimizer",
  "learning_rate",
  "schedule",
  "weight_decay",
  "seed",
)
STORE_COUNTS = ("documents", "bytes", "tokens", "rows", "examples", "scored", "cut", "labelled")
PARTS_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class CardOptions:
  """What a card is told besides the place that it is of; an empty value is not told."""

  name: str = ""
  license: str = ""
  language: tuple[str, ...] = ()
  step: str = "latest"
  results: tuple[str, ...] = ()  # folders of the evaluator
  overlaps: tuple[str, ...] = ()  # files of `gpt2-jax contamination`
  plan: str = ""  # a plan.json
  chip_hours: float = 0.0  # in place of a plan
  power: Power | None = None

  def __post_init__(self):
    if not 0 <= self.chip_hours < math.inf:
      raise ValueError(f"chip_hours is {self.chip_hours}; it is a finite number of at least 0")
    if self.plan and self.chip_hours:
      raise ValueError("a plan has the chip-hours; leave --plan or --chip_hours out")
    if self.power and not (self.plan or self.chip_hours):
      raise ValueError("energy is of chip-hours: give --plan=plan.json, or --chip_hours")


def make_card(place: str, options: CardOptions) -> ModelCard | DatasetCard:
  """The card of a run's workdir or of a token store, whichever it is.

  Raises FileNotFoundError for a place that is neither, ValueError for files that are damaged or do
  not belong together.
  """
  if exists(os.path.join(place, "manifest.json")):
    return data_card(place, options)
  if exists(os.path.join(place, "checkpoints")):
    return model_card(place, options)
  raise FileNotFoundError(
    f"{place[:200]} has neither checkpoints nor a manifest.json; give the --workdir of a run, or a "
    "token store"
  )


# ---- the model card


def model_card(workdir: str, options: CardOptions) -> ModelCard:
  """The card of a run's checkpoint, with the results, overlaps and plan that the options name."""
  # 1. What lies on disk.
  saved = open_saved(workdir, options.step)
  sources = CardSources()
  about, details = _details(workdir, saved, sources)
  validation = _validation_rows(workdir, saved.step, sources)
  scores = _scores(workdir, saved.step, options, sources)
  contamination = [row for path in options.overlaps for row in _overlap_rows(path, sources)]
  hours, energy, emissions = _energy(options, sources)
  if emissions:
    emissions["training_type"] = "fine-tuning" if about.get("init_from") else "pre-training"

  # 2. What there is of each subject; one without anything is listed as such.
  by_kind = {
    kind: [row for score in scores if score.kind == kind for row in score.rows()] for kind in KINDS
  }
  subjects = {"Validation loss": validation, **by_kind, "Contamination": contamination}
  subjects |= {"Chip-hours": hours, "Energy and CO2": energy, "License": options.license}
  subjects |= {"Language": options.language, "Commit that trained the model": ""}
  analyses = [f"### {kind}\n\n{markdown_table(rows)}" for kind, rows in by_kind.items() if rows]

  # 3. The card, and the Hub's YAML.
  name = options.name or f"{os.path.basename(os.path.abspath(workdir))}@{saved.step}"
  data = ModelCardData(
    model_name=name,
    language=list(options.language) or None,
    license=options.license or None,
    pipeline_tag="text-generation",
    tags=["gpt2", "gpt2_jax"],
    eval_results=[result for score in scores for result in score.eval_results()] or None,
    co2_eq_emissions=emissions,
  )
  text = fill_card(
    "model_card.md",
    sources,
    name=plain(name),
    details=details,
    validation=validation,
    evaluation_data=[row for score in scores for row in score.data_rows()],
    training_data=_training_data(about),
    contamination=contamination,
    analyses="\n\n".join(analyses) or markdown_table([]),
    energy=hours + energy,
    absent=_list_absent(subjects),
  )
  return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _list_absent(subjects: Mapping[str, Sequence]) -> str:
  """The subjects of which nothing was measured or told, as a list."""
  return "\n".join(f"- {subject}" for subject, told in subjects.items() if not told)


def _details(workdir: str, saved, sources: CardSources) -> tuple[CardSource, list[Row]]:
  """A checkpoint's metadata, and rows of its sizes, its knobs and what it started from."""
  folder = os.path.join(workdir, "checkpoints", str(saved.step))
  about = sources.read(os.path.join(folder, "about", "metadata"))
  sums = sources.read(os.path.join(folder, "sums", "metadata"))

  rows = about.row("Checkpoint of step", "step")
  rows.append(("Parameters", show(saved.config.n_params), about.cite("computed of config/model")))
  rows.append(("SHA-256 of the weights", _weights(workdir, saved.step), sums.cite(ALL_SUMS)))
  for knob in MODEL_KNOBS:
    rows += about.row(knob, f"config/model/{knob}")
  for knob in RUN_KNOBS:
    rows += about.row(knob, f"config/{knob}")
  for origin, title in (("init_from", "Started from"), ("teacher", "Teacher")):
    rows += about.row(title, f"{origin}/{{name, sha256}}")
  return about, rows


# What the evaluator's SHA-256 of a checkpoint is of.
ALL_SUMS = "computed of all but seal"


def _weights(workdir: str, step: int) -> str:
  """The SHA-256 of a checkpoint's checksums, as the evaluator's results have it."""
  return resolve_models([f"{workdir}@{step}"])[0].weights


def _validation_rows(workdir: str, step: int, sources: CardSources) -> list[Row]:
  """The newest validation loss up to the checkpoint's step."""
  place = os.path.join(workdir, "metrics.jsonl")
  if not exists(place):
    return []
  metrics = sources.read(place)
  rows = []
  for number, line in metrics.content.items():
    if isinstance(line.get("val_loss"), float) and line.get("step", step + 1) <= step:
      title = "Validation loss, nats a token, and its step"
      rows = metrics.row(title, f"{number}/{{val_loss, step}}")
  return rows


def _scores(workdir: str, step: int, options: CardOptions, sources: CardSources) -> list[CardScore]:
  """The results that are of these very weights. Raises ValueError if there is none."""
  scores = []
  weights = _weights(workdir, step)
  for folder in options.results:
    scores += read_scores(sources.read(os.path.join(user_path(folder), RESULTS)), weights)
  if options.results and not scores:
    raise ValueError(
      f"no result in {summarize(options.results)} is of checkpoint {step} of {workdir[:200]} "
      f"(weights {weights[:12]}); evaluate it, or give the --step that was evaluated"
    )
  return scores


def _training_data(about: CardSource) -> list[Row]:
  """The token stores of a run, as their manifests in its checkpoint say."""
  return [row for store in about.content.get("data") or {} for row in _store_rows(about, store)]


def _store_rows(source: CardSource, store: str = "") -> list[Row]:
  """Rows of a token store's manifest, which is at `data/STORE` of a checkpoint's metadata."""
  root, title = (f"data/{store}/", f"{plain(store)}: ") if store else ("", "")
  rows = source.row(f"{title}source", f"{root}source")
  for count in STORE_COUNTS:
    rows += source.row(f"{title}{count}", f"{root}{count}")
  rows += source.row(f"{title}records that were no text", f"{root}skipped/count")
  rows += source.row(f"{title}tokenizer, SHA-256", f"{root}tokenizer_fingerprint")

  parts = source.get(f"{root}parts") or {}
  rows.append((f"{title}parts", show(len(parts)), source.cite(f"number of {root}parts")))
  for part in list(parts)[:PARTS_SHOWN]:
    rows += source.row(f"{title}{plain(part)}, SHA-256", f"{root}parts/{part}/sha256")
  return rows


def _overlap_rows(path: str, sources: CardSources) -> list[Row]:
  """How much of an evaluation set is in a training corpus. Raises ValueError for another file."""
  overlap = read_overlap(path)
  source = sources.read(user_path(path))
  task = plain(f"{overlap['task']}:{overlap['protocol']}")

  share = 100 * sum(overlap["found"]) / max(1, sum(overlap["ngrams"]))
  cited = source.cite("100 sum(found) / sum(ngrams)")
  rows = [(f"{task}, n-grams that a training corpus has, %", show(share), cited)]
  return rows + source.row(f"{task}, n, and the rate of false positives", "{n, rate}")


def _energy(options: CardOptions, sources: CardSources) -> tuple[list[Row], list[Row], dict | None]:
  """Rows of chip-hours; rows of energy and CO2; and the latter for the Hub, in grams."""
  # 1. Chip-hours: a plan's range, or what the command line says.
  power = options.power
  told = sources.add("the command line", _told(options)) if _told(options) else None
  if options.plan:
    source, keys, form = sources.read(user_path(options.plan)), PLANNED_HOURS, "{} to {}"
  elif told and options.chip_hours:
    source, keys, form = told, "chip_hours", None
  else:
    return [], [], None
  chip_hours = source.values(keys)
  if not all(type(hours) in (int, float) and hours >= 0 for hours in chip_hours):
    raise ValueError(f"{options.plan[:200]} is no plan of a training run: it has no chip_hours")
  title = "Chip-hours, planned" if options.plan else "Chip-hours"
  hours_rows = source.row(title, keys, form) + source.row("Chips", "topology")
  if power is None or told is None:
    return hours_rows, [], None

  # 2. Energy and CO2 of both ends of the range.
  kwh = [show(power.kwh(hours)) for hours in chip_hours]
  co2 = [show(power.co2_kg(hours)) for hours in chip_hours]
  cited = f"{source.cite(keys)} and {told.cite('{watts, pue, kg_per_kwh}')}"
  rows = told.row("Watts of a chip, PUE, kg of CO2 eq. a kWh", "{watts, pue, kg_per_kwh}")
  rows.append(("Energy, kWh", " to ".join(kwh), cited))
  rows.append(("CO2 eq., kg", " to ".join(co2), cited))
  emissions = {
    "emissions": round(1000 * power.co2_kg(max(chip_hours)), 1),
    "source": "chip-hours x watts x PUE x carbon intensity of the grid, the upper end",
  }
  return hours_rows, rows, emissions


PLANNED_HOURS = "estimates/chip_hours/{0, 1}"


def _told(options: CardOptions) -> dict:
  """The numbers of a card that the command line says."""
  told = dataclasses.asdict(options.power) if options.power else {}
  return told | ({"chip_hours": options.chip_hours} if options.chip_hours else {})


# ---- the data card


def data_card(path: str, options: CardOptions) -> DatasetCard:
  """The card of a token store, as its manifest says; the tokens themselves are not read."""
  store = open_store(path)
  sources = CardSources()
  manifest = sources.read(os.path.join(store.path, "manifest.json"))
  name = options.name or os.path.basename(os.path.abspath(path))

  rows = _store_rows(manifest)
  rows += manifest.row("type of a token id", "dtype") + manifest.row("length of a row", "n_ctx")
  data = DatasetCardData(
    pretty_name=name,
    language=list(options.language) or None,
    license=options.license or None,
    size_categories=size_category(manifest.content["documents"]),
    task_categories=["text-generation"],
  )
  absent = _list_absent({"License": options.license, "Language": options.language})
  text = fill_card("data_card.md", sources, name=plain(name), composition=rows, absent=absent)
  return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def size_category(documents: int) -> str:
  """The Hub's name of a dataset's size: n<1K, 1K<n<10K, ... n>1T."""
  names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
  power = sum(documents >= 1000 * 10**i for i in range(len(names)))
  if power == 0:
    return "n<1K"
  return "n>1T" if power == len(names) else f"{names[power - 1]}<n<{names[power]}"
