"""An EAGLE-3 draft for the shipped target, over the 5120 tokens that answers use most.

    eagle-jax train --config configs/tiny/eagle3.py \\
        --set "data.train=('data/answers.jsonl',)"

Objective and clipping are those of the paper and its code (training-time test of 7 steps with
weights 0.8^j, AdamW with betas 0.9 and 0.95, clipping the global norm at 0.5), except that means
are over the rows that the loss counts instead of all rows. The fused features are those of layers
2, 4 and 6 (the last one). For 6 layers the official rule (2, L // 2 and L - 3) gives only two
different layers, which the official code rejects.
"""

from eagle_jax.config import DataConfig, Eagle3Config, OptimConfig, TrainConfig, TrainingTimeTest

config = TrainConfig(
    output_dir="runs/tiny/eagle3",
    objective=TrainingTimeTest(
        draft=Eagle3Config(
            vocab_size=8192,
            draft_vocab_size=5120,
            hidden_size=512,
            intermediate_size=896,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            aux_layers=(2, 4, 6),
            fc_norm=True,
            norm_output=True,
        ),
        target="tiny",
        steps=7,
        decay=0.8,
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=64,
    ),
    optim=OptimConfig(
        learning_rate=2e-3,
        steps=3500,
        warmup_steps=100,
        schedule="cosine",
        final_fraction=0.02,
        clip_norm=0.5,
    ),
    eval_every=500,
    eval_batches=8,
    checkpoint_every=1000,
)
