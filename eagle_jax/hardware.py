"""Peak figures of accelerators from their data sheets: memory, bandwidth and FLOP/s.

Evaluation uses the bandwidth for MBU, training the FLOP/s for MFU, and ahead-of-time compilation
all three. The module does not import JAX and finds a device by its `device_kind`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        names: consecutive words of the `device_kind` that identify it.
        memory: size of the device's memory in GiB.
        bandwidth: peak bytes per second between the device and its memory.
        flops: peak dense bfloat16 FLOP/s, or None if it is not listed here.
    """

    names: tuple[str, ...]
    memory: float
    bandwidth: float
    flops: float | None = None


# The first match is taken, so a longer name stands before a name that is part of it. The figures
# are from NVIDIA's "Tensor Core GPU" data sheets (dense, without sparsity) and from the "system
# architecture" pages of cloud.google.com/tpu/docs (one chip). The memory of H100 SXM and H200 is
# what the driver reports; for other GPUs it is the nominal size.
DEVICES = (
    Device(("H100 PCIe",), 80, 2.04e12, 756e12),
    Device(("H100 NVL",), 94, 3.94e12, 835e12),
    Device(("H100",), 79.6, 3.35e12, 989e12),
    Device(("H200",), 140.4, 4.8e12, 989e12),
    Device(("GH200 480GB",), 96, 4.02e12),
    Device(("GH200",), 144, 4.9e12),
    Device(("B200",), 180, 8.0e12),
    Device(("A100 SXM4 40GB", "A100 PCIE 40GB"), 40, 1.555e12, 312e12),
    Device(("A100 80GB PCIe",), 80, 1.935e12, 312e12),
    Device(("A100",), 80, 2.039e12, 312e12),
    Device(("V100",), 16, 0.9e12),
    Device(("A10G", "A10"), 24, 0.6e12),
    Device(("L40S", "L40"), 48, 0.864e12),
    Device(("L4",), 24, 0.3e12, 121e12),
    Device(("T4",), 16, 0.32e12, 65e12),
    Device(("RTX 4090",), 24, 1.008e12),
    Device(("RTX 3090",), 24, 0.936e12),
    Device(("RTX A6000",), 48, 0.768e12),
    Device(("TPU v4",), 32, 1.228e12, 275e12),
    Device(("TPU v5 lite", "TPU v5e"), 16, 0.819e12, 197e12),
    Device(("TPU v5p", "TPU v5"), 95, 2.765e12, 459e12),
    Device(("TPU v6 lite", "TPU v6e"), 32, 1.64e12, 918e12),
    Device(("TPU7x",), 192, 7.37e12),
)


def find(device_kind: str) -> Device | None:
    """Returns the device that JAX calls `device_kind`, or None for CPUs and unknown devices.

    Whole words are compared, so an L40 is not taken for an L4.
    """
    words = device_kind.replace("-", " ").split()
    for device in DEVICES:
        for name in device.names:
            parts = name.split()
            if any(words[i : i + len(parts)] == parts for i in range(len(words))):
                return device
    return None


def peak_bandwidth(device_kind: str) -> float | None:
    """Returns the peak bytes per second between a device and its memory, or None if unknown."""
    device = find(device_kind)
    return None if device is None else device.bandwidth


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak dense bfloat16 FLOP/s of one device, or None if unknown."""
    device = find(device_kind)
    return None if device is None else device.flops
