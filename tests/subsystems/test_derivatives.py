"""Derivatives against finite differences: reverse and forward mode, first and second order, one and many at once."""

import pytest
import torch
from samples import every_op
from torch.autograd import forward_ad, gradcheck, gradgradcheck


def of_inputs(sample):
    return lambda *inputs: sample.ours(*inputs, *sample.others)


@pytest.mark.support("gradcheck")
@every_op
def test_first_order(device, op):
    sample = op(device, torch.float64, 4)
    assert gradcheck(of_inputs(sample), sample.inputs, nondet_tol=0.0, check_batched_grad=True)


@pytest.mark.support("gradgradcheck")
@every_op
def test_second_order(device, op):
    sample = op(device, torch.float64, 3)
    assert gradgradcheck(of_inputs(sample), sample.inputs, nondet_tol=0.0, check_batched_grad=True)


@pytest.mark.support("forward-mode AD")
@every_op
def test_forward_mode(device, op):
    sample = op(device, torch.float64, 3)
    forward = {"check_forward_ad": True, "check_backward_ad": False, "check_batched_forward_grad": True}
    assert gradcheck(of_inputs(sample), sample.inputs, check_batched_grad=False, **forward)
    over_reverse = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
    assert gradgradcheck(of_inputs(sample), sample.inputs, **over_reverse)


@pytest.mark.support("forward-mode AD")
@every_op
def test_forward_mode_through_the_backward_pass(device, op):
    """Of a graph that was recorded outside of the level: a Hessian times a vector, as torch's."""
    sample = op(device, torch.float64, 4)
    results = []
    for function in (sample.ours, sample.torchs):
        output = function(*sample.inputs, *sample.others)
        torch.manual_seed(1)
        grad_output, tangent = torch.randn_like(output), torch.randn_like(output)
        with forward_ad.dual_level():
            grads = torch.autograd.grad(output, sample.inputs, forward_ad.make_dual(grad_output, tangent))
            results.append([forward_ad.unpack_dual(grad).tangent for grad in grads])
    torch.testing.assert_close(*results)


@pytest.mark.support("many gradients at once (is_grads_batched)")
@every_op
def test_many_incoming_gradients_at_once(device, op):
    """Hand in hand: torch.autograd.functional.jacobian and hessian with vectorize=True stand on it."""
    sample = op(device, torch.float64, 4)
    results = []
    for function in (sample.ours, sample.torchs):
        output = function(*sample.inputs, *sample.others)
        torch.manual_seed(1)
        grad_outputs = torch.randn(3, *output.shape, dtype=output.dtype, device=device)
        grads = torch.autograd.grad(output, sample.inputs, grad_outputs, is_grads_batched=True)

        def total(*inputs, function=function):
            return function(*inputs, *sample.others).square().sum()

        hessian = torch.autograd.functional.hessian(total, tuple(sample.inputs), vectorize=True)
        results.append((grads, hessian))
    torch.testing.assert_close(*results)


@pytest.mark.support("many gradients at once (is_grads_batched)")
@every_op
def test_many_incoming_gradients_for_some_inputs(device, op):
    sample = op(device, torch.float64, 4)
    for place in range(len(sample.inputs)):
        inputs = [tensor.detach().requires_grad_(i == place) for i, tensor in enumerate(sample.inputs)]
        results = []
        for function in (sample.ours, sample.torchs):
            output = function(*inputs, *sample.others)
            torch.manual_seed(1)
            grad_outputs = torch.randn(3, *output.shape, dtype=output.dtype, device=device)
            results += torch.autograd.grad(output, inputs[place], grad_outputs, is_grads_batched=True)
        torch.testing.assert_close(*results)
