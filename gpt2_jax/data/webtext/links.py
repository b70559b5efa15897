# SPDX-License-Identifier: Apache-2.0
"""Reddit dumps to outbound links: "all outbound links from Reddit which received at least 3 karma".

A dump is JSON lines of submissions, .zst mostly. Nothing is fetched here: a crawler that writes
WARC takes the list of links (the README names some).
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from gpt2_jax.data.compression import compression_suffix, open_decompressed
from gpt2_jax.data.webtext.document import Document, Drop, drop
from gpt2_jax.data.webtext.domains import registered_domain
from gpt2_jax.data.webtext.tally import Tally
from gpt2_jax.files import atomic_write, first_line, local_path

REDDIT = frozenset("reddit.com redd.it redditmedia.com redditstatic.com reddituploads.com".split())
SHORTENERS = frozenset(
  "bit.ly goo.gl t.co tinyurl.com ow.ly is.gd buff.ly adf.ly j.mp tiny.cc dlvr.it ift.tt fb.me "
  "trib.al wp.me lnkd.in youtu.be amzn.to shorturl.at rebrand.ly cutt.ly bl.ink rb.gy v.gd".split()
)
MEDIA = frozenset(
  "imgur.com gfycat.com flickr.com instagram.com youtube.com vimeo.com twitch.tv giphy.com "
  "streamable.com soundcloud.com bandcamp.com spotify.com deviantart.com photobucket.com vid.me "
  "vine.co minus.com twitpic.com liveleak.com dailymotion.com tiktok.com pinterest.com gyazo.com "
  "redgifs.com pornhub.com xvideos.com livememe.com quickmeme.com memegenerator.net".split()
)
MEDIA_SUFFIXES = tuple(
  ".jpg .jpeg .png .gif .gifv .webp .webm .svg .bmp .tif .tiff .mp3 .mp4 .m4a .avi .mov .mkv .wav "
  ".ogg .pdf .zip .gz .tar .rar .7z .exe .apk .dmg .iso .torrent .doc .docx .ppt .pptx .xls .xlsx "
  ".csv".split()
)
# Dumps are compressed with `zstd --long=31`.
ZSTD_WINDOW = 1 << 31
# A line that is longer is no submission.
MAX_LINE = 1 << 24
PARTITIONS = 64


@dataclasses.dataclass(frozen=True)
class LinkRules:
  """Which submissions give a link."""

  min_karma: int = 3
  allow_over_18: bool = True  # the paper names no such rule
  allow_crossposts: bool = True
  blocked: frozenset[str] = REDDIT | SHORTENERS | MEDIA

  def link(self, line: bytes) -> str | Drop:
    """The canonical link of a line of a dump, or why it gives none."""
    example = line[:200].decode("utf-8", "replace")
    try:
      post = json.loads(line)
      score, url = int(post["score"]), str(post["url"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
      return Drop("malformed", example)
    if post.get("is_self"):
      return Drop("self_post", example)
    if score < self.min_karma:
      return Drop("karma", example)
    if post.get("over_18") and not self.allow_over_18:
      return Drop("over_18", example)

    # A crosspost links to the submission on Reddit, which has the link.
    parents = post.get("crosspost_parent_list")
    if isinstance(parents, list) and parents and isinstance(parents[0], dict):
      if not self.allow_crossposts:
        return Drop("crosspost", example)
      url = str(parents[0].get("url"))
    return self._outbound(url)

  def _outbound(self, url: str) -> str | Drop:
    link = canonical_url(url)
    if link is None:
      return Drop("no_url", url[:200])
    domain = registered_domain(link)
    if domain in self.blocked:
      for reason, domains in (("reddit", REDDIT), ("shortener", SHORTENERS), ("media", MEDIA)):
        if domain in domains:
          return Drop(reason, link[:200])
      return Drop("blocked_domain", link[:200])
    if urllib.parse.urlsplit(link).path.lower().endswith(MEDIA_SUFFIXES):
      return Drop("media", link[:200])
    return link


def canonical_url(url: str) -> str | None:
  """One form of a URL: no fragment, tracking parameters or default port; None for no http(s)."""
  import courlan

  if len(url) > 2000 or not url.lower().startswith(("http://", "https://")):
    return None
  try:
    link = courlan.clean_url(url.partition("#")[0])
    parts = urllib.parse.urlsplit(link or "")
    is_host = "." in (parts.hostname or "") and " " not in parts.netloc
  except ValueError:
    return None
  return link if is_host and parts.scheme in ("http", "https") else None


def link_key(url: str) -> str:
  """What two links to one page have in common: http or https, www or not, a slash at the end."""
  rest = (canonical_url(url) or url).partition("://")[2]
  return rest.removeprefix("www.").rstrip("/")


def read_dump(path: str) -> Iterator[bytes | Drop]:
  """The lines of a dump. A damaged or truncated one ends with a `Drop`."""
  try:
    with _open_dump(path) as stream:
      while line := stream.readline(MAX_LINE):
        if line.strip():
          yield line
  except (ValueError, OSError, EOFError) as error:
    yield Drop("truncated", f"{path}: {first_line(error)}")


@contextlib.contextmanager
def _open_dump(path: str) -> Iterator[io.BufferedIOBase]:
  if compression_suffix(path) != ".zst":
    with open_decompressed(path) as stream:
      yield stream
    return
  with open(path, "rb") as file:
    yield io.BufferedReader(_ZstdStream(file), 1 << 20)


class _ZstdStream(io.RawIOBase):
  """Decompresses .zst with the window of Reddit's dumps, which Arrow refuses, frame by frame.

  Reading raises ValueError where the file is damaged, and where it ends inside a frame, which
  zstandard's own reader takes for the end.
  """

  # Input of one call: even a bomb gives no more than 128 MiB for it.
  CHUNK = 4096

  def __init__(self, file: io.BufferedIOBase):
    import zstandard

    self._file = file
    self._error = zstandard.ZstdError
    self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    self._frame = None
    self._compressed = self._pending = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:
    while not self._pending:
      self._compressed = self._compressed or self._file.read(self.CHUNK)
      if not self._compressed:
        if self._frame is not None:
          raise ValueError("it ends inside a frame")
        return 0
      self._inflate()
    content = self._pending[: len(buffer)]
    self._pending = self._pending[len(content) :]
    buffer[: len(content)] = content
    return len(content)

  def _inflate(self) -> None:
    self._frame = self._frame or self._decompressor.decompressobj()
    try:
      self._pending = self._frame.decompress(self._compressed)
    except self._error as error:
      raise ValueError(f"it cannot be decompressed: {first_line(error)}") from error
    self._compressed = self._frame.unused_data
    if self._frame.eof:
      self._frame = None


def extract_links(paths: list[str], rules: LinkRules, out: str) -> Tally:
  """Writes the links of dumps to a file, one a line, each once. Raises FileExistsError.

  Links are spread over files by their hashes, so that a 64th of them is in memory at a time.
  """
  tally = Tally()
  with (
    atomic_write(local_path(out)) as partial,
    tempfile.TemporaryDirectory(dir=partial.parent) as folder,
  ):
    with contextlib.ExitStack() as stack:
      spills = []
      for i in range(PARTITIONS):
        path = pathlib.Path(folder, str(i))
        spills.append(stack.enter_context(open(path, "w", encoding="utf-8")))
      for path in paths:
        for line in read_dump(path):
          link = line if isinstance(line, Drop) else rules.link(line)
          nbytes = 0 if isinstance(line, Drop) else len(line)
          is_drop = isinstance(link, Drop)
          tally.count("links", nbytes, link if is_drop else Document(url=link, text=link))
          if not is_drop:
            spills[hash_link(link) % PARTITIONS].write(link + "\n")
    _write_distinct(pathlib.Path(folder), partial, tally)
  tally.check()
  return tally


def _write_distinct(folder: pathlib.Path, out: pathlib.Path, tally: Tally) -> None:
  """The links of the spills, each page once. Of its forms the last counts: https before http."""
  with open(out, "w", encoding="utf-8") as file:
    for i in range(PARTITIONS):
      links = {}
      for link in sorted((folder / str(i)).read_text(encoding="utf-8").splitlines()):
        key = link_key(link)
        is_new = key not in links
        result = Document(text=link) if is_new else Drop("repeated", links[key])
        tally.count("distinct", len(link.encode()), result)
        links[key] = link
      file.writelines(link + "\n" for link in sorted(links.values()))


def hash_link(url: str) -> int:
  """64 bits of a link's hash, by its page."""
  return int.from_bytes(hashlib.blake2b(link_key(url).encode(), digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Linked:
  """Keeps pages that a list of links has: 8 bytes a link in memory."""

  name: ClassVar[str] = "links"

  hashes: np.ndarray = dataclasses.field(repr=False)  # sorted uint64

  @classmethod
  def read(cls, path: str) -> "Linked":
    """Reads a list of links, one a line."""
    with open(local_path(path), encoding="utf-8") as file:
      hashes = np.fromiter((hash_link(line.strip()) for line in file if line.strip()), np.uint64)
    return cls(np.unique(hashes))

  def __call__(self, document: Document) -> Document | Drop:
    key = np.uint64(hash_link(document.url))
    place = np.searchsorted(self.hashes, key)
    is_linked = place < len(self.hashes) and self.hashes[place] == key
    return document if is_linked else drop("not_linked", document)
