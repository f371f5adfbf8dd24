"""Runs a server with its observer, from the settings to the exit code."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from zmq.utils import z85

from paramserver import notify, terminal, trace
from paramserver.config import schedule
from paramserver.config.loading import from_wire, save, to_wire
from paramserver.errors import UserError
from paramserver.fleet import plan_watch
from paramserver.fleet.supervisor import MARK
from paramserver.keys import Kept, Keys, load_or_make
from paramserver.keys import path as keys_path
from paramserver.net import link_watch, machine
from paramserver.net.address import LOOPBACK, listen
from paramserver.net.interfaces import SPOKEN
from paramserver.net.jointoken import joined
from paramserver.net.mdns import Announcement
from paramserver.output import metrics, runfolder, stored
from paramserver.output.curves import Curves, read
from paramserver.output.runfolder import Record, RunFolder, Unended
from paramserver.page import report
from paramserver.page.process import Page, opened
from paramserver.protocol import messages as wire
from paramserver.rounds import aggregate, local_steps
from paramserver.server import observer_process
from paramserver.server.control import Control
from paramserver.server.observer_process import ObserverProcess
from paramserver.server.ports import Ports
from paramserver.server.server import Server
from paramserver.server.show import Show
from paramserver.settings import BUCKET_SIZES, Settings
from paramserver.status.value import THIS_MACHINE, EventKind
from paramserver.terminal import STOPPED_BY
from paramserver.transport import malloc
from paramserver.transport.sockets import ServerKeys, allow_connections, is_loopback, towards
from paramserver.typed import printing_token, typed
from paramserver.words import host_port

MISSING = 3  # exit code
BY_SUPERVISOR = f"stopped by {typed('down')}, or by the system (SIGTERM)"
PERSON_S = 30.0  # for an answer at the start; workers wait longer for their server


@dataclass
class Series:
    """The `runs` that one program serves, one after another."""

    runs: int
    trial: int = 1
    """The place of the run at hand, from 1."""
    ended: wire.End | None = None
    """How the run before it ended."""
    code: int = 0
    """The exit code: of the worst run so far, where one that ended early is worse than one of which
    a result is missing."""
    stopped: bool = False
    """A person ends the program."""

    @property
    def goes_on(self) -> bool:
        """Does another run follow the one that has ended?"""
        return self.ended is not None and self.ended.more and not self.stopped

    def went(self, code: int) -> None:
        self.code = 1 if 1 in (code, self.code) else max(code, self.code)


def summarize(control: Control, show: Show, end: wire.End) -> dict[str, Any]:
    """The content of summary.json. It has the results of an evaluation only if that was of the last
    step; `last_evaluation` has the newest one with its step."""
    seconds = show.seconds(control, control.closed_at or control.first_open_at or 0.0)
    sent_bytes, received_bytes = show.traffic(control)
    ledger = control.rounds.ledger
    steps = end.step if ledger is None else ledger.optimizer_steps(end.step)
    values = show.val if show.val_step == steps else {}
    tallies = show.tallies(control)
    digests = {name: d for name, (step, d) in control.digests.items() if step == end.step}
    reference = digests.get("the observer") or next(iter(digests.values()), None)
    return {
        "steps": steps,
        "updates": end.step,
        "samples": show.samples,
        "seconds": seconds,
        "steps_per_s": show.steps / seconds if seconds else None,
        "samples_per_s": show.samples / seconds if seconds else None,
        "val_loss": values.get("val_loss"),
        **metrics.fields(metrics.reported(values)),
        "last_evaluation": None if show.val_step is None else {"step": show.val_step, **show.val},
        "train_loss": show.train_loss(),
        "workers": len(tallies),
        "sent_bytes": sent_bytes,
        "received_bytes": received_bytes,
        "digest": reference,
        "replicas_equal": len(set(digests.values())) == 1 if len(digests) > 1 else None,
        "digests": digests,
        "samples_done": ledger.done if ledger else 0,
        "samples_partly": ledger.partly if ledger else 0,
        "samples_skipped": ledger.skipped if ledger else 0,
        "samples_lost": control.rounds.lost_by_name(),
        "per_worker": [
            {"id": i, "host": t.host, "samples": t.samples, "rounds": t.rounds, "late": t.late}
            for i, t in sorted(tallies.items())
        ],
        "end": end.reason,
        "problems": show.problems.all(),
        "run": control.run_id,
    }


def serve(settings: Settings) -> int:
    """Run a server with its observer to the end of the run; returns the exit code.

    Where the newest run of this port has not ended (its server was killed) and has the same
    settings, it goes on, if one of its replicas comes back.
    """
    if settings.observer:
        observer_process.check(settings)
    trace.begin("server")
    malloc.keep_freed()
    allow_connections()
    page = opened(settings)
    try:
        return _serve_at(settings, page)
    finally:
        page.close()


def _serve_at(settings: Settings, page: Page) -> int:
    """`serve`, with a page that listens."""
    host_ip, chosen = machine.settle(settings)
    hosts, guarded = listen(host_ip, settings.security)
    sizes = [name for name in BUCKET_SIZES if getattr(settings, name) is None]
    outside = [host for host in (*hosts, *guarded) if not is_loopback(host)]
    fast, paths = machine.has_fast_cable(outside), link_watch.read(os.environ)
    slow = paths is not None and paths.has_slow_cable
    settings = settings.with_bucket(linked=bool(outside), fast=fast, slow=slow)
    parent, told = Path(settings.run_dir), to_wire(settings)
    here = Record(
        run=secrets.token_hex(8),
        host=socket.gethostname(),
        port=settings.port,
        settings=told,
        host_ip=settings.host_ip,
        machine=machine.identity(),
    )
    resume, before, said = None, None, ""
    if settings.resume is not None:
        if not settings.observer:
            raise UserError(
                f"resume={settings.resume} with observer=false: nobody would load the checkpoint",
                "the observer does that: leave observer=false out, or load the checkpoint in your "
                "own script before attach()",
            )
        if settings.runs > 1:
            raise UserError(
                f"resume={settings.resume} with runs={settings.runs}: a checkpoint belongs to one "
                "run",
                "leave one of the two out",
            )
        resume = runfolder.find_checkpoint(settings.resume, parent)
    else:
        before = runfolder.unended(parent, settings.port, told, settings.host_ip, sizes)
    as_it_is = None
    if before is not None:
        as_it_is, said = _going_on(before, settings)
        if as_it_is is None:
            before.folder.close()
    keys, new_keys = load_or_make() if guarded else (None, False)
    largest_mb = max(each.bucket_size_mb for each in (settings, as_it_is) if each is not None)
    ports = Ports(
        replace(settings, bucket_mb=largest_mb),
        hosts=hosts,
        guarded=guarded,
        keys=None if keys is None else keys.for_server(),
        watched=True,
    )
    kept = None if keys is None else Kept(keys)
    at = Listening(hosts, guarded, chosen, ports, page, kept, new_keys)
    try:
        series = Series(settings.runs)
        if before is not None and as_it_is is not None:
            record = msgspec.structs.replace(
                before.record, host=here.host, host_ip=here.host_ip, machine=here.machine
            )
            series.trial = record.trial
            if _serve(as_it_is, at, before.folder, record, series, recovering=True):
                series.trial += 1
            else:
                before.folder.close()
                series = Series(settings.runs, stopped=series.stopped)
        while series.trial == 1 or series.goes_on:
            folder = RunFolder.create(parent, datetime.now())
            record = msgspec.structs.replace(
                here, run=secrets.token_hex(8), number=folder.number, trial=series.trial
            )
            _serve(settings, at, folder, record, series, resume=resume, said=said)
            series.trial, said = series.trial + 1, ""
        return series.code
    finally:
        ports.close()


def _going_on(before: Unended, settings: Settings) -> tuple[Settings | None, str]:
    """The settings to go on with it, or None for a new run, and a sentence for people.

    Where it only nearly fits, a person at the terminal decides, if there is one.
    """
    path, port = before.folder.path, before.record.port
    differs = before.differs or ("it is of another version",)
    said = f"{path} has not ended, and differs from this run: {', '.join(differs)}"
    resumable = _resumable(before.folder, "; {} would go on from its last checkpoint")
    rest = f"a new run begins{resumable}"
    try:
        as_it_is = replace(from_wire(settings, before.record.settings), port=port)
    except UserError:  # settings of another version
        return None, f"{said}; {rest}"
    if not before.differs:  # but, perhaps, in what no person has chosen
        return replace(settings, **{name: getattr(as_it_is, name) for name in BUCKET_SIZES}), ""
    if not settings.plain and terminal.somebody_answers():
        terminal.say(said)
        question = f"go on with it as it is there, y, or begin a new run, N ({PERSON_S:g} s)? "
        return (as_it_is, "") if terminal.asked(question, PERSON_S) else (None, rest)
    return None, f"{said}; with the same settings it would go on, now {rest}"


def _resumable(folder: RunFolder, sentence: str) -> str:
    """This sentence about how to resume the run in a folder, if there is a checkpoint of it."""
    there = stored.newest_whole(folder.checkpoints) is not None
    return sentence.format(f"resume={folder.path}") if there else ""


@dataclass(frozen=True)
class Listening:
    """Where a server listens: addresses for every peer, addresses for peers with keys, and a
    sentence where it chose the address; the sockets, the page, and the keys if there are any."""

    hosts: list[str]
    guarded: list[str]
    why: str
    ports: Ports
    page: Page
    kept: Kept | None
    new_keys: bool

    @property
    def keys(self) -> Keys | None:
        return None if self.kept is None else self.kept.keys


def _serve(
    settings: Settings,
    at: Listening,
    folder: RunFolder,
    record: Record,
    series: Series,
    *,
    resume: Path | None = None,
    recovering: bool = False,
    said: str = "",
) -> bool:
    """Run the server of one run, and tell `series` how it ended; returns False where it should go
    on and no replica came back. `said`: a sentence about another run."""
    hosts, guarded, ports, page = at.hosts, at.guarded, at.ports, at.page
    before, series.ended = series.ended, None
    planned = plan_watch.read(settings)
    noted = folder.noted() if recovering else None
    run, key = record.run, secrets.token_hex(16)
    kinds = {i.address: i.kind for i in machine.interfaces()} if guarded else {}
    show = Show(settings, folder, planned, run, partial(_kind_of_link, kinds), series.trial)
    if recovering:
        show.overview.event(EventKind.RESTART, show.steps, time.time(), "the server starts again")
    server = Server(
        settings, record.settings, show,
        run=run, observer_key=key, recovery=noted, data_set=record.data_set,
        link_watch=link_watch.read(os.environ), plan_watch=planned, status=show.status_json,
        fresh_keys=partial(_fresh_keys, at, show, settings),
        ports=ports, trial=series.trial, first_worker_s=_patience_s(settings, before),
    )  # fmt: skip
    for number in terminal.ending_signals():
        signal.signal(number, lambda n, _: _stop(server, show, series, n))
    if series.stopped:  # a signal came after the end of the run before, whose server it stopped
        server.stop("stopped between two runs")
    observer = None
    try:
        if not recovering:
            _save_config(settings, folder)
        folder.remember(folder.config)
        show.tell(folder.write_record(record))
        show.tell(folder.open_note())
        where = ", ".join(f"{host_port(h, settings.port)}" for h in (*hosts, *guarded))
        if said:
            show.say(said, warning=True)
        if short := schedule.too_short(settings, schedule.known_samples(settings)):
            show.say(short, warning=True)
        if series.runs > 1:
            show.say(f"run {series.trial} of {series.runs}")
        if at.why and before is None:
            show.say(at.why)
        show.say(f"server at {where}, run folder {folder.path}")
        if steps := local_steps.described(settings):
            show.say(steps)
        if rule := aggregate.described(settings):
            show.say(rule)
        if before is None:
            _say_how_to_join(at, settings, show)
        _show_page(at, show, settings, first=before is None)
        if recovering:
            show.say(
                "this run has not ended: waiting for its replicas to come back "
                f"(a new one begins if nobody does in {settings.heartbeat_timeout:g} s)"
            )
        keys = at.keys
        public = None if keys is None else z85.decode(keys.for_server().public)
        show.announcement = Announcement(guarded or hosts, settings.port, run, public)
        notify.ready(where, str(folder.path))
        if settings.observer:
            token = None if keys is None else keys.token(joined(guarded), settings.port)
            observer = show.observer = ObserverProcess(
                settings, folder, run, key, resume, show.problem, token
            )
            observer.look(server.control)
        end = series.ended = server.run()
        if end is not None and end.more:
            ports.answer(end)
    finally:
        server.close()
        if sys.exc_info()[0] or (series.ended is not None and not series.goes_on):
            ports.close()  # whoever comes now finds nobody
        if show.announcement is not None:
            show.announcement.close()
        if observer is not None:
            observer.finish()
        show.tell(folder.close())
        show.display.close() if sys.exc_info()[0] else None
    if server.rounds.put_off:
        show.say("stopped before the run went on: its workers wait, start the server again")
        show.display.close()
        series.went(1)
        return True
    show.tell(folder.write_record(msgspec.structs.replace(record, ended=True)))
    if end is None:
        show.say(
            "nobody came back: a new run begins"
            + _resumable(folder, " ({} would go on from the last checkpoint of the old one)")
        )
        show.display.close()
        return False
    if observer is not None and observer.problem is not None and not server.rounds.log_begun:
        show.display.close()
        if not recovering and str(folder.path) not in observer.problem.hint:
            shutil.rmtree(folder.path, ignore_errors=True)  # nothing was trained
        raise observer.problem
    last = server.rounds.optimizer_steps
    missing = missing_results(show, last) if settings.observer and server.rounds.log_begun else []
    whole = _write_results(server.control, show, end, missing)
    page.last(show.status_json(server.control, time.monotonic()))
    series.went(1 if end.error else 0 if whole else MISSING)
    return True


def _fresh_keys(at: Listening, show: Show, settings: Settings) -> ServerKeys | None:
    """The keys of this server, where they were made anew: mDNS, the page and the observer have them
    then."""
    keys = None if at.kept is None else at.kept.fresh()
    if keys is not None:
        assert at.keys is not None
        if show.announcement is not None:
            show.announcement.renew(z85.decode(keys.public))
        if show.observer is not None:
            show.observer.renew(at.keys.token(joined(at.guarded), settings.port))
        _show_page(at, show, settings, first=True)
    return keys


def _say_how_to_join(at: Listening, settings: Settings, show: Show) -> None:
    """Tell how other machines join this server, or who else could."""
    keys = at.keys
    if keys is not None:
        if at.new_keys:
            show.say(f"made the keys of this cluster: {keys_path()}")
        if MARK in os.environ:  # the workers have it from `make up`, and a log is a file
            command = printing_token(",".join(at.guarded), settings.port)
            show.say(f"the join token, for further machines: {command}, in {Path.cwd()}")
        else:
            token = keys.token(joined(at.guarded), settings.port)
            show.say(f"other machines join with: {_join_command(token)}")
    elif exposed := [h for h in at.hosts if not is_loopback(h)]:
        show.say(
            f"security=none: whoever reaches {', '.join(exposed)} can read the model and "
            "spoil the training"
        )


def _show_page(at: Listening, show: Show, settings: Settings, *, first: bool) -> None:
    """Start the page's process for this run when somebody looks; with its `first` run, say where
    the page is."""
    page, keys = at.page, at.keys
    if page.problem and first:
        show.say(page.problem, warning=True)
    if not page.sockets:
        return
    port, guarded = settings.port_of_watchers, page.guarded
    if guarded and keys is None:
        keys, _ = load_or_make()
    page.serve(show.folder.path, port, None if keys is None else keys.watch_secret)
    show.page = page
    if not first:
        return
    show.say(f"page: {page.address(LOOPBACK)}")
    for host in guarded:
        assert keys is not None
        if MARK in os.environ:  # a log is a file
            token = printing_token(host, port, of="watch_port")
            show.say(f"page elsewhere: {page.address(host)}, with the watch token of: {token}")
        else:
            show.say(f"page elsewhere: {page.address(host)}/#{keys.watch_token(host, port)}")


def _kind_of_link(kinds: Mapping[str, str], address: str) -> str:
    """The kind of the interface by which this machine reaches an address; `kinds` are those of its
    own addresses."""
    own = towards(address)
    return THIS_MACHINE if own == address else SPOKEN.get(kinds.get(own, ""), "")


def _save_config(settings: Settings, folder: RunFolder) -> None:
    """Write the first file of a run. Raises `UserError`, because no other file could be written
    either."""
    try:
        save(settings, folder.config)
    except OSError as error:
        with suppress(OSError):
            folder.config.unlink(missing_ok=True)
            folder.server_log.unlink(missing_ok=True)
            folder.path.rmdir()
        raise UserError(
            f"{folder.config} cannot be written: {error.strerror or error}",
            "make room, or choose another disk with run_dir=FOLDER",
        ) from None


def missing_results(show: Show, last: int) -> list[str]:
    """The results that this run should have written of its `last` step and did not, by its files
    alone."""
    folder, missing = show.folder, []
    for path in (folder.model, *([] if show.settings.ema is None else [folder.average])):
        try:
            at = stored.step(path, stored.MODEL_FORMAT)
            if at != last:
                missing.append(f"{path.name} (there is one of step {at})")
        except stored.Broken:
            missing.append(path.name)
    try:
        stored.step(folder.checkpoints / stored.name(last))
    except stored.Broken:
        newest = stored.newest_whole(folder.checkpoints)
        there = "" if newest is None else f" (the newest whole one is {newest.name})"
        missing.append(f"the last checkpoint{there}")
    if show.val_step != last:
        there = "" if show.val_step is None else f" (the newest is of step {show.val_step})"
        missing.append(f"the last evaluation{there}")
    return missing


def _join_command(token: str) -> str:
    """The command that starts a worker in the same way as this server was started."""
    if "MAKELEVEL" in os.environ:
        return f"make worker ID=2 JOIN={token}"
    installed = Path(sys.argv[0]).name == "paramserver-server"
    return f"{'paramserver-worker' if installed else 'python -m workers'} id=2 join={token}"


def _write_results(control: Control, show: Show, end: wire.End, missing: list[str]) -> bool:
    """Write summary and picture, and show the table; returns whether no result is missing."""
    folder = show.folder
    if folder.unwritten:
        missing = [*missing, f"{folder.unwritten} lines of {folder.metrics.name}"]
    if missing:
        show.problem(f"the run ended, but a result of it is missing: {', '.join(missing)}")
    told = len(show.problems.all())
    problem = folder.write_summary(summarize(control, show, end))
    show.tell(problem)
    if show.steps:
        from paramserver.output import picture

        curves = Curves()
        try:
            curves = read(folder.metrics)
        except OSError as error:
            show.problem(f"{folder.metrics} cannot be read: {error.strerror or error}")
        show.tell(picture.draw(curves, folder.curves, f"run {folder.path.name}"))
        status = show.status(control, time.monotonic())
        said, found = list(show.overview.lines), show.diagnosis
        show.tell(report.write(folder.report, status, curves, said, found))
    summary = summarize(control, show, end)
    if problem is None and len(show.problems.all()) > told:
        folder.write_summary(summary)  # where this fails the first one stays
    show.say(f"the run is over at step {summary['steps']}: {end.reason}")
    show.display.summary({**summary, "workers": summary["per_worker"]}, str(folder.path))
    show.display.close()
    return not missing and problem is None


def _patience_s(settings: Settings, before: wire.End | None) -> float | None:
    """How long a run that follows another one waits for its first worker. After one that ended by
    an error most scripts have ended, too."""
    if before is None:
        return None
    return settings.join_timeout if before.error else settings.idle_timeout


def _stop(server: Server, show: Show, series: Series, number: int) -> None:
    # A second one ends the server at once; but a shell and the system may both send SIGHUP.
    signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
    series.stopped = True
    kept = number == signal.SIGTERM and MARK in os.environ  # by a supervisor, which ends it so
    server.stop(BY_SUPERVISOR if kept else STOPPED_BY[signal.Signals(number)])
    if number == signal.SIGINT:  # a person pressed it
        show.say_soon("ending the run in order; Ctrl-C again ends it at once, without its results")
