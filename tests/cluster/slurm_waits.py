"""What tests on a cluster wait for."""

from __future__ import annotations

import subprocess
import time

from toolmem.sweeps.slurm_queue import jobs_of_user


def wait_for(what, seconds=600):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.1)
    return found


def hurry() -> bool:
    """Let jobs that were requeued start at once."""
    for job in jobs_of_user().values():
        if job.reason == "BeginTime":
            update = ["scontrol", "update", f"JobId={job.number}", "StartTime=now"]
            subprocess.run(update, capture_output=True)
    return True


def end_all_jobs() -> None:
    """Cancel what is queued or runs, and see it end."""
    subprocess.run(["scancel", "--user=root"], check=True)
    wait_for(lambda: all(job.ended for job in jobs_of_user().values()))
