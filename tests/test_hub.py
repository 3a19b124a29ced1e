"""Checkpoints from the Hugging Face hub: from one on this machine, pinned, and without any."""

import http.server
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import huggingface_hub
import huggingface_hub.errors
import pytest

from sam2jax import convert
from sam2jax.convert import layouts
from sam2jax.io import hub
from sam2jax.loading import load
from sam2jax.testing import draw, small_config

SMALL = small_config(hidden_dim=64, mem_dim=64)
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
LOAD = """
import sys
import sam2jax
for source in sys.argv[1:]:
    try:
        print(float(sam2jax.load(source)[1]["no_obj_ptr"].mean()))
    except ValueError as error:
        print("error:", error)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Of each revision: a checkpoint whose `no_obj_ptr` tells which it is."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    shapes = layouts.expected_shapes(SMALL, "official")
    state = {key: draw(key, shape) for key, shape in shapes.items()}
    for number, revision in enumerate(COMMITS, 1):
        state["no_obj_ptr"] = state["no_obj_ptr"] * 0 + number
        convert.write(folder / f"{revision}.pt", layouts.to_params(state, "official"), SMALL)
        found[revision] = (folder / f"{revision}.pt").read_bytes()
    return found


class Served(NamedTuple):
    """A hub on this machine, and what it has been asked."""

    environment: dict[str, str]
    asked: list[str]
    server: http.server.ThreadingHTTPServer

    def load(self, *sources: str, **environment: str) -> list[str]:
        """What a new process says that loads these."""
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *sources],
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()


@pytest.fixture
def served(checkpoints: dict[str, bytes], tmp_path: pathlib.Path) -> Iterator[Served]:
    """Serves `me/sam2.1-my`, which has nothing but `sam2.1_my.pt`, in two revisions."""
    asked: list[str] = []
    revisions = {**{commit: name for name, commit in COMMITS.items()}, **{n: n for n in COMMITS}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            repository, _, rest = self.path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            if repository != "me/sam2.1-my":
                return self.refuse("RepoNotFound")
            if revision not in revisions:
                return self.refuse("RevisionNotFound")
            if name != "sam2.1_my.pt":
                return self.refuse("EntryNotFound", COMMITS[revisions[revision]])
            data = checkpoints[revisions[revision]]
            self.answer(200, COMMITS[revisions[revision]], len(data), ETag=f'"{hash(data)}"')
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def refuse(self, why: str, commit: str = "") -> None:
            self.answer(404, commit, 0, **{"X-Error-Code": why})

        def answer(self, code: int, commit: str, length: int, **headers: str) -> None:
            self.send_response(code)
            headers = {"X-Repo-Commit": commit, "Content-Length": str(length), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    yield Served(environment, asked, server)
    server.shutdown()
    server.server_close()


def test_revisions_are_pinned_and_served_from_the_cache(served: Served):
    model = "me/sam2.1-my"
    pinned = [f"{model}@v1", f"{model}@{COMMITS['v1']}"]
    told = served.load(model, *pinned, f"{model}@v9", "me/another")
    assert told[:3] == ["1.0", "2.0", "2.0"]
    assert "'me/sam2.1-my@v9' is no file or folder here, and cannot be downloaded" in told[3]
    assert "'me/another' is no file or folder here, and cannot be downloaded" in told[4]
    # What is there is asked for no more, whether the hub can be reached or not.
    served.asked.clear()
    assert served.load(model, *pinned) == told[:3] and served.asked == []
    served.server.shutdown()
    assert served.load(model, *pinned, HF_HUB_OFFLINE="1") == told[:3]
    (missing,) = served.load("me/another", HF_HUB_OFFLINE="1")
    assert "the Hugging Face hub cannot be reached" in missing


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("facebook/sam2.1-hiera-tiny", True),
        ("facebook/sam2.1-hiera-tiny@main", True),
        ("facebook/sam2.1-hiera-tiny@refs/pr/1", True),
        ("facebook/sam2.1-hiera-tiny@", False),
        ("sam2.1_hiera_nano", False),
        ("folder/model.pt", False),
        ("../folder/model", False),
        ("a/b/c", False),
    ],
)
def test_what_can_be_a_hub_id(source: str, expected: bool):
    assert hub.is_hub_id(source) is expected


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (
            huggingface_hub.errors.EntryNotFoundError("none"),
            "neither model.safetensors nor sam2.1_my.pt",
        ),
        (OSError("no route\nto host"), "cannot be downloaded .*: no route$"),
    ],
)
def test_a_hub_that_cannot_help(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=words):
        load("me/sam2.1-my")
