# SPDX-License-Identifier: Apache-2.0
"""report.json and report.md: what each stage dropped and why, lengths, domains, duplicates."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable

from gpt2_jax.data.webtext.document import Document
from gpt2_jax.data.webtext.domains import domain_name
from gpt2_jax.data.webtext.tally import Tally
from gpt2_jax.files import atomic_write, local_path, read_text

TOP_DOMAINS = 30


@dataclasses.dataclass
class Corpus:
  """Figures of the kept documents, whatever their order. Memory grows with the domains alone."""

  documents: int = 0
  bytes: int = 0
  contaminated: int = 0
  lengths: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  domains: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  checksum: int = 0

  @classmethod
  def of(cls, documents: Iterable[Document]) -> "Corpus":
    corpus = cls()
    for document in documents:
      corpus.documents += 1
      corpus.bytes += document.nbytes
      corpus.contaminated += document.contaminated > 0
      # A bin for each power of two of bytes.
      corpus.lengths[1 << document.nbytes.bit_length() - 1] += 1
      corpus.domains[domain_name(document.url)] += 1
      # A sum of hashes does not depend on the order.
      line = json.dumps(document.to_json()).encode()
      corpus.checksum += int.from_bytes(hashlib.sha256(line).digest(), "big")
    corpus.checksum %= 1 << 256
    return corpus


def rank_correlation(domains: collections.Counter, published: dict[str, int]) -> float:
  """Spearman's rank correlation of documents and published counts, over the published domains."""
  from scipy.stats import spearmanr

  ours = [domains[name] for name in published]
  if len(set(ours)) < 2 or len(published) < 2:
    return float("nan")
  return float(spearmanr(ours, list(published.values())).statistic)


def read_published_domains(path: str) -> dict[str, int]:
  """OpenAI's list of WebText's domains (webtext_domains.txt): a count and a name in each line."""
  published = {}
  for number, line in enumerate(read_text(local_path(path)).splitlines(), 1):
    count, _, name = line.strip().partition(" ")
    if not count.isdigit():
      raise ValueError(f"{path}:{number} is no count and domain, such as 1542261 google")
    # One line of OpenAI's has no name.
    if name:
      published[name.strip()] = int(count)
  return published


def make_report(
  corpus: Corpus, tally: Tally, clusters: dict[int, int], job: dict, published: dict[str, int]
) -> dict:
  """The report as an object of JSON."""
  # Ties by name, so that the list does not depend on the order of the documents.
  domains = sorted(corpus.domains.items(), key=lambda item: (-item[1], item[0]))

  report = {
    "documents": corpus.documents,
    "bytes": corpus.bytes,
    "contaminated": corpus.contaminated,
    "content_sha256": f"{corpus.checksum:064x}",
    "stages": tally.to_json(),
    "lengths": {str(low): corpus.lengths[low] for low in sorted(corpus.lengths)},
    "domains": dict(domains[:1000]),
    "near_duplicate_clusters": {str(size): count for size, count in clusters.items()},
    "job": job,
  }

  if published:
    report["rank_correlation"] = rank_correlation(corpus.domains, published)
    report["published_domains"] = dict(list(published.items())[:TOP_DOMAINS])
  return report


def write_report(report: dict, folder: pathlib.Path) -> None:
  """Writes report.md with its pictures, and report.json last: with it, a job is done."""
  with atomic_write(folder / "stages.png", overwrite=True) as partial:
    _plot_stages(report["stages"], partial)
  with atomic_write(folder / "lengths.png", overwrite=True) as partial:
    _plot_lengths(report["lengths"], partial)
  with atomic_write(folder / "domains.png", overwrite=True) as partial:
    _plot_domains(report, partial)
  with atomic_write(folder / "clusters.png", overwrite=True) as partial:
    _plot_clusters(report["near_duplicate_clusters"], partial)
  with atomic_write(folder / "report.md", overwrite=True) as partial:
    partial.write_text(_page(report), encoding="utf-8")
  with atomic_write(folder / "report.json", overwrite=True) as partial:
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _page(report: dict) -> str:
  """The report for people."""
  lines = [
    "# The corpus, and what was dropped",
    "",
    f"{report['documents']:,} documents, {report['bytes']:,} bytes of UTF-8. Content hash "
    f"`{report['content_sha256'][:16]}`: it does not depend on the order.",
    "",
    "![documents after each stage](stages.png) ![lengths](lengths.png)",
    "",
    "## Stages",
    "",
    "| stage | documents in | dropped | documents out | bytes out |",
    "|---|---|---|---|---|",
  ]

  # The counts, and then what they are made of.
  for name, stage in report["stages"].items():
    entered, left = stage["documents_in"], stage["documents_out"]
    lines.append(
      f"| {name} | {entered:,} | {entered - left:,} | {left:,} | {stage['bytes_out']:,} |"
    )
  lines += ["", "## Why, with examples", ""]
  for name, stage in report["stages"].items():
    for reason, dropped in stage["reasons"].items():
      lines.append(f"- **{name}: {reason}**, {dropped['documents']:,} documents")
      lines += [f"  - `{_inline(example)}`" for example in dropped["examples"]]
  return "\n".join([*lines, "", *_domain_lines(report), "", *_duplicate_lines(report)]) + "\n"


def _domain_lines(report: dict) -> list[str]:
  published = list(report.get("published_domains", {}).items())
  here = list(report["domains"].items())[:TOP_DOMAINS]
  lines = ["## Domains", ""]
  if published:
    lines += [
      "Rank correlation (Spearman) with the 1,000 domains that OpenAI published for WebText: "
      f"{report['rank_correlation']:.3f}.",
      "",
    ]

  # Two lists beside each other, of which one may be shorter.
  lines += ["![top domains](domains.png)", ""]
  lines += ["| here | documents | WebText | documents |", "|---|---|---|---|"]
  for ours, theirs in itertools.zip_longest(here, published, fillvalue=("", "")):
    cells = [_inline(str(cell)) for cell in (*ours, *theirs)]
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def _duplicate_lines(report: dict) -> list[str]:
  lines = ["## Near duplicates", "", "![clusters by size](clusters.png)", ""]
  lines += ["| documents of a cluster | clusters |", "|---|---|"]
  for size, count in report["near_duplicate_clusters"].items():
    lines.append(f"| {size} | {count:,} |")
  return lines


def _inline(text: str) -> str:
  """Somebody's text on one line of Markdown, without what would end its cell or its quotes."""
  text = "".join(c if c.isprintable() else " " for c in text)
  return text.replace("`", "'").replace("|", "/")[:160]


def _plot_stages(stages: dict, path: pathlib.Path) -> None:
  names = list(stages)
  counts = [stages[name]["documents_out"] for name in names]
  figure, [axes] = _figure()
  axes.barh(names[::-1], counts[::-1])
  axes.set_xlabel("documents after the stage")
  figure.savefig(path, format="png", bbox_inches="tight")


def _plot_domains(report: dict, path: pathlib.Path) -> None:
  """The documents of the first domains, here and in OpenAI's list."""
  lists = {"here": report["domains"]}
  if published := report.get("published_domains"):
    lists["WebText, published"] = published

  figure, axes = _figure(len(lists), 5)
  for (name, counts), each in zip(lists.items(), axes, strict=True):
    first = list(counts.items())[:25]
    names = [domain[:24] or "(no URL)" for domain, _ in first]
    each.barh(names[::-1], [count for _, count in first][::-1])
    each.set_title(name)
    each.set_xlabel("documents")
    each.tick_params(axis="y", labelsize=7)
  figure.savefig(path, format="png", bbox_inches="tight")


def _plot_clusters(clusters: dict, path: pathlib.Path) -> None:
  figure, [axes] = _figure()
  axes.bar(list(clusters), list(clusters.values()))
  axes.set_xlabel("near duplicates of a cluster")
  axes.set_ylabel("clusters")
  figure.savefig(path, format="png", bbox_inches="tight")


def _plot_lengths(lengths: dict, path: pathlib.Path) -> None:
  figure, [axes] = _figure()
  axes.bar(list(lengths), list(lengths.values()))
  axes.set_xlabel("bytes of a document, from this power of two on")
  axes.set_ylabel("documents")
  axes.tick_params(axis="x", rotation=60)
  figure.savefig(path, format="png", bbox_inches="tight")


def _figure(columns: int = 1, height: float = 3.5):
  """A figure, and a list of the axes beside each other in it."""
  # Without pyplot, which keeps its figures and may look for a screen.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6 * columns, height), dpi=100, layout="constrained")
  return figure, figure.subplots(1, columns, squeeze=False)[0]
