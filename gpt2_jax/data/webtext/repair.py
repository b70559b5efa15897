# SPDX-License-Identifier: Apache-2.0
"""Encoding repair by ftfy: mojibake, HTML entities that are left, control characters, lone CR."""

import dataclasses
from typing import ClassVar

from gpt2_jax.data.webtext.document import Document, Drop, drop


@dataclasses.dataclass(frozen=True)
class Repair:
  """ftfy's `fix_text` with quotes as they are: GPT-2 knows curly ones (FTFYFormatter does so)."""

  name: ClassVar[str] = "repair"

  def __call__(self, document: Document) -> Document | Drop:
    import ftfy

    # 1. A lone surrogate has no UTF-8: it came out of an entity such as &#xD800;.
    text = document.text.encode("utf-8", "replace").decode("utf-8")

    # 2. What is left may be empty.
    text = ftfy.fix_text(text, uncurl_quotes=False).strip()
    if not text:
      return drop("empty", document)
    return document if text == document.text else dataclasses.replace(document, text=text)
