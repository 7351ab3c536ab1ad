"""Checks for the exercises: they say "right", or what was expected and what came."""

import math
from copy import deepcopy

import torch
import torch.nn.functional as F

from memtx_minimal import tasks
from memtx_minimal.compressive_transformer import LOSSES, CompressiveTransformer
from memtx_minimal.feedback_transformer import step
from memtx_minimal.reformer import in_set
from memtx_minimal.transformer_xl import (
    RelativeAttention,
    attention_mask,
    distances,
)
from memtx_minimal.vanilla_transformer import sinusoid

# ---------------------------------------------------------------- chapter 0


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_attention(my_attention):
    """Chapter 0, exercise 1."""
    for T, d in [(1, 4), (2, 4), (7, 3)]:
        q, k, v = random(3, T, d)
        right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mine = my_attention(q, k, v)
        if mine.shape != right.shape:
            raise AssertionError(f"the shape is {tuple(mine.shape)}, not {(T, d)}")
        wrong = ((mine - right).abs().amax(dim=1) > 1e-4).nonzero().flatten().tolist()
        if wrong:
            why = "query t sees keys 0 ... t, scores are divided by the root of d"
            raise AssertionError(f"T = {T}, d = {d}: queries {wrong} are wrong: {why}")
    print("right")


def check_cache(my_cache):
    """Chapter 0, exercise 2."""
    for T, B, n_kv_heads in [(1, 1, 1), (100_000, 1, 32), (100_000, 6, 8)]:
        mine, right = my_cache(T, B, n_kv_heads), 2 * 32 * T * B * n_kv_heads * 128 * 2
        if mine != right:
            why = "count keys and values, layers, texts, tokens, heads, d_head, bytes"
            raise AssertionError(f"{(T, B, n_kv_heads)}: {mine}, not {right}: {why}")
    print("right")


def check_turn(my_turn):
    """Chapter 0, exercise 3."""
    for d_model, k in [(2, 1), (8, 0), (64, 1), (64, 9)]:
        P, turn = sinusoid(torch.arange(40), d_model), my_turn(k, d_model)
        if turn.shape != (d_model, d_model):
            shapes = f"{tuple(turn.shape)}, not {(d_model, d_model)}"
            raise AssertionError(f"the shape is {shapes}")
        off = (P[: 40 - k] @ turn - P[k:]).abs().amax(dim=0)  # (d_model,)
        if off.max() > 1e-3:
            wrong = (off > 1e-3).nonzero().flatten().tolist()
            where = f"k = {k}, d_model = {d_model}"
            raise AssertionError(f"{where}: dimensions {wrong} are wrong")
    print("right")


@torch.inference_mode()
def check_slide(my_slide, model):
    """Chapter 0, exercise 4; model has a window of 64."""
    (vocab_size, d_model), device = model.embedding.weight.shape, model.head.bias.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (1, 65), generator=generator).to(device)
    positions = torch.arange(65, device=device).clamp(max=63)  # the last two share one
    mask = torch.ones(65, 65, dtype=torch.bool, device=device).tril()
    mask[64, 0] = False  # dropped before the last one came
    x = model.embedding(tokens) + sinusoid(positions, d_model)
    for layer in model.layers:
        attention = layer.attention
        qkv = attention.query_key_value(layer.norm_attention(x))
        qkv = qkv.unflatten(-1, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        x = x + attention.out(heads.transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.norm_feed_forward(x))
    right, again = model.head(model.norm(x))[:, -1], model(tokens[:, 1:])[0][:, -1]
    off = (my_slide(tokens) - right).abs().max().item()
    if not off < 1e-3:
        why = "64 tokens in, the oldest of each layer out, then the last token"
        raise AssertionError(f"the logits are wrong by {off:.2g}: {why}")
    off = (right - again).abs().max()
    print(f"right: {off:.2f} from those of the last 64 read anew")


@torch.inference_mode()
def check_sliding(my_sliding, model, stream):
    """Chapter 0, exercise 5; model has a window of 64."""
    for n in (1, 30):
        losses = []
        for t in range(64, 64 + n):
            window, target = stream[t - 64 : t][None], stream[t : t + 1]
            logits = model(window.to(model.head.weight.device))[0][:, -1]
            losses.append(F.cross_entropy(logits.cpu(), target.cpu()).item())
        mine, right = float(my_sliding(model, stream, n)), sum(losses) / n
        if not abs(mine - right) < 1e-3:
            why = "character 64 is the first that has 64 before it"
            raise AssertionError(f"n = {n}: {mine:.4f}, not {right:.4f}: {why}")
    print("right")


# ---------------------------------------------------------------- chapter 1


def check_shift(my_shift):
    """Chapter 1, exercise 1."""
    if "rel_shift" in getattr(getattr(my_shift, "__code__", None), "co_names", ()):
        raise AssertionError("write it without rel_shift: pad, reshape, cut")
    for T, M in [(3, 2), (4, 9), (5, 0), (1, 0)]:
        where, K = f"T = {T}, M = {M}: ", M + T
        scores = torch.arange(2 * 3 * T * K).view(2, 3, T, K).float()
        try:
            mine = my_shift(scores)
        except Exception as error:
            raise AssertionError(f"{where}it fails with {error!r}") from error
        if getattr(mine, "shape", None) != scores.shape:
            shape = tuple(getattr(mine, "shape", ()))
            wanted = f"{tuple(scores.shape)}, like the scores"
            raise AssertionError(f"{where}the shape is {shape}; return {wanted}")
        for i, j in (distances(T, M) >= 0).nonzero().tolist():
            column = K - 1 - (M + i - j)  # the columns are distances, K - 1 ... 0
            came, right = mine[..., i, j], scores[..., i, column]
            if not torch.equal(came, right):
                where += f"row {i}, key {j}, at a distance of {M + i - j}: "
                columns = (scores[0, 0] == came[0, 0]).nonzero().tolist()
                stands = "row {}, column {}".format(*(columns or [("none", "none")])[0])
                wanted = f"row {i}, column {column}"
                raise AssertionError(f"{where}should be {wanted}, and is {stands}")
    print("right")


def check_cleared(loss, without, whole):
    """Chapter 1, exercise 2: the loss found, and those without and with all memory."""
    expected = (without + 3 * whole) / 4
    if not min(without, whole) < loss < max(without, whole):
        between = f"between {whole:.3f} and {without:.3f}"
        raise AssertionError(f"{loss:.3f} does not lie {between}: is it cleared at all?")
    if abs(loss - expected) > 0.01:
        share = (loss - whole) / (without - whole)
        raise AssertionError(
            f"{loss:.3f}: as if {share:.0%} of the segments began without memory; one "
            f"in four should"
        )
    print(f"right: (without + 3 * with) / 4 = {expected:.3f}")


def longest_reach(T, M, L, same_length):
    """How many of the latest tokens the last of several segments' logits can feel."""
    oldest = last = T * (M + 2) * (L + 1) - 1  # of a text that is long enough
    for _ in range(L):
        first = oldest // T * T - M  # the memory of its segment
        oldest = max(first, oldest - M + 1) if same_length else first
    return last - oldest + 1


def check_reach(my_reach):
    """Chapter 1, exercise 3: my_reach(M, L), with same_length."""
    for M, L in [(4, 1), (4, 3), (1, 5), (6, 2)]:
        mine = my_reach(M, L)
        right = {longest_reach(T, M, L, True) for T in (1, 4)}  # whatever T is
        if {mine} != right:
            hint = f"{min(right)}: each query sees M keys, itself among them"
            raise AssertionError(f"my_reach({M}, {L}) is {mine}, not {hint}")
    print("right")


@torch.no_grad()
def check_bias(BiasAttention):
    """Chapter 1, exercise 4: a class like RelativeAttention, with `bias` (H, n)."""
    torch.manual_seed(0)
    H, d_head = 2, 4
    layer = BiasAttention(H * d_head, H, 0.0).double()
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, torch.nn.Parameter) or bias.dim() != 2 or len(bias) != H:
        raise AssertionError("give it a parameter `bias` (H, n), n distances")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    for T, M in [(3, 4), (2, bias.size(1) + 3)]:
        K, context = M + T, torch.randn(2, M + T, H * d_head).double()
        distance = distances(T, M)
        q = layer.heads(layer.query(context[:, -T:]))
        k, v = (layer.heads(x) for x in layer.key_value(context).chunk(2, dim=-1))
        far = distance.clamp(0, bias.size(1) - 1)
        scores = ((q + layer.u) @ k.mT) / d_head**0.5
        scaled = [bias[:, far], bias[:, far] / d_head**0.5]  # either is right
        mask, wanted = attention_mask(distance), []
        for b in scaled:
            heads = (scores + b + mask).softmax(dim=-1) @ v  # (B, H, T, d_head)
            wanted.append(layer.out(heads.transpose(1, 2).flatten(2)))
        R = torch.zeros(K + 1, H * d_head).double()
        mine = layer(context, R, mask)
        if mine.shape != wanted[0].shape:
            shapes = f"{tuple(mine.shape)}, not {tuple(wanted[0].shape)}"
            raise AssertionError(f"the output has the shape {shapes}")
        if not any(torch.allclose(mine, w) for w in wanted):
            case = "when the table covers all distances"
            if K > bias.size(1):
                case = "when keys lie beyond the table: they share its last number"
            raise AssertionError(f"T = {T}, M = {M}: the output is wrong, {case}")
    print("right")


def check_through(model):
    """Chapter 1, exercise 5: a TransformerXL whose memory keeps the graph."""
    T, model = model.mem_len, deepcopy(model).double().eval()
    tokens = torch.randint(model.embedding.num_embeddings, (2, 2 * T))

    def gradient(segments):
        model.zero_grad()
        memory = None
        for segment in segments:
            logits, memory = model(segment, memory)
        logits[:, -1].logsumexp(-1).sum().backward()
        return model.embedding.weight.grad.clone()

    whole, mine = gradient([tokens]), gradient(tokens.split(T, dim=1))
    if not torch.allclose(mine, whole):
        old = tokens[:, :T].unique()
        only = old[~torch.isin(old, tokens[:, T:].unique())]
        cut = len(only) and not mine[only].any()
        why = "the first segment gets none: is `detach` gone?" if cut else "they differ"
        expected = "two segments should give the gradient of one long window"
        raise AssertionError(f"{expected}: {why}")
    print("right")


# ---------------------------------------------------------------- chapter 2


def check_slot(my_slot):
    """Chapter 2, exercise 1."""
    for T, M, C, c in [(3, 6, 6, 3), (4, 8, 4, 2), (4, 4, 3, 4), (2, 6, 5, 1)]:
        compressed, memory = [], []
        for n in range(T, 20 * T + 1, T):
            memory += [[t] for t in range(n - T, n)]
            while len(memory) > M:
                compressed.append(sum(memory[:c], []))
                memory = memory[c:]
            row = compressed[-C:] + memory
            for slot in range(C + M) if len(row) == C + M else ():
                case, mine = (slot, n, M, C, c), list(my_slot(slot, n, M, C, c))
                if mine != row[slot]:
                    raise AssertionError(f"my_slot{case} is {mine}, not {row[slot]}")
    print("right")


def moved(compression, loss, n_pieces):
    """The parts of a small CompressiveTransformer that a step of training moves."""
    slots = dict(mem_len=4, compressed_len=4, compression_rate=2)
    how = dict(compression=compression, loss=loss)
    model = CompressiveTransformer(10, 16, 2, 2, 32, **slots, **how)
    tokens = torch.randint(10, (2, 16 + 4 * n_pieces))
    _, memory, *_ = model(tokens[:, :16])
    logits, _, *aux = model(tokens[:, 16:], memory)
    sum(aux, F.cross_entropy(logits.flatten(0, 1), tokens[:, 16:].flatten())).backward()
    parts = set()
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.any():
            inner = "layers" if name.startswith("layers.") else "embedding, head"
            inner = "f_c" if ".compress." in name else inner
            parts.add("g" if ".decode." in name else inner)
    return parts


def check_moved(my_moved):
    """Chapter 2, exercise 2."""
    for compression in ("conv", "dilated", "max", "mean", "most-used"):
        for case in [(compression, loss, n) for loss in LOSSES for n in (1, 2)]:
            mine, right = set(my_moved(*case)), moved(*case)
            if mine != right:
                raise AssertionError(
                    f"my_moved{case} is {sorted(mine)}; training moves {sorted(right)}"
                )
    print("right")


def check_even(my_even):
    """Chapter 2, exercise 3."""
    for T, n_remembered in [(1, 0), (3, 2), (24, 48)]:
        right = torch.zeros(n_remembered + T)
        for i in range(T):
            right[: n_remembered + i + 1] += 1 / (n_remembered + i + 1) / T
        mine = torch.as_tensor(my_even(T, n_remembered))
        case = f"my_even({T}, {n_remembered})"
        if mine.shape != right.shape:
            shape = tuple(mine.shape)
            raise AssertionError(f"{case}: {shape}; one share a slot: {len(right)}")
        if not torch.allclose(mine.float(), right, atol=1e-6):
            slot = (mine - right).abs().argmax().item()
            why = f"slot {slot} gets {right[slot]:.4f}, not {mine[slot]:.4f}"
            raise AssertionError(f"{case}: {why}; does each query's row sum to 1?")
    print("right")


def check_compression(f_c_class):
    """Chapter 2, exercise 4: the newest of each group, and nothing else."""
    for rate in (1, 2, 3):
        old, f_c = torch.randn(2, 6 * rate, 8), f_c_class(8, rate)
        try:
            new = f_c(old, None)
        except TypeError as error:
            how = "forward(self, old, used=None): Memory hands it both"
            raise AssertionError(f"{error}; write {how}") from error
        right = old[:, rate - 1 :: rate]
        if new.shape != right.shape:
            shape = tuple(new.shape)
            raise AssertionError(f"shape {shape}, should be {tuple(right.shape)}")
        if torch.equal(new, right.flip(1)):
            raise AssertionError("the groups are in reverse: the oldest comes first")
        if not torch.equal(new, right):
            raise AssertionError(f"rate {rate}: not the newest of each {rate}")
    print("right")


def check_ages(my_ages):
    """Chapter 2, exercise 6: the mean age of the tokens in each slot."""
    for T, M, C, c in [(2, 3, 2, 4), (3, 4, 5, 1), (1, 0, 2, 3), (4, 6, 0, 2)]:
        slots = [range(c * n, c * n + c) for n in range(C)]  # tokens count from 0
        slots += [range(n, n + 1) for n in range(c * C, c * C + M + T)]
        now = torch.arange(T)[:, None] + c * C + M  # (T, 1)
        right = now - torch.tensor([sum(s) / len(s) for s in slots])  # (T, K)
        mine, case = torch.as_tensor(my_ages(T, M, C, c)), f"my_ages{T, M, C, c}"
        if mine.shape != right.shape:
            shape = f"{tuple(mine.shape)}, not (T, K) = {tuple(right.shape)}"
            raise AssertionError(f"{case}: {shape}")
        if wrong := ((mine - right).abs() > 1e-4).nonzero().tolist():
            i, j = wrong[0]
            what = f"query {i} is {right[i, j]:g} from key {j}, not {mine[i, j]:g}"
            raise AssertionError(f"{case}: {what}")
    print("right")


@torch.no_grad()
def check_scores(my_scores):
    """Chapter 2, exercise 6: the terms with a distance, for any distances."""
    generator = torch.Generator().manual_seed(0)
    attention = RelativeAttention(16, 2, dropout=0.0)
    attention.v.normal_(generator=generator)
    q = torch.randn(2, 2, 3, 8, generator=generator)  # (B, H, T, d_head)
    ages = 10 * torch.rand(3, 5, generator=generator)  # (T, K)
    right = torch.empty(2, 2, 3, 5)
    for i in range(3):
        for j in range(5):
            r = attention.heads(attention.position(sinusoid(ages[i, j : j + 1], 16)))
            right[:, :, i, j] = ((q + attention.v)[:, :, i] * r[:, 0]).sum(-1) / 8**0.5
    mine = my_scores(attention, q, ages)
    if mine.shape != right.shape:
        raise AssertionError(f"shape {tuple(mine.shape)}, not (B, H, T, K) = (2, 2, 3, 5)")
    if not torch.allclose(mine, right, atol=1e-5):
        i, j = ((mine - right).abs() > 1e-5).nonzero()[0].tolist()[-2:]
        why = "it is (q + v) at i with W_R R at ages[i, j], divided by sqrt(d_head)"
        raise AssertionError(f"query {i}, key {j}: {why}")
    print("right")


def check_twice(n_felt, T, L, M, C, C2, c):
    """Chapter 2, exercise 7; n_felt counts the tokens that the last prediction feels."""
    right = T + L * (M + c * C + c * c * C2)
    if n_felt != right:
        raise AssertionError(f"{n_felt} tokens are felt, T + L (M + cC + ccC2) is {right}")
    print("right")


# ---------------------------------------------------------------- chapter 3


def longest_path(n_layers, n, kind):
    """The most layers on a path from token 0 to the output n tokens later."""
    longest = {(0, 0): 0}  # (position, layer): the most layers passed since token 0
    for t in range(n + 1):
        for layer in range(1, n_layers + 1):
            read = [(i, layer - 1) for i in range(t + 1)]
            if kind == "feedback":
                read = [(i, below) for i in range(t) for below in range(n_layers + 1)]
                read.append((t, layer - 1))
            before = [longest[place] for place in read if place in longest]
            if before:
                longest[t, layer] = 1 + max(before)
    return longest[n, n_layers]


def check_clock(my_clock):
    """Chapter 3, exercise 1."""
    cases = [(L, n) for L in (1, 2, 4) for n in (0, 1, 9)]
    for case in [(*c, kind) for c in cases for kind in ("vanilla", "feedback")]:
        mine, right = my_clock(*case), longest_path(*case)
        if mine != right:
            raise AssertionError(f"my_clock{case} is {mine}; {right} layers are passed")
    print("right")


@torch.no_grad()
def check_tracker(model):
    """Chapter 3, exercise 2."""
    if (mem_len := len(model.memory.positions)) != 1:
        raise AssertionError(f"made with mem_len={mem_len}, not 1: train a new model")
    if len(model.layers) != 1:
        raise AssertionError(f"it has {len(model.layers)} layers, not 1")
    tokens, targets, _ = next(tasks.cups(1000, 32, seed=10**6))
    logits = model.eval()(tokens.to(next(model.parameters()).device))[0].cpu()
    share = (logits.argmax(dim=-1) == targets).float().mean().item()
    if share < 0.9:
        raise AssertionError(f"{share:.2f} right; after all LESSONS it is above 0.9")
    print(f"right: {share:.2f}")


def check_patience(shares):
    """Chapter 3, exercise 3; shares of right answers after each swap."""
    share = sum(shares) / len(shares)
    if share < 0.5:
        raise AssertionError(f"{share:.2f} right; after 1,000 steps it is above 0.5")
    print(f"right: {share:.2f}, where 160 steps give less than 0.3")


def in_blocks(model, x, kv, S):
    """What `loop` returns, token by token, each with the memory of before its block."""
    outputs, vectors = [], []
    for part in x.split(S, dim=1):
        steps = [step(model, x_t, kv) for x_t in part.unbind(dim=1)]
        output, vector = (torch.stack(y, dim=1) for y in zip(*steps))
        kv = torch.cat([kv, model.memory.keys_values(vector)], dim=1)
        kv = kv[:, -model.mem_len :]
        outputs.append(output)
        vectors.append(vector)
    return torch.cat(outputs, dim=1), torch.cat(vectors, dim=1), kv


@torch.no_grad()
def check_blocks(blocks, model):
    """Chapter 3, exercise 5; model is a FeedbackTransformer in float64."""
    d_model = model.embedding.embedding_dim
    x, vectors = (torch.randn(2, n, d_model).double() for n in (10, 3))
    kv = model.memory.keys_values(vectors)
    for S in (1, 4):
        pairs = zip(blocks(model, x, kv, S), in_blocks(model, x, kv, S))
        for name, (mine, right) in zip(("outputs", "vectors", "kv"), pairs):
            where = f"S = {S}: {name}"
            if mine.shape != right.shape:
                shapes = f"{tuple(mine.shape)}, not {tuple(right.shape)}"
                raise AssertionError(f"{where} {shapes}")
            off = (mine - right).abs().flatten(2).amax(dim=(0, 2))  # token by token
            wrong = (off > 1e-9).nonzero().flatten().tolist()
            if wrong:
                why = "each token sees its own text's memory of before its block"
                raise AssertionError(f"{where} are wrong at {wrong}: {why}")
    print("right")


# ---------------------------------------------------------------- chapter 4


def check_sets(my_sets):
    """Chapter 4, exercise 1."""
    for seed in range(20):
        T, w = 5 + seed, 1 + seed % 6
        h = torch.randint(4, (T,), generator=torch.Generator().manual_seed(seed))
        chunk = h.argsort(stable=True).argsort() // w
        queries, keys = (h[:, None], chunk[:, None]), (h, chunk)
        found = in_set(*queries, *keys).tril()  # (T, T)
        mine = my_sets(h.tolist(), w)
        if len(mine) != T:
            raise AssertionError(f"{len(mine)} sets for {T} tokens")
        for i, row in enumerate(found):
            right = row.nonzero().flatten().tolist()
            if list(mine[i]) != right:
                given = f"buckets {h.tolist()}, w = {w}"
                raise AssertionError(f"{given}: the set of {i} is {right}: {mine[i]}")
    print("right")


def check_once(with_N, without_N):
    """Chapter 4, exercise 2."""
    if len(with_N) != 4 or len(without_N) != 4:
        raise AssertionError("pass two lists of four losses: 1, 2, 4 and 8 rounds")
    if abs(with_N[0] - without_N[0]) > 1e-4:
        expected = "one round finds no key twice, so nothing changes"
        raise AssertionError(f"{with_N[0]:.4f} and {without_N[0]:.4f}: {expected}")
    if all(abs(a - b) < 1e-6 for a, b in zip(with_N[1:], without_N[1:])):
        raise AssertionError("equal with more rounds, too: was count_once switched?")
    if max(abs(a - b) for a, b in zip(with_N, without_N)) > 0.2:
        raise AssertionError("the two differ by more than 0.2 nats: is it one model?")
    print("right")


def check_broken(relative):
    """Chapter 4, exercise 3."""
    if not 0.01 < relative < 1:
        expected = "other numbers are dropped: an error of some percent"
        raise AssertionError(f"{relative:.0e}; where nothing is put back, {expected}")
    print(f"right: {relative:.0%} off")


def check_places(my_places):
    """Chapter 4, exercise 4."""
    for seed in range(5):
        h = torch.randint(32, (1024,), generator=torch.Generator().manual_seed(seed))
        right = sum(64 * math.ceil(n / 64) for n in torch.bincount(h).tolist())
        mine = my_places(h.tolist(), 64)
        if mine != right:
            sizes = torch.bincount(h).tolist()
            raise AssertionError(f"{mine} places for {sizes}, not {right}")
    print(f"right: {right} places for 1,024 tokens")


# ---------------------------------------------------------------- appendix A


def against_autograd(mine, x, given, keep, p, learns_p):
    """mine(g_m, x, given, *weights) against autograd: one layer, one head, one text."""
    T, g = len(x), torch.Generator().manual_seed(1)
    shapes = [x.shape, *[(4, 4)] * 3, (8, 4), (4, 8)]
    random = [torch.randn(shape, generator=g, dtype=x.dtype) / 2 for shape in shapes]
    g_m, leaves = random[0], [a.clone().requires_grad_() for a in [x, p, *random[1:]]]
    W_q, W_k, W_v, W_1, W_2 = leaves[2:]
    out = []
    for t, x_t in enumerate(leaves[0]):
        past = torch.stack(out) if out else x[:0]
        w = ((past @ W_k.T + leaves[1][T - t :]) @ (W_q @ x_t)).softmax(dim=0)
        z = x_t + (keep[t, :t] * w) @ (past @ W_v.T)
        out.append(z + W_2 @ (W_1 @ z).relu())
    names, wanted = ["x", "p", "W_q", "W_k", "W_v", "W_1", "W_2"], leaves
    if not learns_p:
        names, wanted = names[:1] + names[2:], leaves[:1] + leaves[2:]
    right = torch.autograd.grad(torch.stack(out), wanted, g_m)
    errors = mine(g_m, x, given, *random[1:])
    if len(errors) != len(names):
        wanted = ", ".join(names)
        raise AssertionError(f"{len(errors)} errors; return those at {wanted}")
    for name, a, b in zip(names, errors, right):
        if a.shape != b.shape or not torch.allclose(a, b):
            got = f"expected\n{b}\nbut got\n{a}"
            raise AssertionError(f"the error at {name}: {got}")
    print("right")


def check_dropout_backwards(mine):
    """Appendix A, exercise 2: mine(g_m, x, keep, *weights) -> the errors."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=g, dtype=torch.float64)
    keep = (torch.rand(7, 7, generator=g) < 0.7).double() / 0.7
    against_autograd(mine, x, keep, keep, torch.zeros_like(x), learns_p=False)


def check_ages_backwards(mine):
    """Appendix A, exercise 3: mine(g_m, x, p, *weights) -> the errors."""
    g = torch.Generator().manual_seed(0)
    x, p = torch.randn(2, 7, 4, generator=g, dtype=torch.float64)
    against_autograd(mine, x, p, x.new_ones(7, 7), p, learns_p=True)


# ---------------------------------------------------------------- appendix B


def check_pair(pairs):
    """Appendix B, exercise 1."""
    (bucket_i, chunk_i), (bucket_j, chunk_j) = pairs
    if bucket_i == bucket_j:
        raise AssertionError(f"both are of bucket {bucket_i}: the buckets must differ")
    if (bucket_i - bucket_j) * (chunk_i - chunk_j) < 0:
        raise AssertionError(f"{pairs}: a later bucket never lies in an earlier chunk")
    difference = bucket_i + chunk_i - bucket_j - chunk_j
    if difference not in (0, 1):
        raise AssertionError(f"bucket + chunk differ by {difference}, not by 0 or 1")
    print("right")


def check_rounds(add_rounds):
    """Appendix B, exercise 2."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(3, 5, 4, generator=generator)
    values = torch.randn(3, 4, 2, generator=generator)
    tops = list(scores.amax(dim=-1, keepdim=True))
    p = [(s - top).exp2() for s, top in zip(scores, tops)]
    totals = [x.sum(dim=-1, keepdim=True) for x in p]
    outs = list(map(torch.mm, p, values))
    weights = (torch.cat(list(scores), dim=-1) * math.log(2)).softmax(dim=-1)
    right, mine = weights @ values.flatten(0, 1), add_rounds(tops, totals, outs)
    if not torch.allclose(mine, right, atol=1e-5):
        why = "are all rounds brought to one largest score?"
        raise AssertionError(f"off by {(mine - right).abs().max():.1e}: {why}")
    print("right")


# ---------------------------------------------------------------- chapter 5


def check_tokens(my_tokens):
    """Chapter 5, exercise 1: my_tokens(space, L, d_model) -> {name: tokens}."""
    for space, L, d_model in [(2**14, 2, 64), (2**30, 12, 512), (10**6, 3, 40)]:
        numbers = space // 4
        slots = numbers // (L * d_model)
        right = {
            "sliding window": numbers // (2 * L * d_model),
            "Transformer-XL": slots,
            "Compressive": 5 * (slots // 8 * 4),
            "Feedback": numbers // (2 * d_model),
        }
        mine = my_tokens(space, L, d_model)
        for name, n in right.items():
            if mine.get(name) != n:
                sizes = f"{space} bytes, {L} layers, d_model {d_model}"
                raise AssertionError(f"{name}, {sizes}: {mine.get(name)}, not {n}")
    print("right")


def check_depth(my_depth):
    """Chapter 5, exercise 2: my_depth(c) -> layers."""
    for c in (1, 3, 4, 8):
        right = next(L for L in range(1, 99) if 2 * L / (1 + c) > 2)
        if my_depth(c) != right:
            why = "2 L / (1 + c) numbers of d_model a token, against 2"
            raise AssertionError(f"c = {c}: {my_depth(c)}, not {right}: {why}")
    print("right")


def check_ties(my_ties):
    """Chapter 5, exercise 3: my_ties({name: losses}) -> a set of names."""
    losses = {"a": [2.0, 2.1, 2.3], "b": [2.2, 2.4, 2.4], "c": [2.31, 2.4, 2.5]}
    for values, right in [
        (losses, {"a", "b"}), ({"c": losses["c"], "a": losses["a"]}, {"a"}),
        (losses | {"d": [1.0, 3.0, 3.5]}, {"a", "b", "d"}),
    ]:  # fmt: skip
        mine = set(my_ties(values))
        if mine != right:
            raise AssertionError(f"{values}: {sorted(right)} tie, not {sorted(mine)}")
    print("right")


def check_reach(my_reach):
    """Chapter 5, exercise 4: my_reach(read, tokens) -> an age."""
    table = random(64, 5)
    for reach in (0, 1, 7, 15):
        read = lambda tokens, n=reach: table[tokens[:, -1 - n :]].sum(dim=1)
        tokens = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
        mine = my_reach(read, tokens)
        if mine != reach:
            raise AssertionError(f"a model that reads back to age {reach}: {mine}")
    print("right")


def check_crossing(my_crossing, operations):
    """Chapter 5, exercise 5: my_crossing(operations, d_model) -> tokens."""
    for d_model in (64, 512):
        sizes, n = dict(L=2, d_model=d_model, d_ff=4 * d_model), 64
        while operations("Reformer", n, **sizes) >= operations("vanilla", n, **sizes):
            n *= 2
        mine = my_crossing(operations, d_model)
        if mine != n:
            raise AssertionError(f"d_model = {d_model}: {mine} tokens, not {n}")
    print("right")
