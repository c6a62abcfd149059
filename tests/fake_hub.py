# SPDX-License-Identifier: Apache-2.0
"""
A Hub on loopback: HTTP requests of the real `huggingface_hub` client in, repositories on disk out.

It speaks what huggingface_hub 2.4 asks when it creates, uploads, lists and downloads repositories of small files. The
client reads `HF_ENDPOINT` when it is imported: use it in a process that was started with `FakeHub.environment()`.

    root/<owner>/<name>/refs.json            branch -> commit id
    root/<owner>/<name>/commits/<id>.json    parent, summary, description, files: {path: {"oid", "size"}}
    root/blobs/<oid>                         content, by git's id
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"


class FakeHub:
    """Serve repositories from a folder, `root`; a context manager."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.Lock()
        self.collections: dict[str, list[dict]] = {}
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Name what a client process needs: this Hub, its token, a cache of its own, no proxy in between."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # uploads through xet open a pull request by another address
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    # Repositories, as the handler and the tests see them.

    def refs(self, repo: str) -> dict[str, str] | None:
        path = self.root / repo / "refs.json"
        return json.loads(path.read_text()) if path.exists() else None

    def commit(self, repo: str, revision: str = "main") -> tuple[str, dict] | None:
        refs = self.refs(repo) or {}
        path = self.root / repo / "commits" / f"{refs.get(revision, revision)}.json"
        return (path.stem, json.loads(path.read_text())) if path.exists() else None

    def files(self, repo: str, revision: str = "main") -> list[str]:
        return sorted(self.commit(repo, revision)[1]["files"])

    def history(self, repo: str, revision: str = "main") -> list[str]:
        """Titles of the commits that changed files, newest first."""
        titles = []
        while revision and (found := self.commit(repo, revision)):
            revision = found[1]["parent"]
            titles += [found[1]["summary"]] if revision else []  # the root commit is the empty repository
        return titles

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        return (self.root / "blobs" / self.commit(repo, revision)[1]["files"][path]["oid"]).read_bytes()

    def create(self, repo: str) -> bool:
        if self.refs(repo) is not None:
            return False
        (self.root / repo / "commits").mkdir(parents=True)
        self.store_commit(repo, "main", {"parent": None, "summary": "initial commit", "description": "", "files": {}})
        return True

    def store_commit(self, repo: str, branch: str, commit: dict) -> str:
        sha = hashlib.sha1(json.dumps([repo, commit], sort_keys=True).encode()).hexdigest()
        (self.root / repo / "commits" / f"{sha}.json").write_text(json.dumps(commit, indent=1))
        (self.root / repo / "refs.json").write_text(json.dumps({**(self.refs(repo) or {}), branch: sha}))
        return sha

    def store_blob(self, content: bytes) -> dict:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.root / "blobs" / oid).write_bytes(content)
        return {"oid": oid, "size": len(content)}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    ROUTES = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/collections", "collect"),
        ("POST", r"/api/collections/(?P<slug>.+)/items", "collect"),
        ("GET", r"/api/collections/(?P<slug>.+)", "collect"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models", "list_models"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            for method, pattern, action in self.ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    groups = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    writes = method == "POST" and action != "validate"
                    if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        return self._error(401, "RepoNotFound", "Invalid credentials")
                    if action in ("create", "validate", "list_models", "collect"):
                        return getattr(self, action)(**groups)
                    return self._in_repo(action, **groups)
        self._error(404, "EntryNotFound", f"no such address: {self.command} {url.path}")

    do_POST = do_HEAD = do_GET

    def _in_repo(self, action: str, repo: str, revision: str = "main", **groups: str) -> None:
        """Answer for one revision of one repository, or say which of the two is missing."""
        if self.hub.refs(repo) is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if action == "branch":
            return self.branch(repo, revision)
        if (found := self.hub.commit(repo, revision)) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        getattr(self, action)(repo, revision, *found, **groups)

    # Writing.

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        created = self.hub.create(repo)
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo}, status=200 if created else 409)

    def collect(self, slug: str = "") -> None:
        """Make a collection, or add an item to one; return it, with 409 if it or the item is there."""
        asked, kept = json.loads(self.body or "{}"), self.hub.collections
        slug = slug or f"{asked['namespace']}/{asked['title'].lower()}"
        exists = slug in kept if "title" in asked else asked.get("item") in kept[slug]
        if "title" in asked:
            kept.setdefault(slug, [])
        elif asked and not exists:
            kept[slug].append(asked["item"])
        items = [{"_id": str(i), "position": i, **item} for i, item in enumerate(kept[slug])]
        facts = {"title": slug, "owner": {"name": "me"}, "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0}
        facts |= {"private": False, "theme": "green", "upvotes": 0}
        self._json({"slug": slug, "items": items, **facts}, status=409 if exists else 200)

    def validate(self) -> None:
        broken = not json.loads(self.body)["content"].startswith("---\n")
        self._json({"errors": [{"message": "no metadata"}] if broken else [], "warnings": []})

    def branch(self, repo: str, revision: str) -> None:
        refs = self.hub.refs(repo)
        if revision in refs:
            return self._json({"error": "Reference already exists"}, status=409)
        (self.hub.root / repo / "refs.json").write_text(json.dumps({**refs, revision: refs["main"]}))
        self._json({})

    def preupload(self, repo: str, revision: str, sha: str, commit: dict) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": commit["files"].get(file["path"], {}).get("oid"),
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def commit(self, repo: str, revision: str, sha: str, commit: dict) -> None:
        files, header = dict(commit["files"]), {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                header = entry["value"]
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
            else:
                content = base64.b64decode(entry["value"]["content"])
                files[entry["value"]["path"]] = self.hub.store_blob(content)
        is_pr = "create_pr" in self.query
        branch = f"refs/pr/{sum(ref.startswith('refs/pr/') for ref in self.hub.refs(repo)) + 1}" if is_pr else revision
        new = {"parent": sha, "summary": header["summary"], "description": header["description"], "files": files}
        oid = self.hub.store_commit(repo, branch, new)
        reply = {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "success": True}
        pr = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{branch.split('/')[-1]}"} if is_pr else {}
        self._json({**reply, **pr})

    # Reading.

    def list_models(self) -> None:
        """The repositories whose card has all of the tags that are looked for."""
        wanted, models = set(self.query.get("filter", [])), []
        for path in sorted(self.hub.root.glob("*/*/refs.json")):
            repo = "/".join(path.parts[-3:-1])
            card = self.hub.read(repo, "README.md").decode() if "README.md" in self.hub.files(repo) else ""
            tags = re.findall(r"^- (\S+)$", card.split("\n---\n")[0], re.MULTILINE)
            if wanted <= set(tags):
                models.append({"_id": repo, "id": repo, "modelId": repo, "downloads": 0, "likes": 0, "tags": tags})
        self._json(models)

    def info(self, repo: str, revision: str, sha: str, commit: dict) -> None:
        siblings = [{"rfilename": path, "size": f["size"], "blobId": f["oid"]} for path, f in commit["files"].items()]
        self._json({"_id": repo, "id": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, sha: str, commit: dict, path: str = "") -> None:
        files = sorted(commit["files"].items())
        self._json([{"type": "file", "path": name, **file} for name, file in files if f"{name}/".startswith(path)])

    def resolve(self, repo: str, revision: str, sha: str, commit: dict, path: str) -> None:
        if (file := commit["files"].get(path)) is None:
            return self._error(404, "EntryNotFound", f"{path} does not exist")
        content = (self.hub.root / "blobs" / file["oid"]).read_bytes()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file["oid"]}"'}
        self._send(200, content, "application/octet-stream", headers)

    # Bytes.

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def use(environment: dict[str, str]) -> None:
    """Set the environment of a fresh client process, before it imports huggingface_hub."""
    os.environ.update(environment)
