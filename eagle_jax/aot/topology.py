"""Describes absent devices: TPU slices through libtpu, and GPUs through XLA's target config."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

# GPUs for XLA's target_config, by kind: name, bytes of memory, memory bandwidth in bytes/s. These
# are the figures that the driver reports; `eagle_jax.hardware` has those of the data sheets.
_GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 85_520_000_000, 3_352_320_000_000),
    "h200": ("NVIDIA H200", 150_750_000_000, 4_814_000_000_000),
}
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""


def devices(topology: str) -> list[Any]:
    """Returns the devices of a topology; this machine need not have them.

    Raises:
        ValueError: libtpu or JAX's CUDA plugin is not installed, or the topology is unknown.
    """
    if topology.partition(":")[0] in _GPUS:
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology={topology!r}: libtpu is not installed; pip install 'eagle-jax[tpu]'"
        )
    # No TPU is present, so libtpu must neither look for one nor lock it.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # libtpu raises exceptions of its own types
        said = str(error).strip().splitlines()[0]
        raise ValueError(
            f"topology={topology!r}: {said}; e.g. v5e:2x4, v5p:2x2x2, h100:2"
        ) from error


def _gpus(topology: str) -> list[Any]:
    kind, _, number = topology.partition(":")
    if number not in map(str, range(1, 9)):
        raise ValueError(f"topology={topology!r}: give 1 to 8 GPUs, as in {kind}:2")
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if not any(installed(plugin) for plugin in plugins):
        raise ValueError(
            f"topology={topology!r}: JAX's CUDA plugin is not installed; pip install "
            "'eagle-jax[cuda]'"
        )
    # No driver is present, so the plugin must not check its version.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    name, memory, bandwidth = _GPUS[kind]
    target = _HOPPER.format(name=name, memory=memory, bandwidth=bandwidth)
    try:
        found = topologies.get_topology_desc(
            kind, platform="cuda", target_config=target, topology=f"1x1x{number}"
        )
    except Exception as error:  # the plugin raises exceptions of its own types
        raise ValueError(f"topology={topology!r}: {str(error).strip().splitlines()[0]}") from error
    return list(found.devices)


def installed(name: str) -> bool:
    """Returns whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
