"""Grammars are compiled in a process of its own, which may end."""

from __future__ import annotations

import json
import os
import signal

import pytest
import xgrammar

from linearized.speculative.compiling import Compiler


def test_what_takes_too_long_is_given_up_and_the_next_goes_on():
    spelled = [bytes([byte]) for byte in range(256)]
    info = xgrammar.TokenizerInfo(spelled, vocab_size=256, stop_token_ids=[])
    compiler = Compiler(info.serialize_json(), seconds=0.2, cache_bytes=1 << 20)
    names = [f"p{i}" for i in range(900)]
    schema = {
        "type": "object",
        "properties": {
            name: {"type": "string", "maxLength": 999 + i} for i, name in enumerate(names)
        },
        "required": names,
    }
    try:
        with pytest.raises(TimeoutError):
            compiler.compile("schema", json.dumps(schema))
        found = compiler.compile("regex", "ab")
        matcher = xgrammar.GrammarMatcher(xgrammar.CompiledGrammar.deserialize_json(found, info))
        assert matcher.accept_token(ord("a")) and not matcher.accept_token(ord("c"))
        with pytest.raises(ValueError, match="position 3"):
            compiler.compile("regex", "a(")
        process = compiler._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert compiler.compile("regex", "ab") == found
    finally:
        compiler.close()
    assert compiler._process is None
