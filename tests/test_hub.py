"""A hub that cannot be reached is found out in seconds, and then nobody waits for it again."""

import os
import socket
import threading
import time

import pytest

from peft_pretraining.data import hub


@pytest.fixture
def online(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_work_offline", lambda: os.environ.update(HF_HUB_OFFLINE="1"))
    yield
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def listener():
    """A port of this machine where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_nobody_there(online, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    assert not hub.work_offline_if_unreachable() and hub.is_offline()
    assert time.monotonic() - began < 5
    (line,) = caplog.messages
    assert line.startswith("the Hugging Face hub cannot be reached (") and "Connection refused" in line
    assert not hub.work_offline_if_unreachable() and len(caplog.messages) == 1  # asked once


def test_nobody_answers(online, listener, monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert not hub.work_offline_if_unreachable(patience=0.3)
    assert "cannot be reached" in caplog.messages[0]


def test_a_proxy_that_is_gone(online, monkeypatch, caplog):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    assert not hub.work_offline_if_unreachable(patience=2)
    assert "cannot be reached" in caplog.messages[0]


def test_any_answer_will_do(online, listener, monkeypatch, caplog):
    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert hub.work_offline_if_unreachable() and not hub.is_offline() and not caplog.messages
    thread.join()


def test_offline_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.urllib.request, "urlopen", None)
    assert not hub.work_offline_if_unreachable()
