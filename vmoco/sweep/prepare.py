"""A sweep before Ray starts: reads the space, checks each trial as a run, and finds what was done before."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import pyarrow.compute as pc

from vmoco import storage
from vmoco.config import PretrainSettings, RunSettings
from vmoco.data.fit import fit_to_data
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture, absolute
from vmoco.evaluate.mixture_score import sets_with_score
from vmoco.evaluate.motion_probes import motion_problem
from vmoco.evaluate.score import scored_clips
from vmoco.job_settings import MOTION_PROBES, SweepSettings
from vmoco.places import TrackingSettings
from vmoco.sweep import space as spaces
from vmoco.sweep.record import Sweep, Trial, read_sweep
from vmoco.sweep.space import Point, Points, Space, Values, as_text, load_space
from vmoco.train import run
from vmoco.train.run import PreparedRun
from vmoco.train.run_folder import RunFolder, fixed_by_fork


@dataclass
class PreparedSweep:
    """A sweep that has been checked."""

    settings: SweepSettings
    space: Space
    sweep: Sweep
    runs: list[PreparedRun]
    """The run of each trial."""
    refused: list[str]
    """A message for each combination that is not valid."""

    def add(self, point: Point) -> int | None:
        """Makes a trial of a point; returns its place, or None where its run is not valid."""
        place = len(self.sweep.trials)
        try:
            prepared = run.prepare(_as_run(point.settings, self.sweep, place))
        except ValueError as error:
            self.refused.append(f"{as_text(point.values)}: {error}")
            return None
        assert prepared.settings.run.name is not None, "given"
        self.sweep.trials.append(
            Trial(
                prepared.settings.run.name,
                point.values,
                point.settings.last_step,
                generation=point.generation,
                fork=prepared.settings.run.fork or "",
            )
        )
        self.runs.append(prepared)
        return place

    def point(self, values: Values, *, generation: int = 0, fork: str = "") -> Point:
        """The point of a trial. A member of a population trains up to the last step of its generation.

        Raises:
            ValueError: the values are not valid.
        """
        settings = self.space.settings(values)
        if self.settings.scheduler == "pbt":
            end = min(settings.train.steps, (generation + 1) * self.settings.pbt_steps)
            settings = settings.model_copy(
                update={
                    "train": settings.train.model_copy(update={"stop_after": end}),
                    "run": settings.run.model_copy(update={"fork": fork or settings.run.fork}),
                    # Only the first generation starts from `model.init`; a fork has the weights of its donor.
                    "model": settings.model.model_copy(update={"init": None if fork else settings.model.init}),
                }
            )
        return Point(values, settings, generation)

    def waiting(self) -> list[int]:
        """Places of the trials that have not ended; in a population, only those of the newest generation."""
        return [at for at, trial in enumerate(self.sweep.trials) if not trial.ended and at in self._newest()]

    def next_generation(self) -> bool:
        """Adds the next generation of a population whose newest one has ended; returns whether it added one."""
        if self.settings.scheduler != "pbt":
            return False
        places = self._newest()
        members = [self.sweep.trials[place] for place in places]
        if members[0].steps >= self.settings.pretrain.train.steps:
            return False
        places_of = {self.sweep.trials[place].name: place for place in places}
        added = []
        for member in spaces.next_generation(self.space, members, score=self.sweep.score):
            donor = RunFolder(self.runs[places_of[member.donor.name]].folder).checkpoint_uri(member.donor.steps)
            added.append(self.add(self.point(member.values, generation=members[0].generation + 1, fork=donor)))
        self.sweep.save()  # all at once: after a kill the sweep continues with a complete generation
        return any(place is not None for place in added)

    def _newest(self) -> list[int]:
        newest = max((trial.generation for trial in self.sweep.trials), default=0)
        return [place for place, trial in enumerate(self.sweep.trials) if trial.generation == newest]

    def suggest(self) -> int | None:
        """Makes the next trial of a search that learns; returns its place, or None if there is no next trial."""
        if self.settings.search != "optuna" or len(self.sweep.trials) >= self.settings.samples:
            return None
        point = spaces.suggest(self.space, self.sweep.trials, score=self.sweep.score)
        return self.add(point) if point else None


def prepare(settings: SweepSettings) -> PreparedSweep:
    """Checks all that can be checked without Ray, and starts nothing.

    Raises:
        ValueError: space, data, storage or metric cannot be used, or the name belongs to another sweep.
    """
    base = settings.pretrain
    if base.data.uri:
        base = base.model_copy(update={"data": absolute(base.data)})
        base, _ = fit_to_data(base, Mixture.load(base.data))
    if not base.scaling.num_workers:  # trials side by side waste less than workers that wait for each other
        base = base.model_copy(update={"scaling": base.scaling.model_copy(update={"num_workers": 1})})
    if settings.metric in MOTION_PROBES:
        base = base.model_copy(update={"evaluation": base.evaluation.model_copy(update={"motion": True})})
    settings = settings.model_copy(update={"pretrain": base})
    if not base.evaluation.enabled:
        raise ValueError("--evaluation.no-enabled leaves a sweep without a score: leave the flag out")
    axes = load_space(settings.space)
    space = Space.read(axes, base)
    _check_population(settings, space)
    points = _points(space, settings)
    first = points.points[0].settings if points.points else base
    checked = run.prepare(first.model_copy(update={"run": RunSettings(name=base.run.name, storage=base.run.storage)}))
    _check_metric(settings, checked.mixture)
    what = [checked.mixture.hash, axes, settings.search, settings.metric, base.content_hash()]
    if settings.scheduler == "pbt":
        what += ["pbt", str(settings.samples), str(settings.pbt_steps)]
    content = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    name = base.run.name or f"{base.preset}-sweep-{content[:8]}"
    assert checked.settings.run.storage is not None, "resolved"
    folder = storage.join(checked.settings.run.storage, name)
    sweep = Sweep(name, folder, content, settings.metric, checked.mixture.hash)
    prepared = PreparedSweep(settings, space, sweep, [], list(points.refused))
    _resume(prepared, read_sweep(folder))
    have = [trial.values for trial in sweep.trials if trial.generation == 0]
    for point in points.points:
        if point.values not in have:
            prepared.add(prepared.point(point.values))
    if not sweep.trials and points.points:
        raise ValueError(f"no combination of the space is a valid run: {prepared.refused[0]}")
    return prepared


def _points(space: Space, settings: SweepSettings) -> Points:
    if settings.search == "grid":
        return spaces.grid(space)
    if settings.search == "random":
        return spaces.random(space, samples=settings.samples)
    if spaces.suggest(space, [], score=settings.metric) is None:
        raise ValueError("no combination of the space is a valid run")
    return Points([], [])


def _resume(prepared: PreparedSweep, kept: Sweep | None) -> None:
    """Adds the trials of a sweep that was started earlier.

    Raises:
        ValueError: the name belongs to another sweep.
    """
    sweep = prepared.sweep
    if kept is None:
        return
    if kept.content != sweep.content:
        raise ValueError(
            f"--run.name {sweep.name} belongs to a sweep with another space, data set, metric or settings: submit the "
            "same command to continue it, or give another --run.name"
        )
    sweep.parent_run, sweep.registered, sweep.registered_trial = kept.parent_run, kept.registered, kept.registered_trial
    for before in kept.trials:
        place = prepared.add(prepared.point(before.values, generation=before.generation, fork=before.fork))
        if place is None:
            raise ValueError(f"trial {before.name} of sweep {sweep.name} cannot continue: {prepared.refused[-1]}")
        trial = dataclasses.replace(before, steps=sweep.trials[place].steps)
        # The trial's own folder decides whether it has finished: the driver may have died before it recorded this. A
        # trial that failed is tried again, but not in a generation from which others have continued.
        is_newest = trial.generation == max(each.generation for each in kept.trials)
        if is_newest and (not trial.ended or (trial.status == "finished" and not prepared.runs[place].finished)):
            trial.status, trial.reason = "waiting", ""
        sweep.trials[place] = trial


def _as_run(settings: PretrainSettings, sweep: Sweep, place: int) -> PretrainSettings:
    """A trial is a run that registers nothing: the sweep registers the best one."""
    name = f"{sweep.name}-{place:03d}"
    own = settings.run.model_copy(update={"name": name, "storage": storage.join(sweep.folder, "trials")})
    alias = TrackingSettings().alias  # that of the sweep would be reported as unused at the start of each trial
    quiet = settings.tracking.model_copy(update={"register_as": None, "alias": alias})
    return settings.model_copy(update={"run": own, "tracking": quiet})


def _check_population(settings: SweepSettings, space: Space) -> None:
    if settings.scheduler != "pbt":
        return
    if settings.search != "random" or settings.samples < 2:
        raise ValueError(
            f"--scheduler pbt needs a random population, and --search is {settings.search} with --samples "
            f"{settings.samples}: give --search random and --samples 2 or more"
        )
    if settings.pbt_steps >= settings.pretrain.train.steps:
        raise ValueError(
            f"--pbt-steps {settings.pbt_steps} leaves a single generation, because --train.steps is "
            f"{settings.pretrain.train.steps}: lower --pbt-steps, or raise --train.steps"
        )
    kept = {*fixed_by_fork(settings.pretrain), "train.steps", "train.stop_after"}
    if fixed := sorted(space.fields() & kept):
        raise ValueError(
            f"the space names {', '.join(fixed)}, which cannot change within a run, and a member of a population "
            "continues the run of another: leave it out, or choose another --scheduler"
        )


def _check_metric(settings: SweepSettings, mixture: Mixture) -> None:
    for _name, _weight, manifest in sets_with_score(mixture):  # raises if no set has enough videos
        scored_clips(manifest, max_videos=settings.pretrain.evaluation.max_videos)  # or pairs of clips
    if settings.metric in MOTION_PROBES:
        problems = [motion_problem(each, settings.pretrain) for each in mixture.manifests]
        if all(problems):
            raise ValueError(f"--metric {settings.metric} cannot be measured: {problems[0]}; or give another --metric")
    if settings.metric == "knn" and not any(map(_has_labels, mixture.manifests)):
        raise ValueError(
            f"--metric knn needs labelled clips, some held out and some not, and {mixture.uri} does not have both: "
            "choose --metric retrieval"
        )


def _has_labels(manifest: Manifest) -> bool:
    """Whether some labelled clips are held out, and some are not."""
    found: set[bool] = set()
    for piece in manifest.batches(["label", "held_out"]):
        found.update(piece.filter(pc.is_valid(piece["label"]))["held_out"].unique().to_pylist())
    return len(found) == 2
