"""A Hub on localhost: the part of huggingface.co's HTTP interface that huggingface_hub uses to create, push, list and
download model repositories, with private repositories, branches, pull requests and the errors of the real one.

Everything lies in memory. Blobs are addressed by SHA-256 (LFS) or git's SHA-1, as huggingface_hub expects for telling
an unchanged file. Knows nothing about models.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


class HubError(Exception):
    """An answer that is not 2xx; `code` is what the real Hub puts in ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        if code:
            self.headers["X-Error-Code"] = code


@dataclass
class Commit:
    """A whole tree: path -> oid of its blob."""

    files: dict[str, str]
    message: str
    parent: str | None


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N -> commit

    def commit(self, ref: str, files: dict[str, str], message: str) -> str:
        parent = self.refs.get(ref)
        sha = hashlib.sha1(json.dumps([files, message, parent, len(self.commits)]).encode()).hexdigest()
        self.commits[sha] = Commit(files, message, parent)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LocalHub:
    """The state behind the server.

    Attributes:
        url: to be set as ``HF_ENDPOINT``.
        tokens: token -> user name. Without a token one may read what is public.
        requests: (method, path) of everything that was asked, in order.
        cut_after: path in a repository -> bytes after which the next download of it is cut off, once.
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_after: dict[str, int] = {}
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def start(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def file(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """What a repository holds, for assertions."""
        repo = self.repos[repo_id]
        return self.blobs[repo.commits[repo.resolve(revision)].files[path]]

    def paths(self, repo_id: str, revision: str = "main") -> list[str]:
        repo = self.repos[repo_id]
        return sorted(repo.commits[repo.resolve(revision)].files)

    # One method per request of the interface; each returns a JSON value or bytes.

    def whoami(self, user: str | None) -> dict:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, user: str | None, body: dict) -> dict:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = body.get("organization") or user
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner}")
        repo_id = f"{owner}/{body['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", headers={"X-Answer": json.dumps(answer)})
        visibility = body.get("visibility")
        repo = self.repos[repo_id] = Repo(bool(body.get("private")) or visibility == "private")
        repo.commit("main", {}, "initial commit")
        return answer

    def readable(self, user: str | None, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            # the real one does not tell a stranger whether a private repository exists
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, user: str | None, repo_id: str) -> Repo:
        repo = self.readable(user, repo_id)
        if user != repo_id.split("/")[0]:
            raise HubError(403, "Authorization error: you are not allowed to write to this repo")
        return repo

    def preupload(self, repo: Repo, revision: str, body: dict) -> dict:
        files = repo.commits[repo.resolve(revision)].files
        return {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": files.get(f["path"]),
                }
                for f in body["files"]
            ]
        }

    def lfs_batch(self, body: dict) -> dict:
        objects = []
        for wanted in body["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.blobs:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, content: bytes) -> bytes:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "content does not match its SHA-256")
        self.blobs[oid] = content
        return b""

    def commit(self, repo_id: str, repo: Repo, revision: str, lines: list[dict], create_pr: bool) -> dict:
        header = next(line["value"] for line in lines if line["key"] == "header")
        base = repo.resolve(revision)
        if header.get("parentCommit") not in (None, base):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[base].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = git_oid(content)
                self.blobs[files[value["path"]]] = content
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise HubError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        pr_url = None
        ref = revision
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref, pr_url = f"refs/pr/{number}", f"{self.url}/{repo_id}/discussions/{number}"
            repo.refs[ref] = base
        sha = repo.commit(ref, files, header["summary"])
        return {
            "success": True,
            "commitUrl": f"{self.url}/{repo_id}/commit/{sha}",
            "commitOid": sha,
            "hookOutput": "",
            "pullRequestUrl": pr_url,
        }

    def branch(self, repo: Repo, name: str, body: dict) -> bytes:
        if name in repo.refs:
            raise HubError(409, f"Reference already exists: {name}")
        repo.refs[name] = repo.resolve(body.get("startingPoint") or "main")
        return b""

    def info(self, repo_id: str, repo: Repo, revision: str) -> dict:
        sha = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha].files)]
        return {
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> list[dict]:
        files = repo.commits[repo.resolve(revision)].files
        prefix = folder + "/" if folder else ""
        inside = {path: oid for path, oid in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries, folders = [], set()
        for path, oid in sorted(inside.items()):
            parts = path[len(prefix) :].split("/")
            folders |= {
                prefix + "/".join(parts[:n]) for n in range(1, len(parts) if recursive else min(2, len(parts)))
            }
            if recursive or len(parts) == 1:
                entry = {"type": "file", "oid": oid, "size": len(self.blobs[oid]), "path": path}
                if len(oid) == 64:
                    entry["lfs"] = {"oid": oid, "size": entry["size"], "pointerSize": 134}
                entries.append(entry)
        return entries + [{"type": "directory", "oid": git_oid(f.encode()), "size": 0, "path": f} for f in folders]


class _Handler(BaseHTTPRequestHandler):
    """HTTP to the methods of [`LocalHub`]."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        (
            "GET",
            r"/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>refs%2Fpr%2F\d+|[^/]+)(?:/(?P<path>.*))?",
            "tree",
        ),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/(?:datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def _user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not token:
            return None
        if scheme != "Bearer" or token not in self.hub.tokens:
            raise HubError(
                401,
                "Invalid credentials in Authorization header",
                headers={"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        return self.hub.tokens[token]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        body = self._body()
        self.hub.requests.append((self.command, parts.path))
        try:
            method = "GET" if self.command == "HEAD" else self.command
            for verb, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if verb == method and match:
                    arguments = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    with self.hub.lock:
                        answer = getattr(self, "do_" + name)(parse_qs(parts.query), body, **arguments)
                    break
            else:
                raise HubError(404, f"No such endpoint: {self.command} {parts.path}")
            if answer is not None:
                self._send(200, answer)
        except HubError as error:
            headers = {"X-Error-Message": error.message} | error.headers
            answer = json.loads(headers.pop("X-Answer", "{}")) | {"error": error.message}
            self._send(error.status, answer, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not isinstance(answer, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_whoami(self, query, body):
        return self.hub.whoami(self._user())

    def do_create(self, query, body):
        return self.hub.create(self._user(), json.loads(body))

    def do_delete(self, query, body):
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or self._user()}/{wanted['name']}"
        self.hub.writable(self._user(), repo_id)
        del self.hub.repos[repo_id]
        return b""

    def do_validate(self, query, body):
        return {"errors": [], "warnings": []}

    def do_preupload(self, query, body, repo_id, revision):
        reading = "create_pr" in query
        repo = (self.hub.readable if reading else self.hub.writable)(self._user(), repo_id)
        return self.hub.preupload(repo, revision, json.loads(body))

    def do_commit(self, query, body, repo_id, revision):
        create_pr = "create_pr" in query
        repo = (self.hub.readable if create_pr else self.hub.writable)(self._user(), repo_id)
        lines = [json.loads(line) for line in body.splitlines()]
        return self.hub.commit(repo_id, repo, revision, lines, create_pr)

    def do_branch(self, query, body, repo_id, revision):
        return self.hub.branch(self.hub.writable(self._user(), repo_id), revision, json.loads(body or b"{}"))

    def do_lfs_batch(self, query, body, repo_id):
        self.hub.readable(self._user(), repo_id)
        return self.hub.lfs_batch(json.loads(body))

    def do_lfs_put(self, query, body, oid):
        return self.hub.lfs_put(oid, body)

    def do_info(self, query, body, repo_id, revision="main"):
        return self.hub.info(repo_id, self.hub.readable(self._user(), repo_id), revision)

    def do_tree(self, query, body, repo_id, revision, path=""):
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        return self.hub.tree(self.hub.readable(self._user(), repo_id), revision, path, recursive)

    def do_resolve(self, query, body, repo_id, revision, path):
        repo = self.hub.readable(self._user(), repo_id)
        sha = repo.resolve(revision)
        oid = repo.commits[sha].files.get(path)
        headers = {"X-Repo-Commit": sha}
        if oid is None:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", headers)
        content = self.hub.blobs[oid]
        headers |= {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if len(oid) == 64:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        if self.command == "HEAD":
            self._send(200, content, headers)
            return
        status, requested = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested:
            status, first = 206, int(requested[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
        cut = self.hub.cut_after.pop(path, None)
        if cut is None:
            self._send(status, content, headers)
            return
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:cut])
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args) -> None:
        """Quiet."""
