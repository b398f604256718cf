"""An EAGLE-1 draft for the shipped target, trained on a CPU in minutes on the repository's sample.

    eagle-jax train --config configs/tiny/eagle_cpu.py

The sample consists of conversations that the shipped target generated from prompts that we wrote
(`train/sample/`). Validation top-1 and acceptance length should end far above those of an untrained
draft and below those of the shipped draft, which saw 400 times as much text.
"""

from eagle_jax.config import DataConfig, EagleConfig, FeatureRegression, OptimConfig, TrainConfig

config = TrainConfig(
    output_dir="runs/tiny/eagle_cpu",
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
    ),
    data=DataConfig(
        train=("train/sample/conversations.jsonl.gz",),
        validation=("train/sample/validation.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=256,
        batch_size=4,
    ),
    optim=OptimConfig(
        learning_rate=2e-3,
        steps=600,
        warmup_steps=40,
        schedule="cosine",
        final_fraction=0.05,
        clip_value=0.5,
    ),
    compute_dtype="float32",
    eval_every=100,
    checkpoint_every=100,
    export_dtype="bfloat16",
)
