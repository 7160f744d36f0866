"""What a reload does with new settings: which take effect, and which services are built anew for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from logging import getLogger

from gradiometer_monitor.config.section import is_loopback
from gradiometer_monitor.config.settings import RESTART, Settings, SettingsError
from gradiometer_monitor.services import Service, stop_all

__all__ = ["changed", "keep_fixed", "replace"]

log = getLogger(__name__)

RESTART_OF_AUTH = ("tls_certificate", "tls_key")


def keep_fixed(old: Settings, wanted: Settings) -> Settings:
    """Return the wanted settings with those of old that only a restart changes, and warn of each that differs.

    Raises SettingsError for what must not be changed while an address is served that others can reach.
    """
    fixed = {name: getattr(old, name) for name in RESTART if getattr(old, name) != getattr(wanted, name)}
    of_auth = {
        name: getattr(old.auth, name)
        for name in RESTART_OF_AUTH
        if getattr(old.auth, name) != getattr(wanted.auth, name)
    }
    if wanted.auth.tokens_file is None and old.auth.tokens_file is not None and not is_loopback(old.host):
        raise SettingsError(
            f"auth.tokens_file is taken away, and host is {old.host!r}: whoever reaches it would be let in; "
            "restart on 127.0.0.1 for that"
        )
    names = [*("dir" if name == "root" else name for name in fixed), *(f"auth.{name}" for name in of_auth)]
    if names:
        log.warning("only a restart changes %s: stays as it was", ", ".join(names))
    if of_auth:
        fixed["auth"] = wanted.auth.model_copy(update=of_auth)
    return wanted.model_copy(update=fixed) if fixed else wanted


def changed(old: Settings, new: Settings) -> set[str]:
    """Name the settings and sections that differ."""
    return {name for name in Settings.model_fields if getattr(old, name) != getattr(new, name)}


def replace(running: Sequence[Service], made: Iterable[Service], changed: set[str]) -> list[Service]:
    """Stop the services whose settings changed or that are wanted no more, start those made anew; return all."""
    kept = {each.name: each for each in running if each.sections and not changed.intersection(each.sections)}
    services = [kept.get(each.name, each) for each in made]
    stop_all(each for each in running if each not in services)
    for each in services:
        if each not in running:
            each.start()
    return services
