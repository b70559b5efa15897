# SPDX-License-Identifier: Apache-2.0
"""Domains of URLs; Wikipedia and blocked domains out."""

import dataclasses
import functools
from typing import ClassVar

from gpt2_jax.data.webtext.document import Document, Drop, drop
from gpt2_jax.files import local_path, read_text

# "Since Wikipedia is a common data source for other datasets" (GPT-2 paper, section 2.1).
WIKIPEDIA = frozenset(["wikipedia.org", "wikimedia.org", "wikiwand.com"])


@functools.lru_cache(maxsize=1 << 14)
def registered_domain(url: str) -> str:
  """The domain that somebody registered: bbc.co.uk of news.bbc.co.uk; the host where none is."""
  return _split(url)[0]


@functools.lru_cache(maxsize=1 << 14)
def domain_name(url: str) -> str:
  """The domain without its public suffix, as OpenAI's list of WebText's domains has it: bbc."""
  return _split(url)[1]


def _split(url: str) -> tuple[str, str]:
  # The public suffix list comes with the package; private suffixes (blogspot.com) do not count.
  from tld import get_tld

  result = get_tld(url, as_object=True, fail_silently=True, search_private=False)
  if result is not None:
    return result.fld.lower(), result.domain.lower()
  host = url.partition("://")[2].partition("/")[0].lower()
  return host, host


def read_domains(path: str) -> frozenset[str]:
  """The lines of a list, without comments (#) and empty ones."""
  lines = (line.partition("#")[0].strip() for line in read_text(local_path(path)).splitlines())
  return frozenset(filter(None, lines))


@dataclasses.dataclass(frozen=True)
class Domains:
  """Drops pages of Wikipedia, and of domains that are blocked: registered ones, or hosts."""

  name: ClassVar[str] = "domains"

  wikipedia: bool = True
  blocked: frozenset[str] = frozenset()

  def __call__(self, document: Document) -> Document | Drop:
    domain = registered_domain(document.url)
    if self.wikipedia and domain in WIKIPEDIA:
      return drop("wikipedia", document)
    host = document.url.partition("://")[2].partition("/")[0].lower()
    if domain in self.blocked or host in self.blocked:
      return drop("blocked_domain", document)
    return document
