"""The loopback Hub's HTTP: requests to steps, faults, files with Range; what is answered is in server.py."""

from __future__ import annotations

import contextlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from tests.hub.server import LoopbackHub

# an HTTP status; "slow"; "cut" in the middle of a body; "reset" before an answer; "lost": done, but without an answer
Fault = int | str

ROUTES: dict[str, str] = {  # step -> METHOD path
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "models": r"GET /api/models",
    "tree": r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)",
    "preupload": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
    "commit": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)",
    "info": r"GET /api/models/(?P<repo>[^/]+/[^/]+?)(/revision/(?P<revision>[^/]+))?",
    "refs": r"GET /api/models/(?P<repo>[^/]+/[^/]+)/refs",
    "branch": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)",
    "unbranch": r"DELETE /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)",
    "xet-token": r"GET /api/models/(?P<repo>[^/]+/[^/]+)/xet-(read|write)-token/(?P<revision>[^/]+)",
    "batch": r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "resolve": r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
    "collection": r"POST /api/collections",
    "collection-held": r"GET /api/collections/(?P<slug>[^/]+/[^/]+)",
    "collection-item": r"POST /api/collections/(?P<slug>[^/]+/[^/]+)/items",
    "put": r"PUT /cdn/(?P<oid>[0-9a-f]{64})",
    "lfs-verify": r"POST /cdn/verify",
    "cdn": r"GET /cdn/(?P<oid>[0-9a-f]{64})",
}


class RefusedError(Exception):
    """An answer other than 200: status, X-Error-Code, message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message or code


def handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests from the state of ``hub``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Quiet."""

        def _serve(self) -> None:
            address = urlsplit(self.path)
            path = unquote(address.path)
            matches = {step: re.fullmatch(pattern, f"{self.command} {path}") for step, pattern in ROUTES.items()}
            step, at = next(((step, match.groupdict()) for step, match in matches.items() if match), ("", {}))
            hub.requests.append((step, self.path, {key.lower(): value for key, value in self.headers.items()}))
            if not step:
                return self._send(404, b'{"error": "no such route on the loopback Hub"}')
            fault = hub.fault_of(step, path)
            length = int(self.headers.get("Content-Length", 0))
            if fault == "reset" or (fault == "cut" and self.command != "GET"):
                self.rfile.read(length // 2)
                self.close_connection = True
                return self.connection.close()
            body = self._body(length)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            try:
                if isinstance(fault, int):
                    raise RefusedError(fault, message="injected")
                user = hub.tokens.get(token)
                if token and user is None:
                    raise RefusedError(401, message="Invalid credentials in Authorization header")
                if step in ("resolve", "cdn"):
                    return self._file(step, user, at, fault)
                answer = getattr(hub, step.replace("-", "_"))(user, at, body, parse_qs(address.query))
                self._send(200, json.dumps(answer).encode(), _xet_headers(answer) if step == "xet-token" else {}, fault)
            except RefusedError as refused:
                self._refuse(refused, fault)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

        def _body(self, length: int) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(length)
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _refuse(self, refused: RefusedError, fault: Fault | None) -> None:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            if refused.status == 429:
                headers["Retry-After"] = "7"
            body = refused.message if refused.message[:1] == "{" else json.dumps({"error": refused.message})
            self._send(refused.status, body.encode(), headers, fault)

        def _file(self, step: str, user: Any, at: dict[str, str], fault: Fault | None) -> None:
            if step == "cdn":
                if at["oid"] not in hub.objects:
                    raise RefusedError(404, message="no such object")
                return self._send_range(hub.objects[at["oid"]], {}, fault)
            repository, files = hub.files_at(user, at)
            if repository.gated and user is None:
                raise RefusedError(401, "GatedRepo", "Access to this model is restricted")
            commit = repository.branches.get(at["revision"], at["revision"])
            if at["path"] not in files:
                raise RefusedError(404, "EntryNotFound", "Entry not found")
            blob = files[at["path"]]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"'}
            if not blob.lfs:
                return self._send_range(blob.content, headers, fault)
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            self._send(302, b"", {**headers, "Location": f"{hub.cdn}/{blob.sha256}?X-Amz-Signature=secret-signature"})

        def _send_range(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked is None:
                return self._send(200, content, headers, fault)
            first = int(asked[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, content[first:], headers, fault)

        def _send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None
        ) -> None:
            if fault == "lost":  # done, but the answer does not arrive
                self.close_connection = True
                return self.connection.close()
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            half = len(body) // 2
            self.wfile.write(body[:half])
            if fault == "slow":
                self.wfile.flush()
                time.sleep(0.3)
            if fault == "cut":
                self.close_connection = True
                return self.connection.close()
            self.wfile.write(body[half:])

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError, ValueError):  # a client that went away; a connection cut by us
                super().handle()

    return Handler


def _xet_headers(answer: dict[str, Any]) -> dict[str, str]:
    """The token's answer once more, as hf_xet reads the body and huggingface_hub the headers."""
    names = {"X-Xet-Cas-Url": "casUrl", "X-Xet-Access-Token": "accessToken", "X-Xet-Token-Expiration": "exp"}
    return {name: str(answer[key]) for name, key in names.items()}
