"""Codecs of stored memories: prefixes of rows, sizes, errors of rounding, damage and states that travel in files.

The data looks like real memories: all share a mean far larger than their spread, and a few channels are wild.
"""

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_clara.codecs_clara import CODECS, Codec
from modeling_clara.corpus.encode import encode, fit_codec

ROUNDED = ("int8", "int4")
# of the error of one vector: its length over that of what is left of a memory without the common mean
SPREAD_ERROR = {"float16": 0.01, "int8": 0.02, "int4": 0.12}


def memories(rows: int, n: int = 4, hidden: int = 64, *, seed: int = 0, outliers: int = 2) -> torch.Tensor:
    """(rows, n, hidden): a common mean, spread 1, and 20 in `outliers` channels; the same channels for every seed."""
    common = torch.Generator().manual_seed(1234)
    center = torch.randn(n, hidden, generator=common) * 10
    spread = torch.ones(hidden)
    spread[torch.randperm(hidden, generator=common)[:outliers]] = 20.0
    return center + torch.randn(rows, n, hidden, generator=torch.Generator().manual_seed(seed)) * spread


def spread_error(codec: Codec, memory: torch.Tensor) -> float:
    """Length of the rounding error over the length of the spread."""
    decoded = codec.decode(encode(codec, memory))
    return float((decoded - memory).norm() / (memory - memory.mean(0)).norm())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("hidden", [2, 30, 36, 62, 64, 96, 576, 4096])
def test_a_row_is_its_vectors_one_after_another(name, hidden):
    memory = memories(20, 5, hidden, outliers=0)
    codec = fit_codec(name, memory)
    rows = encode(codec, memory)
    whole = codec.decode(rows)
    assert hidden != 576 or codec.row_bytes <= {"float16": 5800, "int8": 3000, "int4": 1600}[name]
    assert encode(codec, memory[:0]).shape == (0, codec.row_bytes)
    assert rows.dtype == np.uint8 and rows.shape == (20, 5 * codec.vector_bytes) == (20, codec.row_bytes)
    assert whole.dtype == torch.float32 and torch.equal(codec.decode(rows, 5), whole)
    assert float((whole - memory).norm() / (memory - memory.mean(0)).norm()) < SPREAD_ERROR[name]
    assert name != "int4" or len(codec.state["outliers"]) == hidden // 32
    for k in range(1, 6):
        cut = np.ascontiguousarray(rows[:, : k * codec.vector_bytes])
        assert torch.equal(codec.decode(rows, k), whole[:, :k]) and torch.equal(codec.decode(cut, k), whole[:, :k])
    for place in range(20):  # a row does not hang on its neighbours
        assert np.array_equal(encode(codec, memory[place : place + 1]), rows[place : place + 1])
    assert torch.equal(codec.decode(rows[::-2].copy()), whole[torch.arange(19, -1, -2)])
    assert torch.equal(codec.decode(rows[::2]), whole[::2])
    for n_rows in (0, 1):  # also of an odd number of bytes, as int4 rows of 30 and 62 channels have
        assert torch.equal(codec.decode(rows[:n_rows], 1), whole[:n_rows, :1])


@pytest.mark.parametrize("name", CODECS)
def test_rows_and_memories_stay_as_they_are_and_rows_of_a_mapped_file_give_no_warning(name):
    memory = memories(6).requires_grad_()
    codec = fit_codec(name, memory.detach())
    before, state = memory.detach().clone(), {key: value.clone() for key, value in codec.state.items()}
    rows = encode(codec, memory)
    copy, expected = rows.copy(), codec.decode(rows)
    codec.decode(rows).add_(1)
    assert np.array_equal(rows, copy) and torch.equal(memory, before)
    assert np.array_equal(encode(codec, memory.double()), rows)
    assert all(torch.equal(codec.state[key], state[key]) for key in state)
    mapped = np.frombuffer(b"\0" + rows.tobytes(), np.uint8)[1:].reshape(rows.shape)  # read only, at an odd address
    torch.set_warn_always(True)  # torch gives this warning once a process otherwise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(codec.decode(mapped), expected)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_error_is_a_share_of_the_spread_not_of_the_mean(name, scale):
    scale = min(scale, 100.0) if name == "float16" else scale
    memory = memories(300, 4, 576, outliers=6) * scale
    assert memory.mean(0).norm() > 2 * (memory - memory.mean(0))[0].norm()
    codec = fit_codec(name, memory[:200])
    assert spread_error(codec, memory[200:]) < SPREAD_ERROR[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_wild_channels_do_not_cost_the_calm_ones_and_rounding_is_to_the_nearest(name):
    memory = memories(200, 2, 576, outliers=6)
    calm = memory.std(0).mean(0) < 5
    codec = fit_codec(name, memory)
    decoded = codec.decode(encode(codec, memory))
    centered = (memory - memory.mean(0))[..., calm]
    assert calm.sum() == 570
    assert float((decoded - memory)[..., calm].norm() / centered.norm()) < {"int8": 0.05, "int4": 0.25}[name]
    again = codec.decode(encode(codec, decoded))  # what was rounded once is nearly on the grid
    assert float((again - decoded).norm()) < 0.5 * float((decoded - memory).norm())


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("size", [100.0, -1e3, 1e4, -1e6, 1e9, 1e30])
def test_what_is_far_outside_the_sample_is_kept_or_refused(name, size):
    codec = fit_codec(name, memories(200))
    scaled, spiked = memories(3, seed=7) * size, memories(3, seed=7)
    spiked[1, 2, 33] = size
    for memory, first in ((scaled, 0), (spiked, 1)):
        try:
            decoded = codec.decode(encode(codec, memory))
        except ValueError as error:
            assert f"memory {first}" in str(error) and abs(size) > 1e4
            continue
        assert float(decoded[1, 2, 33]) == pytest.approx(float(memory[1, 2, 33]), rel=0.15)
        error = (decoded - memory).flatten(1).norm(dim=1) / memory.flatten(1).norm(dim=1)
        assert memory is spiked or error.max() < {"int8": 0.02, "int4": 0.15}[name]


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("sample", ["one row", "equal rows", "all zero", "constant channels"])
def test_a_poor_sample_still_encodes_what_comes_later(name, sample):
    memory = memories(100)
    sample = {
        "one row": memory[:1],
        "equal rows": memory[:1].repeat(50, 1, 1),
        "all zero": torch.zeros(1, 4, 64),
        "constant channels": torch.where(torch.arange(64) % 3 == 0, memory[:1], memory[:50]),
    }[sample]
    codec = fit_codec(name, sample)
    decoded = codec.decode(encode(codec, sample))
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded, sample, rtol=0.2, atol=3.0 if name == "int4" else 0.3)
    later = memory[50:]
    error = (codec.decode(encode(codec, later)) - later).norm() / later.norm()
    assert float(error) < {"int8": 0.02, "int4": 0.3}[name]  # int4 did not see which channels are wild


@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_or_does_not_fit_is_an_error_that_names_the_row(name):
    codec, memory = fit_codec(name, memories(5)), memories(5)
    for value in (65504.0, -65504.0):
        memory[3, 3, 63] = value
        assert float(codec.decode(encode(codec, memory))[3, 3, 63]) == value or name != "float16"
    for value in (torch.nan, torch.inf, -torch.inf, *((65536.0, -1e30) if name == "float16" else ())):
        memory[3, 1, 7] = memory[4, 0, 0] = value
        with pytest.raises(ValueError, match=rf"memory 3 .*{name}.*got.*{'65,504' if name == 'float16' else ''}"):
            encode(codec, memory)


@pytest.mark.parametrize("name", CODECS)
def test_another_shape_or_no_state_is_an_error(name):
    codec = fit_codec(name, memories(5))
    for shape in ((3, 4, 32), (3, 2, 64), (3, 5, 64), (4, 64), (3, 4, 64, 1), (64,)):
        with pytest.raises(ValueError, match=r"\(rows, 4, 64\), got"):
            encode(codec, torch.zeros(shape))
    rows = encode(codec, memories(5))
    for wrong, k in ((rows, 5), (rows, 0), (rows, -1), (rows[:, :-1], 4), (rows[:, : codec.vector_bytes], 2)):
        with pytest.raises(ValueError, match="`rows` must have the shape"):
            codec.decode(wrong, k)
    with pytest.raises(ValueError, match="`hidden_size` must be even, got 33"):
        fit_codec(name, memories(2, 1, 33, outliers=0))
    bare = Codec(name, 4, 64)
    assert bare.is_fitted == (name == "float16") and bare.row_bytes == codec.row_bytes
    for call in (lambda: encode(bare, memories(5)), lambda: bare.decode(rows)) if name != "float16" else ():
        with pytest.raises(ValueError, match="must be fitted"):
            call()


def test_an_unknown_name_is_an_error_that_lists_the_codecs():
    for name in ("int2", "", "INT8", None, 8, ["int8"]):
        for call in (lambda name=name: Codec(name, 4, 64), lambda name=name: fit_codec(name, memories(2))):
            with pytest.raises(ValueError, match="float16, int8, int4, got"):
                call()


STATE = fit_codec("int4", memories(5)).state


SHAPES = [
    ("float16", 4, 64, STATE),
    ("int8", 2, 64, STATE),
    ("int8", 4, 128, STATE),
    ("int8", 4, 64, STATE | {"more": STATE["mean"]}),
    ("int8", 4, 64, {"mean": STATE["mean"], "outliers": STATE["outliers"]}),
    ("int4", 4, 64, STATE | {"outliers": torch.arange(3)}),
]
OUTLIERS = [[0, 64], [-1, 5], [3, 3], [0.0, 1.0]]
DAMAGED = [
    *({"outliers": torch.tensor(places)} for places in OUTLIERS),
    {"mean": torch.full((4, 64), torch.nan)},
    *({"weight": torch.full((4, 64), value)} for value in (0.0, torch.inf)),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(arguments, "must have the shapes") for arguments in SHAPES]
    + [(("int4", 4, 64, STATE | fields), "damaged") for fields in DAMAGED],
)
def test_a_state_that_cannot_be_right_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=f"codec {arguments[0]} .*{message}"):
        Codec(*arguments)


def test_a_state_has_a_key_and_comes_back_from_a_file(tmp_path):
    codecs = [fit_codec(name, memories(20, seed=seed)) for name in ROUNDED for seed in (0, 1)]
    assert len({codec.key for codec in codecs}) == 4
    assert all(len(codec.key) == 12 and set(codec.key) <= set("0123456789abcdef") for codec in codecs)
    assert fit_codec("float16", memories(20)).key == ""
    for codec in codecs:
        save_file(codec.state, tmp_path / "state.safetensors")
        again, rows = Codec(codec.name, 4, 64, load_file(tmp_path / "state.safetensors")), encode(codec, memories(20))
        assert again.key == codec.key and torch.equal(again.decode(rows), codec.decode(rows))
    state, key = codecs[0].state, codecs[0].key
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in state.items()}
    for same in (state, dict(reversed(state.items())), strided, fit_codec("int8", memories(20)).state):
        assert Codec("int8", 4, 64, same).key == key
    assert Codec("int8", 4, 64, state | {"mean": state["mean"] + 1}).key != key
