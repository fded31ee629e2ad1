"""A loopback server that speaks the Hub's API, for pushing to it and loading from it.

Paths and answers are those that huggingface_hub asks for and reads (hf_api.py, _commit_api.py,
lfs.py, file_download.py). Every answer repeats the token that came with the request, in a warning
and, where it is an error, in its message: a client that passes on what it hears is caught.
"""

import hashlib
import json
import os
import re
import socket
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

TOKEN = "hf_" + "secretOfTheTests" * 2
READER = "hf_" + "mayOnlyReadThese" * 2
SIGNATURE = "signatureOfAnUploadsAddress"


@dataclass
class Repository:
    """One repository: a list of commits, each all of its files."""

    private: bool
    commits: list = field(default_factory=list)

    def commit(self, message, files):
        kept = self.commits[-1]["files"] if self.commits else {}
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append({"sha": sha, "message": message, "files": {**kept, **files}})

    @property
    def files(self):
        return self.commits[-1]["files"]

    @property
    def sha(self):
        return self.commits[-1]["sha"]


class HubServer(ThreadingHTTPServer):
    """Serves in threads from ``start`` to ``stop``; ``endpoint`` is its address."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.reset()

    def reset(self):
        self.repositories, self.lfs, self.requests, self.faults = {}, {}, [], []
        self.xet, self.xorbs = False, []
        self.hanging, self.released = threading.Event(), threading.Event()

    def start(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self):
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is what some tests are about."""

    def fail(self, method, pattern, answers):
        """Let requests that match meet faults, one after the other.

        A fault is a status; ``close``: the connection ends amid the body; ``hang``: nothing is
        answered until ``stop``; ``lose``: it is done, but the answer is lost; a dictionary: an
        answer of status 200.
        """
        self.faults.append((method, re.compile(pattern), iter(answers)))

    def fault(self, method, path):
        for wanted, pattern, answers in self.faults:
            if method == wanted and pattern.search(path):
                return next(answers, None)
        return None

    def create(self, name, private=False, files=None):
        repository = self.repositories[name] = Repository(private)
        repository.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        if files:
            repository.commit("files", files)
        return repository

    def asked(self, method, pattern):
        """How many such requests came."""
        return sum(
            m == method and re.search(pattern, path) is not None for m, path in self.requests
        )


class Refusal(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: no waiting for acknowledgements
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/[^/]+", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "upload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify", "verify"),
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/main", "xet_token"),
        ("POST", r"/v1/xorbs/[^/]+/[0-9a-f]{64}", "xorb"),
        ("POST", r"/v1/shards", "shard"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", "commit"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *_):
        pass

    def _handle(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.requests.append((self.command, url.path))
        fault = self.server.fault(self.command, url.path)
        if fault == "hang":
            self.server.hanging.set()
            self.server.released.wait()
        if fault in ("hang", "close"):
            if self.command in ("POST", "PUT"):
                self.rfile.read1(1000)
            return self._drop()
        self.body = self._read()
        if isinstance(fault, int):
            return self._answer(fault, {"error": "a fault of the test's"})
        if isinstance(fault, dict):
            return self._answer(200, fault)
        try:
            if self.token not in ("", TOKEN, READER, "xet"):
                raise Refusal(401, "Invalid credentials in Authorization header")
            status, answer, headers = 404, {"error": "no such path"}, {}
            for method, pattern, name in self.ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    status, answer, headers = getattr(self, name)(*match.groups())
                    break
        except Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            status, answer, headers = refusal.status, {"error": str(refusal)}, code
        if fault == "lose":
            return self._drop()
        return self._answer(status, answer, headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status, answer, headers=None):
        if isinstance(answer, dict) and "error" in answer:
            answer["error"] += f" (the token was {self.token})"
            headers = {"X-Error-Message": answer["error"], **(headers or {})}
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("X-HF-Warning", f"auth{len(self.server.requests)}; you sent {self.token}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self):
        return json.loads(self.body)

    def _user(self):
        if not self.token:
            raise Refusal(401, "Invalid username or password.")
        return "ann" if self.token == TOKEN else "bob"

    def _reach(self, name, write=False):
        """The repository, where this token may see it or write to it."""
        repository = self.server.repositories.get(name)
        mine = self.token == TOKEN and name.startswith("ann/")
        if repository is None or (repository.private and not mine):
            raise Refusal(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if write and not mine:
            raise Refusal(403, f"You don't have write access to {name}")
        return repository

    def whoami(self):
        role = "read" if self.token == READER else "write"
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        user = {"type": "user", "name": self._user(), "orgs": [{"name": f"{self._user()}-lab"}]}
        return 200, {**user, "auth": auth}, {}

    def create(self):
        request = self._json()
        user = self._user()
        owner = request.get("organization") or user
        name = f"{owner}/{request['name']}"
        if owner != user or self.token == READER:
            raise Refusal(403, f"You don't have the rights to create a model under {owner}")
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repositories:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        private = request.get("visibility") == "private" or request.get("private") is True
        self.server.create(name, private)
        return 200, {"url": url, "name": name}, {}

    def validate(self):
        """What the Hub asks of a card's metadata, as far as a card of ours could get it wrong."""
        content = self._json()["content"]
        metadata = yaml.safe_load(content.split("---\n")[1])
        errors = []
        for key in ("base_model", "datasets"):
            names = metadata.get(key, [])
            for name in [names] if isinstance(names, str) else names:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                    errors.append({"message": f'"{key}" must be a repository, not {name}'})
        if not re.fullmatch(r"[a-z0-9.-]+", metadata.get("license", "mit")):
            errors.append({"message": '"license" must be one of …'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def info(self, name):
        repository = self._reach(name)
        siblings = [{"rfilename": path} for path in repository.files]
        answer = {"id": name, "modelId": name, "sha": repository.sha, "siblings": siblings}
        return 200, {**answer, "private": repository.private, "tags": [], "downloads": 0}, {}

    def tree(self, name):
        files = self._reach(name).files.items()
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
            for path, data in files
        ]
        return 200, entries, {}

    def preupload(self, name):
        stored = self._reach(name, write=True).files
        files = []
        for file in self._json()["files"]:
            large = file["path"].endswith((".safetensors", ".png"))
            data = stored.get(file["path"])
            oid = None if data is None else (_sha256 if large else _git_oid)(data)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            files[-1]["oid"] = oid
        return 200, {"files": files}, {}

    def batch(self, name):
        self._reach(name, write=True)
        objects = []
        for wanted in self._json()["objects"]:
            oid, answer = wanted["oid"], dict(wanted)
            if oid not in self.server.lfs:
                upload = {"href": f"{self.server.endpoint}/lfs/{oid}?X-Signature={SIGNATURE}"}
                verify = {"href": f"{self.server.endpoint}/{name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, oid):
        if self.query.get("X-Signature") != [SIGNATURE] or _sha256(self.body) != oid:
            raise Refusal(403, "SignatureDoesNotMatch")
        self.server.lfs[oid] = self.body
        return 200, {}, {}

    def verify(self, name):
        self._reach(name, write=True)
        request = self._json()
        if len(self.server.lfs.get(request["oid"], b"")) != request["size"]:
            raise Refusal(404, "Object does not exist")
        return 200, {}, {}

    def xet_token(self, name):
        self._reach(name, write=True)
        if not self.server.xet:
            raise Refusal(404, "no xet here")
        return 200, {"casUrl": self.server.endpoint, "accessToken": "xet", "exp": 1 << 40}, {}

    def xorb(self):
        """Chunks of files, compressed in xet's own way: kept, but not read."""
        if self.token != "xet":
            raise Refusal(401, "not xet's token")
        self.server.xorbs.append(self.body)
        return 200, {"was_inserted": True}, {}

    def shard(self):
        """Which chunks make a file."""
        return 200, {"result": 1}, {}

    def commit(self, name):
        repository = self._reach(name, write=True)
        message, files = None, {}
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.server.lfs:
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif key == "lfsFile" and self.server.xorbs:
                files[value["path"]] = value["oid"].encode()
            else:
                raise Refusal(422, f"cannot commit {key} {value['path']}")
        repository.commit(message, files)
        url = f"{self.server.endpoint}/{name}/commit/{repository.sha}"
        return 200, {"success": True, "commitOid": repository.sha, "commitUrl": url}, {}

    def resolve(self, name, revision, path):
        repository = self._reach(name)
        commits = [c for c in repository.commits if revision in ("main", c["sha"])]
        if not commits:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        headers = {"X-Repo-Commit": commits[-1]["sha"]}
        data = commits[-1]["files"].get(path)
        if data is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers}
        return 200, data, {**headers, "ETag": f'"{_sha256(data)}"'}


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _git_oid(data):
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()


def hub_environment(server, home, **others):
    """The environment of a process whose Hub the server is."""
    ours = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
    ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **others}
    return {**os.environ, **ours, "HF_HUB_OFFLINE": "0"}
