"""What users may say about an app, as texts or as values."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve_apps.settings import AppArgs


def args(**values) -> AppArgs:
    return AppArgs.model_validate({"target": "t", **values})


def test_arguments_come_as_text():
    found = args(depth="3", target_cpus="0.5")
    assert (found.depth, found.target_cpus, found.draft) == (3, 0.5, None)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"depth": "0"}, "greater than or equal to 1"),
        ({"typo": "1"}, "Extra inputs"),
        ({"target_replicas": 3, "target_max_replicas": 2}, "target_max_replicas 2 is below"),
        ({"draft": "d", "draft_replicas": 3, "draft_max_replicas": 2}, "draft_max_replicas 2 is"),
        ({"draft_max_replicas": 2}, "needs a draft"),
        ({"target_dtype": "float16"}, "'float32' or 'bfloat16'"),
        ({"draft_device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
        ({"target": None}, "either target=FOLDER or targets="),
        ({"targets": {"a": "u"}}, "either target=FOLDER or targets="),
        ({"target": None, "targets": "a=u"}, "must be names with folders"),
        ({"target": None, "targets": {"a/b": "u"}}, "got 'a/b'"),
        ({"target": None, "targets": {"a": "u"}, "model": "m"}, "names a single target"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValidationError, match=says):
        args(**wrong)


@pytest.mark.parametrize("wrong", ["many", "1-2-3", "0", "9-8", "70000", "-1"])
def test_ports_that_are_no_range(wrong):
    with pytest.raises(ValidationError, match="link_ports must"):
        args(link_ports=wrong)


def test_names_of_targets():
    assert list(args(target="runs/one/target").folders) == ["target"]
    assert list(args(model="mine/one").folders) == ["mine/one"]
    assert list(args(target=None, targets='{"a": "t", "b": "u"}').folders) == ["a", "b"]


def test_where_drafts_run():
    assert not args().drafts_apart
    assert args(draft="d").drafts_apart
    assert args(draft="d", draft_replicas=0, draft_max_replicas=2).drafts_apart
    assert not args(draft="d", draft_replicas=0).drafts_apart


def test_a_target_waits_only_for_drafts_that_run_from_the_start():
    for replicas in (0, 1):
        found = args(draft="d", draft_replicas=replicas, draft_max_replicas=2)
        (folder,) = found.folders.values()
        assert found.target_config(folder).expects_draft == bool(replicas)


def test_types_and_devices_reach_the_replicas():
    settings = {"target_dtype": "bfloat16", "draft_device": "cuda", "target_device": "cpu"}
    found = args(draft="d", **settings)
    (folder,) = found.folders.values()
    config, draft = found.target_config(folder), found.draft_config()
    assert (config.dtype, config.device) == ("bfloat16", "cpu")
    assert (draft.dtype, draft.device) == ("float32", "cuda")
