"""sbatch, srun, squeue, sacct, scontrol and scancel of a Slurm that is a folder: for tests without Slurm.

The first word says which. Jobs are processes, two at a time, the state of each a file in $FAKE_SLURM:
`jobs/12_0.json` has its state, its process, its name. Other files there change what it does: `refuse` holds
words that sbatch fails with, `lost` makes it fail though it takes the job, `silent` makes squeue fail,
`forgetful` lets it know of no job that has ended, `accounting` lets sacct answer, `limit` has seconds of a
job, `warn` those until it is sent SIGUSR2, `kill_wait` those from SIGTERM to SIGKILL, `hold` starts none.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ.get("FAKE_SLURM", "."))
JOBS = HERE / "jobs"
ALIVE = ("PENDING", "RUNNING")


def read(number):
    return json.loads((JOBS / f"{number}.json").read_text())


def write(number, **changes):
    return change(JOBS / f"{number}.json", **changes)


def change(path, when=None, **changes):
    """Change a job, if its state is one of some; False when it is not."""
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(path.read_text()) if path.exists() else {}
        if when is not None and state["state"] not in when:
            return False
        path.with_suffix(".part").write_text(json.dumps(state | changes))
        path.with_suffix(".part").replace(path)
        return True


def fail(words):
    print(words, file=sys.stderr)
    sys.exit(1)


def sbatch(script):
    lost = HERE / "lost"  # the job is taken, and sbatch says it is not
    if (HERE / "refuse").exists():
        fail((HERE / "refuse").read_text())
    text = Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    job = max([0, *(int(path.stem.partition("_")[0]) for path in JOBS.glob("*.json"))]) + 1
    (HERE / f"{job}.sh").write_text(text)
    array = re.match(r"0-(\d+)", options.get("array", "").strip("'"))
    for index in range(int(array[1]) + 1) if array else [None]:
        number = str(job) if index is None else f"{job}_{index}"
        write(number, state="PENDING", name=options["job-name"], submitted=time.time())
        start(number)
    if lost.exists():
        lost.unlink()
        fail("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(f"Submitted batch job {job}")


def start(number):
    words = [sys.executable, __file__, "run", number]
    subprocess.Popen(
        words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def run(number):
    """What slurmctld and slurmd do for one job."""
    while read(number)["state"] == "PENDING":
        states = [json.loads(path.read_text())["state"] for path in sorted(JOBS.glob("*.json"))]
        if states.count("RUNNING") < 2 and not (HERE / "hold").exists():
            break
        time.sleep(0.05)
    if not write(number, when=("PENDING",), state="RUNNING"):
        return
    job, _, index = number.partition("_")
    environment = os.environ | {"SLURM_JOB_ID": str(1000 + int(job) * 100 + int(index or 0))}
    environment |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "1"}
    if index:
        environment |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": index}
    else:
        environment["SLURM_JOB_ID"] = job
    process = subprocess.Popen(
        ["bash", str(HERE / f"{job}.sh")], env=environment, start_new_session=True
    )
    write(number, pid=process.pid)
    limit = time.monotonic() + told("limit", 1e9)
    warn = time.monotonic() + told("warn", 1e9)
    while process.poll() is None and read(number)["state"] == "RUNNING":
        if time.monotonic() > warn:
            os.killpg(process.pid, signal.SIGUSR2)
            warn = 1e99
        if time.monotonic() > limit:
            write(number, when=("RUNNING",), state="TIMEOUT")
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        wait = time.monotonic() + told("kill_wait", 0.2)
        while process.poll() is None and time.monotonic() < wait:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    write(number, pid=None)
    write(number, when=("RUNNING",), state="FAILED" if code else "COMPLETED")
    if write(number, when=("REQUEUED",), state="PENDING"):
        start(number)


def told(name, default):
    path = HERE / name
    return float(path.read_text()) if path.exists() else default


def srun(*words):
    """The command behind the options, its output where --output says."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    output, rest = None, list(words)
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            output = rest.pop(0)
    for mark, value in (("%A", job), ("%a", index), ("%j", job), ("%t", "0")):
        output = output.replace(mark, value)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execvp(rest[0], rest)


def squeue(*words):
    if (HERE / "silent").exists():
        fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for path in sorted(JOBS.glob("*.json")):
        job = json.loads(path.read_text())
        reason = "Resources" if job["state"] == "PENDING" else "None"
        state = "PENDING" if job["state"] == "REQUEUED" else job["state"]
        if not (HERE / "forgetful").exists() or state in ALIVE:
            print(f"{path.stem}|{state}|{reason}|{job['name']}")


def sacct(*words):
    if not (HERE / "accounting").exists():
        fail("Slurm accounting storage is disabled")
    for number in words[words.index("-j") + 1].split(","):
        state = read(number)["state"]
        print(f"{number}|{'CANCELLED by 1000' if state == 'CANCELLED' else state}")


def scancel(number):
    end(number, "CANCELLED")


def scontrol(command, number, *more):
    if command == "requeue":
        end(number, "REQUEUED")


def end(number, state):
    write(number, when=ALIVE, state=state)


def install(folder):
    """Write the programs into a folder, and say what the environment is to have."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel"):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def clear(folder):
    """End whatever still runs."""
    for path in (folder / "jobs").glob("*.json"):
        job = json.loads(path.read_text())
        if job["state"] in ALIVE:
            change(path, state="CANCELLED")
        if job.get("pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job["pid"], signal.SIGKILL)


if __name__ == "__main__":
    JOBS.mkdir(exist_ok=True)
    globals()[sys.argv[1]](*sys.argv[2:])
