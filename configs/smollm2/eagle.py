"""An EAGLE-1 draft (also used by EAGLE-2) for SmolLM2-135M-Instruct.

`configs/smollm2/eagle3.py` has the command that trains all drafts of this target.
"""

from eagle_jax.config import DataConfig, EagleConfig, FeatureRegression, OptimConfig, TrainConfig

config = TrainConfig(
    output_dir="runs/smollm2/eagle",
    objective=FeatureRegression(
        draft=EagleConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            rope_theta=100000.0,
        ),
        target="runs/smollm2/model/target",
        feature_weight=1.0,
        token_weight=1.0,
        noise=0.1,
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="runs/smollm2/model/target",
        sequence_length=1024,
        batch_size=32,
    ),
    optim=OptimConfig(
        learning_rate=1e-3,
        steps=2000,
        warmup_steps=100,
        schedule="cosine",
        final_fraction=0.02,
        clip_value=0.5,
    ),
    attention="cudnn",
    eval_batches=8,
    keep_checkpoints=1,
)
