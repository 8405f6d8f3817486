"""Saves in the background: what is written, in which order, and what a newer one may replace."""

from __future__ import annotations

import threading

import pytest
import torch

from toolmem.checkpoints.background import AT_ONCE, BackgroundWriter


class Disk:
    """Takes what is written, when it is let to."""

    def __init__(self) -> None:
        self.written: list[float] = []
        self.begun = threading.Semaphore(0)
        self.may = threading.Semaphore(0)

    def write(self, tensors) -> None:
        self.begun.release()
        assert self.may.acquire(timeout=30)
        [value] = set(tensors["w"].tolist())
        self.written.append(value)

    def let(self, n: int) -> None:
        for _ in range(n):
            self.may.release()


@pytest.fixture
def disk():
    return Disk()


def saved_in_a_thread(writer, disk, value, **options) -> threading.Thread:
    thread = threading.Thread(
        target=writer.save, args=({"w": torch.full((4,), value)}, disk.write), kwargs=options
    )
    thread.start()
    return thread


@pytest.mark.parametrize("n", [4, AT_ONCE])  # copied at once; by the thread
def test_tensors_are_written_as_they_were_when_saved(n, disk):
    writer, weight = BackgroundWriter(), torch.zeros(n)
    for value in (1.0, 2.0):
        weight.fill_(value)
        disk.let(1)
        writer.save({"w": weight}, disk.write, later=["w"])
        writer.copied()
        weight.fill_(9.0)  # the optimizer's step
    writer.wait()
    assert disk.written == [1.0, 2.0]


def test_a_save_waits_for_the_one_before(disk):
    writer = BackgroundWriter()
    writer.save({"w": torch.full((4,), 1.0)}, disk.write)
    assert disk.begun.acquire(timeout=30)
    second = saved_in_a_thread(writer, disk, 2.0)
    second.join(0.1)
    assert second.is_alive()
    disk.let(2)
    second.join(30)
    writer.wait()
    assert disk.written == [1.0, 2.0]


def test_the_newest_of_those_that_may_be_replaced_is_written(disk):
    writer = BackgroundWriter("replace")
    writer.save({"w": torch.full((4,), 1.0)}, disk.write, replaceable=True)
    assert disk.begun.acquire(timeout=30)  # it is being written, and is written to its end
    for value in (2.0, 3.0, 4.0):
        thread = saved_in_a_thread(writer, disk, value, replaceable=True)
        thread.join(30)
        assert not thread.is_alive()  # training does not wait
    disk.let(4)
    writer.wait()
    assert disk.written == [1.0, 4.0]


def test_one_that_must_be_kept_is_not_replaced(disk):
    writer = BackgroundWriter("replace")
    writer.save({"w": torch.full((4,), 1.0)}, disk.write)
    assert disk.begun.acquire(timeout=30)
    saved_in_a_thread(writer, disk, 2.0).join(30)  # kept ready, and for good
    third = saved_in_a_thread(writer, disk, 3.0, replaceable=True)
    third.join(0.1)
    assert third.is_alive()
    disk.let(3)
    third.join(30)
    writer.wait()
    assert disk.written == [1.0, 2.0, 3.0]


def test_what_went_wrong_is_told_once_and_the_next_is_written(disk):
    writer = BackgroundWriter()

    def fail(tensors) -> None:
        raise OSError("the disk is full")

    writer.save({"w": torch.zeros(4)}, fail)
    writer.wait()
    assert "full" in str(writer.take_error()) and writer.take_error() is None
    disk.let(1)
    writer.save({"w": torch.full((4,), 2.0)}, disk.write)
    writer.wait()
    assert disk.written == [2.0]
