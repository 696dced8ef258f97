"""Train the demo model on a CPU: `python models/demo/train.py --out FOLDER`.

A llama of 2.1 million weights learns from scratch to answer a support ticket with one line of JSON. Tickets are made
while it learns (tickets.py), so it sees none twice. The loss is that of the answer, and with a part of its weight that
of the ticket's own words, which teaches it twice as fast what they mean. The same seed gives the same tickets and the
same first weights; sums on another machine round otherwise. What it writes: checkpoint.pt every few
hundred steps, from which `--resume` goes on, and at the end the weights in float16 with the tokenizer, for export.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from tickets import OTHER_SYSTEMS, SYSTEM, Ticket, Tickets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 3072, 192, 4, 6, 3, 448
HEAD = HIDDEN // HEADS
ROPE_BASE, NORM_EPSILON = 10_000.0, 1e-5
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
PADDING, ASKED, ANSWER = range(3)
BATCH = 40  # tickets a step
POOL = 16  # batches that are sorted by length together, so that a batch has little padding
#: Of the embeddings and norms (AdamW), and of the matrices between them (Muon, https://kellerjordan.github.io/posts/muon/).
RATE, MUON_RATE, WARM_UP = 3e-3, 0.02, 150
ASKED_WEIGHT, ASKED_SHARE = 0.2, 0.25  # what the loss of the ticket's words weighs, and of how many it is taken


# ---- text ---------------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> Tokenizer:
    """Return a byte-level BPE like GPT-2's. Digits stay single: no number is a word to be learned."""
    texts = [f"{ticket.text}\n{ticket.line}" for ticket in islice(Tickets("train").endless(seed + 1), 40_000)]
    # A product stands behind a space in a ticket and behind a quote in the answer: both should be whole tokens.
    texts += Tickets("train").product_words * 1000
    texts += [SYSTEM, *OTHER_SYSTEMS] * 200 + ["system\nuser\nassistant\n"] * 200
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((re.sub(r"\d", " ", text) for text in texts), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def prompt(text: str, system: str) -> str:
    """Return what the chat template makes of a ticket."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"<s>{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for ever, of BATCH tickets: tokens, the tokens after them, and what those are: ASKED, ANSWER or PADDING."""
    rng = random.Random(seed)
    tickets = Tickets("train").endless(seed)
    pad = tokenizer.token_to_id("</s>")
    while True:
        pool = []
        for ticket in islice(tickets, BATCH * POOL):
            system = SYSTEM if rng.random() < 0.8 else rng.choice(OTHER_SYSTEMS)
            asked = tokenizer.encode(prompt(ticket.text, system)).ids
            answer = tokenizer.encode(f"{ticket.line}<|im_end|>").ids
            pool.append((asked, answer))
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        order = list(range(POOL))
        rng.shuffle(order)
        for number in order:
            chosen = pool[number * BATCH : (number + 1) * BATCH]
            length = max(len(asked) + len(answer) for asked, answer in chosen) - 1
            tokens = torch.full((BATCH, length), pad)
            targets, kinds = tokens.clone(), torch.full((BATCH, length), PADDING)
            for row, (asked, answer) in enumerate(chosen):
                line = torch.tensor(asked + answer)
                tokens[row, : len(line) - 1], targets[row, : len(line) - 1] = line[:-1], line[1:]
                kinds[row, : len(asked) - 1], kinds[row, len(asked) - 1 : len(line) - 1] = ASKED, ANSWER
            yield tokens, targets, kinds


# ---- model --------------------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension i of a head with i + half a head, as Hugging Face's llama does."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Layer(nn.Module):
    """Attention and feed-forward; the names are Hugging Face's."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, NORM_EPSILON)
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD, HIDDEN, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, NORM_EPSILON)
        self.gate_proj = nn.Linear(HIDDEN, FEED_FORWARD, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FEED_FORWARD, bias=False)
        self.down_proj = nn.Linear(FEED_FORWARD, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the next residual."""
        rows, length, _ = x.shape
        y = self.input_layernorm(x)
        q = rotated(self.q_proj(y).view(rows, length, HEADS, HEAD).transpose(1, 2), cos, sin)
        k = rotated(self.k_proj(y).view(rows, length, KV_HEADS, HEAD).transpose(1, 2), cos, sin)
        v = self.v_proj(y).view(rows, length, KV_HEADS, HEAD).transpose(1, 2)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        # Written out: for sequences this short, the backward pass of scaled_dot_product_attention takes half the step.
        scores = (q @ k.transpose(2, 3)) / HEAD**0.5
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(ahead, -1e4).softmax(dim=-1) @ v
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(rows, length, HEADS * HEAD))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """A llama whose output matrix is its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, NORM_EPSILON)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = (2 * LAYERS) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=(0.05 if "embed" in name else HIDDEN**-0.5) / deep)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden state of every token."""
        angles = torch.outer(
            torch.arange(tokens.shape[1]), ROPE_BASE ** (-torch.arange(0, HEAD, 2).float() / HEAD)
        ).repeat(1, 2)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.norm(x)

    def losses(self, tokens: Tensor, targets: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the answers' tokens, and that of some of the others."""
        states = self.hidden(tokens)

        def mean(chosen: Tensor) -> Tensor:
            logits = states[chosen] @ self.embed_tokens.weight.T
            return F.cross_entropy(logits.float(), targets[chosen])

        return mean(kinds == ANSWER), mean((kinds == ASKED) & (torch.rand(kinds.shape) < ASKED_SHARE))


@torch.no_grad()
def answers(model: Llama, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """Return the greedy answers; a batch of prompts of one length after another."""
    asked = [tokenizer.encode(prompt(text, SYSTEM)).ids for text in texts]
    end = tokenizer.token_to_id("<|im_end|>")
    said: list[str] = []
    for ids in asked:
        line = list(ids)
        while len(line) - len(ids) < 80:
            logits = model.hidden(torch.tensor([line]))[0, -1] @ model.embed_tokens.weight.T
            if (token := int(logits.argmax())) == end:
                break
            line.append(token)
        said.append(tokenizer.decode(line[len(ids) :], skip_special_tokens=False))
    return said


@torch.no_grad()
def forced(model: Llama, tokenizer: Tokenizer, tickets: list[Ticket]) -> dict[str, float]:
    """Return the share of tickets of which every token is the likeliest, and of each field: fast, no sampling."""
    right = dict.fromkeys(("category", "urgency", "all"), 0)
    for ticket in tickets:
        asked = tokenizer.encode(prompt(ticket.text, SYSTEM)).ids
        answer = tokenizer.encode(f"{ticket.line}<|im_end|>").ids
        states = model.hidden(torch.tensor([asked + answer[:-1]]))[0, len(asked) - 1 :]
        said = (states @ model.embed_tokens.weight.T).argmax(-1).tolist()
        right["all"] += said == answer
        wrong = next((n for n, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b), len(answer))
        before = tokenizer.decode(answer[: wrong + 1], skip_special_tokens=False)
        right["category"] += '"urgency' in before or wrong == len(answer)
        right["urgency"] += '"product' in before or wrong == len(answer)
    return {name: count / len(tickets) for name, count in right.items()}


def save(model: Llama, folder: Path) -> None:
    """Write the weights under Hugging Face's names, in float16, and the sizes."""
    weights = {}
    for name, weight in model.state_dict().items():
        part = "mlp" if re.search(r"(gate|up|down)_proj", name) else "self_attn"
        full = re.sub(r"(layers\.\d+)\.(\w+_proj)", rf"\1.{part}.\2", f"model.{name}")
        weights[full] = weight.to(torch.float16).contiguous()
    save_file(weights, folder / "model.safetensors")
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "kv_heads": KV_HEADS, "feed_forward": FEED_FORWARD}
    (folder / "shape.json").write_text(json.dumps(sizes) + "\n")


# ---- run ----------------------------------------------------------------------------------------


def main() -> None:
    """Train."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights and tokenizer")
    arguments.add_argument("--steps", type=int, default=14_500)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    if given.resume:
        tokenizer = Tokenizer.from_file(str(given.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(given.seed)
        tokenizer.save(str(given.out / "tokenizer.json"))
    model = Llama()
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights", flush=True)
    between = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    optimizers = {
        MUON_RATE: torch.optim.Muon(between, lr=MUON_RATE, weight_decay=0.05),
        RATE: torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    }
    first = 0
    if given.resume:
        kept = torch.load(given.out / "checkpoint.pt")
        model.load_state_dict(kept["model"])
        for optimizer, state in zip(optimizers.values(), kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = kept["step"]
    unseen = list(islice(Tickets("train").endless(given.seed + 2), 136))
    started, tokens_seen, recent = time.monotonic(), 0, 0.0
    learning = batches(tokenizer, given.seed + first)  # others than before the checkpoint
    for step, (tokens, targets, kinds) in enumerate(islice(learning, given.steps - first), first + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss, asked_loss = model.losses(tokens, targets, kinds)
        (loss + ASKED_WEIGHT * asked_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rate, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rate * min(
                step / WARM_UP, max(0.01, (given.steps - step) / (given.steps - WARM_UP))
            )
            optimizer.step()
            optimizer.zero_grad()
        tokens_seen += tokens.numel()
        recent = loss.item() if step == first + 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0:
            spent = time.monotonic() - started
            print(f"step {step}  loss {recent:.4f}  {tokens_seen / spent:,.0f} tokens/s  {spent:.0f} s", flush=True)
        if step % 300 == 0 or step == given.steps:
            states = [optimizer.state_dict() for optimizer in optimizers.values()]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, given.out / "checkpoint.pt")
            print(json.dumps(forced(model, tokenizer, unseen)), flush=True)
    save(model, given.out)


if __name__ == "__main__":
    main()
