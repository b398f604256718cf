"""Peaks of devices are looked up by the name that JAX gives them."""

import pytest

from eagle_jax import hardware


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.04e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA L40S", 0.864e12),
        ("NVIDIA L4", 0.3e12),
        ("TPU v5 lite", 0.819e12),
        ("TPU v5", 2.765e12),
        ("cpu", None),
        ("NVIDIA L44", None),
    ],
)
def test_peak_bandwidth(kind, peak) -> None:
    """Catches one device taken for another whose name it contains."""
    assert hardware.peak_bandwidth(kind) == peak


def test_peak_flops_goes_by_whole_words():
    """Catches one device taken for another whose name it contains."""
    peak = hardware.peak_flops
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak("NVIDIA L4") == 121e12 and peak("NVIDIA L40S") is None
    assert peak("TPU v5 lite") == 197e12 and peak("TPU v5p") == peak("TPU v5") == 459e12
    assert peak("TPU v6 lite") == 918e12
    assert peak("cpu") is None


def test_one_table_has_all_that_is_asked_of_a_device():
    """Catches an entry that an earlier one hides, and figures in other units."""
    for device in hardware.DEVICES:
        for name in device.names:
            assert hardware.find(f"NVIDIA {name}") is device, name
        assert 10 < device.memory < 300 and 1e11 < device.bandwidth < 1e13
        assert device.flops is None or 1e13 < device.flops < 1e16
