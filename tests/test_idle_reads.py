"""Parameters between passes: readable, writable, and never a read of memory that is gone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_case import ROOMY_BYTES, House, build, close, spec
from pass_case import Driver, Step

from gemini.plan import Plan
from gemini.segment import MASTER, Placement
from gemini.simulated import StreamOrder

DTYPES = [torch.float32, torch.bfloat16]
PASS = [
    Step("u0", "forward", [0]),
    Step("u1", "forward", [1]),
    Step("u1", "backward", [1]),
    Step("u0", "backward", [0]),
]


def _house(dtype: torch.dtype = torch.float32, capacity_bytes: int = ROOMY_BYTES, resident: int = 0) -> House:
    units = [[spec(f"{i}.a", 4, dtype=dtype), spec(f"{i}.b", 2, 3, dtype=dtype)] for i in range(2)]
    house = build(units, capacity_bytes=capacity_bytes, order=StreamOrder.RANDOM)
    Driver(house).apply(Plan("test", [Placement(resident, 0)] * 2))
    return house


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resident", [0, 5, 10])
def test_values_are_shown_and_go_again(dtype: torch.dtype, resident: int) -> None:
    house = _house(dtype, resident=resident)
    for _ in range(2):
        for tensor in house.tensors:
            house.manager.read(tensor)
            assert torch.equal(tensor.parameter, house.originals[tensor.name].to(dtype))
        house.manager.check_integrity()
        house.manager.settle_idle_reads()
        house.manager.check_integrity()
        assert all(t.parameter.isnan().all() for t in house.tensors) or resident == 10
        assert house.device.memory().non_model_bytes == 0, "what was shown is still there"
    close(house)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resident", [0, 5, 10])
def test_a_read_alone_changes_no_bit_of_the_master(dtype: torch.dtype, resident: int) -> None:
    """The parameter shows the master rounded: taking that over as written would round the master, every time."""
    house = _house(dtype, resident=resident)
    for tensor in house.tensors:
        house.manager.read(tensor)
    house.manager.settle_idle_reads()
    for tensor in house.tensors:
        assert torch.equal(tensor.chunk.companion_of(tensor, MASTER), house.originals[tensor.name])
    close(house)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resident", [0, 5, 10])
def test_every_write_is_taken_over_and_nothing_else(dtype: torch.dtype, resident: int) -> None:
    """Several parameters of one chunk; of one of them a single element."""
    house = _house(dtype, resident=resident)
    first, second, third, _ = house.tensors
    for tensor in (first, second, third):
        house.manager.read(tensor)
    with torch.no_grad():
        first.parameter.mul_(2)
        second.parameter[1, 1] = 7.0
    house.manager.settle_idle_reads()
    expected = {name: values.clone() for name, values in house.originals.items()}
    expected[first.name] = (house.originals[first.name].to(dtype) * 2).float()
    expected[second.name][1, 1] = 7.0
    for tensor in house.tensors:
        assert torch.equal(tensor.chunk.companion_of(tensor, MASTER), expected[tensor.name])
        assert torch.equal(tensor.chunk.values_of(tensor), expected[tensor.name].to(dtype))
    house.manager.check_integrity()
    close(house)


def test_data_bound_to_a_tensor_of_the_users_own_is_taken_over() -> None:
    for resident in (0, 10):
        house = _house(resident=resident)
        tensor = house.tensors[0]
        house.manager.read(tensor)
        tensor.parameter.data = torch.arange(4.0)
        house.manager.settle_idle_reads()
        house.manager.check_integrity()
        assert tensor.chunk.values_of(tensor).tolist() == [0, 1, 2, 3]
        house.originals[tensor.name] = torch.arange(4.0)
        Driver(house).run(PASS)
        close(house)


@pytest.mark.parametrize("begin", ["pass", "backward", "step", "plan", "unpack"])
def test_whatever_comes_next_sees_what_was_written(begin: str) -> None:
    house = _house()
    tensor = house.tensors[1]
    manager = house.manager
    manager.read(tensor)
    with torch.no_grad():
        tensor.parameter.fill_(3.0)
    house.originals[tensor.name] = torch.full((2, 3), 3.0)
    if begin == "pass":
        manager.begin_pass(False, (1,))
    elif begin == "backward":
        manager.begin_backward()
        manager.unpack(tensor)
        assert torch.equal(tensor.parameter, house.originals[tensor.name])
    elif begin == "step":
        manager.release_stale()
    elif begin == "plan":
        manager.apply(Plan("test", [Placement(10, 10)] * 2))
    else:
        manager.unpack(tensor)  # of a graph, asked for by hand
        assert torch.equal(tensor.parameter, house.originals[tensor.name])
    assert torch.equal(tensor.chunk.values_of(tensor), house.originals[tensor.name])
    close(house)


@given(writes=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12), room=st.integers(24, 120))
@settings(max_examples=60, deadline=None)
def test_on_a_small_device_the_shown_give_way_to_one_another(writes: list[tuple[int, bool]], room: int) -> None:
    """A walk over all parameters of a model that does not fit: what was written is not lost when its copy goes."""
    house = _house(capacity_bytes=room)
    expected = {name: values.clone() for name, values in house.originals.items()}
    for number, (index, writes_too) in enumerate(writes):
        tensor = house.tensors[index]
        house.manager.read(tensor)
        assert torch.equal(tensor.parameter, expected[tensor.name])
        if writes_too:
            with torch.no_grad():
                tensor.parameter.fill_(float(number))
            expected[tensor.name].fill_(float(number))
        house.manager.check_integrity()
    house.manager.settle_idle_reads()
    for tensor in house.tensors:
        assert torch.equal(tensor.chunk.values_of(tensor), expected[tensor.name])
    close(house)


def test_one_parameter_that_does_not_fit_is_an_error() -> None:
    house = _house(capacity_bytes=20)
    house.manager.read(house.tensors[0])
    with pytest.raises(torch.OutOfMemoryError):
        house.manager.read(house.tensors[1])
    house.manager.settle_idle_reads()
    house.manager.check_integrity()
    close(house)


def test_gathered_copies_give_way_to_what_is_shown() -> None:
    house = _house(capacity_bytes=40 + 20)
    Driver(house).run([Step("u0", "forward", [0])], training=False)
    house.chunks[0].fetch()
    house.manager._gathered._by_index[0] = house.chunks[0]
    house.manager.read(house.tensors[3])
    assert not house.chunks[0].on_device
    house.manager.check_integrity()
    close(house)


def test_a_view_kept_by_the_user_outlives_everything() -> None:
    """In a process of its own: a read of memory that was given back would end it."""
    code = """
        import sys
        sys.path.insert(0, "tests")
        from test_idle_reads import PASS, Driver, Placement, Plan, _house
        for resident in (0, 10):
            house = _house(resident=resident)
            house.manager.read(house.tensors[0])
            kept = house.tensors[0].parameter.data
            whole = kept.clone()
            Driver(house).run(PASS)
            house.manager.apply(Plan("test", [Placement(0, 0)] * 2))
            house.chunks[0].dissolve()
            print("as it was" if (kept == whole).all() else "garbage")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")) == (0, ["as it was", "as it was", ""]), done.stderr


def test_a_graph_made_before_the_pass_keeps_its_values() -> None:
    """``(w * x).sum()`` of the user's own, outside the model's forward, then a pass, then backward through both."""
    house = _house()
    tensor = house.tensors[0]
    house.manager.read(tensor)
    x = torch.ones(4, requires_grad=True)
    penalty = (x * tensor.parameter.view(2, 2).flatten()).sum()
    expected = tensor.parameter.clone()
    Driver(house).run(PASS)
    with house.device.activity():
        penalty.backward()
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]
    close(house)


def test_reads_need_nothing_while_all_is_shown_whole() -> None:
    house = _house()
    with house.manager.shown_whole():
        house.manager.read(house.tensors[0])
    assert house.tensors[0].parameter.isnan().all()
    house.manager.write(house.tensors[0], torch.ones(4))
    assert house.chunks[0].values_of(house.tensors[0]).tolist() == [1, 1, 1, 1]
    close(house)


def test_writing_to_a_gathered_chunk_drops_the_copy() -> None:
    house = _house()
    house.manager.begin_pass(False, (1,))
    house.manager.enter("root")
    house.manager.read(house.tensors[0])
    house.manager.leave()
    house.manager._fetch(house.chunks[1])
    house.manager.write(house.tensors[2], torch.full((4,), 5.0))
    house.manager.check_integrity()
    house.manager.read(house.tensors[2])
    assert house.tensors[2].parameter.tolist() == [5, 5, 5, 5]
    close(house)
