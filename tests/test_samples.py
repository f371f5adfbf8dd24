"""Data sets as `batches` takes them: what is none, what cannot be read, and what workers die of."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from crew import Noise, loss, perceptron
from torch import Tensor
from torch.utils.data import IterableDataset
from whole import Served, free_port

import workers
from paramserver import logs
from paramserver.errors import UserError
from workers.samples import Loaded, Loading, Samples, Unusable


class Broken(Noise):
    """Some of its samples cannot be read."""

    def __init__(self, samples: int, *broken: int) -> None:
        super().__init__(samples)
        self.broken = broken

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if index in self.broken:
            raise OSError(f"{index}.png is cut off")
        return super().__getitem__(index)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


class HasASizedBatch(Noise):
    """As Hugging Face's sets do, which have a method of that name for something else."""

    def batch(self, batch_size: int, drop_last_batch: bool = False) -> Any:
        raise AssertionError("not this one")


def test_what_is_no_data_set_is_told_at_the_call() -> None:
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        cluster.attach(setup.model, setup.optimizer)
        for wrong, sentence in (
            (Stream(), "stream"),
            (iter([1, 2]), "stream"),
            ({"x": torch.zeros(4)}, "not a dict"),
            (7, "not a int"),
            (object(), "no numbered samples"),
            ([], "without samples"),
        ):
            with pytest.raises(UserError, match=sentence):
                cluster.batches(wrong)
        for size in (0, -1, 2.0, True):
            with pytest.raises(UserError, match="batch_size"):
                cluster.batches(Noise(4), batch_size=size)


def test_a_method_of_that_name_that_takes_a_size_is_not_called() -> None:
    x, _, _ = Samples(HasASizedBatch(8)).load((0, 0, 4))[0].data
    assert x.shape == (4, 6)


def test_what_cannot_be_read_is_left_out_and_named_once() -> None:
    said: list[str] = []
    samples = Samples(Broken(200, 3, 5), log=logs.to(said.append, "workers"))
    leases = [(epoch, start, start + 50) for epoch in (0, 1) for start in range(0, 200, 50)]
    loaded = [samples.load(lease)[0] for lease in leases]
    assert sum(len(part.unread) for part in loaded) == 4
    for part in loaded:
        assert len(part.data[0]) == 50 - len(part.unread)
    assert sorted(line.split(":")[2] for line in said) == [" sample 3", " sample 5"]


def test_a_sample_that_exits_is_one_that_cannot_be_read() -> None:
    """Else it would end one worker after the other, each of them in order."""

    class Exits(Noise):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
            return sys.exit("no decoder") if index == 3 else super().__getitem__(index)

    samples = Samples(Exits(200))
    with ThreadPoolExecutor(1) as loader:
        (part,) = loader.submit(samples.load, (0, 0, 200)).result()
    assert len(part.unread) == 1 and part.samples == 199
    assert samples._broken == {
        3: "sample 3: RuntimeError: the data set called sys.exit('no decoder')"
    }
    with pytest.raises(SystemExit):  # in this thread it may be a signal's handler that exits
        Samples(Exits(200)).load((0, 0, 200))


def test_more_than_one_in_a_hundred_is_an_error_that_names_them() -> None:
    samples = Samples(Broken(200, 3, 5, 7))
    with pytest.raises(Unusable, match=r"3 of 200 samples cannot be read.*png is cut off"):
        samples.load((0, 0, 200))


def test_a_lease_of_which_nothing_can_be_read_has_no_data() -> None:
    samples = Samples(Broken(300, 3))
    samples.load((0, 0, 300))
    place = samples._indices((1, 0, 300)).index(3)
    assert samples.load((1, place, place + 1)) == [Loaded(None, (0,), 0)]


def test_a_mistake_in_the_data_set_is_shown_as_it_is() -> None:
    with pytest.raises(OSError, match="cut off"):
        Samples(Broken(8, *range(8))).load((0, 0, 4))


@pytest.mark.parametrize("quick", [True, False])
def test_what_is_read_quickly_is_read_in_the_loop(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that takes turns with the loop costs more than some samples."""
    monkeypatch.setattr(Loading, "QUICK_S", math.inf if quick else 0.0)
    readers: list[int] = []

    class Told(Noise):
        def __getitem__(self, index: int) -> Tensor:
            readers.append(threading.get_ident())
            return super().__getitem__(index)

    loading = Loading(Samples(Told(20)))
    loading.result((0, 0, 2))  # nobody has loaded ahead yet
    loading.begin((0, 2, 4))
    loaded = loading.result((0, 2, 4))
    loading.close()
    here = threading.get_ident()
    assert [part.samples for part in loaded] == [2]
    assert [reader == here for reader in readers] == [True, True, quick, quick]


def test_two_passes_do_not_read_a_data_set_at_the_same_time() -> None:
    """A pass was left while it read ahead, and the next one begins."""
    began, together = threading.Event(), threading.Event()

    class Once(Noise):
        inside = 0

        def __getitem__(self, index: int) -> Any:
            self.inside += 1
            if self.inside > 1:
                together.set()
            if not began.is_set():
                began.set()
                together.wait(0.5)  # as long as the other one would take to come
            self.inside -= 1
            return super().__getitem__(index)

    samples = Samples(Once(64))
    left, following = Loading(samples), Loading(samples)
    left.begin((0, 0, 8))
    assert began.wait(20.0)
    left.close()
    assert following.result((0, 8, 16))[0].samples == 8
    assert not together.is_set()


@pytest.mark.parametrize("quick", [True, False])
def test_what_goes_wrong_ahead_is_raised_where_it_is_needed(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loading, "QUICK_S", math.inf if quick else 0.0)
    data = Broken(20)
    samples = Samples(data)
    loading = Loading(samples)
    loading.result((0, 0, 2))
    data.broken = tuple(samples._indices((0, 2, 5)))
    loading.begin((0, 2, 5))
    with pytest.raises(Unusable):
        loading.result((0, 2, 5))
    loading.close()


def test_with_deterministic_a_sample_is_the_same_whoever_reads_it() -> None:
    class Drawn(Noise):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
            return torch.randn(3), self.y[index], index

    before = torch.get_rng_state()
    one, other = (Samples(Drawn(20), deterministic=True) for _ in range(2))
    torch.randn(5)
    whole, half = one.load((1, 0, 20))[0].data[0], other.load((1, 10, 20))[0].data[0]
    assert torch.equal(whole[10:], half) and not torch.equal(whole[0], whole[1])
    torch.set_rng_state(before)
    one.load((2, 0, 20))
    assert torch.equal(torch.get_rng_state(), before)


def test_attach_leaves_the_generator_alone_and_workers_still_draw_otherwise() -> None:
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        before = torch.get_rng_state()
        cluster.attach(setup.model, setup.optimizer)
        assert torch.equal(torch.get_rng_state(), before)
        next(cluster.batches(Noise(8)))
        assert cluster.settings["seed"] == cluster.settings.seed
        assert torch.initial_seed() == cluster.settings.seed + cluster.worker_id


def test_a_sample_that_kills_is_skipped_and_the_others_go_on() -> None:
    """Two workers die of it, and a third of a half."""
    data, ended = Noise(64), list[str]()

    def work(number: int) -> None:
        setup = perceptron(number)
        with served.join(number, served.say) as cluster:
            model, optimizer = cluster.attach(setup.model, setup.optimizer)
            for x, y, indices in cluster.batches(data, batch_size=8):
                if 13 in indices.tolist() and cluster.step:
                    raise ValueError("a sample of no use")
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
            ended.append(f"worker {number}")

    with Served(num_workers=4, num_epochs=2) as served:
        futures = [served.start(work, number) for number in (1, 2, 3, 4)]
        served.wait(served.end)
        assert served.end.result().reason == "all epochs are done"
    errors = [type(f.exception()) for f in futures if f.exception()]
    done, partly, skipped = served.samples
    assert done + partly + skipped == 128
    assert errors == [ValueError] * 3 and skipped == 4 and len(ended) == 1
    assert "workers died of it" in served.text and "13" in served.text


def test_a_sample_that_cannot_be_read_is_skipped_in_a_run() -> None:
    data = Broken(120, 17)

    def work(number: int) -> None:
        setup = perceptron(number)
        with served.join(number, served.say) as cluster:
            model, optimizer = cluster.attach(setup.model, setup.optimizer)
            for x, y, _ in cluster.batches(data, batch_size=8):
                loss(model, x, y).backward()
                optimizer.step()

    with Served(num_workers=2, num_epochs=2) as served:
        served.wait(*(served.start(work, number) for number in (1, 2)), served.end)
    assert served.samples == (238, 0, 2)
    assert "skipped: sample 17 (place" in served.text
