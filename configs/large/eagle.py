"""The EAGLE-1 draft of `configs/large/target.py`; benchmarks/large_pair.py trains it.

Objective and optimizer are those of `configs/tiny/eagle.py`. The draft's MLP is half as wide as the
target's.
"""

from eagle_jax.config import DataConfig, EagleConfig, FeatureRegression, OptimConfig, TrainConfig

config = TrainConfig(
    output_dir="runs/large/eagle",
    objective=FeatureRegression(
        draft=EagleConfig(
            vocab_size=8192,
            hidden_size=2048,
            intermediate_size=2816,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
        ),
        target="runs/large/model/target",
        feature_weight=1.0,
        token_weight=1.0,
        noise=0.1,
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=16,
    ),
    optim=OptimConfig(
        learning_rate=5e-4,
        steps=1000,
        warmup_steps=50,
        schedule="cosine",
        final_fraction=0.02,
        clip_value=0.5,
    ),
    attention="cudnn",
    eval_batches=8,
    keep_checkpoints=1,
)
