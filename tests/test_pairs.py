"""Several models with optimizers of their own, in loops as people write them, against one
process."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Noise, drawn
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.swa_utils import AveragedModel
from whole import DEADLINE_S, ENDLESS, ENOUGH, Served

import workers
from paramserver.errors import RunLost, UserError
from workers.replica import checkpoint
from workers.replica.several import Pair, Several

EXACT = 1e-9
SAMPLES, BATCH = 96, 8
real = nn.functional.binary_cross_entropy_with_logits


class Gan:
    """A small GAN, its optimizers and what else belongs to each of them."""

    def __init__(self, seed: int, *, norm: bool = False, **more: Any) -> None:
        hidden = [nn.Linear(3, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh()]
        self.G = drawn(nn.Sequential(*hidden, nn.Linear(8, 3)), seed).double()
        self.D = drawn(
            nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), seed + 9
        ).double()
        self.opt_g = Adam(self.G.parameters(), lr=0.01, betas=(0.5, 0.9))
        self.opt_d = SGD(self.D.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = StepLR(self.opt_d, 3, 0.8)

    def attach(self, cluster: workers.Cluster, **more: Any) -> None:
        (self.G, self.opt_g), (self.D, self.opt_d) = cluster.attach(
            generator=(self.G, self.opt_g, {"clip_norm": 0.5}),
            critic=(self.D, self.opt_d, {"scheduler": self.scheduler}),
            **more,
        )

    def lose(self, pair: str, x: Tensor) -> Tensor:
        """The loss of one pair over this batch: three numbers that are real, three of noise."""
        x, noise = x[:, :3], x[:, 3:]
        fake = self.G(noise)
        if pair == "generator":
            out = self.D(fake)
            return real(out, torch.ones_like(out))
        good, bad = self.D(x), self.D(fake.detach())
        return real(good, torch.ones_like(good)) + real(bad, torch.zeros_like(bad))

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, model in (("G", self.G), ("D", self.D))
            for key, value in model.state_dict().items()
        }


class Loops:
    """Workers in threads whose loops step two pairs."""

    def __init__(self, served: Served, **gan: Any) -> None:
        self.served, self.kind = served, gan
        self.data = Noise(SAMPLES)
        self.data.x = self.data.x.double()
        self.batches: dict[tuple[int, int], list[int]] = {}
        self.gans: dict[int, Gan] = {}
        self.said: list[str] = []
        self.hold: Callable[[int, int, str], None] = lambda number, step, pair: None

    def work(self, number: int, **attach: Any) -> None:
        with self.served.join(number, self.said.append) as cluster:
            gan = self.gans[number] = Gan(number, **self.kind)
            gan.attach(cluster, **attach)
            for x, _, i in cluster.batches(self.data, batch_size=BATCH):
                for p in gan.G.parameters():
                    p.requires_grad_(False)
                self.step(cluster, gan, number, "critic", x, i)
                assert all(p.grad is None for p in gan.D.parameters())
                for p in gan.G.parameters():
                    p.requires_grad_(True)
                self.take(cluster, number, "generator", i)
                gan.opt_g.zero_grad()
                gan.lose("generator", x).backward()  # leaves gradients in D, too
                cluster.tell(1.0)
                gan.opt_g.step()
                assert all(p.grad is None for p in gan.G.parameters())

    def step(
        self, cluster: workers.Cluster, gan: Gan, number: int, pair: str, x: Tensor, i: Tensor
    ) -> None:
        """A step of one pair over this batch."""
        optimizer = gan.opt_g if pair == "generator" else gan.opt_d
        self.take(cluster, number, pair, i)
        optimizer.zero_grad()
        gan.lose(pair, x).backward()
        optimizer.step()

    def take(self, cluster: workers.Cluster, number: int, pair: str, indices: Tensor) -> None:
        self.hold(number, cluster.step, pair)
        self.batches[number, cluster.step] = indices.tolist()

    def truth(self) -> Gan:
        """One process, which makes the steps of the log over the batches of all workers."""
        found = re.search(r"the first state comes from worker (\d+)", self.served.text)
        assert found
        gan = Gan(int(found[1]), **self.kind)
        for close in self.served.closes:
            indices = [i for w in close.contributors for i in self.batches[w, close.step - 1]]
            model, optimizer = (
                (gan.G, gan.opt_g) if close.pair == "generator" else (gan.D, gan.opt_d)
            )
            gan.G.zero_grad(), gan.D.zero_grad()
            gan.lose(str(close.pair), self.data.x[indices]).backward()
            if close.pair == "generator":
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if close.pair == "critic":
                gan.scheduler.step()
        return gan

    def check(self, *numbers: int) -> None:
        """These workers end where one process does."""
        end = self.served.end.result(DEADLINE_S)
        assert end.reason in ("all epochs are done", ENOUGH)
        assert end.step == len(self.served.closes) > 0
        assert len(self.served.digests()) == 1
        expected = self.truth().state()
        for number in numbers:
            torch.testing.assert_close(self.gans[number].state(), expected, rtol=0, atol=EXACT)

    def times(self) -> dict[str, Counter[int]]:
        """How often each sample is in the steps of each pair."""
        return {
            pair: Counter(
                i
                for close in self.served.closes
                if close.pair == pair
                for w in close.contributors
                for i in self.batches[w, close.step - 1]
            )
            for pair in ("generator", "critic")
        }


@pytest.mark.parametrize("count", [2, 3])
def test_a_gan_ends_where_one_process_does(count: int) -> None:
    with Served(num_workers=count, num_epochs=2, bucket_mb=0.0002) as served:
        loops = Loops(served)
        numbers = range(1, count + 1)
        served.wait(*[served.start(loops.work, n) for n in numbers], served.end)
    loops.check(*numbers)
    times = loops.times()
    assert times["generator"] == times["critic"] == Counter(dict.fromkeys(range(SAMPLES), 2))
    ledger = served.closes[-1].ledger
    last = sum(served.closes[-1].contributors.values())
    assert ledger["done"] + ledger["begun"] == 2 * SAMPLES and ledger["begun"] == last
    pairs = [close.pair for close in served.closes]
    assert pairs == ["critic", "generator"] * (len(pairs) // 2)


def test_each_pair_has_the_median_of_its_own_gradients() -> None:
    with Served(num_workers=3, num_epochs=2, aggregate="median") as served:
        loops = Loops(served)
        served.wait(*[served.start(loops.work, n) for n in (1, 2, 3)], served.end)
    assert len(served.digests()) == 1
    found = re.search(r"the first state comes from worker (\d+)", served.text)
    assert found is not None and len(served.closes) == 16
    gan = Gan(int(found[1]))
    for close in served.closes:
        assert list(close.contributors.values()) == [BATCH] * 3
        critic = close.pair == "critic"
        model, optimizer = (gan.D, gan.opt_d) if critic else (gan.G, gan.opt_g)
        pushed = []
        for worker in close.contributors:
            gan.G.zero_grad(), gan.D.zero_grad()
            indices = loops.batches[worker, close.step - 1]
            gan.lose(str(close.pair), loops.data.x[indices]).backward()
            pushed.append([torch.clone(p.grad) for p in model.parameters() if p.grad is not None])
        for p, of_all in zip(model.parameters(), zip(*pushed, strict=True), strict=True):
            p.grad = torch.stack(of_all).median(dim=0).values
        if not critic:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if critic:
            gan.scheduler.step()
    for own in loops.gans.values():
        torch.testing.assert_close(own.state(), gan.state(), rtol=0, atol=EXACT)


def test_a_worker_that_dies_between_the_steps_of_two_pairs() -> None:
    """Another one comes for it, for whom the one that lives stands still."""
    died, there = threading.Event(), threading.Event()
    with Served(num_workers=2, num_epochs=1) as served:
        loops = Loops(served)

        def die(number: int, step: int, pair: str) -> None:
            if number == 2 and step >= 3 and pair == "generator" and not died.is_set():
                died.set()
                raise SystemExit
            if number == 1 and step >= 4:
                assert there.wait(DEADLINE_S)

        def mortal() -> None:
            with contextlib.suppress(SystemExit):
                loops.work(2)

        loops.hold = die
        living = served.start(loops.work, 1)
        served.wait(served.start(mortal))
        again = served.start(loops.work, 3)
        served.until_waits(3)
        there.set()
        served.wait(living, again, served.end)
    loops.check(1, 3)
    ledger = served.closes[-1].ledger
    assert ledger["partly"] == BATCH
    times = loops.times()
    assert times["critic"] == Counter(dict.fromkeys(range(SAMPLES), 1))
    assert sum(times["generator"].values()) == SAMPLES - BATCH


def test_a_worker_that_falls_silent_between_two_steps() -> None:
    with Served(num_workers=2, num_epochs=1, timeout=None, heartbeat_timeout=2.0) as served:
        loops, gone = Loops(served), threading.Event()

        def vanish(number: int, step: int, pair: str) -> None:
            if number == 2 and step >= 3 and pair == "generator":
                raise ConnectionAbortedError

        def mortal() -> None:
            cluster = served.join(2, print)
            try:
                gan = Gan(2)
                gan.attach(cluster)
                for x, _, i in cluster.batches(loops.data, batch_size=BATCH):
                    loops.step(cluster, gan, 2, "critic", x, i)
                    loops.step(cluster, gan, 2, "generator", x, i)
            except ConnectionAbortedError:
                cluster.client.close()  # as by kill -9: without a word
                gone.set()
                cluster.leave()

        loops.hold = vanish
        living = served.start(loops.work, 1)
        served.wait(served.start(mortal), living, served.end)
        assert gone.is_set()
    loops.check(1)
    assert any(2 in close.late for close in served.closes)
    assert served.closes[-1].ledger["partly"] == BATCH


def test_a_late_joiner_has_all_pairs() -> None:
    with Served(num_workers=2, num_epochs=ENDLESS) as served:
        loops = Loops(served)
        futures = [served.start(loops.work, n) for n in (1, 2)]
        served.until(lambda: len(served.closes) >= 4)
        third = served.start(loops.work, 3)
        served.until_contributes(3)
        served.stop()
        served.wait(*futures, third, served.end)
    loops.check(1, 2, 3)


def test_running_statistics_are_the_same_in_all_replicas() -> None:
    with Served(num_workers=2, num_epochs=1) as served:
        loops = Loops(served, norm=True)
        served.wait(*[served.start(loops.work, n) for n in (1, 2)], served.end)
    assert len(served.digests()) == 1
    first, second = (loops.gans[n].state() for n in (1, 2))
    assert first["G.1.num_batches_tracked"] > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# ------------------------------------------------------------------------------ other loops


class Actor(nn.Module):
    """A body and two heads, which two optimizers share."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)
        drawn_like = drawn(self, seed)
        self.load_state_dict(drawn_like.state_dict())
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.tanh(self.body(x))
        return self.policy(seen), self.value(seen)


def rate(step: int) -> float:
    return 0.05 / (1 + step % 5)


class TwoOptimizers:
    """Two optimizers of one model, with other numbers of steps: the critic makes two steps, in
    every third batch the actor none."""

    def __init__(self, seed: int) -> None:
        self.model = Actor(seed)
        own = [*self.model.body.parameters(), *self.model.policy.parameters()]
        self.actor, self.critic = Adam(own, lr=0.02), SGD(self.model.value.parameters(), lr=0.1)
        self.mean = AveragedModel(self.model)
        self.schedule = LambdaLR(self.actor, lambda epoch: 1 / (1 + epoch))

    def lose(self, pair: str, x: Tensor, y: Tensor) -> Tensor:
        policy, value = self.model(x)
        if pair == "actor":
            return nn.functional.cross_entropy(policy, y)
        return ((value.squeeze(1) - y) ** 2).mean()


def steps_of(step: int) -> list[str]:
    """What a loop does with a batch that begins at this step: it must be the same everywhere."""
    return ["critic", "critic"] if step % 3 == 0 else ["critic", "actor", "critic"]


class OneModel:
    """Workers whose loops step two optimizers of one model, one with a rate set by hand."""

    def __init__(self, served: Served) -> None:
        self.served, self.data = served, Noise(SAMPLES)
        self.data.x = self.data.x.double()
        self.batches: dict[tuple[int, int], list[int]] = {}
        self.parts: dict[int, TwoOptimizers] = {}

    def work(self, number: int) -> None:
        with self.served.join(number, print) as cluster:
            part = self.parts[number] = TwoOptimizers(number)
            (_, actor), (_, critic) = cluster.attach(
                actor=(
                    part.model,
                    part.actor,
                    {"scheduler": part.schedule, "after_step": part.mean.update_parameters},
                ),
                critic=(part.model, part.critic),
                schedule_by="epoch",
            )
            for epoch in cluster.epochs():
                assert epoch in (0, 1)
                for x, y, i in cluster.batches(self.data, batch_size=BATCH):
                    for pair in steps_of(cluster.step):
                        optimizer = actor if pair == "actor" else critic
                        self.batches[number, cluster.step] = i.tolist()
                        optimizer.zero_grad()
                        part.lose(pair, x, y).backward()
                        if pair == "critic":
                            critic.param_groups[0]["lr"] = rate(cluster.step)
                        optimizer.step()

    def truth(self) -> TwoOptimizers:
        found = re.search(r"the first state comes from worker (\d+)", self.served.text)
        assert found
        part, epoch = TwoOptimizers(int(found[1])), 0
        for close in self.served.closes:
            ledger = close.ledger
            now = (ledger["done"] + ledger["partly"] + ledger["skipped"]) // SAMPLES
            if now > epoch:
                part.schedule.step()
            epoch = now
            indices = [i for w in close.contributors for i in self.batches[w, close.step - 1]]
            part.model.zero_grad()
            part.lose(str(close.pair), self.data.x[indices], self.data.y[indices]).backward()
            if close.pair == "actor":
                part.actor.step()
                part.mean.update_parameters(part.model)
            else:
                part.critic.param_groups[0]["lr"] = rate(close.step - 1)
                part.critic.step()
        return part


def test_two_optimizers_of_one_model_with_other_numbers_of_steps() -> None:
    """A schedule by epoch goes on between two epochs, a rate by hand and an average of the weights
    are those of one pair."""
    with Served(num_workers=2, num_epochs=2, epoch_barrier=True) as served:
        run = OneModel(served)
        served.wait(*[served.start(run.work, n) for n in (1, 2)], served.end)
    truth = run.truth()
    assert truth.schedule.last_epoch == 1
    for part in run.parts.values():
        for mine, theirs in ((part.model, truth.model), (part.mean, truth.mean)):
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=EXACT)
    ledger = served.closes[-1].ledger
    assert ledger["partly"] == ledger["skipped"] == 0


def test_samples_of_ones_own_are_of_one_lease_too() -> None:
    with Served(num_workers=2) as served:
        states = []

        def work(number: int) -> None:
            with served.join(number, print) as cluster:
                gan = Gan(number)
                gan.attach(cluster)
                batches = [torch.randn(4 + number, 6).double() for _ in range(3 + number)]
                for x in cluster.own_batches(batches, samples=len):
                    for pair, optimizer in (("critic", gan.opt_d), ("generator", gan.opt_g)):
                        optimizer.zero_grad()
                        gan.lose(pair, x).backward()
                        optimizer.step()
                states.append(gan.state())

        served.wait(*[served.start(work, n) for n in (1, 2)], served.end)
    assert served.end.result().reason == "every worker has finished"
    assert served.server.control.rounds.ledger.state()["done"] == 4 * 5 + 5 * 6


def test_loops_that_make_unlike_steps_are_told() -> None:
    with Served(num_workers=2, num_epochs=1, quorum=1.0) as served:
        loops, told = Loops(served), []

        def unlike() -> None:
            with served.join(2, print) as cluster:
                gan = Gan(2)
                gan.attach(cluster)
                for x, _, i in cluster.batches(loops.data, batch_size=BATCH):
                    for _ in range(2 if cluster.step > 6 else 1):
                        loops.step(cluster, gan, 2, "critic", x, i)
                    loops.step(cluster, gan, 2, "generator", x, i)

        def hold(number: int, step: int, pair: str) -> None:
            if (number, step) == (2, 9):
                served.until(lambda: served.server.control.rounds.round.pair == "generator")

        loops.hold = hold
        first, other = served.start(loops.work, 1), served.start(unlike)
        with pytest.raises(RunLost) as error:
            other.result(DEADLINE_S)
        told.append(error.value.problem)
        served.wait(first, served.end)
    loops.check(1)
    assert re.fullmatch(
        r"worker 2 \(.*\) steps 'critic', worker 1 \(.*\) steps 'generator'", told[0]
    )


def test_alone_a_gan_ends_where_one_process_does() -> None:
    data = Noise(SAMPLES)
    data.x = data.x.double()
    cluster = workers.join(port=1, alone={"num_epochs": 2})
    gan, truth = Gan(1), Gan(1)
    gan.attach(cluster)
    closes = []
    with cluster:
        for x, _, _ in cluster.batches(data, batch_size=BATCH):
            for pair, optimizer in (("critic", gan.opt_d), ("generator", gan.opt_g)):
                optimizer.zero_grad()
                gan.lose(pair, x).backward()
                optimizer.step()
            closes.append(x)
            for pair, model, own in (
                ("critic", truth.D, truth.opt_d),
                ("generator", truth.G, truth.opt_g),
            ):
                truth.G.zero_grad(), truth.D.zero_grad()
                truth.lose(pair, x).backward()
                if pair == "generator":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                own.step()
            truth.scheduler.step()
    assert len(closes) == 24 and cluster.step == 48
    assert cluster.end is not None and cluster.end.reason == "all epochs are done"
    torch.testing.assert_close(gan.state(), truth.state(), rtol=0, atol=EXACT)


# ------------------------------------------------------------------------------ the state


def several(seed: int, **more: Any) -> tuple[Gan, Several]:
    gan = Gan(seed)
    pairs = [
        Pair("generator", gan.G, gan.opt_g),
        Pair("critic", gan.D, gan.opt_d, scheduler=gan.scheduler),
    ]
    return gan, Several(pairs, bucket_mb=1.0, codec="float32", **more)


def test_a_checkpoint_holds_all_pairs(tmp_path: Path) -> None:
    gan, replica = several(1)
    x = Noise(8).x.double()
    for pair in ("critic", "generator"):
        gan.lose(pair, x).backward()
        replica.pairs[pair].step({}, schedule=True)
    checkpoint.save(tmp_path / "step-00000002.safetensors", replica, "run", {})
    kept = checkpoint.load(tmp_path / "step-00000002.safetensors")
    other, second = several(2)
    second.load(kept.state, kept.step, kept.lineage)
    torch.testing.assert_close(other.state(), gan.state(), rtol=0, atol=0)
    assert other.scheduler.last_epoch == 1 and second.digest() == replica.digest()
    for own, theirs in ((other.opt_g, gan.opt_g), (other.opt_d, gan.opt_d)):
        torch.testing.assert_close(
            own.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0
        )
    parts: dict[str, str] = {}
    replica.digest(parts)
    assert {"generator.lr", "critic.momentum"} <= parts.keys()


def test_a_state_of_other_pairs_does_not_fit() -> None:
    _, replica = several(1)
    state = copy.deepcopy(replica.state())
    state["scheduler"]["critic"]["last_epoch"] = "x"
    with pytest.raises(ValueError, match=r"scheduler of critic\.last_epoch is a str"):
        replica.load(state, 1, "x")


def test_the_recipe_names_each_pair() -> None:
    generator, critic = several(1)[1].recipe().split("; ")
    assert generator.startswith("generator: Adam of 4 parameters, no schedule")
    assert critic.startswith("critic: SGD of 4 parameters, StepLR by step")


# ------------------------------------------------------------------------------ errors


def refused(served: Served, **pairs: Any) -> UserError:
    cluster = served.join(1, print)
    try:
        with pytest.raises(UserError) as error:
            cluster.attach(**pairs)
    finally:
        cluster.leave()
    return error.value


def test_what_is_no_pair_is_an_error_of_attach() -> None:
    gan = Gan(1)
    twice = Adam([*gan.G.parameters(), *gan.D.parameters()])
    loose = Adam([nn.Parameter(torch.zeros(2))])
    good = {"generator": (gan.G, gan.opt_g)}
    cases = [
        ({**good}, "two or more"),
        ({**good, "critic": gan.D}, "critic=.* is no model with its optimizer"),
        ({**good, "critic": (gan.opt_d, gan.D)}, "is no model with its optimizer"),
        ({**good, "critic": (gan.D, gan.opt_d, {"clip": 1.0})}, "no option clip"),
        ({**good, "critic": (gan.D, gan.opt_d), "clip_norm": 1.0}, "several by name"),
        ({**good, "critic": (gan.D, twice)}, "'generator' and 'critic' have the same parameter"),
        ({**good, "critic": (gan.D, gan.opt_d), "third": (gan.D, loose)}, "in none of the models"),
        ({**good, "critic": (gan.D, SGD(gan.D[0].parameters()))}, "the optimizer does not have it"),
        ({**good, "train": (gan.D, gan.opt_d)}, "'train' is no name for a pair"),
        ({**good, "critic": (gan.D, gan.opt_d), "accumulate": 2}, "needs no accumulate"),
    ]
    with Served(num_workers=1) as served:
        for pairs, words in cases:
            assert re.search(words, refused(served, **pairs).problem), words
    with Served(num_workers=1, local_steps=4) as served:
        error = refused(served, **good, critic=(gan.D, gan.opt_d))
        assert "local steps" in error.problem and "local_steps=1" in error.hint


def test_mistakes_of_a_loop_are_told() -> None:
    cluster = workers.join(port=1, alone={"num_epochs": 1})
    gan, data = Gan(1), Noise(16)
    data.x = data.x.double()
    gan.attach(cluster)
    with pytest.raises(UserError, match="without a batch of its own"):
        gan.opt_d.step()
    with pytest.raises(UserError, match="one call"):
        cluster.attach(gan.G, gan.opt_g)
    batches = iter(cluster.batches(data, batch_size=8))
    x, _, _ = next(batches)
    gan.lose("critic", x).backward()
    nn.utils.clip_grad_norm_(gan.D.parameters(), 0.01)
    with pytest.raises(UserError, match="was changed after backward"):
        gan.opt_d.step()
    gan.opt_d.zero_grad()
    with pytest.raises(UserError, match="not called for the last batch"):
        next(batches)
    cluster.leave()
