# SPDX-License-Identifier: Apache-2.0
"""Redaction of e-mail and public IP addresses (FineWeb's patterns, as datatrove has them)."""

import dataclasses
import ipaddress
import re
from typing import ClassVar

from gpt2_jax.data.webtext.document import Document, Drop

_NAME = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
EMAIL = re.compile(
  rf"\b{_NAME}(?:\.{_NAME})*@(?:(?:{_LABEL}\.)+{_LABEL}"
  rf"|\[(?:{_BYTE}\.){{3}}(?:{_BYTE}|[A-Za-z0-9-]*[A-Za-z0-9]:)])"
)
# What an address can be part of. A longer one is no address, and would take minutes to search.
RUN = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.@:\[\]-]+")
LONGEST_RUN = 1024
IP = re.compile(rf"(?:{_BYTE}\.){{3}}{_BYTE}")


@dataclasses.dataclass(frozen=True)
class Redact:
  """Writes a placeholder in place of e-mail and public IPv4 addresses; empty leaves them."""

  name: ClassVar[str] = "redact"

  email: str = "email@example.com"
  ip: str = "192.0.2.1"  # of the block that is reserved for documentation (RFC 5737)

  def __call__(self, document: Document) -> Document | Drop:
    text = document.text
    if self.email and "@" in text:
      text = self._replace_email(text)
    if self.ip:
      text = IP.sub(self._replace_public, text)
    return document if text == document.text else dataclasses.replace(document, text=text)

  def _replace_email(self, text: str) -> str:
    # A word that is too long has one of these blocks in it whole, without a space.
    size = LONGEST_RUN // 2
    blocks = (text[i : i + size] for i in range(0, len(text) - size + 1, size))
    if not any(block.split(None, 1) == [block] for block in blocks):
      return EMAIL.sub(lambda _: self.email, text)

    # Word by word, without those in which no address could be found in time.
    words = re.split(r"(\s+)", text)
    for i, word in enumerate(words):
      if "@" in word and max(map(len, RUN.findall(word))) <= LONGEST_RUN:
        words[i] = EMAIL.sub(lambda _: self.email, word)
    return "".join(words)

  def _replace_public(self, match: re.Match) -> str:
    try:
      is_public = ipaddress.ip_address(match[0]).is_global
    except ValueError:
      return match[0]
    return self.ip if is_public else match[0]
