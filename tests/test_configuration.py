"""The monitor's settings: where they come from, what is said of wrong ones, and that every one is documented."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jsonschema
import pytest
import yaml
from pydantic import SecretStr, ValidationError

from gradiometer_monitor.config import check
from gradiometer_monitor.config.fields import ANY, Field, redact, walk
from gradiometer_monitor.config.reloading import RESTART_OF_AUTH
from gradiometer_monitor.config.section import UNITS, Range, Section, between
from gradiometer_monitor.config.settings import RESTART, Settings, SettingsError, resolve, resolve_all

if TYPE_CHECKING:
    from tests.conftest import Spawn

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
FIELDS = list(walk(Settings))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no variable of whoever runs the tests give a setting."""
    for name in os.environ:
        if name.startswith("GRADIOMETER_"):
            monkeypatch.delenv(name)


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "monitor.yaml"
    path.write_text(text)
    return path


def test_everything_wrong_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    """Each thing that is wrong has its line and column, its value, what was expected, and a guess at misspelt names."""
    log, receiver = "log:\n  level: warn\n", "remote_write:\n  - name: a\n    urll: http://x\n"
    path = _write(tmp_path, f"prot: 99\nseries_budget: 5\n{log}{receiver}grafana: 3\nport: 1\nport: 2\n")
    with pytest.raises(SettingsError) as caught:
        resolve(config=path)
    told = str(caught.value).splitlines()
    assert [line.removeprefix(f"{path}:").split(": ")[0:2] for line in told] == [
        ["1:7", "prot"],
        ["2:16", "series_budget is 5"],
        ["4:10", "log.level is 'warn'"],
        ["6:5", "remote_write[0].url"],
        ["7:11", "remote_write[0].urll"],
        ["8:10", "grafana is 3"],
        ["10:1", "the config"],
    ]
    assert told[0].endswith("did you mean 'port'?")
    assert told[1].endswith("expected a number from 100 to 10000000")
    assert told[2].endswith("expected 'debug', 'info', 'warning' or 'error', did you mean 'warning'?")
    assert told[4].endswith("did you mean 'url'?")
    assert told[6].endswith("'port' is given twice, expected once")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n", "expected settings by name"),
        ("a: [1\n", r"monitor.yaml:2:1: the config is not YAML: "),
        ("log:\n\tlevel: info\n", r"monitor.yaml:2:1: .* not YAML: a line begins with a tab: indent with spaces"),
        ("remote_write:\n  name: a\n", r"monitor.yaml:1:1: remote_write: expected a list: '- ' before each entry"),
        ("dir: /etc/passwd\n", r"monitor.yaml:1:6: dir is '/etc/passwd': is not a directory"),
        ("root: /runs\n", r"monitor.yaml:1:7: root: no such setting, did you mean 'dir'\?"),
        ("poll_seconds: 3 parsecs\n", "poll_seconds is '3 parsecs': expected a number, or one with a unit of ms, s, m"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """What is not YAML, or not settings by name, is told as that."""
    with pytest.raises(SettingsError, match=said):
        resolve(config=_write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A config that is not there is an error, and not the defaults."""
    with pytest.raises(SettingsError, match=r"config file .*nowhere\.yaml does not exist"):
        resolve(config=tmp_path / "nowhere.yaml")


def test_argument_before_environment_before_file_before_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that gives a setting wins, within sections too, and is told as its origin."""
    path = _write(tmp_path, "dir: runs\nport: 1\npoll_seconds: 3\nretention:\n  max_bytes: 10\nseries_budget: 200\n")
    monkeypatch.setenv("GRADIOMETER_MONITOR_CONFIG", str(path))
    monkeypatch.setenv("GRADIOMETER_MONITOR_PORT", "2")
    monkeypatch.setenv("GRADIOMETER_MONITOR_POLL_SECONDS", "2")
    monkeypatch.setenv("GRADIOMETER_MONITOR_RETENTION__MAX_AGE_DAYS", "7")
    resolved = resolve_all(port=3)
    settings = resolved.settings
    assert (settings.port, settings.poll_seconds, settings.series_budget) == (3, 2.0, 200)
    assert (settings.retention.max_bytes, settings.retention.max_age_days) == (10, 7.0)
    origins = {name: origin for name, _, origin in resolved.lines()}
    assert origins["port"] == "--port"
    assert origins["poll_seconds"] == "GRADIOMETER_MONITOR_POLL_SECONDS"
    assert origins["series_budget"] == f"{path}:6"
    assert origins["retention.max_bytes"] == f"{path}:5"
    assert origins["retention.max_age_days"] == "GRADIOMETER_MONITOR_RETENTION__MAX_AGE_DAYS"
    assert origins["host"] == "default"


def test_paths_begin_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path in the file begins at the file, one in a variable or an argument where the monitor is started."""
    monkeypatch.setenv("GRADIOMETER_MONITOR_STATE_DIR", "state")
    (tmp_path / "tight.yaml").write_text("version: 1\npipeline: [{global_norm: {max_norm: 0.1}}]\n")
    rule = "{name: a, alertname: A, action: policy, policy: tight.yaml}"
    files = f"auth: {{tokens_file: ../tokens}}\nalerts: {{rules: [{rule}]}}\n"
    settings = resolve(config=_write(tmp_path, f"dir: runs\nport_file: port\n{files}"))
    assert settings.alerts is not None
    assert settings.alerts.rules[0].policy["pipeline"] == [{"global_norm": {"max_norm": 0.1}}]
    assert (settings.root, settings.port_file) == (tmp_path / "runs", tmp_path / "port")
    assert settings.auth.tokens_file == tmp_path / "../tokens"
    assert settings.state_dir == Path("state")


@pytest.mark.parametrize(
    ("given", "setting", "value"),
    [
        ("poll_seconds: 1500ms", "poll_seconds", 1.5),
        ("poll_seconds: 2 m", "poll_seconds", 120.0),
        ("retention_seconds: 1d", "retention_seconds", 86400.0),
        ("retention: {max_bytes: 1.5GiB}", "retention.max_bytes", 1610612736),
        ("retention: {max_bytes: 20 kB}", "retention.max_bytes", 20000),
        ("retention: {max_age_days: 2w}", "retention.max_age_days", 14.0),
    ],
)
def test_numbers_may_have_units(tmp_path: Path, given: str, setting: str, value: float) -> None:
    """Seconds, bytes and days may be given in the units that people write."""
    found: Any = resolve(config=_write(tmp_path, given))
    for part in setting.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_list_is_given_as_one_in_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list in a variable is YAML, and takes the place of the file's."""
    monkeypatch.setenv("GRADIOMETER_MONITOR_REMOTE_WRITE", "[{name: c, url: 'http://new'}]")
    path = _write(tmp_path, "remote_write: [{name: a, url: 'http://a'}, {name: b, url: 'http://b'}]\n")
    assert [each.url for each in resolve(tmp_path, path).remote_write] == ["http://new"]


def test_variables_that_give_nothing_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is told, with a guess; what Kubernetes sets for a service of our name is told as that."""
    monkeypatch.setenv("GRADIOMETER_MONITOR_PRT", "1")
    (warning,) = resolve_all(tmp_path).warnings
    assert warning.endswith("GRADIOMETER_MONITOR_PRT gives no setting, did you mean 'GRADIOMETER_MONITOR_PORT'?")
    monkeypatch.setenv("GRADIOMETER_MONITOR_PORT", "tcp://10.0.0.1:9477")
    with pytest.raises(SettingsError, match="enableServiceLinks: false"):
        resolve(tmp_path)


def test_secrets_are_not_shown() -> None:
    """What is secret, and a password in a URL, is hidden; where it was given, an error does not repeat it."""

    class Secret(Section):
        token: SecretStr
        """Secret."""

    assert redact(Secret(token=SecretStr("hunter2")).token) == "***"
    assert redact("https://me:hunter2@host/path") == "https://***@host/path"
    assert redact(["http://a@b", 3, None]) == ["http://***@b", 3, None]
    (found,) = walk(Secret)
    assert found.secret


def test_a_misspelt_secret_is_not_repeated(tmp_path: Path) -> None:
    """The value under a name that does not exist may be a secret under its right name."""
    with pytest.raises(SettingsError) as caught:
        resolve(
            config=_write(
                tmp_path, "grafana: {url: 'http://me:hunter2@x', pasword: hunter2}\nport: http://u:hunter2@x\n"
            )
        )
    assert "hunter2" not in str(caught.value)


def _check(spawn: Spawn, *options: str | Path) -> tuple[int, str, str]:
    command = (sys.executable, "-m", "gradiometer_monitor", *options)
    process = spawn(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_check_config_shows_what_is_in_force(spawn: Spawn, tmp_path: Path) -> None:
    """--check-config prints every setting with its origin and leaves with 0; wrong ones are told with 2."""
    path = _write(tmp_path, f"dir: {tmp_path}\nport: 1234\ngrafana: {{url: 'http://me:hunter2@push'}}\n")
    code, out, err = _check(spawn, "--config", path, "--check-config", "--poll-seconds", "2")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert (code, err) == (0, "")
    assert rows["port"] == ["1234", f"{path}:2"]
    assert rows["poll_seconds"] == ["2.0", "--poll-seconds"]
    assert rows["grafana.url"] == ["'***'", f"{path}:3"]
    assert "hunter2" not in out
    path.write_text("prt: 1\nauth: {tokens_file: 3}\n")
    code, out, err = _check(spawn, "--config", path, "--check-config")
    assert (code, out, len(err.splitlines())) == (2, "", 2)


def test_check_config_warns_of_a_state_that_cannot_be_kept(spawn: Spawn, tmp_path: Path) -> None:
    """A state_dir that cannot be made is told with its line, and is no error: the monitor would serve."""
    (tmp_path / "file").touch()
    path = _write(tmp_path, f"dir: {tmp_path}\nstate_dir: file/state\n")
    code, _, err = _check(spawn, "--config", path, "--check-config")
    said = f"warning: {path}:2: state_dir is '{tmp_path}/file/state': cannot be used ({tmp_path}/file is no directory)"
    assert (code, err.startswith(said), len(err.splitlines())) == (0, True, 1)
    path.write_text(f"dir: {tmp_path}\nstate_dir: later/state\n")
    assert _check(spawn, "--config", path, "--check-config")[::2] == (0, "")


def test_check_config_looks_for_the_files(spawn: Spawn, tmp_path: Path) -> None:
    """A file that the settings name and that cannot be read is told, with the line that names it."""
    path = _write(tmp_path, "auth: {tokens_file: tokens}\nport_file: later\n")
    code, _, err = _check(spawn, "--dir", tmp_path, "--config", path, "--check-config")
    assert code == 2
    expected = f"{path}:1: auth.tokens_file is '{tmp_path}/tokens': cannot be read (No such file or directory)\n"
    assert err == expected


def test_the_schema_that_is_shipped_is_that_of_the_models(request: pytest.FixtureRequest) -> None:
    """Editors are given the schema of the settings as they are: make golden writes it anew."""
    if request.config.getoption("--update-golden"):
        check.SCHEMA.write_text(check.make_schema(), encoding="utf-8")
    assert check.SCHEMA.read_text(encoding="utf-8") == check.make_schema()
    jsonschema.Draft202012Validator.check_schema(json.loads(check.make_schema()))


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("{}", True),
        ("poll_seconds: 1m\nretention: {max_bytes: 1GiB}\ngrafana: {url: 'http://a:b@x'}", True),
        ("poll_seconds: 1 parsec", False),
        ("poll_seconds: 9999", False),
        ("prot: 1", False),
        ("log: {level: loud}", False),
    ],
)
def test_the_schema_agrees_with_the_models(tmp_path: Path, text: str, valid: bool) -> None:
    """What the schema lets pass the monitor takes, and what it marks the monitor refuses."""
    schema = jsonschema.Draft202012Validator(json.loads(check.make_schema()))
    assert schema.is_valid(yaml.safe_load(text)) is valid
    try:
        resolve(tmp_path, _write(tmp_path, text))
    except SettingsError:
        assert not valid
    else:
        assert valid


def test_a_range_passes_over_what_is_not_given() -> None:
    """A setting that may be absent has its range where it is given, and in the schema."""

    class Maybe(Section):
        size: Annotated[int | None, between(1, 5)] = None

    assert Maybe().size is None
    with pytest.raises(ValidationError, match="expected a number from 1 to 5"):
        Maybe(size=6)
    assert {"type": "integer", "minimum": 1, "maximum": 5} in Maybe.model_json_schema()["properties"]["size"]["anyOf"]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: ".".join(field.path))
def test_every_setting_is_documented(field: Field) -> None:
    """Each setting of each section says below it what it means."""
    assert field.info.description, f"{field.section.__name__}.{field.path[-1]} has no docstring below it"


MARK = "<!-- Below: written from the models by `make golden`. -->\n"


def _tables() -> str:
    """Write a table for each section, the settings at the top first."""
    sections: dict[tuple[str, ...], list[Field]] = {}
    for field in FIELDS:
        sections.setdefault(field.path[:-1], []).append(field)
    return "".join(_table(path, fields) for path, fields in sections.items())


def _table(path: tuple[str, ...], fields: list[Field]) -> str:
    name = ".".join(path).replace(f".{ANY}", "[]")
    title = f"`{name}`" if name else "At the top"
    said = _flat(fields[0].section.__doc__) if name else "The file may leave out all of them."
    head = f"\n## {title}\n\n{said}\n\n| setting | default | allowed | what |\n|---|---|---|---|\n"
    return head + "".join(f"{_row(field)}\n" for field in fields)


def _row(field: Field) -> str:
    said = _flat(field.info.description)
    if field.path in {("dir",), *((name,) for name in RESTART), *(("auth", name) for name in RESTART_OF_AUTH)}:
        said += " A change needs a restart."
    return f"| `{field.path[-1]}` | {_default(field)} | {_allowed(field) or 'any'} | {said} |"


def _flat(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`").replace("|", "\\|")


def _default(field: Field) -> str:
    if field.info.is_required():
        return "none" if field.path == ("dir",) else "required"
    value = field.info.get_default(call_default_factory=True)
    return "none" if value is None or value == () else f"`{json.dumps(redact(value))}`"


def _allowed(field: Field) -> str:
    """Say what a setting may be: its words, or its range, and the units that it may have."""
    found = [f"`{kind}`" for kind in field.types if isinstance(kind, str)]
    if bool in field.types:
        found.append("`true`, `false`")
    found += [f"{_number(each.low)} to {_number(each.high)}" for each in field.info.metadata if isinstance(each, Range)]
    units = UNITS.get(field.path[-1].rpartition("_")[2], {}) if {int, float} & field.types else {}
    return "; ".join(filter(None, [", ".join(sorted(found)), ", ".join(f"`{unit}`" for unit in units)]))


def _number(value: float) -> str:
    return f"{value:,}".replace(",", "\u202f")


def test_the_page_lists_every_setting(request: pytest.FixtureRequest) -> None:
    """docs/configuration.md has the default, range and meaning of every setting: make golden writes it anew."""
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    written, mark, tables = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark
    if request.config.getoption("--update-golden"):
        tables = _tables()
        PAGE.write_text(written + mark + tables, encoding="utf-8")
    assert tables == _tables()


def test_the_example_of_the_page_is_a_config(tmp_path: Path) -> None:
    """The config on the page can be used, and what it sets is what the page says of it."""
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    (example,) = re.findall(r"```yaml\n(# monitor\.yaml.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    settings = resolve(config=_write(tmp_path, example))
    assert settings.retention.max_bytes == 200 * 2**30
