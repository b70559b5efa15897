# SPDX-License-Identifier: Apache-2.0
"""Inputs: WARC and WET files by FastWARC, HTML files, JSON lines of {url, html|text}.

What cannot be read is a `Drop` with a reason, and the rest of the file is read.
"""

import dataclasses
import html
import io
import itertools
import re
from collections.abc import Iterator

from gpt2_jax.data.compression import decompressed_name, open_decompressed
from gpt2_jax.data.globs import expand_globs
from gpt2_jax.data.webtext.document import Document, Drop
from gpt2_jax.files import first_line, json_sha256, parse_json_object

# HTML files of a shard: a job keeps a file for each shard.
HTML_FILES = 256
# Where a page of a file says what its URL is.
TAG = re.compile(rb"<(?:link|meta)\b[^<>]{0,2000}>", re.IGNORECASE)
IS_CANONICAL = re.compile(rb"""\b(?:rel=["']?canonical|property=["']og:url)\b""", re.IGNORECASE)
ADDRESS = re.compile(rb"""\b(?:href|content)=["']([^"'>]+)""", re.IGNORECASE)
HTML_TYPES = ("text/html", "application/xhtml+xml", "text/plain", "")
# What the header of a response may take besides its page.
HTTP_HEADER_BYTES = 1 << 16
WARC_SUFFIXES = (".warc", ".wet", ".arc.warc")


@dataclasses.dataclass(frozen=True)
class Shard:
  """Files that one worker reads from the first to the last. `kind`: warc, html or lines."""

  kind: str
  paths: tuple[str, ...]

  @property
  def key(self) -> str:
    """A name for what is made of this shard."""
    return json_sha256([self.kind, *self.paths])[:16]


def list_shards(patterns: str) -> list[Shard]:
  """The files that match globs, in shards. Raises ValueError for one of another kind."""
  pages, shards = [], []
  for path in expand_globs(patterns):
    name = decompressed_name(path).lower()
    if name.endswith(WARC_SUFFIXES):
      # FastWARC knows these alone, and takes others for damaged files.
      if not path.lower().endswith((*WARC_SUFFIXES, ".gz", ".zst")):
        raise ValueError(f"{path[-200:]}: a WARC file is plain, .gz or .zst; recompress it")
      shards.append(Shard("warc", (path,)))
    elif name.endswith((".html", ".htm", ".xhtml")):
      pages.append(path)
    elif name.endswith((".jsonl", ".ndjson")):
      shards.append(Shard("lines", (path,)))
    else:
      raise ValueError(
        f"{path[-200:]} is no input: give .warc, .wet, .html or .jsonl, which may be compressed"
      )
  for start in range(0, len(pages), HTML_FILES):
    shards.append(Shard("html", tuple(pages[start : start + HTML_FILES])))
  return shards


def read_shard(shard: Shard, max_bytes: int) -> Iterator[tuple[int, Document | Drop]]:
  """The documents of a shard, or why one is none, each with the bytes that were read.

  No page of more than `max_bytes` is read, decompressed or not.
  """
  readers = {"warc": _read_warc, "html": _read_html, "lines": _read_lines}
  for path in shard.paths:
    try:
      for result in readers[shard.kind](path, max_bytes):
        yield (result.nbytes if isinstance(result, Document) else 0), result
    except (ValueError, OSError, EOFError) as error:
      # The disk or the network fails, which is not for good: the job ends, and can be resumed.
      if isinstance(error, OSError) and error.errno is not None:
        raise
      # A compressed file is cut off or damaged. What stood before counts.
      yield 0, Drop("truncated", f"{path}: {first_line(error)}")


def _read_html(path: str, max_bytes: int) -> Iterator[Document | Drop]:
  with open_decompressed(path) as stream:
    page = stream.read(max_bytes + 1)
  if len(page) > max_bytes:
    yield Drop("page_too_large", path)
    return
  yield Document(url=_canonical_url(page[: 1 << 18]), html=page)


def _canonical_url(page: bytes) -> str:
  """What the first tag of a page that says its URL has, or nothing."""
  for tag in TAG.findall(page):
    if IS_CANONICAL.search(tag) and (address := ADDRESS.search(tag)):
      return html.unescape(address[1].decode("utf-8", "replace")).strip()
  return ""


def _read_lines(path: str, max_bytes: int) -> Iterator[Document | Drop]:
  with open_decompressed(path) as stream:
    for number in itertools.count(1):
      line = stream.readline(2 * max_bytes)
      if not line:
        return
      if len(line) == 2 * max_bytes and not line.endswith(b"\n"):
        yield Drop("page_too_large", f"{path}:{number}")
        while (rest := stream.readline(max_bytes)) and not rest.endswith(b"\n"):
          pass
      elif line.strip():
        yield _record(line, f"{path}:{number}", max_bytes)


def _record(line: bytes, place: str, max_bytes: int) -> Document | Drop:
  """The document of a line of JSON, with the text under "text" or the page under "html"."""
  try:
    fields = parse_json_object(line, place)
    url, text, page = (fields.get(key) or "" for key in ("url", "text", "html"))
    if not all(isinstance(value, str) for value in (url, text, page)) or not (text or page):
      return Drop("no_text", f"{place} has no text under text or html")
    # JSON can hold half of a character (a lone surrogate), which no UTF-8 can.
    url, text = (value.encode("utf-8", "replace").decode() for value in (url, text))
    encoded = page.encode("utf-8", "replace") if page else None
  except ValueError as error:
    return Drop("malformed", first_line(error))
  if len(encoded or text) > max_bytes:
    return Drop("page_too_large", place)
  return Document(url=url, text="" if page else text, html=encoded)


def _read_warc(path: str, max_bytes: int) -> Iterator[Document | Drop]:
  """Responses with HTML of a WARC file, or texts of a WET file ("conversion")."""
  from fastwarc.warc import ArchiveIterator, WarcRecordType

  kinds = WarcRecordType.response | WarcRecordType.conversion
  for record in ArchiveIterator(path, record_types=kinds, parse_http=False):
    url = record.headers.get("WARC-Target-URI", "").strip("<>")
    try:
      yield _warc_document(record, url, max_bytes)
    except (ValueError, OSError) as error:
      # One record: its HTTP header, or how its page is compressed.
      yield Drop("damaged_record", f"{url[:200]} {first_line(error)}")


def _warc_document(record, url: str, max_bytes: int) -> Document | Drop:
  from fastwarc.warc import WarcRecordType

  # 1. The record, whole: FastWARC takes one that is cut off for a shorter one.
  length = int(record.headers.get("Content-Length", 0))
  if length > max_bytes + HTTP_HEADER_BYTES:
    return Drop("page_too_large", url[:200])
  content = record.reader.read(length)
  if len(content) < length:
    return Drop("truncated", f"{url[:200]} has {len(content):,} of {length:,} bytes")

  # 2. The status and the type of a response. A page that was sent compressed is inflated only as
  #    far as it is read.
  is_text = record.record_type == WarcRecordType.conversion
  if not is_text and record.is_http:
    record = _copy_record(record, content)
    record.parse_http(auto_decode="all")
    if record.http_headers.status_code != 200:
      return Drop("http_status", f"{record.http_headers.status_code} {url[:200]}")
    if (record.http_content_type or "").lower() not in HTML_TYPES:
      return Drop("content_type", f"{record.http_content_type} {url[:200]}")
    content = record.reader.read(max_bytes + 1)

  # 3. The page.
  if len(content) > max_bytes:
    return Drop("page_too_large", url[:200])
  if not content:
    return Drop("empty", url[:200])
  if is_text:
    return Document(url=url, text=content.decode("utf-8", "replace"))
  return Document(url=url, html=content)


def _copy_record(record, content: bytes):
  """A record of its own: an error of HTTP in it leaves the reader of the file as it is."""
  from fastwarc.warc import ArchiveIterator

  record.set_bytes_content(content)
  buffer = io.BytesIO()
  record.write(buffer)
  buffer.seek(0)
  return next(iter(ArchiveIterator(buffer, parse_http=False)))
