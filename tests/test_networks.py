"""The precision of the products between hidden layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict

from pmoe_lightning.hamiltonian import differentiable
from pmoe_lightning.modules.critics import make_qvalue_network, stacked_qvalue, stacked_qvalue_at
from pmoe_lightning.modules.networks import bfloat16_over_float32, make_mlp, matmul_precision, set_matmul_precision


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


def test_the_time_of_bfloat16_is_measured_and_leaves_no_trace():
    drawn, threads = torch.get_rng_state(), torch.get_num_threads()
    set_matmul_precision("bf16-hidden")
    assert 0.0 < bfloat16_over_float32(size=64, pairs=3) < float("inf")
    assert matmul_precision() == "bf16-hidden"
    assert torch.equal(torch.get_rng_state(), drawn) and torch.get_num_threads() == threads


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
