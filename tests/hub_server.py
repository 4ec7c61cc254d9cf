"""A web server that speaks the hub's paths for dataset repositories, and misbehaves on request."""

import contextlib
import gzip
import hashlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><html>sign in</html>"
LARGE = 200  # bytes from which a file is listed with its SHA-256, as LFS objects are


class Hub:
    """Files of one repository, and what goes wrong with which of them.

    Attributes:
        files: content by path.
        faults: by path, one fault for each request in turn: `cut N` (closes after N bytes), `drop` (closes at
            once), `html`, `short` / `long` (says so in its length), `flip` (one wrong bit), `500`, `403`,
            `no-range` (ignores where it shall begin), `more` (sends more than it lists), `drip` (one byte
            every 20 ms). At the path `listing`, for every request: `self` and `pages` (the next page is this
            one, is another one for ever), `endless` (a body without end), `drip`, `silent` (headers that do
            not end), `gzip`, or `size X` (JSON of the first file's size).
        asked: every request as (method, path, range).
    """

    def __init__(self, repo, files):
        self.repo, self.files, self.faults, self.asked = repo, files, {}, []
        self.page = 1000  # entries of a listing
        self.tired = False  # whether answers without end shall end
        self.headers = []

    def entry(self, path):
        content = self.files[path]
        row = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
        if len(content) >= LARGE:
            row["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 130,
            }
        return row


def git_sha(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.close_connection = True
        self.server.hub.asked.append(("GET", self.path, self.headers.get("Range", "")))
        self.server.hub.headers.append(dict(self.headers))
        api, resolve = (
            f"/api/datasets/{self.server.hub.repo}/",
            f"/datasets/{self.server.hub.repo}/resolve/{SHA}/",
        )
        if self.path.startswith(f"{api}revision/"):
            fault = next(iter(self.server.hub.faults.get("revision", [])), "")
            if fault == "html":
                return self.reply(b"<!doctype html><p>sign in", kind="text/html")
            if fault:
                self.server.hub.faults["revision"].pop(0)
                return self.reply(b"", status=int(fault))
            facts = {"sha": SHA, "cardData": {"license": ["mit"]}}
            return self.reply(json.dumps(facts).encode(), kind="application/json")
        if self.path.startswith(f"{api}tree/{SHA}"):
            return self.listing()
        if self.path.startswith(resolve):
            return self.file(self.path.removeprefix(resolve))
        return self.reply(b"not here", status=404)

    def listing(self):
        fault = "".join(self.server.hub.faults.get("listing", []))
        if fault in ("endless", "drip", "silent"):
            return self.without_end(fault)
        begin = int(self.path.partition("cursor=")[2] or 0)
        rows = [{"type": "directory", "path": "test", "oid": "0" * 40, "size": 0}]
        rows += [self.server.hub.entry(path) for path in sorted(self.server.hub.files)]
        more = {}
        if begin + self.server.hub.page < len(rows):
            here = self.server.hub.url + self.path.partition("&cursor")[0]
            more = {"Link": f'<{here}&cursor={begin + self.server.hub.page}>; rel="next"'}
        body = json.dumps(rows[begin : begin + self.server.hub.page]).encode()
        if fault in ("self", "pages"):
            number = "" if fault == "self" else f"&page={len(self.server.hub.asked)}"
            own = self.path.partition("&page")[0]
            more = {"Link": f'<{self.server.hub.url}{own}{number}>; rel="next"'}
        if fault == "gzip":
            body, more = gzip.compress(bytes(2**20)), {"Content-Encoding": "gzip"}
        if fault.startswith("size "):
            body = body.replace(f'"size": {rows[1]["size"]}'.encode(), f'"size": {fault[5:]}'.encode(), 1)
        return self.reply(body, kind="application/json", more=more)

    def without_end(self, fault):
        """Send for ever, or until the other side has had enough."""
        self.send_response(200)
        self.flush_headers()
        if fault != "silent":
            self.send_header("Content-Type", "application/json")
            self.end_headers()
        chunk = b"[" + b" " * 2**16 if fault == "endless" else b" "
        with contextlib.suppress(OSError):
            while not self.server.hub.tired:
                self.wfile.write(chunk if fault != "silent" else b"X-More: 1\r\n")
                self.wfile.flush()
                time.sleep(0 if fault == "endless" else 0.02)

    def file(self, path):
        content = self.server.hub.files[path]
        waiting = self.server.hub.faults.get(path, [])
        fault, _, number = (waiting.pop(0) if waiting else "").partition(" ")
        if fault == "drop":
            return None
        if fault.isdigit():
            return self.reply(b"", status=int(fault))
        if fault == "html":
            return self.reply(PAGE.ljust(len(content)), kind="text/html")
        if fault == "flip":
            content = bytes([content[0] ^ 1]) + content[1:]
        begin, status, more = 0, 200, {}
        asked = self.headers.get("Range", "")
        if asked and fault != "no-range":
            begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            more = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        body = content[begin:]
        length = len(body) + {"short": -1, "long": 1}.get(fault, 0)
        if fault == "cut":
            body = body[: int(number)]
        if fault == "drip":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for i in range(len(body)):
                    if self.server.hub.tired:
                        break
                    self.wfile.write(body[i : i + 1])
                    time.sleep(0.02)
            return None
        if fault == "more":
            body, length = body + b"xyz", None
        return self.reply(body, status=status, more=more, length=length)

    def reply(self, body, status=200, kind="application/octet-stream", more=None, length=-1):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.send_header("Connection", "close")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(hub):
    """The address of a server for `hub`, in a thread."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub.url
    finally:
        hub.tired = True
        server.shutdown()
        server.server_close()
        thread.join()
