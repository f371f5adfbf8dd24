"""What `make status` says of a run's processes."""

from __future__ import annotations

from msgspec.structs import replace
from test_status import FULL

from paramserver.fleet.processes import of_run, run_of
from paramserver.fleet.supervisor import State
from paramserver.net.hosts import Host
from paramserver.status.value import to_json

MINI1 = Host("mini1", "mini1", role="both", id=1)
MINI2 = Host("mini2", "mini2", id=2, workers=2)


def state(name: str, *, alive: bool = True, shown: str = "") -> State:
    return State(name, [], "up", alive=alive, shown=shown)


def test_each_process_has_its_part_of_the_status() -> None:
    run = run_of([state("worker"), state("server", shown=to_json(FULL).decode())])
    assert run == FULL
    assert of_run(run, MINI1, state("server")) == (
        "training, step 812/1,120, 72 %, 0:01 left, loss 0.2134, 19,080 samples/s, epoch 3/5, "
        "accuracy 93.4 % (step 800), 298 steps/s"
    )
    assert of_run(run, MINI1, state("worker")) == "9,540 samples/s"
    assert of_run(run, MINI2, state("worker-1")) == "late 0.41 s, late 3x"
    assert of_run(run, MINI2, state("worker-2")) == "", "it is gone, its own last line says more"


def test_what_is_no_part_of_the_run_is_not_told_of_it() -> None:
    assert of_run(FULL, MINI1, state("worker", alive=False)) == ""
    assert of_run(None, MINI1, state("server")) == ""
    assert of_run(FULL, MINI1, state("worker-9")) == "", "of an earlier start"
    assert run_of([state("server"), state("server", shown="{rubbish")]) is None


def test_before_the_first_step_there_is_only_the_phase() -> None:
    run = replace(FULL, step=0, trains=False, phase="waiting for 2 workers: worker 1 ready")
    assert of_run(run, MINI1, state("server")) == "waiting for 2 workers: worker 1 ready"
