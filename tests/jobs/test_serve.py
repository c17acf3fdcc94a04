"""`make serve`: what it says without a model, what it starts, and that Ctrl-C leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from jobs.serve import ServeConfig, main, models, start_command, welcome
from linearized.errors import ConfigError

ROOT = Path(__file__).parents[2]
MARK = "LINEARIZED_TEST_MARK"


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_without_a_model_it_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.serve", "demo", f"run={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no model in ") and "make demo" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_which_models_are_served(tmp_path):
    target = made(tmp_path / "target")
    assert models(ServeConfig(run=tmp_path)) == (target, None)
    draft = made(tmp_path / "draft")
    assert models(ServeConfig(run=tmp_path)) == (target, draft)
    other = made(tmp_path / "other")
    assert models(ServeConfig(run=tmp_path, target=other)) == (other, None)
    assert models(ServeConfig(target=other, draft=draft)) == (other, draft)


def test_a_port_that_is_taken_is_refused_at_once(tmp_path):
    made(tmp_path / "target")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(ConfigError, match=f"port {port} is taken"):
                main(ServeConfig(run=tmp_path, port=port))
        finally:
            signal.signal(signal.SIGTERM, before)
    with pytest.raises(ConfigError, match="port must"):
        ServeConfig(port=0)


def test_names_with_spaces_stay_whole():
    *_, line = start_command(8000, Path("/a b/target"), None, ("model=my model",))
    assert "'target=/a b/target'" in line and "'model=my model'" in line


def test_it_says_what_to_open_and_what_to_send():
    text = welcome(8123, "target", Path("/tmp/x"))
    assert "http://127.0.0.1:8123/\n" in text
    assert "curl http://127.0.0.1:8123/v1/completions" in text and '"model": "target"' in text


def marked(run: Path) -> list[str]:
    """Command lines of the processes that carry the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={run}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_it_serves_until_it_is_interrupted(linear, tokenizer, tmp_path):
    for name in ("target", "draft"):
        model = linear(vocab=len(tokenizer), dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jobs.serve", "demo", f"port={port}", f"run={tmp_path}"]
    serve = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, MARK: str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    guard = threading.Timer(400, serve.kill)
    guard.start()
    try:
        said = ""
        while "Ctrl-C" not in said:
            line = serve.stdout.readline()
            assert line, said
            said += line
        (curl,) = re.findall(r"^Ask +(curl .*)$", said, re.MULTILINE)
        done = subprocess.run(
            ["bash", "-c", curl + " -sS --fail-with-body --noproxy '*'"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"usage"' in done.stdout
        serve.send_signal(signal.SIGINT)
        rest, _ = serve.communicate(timeout=60)
    finally:
        guard.cancel()
        serve.kill()
        serve.wait()
        serve.stdout.close()
    assert serve.returncode == 0 and rest.endswith("Stopped\n") and "Traceback" not in rest
    deadline = time.monotonic() + 60
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked(tmp_path) == []
