"""An EAGLE-3 draft for SmolLM2-135M-Instruct, over the 16384 tokens that answers use most.

    python train/pair.py --target SMOLLM2 --configs configs/smollm2 --drafts eagle3 eagle medusa \\
        --eval-config configs/eval/smollm2.py --data data/open.jsonl.gz \\
        --validation data/open_val.jsonl --eval data --output runs/smollm2 \\
        --prompts 9000 --new-tokens 256

SMOLLM2 is a directory with the target in Hugging Face's layout. The draft learns from the target's
own answers. The objective is EAGLE-3's training-time test (arXiv 2503.01840, section 3.1) with
seven steps; the fused layers follow the official rule 2, L // 2, L - 3 for L = 30.
"""

from eagle_jax.config import DataConfig, Eagle3Config, OptimConfig, TrainConfig, TrainingTimeTest

config = TrainConfig(
    output_dir="runs/smollm2/eagle3",
    objective=TrainingTimeTest(
        draft=Eagle3Config(
            vocab_size=49152,
            draft_vocab_size=16384,
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            rope_theta=100000.0,
            aux_layers=(2, 15, 27),
            fc_norm=True,
            norm_output=True,
        ),
        target="runs/smollm2/model/target",
        steps=7,
        decay=0.8,
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="runs/smollm2/model/target",
        sequence_length=1024,
        batch_size=16,
    ),
    optim=OptimConfig(
        learning_rate=1e-3,
        steps=2400,
        warmup_steps=100,
        schedule="cosine",
        final_fraction=0.02,
        clip_norm=0.5,
    ),
    attention="cudnn",
    eval_batches=8,
    keep_checkpoints=1,
)
