"""Memory today: what became of the four ideas, small enough to run.

Chapter 0's transformer with other memories: keys and values that are worth keeping,
blocks of them pooled by a gate, or a state that a delta rule writes. Letters: B batch,
T tokens in the segment, M states in memory, C pooled ones, c the rate, K keys, H heads,
d_model = H * d_head, G chunks of w tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

from memtx_minimal import inputs, vanilla_transformer


def rotate(x, positions):
    """Turn x (B, K, H, d_head) by angles in proportion to positions (K,): products then
    depend on distances. Su et al., "RoFormer" (2021), section 3.2.2, by halves."""
    half, exact = x.size(-1) // 2, torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(half, dtype=exact, device=x.device) / half
    angles = positions[:, None, None] * 10_000**-steps  # (K, 1, d_head / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # (B, K, H, d_head / 2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def scores_of(q, k, queries, keys):
    """q (B, T, H, d_head), k (B, K, H, d_head), their positions -> (B, H, T, K)."""
    q, k = rotate(q, queries).transpose(1, 2), rotate(k, keys).transpose(1, 2)
    return q.size(-1) ** -0.5 * q @ k.mT


def after(old, new):
    return torch.cat([old, new], dim=1)


class Cache(nn.Module):
    """Attention over mem_len kept keys and values, then over the segment's own.

    Each head keeps the first n_sinks of a stream (StreamingLLM, Xiao et al. 2023), the
    n_used that got most attention, and the latest. What a slot got before counts decay
    times: 0, this segment's queries alone (SnapKV, Li et al. 2024); 1, all (H2O, Zhang
    et al. 2023). Positions are places in the cache. Settings may change. Memory: k, v
    (B, M, H, d_head) and what each slot got (B, M, H).
    """

    def __init__(self, d_model, n_heads, mem_len=64, n_sinks=0, n_used=0, decay=1.0):
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("n_sinks + n_used", n_sinks + n_used, 0, mem_len)
        inputs.check_number("decay", decay, 0, 1)
        self.mem_len, self.decay = mem_len, decay
        self.n_sinks, self.n_used = n_sinks, n_used

    def empty(self, k):
        return k[:, :0], k[:, :0], k[:, :0, :, 0]

    def stays(self, got):
        """Which of K slots stay, got (B, K, H) -> places (B, M, H), in their order."""
        K, n_latest = got.size(1), self.mem_len - self.n_sinks - self.n_used
        place = torch.arange(K, device=got.device)[:, None]  # (K, 1)
        always = (place < self.n_sinks) | (place >= K - n_latest)
        rank = got.masked_fill(always, float("inf"))
        return rank.topk(min(K, self.mem_len), dim=1).indices.sort(dim=1).values

    def forward(self, x, q, k, v, memory):
        """q, k, v (B, T, H, d_head) -> what is read (B, H, T, d_head), memory."""
        past_k, past_v, got = memory
        k, v = after(past_k, k), after(past_v, v)  # (B, K, H, d_head)
        place = torch.arange(k.size(1), device=x.device)  # (K,)
        now = place[past_k.size(1) :]  # (T,)
        scores, future = scores_of(q, k, now, place), place > now[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        got = self.decay * F.pad(got, (0, 0, 0, len(now))) + weights.detach().sum(2).mT
        stay = self.stays(got)  # (B, M, H)
        kept = (part.take_along_dim(stay[..., None], dim=1) for part in (k, v))
        return weights @ v.transpose(1, 2), (*kept, got.take_along_dim(stay, dim=1))


def pool(k, v, gate, gate_place):
    """k, v of n * c tokens, gate (H, d_head), gate_place (c, H, 1) -> of n slots."""
    k, v = (part.unflatten(1, (-1, len(gate_place))) for part in (k, v))
    gate = (k * gate).sum(dim=-1, keepdim=True) + gate_place
    gate = gate.softmax(dim=2)  # (B, n, c, H, 1)
    return (gate * k).sum(dim=2), (gate * v).sum(dim=2)  # (B, n, H, d_head) each


def in_view(now, end, place, mem_len, compressed_len, c):
    """Which blocks (T, C), by their end, and tokens (T, M + T) queries at `now` see."""
    left = ((now + 1 - mem_len) // c * c).clamp(min=0)[:, None]  # the window, (T, 1)
    blocks = (end <= left) & (end > left - c * compressed_len)
    return blocks, (place >= left) & (place <= now[:, None])


def closer(scores, blocks, n_tokens, top_k, c):
    """The tokens in the top_k best blocks of each query, (B, H, T, C + n_tokens)."""
    coarse = scores[..., : blocks.size(1)].masked_fill(~blocks, float("-inf"))
    best = coarse.topk(min(top_k, blocks.size(1))).indices  # (B, H, T, top_k)
    chosen = torch.zeros_like(coarse, dtype=torch.bool).scatter(-1, best, True)
    tokens = (chosen & blocks).repeat_interleave(c, dim=-1)  # (B, H, T, C * c)
    return F.pad(tokens, (blocks.size(1), n_tokens - tokens.size(-1)))


class Pooled(nn.Module):
    """Attention over a window of mem_len tokens, and blocks of c tokens before it.

    A block is one slot, a mean weighted by a gate. The language loss alone trains it: a
    block that leaves the window is read in the same call. With top_k a query reads its
    best blocks token by token too, and tokens stay. After "Native Sparse Attention" by
    Yuan et al. (2025). Memory: k, v (B, C, H, d_head), and of tokens (B, M, H, d_head).
    """

    def __init__(self, d_model, n_heads, mem_len=32, compressed_len=32,
                 compression_rate=4, top_k=None):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_number("mem_len", mem_len, 1)
        self.sizes, self.top_k = (mem_len, compressed_len, compression_rate), top_k
        self.gate = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))
        self.gate_place = nn.Parameter(torch.zeros(compression_rate, n_heads, 1))

    def empty(self, k):
        return (k[:, :0],) * 4

    def forward(self, x, q, k, v, memory):
        mem_len, compressed_len, c = self.sizes
        slot_k, slot_v, past_k, past_v = memory
        k, v = after(past_k, k), after(past_v, v)  # (B, M + T, H, d_head)
        C, n_tokens = slot_k.size(1), k.size(1)
        first = c * C if self.top_k else 0  # the first token that is in no slot yet
        n = max(0, n_tokens - first - mem_len) // c  # so many blocks leave the window
        old_k, old_v = (part[:, first : first + n * c] for part in (k, v))
        new = pool(old_k, old_v, self.gate, self.gate_place)
        slot_k, slot_v = map(after, (slot_k, slot_v), new)  # (B, C + n, H, d_head)
        place = torch.arange(n_tokens, device=x.device) - first  # of each token
        end = c * torch.arange(1 - C, n + 1, device=x.device)  # of each block
        now = place[n_tokens - q.size(1) :]  # (T,)
        scores = scores_of(q, after(slot_k, k), now, torch.cat([end - 1, place]))
        blocks, tokens = in_view(now, end, place, *self.sizes)
        seen = after(blocks, tokens).expand_as(scores)  # (B, H, T, K)
        if self.top_k:
            seen = seen | closer(scores, blocks, n_tokens, self.top_k, c)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        heads = weights @ after(slot_v, v).transpose(1, 2)
        old = max(0, C + n - compressed_len)  # slots that go
        gone = c * (old if self.top_k else n)  # tokens that go
        return heads, (slot_k[:, old:], slot_v[:, old:], k[:, gone:], v[:, gone:])


def delta_rule(q, k, v, alpha, beta, S):
    """S <- alpha S (I - beta k k^T) + beta v k^T, then S q. Yang et al., "Gated Delta
    Networks" (2024), section 3.1. q, k, v and S q (B, H, T, d_head), alpha and beta
    (B, H, T), S (B, H, d_head, d_head)."""
    read = []
    for t in range(q.size(2)):
        q_t, k_t, v_t = (part[:, :, t, :, None] for part in (q, k, v))  # columns
        S = alpha[:, :, t, None, None] * S
        S = S + beta[:, :, t, None, None] * (v_t - S @ k_t) @ k_t.mT
        read.append(S @ q_t)  # (B, H, d_head, 1)
    return torch.cat(read, dim=-1).mT, S


def chunked_delta_rule(q, k, v, alpha, beta, S, chunk_len=32):
    """The same, chunk by chunk: all that a chunk's tokens write solves one system."""
    T, log_alpha = q.size(2), alpha.clamp(min=1e-30).log()
    parts = q, k, v, log_alpha[..., None], beta[..., None]
    padded = (F.pad(part, (0, 0, 0, -T % chunk_len)) for part in parts)
    q, k, v, log_alpha, beta = (x.unflatten(2, (-1, chunk_len)) for x in padded)
    since = log_alpha.cumsum(dim=3)  # (B, H, G, w, 1): log of what is left by then
    decay, gamma = (since - since.mT).tril().exp().tril(), since.exp()
    system = (beta * decay * (k @ k.mT)).tril(-1)  # (B, H, G, w, w)
    right = beta * torch.cat([v, gamma * k], dim=-1)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, of_S = u.chunk(2, dim=-1)  # (B, H, G, w, d_head) each
    look, read = decay * (q @ k.mT), []
    for g in range(q.size(2)):  # chunk after chunk, only S is handed on
        writes = own[:, :, g] - of_S[:, :, g] @ S.mT  # (B, H, w, d_head)
        of_before = gamma[:, :, g] * (q[:, :, g] @ S.mT)
        read.append(of_before + look[:, :, g] @ writes)
        new = (decay[:, :, g, -1, :, None] * writes).mT @ k[:, :, g]
        S = gamma[:, :, g, -1:] * S + new
    return torch.cat(read, dim=2)[:, :, :T], S


class Delta(nn.Module):
    """One state in each head, written by the gated delta rule.

    beta lies in 0 ... strength: at 1 the old value of a key goes, at 2 it becomes its
    opposite (Grazzi et al. 2024). Memory: S (B, H, d_head, d_head), keys in columns.
    """

    def __init__(self, d_model, n_heads, strength=1.0):
        super().__init__()
        inputs.check_number("strength", strength, 0, 2)
        self.strength, self.gates = strength, nn.Linear(d_model, 2 * n_heads)
        self.gates.bias.data[:n_heads] = 5.0  # alpha = .993: little is forgotten
        self.norm = nn.LayerNorm(d_model // n_heads)

    def empty(self, k):
        return (k.new_zeros(len(k), *k.shape[2:], k.size(-1)),)

    def forward(self, x, q, k, v, memory):
        four, wide = (q, k, v, self.gates(x)), torch.promote_types(x.dtype, torch.float)
        q, k, v, gates = (p.to(wide).transpose(1, 2) for p in four)
        alpha, beta = gates.sigmoid().chunk(2, dim=1)  # (B, H, T) each
        q, k, S = F.normalize(q, dim=-1), F.normalize(k, dim=-1), memory[0].to(wide)
        heads, S = chunked_delta_rule(q, k, v, alpha, self.strength * beta, S)
        return self.norm(heads.to(x.dtype)), (S.to(x.dtype),)


class Layer(vanilla_transformer.Layer):
    """Chapter 0's layer, in which the heads read what `remember` remembers."""

    def __init__(self, remember, d_model, n_heads, d_ff, dropout):
        super().__init__(d_model, n_heads, d_ff, dropout)
        self.remember = remember

    def forward(self, x, memory):
        """x (B, T, d_model), memory or None -> (B, T, d_model), memory."""
        attention, y = self.attention, self.norm_attention(x)
        qkv = attention.query_key_value(y).to(x.dtype)  # (B, T, 3 * d_model)
        q, k, v = qkv.unflatten(-1, (3, attention.n_heads, -1)).unbind(2)
        memory = inputs.checked_memory(memory, self.remember.empty(k))
        heads, memory = self.remember(y, q, k, v, memory)  # (B, H, T, d_head)
        x = x + self.dropout(attention.out(heads.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x))), memory


class MemoryToday(nn.Module):
    """A language model whose layers remember in one of the ways of KINDS.

    tokens (B, T) int64, memory -> logits (B, T, vocab_size), memory: the kind's, for
    each layer of each of the n_loops loops, detached. settings go to the kind's class.
    """

    KINDS = {"cache": Cache, "pooled": Pooled, "delta": Delta}

    def __init__(
        self, vocab_size, kind="cache", d_model=128, n_heads=4, n_layers=4, d_ff=512,
        n_loops=1, dropout=0.0, **settings,
    ):  # fmt: skip
        super().__init__()
        inputs.check_sizes(locals())
        inputs.check_one_of("kind", kind, self.KINDS)
        inputs.check_even("d_model / n_heads", d_model // n_heads)
        self.n_loops, self.dropout = n_loops, nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocab_size, d_model)
        remember, sizes = self.KINDS[kind], (d_model, n_heads, d_ff, dropout)
        memories = [remember(d_model, n_heads, **settings) for _ in range(n_layers)]
        self.layers = nn.ModuleList(Layer(memory, *sizes) for memory in memories)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, tokens, memory=None):
        inputs.check_tokens(tokens, self.embedding.num_embeddings)
        x = self.dropout(self.embedding(tokens))  # (B, T, d_model)
        updated, stack = [], [*self.layers] * self.n_loops
        for layer, past in zip(stack, inputs.by_layer(memory, len(stack))):
            x, new = layer(x, past)
            updated.append(tuple(part.detach().clone() for part in new))
        return self.head(self.norm(x)), updated
