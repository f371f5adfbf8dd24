"""How a layout is cut into buckets: a plan holds every number once, and a small gradient is cut as
finely as its cable is worth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole import Run

from paramserver.config.loading import from_wire, to_wire
from paramserver.output.runfolder import unended
from paramserver.protocol.messages import Layout, Tensor
from paramserver.server.program import _going_on
from paramserver.settings import BUCKET_SIZES, PIECES, Settings
from paramserver.tensors.bucket import SENT_BYTES, BucketPlan, plan

SIMPLE = Layout(
    tuple(
        Tensor(f"layer{i}", (n,), "float32")
        for i, n in enumerate((10, 5_120, 512, 131_072, 256, 200_704))
    )
)
MIB = 2**20

tensors = st.lists(
    st.tuples(
        st.integers(0, 60_000),
        st.sampled_from([("float32", "grad", "float32"), ("float64", "grad", "float64"),
                         ("float32", "stat", "float32"), ("int64", "count", "int64"),
                         ("int32", "whole", "bytes")]),
    ),
    max_size=12,
)  # fmt: skip


def layout_of(drawn: list[tuple[int, tuple[str, str, str]]]) -> Layout:
    return Layout(
        tuple(
            Tensor(f"t{i}", (count,), dtype, kind, sent)
            for i, (count, (dtype, kind, sent)) in enumerate(drawn)
        )
    )


def numbers(cut: BucketPlan) -> int:
    return sum(b.nbytes for b in cut.buckets if b.kind != "whole")


@given(
    tensors,
    st.floats(0.001, 0.5),
    st.one_of(st.none(), st.floats(0.001, 0.5)),
)
def test_every_number_is_in_one_bucket_of_its_kind(
    drawn: list[tuple[int, tuple[str, str, str]]], bucket_mb: float, least_mb: float | None
) -> None:
    layout = layout_of(drawn)
    cut = plan(layout, bucket_mb, least_mb)
    assert [b.index for b in cut.buckets] == list(range(len(cut.buckets)))
    assert all(b.size > 0 for b in cut.buckets)
    assert [b.start for b in cut.buckets] == [0, *(b.stop for b in cut.buckets)][:-1]
    assert cut.offsets[-1] == (cut.buckets[-1].stop if cut.buckets else 0)
    for b in cut.buckets:
        assert {(layout.tensors[i].kind, layout.tensors[i].sent) for i in b.tensors} == {
            (b.kind, b.sent)
        }
        if b.kind != "whole":
            assert b.nbytes <= bucket_mb * MIB + SENT_BYTES[b.sent]


@given(tensors, st.floats(0.001, 0.5))
def test_a_least_size_that_is_no_less_changes_nothing(
    drawn: list[tuple[int, tuple[str, str, str]]], bucket_mb: float
) -> None:
    layout = layout_of(drawn)
    as_ever = plan(layout, bucket_mb)
    assert plan(layout, bucket_mb, bucket_mb) == plan(layout, bucket_mb, 1.0) == as_ever


@given(st.integers(1, 3_000_000), st.floats(0.01, 0.5), st.floats(0.5, 4.0))
def test_one_tensor_is_cut_into_equal_pieces(count: int, least_mb: float, most_mb: float) -> None:
    cut = plan(Layout((Tensor("weight", (count,), "float32"),)), most_mb, least_mb)
    wanted = max(1, min(PIECES, int(4 * count / (least_mb * MIB))))
    if 4 * count / wanted + 8 <= most_mb * MIB:
        assert len(cut.buckets) == wanted
        assert cut.buckets[0].nbytes - 4 * count / wanted < 8
    else:  # what one piece would have is more than a bucket may
        assert len(cut.buckets) == math.ceil(4 * count / (4 * (int(most_mb * MIB) // 4)))


def test_what_travels_in_a_round_counts_and_not_what_other_pairs_exchange() -> None:
    """Two pairs that are stepped in turn are cut as each would be alone."""
    one = (Tensor("a", (50_000,), "float32"),)
    both = (*one, Tensor("b", (50_000,), "float32"))
    alone = plan(Layout(one), 2.0, 0.05)
    pairs = plan(Layout(both, (("g", 1), ("d", 1))), 2.0, 0.05)
    assert [b.size for b in pairs.buckets] == 2 * [b.size for b in alone.buckets]


@pytest.mark.parametrize(
    ("codec", "codec_down", "least_mb"),
    [
        ("float32", None, 0.0625),
        ("float16", None, 0.125),
        ("bfloat16", "float32", 0.125),
        ("float32", "int8", 0.25),
        ("topk", "float32", 2.0),
        ("float16", "topk", 2.0),
    ],
)
def test_over_links_the_least_bucket_is_of_one_size_on_the_wire(
    codec: str, codec_down: str | None, least_mb: float
) -> None:
    """The way on which less travels decides: more buckets would not make the other one sooner."""
    linked = Settings(codec=codec, codec_down=codec_down, shards=1).with_bucket(linked=True)
    assert (linked.bucket_mb, linked.min_bucket_mb) == (2.0, least_mb)


def test_a_fast_cable_is_not_worth_more_buckets() -> None:
    settled = Settings(codec="float16").with_bucket(linked=True, fast=True)
    assert len(plan(SIMPLE, 2.0, settled.min_bucket_mb).buckets) == 1
    assert plan(SIMPLE, 2.0, settled.min_bucket_mb) == plan(SIMPLE, 2.0)
    finely = Settings(min_bucket_mb=0.5).with_bucket(linked=True, fast=True)
    assert finely.min_bucket_mb == 0.5, "what a person has chosen holds"


def test_on_one_host_and_with_a_size_of_the_users_a_small_gradient_is_one_bucket() -> None:
    def buckets(settings: Settings) -> int:
        return len(plan(SIMPLE, settings.bucket_size_mb, settings.min_bucket_mb).buckets)

    usual = Settings()
    assert buckets(usual) == buckets(usual.with_bucket(linked=False)) == 1
    assert PIECES <= buckets(usual.with_bucket(linked=True)) <= PIECES + 2
    assert buckets(replace(usual, bucket_mb=2.0).with_bucket(linked=True)) == 1
    finely = replace(usual, min_bucket_mb=0.5)
    for linked in (False, True):
        assert 2 <= buckets(finely.with_bucket(linked=linked)) <= 4
    both = replace(finely, bucket_mb=0.25).with_bucket(linked=True)
    assert both.bucket_mb == 0.25 and buckets(both) >= 5


@pytest.mark.parametrize("linked", [False, True])
def test_with_what_null_means_put_in_its_place_nothing_is_chosen_again(linked: bool) -> None:
    settled = Settings(codec="float16").with_bucket(linked=linked)
    assert settled.with_bucket(linked=True) == settled.with_bucket(linked=False) == settled


def test_a_server_that_is_started_again_keeps_the_sizes_that_it_chose(tmp_path: Path) -> None:
    """Its cables may be others then (one is out), but the replicas that come back have this plan.
    A size that a person gives is another matter."""
    with Run(tmp_path) as run:
        server = run.server("observer=false")
        server.wait_for("run folder")
        server.kill()
        [folder] = run.runs
        record = json.loads((folder / "run.json").read_text())
        record["settings"] |= {"bucket_mb": 2.0, "min_bucket_mb": 0.0625}
        (folder / "run.json").write_text(json.dumps(record))

        again = run.server("observer=false")
        again.wait_for("this run has not ended: waiting for its replicas")
        again.kill()
        assert json.loads((folder / "run.json").read_text())["settings"] == record["settings"]
        told = from_wire(Settings(), {**record["settings"], "bucket_mb": 4.0})
        now = replace(told, port=run.port, min_bucket_mb=None)
        before = unended(folder.parent, run.port, to_wire(now), None, BUCKET_SIZES)
        assert before is not None and not before.differs
        as_it_is, said = _going_on(before, now)
        before.folder.close()
        assert as_it_is == replace(now, bucket_mb=2.0, min_bucket_mb=0.0625) and said == ""

        other = run.server("observer=false", "bucket_mb=4")
        other.wait_for("differs from this run: .*bucket_mb is 2.0 there, 4.0 here")
        other.kill()


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=40), st.floats(0.01, 0.2))
def test_buckets_become_no_larger_where_they_may_be_smaller(
    counts: list[int], least_mb: float
) -> None:
    layout = Layout(tuple(Tensor(f"t{i}", (n,), "float32") for i, n in enumerate(counts)))
    sizes = [
        max(plan(layout, 2.0, each).sizes) for each in (least_mb, 2 * least_mb, 4 * least_mb, None)
    ]
    assert all(a <= b for a, b in pairwise(sizes))
    assert numbers(plan(layout, 2.0, least_mb)) == 4 * sum(counts)
