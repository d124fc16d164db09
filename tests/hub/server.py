"""A small Hugging Face Hub on localhost: what `huggingface_hub` asks for to push and to pull, over real HTTP.

Everything is kept in memory. Like the Hub it believes nothing: an LFS object is hashed when it arrives, a
commit that names an absent object or a stale parent is refused, and card metadata are validated. Every
request is recorded in `Hub.calls`, and `Hub.fail` makes chosen requests go wrong.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

USERS = {"hf_test": "tester", "hf_other": "stranger"}
LFS_SUFFIXES = (".bin", ".onnx", ".pt", ".safetensors")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
DATE = "2026-01-01T00:00:00.000Z"
REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class HubError(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.body = {"error": message, **body}


class Reply(NamedTuple):
    body: Any = None  # bytes as they are, anything else as JSON
    headers: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    status: int = 200


class Blob(NamedTuple):
    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


class Commit(NamedTuple):
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool
    heads: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> Commit:
        parent = self.heads.get(branch)
        sha = hashlib.sha1(repr((self.id, branch, parent, title, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.heads[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit:
        sha = self.heads.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def log(self, revision: str = "main") -> list[Commit]:
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    @property
    def files(self) -> dict[str, Blob]:
        return self.at("main").files


class Call(NamedTuple):
    method: str
    path: str
    status: int  # 0 where the connection was cut


@dataclass
class Fault:
    method: str
    pattern: str
    action: int | str  # an HTTP status, "drop" (cut the connection half-way), "corrupt" (flip a bit)
    times: int


class Request(NamedTuple):
    url: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Register a method of `Hub`; `{repo}` and `{rev}` stand for a repository id and a quoted revision."""
    regex = pattern.replace("{repo}", r"(?P<repo>[^/]+/[^/]+?)").replace("{rev}", r"(?P<rev>[^/]+)")

    def register(function: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((method, re.compile(regex), function))
        return function

    return register


class Hub:
    """The state of the Hub, and one method for each endpoint."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.crashes: list[str] = []
        self.part_size: int | None = None  # larger LFS objects are asked for in parts
        self.gitignored: set[str] = set()

    def fail(self, method: str, pattern: str, action: int | str, times: int = 1) -> None:
        self.faults.append(Fault(method, pattern, action, times))

    def fault(self, method: str, path: str) -> int | str | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.pattern, path):
                fault.times -= 1
                return fault.action
        return None

    def count(self, method: str, pattern: str) -> int:
        return sum(call.method == method and bool(re.search(pattern, call.path)) for call in self.calls)

    def add(self, repo_id: str, files: dict[str, Blob], private: bool = False) -> Repo:
        """Put a repository there without a push."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", {".gitattributes": Blob(GIT_ATTRIBUTES), **files}, "initial commit")
        return repo

    # ---- who may do what

    def readable(self, request: Request, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and request.user != owner):
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, repo_id: str) -> Repo:
        repo = self.readable(request, repo_id)
        self.require_owner(request, repo_id.split("/")[0])
        return repo

    def require_owner(self, request: Request, owner: str) -> None:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if request.user != owner:
            raise HubError(403, f"You don't have the rights to write under the namespace {owner!r}")

    # ---- repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Reply:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"accessToken": {"displayName": "test", "role": "write"}}
        return Reply({"type": "user", "name": request.user, "orgs": [], "auth": auth})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Reply:
        asked = request.json
        owner = asked.get("organization") or request.user
        self.require_owner(request, owner)
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.add(repo_id, {}, private=asked.get("visibility") == "private")
        return Reply({"url": url, "name": repo_id})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request) -> Reply:
        asked = request.json
        repo_id = f"{asked.get('organization') or request.user}/{asked['name']}"
        self.writable(request, repo_id)
        del self.repos[repo_id]
        return Reply({})

    @route("POST", "/api/models/{repo}/(?P<ref>branch|tag)/{rev}")
    def create_ref(self, request: Request, repo: str, ref: str, rev: str) -> Reply:
        stored = self.writable(request, repo)
        name = request.json["tag"] if ref == "tag" else rev
        if name in stored.heads:
            raise HubError(409, f"Reference already exists: {name}")
        start = rev if ref == "tag" else request.json.get("startingPoint", "main")
        stored.heads[name] = stored.at(start).sha
        return Reply({})

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, request: Request, repo: str) -> Reply:
        heads = self.readable(request, repo).heads
        refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in heads.items()]
        return Reply({"branches": refs, "tags": [], "converts": []})

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def commits(self, request: Request, repo: str, rev: str) -> Reply:
        common = {"message": "", "authors": [], "date": DATE}
        log = self.readable(request, repo).log(rev)
        return Reply([{"id": commit.sha, "title": commit.title, **common} for commit in log])

    # ---- reading

    @route("GET", "/api/models/{repo}(/revision/{rev})?")
    def model_info(self, request: Request, repo: str, rev: str | None) -> Reply:
        stored = self.readable(request, repo)
        commit = stored.at(rev or "main")
        readme = commit.files.get("README.md", Blob(b""))
        card = metadata(readme.data.decode())
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in request.query:
            described = (entry(path, blob) for path, blob in commit.files.items())
            siblings = [{"rfilename": e["path"], "blobId": e["oid"], **e} for e in described]
        info = {"id": repo, "modelId": repo, "sha": commit.sha, "private": stored.private}
        info |= {key: card.get(key) for key in ("library_name", "pipeline_tag")}
        info |= {"cardData": card, "tags": card.get("tags") or [], "siblings": siblings}
        return Reply(info | {"createdAt": DATE, "lastModified": DATE, "downloads": 0, "likes": 0})

    @route("GET", "/api/models/{repo}/tree/{rev}(/(?P<folder>.*))?")
    def tree(self, request: Request, repo: str, rev: str, folder: str | None) -> Reply:
        files = self.readable(request, repo).at(rev).files
        prefix = f"{folder}/" if folder else ""
        return Reply([entry(path, blob) for path, blob in files.items() if path.startswith(prefix)])

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def paths_info(self, request: Request, repo: str, rev: str) -> Reply:
        files = self.readable(request, repo).at(rev).files
        asked = parse_qs(request.body.decode()).get("paths", [])
        return Reply([entry(path, files[path]) for path in asked if path in files])

    @route("GET", "/{repo}/resolve/{rev}/(?P<path>.+)")
    def resolve(self, request: Request, repo: str, rev: str, path: str) -> Reply:
        commit = self.readable(request, repo).at(rev)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Reply({"error": "Entry not found"}, headers, 404)
        blob = commit.files[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        return ranged(request, blob.data, headers)

    # ---- writing

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Reply:
        card = metadata(request.json["content"])
        errors = [{"message": message} for message in card_errors(card)]
        if errors:
            raise HubError(400, "Invalid metadata", errors=errors, warnings=[])
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return Reply({"errors": [], "warnings": warnings})

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, request: Request, repo: str, rev: str) -> Reply:
        files = self.writable(request, repo).at(rev).files
        return Reply({"files": [self.upload_mode(asked["path"], files) for asked in request.json["files"]]})

    def upload_mode(self, path: str, files: dict[str, Blob]) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        known = {"oid": files[path].etag} if path in files else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in self.gitignored, **known}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo: str) -> Reply:
        self.writable(request, repo)
        objects = [self.lfs_action(asked["oid"], asked["size"]) for asked in request.json["objects"]]
        return Reply({"transfer": "basic" if self.part_size is None else "multipart", "objects": objects})

    def lfs_action(self, oid: str, size: int) -> dict[str, Any]:
        if oid in self.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}"}
        if self.part_size is not None and size > self.part_size:
            parts = -(-size // self.part_size)
            upload["header"] = {f"{n:05}": f"{self.url}/lfs/{oid}/parts/{n}" for n in range(1, parts + 1)}
            upload["header"]["chunk_size"] = str(self.part_size)
        verify = {"href": f"{self.url}/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def put_object(self, request: Request, oid: str) -> Reply:
        return self.store(oid, request.body)

    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/parts/(?P<number>\d+)")
    def put_part(self, request: Request, oid: str, number: str) -> Reply:
        self.parts[oid, int(number)] = request.body
        return Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    @route("POST", "/lfs/(?P<oid>[0-9a-f]{64})")
    def complete_parts(self, request: Request, oid: str) -> Reply:
        numbers = [part["partNumber"] for part in request.json["parts"]]
        return self.store(oid, b"".join(self.parts.pop((oid, number)) for number in numbers))

    def store(self, oid: str, data: bytes) -> Reply:
        found = hashlib.sha256(data).hexdigest()
        if found != oid:
            raise HubError(400, f"The sha256 of the content is {found}, but {oid} was announced")
        self.objects[oid] = data
        return Reply({})

    @route("POST", "/verify")
    def verify(self, request: Request) -> Reply:
        asked = request.json
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, f"No object {asked['oid']} of {asked['size']} bytes")
        return Reply({})

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def create_commit(self, request: Request, repo: str, rev: str) -> Reply:
        stored = self.writable(request, repo)
        if rev not in stored.heads:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != stored.heads[rev]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(stored.at(rev).files)
        for operation in operations:
            self.apply(files, operation["key"], operation["value"])
        commit = stored.commit(rev, files, header["value"]["summary"])
        url = f"{self.url}/{repo}/commit/{commit.sha}"
        return Reply({"success": True, "commitOid": commit.sha, "commitUrl": url})

    def apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise HubError(400, f"The LFS object of {path} was never uploaded")
            files[path] = Blob(self.objects[value["oid"]], lfs=True)
        elif files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")


def entry(path: str, blob: Blob) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
    if blob.lfs:
        sizes = {"size": len(blob.data), "pointerSize": 134}
        described["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, **sizes}
    return described


def metadata(card: str) -> dict[str, Any]:
    block = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}


def card_errors(card: dict[str, Any]) -> Iterator[str]:
    bases = card.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not REPO_ID.fullmatch(base):
            yield f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
    for key in ("license", "pipeline_tag", "library_name"):
        if not isinstance(card.get(key, ""), str):
            yield f'"{key}" must be a string'
    for tag in card.get("tags") or []:
        if not isinstance(tag, str):
            yield f'"tags" must hold strings, not {tag!r}'


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Reply:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked is None:
        return Reply(data, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
    headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
    return Reply(data[first : last + 1], headers, 206)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def answer(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        url = urlsplit(self.path)
        fault = self.hub.fault(self.command, url.path)
        if fault == "drop":
            return self.drop(url.path)
        body = self.read_body()
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        try:
            if isinstance(fault, int):
                raise HubError(fault, "This was asked for by the test")
            reply = self.dispatch(method, url.path, body)
        except HubError as error:
            reply = self.refusal(error)
        except Exception as error:  # a fault of this server: the fixture fails the test that met it
            self.hub.crashes.append(f"{self.command} {self.path}: {error!r}")
            reply = Reply({"error": repr(error)}, status=500)
        self.send(reply)

    def dispatch(self, method: str, path: str, body: bytes) -> Reply:
        user = self.user()
        query = parse_qs(urlsplit(self.path).query)
        for wanted, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if wanted == method and match:
                named = {key: value and unquote(value) for key, value in match.groupdict().items()}
                with self.hub.lock:
                    return function(self.hub, Request(path, query, self.headers, body, user), **named)
        raise HubError(404, f"This server has no {method} {path}")

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def drop(self, path: str) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        self.hub.calls.append(Call(self.command, path, 0))
        self.close_connection = True

    def refusal(self, error: HubError) -> Reply:
        headers = {"X-Error-Message": str(error)}
        if error.code:
            headers["X-Error-Code"] = error.code
        return Reply(error.body, headers, error.status)

    def send(self, reply: Reply) -> None:
        self.hub.calls.append(Call(self.command, urlsplit(self.path).path, reply.status))
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value if value.isascii() else quote(value))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - the names http.server calls

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: what happened is in `Hub.calls`."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of some tests."""


@contextmanager
def serve(port: int) -> Iterator[Hub]:
    """Run a Hub on this port for as long as the context lasts."""
    hub = Hub(f"http://127.0.0.1:{port}")
    server = Server(("127.0.0.1", port), type("HubHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":  # a Hub to try things on by hand: HF_ENDPOINT=http://127.0.0.1:8123
    with serve(8123):
        while True:
            time.sleep(1)
