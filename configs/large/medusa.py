"""Medusa heads of `configs/large/target.py`; benchmarks/large_pair.py trains them.

As in `configs/tiny/medusa.py`, three heads share the target's output head.
"""

from eagle_jax.config import DataConfig, MedusaConfig, MedusaTraining, OptimConfig, TrainConfig

config = TrainConfig(
    output_dir="runs/large/medusa",
    objective=MedusaTraining(
        draft=MedusaConfig(vocab_size=8192, hidden_size=2048, num_heads=3, tie_lm_head=True),
        target="runs/large/model/target",
        decay=0.8,
        labels="soft",
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=16,
    ),
    optim=OptimConfig(
        learning_rate=1e-3,
        steps=1000,
        warmup_steps=40,
        schedule="cosine",
    ),
    attention="cudnn",
    eval_batches=4,
    keep_checkpoints=1,
)
