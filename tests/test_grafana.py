"""Dashboards in a Grafana: a stub of its HTTP API, or the real one that GRADIOMETER_TEST_GRAFANA names."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from gradiometer.cli import app
from gradiometer_dashboards import names
from gradiometer_monitor.config.settings import SettingsError, resolve
from gradiometer_monitor.grafana.client import Grafana, GrafanaError
from gradiometer_monitor.grafana.provision import Change, apply
from gradiometer_monitor.grafana.settings import GrafanaSettings
from tests._grafana import PASSWORD, USER, ServedGrafana, Stub, serve_grafana, token_of

if TYPE_CHECKING:
    from tests.conftest import Spawn, WaitUntil

PROMETHEUS = "http://prometheus.example:9090"
Applied = Callable[..., list[Change]]
Command = Callable[..., Result]


@pytest.fixture
def grafana(tmp_path: Path) -> Iterator[ServedGrafana]:
    """Give the Grafana to test against."""
    with serve_grafana(tmp_path) as tested:
        yield tested


@pytest.fixture
def stub(grafana: ServedGrafana) -> Stub:
    """Give the stub's inside; tests that need it are skipped against a real Grafana."""
    return grafana.server.stub if grafana.server else pytest.skip("a real Grafana cannot be made to fail")


@pytest.fixture
def applied(grafana: ServedGrafana) -> Applied:
    """Give a function that applies with some settings, and returns the changes."""

    def run(dry_run: bool = False, **settings: Any) -> list[Change]:
        session = Grafana(GrafanaSettings.model_validate(grafana.settings | settings))
        try:
            return apply(session, dry_run=dry_run)[1]
        finally:
            session.close()

    return run


@pytest.fixture
def command() -> Command:
    """Give a function that runs the command."""
    return lambda *arguments: CliRunner().invoke(app, ["grafana", "apply", *arguments])


def states(changes: list[Change]) -> list[tuple[str, str]]:
    return [(change.what, change.state) for change in changes]


def all_are(state: str, *, source: bool = False) -> list[tuple[str, str]]:
    whats = ["folder", *(["datasource"] if source else []), *("dashboard" for _ in names())]
    return [(what, state) for what in whats]


def test_a_second_apply_changes_nothing(grafana: ServedGrafana, applied: Applied) -> None:
    """Everything is made once; a second time all of it is as it should be, and no version moves."""
    assert states(applied(prometheus_url=PROMETHEUS)) == all_are("created", source=True)
    before = grafana.ask("GET", f"/dashboards/uid/{grafana.board}")
    assert states(applied(prometheus_url=PROMETHEUS)) == all_are("unchanged", source=True)
    after = grafana.ask("GET", f"/dashboards/uid/{grafana.board}")
    assert after["dashboard"]["version"] == before["dashboard"]["version"]
    assert after["meta"]["folderUid"] == grafana.prefix
    assert after["dashboard"]["panels"]
    source = grafana.ask("GET", f"/datasources/uid/{grafana.prefix}-prometheus")
    assert (source["type"], source["url"], source["access"]) == ("prometheus", PROMETHEUS, "proxy")
    variables = {variable["name"]: variable for variable in after["dashboard"]["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == f"{grafana.prefix}-prometheus"


def test_a_dry_run_writes_nothing(grafana: ServedGrafana, applied: Applied) -> None:
    """What would be made is told, and is not there afterwards."""
    assert states(applied(dry_run=True, prometheus_url=PROMETHEUS)) == all_are("created", source=True)
    assert grafana.ask("GET", f"/folders/{grafana.prefix}") is None
    assert grafana.ask("GET", f"/dashboards/uid/{grafana.board}") is None


def test_a_dashboard_that_somebody_changed_is_kept(grafana: ServedGrafana, applied: Applied) -> None:
    """A change made in Grafana is told of and kept, unless it is to be overwritten, and stays in the history then."""
    applied()
    grafana.edit(title="Mine")
    run = next(change for change in applied() if change.uid == grafana.board)
    assert run.state == "kept"
    assert "changed in Grafana" in run.detail
    assert grafana.ask("GET", f"/dashboards/uid/{grafana.board}")["dashboard"]["title"] == "Mine"
    again = applied(overwrite=True)
    assert [change.state for change in again if change.uid == grafana.board] == ["updated"]
    assert grafana.ask("GET", f"/dashboards/uid/{grafana.board}")["dashboard"]["title"] != "Mine"
    assert states(applied()) == all_are("unchanged")


def test_an_older_dashboard_of_ours_is_updated(grafana: ServedGrafana, applied: Applied) -> None:
    """What an earlier apply left is brought up to date without being asked to overwrite."""
    applied()
    assert states(applied(datasource_uid="other")[-len(names()) :]) == [("dashboard", "updated")] * len(names())


def test_a_dashboard_shown_in_another_schema_is_unchanged(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """A Grafana that migrates what it stores does not make every apply a change."""
    applied()
    stub.boards[grafana.board]["dashboard"]["schemaVersion"] = 99
    stub.boards[grafana.board]["dashboard"]["panels"][1]["pluginVersion"] = "12.3.1"
    assert states(applied()) == all_are("unchanged")


def test_a_dashboard_that_was_moved_stays_where_it_is(grafana: ServedGrafana, applied: Applied) -> None:
    """The folder that somebody chose is kept, and the dashboard is still kept up to date there."""
    applied()
    there = grafana.ask("GET", f"/dashboards/uid/{grafana.board}")
    message = grafana.ask("GET", f"/dashboards/uid/{grafana.board}/versions?limit=1")["versions"][0]["message"]
    body = {"dashboard": there["dashboard"], "folderUid": "", "message": message}
    grafana.ask("POST", "/dashboards/db", body)
    assert "moved" in next(change for change in applied() if change.uid == grafana.board).detail
    applied(datasource_uid="other")
    assert not grafana.ask("GET", f"/dashboards/uid/{grafana.board}")["meta"]["folderUid"]


def test_a_save_in_between_is_not_overwritten(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """When somebody saves between our look and our save, theirs stays."""
    applied()

    def save() -> None:
        board = stub.boards[grafana.board]
        board["dashboard"]["version"] += 1
        board["history"].append({"version": board["dashboard"]["version"], "message": "mine"})

    stub.fault("POST", "/dashboards/db", times=1, before=save)
    changes = applied(datasource_uid="other")
    assert [change.state for change in changes if change.uid == grafana.board] == ["kept"]


def test_a_dashboard_of_a_file_is_left_to_it(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """What Grafana reads from a provisioning file is not sent; the file is named if it differs."""
    applied()
    board = stub.boards[grafana.board]
    board["meta"] |= {"provisioned": True, "provisionedExternalId": "run.json"}
    assert states(applied(overwrite=True)) == all_are("unchanged")
    board["dashboard"]["title"] = "of the file"
    sent = len(stub.writes())
    run = next(change for change in applied(overwrite=True) if change.uid == grafana.board)
    assert run.state == "kept"
    assert "run.json" in run.detail
    assert len(stub.writes()) == sent


def test_of_a_datasource_only_ours_is_changed(grafana: ServedGrafana, applied: Applied) -> None:
    """Another URL is set; the name, other options and how it logs in stay as they were made in Grafana."""
    applied(prometheus_url=PROMETHEUS)
    path = f"/datasources/uid/{grafana.prefix}-prometheus"
    there = grafana.ask("GET", path)
    mine = {"basicAuth": True, "basicAuthUser": "reader", "jsonData": there["jsonData"] | {"manageAlerts": False}}
    grafana.ask("PUT", path, there | mine)
    changes = applied(prometheus_url="http://other.example:9090", scrape_interval_seconds=5)
    source = next(change for change in changes if change.what == "datasource")
    assert source.state == "updated"
    assert f"{PROMETHEUS} → http://other.example:9090" in source.detail
    now = grafana.ask("GET", path)
    assert now["url"] == "http://other.example:9090"
    assert (now["basicAuth"], now["basicAuthUser"]) == (True, "reader")
    assert now["jsonData"] == {"httpMethod": "POST", "timeInterval": "5s", "manageAlerts": False}


def test_a_datasource_that_cannot_be_ours(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """Another kind under our uid is refused with a remedy, one of a file is kept, a missing one asks for its URL."""
    asked = {"datasource_uid": "metrics"}
    missing = next(change for change in applied(**asked) if change.what == "datasource")
    assert missing.state == "failed"
    assert "prometheus_url" in missing.detail
    stub.sources["metrics"] = {
        "uid": "metrics",
        "name": "m",
        "type": "loki",
        "url": "",
        "readOnly": False,
        "version": 1,
    }
    other = next(change for change in applied(**asked) if change.what == "datasource")
    assert (other.state, "--datasource-uid" in other.detail) == ("failed", True)
    stub.sources["metrics"] |= {"type": "prometheus", "readOnly": True}
    kept = next(change for change in applied(prometheus_url=PROMETHEUS, **asked) if change.what == "datasource")
    assert (kept.state, "provisioning file" in kept.detail) == ("kept", True)


def test_rights_that_lack_are_named(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """Each thing that a role may not do fails by itself, and names the permission."""
    assert grafana.token_file is not None
    grafana.token_file.write_text(token_of("Viewer"))
    changes = applied()
    assert "folders:create" in changes[0].detail
    assert "dashboards:write" in changes[1].detail
    grafana.token_file.write_text(token_of("Editor"))
    changes = applied(prometheus_url=PROMETHEUS)
    assert states(changes)[:2] == [("folder", "created"), ("datasource", "failed")]
    assert "datasources:read" in changes[1].detail
    assert {change.state for change in changes[2:]} == {"created"}


def test_who_is_not_let_in_is_told_why(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """A wrong token is one error that names the file, not one a dashboard."""
    assert grafana.token_file is not None
    grafana.token_file.write_text("glsa_wrong")
    with pytest.raises(GrafanaError, match=str(grafana.token_file)) as caught:
        applied()
    assert caught.value.status == 401
    assert "glsa_wrong" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "two tokens", "two\nlines", "x" * 70_000, "ключ"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, text: str) -> None:
    """What cannot be a token is not sent, nor quoted."""
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"expected one (token|line)"):
        Grafana(GrafanaSettings.model_validate({"url": "http://127.0.0.1:1", "token_file": file}))


def test_basic_authentication_and_sub_path(tmp_path: Path) -> None:
    """User and password of the URL, with escapes, open a Grafana below a sub path; without the path it says so."""
    with serve_grafana(tmp_path, prefix="/tools/grafana") as tested:
        if tested.server is None:
            pytest.skip("a real Grafana has one path")
        login = f"{USER}:{urllib.parse.quote(PASSWORD)}"
        address = tested.url.replace("http://", f"http://{login}@")
        for url in (f"{address}/", address):
            session = Grafana(GrafanaSettings.model_validate({"url": url, "uid_prefix": tested.prefix}))
            assert {change.state for change in apply(session)[1]} <= {"created", "unchanged"}
            session.close()
        session = Grafana(GrafanaSettings.model_validate({"url": address.removesuffix("/tools/grafana")}))
        with pytest.raises(GrafanaError, match="sub path") as caught:
            apply(session)
        session.close()
        assert PASSWORD not in str(caught.value)


def test_a_password_is_read_from_its_file_each_time(tmp_path: Path) -> None:
    """A user's password stands in a file of its own, and can be changed there without a restart."""
    (file := tmp_path / "password").write_text("one\n")
    given = {"url": "http://127.0.0.1:1", "username": "me", "password_file": file}
    settings = GrafanaSettings.model_validate(given)
    assert settings.read_credentials() == ("me", "one")
    file.write_text("two")
    assert settings.read_credentials() == ("me", "two")
    assert "two" not in f"{settings!r} {settings.model_dump_json()}"


def test_failures_on_the_way(stub: Stub, grafana: ServedGrafana, applied: Applied, wait_until: WaitUntil) -> None:
    """Silence, no connection, an error of the server and a redirect each say what to do."""
    answer = threading.Event()
    silent = stub.fault("GET", "/api/health", times=1, before=lambda: answer.wait(60), status=500)
    with pytest.raises(GrafanaError, match="timeout_seconds"):
        applied(timeout_seconds=0.3)
    wait_until(lambda: silent.times == 0)  # or the next request would be the one that is not answered
    answer.set()
    stub.fault("GET", "/api/health", times=1, status=503)
    with pytest.raises(GrafanaError, match="503") as caught:
        applied()
    assert caught.value.passing
    stub.fault("GET", "/api/health", times=1, status=301, headers={"Location": "https://elsewhere.example/"})
    with pytest.raises(GrafanaError, match="redirects to"):
        applied()
    stub.fault("GET", "/api/health", times=1, status=429, headers={"Retry-After": "7"})
    with pytest.raises(GrafanaError) as caught:
        applied()
    assert caught.value.wait_seconds == 7
    assert grafana.server is not None
    grafana.server.down()
    with pytest.raises(GrafanaError, match="Connection refused"):
        applied()


def test_a_page_is_no_answer(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """A proxy that answers everything with its login page is not taken for Grafana."""
    stub.page = "<html>please log in</html>"
    with pytest.raises(GrafanaError, match="not as Grafana does"):
        applied()


def test_a_post_is_never_sent_on_as_a_get(stub: Stub, applied: Applied) -> None:
    """A redirect of a write is a failure, though what it leads to would answer."""
    stub.fault("POST", "/api/folders", times=1, status=302, headers={"Location": "/api/health"})
    assert "redirects to" in applied()[0].detail


def test_passing_failures_are_tried_again(stub: Stub, grafana: ServedGrafana) -> None:
    """A step is taken again after a pause, three times at most, and an answer that was lost makes nothing twice."""
    stub.fault("POST", "/dashboards/db", times=1, drop=True)
    stub.fault("POST", "/folders", times=2, status=502)
    pauses: list[float] = []
    session = Grafana(GrafanaSettings.model_validate(grafana.settings))
    assert apply(session, wait=pauses.append)[1][0].state == "created"
    session.close()
    assert pauses == [1, 2, 1]
    assert stub.boards[grafana.board]["dashboard"]["version"] == 1


def test_tls_is_checked(tmp_path: Path) -> None:
    """A certificate of an own authority is refused until that is given as ca_file."""
    with serve_grafana(tmp_path) as tested:
        if tested.server is None:
            pytest.skip("the certificate of a real Grafana is not ours")
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        tested.server.down()
        tested.server.port = 0
        tested.server.up(context)
        url = f"https://127.0.0.1:{tested.server.port}"
        given = tested.settings | {"url": url, "timeout_seconds": 30}
        session = Grafana(GrafanaSettings.model_validate(given))
        with pytest.raises(GrafanaError, match="ca_file"):
            session.health()
        session.close()
        session = Grafana(GrafanaSettings.model_validate(given | {"ca_file": tmp_path / "ca.pem"}))
        assert session.health()
        session.close()


def test_the_command(grafana: ServedGrafana, command: Command) -> None:
    """The exit status says what became of it: to be done, done, nothing to do, something kept."""
    dry = command(*grafana.options, "--dry-run", "--json")
    assert dry.exit_code == 4, dry.stderr
    assert {change["state"] for change in json.loads(dry.stdout)["changes"]} == {"created"}
    done = command(*grafana.options, "--prometheus-url", PROMETHEUS)
    assert done.exit_code == 0, done.stderr
    assert grafana.board in done.stdout
    assert "created" in done.stdout
    grafana.edit(title="Mine")
    kept = command(*grafana.options, "--prometheus-url", PROMETHEUS, "--json")
    assert kept.exit_code == 3
    said = json.loads(kept.stdout)
    assert sorted({change["state"] for change in said["changes"]}) == (
        ["kept", "unchanged"] if len(said["changes"]) > 1 else ["kept"]
    )
    assert command(*grafana.options, "--prometheus-url", PROMETHEUS, "--overwrite").exit_code == 0


def test_the_command_reads_the_environment(
    grafana: ServedGrafana, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """URL and token file may come from the environment of the process."""
    monkeypatch.setenv("GRADIOMETER_GRAFANA_URL", grafana.url)
    if grafana.token_file:
        monkeypatch.setenv("GRADIOMETER_GRAFANA_TOKEN_FILE", str(grafana.token_file))
    line = (sys.executable, "-m", "gradiometer.cli", "grafana", "apply", "--uid-prefix", grafana.prefix, "--dry-run")
    process = spawn(*line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert grafana.board in out


def test_the_command_tells_no_password(tmp_path: Path, command: Command) -> None:
    """Neither a usage error nor one of the network quotes what stands before the host."""
    for url, status in (("http://me:hunter22@127.0.0.1:1", 1), ("http://me:hunter22@[", 2), ("me:hunter22@x", 2)):
        done = command("--url", url)
        assert done.exit_code == status
        assert done.stderr.startswith("gradiometer: ")
        assert "hunter22" not in done.stdout + done.stderr
    both = command("--url", "http://me:hunter22@127.0.0.1:1", "--token-file", str(tmp_path / "token"))
    assert both.exit_code == 2
    assert "--token-file: expected a token_file, or user:password@" in both.stderr
    for file, why in ((tmp_path / "token", "No such file or directory"), (tmp_path, "Is a directory")):
        done = command("--url", "http://127.0.0.1:1", "--token-file", str(file))
        assert (done.exit_code, f"--token-file: {file} cannot be read ({why}): give" in done.stderr) == (2, True)


def test_without_the_extra_the_command_names_it(spawn: Spawn) -> None:
    """Where the monitor's packages are missing, the command says what to install."""
    code = (
        "import sys; sys.modules['grafana_client'] = sys.modules['uvicorn'] = None;"
        "from gradiometer.cli import main; sys.argv = ['gradiometer', 'grafana', 'apply', '--url', 'http://x']; main()"
    )
    process = spawn(sys.executable, "-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert "pip install 'gradiometer[monitor]'" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"url": "http://me:hunter22@x?verify=false"}, "grafana.url"),
        ({"url": "http://me@x", "note": "hunter22"}, "grafana.url"),
        ({"ur1": "http://me:hunter22@x"}, "grafana.ur1"),
        ("http://me:hunter22@x", "grafana"),
        ({"url": "http://me:hunter22@x", "uid_prefix": "a/b"}, "grafana.uid_prefix"),
        ({"url": "http://me:hunter22@x", "prometheus_url": "prometheus:9090"}, "grafana.prometheus_url"),
        ({"url": "http://me:hunter22@x", "ca_file": "/nowhere"}, "grafana.ca_file"),
        ({"url": "http://x", "username": "me"}, "grafana.token_file"),
        ({"url": "http://me:hunter22@x", "username": "me", "password_file": "/p"}, "grafana.token_file"),
        ({"url": "http://me:hunter22@x", "annotations": {"kinds": []}}, "grafana.annotations.kinds"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, section: Any, named: str) -> None:
    """Each names the setting; no password is quoted, wherever it was written."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"grafana": section}))
    with pytest.raises(SettingsError, match=rf"(?m)(^|: ){named}\b") as caught:
        resolve(tmp_path, config)
    assert ":hunter22" not in str(caught.value)


def test_settings_show_no_secret() -> None:
    """The password is not in what a section is printed as, and not in what is logged of its address."""
    settings = GrafanaSettings.model_validate({"url": "https://me:hunter22@grafana.example:3000/sub/"})
    assert "hunter22" not in f"{settings!r} {settings} {settings.model_dump_json()} {settings.address}"
    assert settings.address == "https://grafana.example:3000/sub"
    assert settings.read_credentials() == ("me", "hunter22")
    with pytest.raises(ValidationError):
        GrafanaSettings.model_validate({"url": "https://grafana.example"})
