"""Values that a user gives instead of a profile's: on the command line, in a YAML file, or in a notebook.

A setting is named as the profile names it, a stage's with its stage: `num_queries`, `stage2.epochs`,
`connector_options.sasa.conv`. Names, types and ranges are checked here, before anything runs.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightmedvlm_utils.config import PROFILES, Profile, StageSettings, get_profile
from lightmedvlm_utils.errors import UserError

_STAGES = ("stage1", "stage2", "stage3")
_OPEN = "connector_options"  # its keys are the connectors' own; they know which options they have
_PATHS = ("vision", "language_model", "finding_boxes", "image_cache")


def names() -> list[str]:
    """Every setting by its dotted name."""
    top = [field.name for field in fields(Profile) if field.name not in ("name", *_STAGES)]
    return top + [f"{stage}.{field.name}" for stage in _STAGES for field in fields(StageSettings)]


def resolve(profile: str, given: Mapping[str, Any] | str | None = None) -> Profile:
    """The profile with the `given` settings in the place of its own: `{dotted name: value}`, nested, or such a thing
    written as YAML, in which form papermill's command line hands it over.

    Raises UserError for a name that is no setting, and for a value of the wrong type or out of range.
    """
    base = get_profile(profile)
    given = parse_yaml(given, f"The settings {given!r} are") if isinstance(given, str) else given
    if not given:
        return base
    values = base.to_dict()
    for name, value in flat(given).items():
        parent, _, last = name.rpartition(".")
        target = values
        for key in parent.split(".") if parent else ():
            target = target.setdefault(key, {})
        target[last] = _absolute(value, must_exist=name != "image_cache") if name in _PATHS else value
    return _validated(values, profile)


def changes(profile: Profile) -> dict[str, Any]:
    """The settings in which a profile differs from the one it started from, `{dotted name: value}`."""
    base = flatten(PROFILES[profile.name])
    return {name: value for name, value in flatten(profile).items() if value != base[name]}


def flatten(profile: Profile) -> dict[str, Any]:
    """A profile's values by their dotted names; tuples as lists, as YAML has them."""
    values = profile.to_dict()
    found = {name: values[name] for name in names() if "." not in name}
    found |= {f"{stage}.{name}": value for stage in _STAGES for name, value in values[stage].items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def describe(profile: Profile) -> list[str]:
    """One line for each setting that differs from the profile's own."""
    base = flatten(PROFILES[profile.name])
    return [f"{name} = {value!r} (profile {profile.name}: {base[name]!r})" for name, value in changes(profile).items()]


def load_plugins(plugins: Iterable[str]) -> None:
    """Import the modules that register connectors of a user's own; raises UserError where one is not found."""
    for plugin in plugins:
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            sentence = f"The plugin {plugin!r} cannot be imported ({error}); put its folder on PYTHONPATH."
            raise UserError(sentence) from error


def from_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["stage2.epochs=3", "vision=/models/swin"]` -> `{name: value}`; values are read as YAML reads them."""
    import yaml

    given: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UserError(f"--set {assignment!r} is not of the form NAME=VALUE, like --set stage2.epochs=3.")
        if name in given:
            raise UserError(f"The setting {name!r} is given twice; give it once.")
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {assignment!r} has a value that YAML cannot read; put it in quotes.") from error
    return given


def from_file(path: Path | str) -> tuple[str, dict[str, Any]]:
    """(profile or "", settings) of a YAML file as `lightmedvlm config` prints it; either may be missing."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"The settings file {path} cannot be read ({error.strerror}); check its name.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The settings file {path} is no UTF-8 text; write it as such.") from error
    found = parse_yaml(text, f"The settings file {path} is")
    profile = found.pop("profile", "")
    return str(profile), flat(found)


def parse_yaml(text: str, what: str) -> dict[str, Any]:
    """What is written as YAML in the form 'name: value'; UserError that begins with `what` where it is not."""
    import yaml

    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{what} no YAML ({' '.join(str(error).split())}); correct it.") from error
    if not isinstance(found, dict):
        raise UserError(f"{what} not of the form 'name: value'; correct it.")
    return found


def to_yaml(profile: Profile) -> str:
    """All settings of a profile as YAML that `from_file` reads back."""
    import yaml

    nested: dict[str, Any] = {"profile": profile.name}
    for name, value in flatten(profile).items():
        stage, dot, last = name.rpartition(".")
        (nested.setdefault(stage, {}) if dot else nested)[last] = value
    return yaml.safe_dump(nested, sort_keys=False, default_flow_style=None, width=110)


def flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names; raises UserError for what is no setting."""
    if not isinstance(given, Mapping):
        raise UserError(f"Settings are given as {{name: value}}, not as {given!r}; correct them.")
    known = names()
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in _STAGES:
            if not isinstance(value, Mapping):
                raise UserError(f"The setting {name} holds settings of its own; give one, like {name}.epochs.")
            found |= flat({f"{name}.{inner}": own for inner, own in value.items()})
        elif str(name) in known or str(name).startswith(f"{_OPEN}."):
            found[str(name)] = value
        else:
            raise _unknown(str(name), known)
    return found


def _unknown(name: str, known: list[str]) -> UserError:
    """The error for a name that is no setting; a stage's setting is often given without its stage."""
    close = difflib.get_close_matches(name, known, n=1) or [one for one in known if name and name in one]
    advice = f"did you mean {close[0]!r}?" if close else "`lightmedvlm config` lists them."
    return UserError(f"There is no setting {name!r}; {advice}")


def _validated(values: dict[str, Any], profile: str) -> Profile:
    """The profile of these values; UserError says which one is wrong and why."""
    from pydantic import TypeAdapter, ValidationError

    expected = get_profile(profile).to_dict()
    for name, value in _leaves(values):
        if isinstance(value, bool) and type(_leaf(expected, name)) in (int, float):
            raise UserError(f"The setting {name} takes a number, not {value!r}; correct it.")
    try:
        return TypeAdapter(Profile).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        why = first["msg"].replace("Input should", "it should")
        raise UserError(f"The setting {name} cannot be {first['input']!r}: {why}; correct it.") from None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _leaf(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _absolute(value: Any, must_exist: bool) -> Any:
    """A local folder by its full path, since notebooks run in another folder; any other name as it is."""
    folder = Path(value).expanduser() if isinstance(value, str) and value else None
    return str(folder.resolve()) if folder and (folder.is_dir() or not must_exist) else value
