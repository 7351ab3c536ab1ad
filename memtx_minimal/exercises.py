"""Checks for the exercises: they say "right", or what was expected and what came."""

import math

import torch
import torch.nn.functional as F

from memtx_minimal import tasks
from memtx_minimal.compressive_transformer import LOSSES, CompressiveTransformer
from memtx_minimal.feedback_transformer import step
from memtx_minimal.reformer import in_set
from memtx_minimal.transformer_xl import RelativeAttention, sinusoid

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


def in_blocks(model, x, kv, C):
    """What `loop` returns, token by token, each with the memory of before its block."""
    outputs, vectors = [], []
    for x_c in x.split(C, dim=1):
        steps = [step(model, x_t, kv) for x_t in x_c.unbind(dim=1)]
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
    for C in (1, 4):
        pairs = zip(blocks(model, x, kv, C), in_blocks(model, x, kv, C))
        for name, (mine, right) in zip(("outputs", "vectors", "kv"), pairs):
            where = f"C = {C}: {name}"
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
        T, c = 5 + seed, 1 + seed % 6
        h = torch.randint(4, (T,), generator=torch.Generator().manual_seed(seed))
        chunk = h.argsort(stable=True).argsort() // c
        queries, keys = (h[:, None], chunk[:, None]), (h, chunk)
        found = in_set(*queries, *keys).tril()  # (T, T)
        mine = my_sets(h.tolist(), c)
        if len(mine) != T:
            raise AssertionError(f"{len(mine)} sets for {T} tokens")
        for i, row in enumerate(found):
            right = row.nonzero().flatten().tolist()
            if list(mine[i]) != right:
                given = f"buckets {h.tolist()}, c = {c}"
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
