"""Memory of loading: weights go to their devices one by one, measured in a process of their own.

The checkpoint is sparse: it has the sizes of a model and takes no disk. `EAGLE_JAX_BIG=1` also
loads one of the shape of Llama-3.1-8B, which needs 21 GB of memory.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_jax.checkpoint import hf
from eagle_jax.checkpoint.names import disk_shapes
from eagle_jax.config import TransformerConfig

# 0.98 GB in bfloat16; its largest tensor has 131 MB.
ONE = TransformerConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
)
EIGHT = TransformerConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=5e5,
)
BIG = pytest.mark.skipif(
    os.environ.get("EAGLE_JAX_BIG") != "1", reason="needs 21 GB; set EAGLE_JAX_BIG=1"
)

PROGRAM = """
import collections, json, resource, sys
import jax
import eagle_jax
from eagle_jax.sharding import make_mesh

sharding = make_mesh(fsdp=8) if sys.argv[2] == "mesh" else None
jax.block_until_ready(jax.numpy.zeros(8))
pages = int(open("/proc/self/statm").read().split()[1])
before = pages * resource.getpagesize()
params = eagle_jax.load(sys.argv[1], dtype="bfloat16", sharding=sharding)
# Not ru_maxrss, which begins with what the process had that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024 - before
held = collections.Counter()
for array in params.target.values():
    for shard in array.addressable_shards:
        held[shard.device.id] += shard.data.nbytes
print(json.dumps({"peak": peak, "held": list(held.values())}))
"""


def sparse(directory: Path, config: TransformerConfig, shards: int) -> int:
    """Writes a sharded checkpoint of zeros without its zeros; returns the bytes of its weights."""
    hf.save_target(directory, tiny := _tiny(), _zeros(tiny))  # for a config.json of true form
    settings = json.loads((directory / "config.json").read_text())
    settings |= {key: getattr(config, key) for key in settings if hasattr(config, key)}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "model.safetensors").unlink()
    shapes = list(disk_shapes(config).items())
    per_shard = -(-len(shapes) // shards)
    weight_map, total = {}, 0
    for number in range(shards):
        name, end = f"model-{number + 1:05d}-of-{shards:05d}.safetensors", 0
        header = {}
        for tensor, shape in shapes[number * per_shard : (number + 1) * per_shard]:
            start, end = end, end + 2 * math.prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with open(directory / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _tiny() -> TransformerConfig:
    return TransformerConfig(8, 4, 4, 1, 1, 1, 4)


def _zeros(config: TransformerConfig):
    import numpy as np

    return {name: np.zeros(shape, np.float32) for name, shape in hf.shapes(config).items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("where", ["device", "mesh"])
@pytest.mark.parametrize(
    "config", [pytest.param(ONE, id="1GB"), pytest.param(EIGHT, id="8B", marks=BIG)]
)
def test_memory_stays_near_the_model(tmp_path, config, where):
    """Catches weights that are all read before they are placed, which takes the model twice, and
    a device of a mesh that holds more than its share."""
    size = sparse(tmp_path, config, 4)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), where], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{size / 1e9:.2f} GB: peak {found['peak'] / size:.2f} of it")
    assert size < found["peak"] < 1.3 * size
    if where == "mesh":
        assert len(found["held"]) == 8
        assert max(found["held"]) < 1.01 * size / 8
        assert sum(found["held"]) < 1.01 * size
