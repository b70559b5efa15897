# SPDX-License-Identifier: Apache-2.0
"""Google Cloud Storage on localhost: as much of its JSON API as TensorStore, gcsfs and
google-cloud-storage call here.

It needs no credentials, keeps no old generations, and knows of one bucket only.
"""

import datetime
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse


class Bucket(http.server.ThreadingHTTPServer):
  """`objects` holds the content by name. 403 answers uploads to names that `refuse` matches, and a
  wrong permission."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self):
    super().__init__(("localhost", 0), Handler)
    self.numbers, self.lock = itertools.count(1), threading.RLock()
    self.reset()
    self.url = f"http://localhost:{self.server_port}"
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

  def reset(self):
    self.objects: dict[str, bytes] = {}
    self.generations: dict[str, int] = {}
    self.uploads: dict[str, dict] = {}
    self.served, self.refuse = 0, None

  def handle_error(self, request, client_address):
    """A client that hung up is no error of ours."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)

  def close(self):
    self.shutdown()
    self.server_close()

  def put(self, name: str, content: bytes):
    self.objects[name], self.generations[name] = content, next(self.numbers)

  def drop(self, name: str):
    del self.objects[name], self.generations[name]

  def about(self, name: str) -> dict:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    facts = {
      "kind": "storage#object",
      "bucket": "bucket",
      "name": name,
      "size": str(len(self.objects[name])),
    }
    return facts | {"generation": str(self.generations[name]), "updated": now, "timeCreated": now}


class Handler(http.server.BaseHTTPRequestHandler):
  """One request; every one is answered under the bucket's lock, for conditions to be atomic."""

  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True  # head and body go in two writes

  def do_GET(self):
    with self.server.lock:
      self._get()

  def do_POST(self):
    body = self._body()
    with self.server.lock:
      self._post(body)

  do_PUT = do_POST

  def do_DELETE(self):
    name, query = self._request()
    with self.server.lock:
      if name not in self.server.objects:
        return self._answer(404)
      if self._holds(name, query):
        self.server.drop(name)
        self._answer(204)

  def _get(self):
    name, query = self._request()
    if "/o" not in self.path.partition("?")[0]:
      if self._refused("storage.buckets.get"):
        return None
      return self._json(
        {"kind": "storage#bucket", "id": "bucket", "name": "bucket", "storageClass": "STANDARD"}
      )
    if not name:
      return self._list(query)
    if name not in self.server.objects:
      return self._answer(404)
    if query.get("alt") != "media":
      return self._json(self.server.about(name))
    body, generation = self.server.objects[name], str(self.server.generations[name])
    if query.get("ifGenerationNotMatch") == generation:
      return self._answer(304)
    if not self._holds(name, query):
      return None
    if "Range" not in self.headers or not body:
      return self._answer(200, body, x_goog_generation=generation)
    first, last = re.fullmatch(r"bytes=(-?\d+)-?(\d*)", self.headers["Range"]).groups()
    part = body[int(first) : int(last) + 1 if last else None]
    begin = int(first) % len(body)
    self.server.served += len(part)
    span = f"bytes {begin}-{begin + len(part) - 1}/{len(body)}"
    self._answer(206, part, Content_Range=span, x_goog_generation=generation)

  def _list(self, query: dict[str, str]):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    names = sorted(name for name in self.server.objects if name.startswith(prefix))
    names = [name for name in names if name >= query.get("startOffset", "")]
    names = [name for name in names if not query.get("endOffset") or name < query["endOffset"]]
    folders = set()
    if delimiter:
      deep = [name for name in names if delimiter in name[len(prefix) :]]
      folders = {prefix + name[len(prefix) :].partition(delimiter)[0] + delimiter for name in deep}
      names = [name for name in names if name not in deep]
    items = [self.server.about(name) for name in names]
    self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

  def _post(self, body: bytes):
    name, query = self._request()
    if move := re.search(
      r"/o/([^/]+)/(rewriteTo|copyTo|moveTo)/(?:b/[^/]+/)?o/([^/?]+)", self.path
    ):
      source, verb, target = map(urllib.parse.unquote, move.groups())
      if source not in self.server.objects:
        return self._answer(404)
      self.server.put(target, self.server.objects[source])
      if verb == "moveTo":
        self.server.drop(source)
      about = self.server.about(target)
      return self._json({"done": True, "resource": about} if verb == "rewriteTo" else about)
    if query.get("uploadType") == "resumable" and "upload_id" not in query:
      number = str(next(self.server.numbers))
      self.server.uploads[number] = {
        "name": query.get("name") or json.loads(body)["name"],
        "content": b"",
      } | query
      return self._answer(200, b"{}", Location=f"{self.server.url}{self.path}&upload_id={number}")
    if "upload_id" in query:
      upload = self.server.uploads[query["upload_id"]]
      upload["content"] += body
      if self.headers["Content-Range"].endswith("/*"):
        return self._answer(308, Range=f"bytes=0-{len(upload['content']) - 1}")
      name, query, body = upload["name"], upload, upload["content"]
    if query.get("uploadType") == "multipart":
      boundary = (
        b"--" + re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
      )
      _, head, content, _ = body.split(boundary)
      name = json.loads(re.split(rb"\r?\n\r?\n", head, maxsplit=1)[1])["name"]
      body = (
        re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
      )
    if not self._refused(name) and self._holds(name, query):
      self.server.put(name, body)
      self._json(self.server.about(name))

  def _refused(self, name: str) -> bool:
    if not self.server.refuse or not re.search(self.server.refuse, name):
      return False
    self._json({"error": {"code": 403, "message": "the service account may not do this"}}, 403)
    return True

  def _holds(self, name: str, query: dict[str, str]) -> bool:
    wanted = query.get("ifGenerationMatch")
    if wanted is None or int(wanted) == self.server.generations.get(name, 0):
      return True
    self._answer(412)
    return False

  def _request(self) -> tuple[str, dict[str, str]]:
    url = urllib.parse.urlparse(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    return urllib.parse.unquote(url.path.partition("/o/")[2]) or query.get("name", ""), query

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    chunks = []
    while size := int(self.rfile.readline(), 16):
      chunks.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(chunks)

  def _json(self, content: dict, status: int = 200):
    self._answer(status, json.dumps(content).encode(), Content_Type="application/json")

  def _answer(self, status: int, body: bytes = b"", **headers: str):
    self.send_response(status)
    for key, value in (
      headers | ({} if status in (204, 304) else {"Content-Length": str(len(body))})
    ).items():
      self.send_header(key.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass
