"""Four Medusa heads for SmolLM2-135M-Instruct, which share the target's vocabulary matrix.

`configs/smollm2/eagle3.py` has the command that trains all drafts of this target.
"""

from eagle_jax.config import DataConfig, MedusaConfig, MedusaTraining, OptimConfig, TrainConfig

config = TrainConfig(
    output_dir="runs/smollm2/medusa",
    objective=MedusaTraining(
        draft=MedusaConfig(vocab_size=49152, hidden_size=576, num_heads=4, tie_lm_head=True),
        target="runs/smollm2/model/target",
        decay=0.8,
        labels="soft",
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="runs/smollm2/model/target",
        sequence_length=1024,
        batch_size=16,
    ),
    optim=OptimConfig(
        learning_rate=2e-3,
        steps=1500,
        warmup_steps=40,
        schedule="cosine",
    ),
    attention="cudnn",
    eval_batches=4,
    keep_checkpoints=1,
)
