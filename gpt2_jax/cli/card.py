# SPDX-License-Identifier: Apache-2.0
"""A model card of a run, or a data card of a token store, of what was measured and lies on disk.

  gpt2-jax card runs/demo --out=card.md
  gpt2-jax card runs/117M --results=runs/eval --overlap=lambada.json --plan=plan/plan.json \\
    --watts=170 --pue=1.1 --kg_per_kwh=0.37 --license=mit --language=en --out=README.md
  gpt2-jax card data/train --out=data.md

Each number in a card cites the file and the key that it is from. What is not given is listed as not
measured. Of the evaluator's results those count that are of the very weights of the checkpoint. The
sections of a model card are those of Mitchell et al. 2019; the YAML at its top is the Hugging Face
Hub's. CO2 is chip-hours x watts x PUE x kg_per_kwh, an estimate.
"""

import os

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, check_folder, local_path, user_path

_OUT = flags.DEFINE_string("out", None, "File for the card, Markdown; it is printed if not given.")
_STEP = flags.DEFINE_string("step", "latest", "Checkpoint of the run: a step, latest or best.")
_RESULTS = flags.DEFINE_multi_string(
  "results", [], "A folder of gpt2-jax evaluate, whose results.jsonl has scores of the checkpoint."
)
_OVERLAP = flags.DEFINE_multi_string("overlap", [], "A file of gpt2-jax contamination.")
_PLAN = flags.DEFINE_string("plan", "", "A plan.json of gpt2-jax plan: chip-hours of the run.")
_CHIP_HOURS = flags.DEFINE_float(
  "chip_hours", 0.0, "Chip-hours of the run, in place of a plan's.", lower_bound=0.0
)
_WATTS = flags.DEFINE_float("watts", None, "Watts of a chip, for the energy; with --kg_per_kwh.")
_PUE = flags.DEFINE_float("pue", 1.0, "Power usage effectiveness of the data center.")
_KG_PER_KWH = flags.DEFINE_float(
  "kg_per_kwh", None, "Carbon intensity of the grid, kg of CO2 equivalents a kWh; with --watts."
)
_NAME = flags.DEFINE_string("name", "", "Name on the card (default: the folder's).")
_LICENSE = flags.DEFINE_string("license", "", "License, as the Hub calls it: mit, apache-2.0.")
_LANGUAGE = flags.DEFINE_list("language", [], "Languages, ISO 639: en,fr.")


def main(paths: list[str]) -> None:
  from gpt2_jax.evaluate import cards, energy

  # 1. The cheap checks first.
  if len(paths) != 1:
    raise ValueError(f"give one workdir of a run, or one token store; these are {len(paths)}")
  out = local_path(_OUT.value) if _OUT.value is not None else None
  if out is not None:
    if out.exists():
      raise FileExistsError(f"{out} is there already; take another --out, or move it away")
    check_folder(out.parent)
  if (_WATTS.value is None) != (_KG_PER_KWH.value is None):
    raise ValueError("--watts and --kg_per_kwh are for one product: give both, or neither")
  power = None
  if _WATTS.value is not None:
    power = energy.Power(_WATTS.value, _KG_PER_KWH.value, _PUE.value)

  # 2. The card.
  options = cards.CardOptions(
    name=_NAME.value,
    license=_LICENSE.value,
    language=tuple(_LANGUAGE.value),
    step=_STEP.value,
    results=tuple(_RESULTS.value),
    overlaps=tuple(_OVERLAP.value),
    plan=_PLAN.value,
    chip_hours=_CHIP_HOURS.value,
    power=power,
  )
  card = str(cards.make_card(user_path(paths[0]), options))
  if out is None:
    return print(card, end="")
  with atomic_write(out) as partial:
    partial.write_text(card, encoding="utf-8")
  print(f"written to {out}")


def run() -> None:
  # Nothing is computed: an accelerator stays free, for the run that the card is of.
  os.environ["JAX_PLATFORMS"] = "cpu"
  shell.run(main, __doc__, imports=("gpt2_jax.evaluate.cards",), words="PLACE")
