"""The recognizer: a CTC Conformer that reads codec tokens.

in   tokens (B, T, Q), token_len (B,)       or features (B, T, D), such as log-mel, as a baseline
out  log_probs (B, T', V), out_len (B,)     index 0 is the CTC blank

The embedding is the paper's idea: Q tables that start as the codec's codebooks, whose rows add up
to the quantized latent. Codes that sound alike therefore start with similar embeddings.

Legend: B utterances, T token frames, T' = T / subsampling rounded up, Q codebooks, K codes, D width
of the embedding (in TokenEmbedding, of one codebook), C model width, H heads, V text units,
N frames of a sample. In the blocks, T stands for T'.

Dhawan et al., arXiv 2407.03495, section 3. Conformer: Gulati et al., arXiv 2005.08100; training
it with CTC is our choice. Rotary positions: Su et al., arXiv 2104.09864. Self-conditioned CTC:
Nozaki and Komatsu, arXiv 2104.02724.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Width, number of blocks, dropout. In short runs of `tiny`, dropout raised the error rate.
SIZES = {"tiny": (96, 4, 0.0), "small": (144, 6, 0.1), "base": (256, 12, 0.1)}
HEADS = 4           # of the attention
KERNEL = 15         # size of the depthwise convolution


def real_steps(steps: int, lengths: Tensor) -> Tensor:
    """True for real steps, False for padding: lengths (B,) -> (B, steps)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


# ------------------------------------------------------------------------------------ augmentation

@dataclass
class Augment:
    """Augmentation of the training input, so that the model does not memorize a small corpus."""
    time_masks: int = 0             # spans of time hidden, each up to a twentieth of the utterance
    longest_mask: float = 8.0       # upper limit on a time mask, in frames
    codebook_masks: int = 0         # codebooks hidden, each for up to half of the utterance
    feature_masks: int = 0          # bands of the embedding or log-mel, each up to a third of it
    replace: float = 0.0            # share of tokens replaced by random codes
    # Standard deviation of the noise on the embedding, as a share of the embedding's own. NEFTune
    # (arXiv 2310.05914) draws from -a to a, with a = alpha / sqrt(T * D), whose deviation is
    # a / sqrt(3): with T = 400 and D = 128, 0.3 is an alpha of 118.
    noisy_embedding: float = 0.0
    strength: float = 1.0           # 0 to 1, from the curriculum: scales widths, shares, noise

    def spans(self, steps: int, lengths: Tensor, count: int, widest: Tensor) -> Tensor:
        """True inside `count` random spans of each utterance, each up to `widest` steps long.

        lengths (B,), widest (B,) -> (B, count, steps)."""
        place, share = torch.rand(2, len(lengths), count, 1, device=lengths.device)
        lengths = lengths[:, None, None]
        width = share * widest[:, None, None] * self.strength
        start = place * (lengths - width)
        at = torch.arange(steps, device=lengths.device)
        return (at >= start) & (at < start + width)

    def replace_codes(self, tokens: Tensor, codebook_size: int) -> Tensor:
        """(B, T, Q) -> (B, T, Q)."""
        hit = torch.rand(tokens.shape, device=tokens.device) < self.replace * self.strength
        return torch.where(hit, torch.randint_like(tokens, codebook_size), tokens)

    def visible(self, tokens: Tensor, token_len: Tensor) -> Tensor:
        """Codebook masks, as the weight of each token: 1, or 0 where hidden, (B, T, Q)."""
        batch, steps, codebooks = tokens.shape
        hidden = self.spans(steps, token_len, self.codebook_masks, token_len / 2)   # (B, n, T)
        which = torch.randint(codebooks, hidden.shape[:2], device=tokens.device)    # (B, n)
        which = F.one_hot(which, codebooks).float()                                 # (B, n, Q)
        times_hidden = hidden.mT.float() @ which                                    # (B, T, Q)
        return (times_hidden == 0).float()

    def hide(self, emb: Tensor, token_len: Tensor) -> Tensor:
        """Noise and masks on emb (B, T, D), of mean 0 and deviation about 1."""
        _, steps, width = emb.shape
        uniform = 2 * torch.rand_like(emb) - 1                                  # deviation 3^-0.5
        emb = emb + 3 ** 0.5 * self.noisy_embedding * self.strength * uniform
        widest = (token_len / 20).clamp(max=self.longest_mask)
        # Not any(1), which on Apple's GPUs leaves the result of no masks undefined.
        hidden = self.spans(steps, token_len, self.time_masks, widest).sum(1) > 0       # (B, T)
        emb = emb.masked_fill(hidden[:, :, None], 0.0)
        # The same along D, where every utterance is `width` long.
        widths = torch.full_like(token_len, width)
        hidden = self.spans(width, widths, self.feature_masks, widths / 3).sum(1) > 0   # (B, D)
        return emb.masked_fill(hidden[:, None], 0.0)


# --------------------------------------------------------------------------------------- embedding

class TokenEmbedding(nn.Module):
    """tokens (B, T, Q) -> (B, T, D): rows of Q tables, summed, or concatenated (B, T, Q * D)."""

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int, aggregate: str):
        super().__init__()
        self.aggregate = aggregate
        self.codebook_size = codebook_size
        self.tables = nn.Parameter(torch.randn(num_codebooks * codebook_size, dim))  # (Q * K, D)
        offset = torch.arange(num_codebooks) * codebook_size
        self.register_buffer("offset", offset, persistent=False)
        self.out_dim = dim * num_codebooks if aggregate == "stack" else dim

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """weights (B, T, Q): 1, or 0 for a hidden token."""
        rows = F.embedding(tokens + self.offset, self.tables) * weights[..., None]  # (B, T, Q, D)
        # CodecASR normalizes the result, so the sum is the same model as the paper's average.
        return rows.flatten(2) if self.aggregate == "stack" else rows.sum(2)


# --------------------------------------------------------------------------------------- Conformer

def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: y (B, H, T, C / H), cos and sin (T, C / H / 2) -> same shape as y.

    Attention scores then depend on distances in time, not on positions.
    """
    first, second = y.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, y: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """y (B, T, C), real (B, 1, 1, T) -> (B, T, C)."""
        qkv = self.qkv(self.norm(y)).unflatten(2, (3, HEADS, -1))          # (B, T, 3, H, C/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                        # (B, H, T, C/H)
        q = rotate(q, cos, sin)                                 # float32, as the angles are
        k = rotate(k, cos, sin)
        with torch.autocast("cpu", enabled=False):      # where attention is slower in bfloat16
            heads = F.scaled_dot_product_attention(q, k, v.float(), attn_mask=real)
        return self.out(heads.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Gated pointwise, depthwise over time, pointwise.

    LayerNorm where the Conformer paper has BatchNorm, so that padding does not affect the result.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.after = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, y: Tensor, real: Tensor) -> Tensor:
        """y (B, T, C), real (B, T, 1) -> (B, T, C)."""
        # Padding is set to zero, as the kernel reaches into it.
        y = F.glu(self.gate(self.norm(y)), -1) * real
        y = self.depthwise(y.mT).mT
        return self.out(F.silu(self.after(y)))


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


class ConformerBlock(nn.Module):
    """Feed-forward at half weight, attention, convolution, feed-forward at half weight, all
    residual; then LayerNorm."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.before = feed_forward(width)
        self.after = feed_forward(width)
        self.attention = Attention(width)
        self.convolution = Convolution(width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, y: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """y (B, T, C), real (B, T) -> (B, T, C)."""
        y = y + 0.5 * self.drop(self.before(y))
        y = y + self.drop(self.attention(y, real[:, None, None], cos, sin))
        y = y + self.drop(self.convolution(y, real[:, :, None]))
        y = y + 0.5 * self.drop(self.after(y))
        return self.norm(y)


class CodecASR(nn.Module):
    """Tokens to log-probabilities of text units.

        model = CodecASR(vocab_size=32, num_codebooks=8, codebook_size=1024, dim=128)
        model.start_from(codebooks, sample)             # (Q, K, D), (N, Q) training tokens
        log_probs, out_len = model(tokens, token_len)   # (B, T, Q), (B,) -> (B, T', V), (B,)
    """

    def __init__(self, vocab_size: int, num_codebooks: int, codebook_size: int, dim: int,
                 aggregate: str = "sum", size: str = "tiny", subsampling: int = 1):
        """num_codebooks 0: the input is features (B, T, dim). subsampling: 1, 2 or 4."""
        super().__init__()
        width, layers, dropout = SIZES[size]
        self.num_codebooks = num_codebooks
        self.head_dim = width // HEADS
        self.augment = Augment()                    # does nothing until train_asr.py sets it
        if num_codebooks:
            self.embedding = TokenEmbedding(num_codebooks, codebook_size, dim, aggregate)
            dim = self.embedding.out_dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.project = nn.Linear(dim, width)
        self.subsample = nn.ModuleList()
        for _ in range(subsampling // 2):           # 0, 1 or 2 layers that halve the frame rate
            layer = nn.Conv1d(width, width, 3, stride=2, padding=1)
            # torch's default shrinks the signal, two layers to a tenth: the model then keeps
            # predicting blanks.
            nn.init.kaiming_normal_(layer.weight)
            self.subsample.append(layer)
        self.blocks = nn.ModuleList(ConformerBlock(width, dropout) for _ in range(layers))
        self.output = nn.Linear(width, vocab_size)
        self.feedback = nn.Linear(vocab_size, width)

    @torch.no_grad()
    def start_from(self, tables: Tensor | None, sample: Tensor):
        """Start from these tables (Q, K, D), such as the codec's codebooks, and normalize by the
        mean and deviation of the embedding on a sample of the input, (N, Q) or (N, D)."""
        if self.num_codebooks:
            self.embedding.tables.copy_(tables[:self.num_codebooks].flatten(0, 1))
            emb = self.embedding(sample[None], torch.ones(1, *sample.shape))[0]
        else:
            emb = sample.float()
        self.mean.copy_(emb.mean(0))
        if self.num_codebooks and self.embedding.aggregate == "stack":
            # One for all dimensions: RVQ's last codebooks are small and carry little.
            deviation = (emb - self.mean).std()
        else:               # dimensions that hardly vary stay small
            deviation = emb.std(0).clamp(min=0.1 * emb.std())
        self.deviation.copy_(deviation)

    def embed(self, tokens: Tensor, token_len: Tensor) -> Tensor:
        """tokens (B, T, Q) or features (B, T, D) -> normalized embedding (B, T, D)."""
        if self.num_codebooks:
            tokens = tokens.long()
            weights = torch.ones(tokens.shape, device=tokens.device)
            if self.training:
                tokens = self.augment.replace_codes(tokens, self.embedding.codebook_size)
                weights = self.augment.visible(tokens, token_len)
            emb = self.embedding(tokens, weights)
        else:
            emb = tokens.float()
        emb = (emb - self.mean) / self.deviation
        return self.augment.hide(emb, token_len) if self.training else emb

    def forward(self, tokens: Tensor, token_len: Tensor,
                both: bool = False) -> tuple[Tensor, Tensor]:
        """tokens (B, T, Q) or features (B, T, D), token_len (B,) -> log_probs, out_len (B,).

        Self-conditioned CTC: the second half of the blocks also reads what the first half predicts.
        both: log_probs (2, B, T', V), after half of the blocks and after all, for training.
        """
        y = self.project(self.embed(tokens, token_len))                             # (B, T, C)
        out_len = token_len
        for layer in self.subsample:
            y = y * real_steps(y.shape[1], out_len)[:, :, None]
            y = F.silu(layer(y.mT)).mT
            out_len = (out_len + 1) // 2
        real = real_steps(y.shape[1], out_len)                                      # (B, T')
        cos, sin = self.angles(y.shape[1], y.device)
        half = len(self.blocks) // 2
        for block in self.blocks[:half]:
            y = block(y, real, cos, sin)
        early = self.output(y).float().log_softmax(-1)                              # (B, T', V)
        y = y + self.feedback(early.exp())
        for block in self.blocks[half:]:
            y = block(y, real, cos, sin)
        late = self.output(y).float().log_softmax(-1)                               # (B, T', V)
        log_probs = torch.stack([early, late]) if both else late
        return log_probs, out_len

    def angles(self, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles: (T', C / H / 2) each."""
        rate = 10_000 ** (-torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        angle = torch.arange(steps, device=device)[:, None] * rate
        return angle.cos(), angle.sin()
