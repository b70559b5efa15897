# SPDX-License-Identifier: Apache-2.0
"""The figures of the GPT-2 paper (Radford et al. 2019), which stand beside the scores."""

import functools
import json
import pathlib


@functools.cache
def paper() -> dict:
  """The figures of Radford et al. 2019: task, metric, place in the paper, and scores by size."""
  return json.loads(pathlib.Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def paper_scores(identity: dict, metric: str) -> dict[str, float]:
  """The paper's scores by size, for a cell's identity.

  Empty if the paper has none, or came to it by another protocol or number of examples.
  """
  for entry in paper()["figures"]:
    if entry["metric"] == metric and _is_comparable(entry, identity):
      return entry["sizes"]
  return {}


def paper_references(identity: dict, metric: str) -> dict[str, float]:
  """The paper's scores of methods that are no language model, by name: the first sentences."""
  scores = {}
  for entry in paper()["references"]:
    if metric in entry["scores"] and _is_comparable(entry, identity):
      scores[entry["name"]] = entry["scores"][metric]
  return scores


def _is_comparable(entry: dict, identity: dict) -> bool:
  """Whether a cell asks as the paper asked: the same task, protocol, and number of examples."""
  is_of_task = entry["task"] == identity["task"] and identity["protocol"] in entry["protocols"]
  return is_of_task and identity["shots"] == entry.get("shots", 0)
