"""`dspark_lab.tuning.noise_file`: what was measured comes back, other files are refused."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from dspark_lab.tuning import (
    GradientNoise,
    Moments,
    gradient_moments,
    label_overlap,
    load_noise,
    save_noise,
    shipped_noise,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def moments(seed: int, size: int, conversations: int = 5) -> Moments:
    random = np.random.default_rng(seed)
    gradients = random.normal(size=(2 * conversations, 9))
    anchors = [random.permutation(12)[:3] for _ in range(2 * conversations)]
    of = np.arange(2 * conversations) // 2
    return gradient_moments(gradients, of, anchors, label_overlap(size))


NOISE = GradientNoise({4: moments(0, 4), 15: moments(1, 15)}, {0: moments(2, 1), 3: moments(3, 1)})


@pytest.fixture
def path(tmp_path):
    save_noise(NOISE, tmp_path / "noise.safetensors")
    return tmp_path / "noise.safetensors"


def test_noise_comes_back_as_it_was_in_32_bits(path):
    again = load_noise(path)
    for saved, loaded in ((NOISE.wholes, again.wholes), (NOISE.slots, again.slots)):
        assert list(saved) == list(loaded)
        for number in saved:
            for name in ("cross", "design", "products", "overlap"):
                expected = getattr(saved[number], name)
                found = getattr(loaded[number], name)
                assert found.dtype == np.float64 and found.shape == expected.shape
                np.testing.assert_array_equal(found, expected.astype(np.float32))
    pd.testing.assert_frame_equal(again.table(50), NOISE.table(50), rtol=1e-3)
    # Once in 32 bits, a file is the same whenever it is written.
    first = path.read_bytes()
    save_noise(again, path)
    assert path.read_bytes() == first


def test_a_file_stays_small(tmp_path):
    whole = {size: moments(0, size, 64) for size in (4, 7, 15)}
    slots = {slot: moments(slot, 1, 64) for slot in range(15)}
    save_noise(GradientNoise(whole, slots), tmp_path / "noise")
    assert (tmp_path / "noise").stat().st_size < 220_000


def test_numbers_that_32_bits_do_not_hold_are_refused_and_nothing_is_written(tmp_path):
    for wrong in (np.nan, np.inf, 1e300):
        own = moments(0, 4)
        own.cross[1, 2] = wrong
        with pytest.raises(ValueError, match="finite in 32 bits, got others in block 4"):
            save_noise(GradientNoise({4: own}, {}), tmp_path / "noise")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "block.4.cross",
            lambda x: x[:-1],
            r"block 4 must have float32 cross of \(15,\), got .*14",
        ),
        ("block.4.cross", lambda x: x * np.nan, "block 4 must have finite cross"),
        ("slot.3.design", lambda x: x[:, :5], r"slot 3 must have float32 design of \(5, 6\)"),
        ("slot.3.products", lambda x: x.astype(np.float16), "float32 products of .*, got float16"),
        ("slot.3.products", lambda x: x[0], "slot 3 must have float32"),
        ("block.15.overlap", lambda x: x[None], r"float32 overlap of \(14,\)"),
        ("block.15.design", None, r"block 15 must have all of its sums, got no \['design'\]"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(path, name, change, message):
    tensors = load_file(path)
    changed = tensors.pop(name)
    if change is not None:
        tensors[name] = np.ascontiguousarray(change(changed))
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as refused:
        load_noise(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("own", ["weight", "block.4.other", "row.4.cross", "block.x.cross"])
def test_tensors_of_another_kind_are_refused(path, own):
    save_file(load_file(path) | {own: np.zeros(3, dtype=np.float32)}, path)
    with pytest.raises(ValueError, match=f"must be of save_noise, got a tensor '{own}'"):
        load_noise(path)


def test_what_is_no_safetensors_file_or_holds_no_block_is_refused(path, tmp_path):
    for junk in (b"", b"junk", path.read_bytes()[:-4]):
        (tmp_path / "junk").write_bytes(junk)
        with pytest.raises(ValueError, match="must be a safetensors file of noise, but is not"):
            load_noise(tmp_path / "junk")
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_noise(tmp_path / "nothing")
    slots = {name: values for name, values in load_file(path).items() if name.startswith("slot")}
    save_file(slots, path)
    with pytest.raises(ValueError, match="the noise of a block of 1 slot or more, got none"):
        load_noise(path)


def test_the_noise_that_ships_is_named_by_its_mix_and_its_steps(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("dspark_lab.tuning.noise_file.shipped", lambda name: tmp_path / name)
    monkeypatch.setattr("dspark_lab.tuning.noise_file.load_noise", read.append)
    assert list(shipped_noise("code")) == [0, 100, 400]
    assert [path.relative_to(tmp_path).as_posix() for path in read] == [
        f"pocket/noise-code-{step}.safetensors" for step in (0, 100, 400)
    ]
    with pytest.raises(ValueError, match="mix must be 'all' or 'code', got 'math'"):
        shipped_noise("math")
