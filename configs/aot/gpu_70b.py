"""Llama-3.3-70B shapes and an EAGLE-3 draft of its width on two H200.

eagle-jax compile --config configs/aot/gpu_70b.py
eagle-jax compile --config configs/aot/gpu_70b.py --set topology=h100:4 --set tensor=4
"""

from eagle_jax.aot import AotConfig
from eagle_jax.config import Eagle3Config, RopeScaling, TransformerConfig
from eagle_jax.decode import DynamicTree, Eagle

config = AotConfig(
    topology="h200:2",
    target=TransformerConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=8192),
        max_position_embeddings=131072,
    ),
    draft=Eagle3Config(
        vocab_size=128256,
        draft_vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        aux_layers=(2, 40, 77),
    ),
    method=Eagle(DynamicTree(depth=6, k=10, drafted=59), head="eagle3"),
    tensor=2,
)
