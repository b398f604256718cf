"""The EAGLE-3 draft of `configs/large/target.py`; benchmarks/large_pair.py trains it.

The objective is that of `configs/tiny/eagle3.py` with fewer steps. The fused layers follow the
official rule 2, L // 2, L - 3. The MLP is as wide as in `configs/large/eagle.py`.
"""

from eagle_jax.config import DataConfig, Eagle3Config, OptimConfig, TrainConfig, TrainingTimeTest

config = TrainConfig(
    output_dir="runs/large/eagle3",
    objective=TrainingTimeTest(
        draft=Eagle3Config(
            vocab_size=8192,
            draft_vocab_size=5120,
            hidden_size=2048,
            intermediate_size=2816,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
            aux_layers=(2, 12, 21),
            fc_norm=True,
            norm_output=True,
        ),
        target="runs/large/model/target",
        steps=5,  # the depth of the trees in configs/eval/large.py
        decay=0.8,
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=16,
    ),
    optim=OptimConfig(
        learning_rate=6e-4,
        steps=1000,
        warmup_steps=50,
        schedule="cosine",
        final_fraction=0.02,
        clip_norm=0.5,
    ),
    attention="cudnn",
    eval_batches=8,
    keep_checkpoints=1,
)
