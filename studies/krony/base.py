"""Train the study's own GPT-2 from scratch: 3.1 M parameters, BPE of 2,048 tokens, about half an hour on two cores.

    python studies/krony/base.py --out OUT

GPT-2's own weights need the hub; where there is none, the study folds this model. Text: ``$TENSORFOLD_DATA/train`` and
``tinyshakespeare.txt``, the last 2 % held out for validation. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from tensorfold.data.texts import load_text
from tensorfold.data.token_cache import TokenCache

VOCABULARY = 2048
TEXTS = ["train", "tinyshakespeare"]


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for name in TEXTS for text in load_text(name)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=256
    )


class JsonLog(TrainerCallback):
    """One line a logging step, so that the table's figures can be traced."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        with self.path.open("a") as file:
            entry = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 1), **(logs or {})}
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    if (arguments.out / "model.safetensors").exists():
        print(f"{arguments.out} is there already")
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    set_seed(0)
    tokens = tokenizer()
    cache = TokenCache.build(TEXTS, tokens, 256, validation_fraction=0.02)
    end = tokens.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=256,
            n_embd=192,
            n_layer=6,
            n_head=6,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    work = arguments.out.with_name(arguments.out.name + ".work")
    settings = TrainingArguments(
        output_dir=str(work), max_steps=arguments.steps, per_device_train_batch_size=16, learning_rate=1.5e-3,
        lr_scheduler_type="cosine", warmup_steps=100, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        logging_steps=20, save_steps=100, save_total_limit=1, eval_strategy="steps", eval_steps=100, report_to="none",
        use_cpu=not torch.cuda.is_available(), seed=0, disable_tqdm=True,
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model, settings, train_dataset=cache.train, eval_dataset=cache.validation,
        callbacks=[JsonLog(Path(__file__).with_name("base.jsonl"))],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    model.save_pretrained(arguments.out)
    tokens.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
