"""A Hub on the loopback interface that the real client talks to over HTTP, with faults on demand.

It answers what huggingface_hub asks to publish, list and download models: whoami, repositories, trees, preupload, the
LFS batch protocol with uploads and downloads at a "CDN" (the same server under another host name, so that a client
that sends its token there is caught), or a Xet store in a folder that hf_xet writes and reads itself, NDJSON commits,
resolve with Range, YAML validation and collections. Small files are kept by git, others in large-file storage, as on
the Hub.

https://huggingface.co/docs/hub/api, https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hf_xet
import yaml

from tests.hub.handler import ROUTES, Fault, RefusedError, handler

LFS = re.compile(r".+\.(safetensors|bin|onnx|png)")


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of what git keeps: the content, or the pointer to it."""
        kept = self.content
        if self.lfs:
            lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(kept)}", "")
            kept = "\n".join(lines).encode()
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repository:
    private: bool = False
    gated: str | bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": ""})
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], branch: str = "main") -> str:
        """Make these the files of a branch; returns the commit."""
        names = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        commit = hashlib.sha1(f"{self.branches[branch]}\n{names}".encode()).hexdigest()
        self.branches[branch], self.commits[commit] = commit, files
        return commit

    @property
    def files(self) -> dict[str, Blob]:
        """Of main."""
        return self.files_of("main")

    def files_of(self, branch: str) -> dict[str, Blob]:
        return self.commits[self.branches[branch]]


class LoopbackHub:
    """The server's state and its faults. ``tokens`` maps a token to what whoami answers for it."""

    def __init__(self, tokens: dict[str, dict[str, Any]]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.xet: Path | None = None  # folder of a content-addressed store; None refuses Xet
        self.xet_hashes: dict[str, str] = {}  # SHA-256 -> Xet's hash, which the Hub reads off the uploaded shards
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # (step, path, headers) of every request
        self._faults: list[tuple[str, Fault, list[int], str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self._server.server_port}/cdn"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, step: str, fault: Fault, times: int = 1, path: str = "") -> None:
        """Answer the next ``times`` requests of a step, whose address holds ``path``, with a fault."""
        assert step in ROUTES
        self._faults.append((step, fault, [times], path))

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()

    def add(self, repo: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """A repository that is there already; one of the name that was added before gets a new commit."""
        made = self.repositories.setdefault(repo, Repository(**settings))
        made.commit({path: Blob(content, bool(LFS.fullmatch(path))) for path, content in files.items()})
        self.objects |= {blob.sha256: blob.content for blob in made.files.values() if blob.lfs}
        return made

    def count(self, step: str) -> int:
        """How many requests of a step came."""
        return sum(request[0] == step for request in self.requests)

    def fault_of(self, step: str, path: str) -> Fault | None:
        for wanted, fault, left, part in self._faults:
            if wanted == step and part in path and left[0] > 0:
                left[0] -= 1
                return fault
        return None

    # one method a step: (user or None, path groups, body) -> JSON

    def whoami(self, user: dict[str, Any] | None, *_: Any) -> Any:
        if user is None:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return user

    def create(self, user: dict[str, Any] | None, _: Any, body: bytes, *__: Any) -> Any:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or (user or {}).get('name')}/{asked['name']}"
        self._writer(user, repo)
        if repo in self.repositories:
            raise RefusedError(409, message="You already created this model repo")
        self.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=asked.get("visibility") == "private")
        return {"url": f"{self.url}/{repo}", "name": repo, "id": repo}

    def validate(self, _: Any, __: Any, body: bytes, *___: Any) -> Any:
        front = json.loads(body)["content"].split("---")
        try:
            base = yaml.safe_load(front[1]).get("base_model", "")
        except (IndexError, yaml.YAMLError) as error:
            raise RefusedError(400, message=str(error)) from None
        if " " in base:
            raise RefusedError(400, message=f"base_model with value {base} is not valid. Use a model id")
        return {"errors": [], "warnings": []}

    def models(self, user: dict[str, Any] | None, _: Any, __: Any, query: dict[str, list[str]]) -> Any:
        found = [self._describe(repo) for repo, held in self.repositories.items() if not held.private or user]
        tags, owner = query.get("filter", []), query.get("author", [""])[0]
        return [each for each in found if set(tags) <= set(each["tags"]) and each["id"].startswith(owner)]

    def info(self, user: dict[str, Any] | None, at: dict[str, str], *_: Any) -> Any:
        repository, _files = self.files_at(user, at)
        named = at.get("revision") or "main"
        return self._describe(at["repo"], repository.branches.get(named, named))

    def refs(self, user: dict[str, Any] | None, at: dict[str, str], *_: Any) -> Any:
        branches = self.files_at(user, at)[0].branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches]
        return {"branches": listed, "converts": [], "tags": []}

    def branch(self, user: dict[str, Any] | None, at: dict[str, str], body: bytes, *_: Any) -> Any:
        self._writer(user, at["repo"])
        repository, _files = self.files_at(user, {**at, "revision": json.loads(body).get("startingPoint", "main")})
        if at["branch"] in repository.branches:
            raise RefusedError(409, message=f"Reference already exists: refs/heads/{at['branch']}")
        start = json.loads(body).get("startingPoint", "main")
        repository.branches[at["branch"]] = repository.branches.get(start, start)
        return {}

    def unbranch(self, user: dict[str, Any] | None, at: dict[str, str], *_: Any) -> Any:
        self._writer(user, at["repo"])
        if at["branch"] not in self.files_at(user, at)[0].branches:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {at['branch']}")
        del self.repositories[at["repo"]].branches[at["branch"]]
        return {}

    def tree(self, user: dict[str, Any] | None, at: dict[str, str], *_: Any) -> Any:
        rows = []
        for path, blob in sorted(self.files_at(user, at)[1].items()):
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.lfs:
                row["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
                row |= {"xetHash": self.xet_hashes[blob.sha256]} if blob.sha256 in self.xet_hashes else {}
            rows.append(row)
        return rows

    def preupload(self, user: dict[str, Any] | None, at: dict[str, str], body: bytes, *_: Any) -> Any:
        self._writer(user, at["repo"])
        there = self.files_at(user, at)[1]
        rows = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if LFS.fullmatch(file["path"]) or file["size"] > 10 * 2**20 else "regular"
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            rows.append(row | ({"oid": there[file["path"]].etag} if file["path"] in there else {}))
        return {"files": rows}

    def batch(self, user: dict[str, Any] | None, at: dict[str, str], body: bytes, *_: Any) -> Any:
        self._writer(user, at["repo"])
        rows = []
        for asked in json.loads(body)["objects"]:
            row = dict(asked)
            if asked["oid"] not in self.objects:
                upload = {"href": f"{self.cdn}/{asked['oid']}?X-Amz-Signature=secret-signature"}
                row["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/cdn/verify"}}
            rows.append(row)
        return {"transfer": "basic", "objects": rows}

    def put(self, _: Any, at: dict[str, str], body: bytes, *__: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != at["oid"]:
            raise RefusedError(400, message="SHA-256 does not match")
        self.objects[at["oid"]] = body
        return {}

    def lfs_verify(self, _: Any, __: Any, body: bytes, *___: Any) -> Any:
        if json.loads(body)["oid"] not in self.objects:
            raise RefusedError(404, message="no such object")
        return {}

    def commit(self, user: dict[str, Any] | None, at: dict[str, str], body: bytes, *_: Any) -> Any:
        self._writer(user, at["repo"])
        repository, there = self.files_at(user, at)
        files, head = dict(there), repository.branches[at["revision"]]
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header" and value.get("parentCommit", head) != head:
                raise RefusedError(412, message="A commit has happened since. Please refresh and try again.")
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.objects and not self._from_xet(value["oid"], value["size"]):
                    raise RefusedError(400, message=f"LFS pointer of {value['path']} points to nothing")
                files[value["path"]] = Blob(self.objects[value["oid"]], lfs=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, at["revision"])
        return {"commitUrl": f"{self.url}/{at['repo']}/commit/{oid}", "commitOid": oid, "success": True}

    def xet_token(self, user: dict[str, Any] | None, at: dict[str, str], *_: Any) -> Any:
        if self.xet is None:
            raise RefusedError(404, message="no Xet here")
        self.files_at(user, at)
        return {"casUrl": f"local://{self.xet}", "accessToken": "short-lived", "exp": int(time.time()) + 3600}

    def _from_xet(self, oid: str, size: int) -> bool:
        """Take a file that was uploaded to the Xet store over to the objects."""
        if self.xet is None or oid not in self.xet_hashes:
            return False
        path = self.xet / oid
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{self.xet}") as group:
            group.start_download_file(hf_xet.XetFileInfo(self.xet_hashes[oid], size), str(path))
        self.objects[oid] = path.read_bytes()
        return hashlib.sha256(self.objects[oid]).hexdigest() == oid

    def collection(self, user: dict[str, Any] | None, _: Any, body: bytes, *__: Any) -> Any:
        asked = json.loads(body)
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-{'0' * 24}"
        self._writer(user, slug)
        if slug in self.collections:
            raise RefusedError(409, message=json.dumps({"slug": slug}))
        self.collections[slug] = {
            "slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}, "items": [], "position": 0,
            "lastUpdated": "2026-11-23T00:00:00.000Z", "private": asked["private"], "theme": "blue", "upvotes": 0,
        }  # fmt: skip
        return self.collections[slug]

    def collection_held(self, _: Any, at: dict[str, str], *__: Any) -> Any:
        return self.collections[at["slug"]]

    def collection_item(self, user: dict[str, Any] | None, at: dict[str, str], body: bytes, *_: Any) -> Any:
        self._writer(user, at["slug"])
        items, asked = self.collections[at["slug"]]["items"], json.loads(body)["item"]
        if asked["id"] not in [item["id"] for item in items]:
            items.append({"_id": str(len(items)), **asked, "position": len(items)})
        return self.collections[at["slug"]]

    def _writer(self, user: dict[str, Any] | None, name: str) -> None:
        if user is None:
            raise RefusedError(401, message="Invalid username or password.")
        if name.partition("/")[0] not in {user["name"], *(org["name"] for org in user.get("orgs", ()))}:
            raise RefusedError(403, message="You don't have the rights to create a model under this namespace")
        if user["auth"]["accessToken"]["role"] == "read":
            raise RefusedError(403, message="This token is read-only")

    def files_at(self, user: dict[str, Any] | None, at: dict[str, str]) -> tuple[Repository, dict[str, Blob]]:
        repository = self.repositories.get(at["repo"])
        if repository is None or (repository.private and user is None):
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        revision = at.get("revision") or "main"
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, repository.commits[commit]

    def _describe(self, repo: str, commit: str = "") -> dict[str, Any]:
        repository = self.repositories[repo]
        commit = commit or repository.branches["main"]
        files = repository.commits[commit]
        front: dict[str, Any] = {}
        if "README.md" in files and files["README.md"].content.startswith(b"---"):
            front = yaml.safe_load(files["README.md"].content.split(b"---")[1]) or {}
        return {
            "_id": repo, "id": repo, "modelId": repo, "sha": commit,
            "private": repository.private, "gated": repository.gated, "tags": list(front.get("tags", [])),
            "cardData": front, "siblings": [{"rfilename": path} for path in sorted(files)],
            "usedStorage": sum(len(blob.content) for blob in files.values()),
        }  # fmt: skip


@contextlib.contextmanager
def loopback_hub(tokens: dict[str, dict[str, Any]]) -> Iterator[LoopbackHub]:
    """A Hub that is closed at the end."""
    hub = LoopbackHub(tokens)
    try:
        yield hub
    finally:
        hub.close()
