# SPDX-License-Identifier: Apache-2.0
"""The memorized samples of GPT-2 XL that Carlini et al. (2021) published, extracted_samples.md.

Each is quoted text in which what they found on the Internet is bold. The page has lost the samples'
line ends: runs of white space are one space here, and a part over several lines is found in pieces.
"""

import dataclasses
import pathlib
import re

HEADING = re.compile(r"^## +(.*?) sampling (?:and|with) (.*?) metric", re.MULTILINE)
SAMPLE = re.compile(r"^> +(.*)$", re.MULTILINE)
BOLD = re.compile(r"\*\*```(.*?)```\*\*")


@dataclasses.dataclass(frozen=True)
class PublishedSample:
  """A sample: how it was drawn and found, and its memorized parts in their order."""

  sampling: str
  metric: str
  parts: tuple[str, ...]


def read_published_samples(path: pathlib.Path) -> list[PublishedSample]:
  """The samples of the page. Raises ValueError for a file without any."""
  text = path.read_text(encoding="utf-8")
  headings = list(HEADING.finditer(text))
  ends = [heading.start() for heading in headings[1:]] + [len(text)]
  samples = []
  for heading, end in zip(headings, ends, strict=True):
    for quoted in SAMPLE.findall(text, heading.end(), end):
      parts = tuple(" ".join(part.split()) for part in BOLD.findall(quoted))
      samples.append(PublishedSample(heading[1], heading[2], parts))
  if not samples:
    raise ValueError(f"{path} has no samples; get extracted_samples.md of ftramer/LM_Memorization")
  return samples
