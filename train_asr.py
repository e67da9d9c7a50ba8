"""Stage 3: train a CTC Conformer on token files.

in   runs/tokens/               written by tokenize_corpus.py
out  runs/asr/asr.pt            weights (best epoch on dev), settings, text units; training resumes from it
     runs/asr/log.jsonl         a row an epoch

    python train_asr.py                                         # synthetic corpus, four minutes on two CPU cores
    python train_asr.py --tokens runs/tokens --size small       # LibriSpeech

Legend: B utterances, T token frames, T' output frames, Q codebooks, D feature size, V text units with the blank.
Dhawan et al., arXiv 2407.03495, section 3. The codec is not imported: all that is needed of it is on disk.
"""

import argparse
import copy
import io
import json
import math
import os
import re
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import jiwer
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from asr_model import SIZES, Augment, CodecASR


class InputError(ValueError):
    """Bad input, told in one line: what, where, what to do. The script prints it and exits with code 2."""


def option(default, help, **more):
    """A field of a settings class that is also a command-line flag."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class TrainSettings:
    tokens: str = option("runs/tokens", "folder that tokenize_corpus.py wrote")
    embedding: str = option("codebook", "tables start as the codec's codebooks, or at random", choices=("codebook", "random"))
    aggregate: str = option("sum", "how the rows of the Q tables become one vector", choices=("sum", "mean", "stack"))
    codebooks: int = option(0, "use only the first N codebooks (0: all)")
    time_masks: int = option(4, "spans of time hidden, each up to 5 %% of an utterance")
    codebook_masks: int = option(2, "codebooks hidden, each over up to half of an utterance")
    feature_masks: int = option(2, "bands of the embedding hidden, each up to a third")
    replace: float = option(0.0, "share of tokens replaced by random codes")
    noisy_embedding: float = option(0.0, "alpha of the noise added to embeddings (NEFTune)")
    noisy_share: float = option(0.5, "share of utterances taken from their noisy copies, where the tokens have any")
    curriculum: int = option(0, "steps over which masks, replacement, noise and noisy copies ramp up (0: all from the start)")
    units: str = option("char", "text units", choices=("char", "unigram", "bpe"))
    vocab_size: int = option(256, "text units of --units unigram and bpe")
    lang_token: bool = option(False, "begin each transcript with a token that names its language")
    size: str = option("tiny", "width and depth of the Conformer", choices=tuple(SIZES))
    subsampling: int = option(1, "steps of the input merged into one: 4 for 10 ms log-mel, 2 for 80 Hz tokens", choices=(1, 2, 4))
    dropout: float = option(0.1, "dropout of the Conformer")
    epochs: int = option(25, "passes over the training utterances")
    batch: float = option(40.0, "padded seconds of speech a step, over all processes")
    lr: float = option(1e-3, "peak learning rate of AdamW")
    seed: int = option(0, "random seed of weights, data order and masks")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    compile: bool = option(False, "torch.compile, on a GPU: slower to start, faster after")
    out: str = option("runs/asr", "folder to write")

    def __post_init__(self):
        for name, good in (("epochs", self.epochs > 0), ("batch", 0 < self.batch < math.inf), ("lr", 0 < self.lr < math.inf),
                           ("seed", self.seed >= 0), ("codebooks", self.codebooks >= 0), ("curriculum", self.curriculum >= 0),
                           ("dropout", 0 <= self.dropout < 1), ("replace", 0 <= self.replace <= 1), ("vocab_size", self.vocab_size > 0),
                           ("time_masks", self.time_masks >= 0), ("codebook_masks", self.codebook_masks >= 0),
                           ("feature_masks", self.feature_masks >= 0), ("noisy_share", 0 <= self.noisy_share <= 1),
                           ("noisy_embedding", 0 <= self.noisy_embedding < math.inf)):
            if not good:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: out of range")


# ---------------------------------------------------------------------------------------------------- text units

class Text:
    """Transcripts to unit ids and back; id 0 is sentencepiece's <unk>, which is never a target: it serves as the CTC blank."""

    def __init__(self, model: bytes):
        self.model, self.units = model, sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, rows: list[dict], settings: TrainSettings) -> "Text":
        languages = sorted({row["lang"] for row in rows}) if settings.lang_token else []
        if settings.lang_token and not any(languages):
            raise InputError("--lang-token: no utterance says its language; give it in a manifest, or leave the flag out")
        odd = [name for name in languages if name in ("unk", "s", "/s") or re.search(r"[\s<>]", name)]
        if odd:
            raise InputError(f"--lang-token: '{odd[0]}' cannot be a token; name languages without spaces and brackets, such as en")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(row["text"] for row in rows), model_writer=model, model_type=settings.units,
                vocab_size=settings.vocab_size if settings.units != "char" else 8000, hard_vocab_limit=False,
                character_coverage=1.0, max_sentence_length=1 << 24, normalization_rule_name="identity", minloglevel=2,
                unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
                user_defined_symbols=[f"<{name}>" for name in languages])
        except RuntimeError as error:
            raise InputError(f"--units {settings.units} --vocab-size {settings.vocab_size}: {str(error).splitlines()[-1]}") from None
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Unknown characters become id 0, which the caller drops."""
        return self.units.encode(text)

    def unknown(self, texts: list[str]) -> int:
        """How many of their characters no unit can write."""
        return sum(count for char, count in Counter(chain.from_iterable(texts)).items() if 0 in self.encode(char))

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.units.decode(ids).split())

    def __len__(self) -> int:
        return self.units.get_piece_size()

    def greedy(self, log_probs: Tensor, out_len: Tensor) -> list[str]:
        """Best unit a frame, repeats merged, blanks dropped. log_probs (B, T, V) -> B texts."""
        best = log_probs.argmax(-1)                                             # (B, T)
        keep = F.pad(best[:, 1:] != best[:, :-1], (1, 0), value=True) & (best != 0)
        return [self.decode(row[flag].tolist()) for row, flag in
                ((row[:n], flag[:n]) for row, flag, n in zip(best.cpu(), keep.cpu(), out_len.tolist()))]


# ---------------------------------------------------------------------------------------------------- data

META = {"features": str, "codec": str, "codec_path": str, "sample_rate": int, "hop": int, "codebooks": int, "codebook_size": int,
        "dim": int, "train": list, "dev": list, "test": list}
ROW = {"id": str, "text": str, "lang": str, "duration": float, "frames": int, "audio": str, "array": str}


def parse_json(text: str, kinds: dict[str, type]) -> dict:
    """One object of JSON; ValueError unless each of these keys holds something of its kind."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no object")
    wrong = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} missing or of the wrong kind")
    return found


def read_meta(folder: str | Path) -> dict:
    path = Path(folder) / "meta.json"
    try:
        return parse_json(path.read_text("utf-8"), META)
    except OSError:
        raise InputError(f"{folder}: no tokens here (no meta.json); run tokenize_corpus.py first") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged, or of another version ({error}); run tokenize_corpus.py with another --out") from None


def read_rows(folder: str | Path, subset: str) -> list[dict]:
    """The utterances of a subset, copies among them."""
    path, rows = Path(folder) / f"{subset}.jsonl", []
    if not path.is_file():
        raise InputError(f"{path}: no such subset; this folder has "
                         f"{', '.join(sorted(p.stem for p in Path(folder).glob('*.jsonl'))) or 'none'}: run tokenize_corpus.py to its end")
    try:
        for line in path.read_text("utf-8").removesuffix("\n").split("\n"):
            rows.append(parse_json(line, ROW))
    except ValueError as error:
        raise InputError(f"{path}: line {len(rows) + 1} is damaged ({error}); run tokenize_corpus.py again, which writes it anew") from None
    return rows


def read_array(path: Path, shape: tuple, kind: str, codes: int = 0) -> np.ndarray:
    """What tokenize_corpus.py wrote: tokens, whose values are below `codes`, or floats."""
    least, most = (0, codes - 1) if codes else (-1e30, 1e30)
    try:
        array = np.load(path, allow_pickle=False)
        low, high = float(array.min()), float(array.max())
    except Exception as error:                          # numpy raises many types for a damaged file
        raise InputError(f"{path}: not readable ({error!r}); delete it and run tokenize_corpus.py again") from None
    if array.dtype != kind or array.shape != shape or not least <= low <= high <= most:
        raise InputError(f"{path}: holds {array.dtype} {array.shape} from {low:g} to {high:g}, expected {kind} {shape} "
                         f"from {least:g} to {most:g}; delete it and run tokenize_corpus.py again")
    return array


class TokenSet:
    """All arrays of some subsets in one tensor in memory, cut into batches without a loop over utterances."""

    def __init__(self, folder: str | Path, subsets: list[str], codebooks: int = 0, copies: bool = False):
        """codebooks: only the first so many; 0: all. copies: also those at other speeds and in noise."""
        meta = read_meta(folder)
        width, kind = (meta["codebooks"], "int16") if meta["codebooks"] else (meta["dim"], "float16")
        rows, arrays = [row for subset in subsets for row in read_rows(folder, subset)], []
        self.rows = [row for row in rows if copies or "copy_of" not in row]
        for row in self.rows:
            array = read_array(Path(folder) / row["array"], (row["frames"], width), kind, meta["codebooks"] and meta["codebook_size"])
            arrays.append(array[:, :codebooks] if codebooks else array)
        self.hold(arrays)

    def hold(self, arrays: list[np.ndarray]) -> None:
        self.lengths = torch.tensor([len(array) for array in arrays])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.flat = torch.from_numpy(np.concatenate(arrays))                    # (all frames, Q or D)

    def with_arrays(self, arrays: list[np.ndarray]) -> "TokenSet":
        """The same utterances with other arrays."""
        other = copy.copy(self)
        other.hold(arrays)
        return other

    def take(self, which: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Utterance numbers (B,) -> tokens (B, T, Q), token_len (B,)."""
        lengths = self.lengths[which]
        at = torch.arange(int(lengths.max())).expand(len(which), -1)
        tokens = self.flat[(self.starts[which, None] + at).clamp(max=len(self.flat) - 1)]
        tokens[at >= lengths[:, None]] = 0
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(device, non_blocking=True), lengths.to(device, non_blocking=True)

    def batches(self, which: Tensor, frames: int, generator: torch.Generator | None) -> list[Tensor]:
        """Cut utterances into batches of like length with at most `frames` padded frames each; shuffled if asked."""
        lengths = self.lengths[which].float()
        if generator:                                                           # other neighbours in every epoch
            lengths = lengths * (1 + 0.1 * torch.rand(len(which), generator=generator))
        groups, longest = [], 0
        for i in which[lengths.argsort()].tolist():
            longest = max(longest, int(self.lengths[i]))
            if not groups or (len(groups[-1]) + 1) * longest > frames:
                groups.append([])
                longest = int(self.lengths[i])
            groups[-1].append(i)
        if generator:
            groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return [torch.tensor(group) for group in groups]


class TrainSet(TokenSet):
    """Adds targets, and picks one variant of each utterance an epoch: the original, another speed, or a noisy copy."""

    def __init__(self, settings: TrainSettings, meta: dict, text: Text):
        super().__init__(settings.tokens, meta["train"], settings.codebooks, copies=True)
        self.settings, self.unknown = settings, text.unknown([row["text"] for row in self.rows])
        self.targets = [torch.tensor([i for i in text.encode(transcript(row, settings.lang_token)) if i]) for row in self.rows]
        # CTC needs a frame for each unit and a blank between equal neighbours; zero_infinity would only hide the rest.
        needed = torch.tensor([len(ids) + int((ids[1:] == ids[:-1]).sum()) for ids in self.targets])
        self.out_len = self.lengths
        for _ in range(settings.subsampling.bit_length() - 1):
            self.out_len = (self.out_len + 1) // 2
        fits = (self.out_len >= needed) & torch.tensor([len(ids) > 0 for ids in self.targets])
        self.dropped = [row["id"] for row, ok in zip(self.rows, fits) if not ok]
        # The memory of attention grows with the square of the length: an hour would take hundreds of gigabytes.
        self.limit = max(settings.batch, 60.0)
        short = self.lengths * meta["hop"] / meta["sample_rate"] <= self.limit
        self.long, fits = [row["id"] for row, ok, good in zip(self.rows, short, fits) if good and not ok], fits & short
        self.variants: dict[tuple, dict[bool, list[int]]] = {}                  # an id may be in two subsets: two utterances
        for i, row in enumerate(self.rows):
            if fits[i]:
                original = row["array"].split("/")[0], row.get("copy_of") or row["id"]
                self.variants.setdefault(original, {False: [], True: []})[row.get("noisy", False)].append(i)
        if not self.variants:
            raise InputError(f"{settings.tokens}: no training utterance is long enough for its transcript at this frame rate"
                             + (f", and short enough for memory ({self.limit:g} s)" if self.long else ""))

    def epoch(self, number: int, frames: int, strength: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.settings.seed * 10_000 + number)
        draws, picked = torch.rand(len(self.variants), 2, generator=generator).tolist(), []
        for (noisy, which), kinds in zip(draws, self.variants.values()):
            kind = bool(kinds[True]) and (noisy < self.settings.noisy_share * strength or not kinds[False])
            picked.append(kinds[kind][int(which * len(kinds[kind]))])
        # The first epoch goes from short to long: CTC finds its first alignments there (Deep Speech 2, section 3.3).
        return self.batches(torch.tensor(picked), frames, generator if number else None)


def transcript(row: dict, lang_token: bool) -> str:
    return f"<{row['lang']}> {row['text']}" if lang_token else row["text"]


def split_language(text: str) -> tuple[str, str]:
    """'<en> HELLO' -> 'en', 'HELLO'; no token -> '', text."""
    if text.startswith("<") and ">" in text:
        lang, _, rest = text[1:].partition(">")
        return lang, rest.strip()
    return "", text


# ---------------------------------------------------------------------------------------------------- training

def build_model(settings: dict, meta: dict, vocab_size: int) -> CodecASR:
    """The model that these settings name, with random weights. settings: a TrainSettings as a dict."""
    return CodecASR(vocab_size, settings["codebooks"] or meta["codebooks"], meta["codebook_size"], meta["dim"],
                    settings["aggregate"], settings["size"], settings["subsampling"], settings["dropout"])


def train(settings: TrainSettings) -> None:
    device, rank, world = start_processes(settings.device)
    if settings.compile and device.type != "cuda":
        raise InputError("--compile: only on a GPU; on a CPU compiling takes longer than it saves")
    meta, path = read_meta(settings.tokens), Path(settings.out) / "asr.pt"
    if settings.codebooks > meta["codebooks"]:
        raise InputError(f"--codebooks {settings.codebooks}: {settings.tokens} has {meta['codebooks']}")
    saved = load_checkpoint(path) if path.exists() else {"epoch": 0, "step": 0, "best": math.inf}
    if saved["epoch"]:
        check_same_run(path, saved, settings, meta)
        text = Text(saved["text"])
    else:
        text = Text.train([row for subset in meta["train"] for row in read_rows(settings.tokens, subset)], settings)
    data, dev = TrainSet(settings, meta, text), TokenSet(settings.tokens, meta["dev"], settings.codebooks)
    frames = round(settings.batch * meta["sample_rate"] / meta["hop"])          # padded frames a batch
    model = start_model(settings, meta, len(text), data).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), settings.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    if saved["epoch"]:
        with fitting(path):
            model.load_state_dict(saved["last"])
            optimiser.load_state_dict(saved["optimiser"])
    if rank == 0:
        announce(settings, model, text, data, device, saved["epoch"])
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    net = torch.compile(net, dynamic=True) if settings.compile else net

    step, best, best_model, log = saved["step"], saved["best"], saved.get("model"), saved.get("log", [])
    for epoch in range(saved["epoch"], settings.epochs):
        began, strength = time.time(), ramp(step, settings)
        groups = data.epoch(epoch, frames, strength)
        losses, bar = [], tqdm(groups, desc=f"epoch {epoch + 1}/{settings.epochs}", leave=False, disable=rank > 0)
        for number, group in enumerate(bar):
            lr = settings.lr * lr_share((epoch + number / len(groups)) / settings.epochs)
            model.augment.strength = ramp(step, settings)
            torch.manual_seed((settings.seed * 1_000_000 + step) * world + rank)        # a resumed run draws the same
            losses.append(train_step(net, optimiser, data, group, lr, device, rank, world))
            step += 1
            if step % 20 == 0:                          # seldom: reading a loss makes a GPU wait
                bar.set_postfix_str(f"loss {finite(losses, step, data, groups)[-1]:.2f}")
        finite(losses, step, data, groups)
        loss = torch.stack(losses).mean()
        if world > 1:
            dist.all_reduce(loss)
        loss, minutes = loss.item() / world, (time.time() - began) / 60
        if rank:
            continue
        wer, cer = judge(model, dev, text, frames, device, settings.lang_token)
        if cer <= best:
            best, best_model = cer, cpu_state(model)
        speed = sum(data.rows[i]["duration"] for group in groups for i in group.tolist()) / minutes / 60
        print(f"epoch {epoch + 1}/{settings.epochs} | step {step} | loss {loss:.3f} | dev CER {100 * cer:.1f} % | "
              f"dev WER {100 * wer:.1f} % | {speed:.0f} s of speech a second", flush=True)
        log.append({"epoch": epoch + 1, "step": step, "loss": loss, "dev_cer": cer, "dev_wer": wer, "lr": lr,
                    "seconds_a_second": speed, "minutes": minutes})
        save_checkpoint(path, {
            "kind": "asr", "settings": asdict(settings), "meta": meta, "epoch": epoch + 1, "step": step, "best": best,
            "text": torch.tensor(list(text.model), dtype=torch.uint8), "model": best_model, "last": cpu_state(model),
            "optimiser": optimiser.state_dict(), "log": log})
    if rank == 0:
        print(f"wrote {path} (best dev CER {100 * best:.1f} %); next: python evaluate.py --asr {path}")


def start_model(settings: TrainSettings, meta: dict, vocab_size: int, data: TrainSet) -> CodecASR:
    """A new model, the same in all processes, with its embedding started from the codec's codebooks."""
    torch.manual_seed(settings.seed)
    model, books = build_model(asdict(settings), meta, vocab_size), None
    if meta["codebooks"] and settings.embedding == "codebook":
        shape = meta["codebooks"], meta["codebook_size"], meta["dim"]
        books = torch.from_numpy(read_array(Path(settings.tokens) / "codebooks.npy", shape, "float32"))
    model.start_from(books, data.flat[torch.randint(len(data.flat), (20_000,))])
    model.augment = Augment(settings.time_masks, settings.codebook_masks, settings.feature_masks, settings.replace,
                            settings.noisy_embedding)
    return model


def announce(settings: TrainSettings, model: CodecASR, text: Text, data: TrainSet, device: torch.device, done: int) -> None:
    print(f"recogniser: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(text)} {settings.units} units; "
          f"{len(data.variants)} utterances" + f", {len(data.rows)} with copies" * (len(data.rows) > len(data.variants)) + f"; on {device}")
    if data.dropped:
        print(f"dropped {len(data.dropped)} utterances too short for their transcripts at this frame rate: {', '.join(data.dropped[:5])}")
    if data.long:
        print(f"dropped {len(data.long)} utterances longer than {data.limit:g} s; cut them, or raise --batch: {', '.join(data.long[:5])}")
    if data.unknown:
        print(f"{data.unknown} characters of the transcripts are not among the text units, and were dropped")
    if done:
        print(f"continuing after epoch {done} of {settings.epochs}")


def ramp(step: int, settings: TrainSettings) -> float:
    """The curriculum: 0 at the first step, 1 from --curriculum on."""
    return min(1.0, step / settings.curriculum) if settings.curriculum else 1.0


def lr_share(progress: float) -> float:
    """Learning rate as a share of its peak: warm-up over a twelfth of the run, then a half cosine to 0."""
    return min(1.0, 12 * progress + 1e-3) * (0.5 + 0.5 * math.cos(math.pi * progress))


def train_step(net: nn.Module, optimiser, data: TrainSet, group: Tensor, lr: float, device, rank: int, world: int) -> Tensor:
    """One optimiser step on the utterances `group` (B,) -> CTC loss a unit, left on the device."""
    optimiser.param_groups[0]["lr"] = lr
    # A batch with fewer utterances than processes goes whole to all: none may be left without work.
    mine, scale = (group[rank::world], world) if len(group) >= world else (group, 1)
    tokens, token_len = data.take(mine, device)
    targets = torch.cat([data.targets[i] for i in mine.tolist()]).to(device)
    target_len = torch.tensor([len(data.targets[i]) for i in mine.tolist()])
    with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        log_probs, _ = net(tokens, token_len)                                   # (B, T', V)
    # Nats a text unit, over the utterances of all processes; DDP will divide the gradients by their number.
    units = sum(len(data.targets[i]) for i in group.tolist())
    if device.type == "mps":                            # for which torch has no CTC
        log_probs, targets = log_probs.cpu(), targets.cpu()
    # Lengths stay on the CPU: fetched from a GPU, they would make each step wait for it.
    loss = F.ctc_loss(log_probs.transpose(0, 1), targets, data.out_len[mine], target_len, reduction="sum") / units * scale
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimiser.step()
    return loss.detach()


def finite(losses: list[Tensor], step: int, data: TrainSet, groups: list[Tensor]) -> list[float]:
    """The losses of this epoch up to `step`; InputError where one is not finite."""
    values = torch.stack(losses).tolist()
    for number, value in enumerate(values, step - len(values)):
        if not math.isfinite(value):                    # the first: after it, all are
            names = [data.rows[i]["id"] for i in groups[number - step + len(values)].tolist()]
            raise InputError(f"the loss became infinite at step {number + 1}, at utterances {', '.join(names[:8])}; "
                             f"the checkpoint of the last good epoch is kept: try a lower --lr")
    return values


@torch.inference_mode()
def judge(model: CodecASR, dev: TokenSet, text: Text, frames: int, device, lang_token: bool) -> tuple[float, float]:
    """Greedy decoding of a subset -> WER, CER; a language's token does not count as text."""
    model.eval()
    refs, hyps = [], []
    for group in dev.batches(torch.arange(len(dev.rows)), 2 * frames, None):
        found = text.greedy(*model(*dev.take(group, device)))
        hyps += [split_language(hyp)[1] for hyp in found] if lang_token else found
        refs += [dev.rows[i]["text"] for i in group.tolist()]
    model.train()
    return jiwer.wer(refs, hyps), jiwer.cer(refs, hyps)


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------- plumbing
# Much of it stands in codec.py too, on purpose: this stage needs nothing of the codec but what is on disk.

FORMAT = 1              # of checkpoints; raised when their contents change


def write_atomically(path: Path, data: bytes) -> None:
    """A reader finds the old file or the new one, never a half of it."""
    temporary = path.with_name(f".{path.name}.part")    # always the same: what a killed run left is written over
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None         # a full disk does not say which file


def save_checkpoint(path: Path, content: dict) -> None:
    """The checkpoint, and its log beside it for human eyes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getbuffer())
    write_atomically(path.with_name("log.jsonl"), "".join(json.dumps(row) + "\n" for row in content["log"]).encode())


def load_checkpoint(path: str | Path, device: str = "cpu") -> dict:
    """Raises InputError unless path holds a recogniser of this format."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; train it first, or give its path")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found = saved["kind"], saved["format"]
        if zipfile.ZipFile(path).testzip():             # torch itself compares no checksums
            raise ValueError
    except Exception:                                   # torch raises many types for a damaged file
        raise InputError(f"{path}: not a checkpoint of this project, or damaged; delete it to train anew") from None
    if found != ("asr", FORMAT):
        raise InputError(f"{path}: holds {found[0]} (format {found[1]}), expected asr (format {FORMAT}); give another path, or train it anew")
    with fitting(path):
        saved["settings"] = asdict(TrainSettings(**saved["settings"]))
        parse_json(json.dumps(saved["meta"]), META)
        saved["text"] = bytes(saved["text"].tolist())
        Text(saved["text"])
        missing = {"epoch", "step", "best", "model", "last", "optimiser"} - saved.keys()
        if missing:
            raise KeyError(*missing)
    return saved


@contextmanager
def fitting(path: str | Path):
    """Around what is done with the parts of a checkpoint: those of another version are told in one line."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: was written by another version of this script ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[-200:]}); use that version, or train it anew") from None


def check_same_run(path: Path, saved: dict, settings: TrainSettings, meta: dict) -> None:
    """A run goes on only with what it began with."""
    for name, value in asdict(settings).items():
        if name not in ("device", "out", "compile", "tokens") and saved["settings"][name] != value:
            raise InputError(f"{path} was trained with --{name.replace('_', '-')} {saved['settings'][name]}, now {value}: "
                             f"give another --out, or delete the file")
    check_same_tokens(path, saved["meta"], settings.tokens, meta)
    for name in ("corpus", "train", "dev", "speeds", "noise", "snr", "seed"):
        if saved["meta"].get(name) != meta.get(name):
            raise InputError(f"{path} was trained on tokens with {name} {saved['meta'].get(name)}, {settings.tokens} has {meta.get(name)}: "
                             f"give another --out, or delete the file")


def check_same_tokens(path: str | Path, meta: dict, tokens: str | Path, found: dict) -> None:
    """A recogniser reads only what it was trained on: the same features, of the same codec."""
    for name in ("codec", "features", "sample_rate", "hop", "codebooks", "codebook_size", "dim"):
        if meta[name] != found[name]:
            raise InputError(f"{path} was trained on tokens of codec {meta['codec']} ({name} {meta[name]}), {tokens} holds those of "
                             f"codec {found['codec']} ({name} {found[name]}): give another --tokens, or another run")


def pick_device(name: str) -> str:
    if name != "auto":
        if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
            raise InputError(f"--device {name}: this machine, or this build of torch, has none; try --device cpu")
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def start_processes(device: str) -> tuple[torch.device, int, int]:
    """-> device, rank, number of processes; more than one where torchrun started this script."""
    device, world = pick_device(device), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    return torch.device(device), int(os.environ.get("RANK", 0)), world


def stop_processes() -> None:
    """After all work: nobody leaves before the others, and no thread of gloo's still holds a tensor when the interpreter goes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def parse(settings: type, description: str, arguments: list[str] | None = None):
    """Command-line flags from the fields of a settings class -> an instance of it."""
    page = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=120)
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=description, formatter_class=page)
    for item in fields(settings):
        flag, more = "--" + item.name.replace("_", "-"), dict(item.metadata)
        if item.default is False:
            parser.add_argument(flag, action="store_true", **more)
            continue
        more.setdefault("type", type(item.default))
        if "choices" not in more:
            more["metavar"] = {int: "N", float: "X", str: "NAME"}[more["type"]]
        more["help"] += f" (default: {item.default})"
        parser.add_argument(flag, default=item.default, **more)
    return settings(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> None:
    train(parse(TrainSettings, __doc__, arguments))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")   # names and transcripts in letters that the terminal lacks
    sys.stderr.reconfigure(errors="backslashreplace")
    try:
        main()
        stop_processes()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last finished epoch", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; the last finished epoch is kept, the same command continues", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:        # on a CPU torch has no type of its own for it
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print("error: out of memory; try a smaller --batch or --size, or --device cpu", file=sys.stderr)
        sys.exit(2)
