"""Steps that would cost what others have taught are left out; too many of them end the stage."""

from __future__ import annotations

import math

import pytest

from jobs.train.guard import LIMIT, SPIKE, WINDOW, Guard
from linearized.errors import TrainingError


def full(value: float = 2.0, **settings) -> Guard:
    return Guard("linearize: distillation", recent=[value] * WINDOW, **settings)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out_from_the_first_step_on(loss):
    assert Guard("x").objection(loss) == f"the loss is {loss}"


def test_a_spike_is_left_out_once_there_is_something_to_compare_with():
    assert full().objection(2.0 * SPIKE + 0.01) is not None
    assert full().objection(2.0 * SPIKE) is None
    assert Guard("x", recent=[2.0] * (WINDOW - 1)).objection(100.0) is None


def test_a_few_cost_nothing_and_several_in_a_row_end_the_stage_with_a_remedy():
    guard = full()
    for step in range(3 * LIMIT):
        if step % LIMIT == 0:
            guard.done(2.0)
        else:
            guard.left_out(step, "the loss is nan")
    assert guard.skipped == 3 * (LIMIT - 1)
    with pytest.raises(TrainingError, match=r"5 steps in a row .* step 99: .* nan; lower optim.lr"):
        guard.left_out(99, "the loss is nan")


def test_a_later_guard_goes_on_where_one_was():
    guard = full()
    guard.done(3.0)
    later = Guard("x", recent=list(guard.recent), skipped=guard.skipped)
    assert later.objection(2.5 * SPIKE) is None and later.objection(3.1 * SPIKE) is not None
