"""Linearized models as first-class Transformers models: `Linearized<Family>Config` and `Linearized<Family>ForCausalLM`.

`import trenchcoat` makes `AutoModelForCausalLM.from_pretrained(merged_folder)` work. Config classes are registered when
Transformers' AutoConfig is first used (imported before or after us), a family's model class when its config is first
made, so that importing trenchcoat stays cheap. Classes derive from the family's own; no code is copied. Our settings
live in the config under the one key `trenchcoat`: `{"version": 1, "student": {...}, "base": {...}}`, and with a LoRA
that is not merged `{"version": 2, ..., "lora": {...}}`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "linearized_"
"""Prefix of a linearized model's `model_type`, before the base family's."""

FORMAT_VERSION = 2
"""Newest version of what is written under the config's key `trenchcoat`; 1 knows no LoRA."""

AUTO_MODULE = "transformers.models.auto.configuration_auto"


class _AfterImport(MetaPathFinder):
    """Import hook that detects the first import of Transformers' auto module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with our registration after its execution."""
        if name != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_wait(module: ModuleType) -> None:
                """Run the module, then wait for its first use."""
                execute(module)
                _register_on_first_use(module)

            loader.exec_module = execute_and_wait
        return spec


def install() -> None:
    """Have the families registered when AutoConfig (which AutoModel and AutoTokenizer ask) is first used."""
    if AUTO_MODULE in sys.modules:
        _register_on_first_use(sys.modules[AUTO_MODULE])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_on_first_use(module: Any) -> None:
    """Wrap AutoConfig's two entry points; the first call unwraps them and registers the families.

    Registering any earlier would import the families' modules in the middle of Transformers' own import.
    """
    kind = module.AutoConfig
    names = [name for name in ("from_pretrained", "for_model") if name in vars(kind)]
    originals = {name: vars(kind)[name] for name in names}

    def wrapped(name: str) -> classmethod[Any, Any, Any]:
        """The class method, wrapped to register the families first."""

        def first_call(cls: Any, *args: Any, **kwargs: Any) -> Any:
            """Unwrap, register, and call the original."""
            for each, original in originals.items():
                setattr(kind, each, original)
            register_families()
            return getattr(cls, name)(*args, **kwargs)

        return classmethod(functools.update_wrapper(first_call, getattr(kind, name).__func__))

    for name in names:
        setattr(kind, name, wrapped(name))


def register_families() -> None:
    """Register a linearized config class for every family known to work that this Transformers has."""
    from trenchcoat.models.families import KNOWN_FAMILIES

    known = importlib.import_module(AUTO_MODULE).CONFIG_MAPPING
    for family in KNOWN_FAMILIES:
        if family in known:
            config_class(family)


def config_class(family: str) -> type:
    """`Linearized<Family>Config`, registered with AutoConfig; made on first use.

    Raises UserError for a family that this version of Transformers does not have.
    """
    from trenchcoat.config import UserError

    auto: Any = importlib.import_module(AUTO_MODULE)
    model_type = PREFIX + family
    if model_type in auto.CONFIG_MAPPING:
        return auto.CONFIG_MAPPING[model_type]
    if family not in auto.CONFIG_MAPPING:
        raise UserError(f"this version of transformers has no family {family!r}; install one that does")
    base = auto.CONFIG_MAPPING[family]

    def __post_init__(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        if self.trenchcoat is not None:
            model_class(family)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        """Unpickled, in a process that may know no class of this family yet."""
        self.__dict__.update(state)
        if self.trenchcoat is not None:
            model_class(family)

    methods = {"__post_init__": __post_init__, "__setstate__": __setstate__}
    members = {"model_type": model_type, "trenchcoat": None, **methods, **_own_class()}
    made = _publish(f"Linearized{base.__name__}", base, {**members, "__annotations__": {"trenchcoat": "dict | None"}})
    auto.AutoConfig.register(model_type, made)
    return made


def model_class(family: str) -> type:
    """`Linearized<Family>ForCausalLM`, registered with AutoModelForCausalLM; made on first use."""
    from transformers import AutoModelForCausalLM

    from trenchcoat.models.transformers_internals import causal_lm_class, copy_conversion

    config = config_class(family)
    known = causal_lm_class(config)
    if known is not None:
        return known
    base: Any = causal_lm_class(config.__mro__[1])

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, _own_attention(config), *args, **kwargs)
        _attach(self)

    def initialize_weights(self: Any) -> None:
        """Initialize the family's weights, then the students'."""
        base.initialize_weights(self)
        _initialize_students(self)

    members = {"__init__": __init__, "initialize_weights": initialize_weights, "config_class": config, **_own_class()}
    made = _publish(f"Linearized{base.__name__}", base, members)
    AutoModelForCausalLM.register(config, made)
    copy_conversion(family, PREFIX + family)
    return made


def _own_class() -> dict[str, Any]:
    """Members of a class that keep Transformers from copying this file into the folders it saves.

    Where a folder's module has named the class (`trust_remote_code=True`), it would.
    """
    return {"register_for_auto_class": classmethod(lambda cls, auto_class=None: None)}


def linearized_config(
    config: Any, student: Any, *, lora: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
) -> Any:
    """The linearized config of a base model's (or linearized model's) config, with these student settings.

    `lora`: settings of a LoRA that is in the model's weights unmerged; `base`: what is known of the base model.
    """
    from dataclasses import asdict

    from trenchcoat.models.transformers_internals import attention_name, choose_attention

    family = str(config.model_type).removeprefix(PREFIX)
    settings = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "trenchcoat")}
    plain = asdict(student)
    plain |= {"keep": list(student.keep), "keep_softmax": list(student.keep_softmax)}
    ours: dict[str, Any] = {"version": 1 if lora is None else FORMAT_VERSION, "student": plain}
    ours |= {name: dict(part) for name, part in (("lora", lora), ("base", base)) if part is not None}
    made = config_class(family)(**settings, trenchcoat=ours)
    choose_attention(made, attention_name(config))
    return made


def student_settings(settings: Mapping[str, Any]) -> Any:
    """A StudentConfig from its JSON form; UserError for fields that this version does not know."""
    from trenchcoat.config import FeatureMapConfig, StudentConfig, UserError
    from trenchcoat.config.recipe_io import check_section

    given = dict(settings)
    try:
        feature_map = FeatureMapConfig(**dict(given.pop("feature_map", {})))
        kept: dict[str, Any] = {name: tuple(given.pop(name, ())) for name in ("keep", "keep_softmax")}
        found = StudentConfig(**given, feature_map=feature_map, **kept)
    except (TypeError, ValueError) as error:
        raise UserError(f"these student settings were written by another version of trenchcoat: {error}") from error
    check_section(found, "student")
    return found


def __getattr__(name: str) -> type:
    """A class by its name, made on first use: a pickle may name one that the process reading it has not made yet."""
    if not name.startswith("Linearized"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trenchcoat.models.families import KNOWN_FAMILIES
    from trenchcoat.models.transformers_internals import causal_lm_names

    configs = importlib.import_module(AUTO_MODULE).CONFIG_MAPPING_NAMES
    for make, names in ((config_class, configs), (model_class, causal_lm_names())):
        families = [family for family, base in names.items() if name == f"Linearized{base}"]
        if families:
            return make(max(families, key=KNOWN_FAMILIES.__contains__))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: no family has such a class")


def _publish(name: str, base: type, members: dict[str, Any]) -> type:
    """A class that can be pickled: it is an attribute of this module under its name."""
    document = f"{base.__name__} with linearized attention; see :mod:`trenchcoat.models.auto`."
    made = type(name, (base,), {"__module__": __name__, "__qualname__": name, "__doc__": document, **members})
    setattr(sys.modules[__name__], name, made)
    return made


def _own_attention(config: Any) -> Any:
    """The config; a copy without our attention when it comes from a live linearized model."""
    from trenchcoat.models.interface import ATTENTION_NAME
    from trenchcoat.models.transformers_internals import attention_name, choose_attention

    if attention_name(config) != ATTENTION_NAME:
        return config
    own = copy.deepcopy(config)
    choose_attention(own, None)
    return own


def _attach(model: Any) -> None:
    from trenchcoat.config import UserError
    from trenchcoat.models.attach import attach_students, set_mode
    from trenchcoat.models.lora import add_saved_lora

    ours = model.config.trenchcoat
    if not isinstance(ours, Mapping) or "student" not in ours:
        raise UserError(
            f"a config of type {model.config.model_type!r} needs our settings under the key `trenchcoat`; this one has "
            f"{ours!r}. Make it with trenchcoat.models.auto.linearized_config(base_config, student_config)"
        )
    if int(ours.get("version", 0)) > FORMAT_VERSION:
        raise UserError(f"this model was written by a newer trenchcoat (format {ours['version']}); upgrade trenchcoat")
    attach_students(model, student_settings(ours["student"]))
    if ours.get("lora") is not None:
        add_saved_lora(model, ours["lora"])
    set_mode(model, "student")


def _initialize_students(model: Any) -> None:
    """Initialize students that were in no checkpoint (Transformers leaves them uninitialized)."""
    from trenchcoat.models.attach import start_student, students_of
    from trenchcoat.models.families import attention_sites
    from trenchcoat.models.transformers_internals import was_loaded

    modules = {site.index: site.module for site in attention_sites(model)}
    for index, student in students_of(model).items():
        if not all(map(was_loaded, student.parameters())):
            start_student(student, modules[index])
