"""An elastic run that is submitted from outside, loses a host during training, gets another one, and ends."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tests.cluster.hosts import wait_until
from tests.cluster.service import BIN, ROOT, Service

NAME = "survivor"
STEPS, LOG_EVERY, CHECKPOINT_EVERY = 2000, 10, 50
FLAGS = (
    f"--run.name {NAME} --run.storage s3://vmoco/runs --tracking.register-as {NAME} --train.steps {STEPS} "
    f"--train.log-every {LOG_EVERY} --train.checkpoint-every {CHECKPOINT_EVERY} "
    "--scaling.num-workers 2 --scaling.min-workers 1 --scaling.resize-seconds 5"
)


@dataclass(frozen=True)
class Survivor:
    """The result of the run."""

    said: str
    """Complete output of the job."""
    run_id: str
    cut: str
    """Name of the host that was cut off; the first rank was there."""
    starts: list[tuple[int, int]]
    """Number of workers and first step of each group of workers."""


def survive(service: Service, *, data: str) -> Survivor:
    """Runs it. Everything that Ray and the store keep of it stays there afterwards."""
    outside = service.hosts["outside"]
    log = outside.folder / "survivor.log"

    def starts() -> list[tuple[int, int]]:
        found = re.findall(r"^(\d+) workers on cpu, .* from step (\d+)", log.read_text(), re.MULTILINE)
        return [(int(workers), int(step)) for workers, step in found]

    def steps_of_last_start() -> list[int]:
        said = re.split(r"^\d+ workers on cpu", log.read_text(), flags=re.MULTILINE)[-1]
        return [int(step) for step in re.findall(r"^step (\d+)/", said, re.MULTILINE)]

    def wait(what: str, number: int, *, seconds: float) -> None:
        def there() -> bool:
            assert job.poll() is None, f"it ended before {what}:\n{outside.said(log.name)}"
            return len(re.findall(what, log.read_text(), re.MULTILINE)) >= number

        wait_until(there, what=what, seconds=seconds, blame=lambda: outside.said(log.name))

    job = outside.start(service.submission(f"python jobs/pretrain.py tiny --data.uri {data} {FLAGS}"), log=log.name)
    wait(r"^step [1-9]\d\d/", 1, seconds=180)
    cut = service.network.host_of(_writer(service)["pid"])
    service.network.cut(cut)
    wait(r"^1 workers on cpu", 1, seconds=150)
    # The old first rank is still alive there, and now reaches store and tracker again.
    service.network.mend(cut)
    # On a busy machine a new host may come before the one worker has kept a checkpoint. When it is past a second one,
    # the first one is complete, because a snapshot waits for the checkpoint before it.
    after = starts()[-1][1] + 2 * CHECKPOINT_EVERY
    wait_until(
        lambda: steps_of_last_start()[-1:] > [after],
        what=f"one worker is past step {after}",
        seconds=300,
        blame=lambda: outside.said(log.name),
    )
    service.add_worker("three")
    wait(r"^2 workers on cpu", 2, seconds=150)
    code = job.wait(timeout=900)
    said = log.read_text()
    assert code == 0, said
    (run_id,) = re.findall(r"tracked as (\w+) in https:", said)
    return Survivor(said, run_id, cut.name, starts())


def _writer(service: Service) -> dict[str, int]:
    read = f"from vmoco import storage; print(storage.read_bytes('s3://vmoco/runs/{NAME}/writer.json').decode())"
    said = service.hosts["outside"].run(f'cd {ROOT}; {BIN}/python -c "{read}"', environment=service.store_keys["nodes"])
    found: dict[str, int] = json.loads(said.splitlines()[-1])
    return found
