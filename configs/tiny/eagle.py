"""The EAGLE-1 draft of the shipped pair.

    eagle-jax train --config configs/tiny/eagle.py \\
        --set "data.train=('data/answers.jsonl',)"

Objective and optimizer are the paper's (section 4.2: smooth L1 + soft cross-entropy, uniform noise
of 0.1, AdamW with betas 0.9 and 0.95, clipping at 0.5, linear warm-up) except for two numbers,
because this draft is much smaller than one for a 7B target: the cross-entropy has weight 1 instead
of 0.1, and the learning rate is 30 times the paper's 3e-5.
"""

from eagle_jax.config import DataConfig, EagleConfig, FeatureRegression, OptimConfig, TrainConfig

config = TrainConfig(
    output_dir="runs/tiny/eagle",
    objective=FeatureRegression(
        draft=EagleConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1408,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
        ),
        target="tiny",
        feature_weight=1.0,
        token_weight=1.0,
        noise=0.1,
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=64,
    ),
    optim=OptimConfig(
        learning_rate=1e-3,
        steps=3500,
        warmup_steps=100,
        schedule="cosine",
        final_fraction=0.02,
        clip_value=0.5,
    ),
    eval_every=500,
    eval_batches=8,
    checkpoint_every=2000,
)
