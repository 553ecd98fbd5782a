"""The precision of the products between hidden layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile

from pmoe_lightning.hamiltonian import differentiable
from pmoe_lightning.modules.critics import make_qvalue_network, stacked_qvalue, stacked_qvalue_at
from pmoe_lightning.modules.networks import (
    hidden_product,
    make_mlp,
    matmul_precision,
    over_float32,
    set_matmul_precision,
)
from pmoe_lightning.updates.compilation import compile_tensors


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    set_matmul_precision("float32")


def test_only_products_between_hidden_layers_are_taken_in_bfloat16():
    torch.manual_seed(0)
    x = torch.randn(8, 5)
    first, relu, hidden, _ = layers = make_mlp(5, (32, 32), "relu", "default")
    exact = layers(x)
    set_matmul_precision("bf16-hidden")
    h = relu(torch.nn.functional.linear(x, first.weight, first.bias))
    rounded = (h.bfloat16() @ hidden.weight.bfloat16().T).float() + hidden.bias
    assert torch.equal(layers(x), relu(rounded))
    assert not torch.equal(layers(x), exact)
    torch.testing.assert_close(layers(x), exact, rtol=0, atol=0.02)  # 32 factors of 8 bits each


@pytest.mark.parametrize("precision", ["bf16-hidden", "float32-onednn"])
def test_the_time_of_a_product_is_measured_and_leaves_no_trace(precision):
    drawn, threads = torch.get_rng_state(), torch.get_num_threads()
    set_matmul_precision(precision)
    assert 0.0 < over_float32("bf16-hidden", size=64, pairs=3) < float("inf")
    assert matmul_precision() == precision
    assert torch.equal(torch.get_rng_state(), drawn) and torch.get_num_threads() == threads


@pytest.fixture
def onednn(monkeypatch):
    """Asked for every product of float32 matrices on a CPU, however small; counts them."""
    calls, real = [], torch.ops.pmoe_lightning.product

    def counted(x, y):
        calls.append((x.shape, y.shape))
        return real(x, y)

    monkeypatch.setattr("pmoe_lightning.modules.onednn.SMALLEST", 0)
    monkeypatch.setattr(torch.ops.pmoe_lightning, "product", counted)
    set_matmul_precision("float32-onednn")
    return calls


#: A layer, a layer with rows of several dimensions, critics with weights of their own, and with inputs in common.
FACTORS = [((7, 5), (5, 3)), ((4, 7, 5), (5, 3)), ((2, 7, 5), (2, 5, 3)), ((1, 7, 5), (2, 5, 3))]


@pytest.mark.parametrize("shapes", FACTORS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_onednn_and_their_derivatives_are_those_of_torch(shapes, transposed, onednn):
    """Transposed factors are read as they lie; of the derivatives those that are asked for."""
    torch.manual_seed(0)
    x, y = (torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if transposed else torch.randn(shape) for shape in shapes)
    x.requires_grad_(), y.requires_grad_()
    slope = torch.randn_like(x @ y)
    found, expected = hidden_product(x, y), x @ y
    torch.testing.assert_close(found, expected)
    assert onednn
    for leaves in ([x, y], [x], [y]):
        slopes = (torch.autograd.grad((slope * z).sum(), leaves, retain_graph=True) for z in (found, expected))
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other)


def test_products_of_onednn_under_vmap_and_with_numbers_that_are_not_finite(onednn):
    x, y = torch.randn(3, 7, 5), torch.randn(3, 5, 4)
    torch.testing.assert_close(torch.vmap(hidden_product)(x, y), x @ y)
    torch.testing.assert_close(torch.vmap(hidden_product, (0, None), 1)(x, y[0]), (x @ y[0]).movedim(0, 1))
    x[0, 2, 1] = torch.nan
    x[0, 3, 1] = torch.inf
    torch.testing.assert_close(hidden_product(x[0], y[0]), x[0] @ y[0], equal_nan=True)


def test_what_onednn_is_not_asked_for_is_torchs_product(onednn, monkeypatch):
    """Other types, nothing to multiply, a graph for export, and products that are too small to be worth it."""

    class Network(torch.nn.Module):
        def forward(self, x):
            return hidden_product(x, x.mT)

    for x in (torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6).bfloat16()):
        assert torch.equal(hidden_product(x, x), x @ x)
    program = torch.export.export(Network(), (torch.randn(6, 6),))
    assert not any("pmoe_lightning" in str(node.target) for node in program.graph.nodes)
    monkeypatch.setattr("pmoe_lightning.modules.onednn.SMALLEST", 2**22)
    for rows in (0, 63):
        x, y = torch.randn(rows, 256), torch.randn(256, 256)
        assert torch.equal(hidden_product(x, y), x @ y)
    assert not onednn
    hidden_product(torch.randn(64, 256), y)
    assert len(onednn) == 1


@pytest.mark.slow
def test_a_program_calls_the_kernel_of_onednn_not_the_operator(monkeypatch):
    """The operator is Python: a program of sixteen products would wait for it as long as for two of them."""

    def products(x, y):
        h = hidden_product(x, y.mT).relu()
        return (hidden_product(h, y), hidden_product(h.mT, x))

    monkeypatch.setattr("pmoe_lightning.modules.onednn.SMALLEST", 0)
    set_matmul_precision("float32-onednn")
    x, y = torch.randn(64, 32), torch.randn(32, 32)
    expected = products(x, y)
    program = compile_tensors(products, [x], [y], "products")
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as record:
        found = program(x, y)
    torch.testing.assert_close(found, expected)
    assert "pmoe_lightning::product" not in {event.key for event in record.key_averages()}


def test_networks_of_one_hidden_layer_stay_exact_in_bf16_hidden():
    torch.manual_seed(0)
    network = make_qvalue_network(5, 2, hidden_sizes=(32,)).module
    inputs = torch.randn(8, 5), torch.randn(8, 2)
    exact = network(*inputs)
    set_matmul_precision("bf16-hidden")
    assert torch.equal(network(*inputs), exact)


def test_the_critics_written_out_derivative_takes_its_products_in_the_same_precision():
    """Close to the automatic one in bfloat16, and much closer to it than to the exact one."""
    torch.manual_seed(0)
    networks = [make_qvalue_network(5, 2, hidden_sizes=(32, 32)).module for _ in range(2)]
    parameters = TensorDict.from_modules(*networks).detach()
    observation, action = torch.randn(64, 5), torch.rand(64, 2)

    def both_forms() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        values, pullback = stacked_qvalue_at(networks[0], parameters, observation)(action)
        layers = networks[0].stacked_layers(parameters)
        at = partial(stacked_qvalue, *layers, networks[0].layers[1], observation)
        automatic, automatic_pullback = differentiable(at)(action)
        ones = torch.ones_like(values)
        return [values, pullback(ones)], [automatic, automatic_pullback(ones)]

    exact, _ = both_forms()
    set_matmul_precision("bf16-hidden")
    for found, expected, single in zip(*both_forms(), exact, strict=True):
        assert (found - expected).norm() < 0.3 * (single - expected).norm()


def test_tf32_is_torchs_own_setting_and_float32_takes_it_back():
    set_matmul_precision("tf32")
    assert torch.get_float32_matmul_precision() == "high"
    set_matmul_precision("float32")
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="bf16-hidden"):
        set_matmul_precision("float16")
