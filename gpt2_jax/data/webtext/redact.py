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
      text = "".join(map(self._replace_addresses, re.split(r"(\s+)", text)))
    if self.ip:
      text = IP.sub(self._replace_public, text)
    return document if text == document.text else dataclasses.replace(document, text=text)

  def _replace_addresses(self, word: str) -> str:
    if "@" not in word or max(map(len, RUN.findall(word))) > LONGEST_RUN:
      return word
    return EMAIL.sub(lambda _: self.email, word)

  def _replace_public(self, match: re.Match) -> str:
    try:
      is_public = ipaddress.ip_address(match[0]).is_global
    except ValueError:
      return match[0]
    return self.ip if is_public else match[0]
