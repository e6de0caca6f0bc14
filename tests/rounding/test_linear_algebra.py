"""Factors and products that do not depend on the number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import NumericsError
from fewbits.rounding.linear_algebra import cholesky, feedback_factor, product


@st.composite
def moments(draw: st.DrawFn) -> torch.Tensor:
    size = draw(st.sampled_from([1, 2, 7, 127, 128, 129, 300]))
    x = torch.randn(size + 5, size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).double()
    return x.mT @ x / len(x)


@given(moment=moments())
def test_the_factor_times_its_transpose_is_the_matrix(moment):
    factor = cholesky(moment)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.mT, moment)


@given(moment=moments(), damping=st.sampled_from([0.01, 1.0]))
def test_the_feedback_factor_factors_the_inverse_of_the_damped_moment(moment, damping):
    upper, used = feedback_factor(moment, damping)
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment)).double()
    assert used == damping
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.mT @ upper @ damped, torch.eye(len(moment)).double(), atol=1e-8, rtol=0)


def test_damping_grows_until_a_matrix_can_be_factored(events):
    moment = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).double()  # its smallest eigenvalue is -2
    upper, used = feedback_factor(moment, 0.01)
    assert used == 10
    assert [event["event"] for event in events] == ["damping_increased"] * 3
    assert torch.isfinite(upper).all()


def test_a_matrix_that_no_damping_helps_is_refused():
    with pytest.raises(NumericsError, match="2 inputs cannot be factored"):
        feedback_factor(-torch.eye(2).double(), 0.01)


@given(rows=st.integers(1, 9), inner=st.sampled_from([1, 128, 300]))
def test_products_are_right(rows, inner):
    generator = torch.Generator().manual_seed(inner)
    left = torch.randn(rows, inner, generator=generator).double()
    right = torch.randn(inner, 3, generator=generator)
    torch.testing.assert_close(product(left, right), left @ right.double())
