"""Llama-2-7B shapes and an EAGLE-1 head on one H100, drafting EAGLE-2's trees.

eagle-jax compile --config configs/aot/gpu_7b.py
eagle-jax compile --config configs/aot/gpu_7b.py --set quantize_drafts=int8
"""

from eagle_jax.aot import AotConfig
from eagle_jax.config import EagleConfig, TransformerConfig
from eagle_jax.decode import DynamicTree, Eagle

config = AotConfig(
    topology="h100:1",
    target=TransformerConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    draft=EagleConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    ),
    method=Eagle(DynamicTree(depth=6, k=10, drafted=59)),
    prompt=512,
    new_tokens=512,
)
