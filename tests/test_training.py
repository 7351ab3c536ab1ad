"""The loop, the evaluation and the sampler, for models with and without memory."""

import math

import pytest
import torch
from test_models import MODELS, SMALL, tokens

from memtx_minimal import tasks, training
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
        training.train(
            fresh(), cycle(500), steps=5, batch_size=4, segment_len=8, progress=False
        )
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
    training.train(
        spy, cycle(4 * 20 + 1), steps=7, batch_size=4, segment_len=5, progress=False
    )
    assert seen == [0, 5, 10, 12, 0, 5, 10]


def test_evaluation_in_between_does_not_touch_the_training_memory():
    a, b = fresh(), fresh()
    plain = training.train(
        a, cycle(900), steps=8, batch_size=4, segment_len=8, progress=False
    )
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
    with pytest.raises(
        FloatingPointError, match="loss nan at step 0: the weights were not finite"
    ):
        training.train(
            broken, cycle(500), steps=5, batch_size=4, segment_len=8, progress=False
        )


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
    assert math.isfinite(
        training.evaluate(stopped, cycle(100), batch_size=4, segment_len=8)
    )


def test_auxiliary_losses_are_trained_too():
    class WithAux(TransformerXL):
        def __init__(self, **kw):
            super().__init__(**kw)
            self.extra = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, tokens, memory=None):
            return *super().forward(tokens, memory), self.extra**2

    aided = WithAux(**SMALL, mem_len=6)
    training.train(
        aided,
        cycle(500),
        steps=30,
        batch_size=4,
        segment_len=8,
        lr=0.1,
        clip=10,
        progress=False,
    )
    assert abs(aided.extra.item()) < 2.5


def test_gradients_are_clipped():
    wild = fresh()
    training.train(
        wild,
        cycle(500),
        steps=1,
        batch_size=4,
        segment_len=8,
        clip=1e-3,
        progress=False,
    )
    norm = torch.stack([p.grad.norm() for p in wild.parameters()]).norm()
    assert norm <= 1.001e-3


def test_groups_are_clipped_apart():
    """A group with a huge gradient does not shrink the step of another."""

    class Split(TransformerXL):
        def clip_groups(self):
            rest = [
                p for name, p in self.named_parameters() if not name.startswith("head")
            ]
            return [list(self.head.parameters()), rest]

    split, whole = Split(**SMALL, mem_len=6), TransformerXL(**SMALL, mem_len=6)
    for model in (split, whole):
        training.train(
            model,
            cycle(500),
            steps=1,
            batch_size=4,
            segment_len=8,
            clip=1e-3,
            progress=False,
        )
    norms = [
        torch.stack([p.grad.norm() for p in group]).norm()
        for group in split.clip_groups()
    ]
    torch.testing.assert_close(
        torch.stack(norms), torch.tensor([1e-3, 1e-3]), rtol=0.01, atol=0
    )
    assert (
        torch.stack([p.grad.norm() for p in whole.head.parameters()]).norm() < 0.99e-3
    )


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
            targets = (
                text.clone()
            )  # say again what you read, but at odd places: anything
            targets[:, 1::2] = -100
            yield text, targets, step % 3 == 2, "more that a task has to say"

    history = training.train(
        Spy(**SMALL, mem_len=6), task(), steps=60, lr=1e-2, progress=False
    )
    assert seen[:7] == [True, False, True, False, False, True, False]
    assert history["loss"][-1] < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_token_losses_agree_with_one_long_reading(name):
    trained = fresh(name).eval()
    stream = tokens(1, 61)[0]
    losses = training.token_losses(trained, stream, batch_size=3, segment_len=5)
    assert losses.shape == (3, 20)
    assert training.evaluate(
        trained, stream, batch_size=3, segment_len=5
    ) == pytest.approx(losses.mean().item())
    memory, lane = None, stream[20:41]
    for start in range(0, 20, 5):
        with torch.no_grad():
            logits, memory, *_ = trained(lane[None, start : start + 5], memory)
        targets = lane[start + 1 : start + 6]
        expected = -logits[0].log_softmax(-1)[torch.arange(5), targets]
        torch.testing.assert_close(losses[1, start : start + 5], expected)


# ------------------------------------------------------------------ what counts, who starts, what decays


def test_a_segment_without_targets_adds_nothing_and_memory_goes_on():
    """Fault 3. Such a segment changes no weight; the next one reads the memory of it."""

    def stream(silent):
        for step in range(3):
            text = tokens(4, 9, seed=step)
            targets = torch.full((4, 8), -100) if step == silent else text[:, 1:]
            yield text[:, :-1], targets, step == 0

    def trained(steps, silent=1):
        model = fresh()
        history = training.train(
            model, stream(silent), steps=steps, warmup=1, progress=False
        )
        return model, history

    (one, _), (two, silence), (three, _) = trained(1), trained(2), trained(3)
    assert math.isnan(silence["loss"][1]) and math.isfinite(silence["loss"][0])
    assert not all(
        torch.equal(p, q) for p, q in zip(two.parameters(), three.parameters())
    )
    torch.manual_seed(0)
    alone = fresh()
    training.train(alone, stream(None), steps=0, progress=False)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q)


def test_training_on_recall_from_the_first_segment_on():
    history = training.train(
        TransformerXL(**SMALL | dict(vocab_size=44), mem_len=8), tasks.recall(4, 8),
        steps=60, progress=False,
    )  # fmt: skip
    assert len(history["loss"]) == 60 and math.isfinite(history["loss"][-1])


def test_a_finite_iterator_ends_the_training(capsys):
    def three():
        for step in range(3):
            yield tokens(4, 8, seed=step), tokens(4, 8, seed=9), False

    history = training.train(
        fresh(), three(), steps=60, valid=cycle(100), progress=False
    )
    assert len(history["loss"]) == 3 and [step for step, _ in history["valid"]] == [3]
    assert "the stream ended after 3 of 60 steps" in capsys.readouterr().out


def test_a_stream_is_not_read_beyond_its_steps():
    batches = iter([(tokens(2, 4), tokens(2, 4), False)] * 5)
    training.train(fresh(), batches, steps=3, progress=False)
    assert len(list(batches)) == 2


@pytest.mark.parametrize("name", MODELS)
def test_streams_start_anew_one_by_one(name):
    """at_start (B,): each stream sees what it would see alone, whoever starts beside it."""
    model, text, memory, logits = fresh(name).double().train(), tokens(4, 24), None, []
    if hasattr(model, "blocks"):
        model.eval()  # training draws new rotations at each call
    starts = torch.zeros(6, 4, dtype=torch.bool)
    starts[0], starts[1, 2], starts[2, :2], starts[4, 2:] = True, True, True, True
    for segment, at_start in zip(text.split(4, dim=1), starts):
        out, memory, *aux = training.read(model, segment, memory, at_start)
        logits.append(out)
    for row in range(4):
        past = None
        for n, segment in enumerate(text[row : row + 1].split(4, dim=1)):
            out, past, *_ = model(segment, None if starts[n, row] else past)
            torch.testing.assert_close(logits[n][row : row + 1], out)
    sum(aux, out.sum()).backward()


def test_streams_of_one_age_are_read_together():
    """As soon as all memories are full, one call reads all streams again."""
    calls = []

    class Spy(TransformerXL):
        def forward(self, tokens, memory=None):
            calls.append(len(tokens))
            return super().forward(tokens, memory)

    model, memory = Spy(**SMALL, mem_len=6), None
    for start in [True, torch.tensor([False, True, False]), False, False, False]:
        _, memory = training.read(model, tokens(3, 4), memory, start)
    assert (
        calls == [3, 1, 2, 1, 2, 3, 3]
        and isinstance(memory, list)
        and len(memory[0]) == 3
    )


def test_losses_of_groups_are_weighted_by_their_streams():
    class WithAux(TransformerXL):
        def forward(self, tokens, memory=None):
            return *super().forward(tokens, memory), tokens.double().mean()

    model = WithAux(**SMALL, mem_len=6)
    _, memory, _ = training.read(model, tokens(3, 4), None)
    *_, aux = training.read(
        model, tokens(3, 4), memory, torch.tensor([False, True, False])
    )
    torch.testing.assert_close(aux, tokens(3, 4).double().mean())


@pytest.mark.parametrize("name", MODELS)
def test_matrices_decay_and_nothing_else(name):
    model = fresh(name)
    optimizer = training.adamw(model, 0.1, 0.01)
    decay = {
        id(p): group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            matrix = (
                isinstance(module, (torch.nn.Linear, torch.nn.Conv1d))
                and parameter.dim() > 1
            )
            assert decay.pop(id(parameter)) == (0.01 if matrix else 0)
    assert not decay


def test_a_weight_shared_with_an_embedding_does_not_decay():
    tied = torch.nn.Sequential(
        torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11, bias=False)
    )
    tied[1].weight = tied[0].weight
    (group,) = training.adamw(tied, 0.1, 0.01).param_groups
    assert group["weight_decay"] == 0 and len(group["params"]) == 1


def test_the_history_has_the_other_losses_beside_the_cross_entropy():
    history = training.train(
        fresh("compressive"),
        cycle(500),
        steps=4,
        batch_size=4,
        segment_len=8,
        progress=False,
    )
    assert [len(aux) for aux in history["aux"]] == [1] * 4
    assert all(loss > 0 for (loss,) in history["aux"][1:])
    assert training.train(fresh(), cycle(90), steps=1, batch_size=2, progress=False)[
        "aux"
    ] == [()]


def test_bits_per_character():
    assert training.bits_per_character(math.log(8)) == pytest.approx(3)


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def test_wrapped_models_are_clipped_and_generate_as_they_are():
    """Fault 7: what a model says of itself is asked of the model, not of a wrapper around it."""
    compressive, vanilla = fresh("compressive"), VanillaTransformer(**SMALL, max_len=8)
    assert len(training.clip_groups(Wrapper(Wrapper(compressive)))) == 2
    text = training.generate(vanilla, tokens(1, 5)[0], 20)
    assert torch.equal(training.generate(Wrapper(vanilla), tokens(1, 5)[0], 20), text)


# ------------------------------------------------------------------ generation


def test_a_batch_of_prompts_continues_as_each_alone_would():
    writer, prompts = fresh().double(), tokens(3, 5)
    together = training.generate(writer, prompts, 12, temperature=0)
    assert together.shape == (3, 17)
    for prompt, text in zip(prompts, together):
        assert torch.equal(training.generate(writer, prompt, 12, temperature=0), text)


def test_a_stop_token_ends_each_text_and_then_the_generation():
    writer, prompts = fresh(), tokens(6, 3)
    plain = training.generate(writer, prompts, 40, seed=3)
    ended = training.generate(writer, prompts, 40, seed=3, stop=7)
    lengths = []
    for before, text in zip(plain, ended):
        new = text[3:].tolist()
        n = new.index(7) if 7 in new else len(new)
        assert new[:n] == before[3 : 3 + n].tolist() and set(new[n:]) <= {7}
        lengths.append(n + 1)
    assert ended.size(1) == 3 + min(40, max(lengths))
    assert training.generate(writer, prompts[0], 40, seed=3, stop=7).dim() == 1


def test_a_model_trained_without_memory_rereads_the_text():
    writer = TransformerXL(**SMALL, mem_len=0).double().eval()
    text = training.generate(writer, tokens(1, 5)[0], 10, temperature=0)
    for n in range(5, 15):
        with torch.no_grad():
            assert writer(text[None, :n])[0][0, -1].argmax() == text[n]


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
        (dict(temperature=-1), "temperature=-1 is not a number >= 0"),
        (dict(temperature=float("nan")), "temperature=nan is not a number >= 0"),
        (dict(top_k=0), "top_k=0 is not a whole number >= 1, nor None"),
        (dict(n_tokens=-1), "n_tokens=-1 is not a whole number >= 0"),
        (dict(n_tokens=2.5), "n_tokens=2.5 is not a whole number >= 0"),
        (dict(prompt=torch.tensor([], dtype=torch.int64)), "the prompt must be tokens"),
        (
            dict(prompt="To be"),
            "the prompt must be tokens .N,. or .B, N., N >= 1, in a tensor",
        ),
        (dict(prompt=[1, 2]), "the prompt must be tokens"),
        (
            dict(prompt=torch.tensor([1.0])),
            "torch.float32; pass a tensor .B, T. of torch.int64",
        ),
        (dict(prompt=torch.tensor([99])), "token 99: this vocabulary has 0 ... 10"),
    ],
)
def test_invalid_requests_are_refused(kw, words):
    request = dict(prompt=torch.tensor([1]), n_tokens=3) | kw
    with pytest.raises(ValueError, match=words):
        training.generate(fresh(), **request)


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(steps=-1), "steps=-1 is not a whole number >= 0"),
        (dict(steps=2.5), "steps=2.5 is not"),
        (dict(batch_size=0), "batch_size=0 is not a whole number >= 1"),
        (dict(segment_len=0), "segment_len=0 is not"),
        (dict(valid_every=0), "valid_every=0 is not a whole number >= 1, nor None"),
        (dict(clip=0), "clip=0 is not above 0"),
        (dict(lr=-1), "lr=-1 is not a number >= 0"),
        (dict(weight_decay=-1), "weight_decay=-1 is not a number >= 0"),
        (dict(stream=[1, 2, 3]), "an iterator of .tokens, targets, at_start."),
        (
            dict(stream=[(tokens(2, 4), tokens(2, 4))]),
            "an iterator of .tokens, targets, at_start.",
        ),
        (dict(stream=7), "a tensor .N,., or an iterator"),
    ],
)
def test_invalid_trainings_are_refused(kw, words):
    request = dict(stream=cycle(100), steps=3, batch_size=4, segment_len=8) | kw
    with pytest.raises(ValueError, match=words):
        training.train(fresh(), request.pop("stream"), **request, progress=False)


def test_progress_bar_leaves_nothing_behind(capsys):
    training.train(fresh(), cycle(500), steps=3, batch_size=4, segment_len=8)
    out, err = capsys.readouterr()
    assert out == "" and err.rsplit("\r", 1)[-1].strip() == ""


def test_validation_reads_as_training_does():
    """In segments of the training's length, so that a window fits; and a short text fills fewer lanes."""
    model = VanillaTransformer(**SMALL, max_len=8)
    history = training.train(
        model,
        cycle(400),
        steps=2,
        batch_size=4,
        segment_len=8,
        valid=cycle(3),
        progress=False,
    )
    assert [step for step, _ in history["valid"]] == [2]
