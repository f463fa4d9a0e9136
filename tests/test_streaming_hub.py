"""C4 from the hub, which here is a server on this machine: listing, downloading, and its going away."""

from __future__ import annotations

import http.server
import json
import threading
import time

import helpers
import pytest
from conftest import write_model
from huggingface_hub import constants
from streaming_helpers import VOCABULARY, made_up, write_shards

from peft_pretraining.data import shards as shards_module
from peft_pretraining.data.shards import find_hub_shards
from peft_pretraining.data.streaming import DocumentStream
from peft_pretraining.data.tokenizer import train_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as its client needs to list and download the files of one dataset."""

    def __init__(self, folder):
        self.folder, self.downloads, self.away = folder, [], False
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if hub.away:
            self.close_connection = True
        elif path == "/api/datasets/allenai/c4":
            self._json({"id": "allenai/c4", "sha": COMMIT})
        elif path == f"/api/datasets/allenai/c4/tree/{COMMIT}/en":
            files = [*sorted(hub.folder.iterdir())]
            entries = [{"type": "file", "path": f"en/{f.name}", "size": f.stat().st_size, "oid": f.name} for f in files]
            self._json([*entries, {"type": "directory", "path": "en/more", "oid": "d"}])
        elif path.startswith(f"/datasets/allenai/c4/resolve/{COMMIT}/en/"):
            content = (hub.folder / path.rsplit("/", 1)[1]).read_bytes()
            if self.command == "GET":
                hub.downloads.append(path.rsplit("/", 1)[1])
            headers = {"ETag": f'"{path[-40:]}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
            self._send(content if self.command == "GET" else b"", headers)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _json(self, value):
        content = json.dumps(value).encode()
        self._send(content, {"Content-Type": "application/json", "Content-Length": str(len(content))})

    def _send(self, content, headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def use_endpoint(monkeypatch, tmp_path, port):
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub(write_shards(tmp_path / "hub", train=(20,) * 8))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, tmp_path, server.server_address[1])
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", (0.01, 0.01))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_command(command, tmp_path):
    folder = tmp_path / "tokenizer"
    train_tokenizer(made_up(300), VOCABULARY, 1).save_pretrained(folder)
    model = write_model(tmp_path / "m.json", vocab_size=VOCABULARY)
    return lambda **changes: command(
        **{"dataset_path": None, "tokenizer": folder, "model_config": model, "max_length": 32, **changes}
    )


def test_the_shards_are_listed_and_each_is_downloaded_once(hub):
    problems = []
    shards = find_hub_shards(problems)
    assert not problems and [len(shards.train), len(shards.validation)] == [8, 2]
    assert {shard.revision for shard in shards.train} == {COMMIT}
    first = DocumentStream(shards.train, 3, size=16).take(0, 160)
    assert len({(document.shard, document.line) for document in first}) == 160
    DocumentStream(shards.train, 3, size=16).take(0, 160)
    assert set(hub.downloads) == {f"c4-train.{i:05d}-of-00008.json.gz" for i in range(8)}
    assert len(hub.downloads) == 8


def test_a_run_without_data_flags_streams_c4(hub, run_command, tmp_path):
    assert helpers.run(run_command()) == 0
    assert len(helpers.updates(tmp_path / "run")) == 20
    local = run_command(base_dir=hub.folder, save_dir=tmp_path / "local")
    assert helpers.run(local) == 0
    assert helpers.updates(tmp_path / "run") == helpers.updates(tmp_path / "local")


def test_a_hub_that_goes_away_ends_the_run_in_one_line_and_nothing_saved_is_lost(
    hub, run_command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("peft_pretraining.data.streaming.WINDOW", 16)
    flags = run_command(save_every=1)
    with helpers.before_update(2, lambda: setattr(hub, "away", True)):
        assert helpers.run(flags) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if " ERROR " in line]
    assert len(errors) == 1 and "allenai/c4/en/c4-train" in errors[0] and "download failed" in errors[0], errors
    hub.away = False
    assert helpers.run([*flags, *helpers.RESUME]) == 0
    reference = run_command(save_dir=tmp_path / "reference")
    assert helpers.run(reference) == 0
    helpers.assert_same_run(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize("how", ["closed port", "offline"])
def test_a_hub_that_cannot_be_reached_is_reported_at_once(run_command, tmp_path, monkeypatch, capsys, how):
    if how == "closed port":
        use_endpoint(monkeypatch, tmp_path, 9)
    began = time.monotonic()
    assert helpers.run(run_command()) == 2
    assert time.monotonic() - began < 15
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: no --dataset_path and no --base_dir, and allenai/c4 (en) on the hub")
    assert "cannot be reached" in errors[0]
    assert not (tmp_path / "run").exists()
