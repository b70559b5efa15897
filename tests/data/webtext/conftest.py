# SPDX-License-Identifier: Apache-2.0
"""Real pages with their main text, and WARC files of them, for every test of the pipeline."""

import dataclasses
import gzip
import io
import json
import os
import pathlib

import pytest


@dataclasses.dataclass(frozen=True)
class Page:
  """A page of scrapinghub's benchmark: its gold main text was written by people."""

  url: str
  html: bytes
  gold: str


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
  if "GPT2_JAX_TEST_DATA" not in os.environ:
    pytest.skip("GPT2_JAX_TEST_DATA is not set")
  return pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"])


@pytest.fixture(scope="session")
def pages(data) -> list[Page]:
  folder = data / "web_pages"
  truth = json.loads((folder / "ground_truth.json").read_text())
  pages = []
  for name, fields in sorted(truth.items()):
    html = gzip.decompress((folder / "html" / f"{name}.html.gz").read_bytes())
    pages.append(Page(fields["url"], html, fields["articleBody"]))
  return pages


@pytest.fixture(scope="session")
def warc_record():
  """warc_record(url, body, headers, status): the bytes of a response, gzipped as Common Crawl's."""
  warc = pytest.importorskip("fastwarc.warc")

  def make(url: str, body: bytes, headers: str = "Content-Type: text/html", status: int = 200):
    record = warc.WarcRecord()
    record.init_headers(warc.WarcRecordType.response)
    record.headers["WARC-Target-URI"] = url
    record.headers["Content-Type"] = "application/http; msgtype=response"
    length = f"Content-Length: {len(body)}\r\n" if "chunked" not in headers else ""
    head = f"HTTP/1.1 {status} X\r\n{headers}\r\n{length}\r\n"
    record.set_bytes_content(head.encode() + body)
    stream = io.BytesIO()
    record.write(stream)
    return gzip.compress(stream.getvalue(), mtime=0)

  return make
