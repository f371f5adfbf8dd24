"""The examples run as they are, and say what they reached; so does any script of one's own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from test_solo import SCRIPT
from whole import CLONE, Run

from workers.builtin.data import FILES, load

EXAMPLES = sorted(path.stem for path in (CLONE / "examples").glob("*.py"))


def launched(folder: Path, script: Path, *settings: str) -> tuple[int, str]:
    """Exit code and words of `launch script`."""
    with Run(folder) as run:
        words = ["-m", "paramserver.launch", "script", str(script), f"port={run.port}"]
        program = run.start("the launcher", *words, "run_dir=runs", "plain=true", *settings)
        return program.end(), program.output


@pytest.mark.parametrize(("name", "least"), [("digits", 85.0), ("federated", 75.0)])
def test_an_example_reaches_what_it_promises(name: str, least: float, tmp_path: Path) -> None:
    code, said = launched(tmp_path, CLONE / "examples" / f"{name}.py", "num_epochs=3")
    assert code == 0, said
    reached = re.search(rf"^{name}: .*?(\d+\.\d) %", said, re.MULTILINE)
    assert reached and float(reached[1]) > least, said
    assert "the same on all replicas" in said


def test_unlike_machines_take_samples_by_their_speed(tmp_path: Path) -> None:
    code, said = launched(tmp_path, CLONE / "examples" / "speeds.py")
    assert code == 0 and "the same on all replicas" in said, said
    took = {
        int(w): int(n.replace(",", "")) for w, n in re.findall(r"worker (\d) │ +([\d,]+)", said)
    }
    assert sum(took.values()) == 16_000 and took[1] > 2 * took[3] and took[1] > 2 * took[4], said


def shortened(name: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of an example with other constants, and its settings."""
    text = (CLONE / "examples" / f"{name}.py").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    script = folder / f"{name}.py"
    script.write_text(text)
    shutil.copy(CLONE / "examples" / f"{name}.yaml", folder)
    return script


def test_a_gan_in_short(tmp_path: Path) -> None:
    """It needs all its epochs to find the ring."""
    code, said = launched(tmp_path, CLONE / "examples" / "gan.py", "num_epochs=1")
    assert code == 0 and "the same on all replicas" in said, said
    assert "12,800 done, 0 partly" in said
    assert re.search(r"^gan: \d+\.\d % of 1,000 points lie .* after 400 steps", said, re.M), said


@pytest.mark.long
def test_the_small_gpt_in_short(tmp_path: Path) -> None:
    script = shortened("gpt", tmp_path, ("WINDOWS = 12_000", "WINDOWS = 640"))
    code, said = launched(tmp_path, script)
    assert code == 0 and "the same on all replicas" in said, said
    reached = re.search(
        r"^gpt: [\d,]+ parameters, loss (\d\.\d+) a letter after 20 steps", said, re.M
    )
    assert reached and float(reached[1]) < 4.0, said  # it starts at log(97) = 4.6
    assert "So:\nThe " in said


@pytest.mark.long
def test_resnet18_in_short(tmp_path: Path) -> None:
    """On digits, written as those files are, since they come with the packages."""
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    digits = load({"name": "digits"}, 42)
    parts = (digits.train.images, digits.train.labels, digits.val.images, digits.val.labels)
    for name, part in zip(FILES, parts, strict=True):
        sizes = b"".join(size.to_bytes(4) for size in part.shape)
        content = bytes([0, 0, 8, part.dim()]) + sizes + part.to(torch.uint8).numpy().tobytes()
        (raw / name).write_bytes(content)
    script = shortened(
        "fashion",
        tmp_path,
        ("TRAIN, TEST = 3, 3072, 1000", "TRAIN, TEST = 3, 512, 250"),
        ("/usr/share/datasets/fashion-mnist", str(tmp_path / "nowhere")),
    )
    code, said = launched(tmp_path, script, "num_epochs=1")
    assert code == 0 and "the same on all replicas" in said, said
    assert re.search(r"^fashion: \d+\.\d % right after 8 steps on 512 pictures", said, re.M), said


def test_adapters_learn_what_the_frozen_network_does_not_know(tmp_path: Path) -> None:
    code, said = launched(tmp_path, CLONE / "examples" / "finetune.py", "num_epochs=2")
    assert code == 0 and "the same on all replicas" in said, said
    reached = re.search(
        r"^finetune: (\d+\.\d) % right after 63 steps with ([\d,]+) of ([\d,]+) ", said, re.M
    )
    assert reached and float(reached[1]) > 70.0, said  # by chance: 20
    trained, all_of_them = (int(reached[i].replace(",", "")) for i in (2, 3))
    assert 0 < trained < all_of_them / 20, said
    (log,) = (tmp_path / "runs").glob("2*/worker-2.log")
    assert "weights replaced by worker 1 (" in log.read_text()


def test_players_learn_from_rollouts_of_unlike_size(tmp_path: Path) -> None:
    script = shortened(
        "rollouts", tmp_path, ("ROLLOUTS, PASSES = 30, 4", "ROLLOUTS, PASSES = 8, 4")
    )
    code, said = launched(tmp_path, script)
    assert code == 0 and "the same on all replicas" in said, said
    reached = re.search(r"of (\d+) to (\d+) steps; after 32 updates .* for (\d+\.\d) of", said)
    assert reached and int(reached[1]) < int(reached[2]), said
    assert float(reached[3]) > 30.0, said  # in the beginning it falls after 20 steps


def test_each_example_is_told_of() -> None:
    for page in (CLONE / "README.md", CLONE / "docs" / "your-own-model.md"):
        assert "make example NAME=digits" in page.read_text()
    told = set(re.findall(r"make example NAME=(\w+)", (CLONE / "README.md").read_text()))
    assert told == set(EXAMPLES)


def test_a_script_with_settings_beside_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.with_suffix(".yaml").write_text("num_epochs: 3\nbatch_size: 16\n")
    script.write_text(SCRIPT + "import sys\nprint(sys.argv[1:])\n")
    code, said = launched(tmp_path, script, "num_workers=1", "--", "--lr", "num_epochs=7")
    assert code == 0 and "worker 1 stands at step 12" in said, said
    assert said.endswith("['--lr', 'num_epochs=7']")
    [folder] = (tmp_path / "runs").glob("2*")
    assert "stands at step 12" in (folder / "worker-1.log").read_text()


def test_a_script_that_fails_is_told(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "raise LookupError('after all')\n")
    code, said = launched(tmp_path, script, "num_workers=1")
    assert code == 1 and "LookupError: after all" in said


def test_without_its_pictures_an_example_says_where_they_come_from(tmp_path: Path) -> None:
    script = tmp_path / "fashion.py"
    script.write_text(
        (CLONE / "examples" / "fashion.py")
        .read_text()
        .replace("/usr/share/datasets/fashion-mnist", str(tmp_path / "nowhere"))
    )
    with Run(tmp_path) as run:
        program = run.start("it", str(script), PATH="")
        assert program.end() == 1 and "apt install dataset-fashion-mnist" in program.output


def test_a_script_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    code, said = launched(tmp_path, tmp_path / "trian.py")
    assert code == 2 and "there is no script" in said and "there is: train" in said
