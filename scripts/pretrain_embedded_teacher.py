"""Pretrain the embedded teacher: a small Llama on the Python standard library's source, on a CPU or one GPU.

    python scripts/pretrain_embedded_teacher.py --out build/teacher --steps 1500

Writes a Hugging Face folder (bfloat16 safetensors and tokenizer), ``log.jsonl`` (loss, tokens/s) and ``losses.json``
(held-out loss by position). A killed run resumes from ``state.pt``; a resumed run may use a different ``--steps``,
because the schedule is constant until its final decay. Muon is "Muon: an optimizer for hidden layers in neural
networks" (K. Jordan and others, 2024).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trenchcoat.models.embedded import Split, stdlib_documents

VOCAB = 2048
CONTEXT = 1024
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
# Words with their leading space or punctuation, numbers up to three digits, punctuation runs, then runs of white space.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: Split, seed: int) -> torch.Tensor:
    """All documents of the split in a shuffled order, each as BOS + text + EOS, as one int64 vector."""
    texts = [text for _, text in stdlib_documents(split, tests=True)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    encoded = tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    for document in encoded:
        ids += [tokenizer.bos_token_id, *document, tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model() -> LlamaForCausalLM:
    """Random weights; every block starts as the identity."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.02,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """Nearest (semi-)orthogonal matrix by five Newton-Schulz steps with the quintic of Muon's authors."""
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum, in float32, because bfloat16 products are slow on most CPUs."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def with_repeats(row: torch.Tensor, seed: int) -> torch.Tensor:
    """The row with its second half replaced by spans (32 to 128 tokens) copied from its first half.

    From natural text alone, a model of this size learns long-range copying last; a share of such rows in the middle of
    training makes it learn this earlier. Nothing else is synthetic, and no held-out text is changed.
    """
    generator = torch.Generator().manual_seed(seed)
    half, position = len(row) // 2, len(row) // 2
    row = row.clone()
    while position < len(row):
        length = min(int(torch.randint(32, 129, (), generator=generator)), len(row) - position)
        start = int(torch.randint(0, half - length, (), generator=generator))
        row[position : position + length] = row[start : start + length].clone()
        position += length
    return row


def learning_rate_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Warm up, hold, then fall linearly to zero over the last ``decay`` share of the steps."""
    start = int(steps * (1 - decay))
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < start else max(0.0, (steps - step) / (steps - start))


def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, rows: int) -> torch.Tensor:
    """Mean next-token loss at each of the CONTEXT positions, in nats, over ``rows`` evenly spaced windows."""
    starts = torch.linspace(0, len(stream) - CONTEXT - 2, rows).long().tolist()
    total = torch.zeros(CONTEXT, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for start in starts:
            window = stream[start : start + CONTEXT + 1].to(model.device)
            logits = model(window[None, :-1]).logits[0]
            total += F.cross_entropy(logits.float(), window[1:], reduction="none").double().cpu()
    model.train()
    return total / rows


def by_position(losses: torch.Tensor) -> dict[str, float]:
    """Mean loss over ranges of positions."""
    edges = [0, 16, 32, 64, 128, 256, 512, 768, 1024]
    return {f"{a}-{b}": round(losses[a:b].mean().item(), 4) for a, b in zip(edges, edges[1:], strict=False)}


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 1024 tokens per step")
    parser.add_argument("--lr-matrix", type=float, default=0.02)
    parser.add_argument("--lr-embedding", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--repeats-from", type=int, default=400, help="from this step to the decay, see with_repeats")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def training_rows(train: torch.Tensor, step: int, args: argparse.Namespace) -> list[torch.Tensor]:
    """The rows of one step: every window once per epoch, in a different order each epoch."""
    windows = (len(train) - 1) // CONTEXT
    rows = []
    for i in range(step * args.batch, (step + 1) * args.batch):
        epoch, index = divmod(i, windows)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(epoch))
        shift = epoch * 331 % CONTEXT  # different window borders in every epoch
        start = min(order[index].item() * CONTEXT + shift, len(train) - CONTEXT - 1)
        row = train[start : start + CONTEXT + 1]
        repeats = i % 4 == 0 and args.repeats_from <= step < args.steps * (1 - args.decay)
        rows.append(with_repeats(row, seed=i) if repeats else row)
    return rows


def finish(model: LlamaForCausalLM, held_out: torch.Tensor, step: int, args: argparse.Namespace) -> None:
    """Save the model as it ships, in bfloat16, and its held-out losses."""
    shipped = model.to(torch.bfloat16)
    shipped.save_pretrained(args.out)
    losses = held_out_loss(model.float(), held_out, 200)
    result = {
        "steps": step,
        "tokens": step * args.batch * CONTEXT,
        "held_out_loss": round(losses.mean().item(), 4),
        "held_out_loss_by_position": by_position(losses),
    }
    (args.out / "losses.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def main() -> None:
    """Train, or continue a run that was stopped."""
    args = options()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer([text for _, text in stdlib_documents("train", tests=True)])
        tokenizer.save_pretrained(args.out)
    train, held_out = token_stream(tokenizer, "train", 0), token_stream(tokenizer, "validation", 0)
    print(f"tokens: train {len(train):,}, held out {len(held_out):,}", flush=True)

    model = build_model().to(device)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=args.lr_matrix, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr_embedding, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    bases = [group["lr"] for o in optimizers for group in o.param_groups]
    step, state_file = 0, args.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
        print(f"resumed at step {step}", flush=True)

    clock = time.time()
    while step < args.steps:
        factor = learning_rate_factor(step, args.steps, 40, args.decay)
        for group, base in zip((g for o in optimizers for g in o.param_groups), bases, strict=True):
            group["lr"] = base * factor
        batch = torch.stack(training_rows(train, step, args)).to(device)
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.reshape(-1, VOCAB).float(), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"loss is {loss.item()} at step {step}")
        if step % 10 == 0:
            rate = 10 * args.batch * CONTEXT / (time.time() - clock)
            clock = time.time()
            line = {"step": step, "loss": round(loss.item(), 4), "lr": factor, "tokens_per_s": round(rate)}
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if step % args.save_every == 0 or step == args.steps:
            if step % (4 * args.save_every) == 0:
                print("held out", step, by_position(held_out_loss(model, held_out, 24)), flush=True)
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)

    finish(model, held_out, step, args)


if __name__ == "__main__":
    main()
