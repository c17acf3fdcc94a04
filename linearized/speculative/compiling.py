"""Compiles grammars in a process of its own, which ends itself if one takes too long.

This file is what that process runs, and what talks to it. A compiler written in C++ cannot be
interrupted, and the source comes from users: a bounded string may cost seconds, hundreds of them
minutes. The process imports xgrammar and nothing of this library; it is told JSON and says JSON,
line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from typing import IO, Any

HUNG_S = 300.0
"""By the wall's clock, after which a process that does not answer is ended."""
BYTES = 4 << 30
"""Memory of its own that the process may take."""
NICE = 5
"""So much later than the model the process is given a processor."""


class Compiler:
    """Grammars in, compiled ones out, one after the other. May be called from several threads."""

    def __init__(self, vocabulary: str, *, seconds: float, cache_bytes: int) -> None:
        """`vocabulary`: a TokenizerInfo of xgrammar, as JSON. `seconds`: of a processor, that one
        grammar may take. `cache_bytes`: what parts of grammars may take that are kept."""
        self._settings = {
            "vocabulary": vocabulary,
            "seconds": seconds,
            "cache_bytes": cache_bytes,
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None

    def compile(self, kind: str, source: str, **settings: object) -> str:
        """A CompiledGrammar of xgrammar, as JSON. `kind`: see `_compiled`.

        Raises:
            ValueError: xgrammar refuses it; says why. TimeoutError: it takes too long.
        """
        question = json.dumps({"kind": kind, "source": source, "settings": settings})
        with self._lock:
            answer = self._ask(question)
        if "problem" in answer:
            raise ValueError(answer["problem"])
        return str(answer["compiled"])

    def close(self) -> None:
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for it waits no longer
        with self._lock:
            self._stop()

    def _ask(self, question: str) -> dict[str, str]:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        # Its own clock counts the time that it has worked; this one is for a process that hangs.
        late = threading.Timer(HUNG_S, process.kill)
        late.start()
        try:
            process.stdin.write(question.encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            late.cancel()
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        self._stop()
        if process.returncode in (-signal.SIGPROF, -signal.SIGKILL):
            raise TimeoutError
        raise ValueError(f"it ends xgrammar with the status {process.returncode}")

    def _start(self) -> subprocess.Popen[bytes]:
        # Without -P, modules of this folder would stand in for others of the same name.
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._end = weakref.finalize(self, _end, process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(self._settings).encode() + b"\n")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._end()
            self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(1)  # it ends with what it reads, or has ended
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(asked: IO[str], said: IO[str]) -> None:
    """What the process does until `asked` ends."""
    import resource

    import xgrammar

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides when it ends
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    settings = json.loads(asked.readline())
    info = xgrammar.TokenizerInfo.deserialize_json(settings["vocabulary"])
    compiler = xgrammar.GrammarCompiler(
        info, max_threads=1, cache_limit_bytes=settings["cache_bytes"]
    )
    for line in asked:
        question = json.loads(line)
        # Nobody handles this signal, so it ends the process, wherever it is.
        signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
        try:
            found = {"compiled": _compiled(compiler, **question).serialize_json()}
        except Exception as error:
            found = {"problem": str(error) or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(found), file=said, flush=True)


def _compiled(compiler: Any, kind: str, source: str, settings: dict[str, Any]) -> Any:
    if kind == "schema":
        return compiler.compile_json_schema(source, **settings)
    if kind == "regex":
        return compiler.compile_regex(source)
    return compiler.compile_grammar(source)


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
