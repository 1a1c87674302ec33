"""The settings of a command, from flags, environment variables and a file, in this order of precedence.

pydantic-settings reads and merges the sources. What it does not know is here: the words of lists and NAME=VALUE pairs
in variables, and a file with one section per command.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from scgpt_batch.errors import ConfigError, shortened, suggestion
from scgpt_batch.io.locations import local_path
from scgpt_batch.near_misses import did_you_mean

ENVIRONMENT = "SCGPT_BATCH_"
COMMON = "common"  # the section of the file for all commands

Model = TypeVar("Model", bound=BaseModel)
Section = Mapping[str, Any]


def load(model: type[Model], names: Collection[str], flags: Section, *sections: Section) -> Model:
    """Create the model from the sources; the first that gives a setting wins.

    Parameters
    ----------
    model
        The class of the settings.
    names
        The fields that may be set; other flags, variables and entries are left out.
    flags
        Values of the command line.
    sections
        Values of a file, in order of precedence, below the environment.

    Raises
    ------
    ConfigError
        A variable of the environment is malformed.
    pydantic.ValidationError
        A value is missing or cannot be used.
    """

    class Sources(BaseSettings):
        model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, protected_namespaces=())

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            variables = WordsFromEnvironment(settings_cls, names)
            above, *below = (InitSettingsSource(settings_cls, _only(names, source)) for source in (flags, *sections))
            return above, variables, *below

    merged = create_model(model.__name__, __base__=(Sources, model))()
    return model(**merged.model_dump(exclude_unset=True))


def _only(names: Collection[str], values: Section) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


class WordsFromEnvironment(EnvSettingsSource):
    """Reads variables, whose lists are words and not JSON: `SCGPT_BATCH_GENES="CD3D LYZ"`."""

    def __init__(self, settings_cls: type[BaseSettings], names: Collection[str]) -> None:
        """Read the variables of these fields only."""
        super().__init__(settings_cls)
        self._names = names

    def prepare_field_value(self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool) -> Any:
        """Split the words of lists and NAME=VALUE pairs; pydantic converts everything else."""
        if value is None or field_name not in self._names:
            return None
        if is_list(field):
            return value.split()
        if is_dict(field):
            try:
                return named_values(value.split())
            except ValueError as exc:
                raise ConfigError(f"{ENVIRONMENT}{field_name.upper()} is {value!r}: {exc}") from exc
        return value


def read_sections(
    path: str, command: str, fields: Mapping[str, FieldInfo], known: Mapping[str, Iterable[str]]
) -> tuple[Section, Section]:
    """Return a command's section of a YAML file, and the section `common`; null means that a setting is not given.

    Parameters
    ----------
    path
        The file.
    command
        The command.
    fields
        The command's settings.
    known
        The settings of each command. The section `common` may hold those of all.

    Raises
    ------
    ConfigError
        The file cannot be read, or a section or setting is unknown.
    """
    sections = _parse(path, known)
    unknown = [name for name in sections if name not in (COMMON, *known)]
    if unknown:
        end = suggestion(str(unknown[0]), (COMMON, *known))
        raise ConfigError(f"{path}: unknown section {shortened(repr(unknown[0]))}{end}")
    allowed = {command: set(known[command]), COMMON: {name for names in known.values() for name in names}}
    for section, names in allowed.items():
        for key in sections.get(section) or {}:
            if key not in names:
                end = did_you_mean(str(key), sorted(names)) or f"; see scgpt-batch {command} --help"
                raise ConfigError(f"{path}, section {section!r}: unknown setting {shortened(repr(key))}{end}")
    return _given(sections.get(command), fields), _given(sections.get(COMMON), fields)


def _parse(path: str, known: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    try:
        sections = yaml.safe_load(local_path(path, "--config").read_text(encoding="utf-8")) or {}
    except OSError as exc:
        raise ConfigError(f"cannot read --config {path}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(sections, dict) or not all(isinstance(section, dict | None) for section in sections.values()):
        raise ConfigError(f"{path} must contain sections of settings: {', '.join((COMMON, *known))}")
    return sections


def _given(section: Section | None, fields: Mapping[str, FieldInfo]) -> Section:
    """Return the values that are not null; one word is a list of one."""
    return {
        key: [value] if is_list(fields[key]) and isinstance(value, str) else value
        for key, value in (section or {}).items()
        if key in fields and value is not None
    }


def is_list(field: FieldInfo) -> bool:
    """Return whether a setting takes several words."""
    return get_origin(field.annotation) is tuple


def is_dict(field: FieldInfo) -> bool:
    """Return whether a setting takes NAME=VALUE words."""
    return get_origin(field.annotation) is dict


def named_values(words: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE words as a dictionary.

    Raises
    ------
    ValueError
        A word is something else.
    """
    for word in words:
        if not re.match("[^=]+=", word):
            raise ValueError(f"{word!r} must be NAME=VALUE")
    return dict(word.split("=", 1) for word in words)
