# SPDX-License-Identifier: Apache-2.0
"""The figures of the GPT-2 paper (Radford et al. 2019), which stand beside the scores."""

import functools
import json
import pathlib


@functools.cache
def paper() -> dict:
  """The figures of Radford et al. 2019: task, metric, place in the paper, and scores by size."""
  return json.loads(pathlib.Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def paper_scores(task: str, protocol: str, metric: str) -> dict[str, float]:
  """The paper's scores by size; empty if it has none, or came to it by another protocol."""
  for entry in paper()["figures"]:
    # an entry without protocols holds for all of the task
    is_of_protocol = protocol in entry.get("protocols", [protocol])
    if (entry["task"], entry["metric"]) == (task, metric) and is_of_protocol:
      return entry["sizes"]
  return {}
