"""The shipped target and an EAGLE-1 draft on one v5e host: compiles in seconds.

eagle-jax compile --config configs/aot/tiny.py
"""

from eagle_jax.aot import AotConfig
from eagle_jax.config import (
    DataConfig,
    EagleConfig,
    FeatureRegression,
    OptimConfig,
    TrainConfig,
    TransformerConfig,
)
from eagle_jax.decode import Eagle, chain

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
DRAFT = EagleConfig(**SHAPE)

config = AotConfig(
    topology="v5e:2x4",
    target=TransformerConfig(**SHAPE, num_hidden_layers=2, tie_word_embeddings=True),
    draft=DRAFT,
    method=Eagle(chain(3)),
    tensor=2,
    batch_size=4,
    prompt=128,
    new_tokens=128,
    train=TrainConfig(
        output_dir="-",
        objective=FeatureRegression(draft=DRAFT, target="-"),
        data=DataConfig(train=(), tokenizer="-", sequence_length=128, batch_size=8),
        optim=OptimConfig(learning_rate=1e-3, steps=100),
        fsdp=4,
        tensor=2,
    ),
)
