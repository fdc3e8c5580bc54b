"""Hard problems: ours solves all of them, and the measure notices what is wrong."""

import pytest
import torch

from otseg.torture import PLAN_TOL, SOLVERS, by_autograd, hard_problems, measure, our_plan

PROBLEMS = {p.name: p for p in hard_problems()}


@pytest.mark.parametrize("name", PROBLEMS)
def test_ours_solves_it(name):
    "In float64 and in float32. At 10,000, float32 costs themselves are rounded to a thousandth."
    row = measure(PROBLEMS[name], "ours")
    assert row["outcome"] == "solved" and row["plan_error"] < 1e-6 and row["gradient_error"] < 1e-6, row
    row = measure(PROBLEMS[name], "ours, float32")
    gradient_tol = 1e-3 if name == "shifted by 10,000" else 1e-5
    assert row["outcome"] == "solved" and row["plan_error"] < 1e-5 and row["gradient_error"] < gradient_tol, row


def with_solver(monkeypatch, plan):
    monkeypatch.setitem(SOLVERS, "test", (by_autograd(plan), "torch", True))
    return lambda name: measure(PROBLEMS[name], "test")["outcome"]


@pytest.mark.parametrize("name", ["two far groups", "barely relaxed"])
def test_wrong_solvers_fail(monkeypatch, name):
    outcome = with_solver(monkeypatch, our_plan)
    assert outcome(name) == "solved"
    outcome = with_solver(monkeypatch, lambda p, C: our_plan(p, C) * (1 + 2 * PLAN_TOL))
    assert outcome(name) == "failed: plan"
    outcome = with_solver(monkeypatch, lambda p, C: our_plan(p, C.detach()) + 0 * C)
    assert outcome(name) == "failed: gradient"
    outcome = with_solver(monkeypatch, lambda p, C: our_plan(p, C) * torch.nan)
    assert outcome(name).startswith("failed: plan")
    outcome = with_solver(monkeypatch, lambda p, C: 1 // 0)
    assert outcome(name) == "failed: ZeroDivisionError"


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(SOLVERS, "test", (None, "no_such_package", True))
    assert measure(PROBLEMS["one point"], "test")["outcome"] == "not installed"


def test_other_packages_agree_where_they_are_right():
    "The two libraries of the tests, on a problem of OTSeg's kind: the same measure accepts them."
    for solver in ("POT, log", "GeomLoss", "official loop"):
        assert measure(PROBLEMS["cosines, eps 0.05"], solver)["outcome"] == "solved"
