"""Whether the hub can be reached is found out in seconds, whatever does not answer."""
import os
import socket
import threading
import time

from runtime import hub


def test_a_name_server_that_does_not_answer_takes_seconds(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: ended.wait(30) and [])
    monkeypatch.setattr(hub, "_SECONDS", 0.2)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    for name in hub._OFF:
        monkeypatch.setenv(name, "")  # what is set below goes with the test
    begin = time.perf_counter()
    hub.offline_unless_reachable()
    ended.set()
    assert time.perf_counter() - begin < 10
    assert all(os.environ[name] == "1" for name in hub._OFF)
    assert "http://hub.example does not answer" in capsys.readouterr().err
