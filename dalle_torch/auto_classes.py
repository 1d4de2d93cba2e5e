"""Tells transformers' AutoConfig, AutoModelForSeq2SeqLM and AutoTokenizer about `model_type: dallebart`.

Importing transformers takes seconds, so nothing is imported for this: each class is registered, through transformers'
public `register`, right after the module of the auto class has been imported by whoever wants it.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, cast

from dalle_torch.log import get_logger

if TYPE_CHECKING:
    from importlib.abc import Loader

logger = get_logger(__name__)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from dalle_torch.models.configuration import DalleBartConfig

    AutoConfig.register(DalleBartConfig.model_type, DalleBartConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM

    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart

    AutoModelForSeq2SeqLM.register(DalleBartConfig, DalleBart, exist_ok=True)


def _register_tokenizer() -> None:
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.text.tokenizer import register_auto_tokenizer

    register_auto_tokenizer(DalleBartConfig)


class _Step(NamedTuple):
    """A registration, due once `auto` is imported and while none of `parts` is half-way through its own import."""

    auto: str
    parts: tuple[str, ...]
    register: Callable[[], None]


_STEPS = (
    _Step(
        "transformers.models.auto.configuration_auto",
        ("dalle_torch.models.configuration",),
        _register_config,
    ),
    _Step(
        "transformers.models.auto.modeling_auto",
        ("transformers.modeling_utils", "dalle_torch.models.configuration", "dalle_torch.models.dalle_bart"),
        _register_model,
    ),
    _Step(
        "transformers.models.auto.tokenization_auto",
        ("dalle_torch.models.configuration", "dalle_torch.text.tokenizer"),
        _register_tokenizer,
    ),
)
_WATCHED = frozenset(name for step in _STEPS for name in (step.auto, *step.parts))
_importing: set[str] = set()
_done: set[_Step] = set()


def install() -> None:
    """Register what can be registered now, and the rest when transformers is imported."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    _register_what_is_due()


def _register_what_is_due() -> None:
    for step in _STEPS:
        if step in _done or step.auto not in sys.modules or _importing.intersection((step.auto, *step.parts)):
            continue
        _done.add(step)
        try:
            step.register()
        except ImportError as error:
            # Whoever imports transformers for something else must not fail over this package.
            logger.warning("transformers' auto classes will not know dallebart: %s", error)


class _Watcher:
    """A meta path finder that finds the watched modules the way the other finders do, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED or fullname in _importing:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast("Loader", _ReportingLoader(spec.loader))
                return spec
        return None


class _ReportingLoader:
    """Runs a module's own loader, then whatever its import has made due."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        # Tools ask loaders for more than the protocol has: get_source, get_resource_reader, is_package.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, as if nobody had watched.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        _importing.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            _importing.discard(module.__name__)
        _register_what_is_due()
