"""Stage 3: train a CTC Conformer on token files.

in   runs/tokens/               written by tokenize_corpus.py
out  runs/asr/asr.pt            weights (best epoch on dev), flags, text units; training resumes
     runs/asr/log.jsonl         one row per epoch

    python train_asr.py                                           # synthetic speech, a few minutes
    python train_asr.py --tokens runs/mini/tokens --size small --out runs/mini/asr

Legend: B utterances, T token frames, T' output frames, Q codebooks, D feature size, V text units.
Dhawan et al., arXiv 2407.03495, section 3. The codec is not imported: everything that training
needs from it is in the token folder.
"""

import io
import json
import math
import os
import re
import sys
import time
from argparse import (ArgumentDefaultsHelpFormatter, ArgumentParser,
                      RawDescriptionHelpFormatter)
from collections.abc import Iterable, Sequence
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from asr_model import SIZES, Augment, CodecASR

NOISY_SHARE = 0.5       # of the utterances, where the tokens include noisy copies
LONGEST = 60.0          # seconds of an utterance: the memory of attention grows with its square


# -------------------------------------------------------------------------------------- text units

def train_units(rows: list[dict], args) -> bytes:
    """A sentencepiece model of the training transcripts; all processes take the first one's.

    Id 0 is <unk>, for characters that no unit can write. It is never a target, and serves as the
    CTC blank.
    """
    languages = sorted({row["lang"] for row in rows}) if args.lang_token else []
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(row["text"] for row in rows), model_writer=model,
            model_type=args.units, vocab_size=8000 if args.units == "char" else args.vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, max_sentence_length=1 << 24,
            normalization_rule_name="identity", minloglevel=2,
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
            user_defined_symbols=[f"<|{name}|>" for name in languages])
    except RuntimeError as error:
        raise ValueError(f"--units {args.units} --vocab-size {args.vocab_size}: "
                         f"{str(error).splitlines()[-1]}")
    shared = [model.getvalue()]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def greedy(units: SentencePieceProcessor, log_probs: Tensor, out_len: Tensor) -> list[str]:
    """Best unit of each frame, repeats merged, blanks dropped: (B, T', V), (B,) -> B texts."""
    texts = []
    for best, length in zip(log_probs.argmax(-1).cpu(), out_len.tolist()):
        ids = best[:length].unique_consecutive()
        texts.append(" ".join(units.decode(ids[ids != 0].tolist()).split()))
    return texts


def split_language(text: str) -> tuple[str, str]:
    """'<|en|> HELLO' -> 'en', 'HELLO'; without a token '', text."""
    return re.fullmatch(r"(?:<\|(.*?)\|>)? *(.*)", text).groups(default="")


# -------------------------------------------------------------------------------------------- data

def read_meta(folder: str | Path) -> dict:
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no tokens here; run tokenize_corpus.py first")
    return json.loads(path.read_text("utf-8"))


class TokenSet:
    """The utterances of some subsets, their arrays in memory."""

    def __init__(self, folder: str | Path, subsets: list[str], codebooks: int = 0, copies=False):
        """codebooks: only the first N, 0 for all; copies: also other speeds, and in noise."""
        self.rows, self.arrays = [], []             # arrays: (T, Q) or (T, D) each
        for subset in subsets:
            path = Path(folder) / f"{subset}.jsonl"
            if not path.is_file():
                raise ValueError(f"{path}: no such file; run tokenize_corpus.py to its end")
            for row in map(json.loads, open(path, encoding="utf-8")):
                if copies or not row["copy_of"]:
                    array = np.load(Path(folder) / row["array"], allow_pickle=False)
                    self.rows.append(row)
                    self.arrays.append(torch.from_numpy(array[:, :codebooks or None]))
        if not self.rows:
            raise ValueError(f"{folder}: no dev subset; name one with --dev to tokenize_corpus.py")

    def take(self, group: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Utterance numbers, B of them -> tokens (B, T, Q), token_len (B,)."""
        arrays = [self.arrays[i] for i in group]
        lengths = torch.tensor([len(array) for array in arrays])
        return pad_sequence(arrays, batch_first=True).to(device), lengths.to(device)

    def batches(self, which: Sequence, frames: int, rng=None) -> list[list[int]]:
        """Groups of like length, of at most `frames` padded frames; with rng in random order."""
        lengths = np.array([len(self.arrays[i]) for i in which])
        spread = rng.uniform(1, 1.1, len(lengths)) if rng else 1.0      # new neighbours every epoch
        groups, longest = [[]], 0
        for number in np.argsort(lengths * spread, kind="stable"):
            longest = max(longest, lengths[number])
            if groups[-1] and (len(groups[-1]) + 1) * longest > frames:
                groups.append([])
                longest = lengths[number]
            groups[-1].append(which[number])
        if rng:
            rng.shuffle(groups)
        return groups


class TrainSet(TokenSet):
    """Adds text units and targets, and draws one variant of each utterance an epoch."""

    def __init__(self, args, meta: dict, units: bytes | None = None):
        """units: the sentencepiece model of a run that resumes."""
        super().__init__(args.tokens, meta["train"], args.codebooks, copies=True)
        self.seed = args.seed
        self.frames = round(args.batch * meta["sample_rate"] / meta["hop"])     # of a batch
        self.units = SentencePieceProcessor(model_proto=units or train_units(self.rows, args))
        self.targets, self.out_len, dropped = [], [], []
        self.variants = {}      # utterance: the numbers of its clean and of its noisy variants
        for i, row in enumerate(self.rows):
            target = torch.tensor(self.units.encode(transcript(row, args.lang_token)))
            target = target[target != 0]
            self.targets.append(target)
            self.out_len.append(-(-len(self.arrays[i]) // args.subsampling))
            # torch's zero_infinity would only hide the utterances that are too short.
            if 0 < frames_needed(target) <= self.out_len[i] and row["duration"] <= LONGEST:
                original = Path(row["array"]).parent / (row["copy_of"] or row["id"])
                clean, noisy = self.variants.setdefault(original, ([], []))
                (noisy if row["noisy"] else clean).append(i)
            else:
                dropped.append(row["id"])
        self.notes = (f"dropped: {len(dropped)} utterances too short for their transcripts at this "
                      f"frame rate, or longer than {LONGEST:g} s {dropped[:3] or ''}")
        if not self.variants:
            raise ValueError(f"{args.tokens}: nothing to train on; {self.notes}")

    def epoch(self, number: int, strength: float) -> list[list[int]]:
        """Batches of utterance numbers, the same for the same seed and epoch."""
        rng, picked = np.random.default_rng((self.seed, number)), []
        for clean, noisy in self.variants.values():
            wants_noise = rng.random() < NOISY_SHARE * strength
            picked.append(rng.choice(noisy if noisy and wants_noise else clean or noisy))
        # The first epoch goes from short to long: CTC finds its first alignments there (Deep
        # Speech 2, arXiv 1512.02595, section 3.3).
        return self.batches(picked, self.frames, rng if number else None)


def frames_needed(target: Tensor) -> int:
    """CTC needs a frame for each unit, and a blank between two equal ones."""
    return len(target) + int((target[1:] == target[:-1]).sum())


def transcript(row: dict, lang_token: bool) -> str:
    return f"<|{row['lang']}|> {row['text']}" if lang_token else row["text"]


# -------------------------------------------------------------------------------------- optimiser

def make_optimisers(model: CodecASR, args) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; each group of parameters keeps its
    peak learning rate as `peak`."""
    # Tables that start as codebooks generalise better when they change slowly.
    table_lr = args.lr if args.embedding == "random" else 0.1 * args.lr
    matrices, tables, others = [], [], []
    for name, parameter in model.named_parameters():
        if name == "embedding.tables":
            tables.append(parameter)
        elif "blocks" in name and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": others, "peak": args.lr}, {"params": tables, "peak": table_lr}]
    return [Muon(matrices, 2.5 * args.lr),
            torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal: all directions of a matrix learn equally fast.

    Jordan et al., 2024 (kellerjordan.github.io/posts/muon). torch.optim.Muon takes the matrices one
    by one, and always in bfloat16: on a CPU without it, two thirds of a training step.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float):
        groups = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group, "peak": lr} for group in groups.values()], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:             # N matrices of one shape
            grad = torch.stack([matrix.grad for matrix in group["params"]])         # (N, R, C)
            state = self.state[group["params"][0]]
            momentum = state.setdefault("momentum", torch.zeros_like(grad))
            momentum.lerp_(grad, 0.05)      # the mean of about 20 steps; then Nesterov's look ahead
            steps = orthogonal(grad.lerp(momentum, 0.95).to(fast_dtype(grad.device)))
            scale = max(1.0, grad.shape[1] / grad.shape[2]) ** 0.5
            for matrix, step in zip(group["params"], steps):
                matrix.mul_(1 - 0.1 * group["lr"])              # weight decay
                matrix.add_(step, alpha=-group["lr"] * scale)


def orthogonal(y: Tensor) -> Tensor:
    """About U V^T of each singular value decomposition U S V^T, by Newton-Schulz iterations:
    (N, R, C) -> (N, R, C). The coefficients are those of Jordan et al.: after five iterations, all
    singular values are near 1, which is close enough."""
    if y.shape[1] > y.shape[2]:
        return orthogonal(y.mT).mT
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, gram, y, beta=3.4445)
    return y


# --------------------------------------------------------------------------------------- training

def train(args):
    device, rank, world = start_processes(args.device)
    meta, path = read_meta(args.tokens), Path(args.out) / "asr.pt"
    # The checkpoint names its codec relative to itself.
    meta["codec_path"] = os.path.relpath(Path(args.tokens) / meta["codec_path"], args.out)
    saved = load_checkpoint(path) if path.exists() else None
    if saved:
        check_same_run(path, saved, args, meta)
    data = TrainSet(args, meta, saved["text"] if saved else None)
    dev = TokenSet(args.tokens, meta["dev"], args.codebooks)
    model = start_model(args, meta, data).to(device)
    optimisers = make_optimisers(model, args)

    state = saved or {"kind": "asr", "text": data.units.serialized_model_proto(),
                      "epoch": 0, "step": 0, "best": math.inf, "log": []}
    if saved:
        model.load_state_dict(saved["last"])
        for optimiser, values in zip(optimisers, saved["optimisers"]):
            optimiser.load_state_dict(values)
    state |= {"flags": vars(args), "meta": meta}
    net = DistributedDataParallel(model) if world > 1 else model
    dtype = fast_dtype(device)
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"recogniser: {parameters:.1f} M parameters, {len(data.units)} {args.units} units; "
              f"{len(data.variants)} utterances, {len(data.rows)} with copies; epoch "
              f"{state['epoch']} of {args.epochs} on {device}",
              data.notes, rehearse(model, data, device, dtype, world), sep="\n")

    step = state["step"]
    for epoch in range(state["epoch"], args.epochs):
        began, losses = time.time(), []
        groups = data.epoch(epoch, ramp(step, args))
        # A shorter warm-up can leave CTC where it starts, predicting nothing but blanks.
        warmup = min(1000, args.epochs * len(groups) / 3)
        for number, group in enumerate(tqdm(groups, f"epoch {epoch + 1}/{args.epochs}", leave=False,
                                            disable=True if rank else None)):
            progress = (epoch + number / len(groups)) / args.epochs
            decay = 0.5 + 0.5 * math.cos(math.pi * progress)
            model.augment.strength = ramp(step, args)
            # The same draws as without a resume.
            torch.manual_seed((args.seed * 1_000_000 + step) * world + rank)

            # A group smaller than the number of processes goes whole to all of them.
            mine, scale = (group[rank::world], world) if len(group) >= world else (group, 1)
            units = sum(len(data.targets[i]) for i in group)
            loss = ctc_loss(net, data, mine, device, dtype) / units * scale     # DDP takes means
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                for part in optimiser.param_groups:
                    part["lr"] = part["peak"] * decay * min(1.0, (step + 1) / warmup)
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.detach())
            step += 1

        loss = torch.stack(losses).mean() / world
        if world > 1:
            dist.all_reduce(loss)
        if not math.isfinite(loss):
            raise ValueError(f"the loss became infinite before step {step}; the checkpoint of the "
                             f"last epoch is kept: try a lower --lr")
        if rank:
            continue
        speech = sum(data.rows[i]["duration"] for group in groups for i in group)
        row = {"epoch": epoch + 1, "step": step, "loss": loss.item(),
               "speech_per_second": speech / (time.time() - began)}
        row["dev_wer"], row["dev_cer"] = evaluate(model, dev, data.units, data.frames, device)
        print("epoch {epoch} | step {step} | loss {loss:.3f} | dev CER {dev_cer:.1%} | dev WER "
              "{dev_wer:.1%} | {speech_per_second:.0f} s of speech a second".format(**row),
              flush=True)
        weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        if row["dev_cer"] <= state["best"]:
            state |= {"best": row["dev_cer"], "model": weights}
        state |= {"epoch": epoch + 1, "step": step, "log": state["log"] + [row], "last": weights,
                  "optimisers": [optimiser.state_dict() for optimiser in optimisers]}
        save(path, state)
    if rank == 0:
        print(f"wrote {path} (dev CER {state['best']:.1%}); next: python evaluate.py --asr {path}")


def build_model(flags: dict, meta: dict, vocab_size: int) -> CodecASR:
    """The model that these flags name, with random weights."""
    codebooks = flags["codebooks"] or meta["codebooks"]
    if codebooks > meta["codebooks"]:
        raise ValueError(f"--codebooks {codebooks}: the tokens have {meta['codebooks']}")
    # Random tables may be as wide as they like: the 32 of FSQ would be too narrow to be fair.
    wide = codebooks and flags["embedding"] == "random"
    dim = max(128, meta["dim"]) if wide else meta["dim"]
    return CodecASR(vocab_size, codebooks, meta["codebook_size"], dim, flags["aggregate"],
                    flags["size"], flags["subsampling"])


def start_model(args, meta: dict, data: TrainSet) -> CodecASR:
    """A new model, the same in all processes, its tables as --embedding says."""
    torch.manual_seed(args.seed)
    model = build_model(vars(args), meta, len(data.units))
    books = None
    if meta["codebooks"] and args.embedding != "random":
        books = torch.from_numpy(np.load(Path(args.tokens) / "codebooks.npy", allow_pickle=False))
    frames = torch.cat(data.arrays)
    model.start_from(books, frames[torch.randint(len(frames), (20_000,))])
    if meta["codebooks"] and args.embedding == "frozen":
        model.embedding.tables.requires_grad_(False)
    model.augment = Augment(args.time_masks, 0.2 * meta["sample_rate"] / meta["hop"],
                            args.codebook_masks, args.feature_masks, args.replace,
                            args.noisy_embedding)
    return model


def ramp(step: int, args) -> float:
    """The curriculum: 0 at the first step, 1 from --curriculum on."""
    return min(1.0, step / args.curriculum) if args.curriculum else 1.0


def ctc_loss(net: nn.Module, data: TrainSet, group: list[int], device, dtype) -> Tensor:
    """Nats, summed over the utterances of the group."""
    tokens, token_len = data.take(group, device)
    targets = [data.targets[i] for i in group]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        log_probs, _ = net(tokens, token_len)                               # (B, T', V)
    if device.type == "mps":                        # for which torch has no CTC
        log_probs = log_probs.cpu()
    # The lengths stay on the CPU: fetched from a GPU, they would make each step wait for it.
    out_len = torch.tensor([data.out_len[i] for i in group])
    target_len = torch.tensor([len(target) for target in targets])
    return F.ctc_loss(log_probs.transpose(0, 1), torch.cat(targets).to(log_probs.device),
                      out_len, target_len, reduction="sum")


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it."""
    cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if cpu or cuda else torch.float32


def rehearse(model: CodecASR, data: TrainSet, device, dtype, world: int) -> str:
    """Run this process's share of the longest batch first, so that a lack of memory shows now.

    -> a line on its speed, and on the share of the device's matrix-multiplication speed it reaches.
    """
    group = data.epoch(0, 1.0)[-1][::world]
    with FlopCounterMode(display=False) as counter:
        ctc_loss(model, data, group, device, dtype).backward()
    step = seconds(lambda: ctc_loss(model, data, group, device, dtype).backward())
    model.zero_grad()
    square = torch.randn(2048, 2048, device=device, dtype=dtype)
    product = seconds(lambda: square @ square)
    speed = sum(data.rows[i]["duration"] for i in group) / step
    share = counter.get_total_flops() / step / (2 * 2048 ** 3 / product)
    return (f"{speed:.0f} s of speech a second, {share:.0%} of this device's {dtype} "
            f"matrix-multiplication speed")


def seconds(function) -> float:
    """Median time of three calls, after one that does not count."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        function()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


@torch.inference_mode()
def evaluate(model: CodecASR, dev: TokenSet, units, frames: int, device) -> tuple:
    """Greedy decoding -> WER, CER; language tokens do not count as text."""
    model.eval()
    refs, hyps = [], []
    for group in dev.batches(range(len(dev.rows)), 2 * frames):
        found = greedy(units, *model(*dev.take(group, device)))
        hyps += [split_language(hyp)[1] for hyp in found]
        refs += [dev.rows[i]["text"] for i in group]
    model.train()
    return jiwer.wer(refs, hyps), jiwer.cer(refs, hyps)


# ------------------------------------------------------------------------------- files and devices
# Some of this repeats codec.py, which this stage does not import.

def save(path: Path, checkpoint: dict):
    """Write the checkpoint, and its log beside it: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    log = "".join(json.dumps(row) + "\n" for row in checkpoint["log"])
    for file, data in ((path, buffer.getvalue()), (path.with_name("log.jsonl"), log.encode())):
        temporary = file.with_name(f".{file.name}.part")
        temporary.write_bytes(data)
        os.replace(temporary, file)


def load_checkpoint(path: str | Path) -> dict:
    """Raises ValueError unless path holds a recogniser. Runs no code from the file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; train it first, or give its path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["kind"] == "asr":
            return saved
    except Exception:                               # torch raises many types for a damaged file
        pass
    raise ValueError(f"{path}: damaged, or no asr checkpoint of this project")


def check_same_run(path: Path, saved: dict, args, meta: dict):
    """A run resumes only with the flags and the tokens that it began with; --epochs may grow."""
    for name, now in vars(args).items():
        before = saved["flags"][name]
        free = name in ("device", "out", "tokens") or name == "epochs" and now > before
        if now != before and not free:
            raise ValueError(f"{path} was trained with --{name.replace('_', '-')} {before}, "
                             f"not {now}: give another --out, or delete it")
    names = ["corpus", "train", "dev", "noise", "snr", "seed"]
    check_same_tokens(path, saved["meta"], args.tokens, meta, names)


def check_same_tokens(path: str | Path, trained: dict, tokens: str | Path, found: dict, more=()):
    """A recogniser reads only what it was trained on: the same features of the same codec."""
    for name in ("features", "codec", "hop", "codebooks", *more):
        if trained[name] != found[name]:
            raise ValueError(f"{path} was trained on {name} {trained[name]}, but {tokens} holds "
                             f"{found[name]}: give its own tokens or codec, or another run")


def start_processes(name: str) -> tuple[torch.device, int, int]:
    """-> device, rank, number of processes: more than one where torchrun started this script."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found.type if found else "cpu"
    if name not in ("auto", "cpu", best):
        raise ValueError(f"--device {name}: not available here; try --device cpu")
    name = best if name == "auto" else name
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
    return torch.device(name), int(os.environ.get("RANK", 0)), world


# --------------------------------------------------------------------------------------------- main

class HelpPage(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the file's docstring, and shows the defaults."""


def parse(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=HelpPage)
    add = parser.add_argument
    add("--tokens", default="runs/tokens", help="folder that tokenize_corpus.py wrote")
    add("--size", choices=SIZES, default="tiny", help="width and depth of the Conformer")
    add("--embedding", choices=("codebook", "random", "frozen"), default="codebook",
        help="tables start as the codec's codebooks, at random, or as codebooks that do not learn")
    add("--aggregate", choices=("sum", "mean", "stack"), default="sum",
        help="how the rows of the Q tables become one vector")
    add("--codebooks", type=int, default=0, help="use only the first N codebooks; 0: all")
    add("--time-masks", type=int, default=10, help="spans of time hidden, each up to 5 %%")
    add("--codebook-masks", type=int, default=4,
        help="codebooks hidden, each for up to half of an utterance")
    add("--feature-masks", type=int, default=2,
        help="bands of the embedding hidden, each up to a third")
    add("--replace", type=float, default=0.0, help="share of tokens replaced by random codes")
    add("--noisy-embedding", type=float, default=0.0,
        help="standard deviation of noise on the embedding, relative to its own, such as 0.3")
    add("--curriculum", type=int, default=3000,
        help="steps over which masks, replacement, noise and noisy copies ramp up; 0: none")
    add("--units", choices=("char", "unigram", "bpe"), default="char", help="text units")
    add("--vocab-size", type=int, default=256, help="number of text units, with unigram or bpe")
    add("--lang-token", action="store_true", help="begin transcripts with a token of the language")
    add("--subsampling", type=int, choices=(1, 2, 4), default=1,
        help="input frames merged into one: 4 for 10 ms log-mel, 2 for 80 Hz tokens")
    add("--epochs", type=int, default=25, help="passes over the training utterances")
    add("--batch", type=float, default=40.0, help="seconds of speech a step, over all processes")
    add("--lr", type=float, default=3e-3,
        help="peak learning rate; Muon takes 2.5 times as much, tables that start as codebooks "
             "a tenth")
    add("--seed", type=int, default=0, help="random seed for weights, data order and masks")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run")
    add("--out", default="runs/asr", help="folder to write")
    args = parser.parse_args(arguments)
    if min(args.epochs, args.batch, args.lr) <= 0:
        parser.error("--epochs, --batch and --lr must be above 0")
    return args


def main(arguments=None):
    args = parse(arguments)
    try:
        train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
