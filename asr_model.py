"""The recogniser: a CTC Conformer that reads codec tokens.

in   tokens (B, T, Q), token_len (B,)       or features (B, T, D), such as log-mel, for the baselines
out  log_probs (B, T', V), out_len (B,)     index 0 is the CTC blank

The embedding is where the paper's idea lives: Q tables that start as the codec's codebooks, whose rows sum to the
quantised latent. The recogniser therefore begins with what the codec knows about which codes are alike.

Legend: B utterances, T token frames, T' = T / subsampling, Q codebooks, K codes, D codebook width, C model width,
H heads, V text units. Dhawan et al., arXiv 2407.03495, section 3; Conformer: Gulati et al., arXiv 2005.08100 (that it
reads out by CTC is our choice); rotary positions: arXiv 2104.09864.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"tiny":  dict(width=96, layers=4, heads=4, kernel=15),
         "small": dict(width=144, layers=6, heads=4, kernel=15),
         "base":  dict(width=256, layers=12, heads=4, kernel=15)}


def steps_mask(steps: int, lengths: Tensor) -> Tensor:
    """True for real steps, False for padding: (B, steps)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------------------- augmentation

@dataclass
class Augment:
    """Training-time damage, so that a small corpus is not learnt by heart. All vectorised over the batch."""
    time_masks: int = 0             # spans of time hidden, each up to a twentieth of the utterance
    codebook_masks: int = 0         # codebooks hidden, each over a span of up to half of the utterance
    feature_masks: int = 0          # bands of the embedding (or of the mel bands) hidden, each up to a third
    replace: float = 0.0            # share of tokens replaced by random codes
    noisy_embedding: float = 0.0    # alpha of NEFTune (arXiv 2310.05914)
    strength: float = 1.0           # 0 .. 1: the curriculum's ramp over all of the above

    def spans(self, steps: int, lengths: Tensor, count: int, widest: float) -> Tensor:
        """`count` random spans an utterance, each up to `widest` of its length -> (B, count, steps), True inside."""
        place, width = torch.rand(2, len(lengths), count, 1, device=lengths.device)
        width = width * widest * self.strength * lengths[:, None, None]
        start = place * (lengths[:, None, None] - width)
        at = torch.arange(steps, device=lengths.device)
        return (at >= start) & (at < start + width)

    def change_codes(self, tokens: Tensor, codebook_size: int) -> Tensor:
        """(B, T, Q) -> (B, T, Q)."""
        if not self.replace:
            return tokens
        hit = torch.rand(tokens.shape, device=tokens.device) < self.replace * self.strength
        return torch.where(hit, torch.randint_like(tokens, codebook_size), tokens)

    def keep_codebooks(self, tokens: Tensor, token_len: Tensor) -> Tensor:
        """Weight of each token in the sum, 0 where hidden: (B, T, Q)."""
        keep = torch.ones(tokens.shape, device=tokens.device)
        if self.codebook_masks:
            hidden = self.spans(tokens.shape[1], token_len, self.codebook_masks, 0.5)       # (B, n, T)
            which = torch.randint(tokens.shape[2], hidden.shape[:2], device=tokens.device)  # (B, n)
            keep = keep - torch.einsum("bnt,bnq->btq", hidden.float(), F.one_hot(which, tokens.shape[2]).float())
        return keep.clamp(min=0)

    def hide(self, emb: Tensor, token_len: Tensor) -> Tensor:
        """Masks and noise on the embedding (B, T, D), whose mean is 0."""
        if self.noisy_embedding:
            scale = self.strength * self.noisy_embedding / (token_len * emb.shape[2]).sqrt()
            emb = emb + scale[:, None, None] * (2 * torch.rand_like(emb) - 1)
        if self.time_masks:
            hidden = self.spans(emb.shape[1], token_len, self.time_masks, 0.05).any(1)
            emb = emb.masked_fill(hidden[:, :, None], 0.0)
        if self.feature_masks:
            size = torch.full_like(token_len, emb.shape[2])
            emb = emb.masked_fill(self.spans(emb.shape[2], size, self.feature_masks, 0.33).any(1)[:, None], 0.0)
        return emb


# ---------------------------------------------------------------------------------------------------- embedding

class TokenEmbedding(nn.Module):
    """tokens (B, T, Q) -> (B, T, D): rows of Q tables, aggregated; `stack` gives (B, T, Q * D)."""

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int, aggregate: str):
        super().__init__()
        self.aggregate, self.codebook_size = aggregate, codebook_size
        # Small, as Adam moves a row by the learning rate whatever its size: of rows near 1 it would take forever to change any.
        self.tables = nn.Parameter(0.02 * torch.randn(num_codebooks * codebook_size, dim))
        self.register_buffer("offset", torch.arange(num_codebooks) * codebook_size, persistent=False)
        self.out_dim = dim * num_codebooks if aggregate == "stack" else dim

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """weights (B, T, Q): 1, or 0 for a hidden token."""
        rows = (tokens + self.offset).flatten(0, 1)                             # (B * T, Q)
        if self.aggregate == "stack":
            emb = F.embedding(rows, self.tables) * weights.flatten(0, 1)[..., None]
            return emb.view(*tokens.shape[:2], -1)
        # CodecASR normalises what comes out, which makes the mean the same model as the sum; the paper speaks of averaging.
        emb = F.embedding_bag(rows, self.tables, mode="sum", per_sample_weights=weights.flatten(0, 1))
        return emb.view(*tokens.shape[:2], -1) / (tokens.shape[2] if self.aggregate == "mean" else 1)


# ---------------------------------------------------------------------------------------------------- Conformer

def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: y (B, T, n, C / H), cos and sin (T, n * C / H). Scores then depend on distances alone.

    Dimension i of a head turns with dimension i + C / H / 2. The products run over all heads of a frame at once: over
    the halves of one head, a few numbers each, they would take three times as long."""
    first, second = y.chunk(2, -1)
    return torch.addcmul(y.flatten(2) * cos, torch.stack([second, first], 3).flatten(2), sin).view_as(y)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, y: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """y (B, T, C), mask (B, 1, 1, T) -> (B, T, C)."""
        qk, v = self.qkv(self.norm(y)).unflatten(2, (3 * self.heads, -1)).split([2 * self.heads, self.heads], 2)
        q, k = rotate(qk, cos, sin).chunk(2, 2)                                 # (B, T, H, C / H), as v
        heads = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), attn_mask=mask)
        return self.out(heads.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Gated pointwise, depthwise over time, pointwise. LayerNorm where the paper has BatchNorm: padding cannot leak."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.after, self.out = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, y: Tensor, real: Tensor) -> Tensor:
        """y (B, T, C), real (B, T, 1) -> (B, T, C)."""
        y = F.glu(self.gate(self.norm(y)), -1) * real               # padding must be 0 where a kernel reaches it
        # As an image one pixel high, whose channels lie side by side in memory as they do in y: many times as fast on a CPU.
        conv = self.depthwise
        kernels = conv.weight.flatten(1)[:, None, None]             # by way of (C, kernel): DDP warns of other strides
        y = F.conv2d(y.transpose(1, 2)[:, :, None], kernels, conv.bias, padding=(0, *conv.padding), groups=conv.groups)
        y = y[:, :, 0].transpose(1, 2)
        return self.out(F.silu(self.after(y)))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, all residual."""

    def __init__(self, width: int, heads: int, kernel: int, dropout: float):
        super().__init__()
        def feed_forward() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.before, self.attention = feed_forward(), Attention(width, heads)
        self.convolution, self.after = Convolution(width, kernel), feed_forward()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, y: Tensor, mask: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = torch.add(y, self.drop(self.before(y)), alpha=0.5)
        y = y + self.drop(self.attention(y, mask, cos, sin))
        y = y + self.drop(self.convolution(y, real))
        y = torch.add(y, self.drop(self.after(y)), alpha=0.5)
        return self.norm(y)


class CodecASR(nn.Module):
    """Tokens to log-probabilities of text units.

        model = CodecASR(vocab_size=32, num_codebooks=8, codebook_size=1000, dim=32)
        model.start_from(torch.from_numpy(np.load("codebooks.npy")), sample)        # sample (N, Q): some of the training tokens
        log_probs, out_len = model(tokens, token_len)       # (B, T, Q), (B,) -> (B, T', V), (B,)
    """

    def __init__(self, vocab_size: int, num_codebooks: int = 8, codebook_size: int = 1000, dim: int = 32,
                 aggregate: str = "sum", size: str = "small", subsampling: int = 1, dropout: float = 0.1):
        """num_codebooks 0: the input is features (B, T, dim) instead of tokens. subsampling: 1, 2 or 4."""
        super().__init__()
        width, layers, heads, kernel = SIZES[size].values()
        self.num_codebooks, self.augment, self.head_dim = num_codebooks, Augment(), width // heads
        self.embedding = TokenEmbedding(num_codebooks, codebook_size, dim, aggregate) if num_codebooks else None
        features = self.embedding.out_dim if num_codebooks else dim
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.project = nn.Linear(features, width)
        self.subsample = nn.ModuleList(nn.Conv1d(width, width, 3, 2, padding=1) for _ in range(subsampling.bit_length() - 1))
        for conv in self.subsample:     # keeps the input's size; torch's own start leaves a tenth of it, too little for CTC to begin on
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(ConformerBlock(width, heads, kernel, dropout) for _ in range(layers))
        self.output = nn.Linear(width, vocab_size)

    @torch.no_grad()
    def start_from(self, codebooks: Tensor | None, sample: Tensor) -> None:
        """Tables become the codec's codebooks (Q, K, D), unless None; a sample of the training input (N, Q) or (N, D)
        then sets the mean and deviation by which the embedding is normalised."""
        if codebooks is not None:
            self.embedding.tables.copy_(codebooks[:self.num_codebooks].flatten(0, 1))
        emb = self.embedding(sample[None], torch.ones(1, *sample.shape)) if self.embedding else sample.float()[None]
        self.mean.copy_(emb.mean((0, 1)))
        # A dimension that never moves (FSQ's rows side by side have many) is not blown up; the others make up for its size.
        deviation = emb.std((0, 1))
        moves = deviation > 1e-2 * emb.std()
        self.deviation.copy_(torch.where(moves, deviation, 1.0) * (moves.float().mean().sqrt() or 1.0))     # silence: none moves

    def forward(self, tokens: Tensor, token_len: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T, Q) of any integer type, or features (B, T, D) -> log_probs (B, T', V), out_len (B,)."""
        if self.embedding:
            tokens, weights = tokens.long(), torch.ones(tokens.shape, device=tokens.device)
            if self.training:
                tokens = self.augment.change_codes(tokens, self.embedding.codebook_size)
                weights = self.augment.keep_codebooks(tokens, token_len)
            emb = self.embedding(tokens, weights)
        else:
            emb = tokens.float()
        emb = (emb - self.mean) / self.deviation                                # (B, T, D)
        if self.training:
            emb = self.augment.hide(emb, token_len)
        y, out_len = self.project(emb), token_len                               # (B, T, C)
        for conv in self.subsample:
            y = y * steps_mask(y.shape[1], out_len)[:, :, None]
            y, out_len = F.silu(conv(y.transpose(1, 2))).transpose(1, 2), (out_len + 1) // 2
        real = steps_mask(y.shape[1], out_len)                                  # (B, T')
        cos, sin = self.positions(y.shape[1], y.device)
        y = self.drop(y)
        for block in self.blocks:
            y = block(y, real[:, None, None], real[:, :, None], cos, sin)
        return self.output(y).float().log_softmax(-1), out_len

    def positions(self, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles, for the queries and keys of all heads: (T', 2 * C) each."""
        rate = 10_000 ** (-torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        angle = torch.arange(steps, device=device)[:, None] * rate              # (T', C / H / 2)
        cos, sin, copies = angle.cos(), angle.sin(), 2 * self.project.out_features // self.head_dim
        return torch.cat([cos, cos], 1).repeat(1, copies), torch.cat([-sin, sin], 1).repeat(1, copies)
