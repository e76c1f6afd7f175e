"""A Hugging Face Hub on 127.0.0.1, with repositories in memory and a log of requests."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from waiting import TIMEOUT

USER = "someone"
BAD_TOKEN, READ_TOKEN, WRITE_TOKEN = "hf_bad", "hf_read", "hf_write"


class LoopbackHub(ThreadingHTTPServer):
    """`repos` maps user/name, or datasets/user/name, to the contents of files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.lfs: dict[str, bytes] = {}  # by SHA-256
        self.commits: list[dict[str, str]] = []  # the path and kind ("file" or "lfsFile") of each file in a commit
        self.log: list[tuple[str, str, str | None]] = []  # method, last part of the path, range
        self.breaks: dict[tuple[str, str], int] = {}  # bytes before the connection ends, once, by method and file
        self.status, self.answer = 200, b""  # if one is set, they replace every answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server
        body = self.read_body()
        path = self.path.partition("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.log.append((self.command, path.rpartition("/")[2], self.headers.get("Range")))
        if hub.answer or hub.status != 200:
            self.reply(hub.status, hub.answer)
        elif token == BAD_TOKEN:
            self.reply(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        elif path == "/api/whoami-v2":
            role = "read" if token == READ_TOKEN else "write"
            self.reply_json({"name": USER, "auth": {"accessToken": {"role": role}}})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply_json({"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):
            hub.lfs[hashlib.sha256(body).hexdigest()] = body
            self.reply_json({})
        else:
            self.repository(path, token, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def create(self, wanted: dict):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != USER:
            self.reply(403, headers={"X-Error-Message": "You don't have the rights to create a model"})
        else:
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, {})
            self.reply_json({"url": f"{self.server.url}/{name}"}, status)

    def repository(self, path: str, token: str, body: bytes):
        """Answer a request about one repository."""
        match = re.match(r"/(?:api/)?(?:models/)?((?:datasets/)?[^/]+/[^/.]+)(?:\.git)?(?:/(\w+)(?:/\w+)?)?(.*)", path)
        name, action, rest = match.groups() if match else ("", None, "")
        files = self.server.repos.get(name)
        if files is None:  # the Hub does not tell users without a token whether it is private
            self.reply(404 if token else 401, headers={"X-Error-Code": "RepoNotFound"})
        elif name in self.server.gated:
            self.reply(403, headers={"X-Error-Code": "GatedRepo"})
        elif action is None or action == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.reply_json({"id": name, "sha": commit_hash(files), "siblings": siblings, "tags": [], "private": False})
        elif action == "tree":
            entries = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
            self.reply_json(entries)
        elif action == "preupload":
            modes = {True: "lfs", False: "regular"}
            sent = [file["path"] for file in json.loads(body)["files"]]
            uploads = [{"path": path, "uploadMode": modes[path.endswith(".safetensors")]} for path in sent]
            self.reply_json({"files": [upload | {"shouldIgnore": False, "oid": None} for upload in uploads]})
        elif action == "info":
            actions = {"upload": {"href": f"{self.server.url}/lfs/"}}
            objects = [wanted | {"actions": actions} for wanted in json.loads(body)["objects"]]
            self.reply_json({"transfer": "basic", "objects": objects})
        elif action == "commit":
            self.commit(name, [json.loads(line) for line in body.splitlines()])
        elif action == "resolve" and (content := files.get(rest.removeprefix("/"))) is not None:
            self.resolve(content, rest.removeprefix("/"), commit_hash(files))
        else:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound"})

    def commit(self, name: str, lines: list[dict]):
        files = {line["value"]["path"]: line for line in lines if line["key"] != "header"}
        self.server.commits.append({path: line["key"] for path, line in files.items()})
        for path, line in files.items():
            value = line["value"]
            content = self.server.lfs[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            self.server.repos[name][path] = content
        oid = commit_hash(self.server.repos[name])
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.reply_json({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def resolve(self, content: bytes, name: str, commit: str):
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.reply(206, content[start:], headers)
        else:
            self.reply(200, content, headers, stop_at=self.server.breaks.pop((self.command, name), None))

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply_json(self, values, status: int = 200):
        self.reply(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes = b"{}", headers=(), stop_at: int | None = None):
        self.send_response(status)
        for name, value in (dict(headers) | {"Content-Length": len(body)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop_at])
            self.close_connection = stop_at is not None

    def log_message(self, *_):
        pass


def commit_hash(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(path.encode() + content for path, content in sorted(files.items()))).hexdigest()


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def hub_environment(url: str, home: Path, **variables: str) -> dict[str, str]:
    """Return a child process's environment. huggingface_hub reads its variables when it is imported."""
    hub = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(int(TIMEOUT)),
        "HF_HUB_ETAG_TIMEOUT": str(int(TIMEOUT)),
        "NO_PROXY": "127.0.0.1",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | hub | variables
