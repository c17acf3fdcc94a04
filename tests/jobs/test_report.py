"""The report: its numbers come from the answers of a real HTTP server."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from jobs import report
from linearized.errors import ConfigError, DataError

RUN = {
    "perplexity": {"teacher": 40.0, "before": 200.0, "after": 42.0},
    "parameters": 3_000_000,
    "tokens": 1_000_000,
    "losses": [[0, 0, 9.0], [1, 0, 5.0, 1e-3, 900], [1, 10, 4.0, 1e-4, 900]],
}


class App(BaseHTTPRequestHandler):
    """Answers as the app does: 12 tokens, in 12 rounds plainly and in 4 with a draft."""

    texts = {"none": " a text", "model": " a text"}  # noqa: RUF012

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "target"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["model"] == "target"
        if body["temperature"]:
            assert body["temperature"] == 0.8 and body["max_tokens"] == report.SAMPLE_TOKENS
        mode = body["speculate"]
        accepted, rejected, rounds = {"none": (0, 0, 12), "model": (8, 8, 4)}[mode]
        details = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": rejected,
            "verification_rounds": rounds,
        }
        usage = {"completion_tokens": 12, "completion_tokens_details": details}
        self._answer({"choices": [{"text": self.texts[mode]}], "usage": usage})

    def _answer(self, value: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder, and the report's config with a server to ask."""
    for name in ("teacher", "target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(RUN))
    monkeypatch.setattr(report, "_prompts", lambda config: ["one", "two", "three"])
    monkeypatch.setattr(
        report, "_softmax_texts", lambda folder, prompts: [f"{folder.name} says"] * len(prompts)
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), App)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield report.ReportConfig(run=tmp_path, url=url, seconds='{"data": 3.5}')
    server.shutdown()
    thread.join()
    server.server_close()


def test_report(run):
    (run.run / "probe").mkdir()
    whole = {"ratio": 1.21, "ranges": {"0–63": 1.1, "64–127": 1.3}, "slots": []}
    candidate = {"name": "anchored", "texts": {"held out": {"whole": whole}}}
    found = json.dumps({"candidates": [candidate]})
    (run.run / "probe" / "probe.json").write_text(found)
    report.main(run)
    done = json.loads((run.run / "report.json").read_text())
    assert done["perplexity"] == {
        "teacher": 40.0, "swapped": 200.0, "linearized": 42.0, "draft": 42.0,
    }  # fmt: skip
    assert done["accepted_length"] == 3.0
    assert done["accepted_share"] == 0.5
    assert done["texts_equal"] is True
    assert done["tokens_per_second"]["plain"] > 0 < done["tokens_per_second"]["speculative"]
    assert done["seconds"]["data"] == 3.5
    said = {"teacher": "teacher says", "linearized": " a text"}
    assert done["samples"] == [{"prompt": prompt, **said} for prompt in ("one", "two")]
    assert (run.run / "report.png").read_bytes().startswith(b"\x89PNG")
    text = io.StringIO()
    report.show(done, Console(file=text, width=100))
    for words in (
        "1.210 x (1.10 at 0–63, 1.30 at 64–127)",
        "1.050 x teacher",
        "200.00",
        "3.00 M",
        "teacher says",
        "a text",
    ):
        assert words in text.getvalue()


def test_texts_that_differ_fail_the_run(run, monkeypatch):
    monkeypatch.setattr(App, "texts", {"none": " a text", "model": " another"})
    with pytest.raises(DataError, match="differs"):
        report.main(run)
    assert json.loads((run.run / "report.json").read_text())["texts_equal"] is False


def test_a_run_that_is_not_there_is_named(run):
    (run.run / "draft" / "run.json").unlink()
    with pytest.raises(DataError, match=r"draft.run\.json"):
        report.main(run)
    with pytest.raises(ConfigError, match="prompts must be at least 1, got 0"):
        report.ReportConfig(prompts=0)
