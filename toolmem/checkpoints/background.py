"""Writing in the background, of tensors as they were at one moment.

A save copies the tensors to buffers that are kept from one save to the next, and a thread writes those.
Weights and optimizer states change at the optimizer's step alone, so a large model's are copied by the
thread, while the next forward and backward pass goes on; `copied` is called before the step (Mohan et al.,
CheckFreq, FAST 2021, copy so). Threads are no daemons: Python does not end before they have written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

AT_ONCE = 1 << 20  # bytes up to which all is copied at once: a thread's start would cost more

WhenBusy = Literal["wait", "replace"]


@dataclass
class _Job:
    sources: dict[str, Tensor]
    buffers: dict[str, Tensor]
    write: Callable[[dict[str, Tensor]], None]
    replaceable: bool
    event: Any = None  # of a CUDA stream: copies are done
    copied: threading.Event = field(default_factory=threading.Event)
    superseded: bool = False


class BackgroundWriter:
    """Writes one checkpoint at a time, in the order in which they were taken.

    Args:
        when_busy: a save that comes while another is being written ``wait``s for it; or is kept ready
            beside it (which takes buffers twice), and ``replace``d by a newer one if that comes first.
    """

    def __init__(self, when_busy: WhenBusy = "wait") -> None:
        self.when_busy = when_busy
        self._changed = threading.Condition()
        self._running: _Job | None = None
        self._waiting: _Job | None = None
        self._live: _Job | None = None  # whose sources may still be read
        self._free: list[dict[str, Tensor]] = []
        self._stream: torch.cuda.Stream | None = None
        self.error: BaseException | None = None

    def save(
        self,
        tensors: Mapping[str, Tensor],
        write: Callable[[dict[str, Tensor]], None],
        later: Collection[str] = (),
        replaceable: bool = False,
    ) -> None:
        """Copy tensors, and have them written.

        Args:
            tensors: by name.
            write: gets the copies; called in another thread.
            later: names of those that stay as they are until `copied` was called: they may be copied
                after this returns.
            replaceable: with ``when_busy: replace``, a newer one may be written in its stead.
        """
        self.copied()
        with self._changed:
            self._changed.wait_for(self._has_room)
            if self._waiting is not None:
                self._waiting.superseded = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is None)
            buffers = self._free.pop() if self._free else {}
        job = _Job({}, self._fitting(buffers, tensors), write, replaceable)
        small = sum(t.numel() * t.element_size() for t in tensors.values()) <= AT_ONCE
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                self._copy_from_gpu(job, name, tensor)
            elif small or name not in later:
                job.buffers[name].copy_(tensor)
            else:
                job.sources[name] = tensor
        if not job.sources and job.event is None:
            job.copied.set()
        with self._changed:
            self._live = job
            if self._running is None:
                self._running = job
            else:
                self._waiting = job
        threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=False).start()

    def _has_room(self) -> bool:
        if self._running is None:
            return True
        if self.when_busy == "wait":
            return False
        return self._waiting is None or self._waiting.replaceable

    @staticmethod
    def _fitting(buffers: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Buffers of the tensors' shapes, taken from those that are there."""
        found = {}
        for name, tensor in tensors.items():
            buffer = buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
                )
            found[name] = buffer
        return found

    def _copy_from_gpu(self, job: _Job, name: str, tensor: Tensor) -> None:
        """On a stream of its own, which the optimizer's step waits for (`copied`)."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if job.event is None:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            job.event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            job.buffers[name].copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            job.event.record(self._stream)

    def _run(self, job: _Job) -> None:
        error: BaseException | None = None
        try:
            for name in list(job.sources):
                job.buffers[name].copy_(job.sources.pop(name))
            if job.event is not None:
                job.event.synchronize()
        except BaseException as failure:  # told to the training thread
            error = failure
        job.sources.clear()
        job.copied.set()
        with self._changed:
            self._changed.wait_for(lambda: self._running is job or job.superseded)
        if error is None and not job.superseded:
            try:
                job.write(job.buffers)
            except BaseException as failure:
                error = failure
        with self._changed:
            self._free.append(job.buffers)
            if error is not None:
                self.error = error
            if self._running is job:
                self._running, self._waiting = self._waiting, None
            else:
                self._waiting = None
            self._changed.notify_all()

    def copied(self) -> None:
        """Return once the last save's tensors may be changed."""
        job = self._live
        if job is None:
            return
        self._live = None
        if job.event is not None:
            torch.cuda.current_stream().wait_event(job.event)
            if not job.sources:
                return
        job.copied.wait()

    def wait(self) -> None:
        """Return once everything is written, or has failed."""
        self.copied()
        with self._changed:
            self._changed.wait_for(lambda: self._running is None)

    def take_error(self) -> BaseException | None:
        """What went wrong since this was last asked, if anything did."""
        error, self.error = self.error, None
        return error
