"""A local stand-in for the hub's API: repositories are made, filled by commits, listed and read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "c" * 40
TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """What the stand-in holds; `endpoint` is its address."""

    endpoint: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> file name -> content."""
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Checksum -> content of a large file."""

    def environment(self, cache: Any) -> dict[str, str]:
        """Environment of a process that takes this for the hub; `cache`: a folder for its caches."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        return {
            **own, "HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip


def use_hub(hub: Hub, patch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
    """Have this process take `hub` for the hub, for uploads and single files."""
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, value in (("HF_TOKEN", token), ("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")):
        patch.setenv(name, value)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        """Repositories, and what precedes and makes a commit."""
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in self.path:
            self._answer({"error": "Invalid username or password."}, 401)
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.files.setdefault(name, {})
            self.hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self._answer({"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path.partition("?")[0]):
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            self._answer({"files": [
                {"path": name, "uploadMode": mode[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in names
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]})  # fmt: skip
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path.partition("?")[0]):
            for line in body.decode().splitlines():
                self._apply(found[1], json.loads(line))
            address = f"{self.hub.endpoint}/{found[1]}/commit/{COMMIT}"
            self._answer({"commitUrl": address, "commitOid": COMMIT, "success": True})
        else:
            self._answer({"error": self.path}, 404)

    def _apply(self, name: str, operation: dict[str, Any]) -> None:
        value = operation["value"]
        if operation["key"] == "file":
            self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            self.hub.files[name][value["path"]] = self.hub.blobs[value["oid"]]

    def do_PUT(self) -> None:
        """A large file."""
        self.hub.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        """The list of a repository's files, or one of them."""
        path = self.path.partition("?")[0]
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?(/.+)?", path)
        read = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path)
        files = self.hub.files.get((listed or read or [None, ""])[1])
        revision = read[2] if read else (listed[2] or "/main").rpartition("/")[2] if listed else ""
        if files is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        elif listed and listed[3]:
            self._answer({"error": "no such folder"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        elif listed and "/tree/" in (listed[2] or ""):
            self._answer(
                [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            )
        elif listed:
            self._answer({"id": listed[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif read[3] not in files:
            self._answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            data = files[read[3]]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._answer(data, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A stand-in that runs inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
