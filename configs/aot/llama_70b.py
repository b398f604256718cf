"""Llama-3.3-70B shapes and an EAGLE-3 draft of its width on a v5p-16 slice (8 chips).

eagle-jax compile --config configs/aot/llama_70b.py
eagle-jax compile --config configs/aot/llama_70b.py --set topology=v6e:2x4
"""

from eagle_jax.aot import AotConfig
from eagle_jax.config import (
    DataConfig,
    Eagle3Config,
    OptimConfig,
    RopeScaling,
    TrainConfig,
    TrainingTimeTest,
    TransformerConfig,
)
from eagle_jax.decode import DynamicTree, Eagle

TARGET = TransformerConfig(
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
)
DRAFT = Eagle3Config(
    vocab_size=128256,
    draft_vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    aux_layers=(2, 40, 77),
)

config = AotConfig(
    topology="v5p:2x2x2",
    target=TARGET,
    draft=DRAFT,
    method=Eagle(DynamicTree(depth=6, k=10, drafted=59), head="eagle3"),
    tensor=8,
    train=TrainConfig(
        output_dir="-",
        objective=TrainingTimeTest(draft=DRAFT, target="-"),
        data=DataConfig(train=(), tokenizer="-", sequence_length=2048, batch_size=8),
        optim=OptimConfig(learning_rate=5e-5, steps=1000, clip_norm=0.5),
        tensor=8,
        remat=True,
    ),
)
