"""The solver: the best choice for small problems, a small proved gap for large ones."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.planning.knapsack import Problem, solve


@st.composite
def problems(draw, most_items=5, most_options=4):
    items, options = draw(st.integers(1, most_items)), draw(st.integers(1, most_options))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, draw(st.sampled_from([3, 50, 10**9])), (items, options), generator=generator).double()
    errors = torch.rand((items, options), generator=generator).double()
    if draw(st.booleans()):  # as rounding has them: more bits, less error, nearly on a curve
        errors = (0.9 + 0.2 * errors) / sizes.square()
    if draw(st.booleans()):
        missing = torch.rand((items, options), generator=generator) < 0.3
        missing[:, 0] = False
        sizes[missing] = errors[missing] = math.inf
    return Problem(sizes, errors)


def choices_of(problem):
    return (
        torch.tensor(choice) for choice in itertools.product(*map(range, [problem.sizes.shape[1]] * len(problem.sizes)))
    )


def least_error(problem, budget):
    found = (problem.total(choice) for choice in choices_of(problem))
    return min((error for size, error in found if size <= budget), default=math.inf)


@given(problems(), st.floats(0, 1))
def test_no_choice_within_the_budget_has_less_error(problem, share):
    finite = torch.where(problem.sizes.isinf(), -1.0, problem.sizes)
    least, most = float(problem.sizes.amin(1).sum()), float(finite.amax(1).sum())
    budget = least + share * (most - least)
    solution = solve(problem, budget)
    assert solution.size <= budget
    assert (solution.size, solution.error) == problem.total(solution.choice)
    assert solution.error == pytest.approx(least_error(problem, budget), rel=1e-12)
    assert solution.bound <= solution.error
    assert solution.gap <= 1e-9


@given(problems())
def test_a_budget_below_the_smallest_choice_has_no_solution(problem):
    least = float(problem.sizes.amin(1).sum())
    assert solve(problem, math.nextafter(least, 0)) is None
    assert solve(problem, least).size == least


@given(problems(), st.floats(0.01, 2))
def test_the_transposed_problem_gives_the_least_size_within_an_error(problem, share):
    least = problem.total(problem.transposed().smallest())[1]
    allowed = least * (1 + share)
    solution = solve(problem.transposed(), allowed)
    assert solution.size <= allowed
    found = (problem.total(choice) for choice in choices_of(problem))
    assert solution.error == pytest.approx(min(size for size, error in found if error <= allowed), rel=1e-12)


@given(st.integers(0, 2**32), st.floats(2.5, 8))
def test_many_items_have_a_small_gap_and_the_same_choice_each_time(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randint(10**3, 10**7, (2000, 1), generator=generator).double()
    per_weight = torch.tensor([2.25, 3.25, 4.25, 5.25, 6.25, 8.03, 16.0], dtype=torch.float64)
    importance = torch.rand((2000, 1), generator=generator).double()
    problem = Problem((elements * per_weight / 8).floor(), importance * 4**-per_weight)
    solution = solve(problem, float(elements.sum() * bits / 8))
    assert 0 <= solution.gap < 1e-4
    assert solve(problem, float(elements.sum() * bits / 8)).choice.equal(solution.choice)


def test_equal_options_and_options_without_error_are_allowed():
    sizes = torch.tensor([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    errors = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert solve(Problem(sizes, errors), 4).error == 1.0
    assert solve(Problem(sizes, errors), 5).error == 0.0
