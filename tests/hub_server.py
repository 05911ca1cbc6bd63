"""A Hub on a loopback port: the file protocol that `huggingface_hub` speaks, with faults that can be switched on.

    with HubServer() as server:
        commit = server.publish("owner/name", {"config.json": b"{}"})
        server.fail("config.json", "gated")

Large files go the way of the real Hub: their ETag is their sha256, and uploads of them use git-lfs.
"""

import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]

# What the Hub answers: status, X-Error-Code, X-Error-Message.
REFUSALS: dict[str, tuple[int, str | None, str]] = {
    "removed": (404, "RepoNotFound", "Repository not found"),
    "removed, for the anonymous": (401, "RepoNotFound", "Repository not found"),
    "bad token": (401, None, "Invalid credentials in Authorization header"),
    "gated": (403, "GatedRepo", "Access to this model is restricted"),
    "forbidden": (403, None, "You do not have the rights"),
    "no revision": (404, "RevisionNotFound", "Invalid rev id"),
    "no entry": (404, "EntryNotFound", "Entry not found"),
    "broken": (500, None, "Internal Server Error"),
    "busy": (503, None, "Service Unavailable"),
}


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Repository:
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Files, revision: str) -> str:
        tree = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())})
        commit = hashlib.sha1(f"{len(self.commits)} {tree}".encode()).hexdigest()
        self.refs[revision], self.commits[commit] = commit, dict(files)
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class HubServer:
    """Repositories in memory, the requests that came, and the faults that are on."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}  # git-lfs objects, by sha256
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # The default, 0.5 s, is how long stop() would wait.
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def publish(self, name: str, files: Files | Path, revision: str = "main") -> str:
        """A new commit of the repository `name` on branch `revision`; the commit's hash."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, revision)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[name].at(revision)
        assert found is not None
        return found[1]

    def fail(self, part: str, fault: str) -> None:
        """Every request whose path contains `part` meets `fault`: a key of REFUSALS, or

        "truncated": the body ends half-way, however often it is resumed;
        "cut": the same, but a resumed download succeeds;
        "corrupt": the body has the right length and the wrong bytes;
        "slow": the answer takes half a second.
        """
        self.faults[part] = fault

    def heal(self) -> None:
        self.faults.clear()

    def asked(self, part: str = "", method: str = "") -> list[Request]:
        """The requests so far whose path contains `part`."""
        return [r for r in self.requests if part in r.path and r.method.startswith(method)]

    def forget(self) -> None:
        self.requests.clear()

    def fault(self, path: str) -> str | None:
        return next((fault for part, fault in self.faults.items() if part in path), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that did not wait for the answer is nobody's mistake."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection a request (HTTP/1.0), so that a stopped server is one that nobody still talks to."""

    hub: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(Request(self.command, path, dict(self.headers)))
        fault = self.hub.fault(path)
        if fault == "slow":
            time.sleep(0.5)
        if fault in REFUSALS:
            return self.refuse(fault)
        routes = {
            r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?": self.model,
            r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)": self.resolve,
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": self.validate,
            r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>.+)": self.preupload,
            r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch": self.lfs_batch,
            r"/lfs/(?P<oid>[0-9a-f]{64})": self.lfs_upload,
            r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>.+)": self.commit,
        }
        for route, function in routes.items():
            if match := re.fullmatch(route, path):
                return function(**match.groupdict())
        self.refuse("no entry")

    def refuse(self, kind: str, commit: str | None = None) -> None:
        status, code, message = REFUSALS[kind]
        self.send_response(status)
        self.send_header("X-Error-Message", message)
        if code is not None:
            self.send_header("X-Error-Code", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # ---- reading

    def model(self, name: str, revision: str | None, **_: Any) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse("removed")
        found = repository.at(revision or "main")
        if found is None:
            return self.refuse("no revision")
        commit, files = found
        self.json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse("removed")
        found = repository.at(revision)
        if found is None:
            return self.refuse("no revision")
        commit, files = found
        if file not in files:
            return self.refuse("no entry", commit)
        content = files[file]
        digest = hashlib.sha256(content) if file.endswith(".safetensors") else hashlib.sha1(content)
        fault = self.hub.fault(self.path)
        if fault == "corrupt":
            content = bytes(len(content))
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{digest.hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            short = fault == "truncated" or (fault == "cut" and not start)
            self.wfile.write(content[start : len(content) // 2] if short else content[start:])

    # ---- writing, in the order in which the client asks

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        self.hub.repositories.setdefault(name, Repository())
        self.json({"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if name not in self.hub.repositories:
            return self.refuse("removed")
        mode = {True: "lfs", False: "regular"}
        files = [file["path"] for file in json.loads(self.body)["files"]]
        self.json(
            {
                "files": [
                    {"path": path, "uploadMode": mode[path.endswith(".safetensors")], "shouldIgnore": False}
                    for path in files
                ]
            }
        )

    def lfs_batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self.json({})

    def commit(self, name: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        found = repository.at(revision)
        files = dict(found[1]) if found else {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = repository.commit(files, revision)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
