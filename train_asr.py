"""Stage 3: train a CTC Conformer on token files.

in   runs/tokens/               written by tokenize_corpus.py
out  runs/asr/asr.pt            the recognizer, in half precision: all that evaluate.py needs
     runs/asr/resume.pt         the state of training; the same command continues from it
     runs/asr/log.jsonl         one row per epoch

    python train_asr.py                                           # synthetic speech, a few minutes
    python train_asr.py --tokens runs/my/tokens --size small --epochs 30 --out runs/my/asr

The log lines: `loss` is the CTC loss after the last block in nats per text unit, averaged over the
epoch; `dev CER` and `dev WER` are error rates of greedy decoding. The line `dropped`, printed once,
counts training utterances and copies that have no text, that are too short for CTC to align with
their text, or that last more than a minute.

Legend: B utterances, T token frames, T' output frames, Q codebooks, D feature size, V text units.
Dhawan et al., arXiv 2407.03495, section 3. Everything that training needs from the codec is in the
token folder; from codec.py come only the helpers for files, devices and flags.
"""

import io
import json
import math
import os
import re
import shlex
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor, nn
from tqdm import tqdm

from asr_model import SIZES, Augment, CodecASR
from codec import (add_common_flags, check_same_flags, flag_group, load_checkpoint, refuse_idle,
                   run_stage, save_run, start_processes)

NOISY_SHARE = 0.5       # of the utterances, where the tokens include noisy copies
LONGEST = 60.0          # seconds of an utterance: the time of attention grows with its square


# -------------------------------------------------------------------------------------- text units

def train_units(rows: list[dict], args) -> bytes:
    """A sentencepiece model of the training transcripts; all processes use that of process 0.

    Id 0 is <unk>, for characters that no unit can write. It is never a target, and serves as the
    CTC blank.
    """
    languages = sorted({row["lang"] for row in rows}) if args.lang_token else []
    if "" in languages:
        raise ValueError(f"--lang-token: {args.tokens} has utterances without a language")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(row["text"] for row in rows), model_writer=model,
            model_type=args.units,
            vocab_size=100_000 if args.units == "char" else args.vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, max_sentence_length=1 << 24,
            normalization_rule_name="identity", minloglevel=2,
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
            user_defined_symbols=[f"<|{name}|>".replace(" ", "\u2581") for name in languages])
    except RuntimeError as error:
        raise ValueError(f"--units {args.units} --vocab-size {args.vocab_size}: {error}")
    shared = [model.getvalue()]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def greedy(units: SentencePieceProcessor, log_probs: Tensor) -> str:
    """Best unit of each frame, repeats merged, blanks dropped: (T', V) -> text."""
    ids = log_probs.argmax(-1).unique_consecutive()
    return " ".join(units.decode(ids[ids != 0].tolist()).split())


def split_language(text: str) -> tuple[str, str]:
    """'<|en|> HELLO' -> 'en', 'HELLO'; without a language token: '', text."""
    return re.fullmatch(r"(?:<\|(.*?)\|>)? *(.*)", text).groups(default="")


# -------------------------------------------------------------------------------------------- data

def read_meta(folder: str | Path) -> dict:
    """The folder's meta.json: subsets of each role, Q (0 for log-mel or latent), K, D, hop, ..."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no tokens here; run tokenize_corpus.py, or name others with "
                         f"--tokens")
    return json.loads(path.read_text("utf-8"))


class TokenSet:
    """The utterances of some subsets, their arrays in memory."""

    def __init__(self, folder: str | Path, subsets: list[str], codebooks: int = 0, copies=False):
        """codebooks: only the first N, 0 for all; copies: also those of the utterances."""
        self.rows = []
        self.arrays = []                            # (T, Q) or (T, D) each
        for subset in subsets:
            path = Path(folder) / f"{subset}.jsonl"
            if not path.is_file():
                raise ValueError(f"{path}: no such file; name another subset, or run "
                                 f"tokenize_corpus.py to completion")
            for line in tqdm(path.read_text("utf-8").splitlines(), f"reading {subset}",
                             leave=False, disable=None):
                row = json.loads(line)
                if copies or not row["copy_of"]:
                    array = np.load(Path(folder) / row["array"], allow_pickle=False)
                    self.rows.append(row)
                    self.arrays.append(torch.from_numpy(array[:, :codebooks or None]))

    def take(self, group: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Utterance numbers, B of them -> tokens (B, T, Q), token_len (B,)."""
        arrays = [self.arrays[i] for i in group]
        lengths = torch.tensor([len(array) for array in arrays])
        padded = nn.utils.rnn.pad_sequence(arrays, batch_first=True)
        return padded.to(device), lengths.to(device)

    def batches(self, which: Sequence, frames: int, rng=None) -> list[list[int]]:
        """Groups of similar length, of at most `frames` padded frames, unless one utterance alone
        is longer; with rng, in random order."""
        lengths = np.array([len(self.arrays[i]) for i in which])
        spread = rng.uniform(1, 1.1, len(lengths)) if rng else 1.0      # new neighbors every epoch
        groups = [[]]
        longest = 0
        for number in np.argsort(lengths * spread, kind="stable"):
            longest = max(longest, lengths[number])
            if groups[-1] and (len(groups[-1]) + 1) * longest > frames:
                groups.append([])
                longest = lengths[number]
            groups[-1].append(which[number])
        if rng:
            rng.shuffle(groups)
        return groups


def frames_needed(target: Tensor) -> int:
    """CTC needs a frame for each unit, and a blank between two equal ones."""
    return len(target) + int((target.diff() == 0).sum())


class TrainSet(TokenSet):
    """Adds text units and targets, and draws one variant of each utterance per epoch."""

    def __init__(self, args, meta: dict, units_model: bytes | None = None):
        """units_model: that of sentencepiece, where a run resumes."""
        if not meta["train"]:
            raise ValueError(f"{args.tokens}: no train subset; give tokenize_corpus.py a --train")
        super().__init__(args.tokens, meta["train"], args.codebooks, copies=True)
        self.seed = args.seed
        # --batch is in seconds.
        self.batch_frames = round(args.batch * meta["sample_rate"] / meta["hop"])
        units_model = units_model or train_units(self.rows, args)
        self.units = SentencePieceProcessor(model_proto=units_model)
        self.targets = []
        self.out_len = []
        dropped = []
        # {original: (numbers of its clean variants, at any speed, and of its noisy ones)}
        self.variants = {}
        for i, row in enumerate(self.rows):
            text = f"<|{row['lang']}|> {row['text']}" if args.lang_token else row["text"]
            target = torch.tensor(self.units.encode(text))
            target = target[target != 0]
            self.targets.append(target)
            self.out_len.append(-(-len(self.arrays[i]) // args.subsampling))    # as in CodecASR
            # torch's zero_infinity would only hide the utterances that are too short.
            if 0 < frames_needed(target) <= self.out_len[i] and row["duration"] <= LONGEST:
                original = Path(row["array"]).parent / (row["copy_of"] or row["id"])
                clean, noisy = self.variants.setdefault(original, ([], []))
                (noisy if row["noisy"] else clean).append(i)
            else:
                dropped.append(row["id"])
        self.notes = (f"dropped: {len(dropped)} utterances and copies without text, with too few "
                      f"frames for it, or longer than {LONGEST:g} s {dropped[:3] or ''}")
        if not self.variants:
            raise ValueError(f"{args.tokens}: nothing to train on; {self.notes}")

    def epoch(self, number: int, strength: float) -> list[list[int]]:
        """Batches of utterance numbers, the same for the same seed, epoch and strength. Strength is
        the curriculum's: 0 means no noisy copies, 1 their full share."""
        rng = np.random.default_rng((self.seed, number))
        picked = []
        for clean, noisy in self.variants.values():
            wants_noise = rng.random() < NOISY_SHARE * strength
            wanted = noisy if wants_noise else clean
            picked.append(rng.choice(wanted or clean or noisy))
        # The first epoch goes from short to long: CTC finds its first alignments in short ones
        # (Deep Speech 2, arXiv 1512.02595, section 3.3).
        return self.batches(picked, self.batch_frames, rng if number else None)


# -------------------------------------------------------------------------------------- optimizer

def make_optimizers(model: CodecASR, args) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; each group of parameters keeps its
    peak learning rate as `peak`, of which `train` takes a share at each step."""
    matrices = []
    tables = []
    others = []
    for name, parameter in model.named_parameters():
        if "blocks" in name and parameter.ndim == 2:
            matrices.append(parameter)
        elif "tables" in name:
            tables.append(parameter)
        else:
            others.append(parameter)
    # Tables that start as codebooks generalize better when they change slowly; random ones get the
    # same rate, so that the comparison is fair.
    return [Muon(matrices, 2.5 * args.lr), torch.optim.AdamW([
        {"params": others, "peak": args.lr}, {"params": tables, "peak": 0.1 * args.lr}
    ], betas=(0.9, 0.98), fused=True)]


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it."""
    cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if cpu or cuda else torch.float32


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal: all directions of a matrix learn equally fast.

    Jordan et al., 2024 (kellerjordan.github.io/posts/muon). torch.optim.Muon takes the matrices one
    by one, and always in bfloat16; on a CPU without that, it takes two thirds of a step's time.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float):
        groups = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group, "peak": lr} for group in groups.values()], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:             # N matrices, of R rows and C columns each
            grad = torch.stack([matrix.grad for matrix in group["params"]])         # (N, R, C)
            state = self.state[group["params"][0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            momentum = state["momentum"].lerp_(grad, 0.05)      # the mean of about 20 steps
            ahead = grad.lerp(momentum, 0.95)       # Nesterov's look ahead
            steps = orthogonal(ahead.to(fast_dtype(grad.device)))
            scale = max(1.0, grad.shape[1] / grad.shape[2]) ** 0.5
            for matrix, step in zip(group["params"], steps):
                matrix.mul_(1 - 0.1 * group["lr"])              # weight decay
                matrix.add_(step, alpha=-group["lr"] * scale)


def orthogonal(y: Tensor) -> Tensor:
    """About U V^T of each singular value decomposition U S V^T, by Newton-Schulz iterations:
    (N, R, C) -> (N, R, C). The coefficients are those of Jordan et al.: after five iterations, all
    singular values are near 1, and nearer is not needed."""
    if y.shape[1] > y.shape[2]:
        return orthogonal(y.mT).mT
    y = F.normalize(y, dim=(1, 2))
    for _ in range(5):
        gram = y @ y.mT
        mixed = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, mixed, y, beta=3.4445)
    return y


# ------------------------------------------------------------------------------------------ model

def build_model(flags: dict, meta: dict, vocab_size: int) -> CodecASR:
    """The model that these flags name, with random weights."""
    codebooks = flags["codebooks"] or meta["codebooks"]
    if codebooks > meta["codebooks"]:
        raise ValueError(f"--codebooks {codebooks}: the tokens have {meta['codebooks']}")
    return CodecASR(vocab_size, codebooks, meta["codebook_size"], meta["dim"], flags["aggregate"],
                    flags["size"], flags["subsampling"])


def start_model(args, meta: dict, data: TrainSet) -> CodecASR:
    """A new model, the same in all processes, its tables as --embedding says."""
    torch.manual_seed(args.seed)
    model = build_model(vars(args), meta, len(data.units))
    tables = None
    if meta["codebooks"]:
        tables = torch.from_numpy(np.load(Path(args.tokens) / "codebooks.npy", allow_pickle=False))
        if args.embedding == "random":      # each codebook keeps its mean and deviation
            noise = torch.randn_like(tables)
            tables = tables.mean(1, keepdim=True) + tables.std(1, keepdim=True) * noise
        model.embedding.tables.requires_grad_(args.embedding != "frozen")
    some = torch.randint(len(data.arrays), (500,))
    sample = torch.cat([data.arrays[i] for i in some])[:100_000]        # bounds memory
    model.start_from(tables, sample)
    model.augment = Augment(
        time_masks=args.time_masks, longest_mask=0.2 * meta["sample_rate"] / meta["hop"],
        codebook_masks=args.codebook_masks, feature_masks=args.feature_masks,
        replace=args.replace, noisy_embedding=args.noisy_embedding)
    return model


def ctc_loss(net: nn.Module, data: TrainSet, group: list[int], device: torch.device) -> Tensor:
    """(2,): nats, summed over the group's utterances; after half of the blocks, and after all."""
    tokens, token_len = data.take(group, device)
    targets = [data.targets[i] for i in group]
    dtype = fast_dtype(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        log_probs, _ = net(tokens, token_len, both=True)                # (2, B, T', V)
    if device.type == "mps":                        # for which torch has no CTC
        log_probs = log_probs.cpu()
    # The lengths stay on the CPU: fetched from a GPU, they would make each step wait for it.
    out_len = torch.tensor([data.out_len[i] for i in group])
    target_len = torch.tensor([len(target) for target in targets])
    targets = torch.cat(targets).to(log_probs.device)
    return torch.stack([
        F.ctc_loss(each.transpose(0, 1), targets, out_len, target_len, reduction="sum")
        for each in log_probs])


@torch.inference_mode()
def outputs(model: CodecASR, data: TokenSet, which: Sequence,
            frames: int) -> Iterator[tuple[int, Tensor]]:
    """-> utterance number, log_probs (T', V), for each of these utterances."""
    model.eval()
    for group in data.batches(which, frames):
        log_probs, out_len = model(*data.take(group, model.mean.device))    # (B, T', V), (B,)
        for number, each, length in zip(group, log_probs.cpu(), out_len.tolist()):
            yield number, each[:length]
    model.train()


def dev_error_rates(model: CodecASR, dev: TokenSet, units, frames: int) -> dict:
    """WER and CER of greedy decoding; language tokens do not count as text."""
    refs = []
    hyps = []
    # Without gradients, twice as many frames fit into memory.
    for number, log_probs in outputs(model, dev, range(len(dev.rows)), 2 * frames):
        refs.append(dev.rows[number]["text"])
        hyps.append(split_language(greedy(units, log_probs))[1])
    return {"dev_wer": jiwer.wer(refs, hyps), "dev_cer": jiwer.cer(refs, hyps)}


def unit_prior(model: CodecASR, data: TrainSet, which: list[int]) -> Tensor:
    """Log of the mean probability of each unit on some training utterances: (V,).

    CTC's posteriors contain this prior, above all that of the blank. A beam search divides by a
    power of it, because its language model already knows how frequent words are.
    """
    total = sum(log_probs.exp().sum(0)
                for _, log_probs in outputs(model, data, which, data.batch_frames))
    return (total / total.sum()).log()


# --------------------------------------------------------------------------------------- training

def share_of_peak(step: int, progress: float, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, times half a cosine from 1 to 0.

    progress: share of the training that is done, 0 to 1.
    """
    return min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))


def ramp(step: int, args) -> float:
    """The curriculum: 0 at the first step, 1 from step --curriculum on."""
    return min(1.0, step / args.curriculum) if args.curriculum else 1.0


def check_same_tokens(path: str | Path, trained: dict, tokens: str | Path, found: dict, more=()):
    """A recognizer reads only what it was trained on: the same features of the same codec."""
    for name in "features", "codec", "hop", "codebooks", *more:
        if trained[name] != found[name]:
            raise ValueError(f"{path} was trained on {name} {trained[name]}, but {tokens} holds "
                             f"{found[name]}: use the tokens and codec that it was trained with")


def resume_recognizer(path: Path, args, meta: dict) -> dict | None:
    """The state of an earlier run, if any. It must have begun with the same flags, codec, corpus
    and noise."""
    if not path.exists():
        if path.with_name("asr.pt").exists():
            raise ValueError(f"{path.parent} holds an asr.pt without its resume.pt: give another "
                             f"--out")
        return None
    saved = load_checkpoint(path, "asr")
    check_same_flags(path, saved["flags"], args)
    # All that made the tokens; test subsets may come and go.
    check_same_tokens(path, saved["meta"], args.tokens, meta,
                      sorted(meta.keys() - {"test", "codec_path"}))
    return saved


def train(args):
    device, rank, world = start_processes(args.device)
    meta = read_meta(args.tokens)
    out = Path(args.out)
    if not meta["codebooks"]:               # log-mel, or the codec's latent
        defaults = parse([])
        for name in "embedding", "aggregate", "codebooks", "codebook_masks", "replace":
            if getattr(args, name) != getattr(defaults, name):
                raise ValueError(f"--{name.replace('_', '-')} has no effect on {meta['features']}")
    # In the token folder, the codec's path is relative to it; in the checkpoint, to the checkpoint.
    codec = Path(args.tokens) / meta["codec_path"]
    meta["codec_path"] = os.path.relpath(codec.resolve(), out.resolve())
    saved = resume_recognizer(out / "resume.pt", args, meta)
    # "text" holds the sentencepiece model, as in published files.
    data = TrainSet(args, meta, saved["text"] if saved else None)
    dev = TokenSet(args.tokens, meta["dev"], args.codebooks)
    model = start_model(args, meta, data).to(device)
    optimizers = make_optimizers(model, args)
    log = saved["log"] if saved else []
    first = len(log)
    step = log[-1]["step"] if log else 0
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(values)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"recognizer: {millions:.1f} M parameters, {len(data.units)} {args.units} units; "
              f"{len(data.variants)} utterances, {len(data.rows)} with copies; epoch "
              f"{first} of {args.epochs} on {device}", data.notes, sep="\n")
    # One batch of long utterances shows now whether memory is large enough: of the sorted epoch 0,
    # the second to last, or the only one. The last may be a small remainder.
    long = data.epoch(0, strength=1.0)[-2:][0]
    ctc_loss(model, data, long[::world], device).sum().backward()
    model.zero_grad()

    for epoch in range(first, args.epochs):
        began = time.time()
        losses = []
        groups = data.epoch(epoch, ramp(step, args))
        # A warm-up of fewer than 1,000 steps can leave CTC where it starts, predicting nothing but
        # blanks; short runs take that risk.
        warmup = min(1000, args.epochs * len(groups) / 3)
        for number, group in enumerate(tqdm(groups, f"epoch {epoch + 1}/{args.epochs}", leave=False,
                                            disable=True if rank else None)):
            progress = (epoch + number / len(groups)) / args.epochs
            share = share_of_peak(step, progress, warmup)
            model.augment.strength = ramp(step, args)
            # Reseed, so that a resumed run draws the same numbers.
            torch.manual_seed((args.seed * 1_000_000 + step) * world + rank)

            # Each process takes a part of the group, but all take the whole of a small one.
            parts = world if len(group) >= world else 1
            mine = group[rank % parts::parts]
            num_units = sum(len(data.targets[i]) for i in group)
            # DistributedDataParallel averages the gradients of the parts, but we need their sum.
            early, late = parts * ctc_loss(net, data, mine, device) / num_units
            (0.3 * early + 0.7 * late).backward()               # these weights were not tuned
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for parameters in optimizer.param_groups:
                    parameters["lr"] = parameters["peak"] * share
                optimizer.step()
                optimizer.zero_grad()
            losses.append(late.detach())
            step += 1

        loss = torch.stack(losses).mean() / world       # averaged over processes, too
        if world > 1:
            dist.all_reduce(loss)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is no longer finite in epoch {epoch + 1}; try a lower "
                             f"--lr, with another --out")
        if rank:
            continue
        speech = sum(data.rows[i]["duration"] for group in groups for i in group)
        row = {"epoch": epoch + 1, "step": step, "loss": loss.item(),
               "speech_per_second": speech / (time.time() - began)}
        row |= dev_error_rates(model, dev, data.units, data.batch_frames)
        print("epoch {epoch} | step {step} | loss {loss:.3f} | dev CER {dev_cer:.1%} | dev WER "
              "{dev_wer:.1%} | {speech_per_second:.0f} s of speech per second".format(**row),
              flush=True)
        log.append(row)
        some = groups[::len(groups) // 30 + 1]          # at most 30 batches, for the prior
        state = {"kind": "asr", "flags": vars(args), "meta": meta, "log": log,
                 "text": data.units.serialized_model_proto(), "model": model.state_dict(),
                 "log_prior": unit_prior(model, data, [i for group in some for i in group])}
        save_run(out, state, optimizers=[optimizer.state_dict() for optimizer in optimizers])
    if rank == 0:
        print(f"wrote {out / 'asr.pt'} (dev CER {log[-1]['dev_cer']:.1%}); next: python "
              f"evaluate.py --asr {shlex.quote(str(out))} --out {shlex.quote(str(out / 'eval'))}")


# --------------------------------------------------------------------------------------------- main

def parse(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = flag_group(parser, "model and its input")
    add("--tokens", "runs/tokens", "folder that tokenize_corpus.py wrote")
    add("--size", "tiny", "width and depth of the Conformer", choices=SIZES)
    add("--embedding", "codebook",
        "tables start as the codec's codebooks; at random, with each codebook's mean and "
        "standard deviation; or as frozen codebooks", choices=("codebook", "random", "frozen"))
    add("--aggregate", "sum",
        "the rows of the Q tables are added (normalized, this is the paper's average), or "
        "concatenated", choices=("sum", "stack"))
    add("--codebooks", 0, "use only the first N codebooks; 0: all")
    add("--subsampling", 1,
        "input frames merged into one: 4 for 10 ms log-mel, 2 for 80 Hz tokens",
        choices=(1, 2, 4))
    add = flag_group(parser, "augmentation of the training input")
    add("--time-masks", 8, "spans of time hidden, each up to 5%% of the utterance and 0.2 s")
    add("--codebook-masks", 0, "codebooks hidden, each for up to half of an utterance")
    add("--feature-masks", 1, "bands of the embedding hidden, each up to a third of it")
    add("--replace", 0.0, "share of tokens replaced by random codes")
    add("--noisy-embedding", 0.0,
        "standard deviation of noise on the embedding, relative to its own, such as 0.3")
    add("--curriculum", 3000,
        "steps over which augmentation and noisy copies ramp up; 0: full strength from the start")
    add = flag_group(parser, "text units")
    add("--units", "char", "text units", choices=("char", "unigram", "bpe"))
    add("--vocab-size", 256, "number of text units, with unigram or bpe")
    add("--lang-token", False, "begin each transcript with a token of its language")
    add = flag_group(parser, "training")
    add("--epochs", 20, "passes over the training utterances")
    add("--batch", 40.0, "seconds of speech per step, in all processes")
    add("--lr", 0.003, "peak learning rate; Muon takes 2.5 times as much, the tables a tenth")
    add_common_flags(parser, "runs/asr")

    args = parser.parse_args(arguments)
    if args.units == "char":
        refuse_idle(parser, args, "with --units char", "vocab_size")
    if min(args.epochs, args.batch, args.lr) <= 0:
        parser.error("--epochs, --batch and --lr must be above 0")
    if min(args.codebooks, args.time_masks, args.codebook_masks, args.feature_masks, args.replace,
           args.noisy_embedding, args.curriculum) < 0:
        parser.error("--codebooks, masks, --replace, --noisy-embedding, --curriculum: at least 0")
    return args


def main(arguments=None):
    run_stage(train, parse(arguments))


if __name__ == "__main__":
    main()
