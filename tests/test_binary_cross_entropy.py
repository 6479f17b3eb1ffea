"""csrc/{cpu,cuda}/binary_cross_entropy and torch_mlp/ops/binary_cross_entropy.py."""

import inspect
import itertools

import pytest
import torch
from conftest import DTYPES, assert_no_less_accurate, assert_same_bits, clones
from torch.autograd import gradcheck, gradgradcheck

from torch_mlp.functional import binary_cross_entropy_with_logits

eager = torch.nn.functional.binary_cross_entropy_with_logits
BOTH = (binary_cross_entropy_with_logits, eager)
NAMES = ("loss", "by input", "by target")  # what values gives
NAN, INF = float("nan"), float("inf")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
# weight and pos_weight: shapes for an input (N, C), None for none
weightings = pytest.mark.parametrize(
    ("weight", "pos_weight"), [(None, None), ("C", None), (None, "C"), ("NC", "C"), ("1", "N1")], ids=str
)


def make(device, dtype=torch.float64, shape=(7, 5), weight="C", pos_weight="C", scale=3.0):
    """input and target, and the options weight and pos_weight."""

    def random(name):
        sizes = {"": (), "1": (1,), "C": shape[-1:], "N1": (*shape[:-1], *(1 for _ in shape[-1:])), "NC": shape}[name]
        return (torch.rand(sizes, dtype=torch.float64) + 0.5).to(device, dtype)

    input = (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()
    target = torch.rand(shape, dtype=torch.float64).to(device, dtype)
    with torch.no_grad():
        target[target > 0.7] = 1  # the classes themselves too
        target[target < 0.3] = 0
    given = {"weight": weight, "pos_weight": pos_weight}
    return input, target.requires_grad_(), {name: random(of) for name, of in given.items() if of is not None}


def to(dtype, input, target, options):
    """The same in another dtype."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (input, target)]
    return *inputs, {name: o.to(dtype) if isinstance(o, torch.Tensor) else o for name, o in options.items()}


def upstream(reduction, like):
    return torch.randn(like.shape if reduction == "none" else (), dtype=torch.float64).to(like)


def values(function, input, target, options, grad_output):
    """Loss and the gradients of input and target."""
    loss = function(input, target, **options)
    return loss.detach(), *torch.autograd.grad(loss, (input, target), grad_output.to(loss.dtype))


def test_signature_is_torchs():
    ours, theirs = (inspect.signature(function).parameters.values() for function in BOTH)
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


# a scalar; tails of any vector width; runs of one weight longer than a block of the sum; several blocks
@pytest.mark.parametrize("shape", [(), (1,), (64, 1), (7, 5), (9, 67), (3, 5003), (5000, 3)], ids=str)
@weightings
@reductions
@dtypes
def test_accuracy(device, dtype, reduction, weight, pos_weight, shape):
    names = (weight, pos_weight) if shape else (weight and "", pos_weight and "")
    input, target, options = make(device, dtype, shape, *names)
    options["reduction"] = reduction
    grad_output = upstream(reduction, input)
    ours, theirs = (values(function, input, target, options, grad_output) for function in BOTH)
    truth = values(eager, *to(torch.float64, input, target, options), grad_output)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert_no_less_accurate(our, their, true)


SHAPES = [(), (1,), (4,), (3, 1), (1, 4), (3, 4), (1, 1, 1), (2, 1, 1), (2, 3, 1), (2, 1, 4), (1, 3, 4), (2, 3, 4)]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_way_to_broadcast(device, dtype, reduction):
    input, target, _ = make(device, dtype, (2, 3, 4))
    grad_output = upstream(reduction, input)
    for of_weight, of_pos_weight in itertools.product([None, *SHAPES], repeat=2):
        options = {"reduction": reduction}
        for name, shape in (("weight", of_weight), ("pos_weight", of_pos_weight)):
            options[name] = None if shape is None else torch.rand(shape, dtype=dtype).to(device) + 0.5
        ours, theirs = (values(function, input, target, options, grad_output) for function in BOTH)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("period", [1, 2, 3, 16, 17, 1000, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_every_period(device, dtype, period):
    """Around the runs of the vector kernels and the blocks of the sum, which both weights cut elsewhere."""
    rows = 9000 // period + 2
    input, target, options = make(device, dtype, (rows, period), "C", "NC")
    options["reduction"] = "none"
    grad_output = upstream("none", input)
    exact = to(torch.float64, input, target, options)
    for our, true in zip(
        values(binary_cross_entropy_with_logits, input, target, options, grad_output),
        values(eager, *exact, grad_output),
        strict=True,
    ):
        error = (our.double() - true).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * (1 + true.abs().max())


def exact_values(x, y, p):
    """Loss and derivatives in float64, where no digits cancel either."""
    x, y = x.double(), y.double()
    t = torch.log1p(torch.exp(-x.abs()))
    loss = (1 - y) * (x.clamp(min=0) + t) + p * y * ((-x).clamp(min=0) + t)
    by_input = (1 - y) * torch.sigmoid(x) - p * y * torch.sigmoid(-x)
    return loss, by_input, p * (-x).clamp(min=0) - x.clamp(min=0) + (p - 1) * t


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("y", [0.0, 1.0])
@pytest.mark.parametrize("p", [1.0, 2.0, 0.0])
def test_every_digit_however_small_the_loss(device, dtype, y, p):
    """Relative errors, from logits of -110 to 110 and all powers of two: exp(-87) is the least normal float32."""
    exponents = torch.exp2(-126 * torch.rand(20_000, dtype=torch.float64))
    x = torch.cat([torch.linspace(-110, 110, 50_001).double(), exponents, -exponents])
    x = x[torch.randperm(len(x))].to(device, dtype)
    target = torch.full_like(x, y).requires_grad_()
    options = {"reduction": "none", "pos_weight": torch.tensor(p).to(x)}
    found = values(binary_cross_entropy_with_logits, x.requires_grad_(), target, options, torch.ones_like(x))
    least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    bound = (4 if dtype != torch.bfloat16 else 0.6) * torch.finfo(dtype).eps
    for name, our, true in zip(NAMES, found, exact_values(x.detach(), target.detach(), p), strict=True):
        # The derivative by y crosses 0 for p = 2, and there its digits cancel.
        error = (our.double() - true).abs() / true.abs().clamp(min=0.5 if p == 2 and name == "by target" else least)
        assert error.max() <= bound, f"{name}: {error.max()} for a logit of {x[error.argmax()]}"


def test_a_loss_of_almost_nothing(device):
    x, y = torch.tensor([50.0, -50.0], device=device), torch.tensor([1.0, 0.0], device=device)
    loss = binary_cross_entropy_with_logits(x, y, reduction="none")
    torch.testing.assert_close(loss, torch.full_like(loss, 1.9287498e-22), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pos_weight", [None, 0.0, 2.0])
@pytest.mark.parametrize("weight", [None, 0.0, 1.5, INF])
@pytest.mark.parametrize("y", [0.0, 0.25, 1.0, NAN])
def test_infinite_and_nan(device, dtype, y, weight, pos_weight):
    """Among ordinary logits, at both ends of a vector and in its middle."""
    input = torch.randn(40).to(device, dtype)
    input[[0, 3, 7, 15, 16, 31, 39]] = torch.tensor([NAN, INF, -INF, 0.0, NAN, INF, -INF], device=device, dtype=dtype)
    target = torch.full_like(input, y).requires_grad_()
    options = {"reduction": "none"}
    for name, value in (("weight", weight), ("pos_weight", pos_weight)):
        options[name] = None if value is None else torch.tensor(value).to(input)
    grad_output = torch.linspace(-1, 1.1, 40).to(input)
    ours = values(binary_cross_entropy_with_logits, input.requires_grad_(), target, options, grad_output)
    # Torch in float64, for its results of 16 bits are rounded more than once.
    truth = values(eager, *to(torch.float64, input, target, options), grad_output)
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our, true.to(dtype), equal_nan=True)


def test_targets_that_are_no_probabilities(device):
    input, _, options = make(device)
    target = (5 * torch.randn(7, 5, dtype=torch.float64)).to(device).requires_grad_()
    grad_output = upstream("mean", input)
    ours, theirs = (values(function, input, target, options, grad_output) for function in BOTH)
    torch.testing.assert_close(ours, theirs)


@weightings
@reductions
def test_gradcheck(device, reduction, weight, pos_weight):
    input, target, options = make(device, shape=(4, 3), weight=weight, pos_weight=pos_weight)

    def loss(input, target):
        return binary_cross_entropy_with_logits(input, target, reduction=reduction, **options)

    assert gradcheck(loss, (input, target), nondet_tol=0.0)
    assert gradgradcheck(loss, (input, target), nondet_tol=0.0)
    for frozen in range(2):
        inputs = [tensor.detach().requires_grad_(place != frozen) for place, tensor in enumerate((input, target))]
        assert gradgradcheck(loss, inputs, nondet_tol=0.0)


@weightings
@reductions
@dtypes
def test_double_backward(device, dtype, reduction, weight, pos_weight):
    """All the second derivatives and the one by the incoming gradient, beside torch's in float64."""
    inputs = make(device, dtype, (7, 5), weight, pos_weight)
    grad_output = upstream(reduction, inputs[0])
    incoming = [torch.randn(7, 5, dtype=torch.float64).to(inputs[0]) for _ in range(2)]

    def second(function, input, target, options):
        outer = grad_output.to(input).requires_grad_()
        loss = function(input, target, reduction=reduction, **options)
        first = torch.autograd.grad(loss, (input, target), outer, create_graph=True)
        return torch.autograd.grad(first, (outer, input, target), [i.to(input) for i in incoming])

    ours, truth = second(binary_cross_entropy_with_logits, *inputs), second(eager, *to(torch.float64, *inputs))
    for our, true in zip(ours, truth, strict=True):
        assert our.dtype == dtype
        assert our.shape == true.shape
        scale = true.abs().max() if dtype != torch.float64 else 8
        assert (our.double() - true).abs().max() <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
@reductions
def test_every_combination_of_frozen_tensors(device, reduction, needs):
    input, target, options = make(device)
    grads = []
    for function in BOTH:
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip((input, target), needs, strict=True)]
        loss = function(*leaves, reduction=reduction, **options)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward(torch.full_like(loss, -1.7))
        grads.append([leaf.grad for leaf in leaves])
    assert [grad is not None for grad in grads[0]] == list(needs)
    for our, their in zip(*grads, strict=True):
        if our is not None:
            torch.testing.assert_close(our, their)


@pytest.mark.parametrize("how", ["transposed", "every other", "offset", "expanded", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(device, dtype, how):
    options = {"reduction": "none"}
    shape = (2, 3, 4, 5) if how == "channels last" else (6, 35)
    plain = make(device, dtype, shape, "C", "NC")
    options |= plain[2]

    def view(values):
        return {
            "transposed": lambda: values.mT.contiguous().mT,
            "every other": lambda: torch.stack([values, torch.full_like(values, NAN)], -1)[..., 0],
            "offset": lambda: torch.cat([torch.full_like(values[:, :1], NAN), values], 1)[:, 1:],
            "expanded": lambda: values[:1].expand(shape),
            "channels last": lambda: values.to(memory_format=torch.channels_last),
        }[how]().detach()

    far = [view(tensor.detach()).requires_grad_() for tensor in plain[:2]]
    near = [tensor.detach().contiguous().requires_grad_() for tensor in far]
    far_options = {name: o if name == "reduction" or o.dim() < 2 else view(o) for name, o in options.items()}
    near_options = {
        name: o if isinstance(o, str) else o.contiguous()
        for name, o in (far_options if how == "expanded" else options).items()
    }
    for grad_output in (view(torch.randn(shape).to(plain[0])), torch.tensor(0.3).to(plain[0]).expand(shape)):
        ours = values(binary_cross_entropy_with_logits, *far, far_options, grad_output)
        theirs = values(eager, *to(torch.float64, *near, near_options), grad_output)
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their.to(dtype))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
@reductions
def test_empty(device, reduction, shape):
    input, target, _ = make(device, torch.float32, shape)
    for options in ({}, {"weight": torch.rand(shape[-1:], device=device), "pos_weight": torch.rand(1, device=device)}):
        options["reduction"] = reduction
        grad_output = upstream(reduction, input)
        ours, theirs = (values(function, input, target, options, grad_output) for function in BOTH)
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, equal_nan=True)


@reductions
def test_nothing_is_clobbered(device, reduction):
    input, target, options = make(device, torch.float32)
    grad_output = upstream(reduction, input)
    everything = [input, target, *options.values(), grad_output]
    before = clones(everything)
    loss = binary_cross_entropy_with_logits(input, target, reduction=reduction, **options)
    first = torch.autograd.grad(loss, (input, target), grad_output, retain_graph=True)
    kept = clones(first)
    second = torch.autograd.grad(loss, (input, target), -4 * grad_output)
    assert_same_bits(before, everything)
    assert_same_bits(kept, list(first))
    assert_same_bits(list(second), [-4 * grad for grad in first])
    assert all(tensor._version == 0 for tensor in everything if tensor is not target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_thread_counts_give_the_same_bits(dtype):
    """A shape that is worth five threads, see kElementsPerThread."""
    input, target, options = make("cpu", dtype, (7001, 101), "C", "N1")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(values(binary_cross_entropy_with_logits, input, target, options, torch.tensor(1.3)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(results[0], result)


@weightings
@reductions
def test_compile_fullgraph(device, reduction, weight, pos_weight):
    input, target, options = make(device, torch.float32, (7, 5), weight, pos_weight)
    options["reduction"] = reduction
    compiled = torch.compile(binary_cross_entropy_with_logits, fullgraph=True)
    grad_output = upstream(reduction, input)
    torch.testing.assert_close(
        values(compiled, input, target, options, grad_output), values(eager, input, target, options, grad_output)
    )


def test_compile_with_any_batch_size(device):
    """One graph for all of them."""
    compilations = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(binary_cross_entropy_with_logits, fullgraph=True, dynamic=True, backend=compilations)
    for batch in (3, 8, 65):
        input, target, options = make(device, torch.float32, (batch, 5))
        grad_output = upstream("mean", input)
        ours, theirs = (values(f, input, target, options, grad_output) for f in (compiled, eager))
        torch.testing.assert_close(ours, theirs)
    assert compilations.frame_count == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@weightings
def test_functional_transforms(device, weight, pos_weight):
    input, target, options = make(device, shape=(4, 3), weight=weight, pos_weight=pos_weight)
    input, target = input.detach(), target.detach()
    tangents = torch.randn_like(input), torch.randn_like(target)
    ours, theirs = ((lambda i, t, f=f: f(i, t, **options)) for f in BOTH)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
        for argument in range(2):
            expected = transform(theirs, argument)(input, target)
            torch.testing.assert_close(transform(ours, argument)(input, target), expected)
    torch.testing.assert_close(*(torch.func.jvp(f, (input, target), tangents) for f in (ours, theirs)))
    rows = [torch.func.vmap(lambda i, t, f=f: f(i, t, reduction="none"))(input, target) for f in BOTH]
    torch.testing.assert_close(*rows)


@weightings
@reductions
def test_vmap_over_a_backward_pass(device, reduction, weight, pos_weight):
    input, target, options = make(device, weight=weight, pos_weight=pos_weight)
    grad_outputs = torch.stack([upstream(reduction, input) for _ in range(3)])

    def of_each(function):
        loss = function(input, target, reduction=reduction, **options)
        return torch.func.vmap(lambda v: torch.autograd.grad(loss, (input, target), v, retain_graph=True))(grad_outputs)

    torch.testing.assert_close(of_each(binary_cross_entropy_with_logits), of_each(eager))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@dtypes
def test_autocast(device, dtype, autocast):
    """float32 on any device, but for float64."""
    input, target, options = make(device, dtype)
    grad_output = upstream("mean", input)
    results = []
    for function in BOTH:
        with torch.autocast(device, autocast):
            loss = function(input, target, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, (input, target), grad_output.to(loss.dtype))))
    assert results[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("of_target", DTYPES, ids=str)
@pytest.mark.parametrize("of_weight", [*DTYPES, torch.int64, torch.bool], ids=str)
@dtypes
def test_dtypes_may_differ(device, dtype, of_target, of_weight):
    """As in torch the loss is of the dtype of target, computed in the wider one."""
    input, target, _ = make(device, dtype)
    target = target.detach().to(of_target).requires_grad_()
    weight = torch.tensor([1, 0, 2, 3, 1], device=device).to(of_weight)
    options = {"weight": weight, "reduction": "none"}
    options |= {} if of_weight == torch.bool else {"pos_weight": weight[:1]}
    grad_output = torch.randn(7, 5, device=device).to(of_target)
    ours, theirs = (values(function, input, target, options, grad_output) for function in BOTH)
    truth = values(eager, *to(torch.float64, input, target, options), grad_output)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, true.to(our.dtype))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_scalar_weight_on_the_cpu(device):
    input, target, _ = make(device)
    options = {"weight": torch.tensor(0.7), "pos_weight": torch.tensor(2.0)}
    grad_output = upstream("mean", input)
    torch.testing.assert_close(*(values(function, input, target, options, grad_output) for function in BOTH))


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_have_no_gradient(device, name):
    input, target, options = make(device)
    options[name].requires_grad_()
    for function in BOTH:
        with pytest.raises(RuntimeError, match=name):
            function(input, target, **options)
        with pytest.raises(RuntimeError, match=name):
            function(input.detach(), target.detach(), **options)
    with torch.no_grad():
        torch.testing.assert_close(*(function(input, target, **options) for function in BOTH))

    def of_weight(function):
        return lambda w: function(input.detach(), target.detach(), **{**options, name: w})

    grads = [torch.func.grad(of_weight(function))(options[name].detach()) for function in BOTH]
    torch.testing.assert_close(*grads)


def test_deprecated_reduction_arguments(device):
    input, target, _ = make(device)
    for arguments in ((False,), (None, False), (True, False), (True, True)):
        with pytest.warns(UserWarning, match="size_average"):
            ours = binary_cross_entropy_with_logits(input, target, None, *arguments)
        with pytest.warns(UserWarning, match="size_average"):
            theirs = eager(input, target, None, *arguments)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, y, w, p: (x, y[:6], w, p), r"expected target of shape \(7, 5\), got \(6, 5\)"),
        (lambda x, y, w, p: (x, y[:, :1], w, p), r"expected target of shape \(7, 5\), got \(7, 1\)"),
        (lambda x, y, w, p: (x, y.long(), w, p), "expected target of the dtype of input, Double, got Long"),
        (lambda x, y, w, p: (x, y > 0.5, w, p), "expected target of a floating-point dtype, got torch.bool"),
        (lambda x, y, w, p: (x.long(), y, w, p), "expected input of a floating-point dtype, got torch.int64"),
        (lambda x, y, w, p: (x.long(), y.long(), w, p), "expected input of a floating-point dtype, got torch.int64"),
        (lambda x, y, w, p: (x, y, w[:4], p), r"expected weight that broadcasts to .* \(7, 5\), got \(4,\)"),
        (lambda x, y, w, p: (x, y, w, p[:2]), r"expected pos_weight that broadcasts to .* \(7, 5\), got \(2,\)"),
        (lambda x, y, w, p: (x[:, :1], y[:, :1], w, None), r"expected weight that broadcasts to .* \(7, 1\)"),
        (lambda x, y, w, p: (x, y, w[None, None], p), r"expected weight that broadcasts to .*, got \(1, 1, 5\)"),
        (lambda x, y, w, p: (x, y, None, p[None, None]), r"expected pos_weight that broadcasts to .*, got \(1, 1, 5\)"),
        (lambda x, y, w, p: (x[0, 0], y[0, 0], w, p), r"expected weight that broadcasts to .* \(\), got \(5,\)"),
        (lambda x, y, w, p: (x, y, w * 1j, p), "expected weight of the dtype of input, Double, got ComplexDouble"),
        (lambda x, y, w, p: (x, y, w, p * 1j), "expected pos_weight of the dtype of input, Double, got Complex"),
        (lambda x, y, w, p: (x, y, w, p > 1), "expected pos_weight of a floating-point dtype, got torch.bool"),
    ],
)
def test_errors(device, change, sentence):
    """Of the class of torch's own, which for some dtypes is a wider one before torch 2.14."""
    input, target, options = make(device)
    x, y, w, p = change(input.detach(), target.detach(), *options.values())
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - torch's own
        eager(x, y, w, pos_weight=p)
    with pytest.raises(theirs.type, match="^binary_cross_entropy_with_logits: " + sentence) as ours:
        binary_cross_entropy_with_logits(x, y, w, pos_weight=p)
    assert ours.type in (theirs.type, NotImplementedError)


def test_option_errors(device):
    input, target, _ = make(device)
    sentence = "binary_cross_entropy_with_logits: expected reduction to be one of none, mean, sum, got 'avg'"
    with pytest.raises(ValueError, match=sentence):
        binary_cross_entropy_with_logits(input, target[:2], reduction="avg")


def test_ops_check_their_arguments(device):
    input, target, options = make(device)
    x, y, w = input.detach(), target.detach(), options["weight"]
    forward = torch.ops.torch_mlp.binary_cross_entropy_with_logits
    backward = torch.ops.torch_mlp._binary_cross_entropy_with_logits_backward
    one = torch.ones((), dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"expected target of shape \(7, 5\), got \(7, 4\)"):
        forward(x, y[:, :4], None, None, "mean")
    with pytest.raises(RuntimeError, match="expected reduction to be one of none, mean, sum, got 'avg'"):
        forward(x, y, None, None, "avg")
    bad = {
        r"grad_output of shape \(\), got \(7, 5\)": (x, "mean"),
        r"grad_output of shape \(7, 5\), got \(\)": (one, "none"),
        r"grad_output of the dtype of input, Double, got Float": (one.float(), "sum"),
    }
    for sentence, (grad_output, reduction) in bad.items():
        with pytest.raises(RuntimeError, match="_binary_cross_entropy_with_logits_backward: expected " + sentence):
            backward(grad_output, x, y, w, None, reduction, True, True)
