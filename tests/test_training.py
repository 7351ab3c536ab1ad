"""The loop, the evaluation and the sampler, for models with and without memory."""

import math

import pytest
import torch
from test_models import MODELS, SMALL, tokens

from memtx_minimal import training
from memtx_minimal.transformer_xl import TransformerXL
from memtx_minimal.vanilla_transformer import VanillaTransformer


def cycle(n):
    """A stream that a model learns in no time: 0 1 2 ... 10 0 1 2 ..."""
    return torch.arange(n) % 11


def fresh(name="xl", **kw):
    torch.manual_seed(0)
    return MODELS[name](**kw)


@pytest.mark.parametrize("name", MODELS)
def test_training_learns_and_says_how_it_went(name):
    model = fresh(name)
    history = training.train(
        model, cycle(2000), steps=60, batch_size=8, segment_len=8,
        warmup=5, lr=1e-2, valid=cycle(500), valid_every=40, progress=False,
    )  # fmt: skip
    assert len(history["loss"]) == 60
    assert [step for step, _ in history["valid"]] == [40, 60]
    assert history["valid"][-1][1] < 0.5 < math.log(11) - 0.5 < history["loss"][0]
    assert not model.training


def test_same_seed_same_losses():
    runs = [
        training.train(fresh(), cycle(500), steps=5, batch_size=4, segment_len=8, progress=False)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_memory_goes_along_a_pass_and_starts_anew_at_the_wrap():
    seen = []

    class Spy(TransformerXL):
        def forward(self, tokens, memory=None):
            seen.append(0 if memory is None else memory[0].size(1))
            return super().forward(tokens, memory)

    spy = Spy(**SMALL, mem_len=12)
    training.train(spy, cycle(4 * 20 + 1), steps=7, batch_size=4, segment_len=5, progress=False)
    assert seen == [0, 5, 10, 12, 0, 5, 10]


def test_evaluation_in_between_does_not_touch_the_training_memory():
    a, b = fresh(), fresh()
    plain = training.train(a, cycle(900), steps=8, batch_size=4, segment_len=8, progress=False)
    watched = training.train(
        b,
        cycle(900),
        steps=8,
        batch_size=4,
        segment_len=8,
        valid=cycle(200),
        valid_every=1,
        progress=False,
    )
    assert plain["loss"] == watched["loss"]


def test_schedule_rises_then_falls_to_nothing():
    factors = [training.warmup_cosine(step, 100, 10) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert all(a > b for a, b in zip(factors[10:], factors[11:]))
    assert factors[100] == pytest.approx(0)


def test_a_loss_that_is_not_finite_stops_with_the_step():
    broken = fresh()
    with torch.no_grad():
        broken.head.bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match="loss nan at step 0: lower lr"):
        training.train(broken, cycle(500), steps=5, batch_size=4, segment_len=8, progress=False)


def test_ctrl_c_returns_the_history_and_a_usable_model(capsys):
    class Interrupted(TransformerXL):
        calls = 0

        def forward(self, tokens, memory=None):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(tokens, memory)

    stopped = Interrupted(**SMALL, mem_len=6)
    history = training.train(
        stopped, cycle(500), steps=50, batch_size=4, segment_len=8, progress=False
    )
    assert len(history["loss"]) == 3 and not stopped.training
    assert "3 of 50" in capsys.readouterr().out
    assert math.isfinite(training.evaluate(stopped, cycle(100), batch_size=4, segment_len=8))


def test_auxiliary_losses_are_trained_too():
    class WithAux(TransformerXL):
        def __init__(self, **kw):
            super().__init__(**kw)
            self.extra = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, tokens, memory=None):
            return *super().forward(tokens, memory), self.extra**2

    aided = WithAux(**SMALL, mem_len=6)
    training.train(
        aided, cycle(500), steps=30, batch_size=4, segment_len=8, lr=0.1, clip=10, progress=False
    )
    assert abs(aided.extra.item()) < 2.5


def test_gradients_are_clipped():
    wild = fresh()
    training.train(
        wild, cycle(500), steps=1, batch_size=4, segment_len=8, clip=1e-3, progress=False
    )
    norm = torch.stack([p.grad.norm() for p in wild.parameters()]).norm()
    assert norm <= 1.001e-3


def test_groups_are_clipped_apart():
    """A group with a huge gradient does not shrink the step of another."""

    class Split(TransformerXL):
        def clip_groups(self):
            rest = [p for name, p in self.named_parameters() if not name.startswith("head")]
            return [list(self.head.parameters()), rest]

    split, whole = Split(**SMALL, mem_len=6), TransformerXL(**SMALL, mem_len=6)
    for model in (split, whole):
        training.train(
            model, cycle(500), steps=1, batch_size=4, segment_len=8, clip=1e-3, progress=False
        )
    norms = [torch.stack([p.grad.norm() for p in group]).norm() for group in split.clip_groups()]
    torch.testing.assert_close(torch.stack(norms), torch.tensor([1e-3, 1e-3]), rtol=0.01, atol=0)
    assert torch.stack([p.grad.norm() for p in whole.head.parameters()]).norm() < 0.99e-3


def test_a_task_made_up_as_it_goes():
    """An iterator of batches in place of a stream; targets of -100 do not count, at_start forgets."""
    seen = []

    class Spy(TransformerXL):
        def forward(self, tokens, memory=None):
            seen.append(memory is None)
            return super().forward(tokens, memory)

    def task():
        for step in range(10**6):
            text = tokens(8, 7, seed=step)
            targets = text.clone()  # say again what you read, but at odd places: anything
            targets[:, 1::2] = -100
            yield text, targets, step % 3 == 2, "more that a task has to say"

    history = training.train(Spy(**SMALL, mem_len=6), task(), steps=60, lr=1e-2, progress=False)
    assert seen[:7] == [True, False, True, False, False, True, False]
    assert history["loss"][-1] < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_token_losses_agree_with_one_long_reading(name):
    trained = fresh(name).eval()
    stream = tokens(1, 61)[0]
    losses = training.token_losses(trained, stream, batch_size=3, segment_len=5)
    assert losses.shape == (3, 20)
    assert training.evaluate(trained, stream, batch_size=3, segment_len=5) == pytest.approx(
        losses.mean().item()
    )
    memory, lane = None, stream[20:41]
    for start in range(0, 20, 5):
        with torch.no_grad():
            logits, memory, *_ = trained(lane[None, start : start + 5], memory)
        targets = lane[start + 1 : start + 6]
        expected = -logits[0].log_softmax(-1)[torch.arange(5), targets]
        torch.testing.assert_close(losses[1, start : start + 5], expected)


# ------------------------------------------------------------------ generation


@pytest.mark.parametrize("segment", [None, 1])
def test_generation_with_memory_equals_rereading_everything(segment):
    """mem_len holds the whole text: feeding only new tokens gives what reading the whole prefix gives."""
    writer = TransformerXL(**SMALL, mem_len=40).double().eval()
    text = training.generate(writer, tokens(1, 5)[0], 20, temperature=0)
    for n in range(5, 25):
        with torch.no_grad():
            assert writer(text[None, :n])[0][0, -1].argmax() == text[n]


def test_generation_feeds_only_new_tokens_to_a_model_with_memory():
    lengths = []

    class Spy(TransformerXL):
        def forward(self, tokens, memory=None):
            lengths.append(tokens.size(1))
            return super().forward(tokens, memory)

    training.generate(Spy(**SMALL, mem_len=6), tokens(1, 5)[0], 4)
    assert lengths == [5, 1, 1, 1]


def test_generation_without_memory_rereads_the_last_window():
    writer = VanillaTransformer(**SMALL, max_len=8).double().eval()
    text = training.generate(writer, tokens(1, 20)[0], 6, temperature=0)
    for n in range(20, 26):
        with torch.no_grad():
            assert writer(text[None, n - 8 : n])[0][0, -1].argmax() == text[n]


def test_sampling_follows_seed_temperature_and_top_k():
    writer, prompt = fresh(), tokens(1, 5)[0]
    draw = lambda **kw: training.generate(writer, prompt, 30, **kw).tolist()  # noqa: E731
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(top_k=1, seed=1) == draw(top_k=1, seed=2) == draw(temperature=0)
    assert draw(top_k=99, seed=1) == draw(seed=1)
    assert draw()[:5] == prompt.tolist()


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    writer, prompt = fresh(), tokens(1, 5)[0]
    torch.manual_seed(7)
    training.generate(writer, prompt, 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(temperature=-1), "temperature -1"),
        (dict(top_k=0), "top_k 0"),
        (dict(prompt=[]), "empty"),
    ],
)
def test_invalid_requests_are_refused(kw, words):
    prompt = torch.tensor(kw.pop("prompt", [1]), dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        training.generate(fresh(), prompt, 3, **kw)


def test_progress_bar_leaves_nothing_behind(capsys):
    training.train(fresh(), cycle(500), steps=3, batch_size=4, segment_len=8)
    out, err = capsys.readouterr()
    assert out == "" and err.rsplit("\r", 1)[-1].strip() == ""


def test_validation_reads_as_training_does():
    """In segments of the training's length, so that a window fits; and a short text fills fewer lanes."""
    model = VanillaTransformer(**SMALL, max_len=8)
    history = training.train(model, cycle(400), steps=2, batch_size=4, segment_len=8, valid=cycle(3), progress=False)
    assert [step for step, _ in history["valid"]] == [2]
