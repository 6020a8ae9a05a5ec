"""Products of float32 matrices that may round their inputs."""

import pytest
import torch

from tensorfold.utils.torch_modes import rounded_products


def _error(m: int = 64) -> float:
    left, right = torch.randn(2, m, m, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("amx_bf16"), reason="oneDNN rounds with AMX alone")
def test_products_are_rounded_within_the_block_only():
    assert _error() < 1e-6
    with rounded_products():
        assert 1e-4 < _error() < 1e-2
    assert _error() < 1e-6
    with rounded_products(False):
        assert _error() < 1e-6


def test_the_callers_setting_comes_back_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(ValueError, match="inside"), rounded_products():
        raise ValueError("inside")
    assert before == (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


@pytest.mark.usefixtures("exact_products")
def test_nothing_is_rounded_where_the_processor_gains_nothing_by_it():
    with rounded_products():
        assert _error() < 1e-6
