"""Schedules: against systemd's own reading of a calendar, against a shell, and a scheduler that is stopped, killed and started again."""

import ast
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import helpers
import nbformat
import pytest
import yaml

from visrec_nb.core.errors import InputError, ParameterError
from visrec_nb.core.files import read_json, write_json
from visrec_nb.reports.history import write_history
from visrec_nb.reports.schedule import (
    Scheduler, calendar, check_schedule, crontab, github_workflow, job, missed_time, next_time, parse_cron, read_schedule, run_command,
    systemd_units, time_zone, times, write_schedule,
)

ODD = "100% of \"it's\" $HOME\\x" # a folder that shells, cron and systemd would each take for something else


visrec = partial(helpers.visrec, timeout=120)


@pytest.fixture
def odd(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / "photos 1.yaml").write_text("epochs: 3\n")
    return job("image_training", "out runs", "30 2 * * mon-fri", "UTC", "photos 1.yaml", "photos", folder, ["--timeout", "7200"])


# Expressions


systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")


def by_systemd(line: str, after: datetime, n: int) -> list[datetime]:
    done = subprocess.run(["systemd-analyze", "calendar", f"--iterations={n}", f"--base-time={after:%Y-%m-%d %H:%M:%S UTC}", line],
                          capture_output=True, text=True, check=True, env=os.environ | {"TZ": "UTC", "LC_ALL": "C"})
    rows = [row for row in done.stdout.splitlines() if ("elapse:" in row or "Iter." in row) and not row.endswith("never")]
    texts = [row.split(": ", 1)[1].split(maxsplit=1)[1].removesuffix(" UTC") for row in rows]
    return [datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC) for text in texts]


@systemd
def test_due_times_are_those_of_systemd():
    draw, after = random.Random(7), datetime(2026, 4, 3, 11, 7, tzinfo=UTC) # far from any change of clocks
    fields = (["*", "*/15", "7", "0,30", "10-20/5"], ["*", "2", "*/6", "9-17", "0,23"], ["*", "1", "1-7", "31", "*/10"],
              ["*", "4-9", "jun", "*/3"], ["*", "mon", "1-5", "sun", "6,7"])
    for _ in range(40):
        text = " ".join(draw.choice(field) for field in fields)
        try: cron = parse_cron(text)
        except ParameterError: continue
        zone = draw.choice(["UTC", "Asia/Kathmandu", "America/New_York"])
        due = times(cron, after, ZoneInfo(zone))
        ours = [next(due) for _ in range(3)]
        if ours[-1] > datetime(2026, 10, 1, tzinfo=UTC): continue # clocks change before that
        theirs = sorted({moment for line in calendar(cron, zone) for moment in by_systemd(line, after, 4)})[:3]
        assert ours == theirs, (text, zone)


@pytest.mark.parametrize(("text", "zone", "after", "due"), [
    # New York 2026: 8 March 02:00 -05 -> 03:00 -04; 1 November 02:00 -04 -> 01:00 -05
    ("30 2 * * *", "America/New_York", "2026-03-07T12:00-05:00", ["2026-03-08T03:30-04:00", "2026-03-09T02:30-04:00"]),
    ("30 1 * * *", "America/New_York", "2026-10-31T12:00-04:00", ["2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"]),
    ("30 * * * *", "America/New_York", "2026-11-01T00:45-04:00",
     ["2026-11-01T01:30-04:00", "2026-11-01T01:30-05:00", "2026-11-01T02:30-05:00"]),
    ("*/30 * * * *", "America/New_York", "2026-03-08T01:15-05:00", ["2026-03-08T01:30-05:00", "2026-03-08T03:00-04:00"]),
    # Lord Howe puts its clock forward by half an hour: 4 October 2026 02:00 +10:30 -> 02:30 +11
    ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00+10:30", ["2026-10-04T02:45+11:00", "2026-10-05T02:15+11:00"]),
    # Cairo 2026: 24 April, midnight is left out: 00:00 +02 -> 01:00 +03
    ("0 0 * * *", "Africa/Cairo", "2026-04-23T12:00+02:00", ["2026-04-24T01:00+03:00", "2026-04-25T00:00+03:00"]),
    ("0 12 29 2 *", "UTC", "2026-01-01T00:00+00:00", ["2028-02-29T12:00+00:00", "2032-02-29T12:00+00:00"]),
    ("59 23 31 12 *", "UTC", "2026-12-31T23:59+00:00", ["2027-12-31T23:59+00:00"]),
])
def test_due_times_worked_by_hand(text, zone, after, due):
    found = times(parse_cron(text), datetime.fromisoformat(after), ZoneInfo(zone))
    assert [next(found) for _ in due] == [datetime.fromisoformat(d) for d in due]


def test_times_go_forward_through_every_change_of_clocks():
    for zone in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo", "Pacific/Apia", "Africa/Casablanca"):
        found, last = times(parse_cron("*/30 * * * *"), datetime(2026, 1, 1, tzinfo=UTC), ZoneInfo(zone)), None
        for _ in range(17_520): # a year, without a half hour left out or twice
            moment = next(found)
            assert last is None or moment - last == timedelta(minutes=30), (zone, moment)
            last = moment


@pytest.mark.parametrize("text", [
    "", "*", "* * * * * *", "a * * * *", "1.5 * * * *", "*/ * * * *", "1-2-3 * * * *", "24 24 * * *", "* * * 13 *", "* * * * 8",
    "* * 30 2 *", "@yearly", "²  * * * *", "0 0 L * *", "0 0 * * mon#2", "mon * * * *"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ParameterError): parse_cron(text)


@pytest.mark.parametrize("name", ["Europe/Berln", "CETT", "", "../etc/passwd", "/etc/localtime"])
def test_what_is_no_zone_is_refused(name):
    with pytest.raises(ParameterError): time_zone(name)


# What is written


def words_of(command: str, folder: Path) -> list[str]:
    "The words that a shell gives to the program named in a command."
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, cwd=folder).stdout.split("\n")[:-1]


def test_every_form_runs_the_same_words(odd, tmp_path):
    echo = tmp_path / "echo 5%"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    want = run_command(odd)[1:]
    assert want == ["report", "run", "image_training", "--runs", f"{odd.folder}/out runs", "--name", "photos",
                    "-f", f"{odd.folder}/photos 1.yaml", "--timeout", "7200"]
    _, nightly, late = crontab(odd, str(echo), "UTC").splitlines()
    assert words_of(nightly.split(maxsplit=5)[5].replace("\\%", "%"), tmp_path) == want
    caught = words_of(late.split(maxsplit=1)[1].replace("\\%", "%"), tmp_path)
    assert caught[:3] == ["report", "schedule", "missed"] and caught[-3:] == ["--", "--timeout", "7200"]
    step = yaml.safe_load(github_workflow(odd))["jobs"]["report"]["steps"][3]["run"]
    assert words_of(step.replace("visrec", shlex.quote(str(echo)), 1), tmp_path) == [w.removeprefix(f"{odd.folder}/") for w in want]
    path, = write_schedule(odd, "airflow", tmp_path, str(echo))
    call = next(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and ast.unparse(n.func) == "BashOperator")
    bash = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "bash_command")
    assert words_of(bash.replace("{% raw %}", "").replace("{% endraw %}", ""), tmp_path) == want


def test_a_unit_holds_the_same_words(odd, tmp_path):
    unit = systemd_units(odd, str(tmp_path / "visrec"))["visrec-photos.service"]
    start = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).removeprefix("ExecStart=")
    # systemd's quoting is that of a POSIX shell here, but for $$ and %%
    assert shlex.split(start.replace("%%", "%").replace("$$", "$"))[1:] == run_command(odd)[1:]
    assert "Persistent=true" in systemd_units(odd)["visrec-photos.timer"] and f"WorkingDirectory={odd.folder}".replace("%", "%%") in unit


@systemd
def test_systemd_takes_the_units_and_a_fault_in_them_is_found(odd, tmp_path):
    service, timer = write_schedule(odd, "systemd", tmp_path / "units", shutil.which("true"))
    assert check_schedule(service) == check_schedule(timer) == "systemd unit"
    timer.write_text(timer.read_text().replace("02:30", "02:99"))
    with pytest.raises(InputError, match="systemd says"): check_schedule(timer)
    service.write_text(service.read_text().replace("ExecStart=", "ExecStart=/no/such/"))
    with pytest.raises(InputError, match="systemd says"): check_schedule(service)


@pytest.mark.parametrize(("kind", "good", "bad"), [
    ("cron", "30 2 * * mon-fri", "30 26 * * mon-fri"), ("cron", "\\%", "%"), ("cron", "--name photos", "--name 'photos"),
    ("github", "cancel-in-progress: false", "cancel-in-progress: true"), ("github", 'cron: "30', 'cron: "3O'), ("github", "on:", "on"),
    ("github", "runs-on: ubuntu-latest", "on-run: x"), ("github", "schedule:", "scheduled:"),
    ("airflow", "max_active_runs=1, ", ""), ("airflow", "catchup=False", "catchup=True"), ("airflow", "with DAG(", "with DAG"),
    ("airflow", "30 2 *", "30 2"),
])
def test_a_fault_in_a_written_schedule_is_found(odd, tmp_path, monkeypatch, kind, good, bad):
    monkeypatch.setattr("visrec_nb.reports.schedule._machine_zone", lambda: "Etc/UTC")
    path, = write_schedule(odd, kind, tmp_path / "out")
    assert good in path.read_text()
    path.write_text(path.read_text().replace(good, bad))
    with pytest.raises((InputError, ParameterError)): check_schedule(path)


def test_what_a_scheduler_cannot_do_is_refused(odd, tmp_path):
    berlin = job("image_training", tmp_path, "@daily", "Europe/Berlin")
    with pytest.raises(ParameterError, match="machine's time"): crontab(berlin, zone="UTC")
    with pytest.raises(ParameterError, match="only UTC"): github_workflow(berlin)
    with pytest.raises(ParameterError, match="not below"): github_workflow(job("image_training", "/elsewhere", "@daily", folder=tmp_path))
    with pytest.raises(ParameterError, match="filled in"): github_workflow(job("image_training", "${{ x }}", "@daily", folder=tmp_path))
    with pytest.raises(ParameterError, match="control characters"): job("image_training", "a\nb", "@daily", folder=tmp_path)
    with pytest.raises(ParameterError, match="--name"): job("image_training", "a", "@daily", name="../x")
    with pytest.raises(InputError, match="no such file"): job("image_training", "a", "@daily", parameters="no.yaml")


def test_the_commands(tmp_path):
    (tmp_path / "p.yaml").write_text("epochs: 3\n")
    more = ("image_training", "--runs", "runs", "--when", "30 2 * * *", "-f", "p.yaml", "--out", "made")
    done = visrec("report", "schedule", "write", "github", *more, "--", "--timeout", "60", cwd=tmp_path)
    written = tmp_path / "made" / "image_training.yml"
    assert done.returncode == 0 and done.stdout == "made/image_training.yml\n" and "--timeout 60" in written.read_text()
    assert visrec("report", "schedule", "check", written).stdout == f"{written}: a good GitHub Actions workflow\n"
    wrong = visrec("report", "schedule", "write", "github", *more, "--timezone", "Mars/Olympus", cwd=tmp_path)
    assert wrong.returncode == 2 and "no time zone" in wrong.stderr
    (tmp_path / "plan.yaml").write_text("runs: runs\ntimezone: UTC\nreports:\n  photos: {report: image_training, when: '@daily'}\n")
    listed = json.loads(visrec("report", "schedule", "list", "plan.yaml", "--json", cwd=tmp_path).stdout)
    assert listed["reports"][0]["when"] == "0 0 * * *" and listed["reports"][0]["last"] is None


# The scheduler


def plan(tmp_path, text="  photos: {report: image_training, when: 30 2 * * *}\n", more=""):
    (tmp_path / "plan.yaml").write_text(f"runs: runs\ntimezone: Europe/Berlin\n{more}reports:\n{text}")
    return read_schedule(tmp_path / "plan.yaml")


class Hands:
    "A scheduler on a clock turned by hand; a report ends when its pipe is written to."

    def __init__(self, tmp_path, schedule, now):
        self.now, self.said, self.tmp, self.begun = now, [], tmp_path, []
        self.scheduler = Scheduler(schedule, self.said.append, self.command, lambda: self.now)

    def command(self, job):
        self.begun.append((job.run, self.now))
        pipe = self.tmp / f"{job.run}{len(self.begun)}"
        os.mkfifo(pipe)
        return [sys.executable, "-S", "-c", "import sys; sys.exit(int(open(sys.argv[1]).read()))", str(pipe)]

    def end(self, run, status=0):
        process = self.scheduler.running[run]
        max(self.tmp.glob(f"{run}*"), key=lambda p: int(p.name.removeprefix(run))).write_text(str(status))
        process.wait(20)

    def at(self, moment):
        self.now = moment
        return self.scheduler.step()


NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def test_a_report_that_still_runs_is_not_begun_again_and_what_it_missed_is_one_run(tmp_path):
    hands = Hands(tmp_path, plan(tmp_path, "  quick: {report: image_training, when: '0 * * * *'}\n"), NOON)
    assert hands.at(NOON) == NOON + timedelta(hours=1) and hands.begun == []
    hands.at(NOON + timedelta(minutes=60))
    for minutes in (61, 120, 121, 180, 199): hands.at(NOON + timedelta(minutes=minutes))
    assert len(hands.begun) == 1
    hands.end("quick", 3)
    hands.at(NOON + timedelta(minutes=200))
    assert len(hands.begun) == 2 and hands.scheduler.books["quick"]["due"] == "2026-11-20T15:00:00Z" # of the two missed, the last
    hands.end("quick")
    assert hands.at(NOON + timedelta(minutes=201)) == NOON + timedelta(hours=4) and len(hands.begun) == 2
    assert "ended with exit status 3" in str(hands.said)


def test_so_many_at_once(tmp_path):
    jobs = "".join(f"  {name}: {{report: image_training, when: '0 13 * * *', timezone: UTC}}\n" for name in "abc")
    hands = Hands(tmp_path, plan(tmp_path, jobs, "at_once: 2\n"), NOON)
    hands.at(NOON + timedelta(hours=1))
    assert [run for run, _ in hands.begun] == ["a", "b"]
    hands.end("b")
    hands.at(NOON + timedelta(hours=2))
    assert [run for run, _ in hands.begun] == ["a", "b", "c"]
    for run in "ac": hands.end(run)
    hands.at(NOON + timedelta(hours=3))
    assert not hands.scheduler.running and len(hands.begun) == 3


def test_what_was_missed_too_long_ago_is_let_go(tmp_path):
    schedule = plan(tmp_path, more="late: 6h\n")
    Hands(tmp_path, schedule, NOON)
    for hour, begins in ((8, 0), (7, 1)): # it was due at 01:30 UTC
        now = datetime(2026, 11, 23, hour, tzinfo=UTC)
        hands = Hands(tmp_path, schedule, now)
        hands.at(now)
        assert len(hands.begun) == begins
    hands.end("photos")


def test_a_machine_that_dies_in_a_report_tries_it_once_more_and_not_for_ever(tmp_path):
    schedule, morning = plan(tmp_path), NOON + timedelta(days=1)
    Hands(tmp_path, schedule, NOON)
    for begun in (1, 1, 0):
        hands = Hands(tmp_path, schedule, morning)
        hands.at(morning)
        assert len(hands.begun) == begun
        for process in hands.scheduler.running.values(): # the scheduler is gone before the report
            process.kill()
            process.wait()
        for pipe in tmp_path.glob("photos*"): pipe.unlink()
    hands.at(morning + timedelta(days=1))
    assert len(hands.begun) == 1 # the next night is another matter
    hands.end("photos")


SERVE = """
import sys
from visrec_nb.reports import schedule
class Standin(schedule.Scheduler):
    def __init__(self, plan, tell):
        super().__init__(plan, tell, lambda job: [sys.executable, "-S", "-c", sys.argv[2]])
schedule.Scheduler = Standin
print("status", schedule.run_schedule(sys.argv[1], tell=lambda text: print(text, flush=True), grace=float(sys.argv[3])), flush=True)
"""
GENTLE = ("import signal, sys; signal.signal(15, lambda *_: (print('tidied', flush=True), sys.exit(143))); print('works', flush=True); "
          "signal.pause()")
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); print('works', flush=True); signal.pause()"


def until(process, text) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if text in line: return lines
    raise AssertionError(lines)


@pytest.mark.parametrize(("child", "grace", "say"), [(GENTLE, 20, "tidied"), (DEAF, 0.2, "was killed")])
def test_told_to_stop_it_ends_its_reports_and_takes_them_up_again(tmp_path, child, grace, say):
    schedule = plan(tmp_path, "  quick: {report: image_training, when: '* * * * *'}\n")
    an_hour_ago = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    write_json(schedule.state, {"quick": {"due": an_hour_ago, "ended": an_hour_ago, "exit": 0, "tries": 1}})
    command = [sys.executable, "-c", SERVE, tmp_path / "plan.yaml", child, str(grace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        until(serving, "works")
        second = visrec("report", "schedule", "run", tmp_path / "plan.yaml", "--once")
        assert second.returncode == 2 and "another scheduler is at work" in second.stderr
        serving.send_signal(signal.SIGTERM)
        rest = "".join(serving.stdout)
        assert serving.wait(20) == 0 and say in rest and "ended with exit status" in rest
    book = read_json(schedule.state)["quick"]
    assert book["ended"] is None and book["tries"] == 1 # it is due again at the next start
    hands = Hands(tmp_path, schedule, datetime.fromisoformat(book["due"].replace("Z", "+00:00")) + timedelta(seconds=5))
    hands.at(hands.now)
    assert len(hands.begun) == 1 and "again" in hands.said[-1]
    hands.end("quick")


def test_killed_it_starts_again_without_repair(tmp_path):
    schedule = plan(tmp_path, "  quick: {report: image_training, when: '* * * * *'}\n")
    an_hour_ago = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    write_json(schedule.state, {"quick": {"due": an_hour_ago, "ended": an_hour_ago, "exit": 0, "tries": 1}})
    command = [sys.executable, "-c", SERVE, tmp_path / "plan.yaml", "print('works', flush=True)", "5"]
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
            until(serving, "quick")
            serving.kill()
        assert set(read_json(schedule.state)["quick"]) == {"due", "ended", "exit", "tries"}


GOOD = "runs: a\ntimezone: UTC\nreports: {a: {report: x, when: '@daily'}}\n"


@pytest.mark.parametrize("text", [
    "[1]", "runs: [", GOOD.replace("timezone: UTC\n", ""), GOOD.replace("{a: {report: x, when: '@daily'}}", "[a]"),
    GOOD.replace(", when: '@daily'", ""), GOOD.replace("report: x", "report: x, parameters: no.yaml"),
    GOOD.replace("@daily", "61 * * * *"), GOOD.replace("report: x", "report: x, every: 1"),
    GOOD + "at_once: 0\n", GOOD + "late: soon\n", GOOD.replace("UTC", "Mars/Olympus")])
def test_a_wrong_plan_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises((InputError, ParameterError), match=r"plan\.yaml"): read_schedule(tmp_path / "plan.yaml")


def test_a_missed_run_at_the_start_of_the_machine(tmp_path):
    nightly = job("image_training", tmp_path / "runs", "30 2 * * *", "Europe/Berlin", name="photos")
    assert missed_time(nightly, NOON) == datetime(2026, 11, 20, 1, 30, tzinfo=UTC)
    for started, missed in (("2026-11-19T01:30:05Z", True), ("2026-11-20T01:30:00Z", False), ("2026-11-20T09:00:00Z", False)):
        write_json(tmp_path / "runs" / "photos" / "run" / "manifest.json",
                   {"report": "image_training", "status": "failed", "started": started, "seconds": 1})
        assert (missed_time(nightly, NOON) is not None) == missed
    assert next_time(parse_cron(nightly.when), NOON, ZoneInfo("Europe/Berlin")) == datetime(2026, 11, 21, 1, 30, tzinfo=UTC)


@pytest.mark.slow
def test_a_real_report_by_the_clock(tmp_path):
    parameters = nbformat.v4.new_code_cell('out: str = "."\nn: int = 3 # how many', metadata={"tags": ["parameters"]})
    code = ("from visrec_nb.core.files import write_json\nassert n < 10, 'too many'\n"
            "write_json(f'{out}/metrics.json', {'sum': sum(range(n))})\nprint(f'The sum is {sum(range(n))}.')")
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [nbformat.v4.new_markdown_cell("# A sum"), parameters, nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "sum.ipynb")
    (tmp_path / "p.yaml").write_text("n: 5\n")
    schedule = plan(tmp_path, "  good: {report: sum.ipynb, when: '*/5 * * * *', parameters: p.yaml}\n"
                              "  bad: {report: sum.ipynb, when: '*/5 * * * *', options: [-p, n=12]}\n", "at_once: 2\n")
    hour = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    write_json(schedule.state, {name: {"due": hour, "ended": hour, "exit": 0, "tries": 1} for name in schedule.jobs})
    done = visrec("report", "schedule", "run", tmp_path / "plan.yaml", "--once")
    assert done.returncode == 1 and "good: ended with exit status 0" in done.stderr and "bad: ended with exit status 1" in done.stderr
    history = write_history(tmp_path / "runs", [])
    assert {r.run: r.status for r in history.runs} == {"good": "ok", "bad": "failed"} and history.skipped == []
    assert next(r for r in history.runs if r.run == "good").metrics["sum"].value == 10
    assert "too many" in next(r for r in history.runs if r.run == "bad").error
    for name, nightly in schedule.jobs.items():
        assert missed_time(nightly, datetime.fromisoformat(read_json(schedule.state)[name]["due"].replace("Z", "+00:00"))) is None
