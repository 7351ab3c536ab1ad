"""Chapter 2, Compressive Transformer: training steps side by side, the notebook. See run.py for what a row is."""

import torch
from sides import SIZE, STEP, VOCAB, T, notebook, training
from torch import nn

SLOTS = {"mem_len": 64, "compressed_len": 64, "compression_rate": 4}


class LabmlCompressive(nn.Module):
    """labml-nn's Compressive Transformer with embedding, masks, memory and reconstruction loss as in its own experiment; tokens (T, B)."""

    def __init__(self, d_model, n_heads, n_layers, d_ff, mem_len, compressed_len, compression_rate):
        super().__init__()
        from labml import tracker

        tracker.debug = lambda *args: None  # labml-nn 0.5.1 calls it, the labml of today no longer has it
        from labml_nn.transformers.compressive import (
            AttentionReconstructionLoss,
            CompressiveTransformer,
            CompressiveTransformerLayer,
            Conv1dCompression,
        )
        from labml_nn.transformers.feed_forward import FeedForward
        from labml_nn.transformers.utils import subsequent_mask
        from labml_nn.transformers.xl import RelativeMultiHeadAttention

        layer = CompressiveTransformerLayer(
            d_model=d_model,
            self_attn=RelativeMultiHeadAttention(n_heads, d_model, dropout_prob=0.0),
            feed_forward=FeedForward(d_model, d_ff, dropout=0.0),
            dropout_prob=0.0,
            compress=Conv1dCompression(compression_rate, d_model),
        )
        self.mem_len, self.compressed_len = mem_len, compressed_len
        self.embedding = nn.Embedding(VOCAB, d_model)
        self.transformer = CompressiveTransformer(layer, n_layers)
        self.generator = nn.Linear(d_model, VOCAB)
        self.reconstruction = AttentionReconstructionLoss(self.transformer.layers)
        future = subsequent_mask(T)  # (T, T, 1)
        self.mask = torch.cat([future.new_ones(T, mem_len + compressed_len, 1), future], dim=1)

    def forward(self, tokens, memory):
        recent, compressed = memory or ([], [])
        n = sum(len(parts[0]) for parts in (recent, compressed) if parts)
        x, new = self.transformer(self.embedding(tokens), recent, compressed, self.mask[:, self.mask.size(1) - T - n :])
        recent = [torch.cat(pair) for pair in zip(recent, new)] if recent else new
        n_old = max(0, len(recent[0]) - self.mem_len)  # a multiple of the rate at these sizes
        if not n_old:
            return self.generator(x), (recent, compressed)
        old, recent = [m[:n_old] for m in recent], [m[n_old:] for m in recent]
        with torch.no_grad():
            squeezed = [layer.compress(m) for layer, m in zip(self.transformer.layers, old)]
        compressed = [torch.cat(pair)[-self.compressed_len :] for pair in zip(compressed, squeezed)] if compressed else squeezed
        return self.generator(x), (recent, compressed), self.reconstruction(new, old)


def our_training():
    from memtx_minimal.compressive_transformer import CompressiveTransformer

    return training("ours", CompressiveTransformer(VOCAB, **SIZE, **SLOTS, compression="conv", loss="attention"))


def against_labml():
    return [our_training(), training("labml", LabmlCompressive(**SIZE, **SLOTS), batch_first=False)]


def against_pytorch():
    from compressive_transformer_pytorch import CompressiveTransformer

    public = CompressiveTransformer(
        VOCAB,
        dim=SIZE["d_model"],
        seq_len=T,
        depth=SIZE["n_layers"],
        heads=SIZE["n_heads"],
        mem_len=SLOTS["mem_len"],
        cmem_len=SLOTS["compressed_len"],
        cmem_ratio=SLOTS["compression_rate"],
        gru_gated_residual=False,
        enhanced_recurrence=False,
    )
    return [our_training(), training("public", public)]


def against_xl():
    from memtx_minimal.transformer_xl import TransformerXL

    return [our_training(), training("xl", TransformerXL(VOCAB, **SIZE, mem_len=128))]


def recall():
    """Right answers over chance at the ages 113 to 128, twice Transformer-XL's reach of 2 layers x 32, with 32 slots on both sides."""
    from memtx_minimal.compressive_transformer import CompressiveTransformer
    from memtx_minimal.tasks import RECALL_VOCAB
    from memtx_minimal.tasks import recall as task
    from memtx_minimal.training import train
    from memtx_minimal.transformer_xl import TransformerXL

    sizes = {"vocab_size": RECALL_VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 2, "d_ff": 256}
    squeezed = {"mem_len": 16, "compressed_len": 16, "compression_rate": 8, "compression": "mean", "loss": None}
    result = {}
    for name, model in [("compressive", CompressiveTransformer(**sizes, **squeezed)), ("xl", TransformerXL(**sizes, mem_len=32))]:
        train(model, task(32, 16, 1), steps=800, lr=2e-3, progress=False)
        right = asked = 0
        memory = None
        with torch.inference_mode():
            for n, (tokens, targets, _, age) in zip(range(150), task(64, 16, 2)):
                logits, memory = model(tokens, memory)
                old = (targets >= 0) & (age > 112) & (age <= 128) & (n >= 20)
                right, asked = right + (logits.argmax(-1) == targets)[old].sum().item(), asked + old.sum().item()
        result[name] = 8 * right / asked
    return result


OURS = f"{STEP}: CompressiveTransformer, memory 64, compressed memory 64, rate 4, convolution, attention reconstruction, and "
ROWS = [
    {
        "name": "ct-train-labml",
        "compares": OURS + "labml-nn 0.5.1's Compressive Transformer with the same memories and its own reconstruction loss",
        "sides": against_labml,
        "reach": ["labml / ours >= 1.8"],
        "public": True,
    },
    {
        "name": "ct-train-pytorch",
        "compares": OURS + "compressive-transformer-pytorch 0.4.0 (no sinusoid term; its keys and values stop learning at the first compression), "
        "plain residuals, no roll of memory over layers",
        "sides": against_pytorch,
        "reach": ["public / ours >= 1"],
        "public": True,
    },
    {
        "name": "ct-train-xl",
        "compares": OURS + "TransformerXL with as many slots, mem_len 128",
        "sides": against_xl,
        "reach": ["ours / xl <= 1.3"],
    },
    {
        "name": "ct-recall",
        "compares": "right answers over chance (1 / 8) on the recall task at twice Transformer-XL's reach, ages 113 to 128; 32 slots each: "
        "memory 16 and compressed memory 16, mean pooling, rate 8, and TransformerXL with mem_len 32; d_model 64, 2 layers, 800 steps",
        "sides": lambda: [recall],
        "reach": ["compressive >= 3", "xl <= 1.4"],
        "rounds": 1,
    },
    {
        "name": "notebook-02",
        "compares": "the notebook from top to bottom: minutes, and the peak of the resident memory of its kernel and what that starts",
        "sides": lambda: [lambda: notebook("02_compressive_transformer")],
        "reach": ["minutes <= 8", "GiB <= 2"],
        "rounds": 1,
    },
]
