"""`from_pretrained` for our models: from the hub, a folder or wandb, in our format or in a foreign one.

Owns: which format a folder holds and which configuration goes with it. Does not own: downloads (`storage`), the check
of weights and the filling of models (`weights`), foreign names (`convert`), networks.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dalle_torch.models.configuration import check_config_file, told_of
from dalle_torch.models.saving import SavedModel
from dalle_torch.models.weights import (
    can_map,
    check_safetensors,
    check_weights,
    describe,
    fill,
    fill_other_buffers,
    main_dtype,
    mapped_safetensors,
    parse_dtype,
    place_modules,
)
from dalle_torch.storage import CheckpointError, resolve_model

SAFETENSORS: tuple[tuple[str, ...], ...] = (
    (SAFE_WEIGHTS_NAME,),
    (SAFE_WEIGHTS_INDEX_NAME, "model-*.safetensors"),
)

# What transformers' Auto classes add of themselves, and old options without meaning today.
_NO_OPTIONS = ("_from_auto", "_commit_hash", "code_revision", "trust_remote_code", "adapter_kwargs", "weights_only",
               "low_cpu_mem_usage")  # fmt: skip
_FIXED_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "attn_implementation": ((None, "sdpa"), "there is 'sdpa' alone"),
    "force_download": ((None, False), "remove the copy in the cache (hf cache), or name another cache_dir"),
    "proxies": ((None, {}), "set the variables HTTP_PROXY and HTTPS_PROXY"),
    "use_safetensors": ((None, True), "safetensors are read where there are any, and else what there is"),
}
"""name -> (values that ask for nothing, what to do instead of another one)."""
_TRANSFORMERS_OPTIONS = frozenset((
    "_from_pipeline", "adapter_name", "allow_all_kernels", "device_mesh", "disable_mmap", "distributed_config",
    "experts_implementation", "fusion_config", "generation_config", "gguf_file", "ignore_mismatched_sizes",
    "kernel_config", "key_mapping", "max_memory", "offload_buffers", "offload_folder", "offload_state_dict",
    "quantization_config", "state_dict", "tp_plan", "tp_size", "tqdm_class", "use_kernels", "variant",
))  # fmt: skip
"""What transformers' `from_pretrained` takes beside what ours does."""


@dataclass(frozen=True, kw_only=True)
class ForeignFormat:
    """Weights of another system that a model can be filled from."""

    name: str
    """What error messages call it."""
    files: tuple[str, ...]
    """Glob patterns; a folder that has a file for each of them holds this format."""
    tensors: Callable[[Path, Any], Iterator[tuple[str, Tensor]]]
    """(folder, configuration) -> (our parameter name, tensor in our layout), in the order of the file. A tensor may be
    a view that is not contiguous, of any dtype. What has no place in our model comes under its foreign name, and is
    then reported; what is to be ignored is left out. Called twice: to check, and to load."""
    config: Callable[[Path], PreTrainedConfig] | None = None
    """The configuration of a folder without `config.json`."""
    pickled: bool = False
    """The files can run code when they are read, so the user must say that they are trusted."""
    absent: tuple[str, ...] = ()
    """Modules of our model that this format holds no weights of; the loaded model then lacks them."""

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` holds this format."""
        return all(any(folder.glob(pattern)) for pattern in self.files)


class AbsentModuleError(AttributeError, ValueError):
    """A part of the network is needed that the checkpoint does not have."""


class AbsentModule(nn.Module):
    """Stands where a checkpoint has nothing, and says so to whoever uses it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise self._error() from None

    def _error(self) -> AbsentModuleError:
        return AbsentModuleError(
            f"this checkpoint has no {self.__dict__.get('name')}: load one that has, to do what needs it"
        )


class CheckpointModel(SavedModel):
    """A `PreTrainedModel` that loads from anywhere and never leaves a weight to chance.

    Subclasses name their `config_class` and, in order of preference, their `foreign_formats`. Modules at the top that
    the configuration lists under `absent_modules` are left out (see `AbsentModule`), also when the model is saved.
    """

    foreign_formats: ClassVar[tuple[ForeignFormat, ...]] = ()

    def post_init(self) -> None:
        absent = getattr(self.config, "absent_modules", None) or ()
        names = absent if isinstance(absent, (list, tuple)) else [absent]
        strangers = [name for name in names if not isinstance(name, str) or name not in self._modules]
        if strangers:
            raise ValueError(f"absent_modules of the configuration names no part of the model: {strangers}")
        for name in names:
            setattr(self, name, AbsentModule(name))
        super().post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        trust_pickle: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, a hub id `name/repo`, or a wandb artifact
                `entity/project/name:version`. Its weights are safetensors (one file or sharded) or one of
                `foreign_formats`.
            config: instead of the source's `config.json`; needed where there is none and the sizes do not tell.
            dtype: of the floating-point weights: a torch dtype, its name, or "auto" (the default), which is that of
                the configuration, else that of the checkpoint.
            device_map: as in transformers: a device, a map from module names to devices, or "auto" (accelerate).
            trust_pickle: read weights that are Python pickles (`.pt`, `.ckpt`). Such a file can run any code.
            revision: branch, tag or commit on the hub.
            token: for private repositories on the hub.
            cache_dir: where downloads are kept.
            subfolder: folder inside the source.
            local_files_only: never ask the network.
            **kwargs: values that replace those of the configuration, and, for safetensors, every option of
                transformers' own `from_pretrained`; `max_memory` goes with `device_map`.

        Raises:
            FileNotFoundError: the source, its weights or its configuration do not exist.
            CheckpointError: the source holds another type of model, a damaged file, or weights that are missing,
                unexpected or of the wrong shape, all of which are listed; or it is pickled and not trusted.
            ValueError: an option or the configuration is wrong.
        """
        source = pretrained_model_name_or_path
        if source is None:
            return super().from_pretrained(
                None, *model_args, config=config, dtype=dtype, device_map=device_map, **kwargs
            )
        dtype = parse_dtype(kwargs.pop("torch_dtype", None) if dtype is None else dtype)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find_folder(source, cls.foreign_formats, trust_pickle, subfolder=subfolder or None, **hub)
        foreign = cls._format_of(folder, source, trust_pickle)
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.config_class.__dataclass_fields__}
        wanted = kwargs.pop("output_loading_info", False)
        kwargs = cls._check_options(kwargs, foreign)
        config = cls._find_config(folder, source, config, foreign, overrides)
        model: Any  # transformers returns a pair where the information is wanted, and says so in no type
        if foreign is None:
            empty = cls._on_meta(config, *model_args)
            check_safetensors(folder, empty, source)
        if foreign is None and cls._can_map(folder, source, config, device_map, kwargs):
            info = no_problems()
            model = cls._load_mapped(empty, folder, source, dtype)
        elif foreign is None:
            model, info = super().from_pretrained(
                folder, *model_args, config=config, dtype=dtype or "auto", device_map=device_map,
                output_loading_info=True, **{**kwargs, "use_safetensors": True},
            )  # fmt: skip
        else:
            info = no_problems()
            model = cls._load_foreign(foreign, folder, source, config, dtype, device_map, model_args, kwargs)
        model.config.name_or_path = model.name_or_path = str(source)
        if wanted:
            model = (model, info)
        return model

    @classmethod
    def _format_of(cls, folder: Path, source: str | os.PathLike[str], trust_pickle: bool) -> ForeignFormat | None:
        """The foreign format in `folder`; None: safetensors."""
        if any(any(folder.glob(pattern)) for patterns in SAFETENSORS for pattern in patterns):
            return None
        for form in cls.foreign_formats:
            if form.is_in(folder):
                if form.pickled and not trust_pickle:
                    raise CheckpointError(
                        f"{source} holds {form.name} weights ({', '.join(form.files)}), which are pickles and can "
                        "run any code: pass trust_pickle=True (--trust-pickle) if you trust whoever made them"
                    )
                return form
        held = sorted(path.name for path in folder.iterdir())
        known = [SAFE_WEIGHTS_NAME, *(" + ".join(form.files) for form in cls.foreign_formats)]
        raise FileNotFoundError(
            f"{source} holds no weights that {cls.__name__} can read ({', '.join(known)}); "
            f"it holds {', '.join(held[:10]) or 'nothing'}{' ...' if len(held) > 10 else ''}"
        )

    @classmethod
    def _check_options(cls, options: dict[str, Any], foreign: ForeignFormat | None) -> dict[str, Any]:
        """Those of `options` that ask for something."""
        asked = {name: value for name, value in options.items() if name not in _NO_OPTIONS}
        problems = []
        for name, (idle, remedy) in _FIXED_OPTIONS.items():
            value = asked.pop(name, None)
            if value not in idle:
                problems.append(f"{name}={value!r}: {remedy}")
        unknown = sorted(name for name in asked if name not in _TRANSFORMERS_OPTIONS)
        if unknown:
            problems.append(f"{', '.join(unknown)}: there is no such option, neither here nor of the configuration")
        unfit = sorted(name for name in asked if name in _TRANSFORMERS_OPTIONS and name != "max_memory")
        if foreign is not None and unfit:
            problems.append(
                f"{', '.join(unfit)} with {foreign.name} weights: convert them first (dalle-torch convert SOURCE DEST)"
            )
        if problems:
            raise ValueError(f"{cls.__name__}.from_pretrained cannot use {'; '.join(problems)}")
        return asked

    @classmethod
    def _find_config(
        cls,
        folder: Path,
        source: str | os.PathLike[str],
        config: PreTrainedConfig | str | os.PathLike[str] | None,
        foreign: ForeignFormat | None,
        overrides: dict[str, Any],
    ) -> PreTrainedConfig:
        if isinstance(config, PreTrainedConfig) and not isinstance(config, cls.config_class):
            raise ValueError(
                f"config is a {type(config).__name__}, but {cls.__name__} needs a {cls.config_class.__name__}"
            )
        if config is None and not (folder / "config.json").is_file():
            if foreign is None or foreign.config is None:
                raise FileNotFoundError(
                    f"{source} has no config.json: pass config={cls.config_class.__name__}(...), or write a folder "
                    "that has one by dalle-torch convert SOURCE DEST --config FILE"
                )
            config = foreign.config(folder)
        with told_of(source if config is None or isinstance(config, PreTrainedConfig) else config):
            if isinstance(config, PreTrainedConfig):
                changed = {**config.to_dict(), **overrides}
                return cls.config_class.from_dict(changed) if overrides else copy.deepcopy(config)
            if config is None:
                check_config_file(folder / "config.json", source, cls.config_class, cls.__name__)
            return cls.config_class.from_pretrained(folder if config is None else config, **overrides)

    @classmethod
    def _on_meta(cls, config: PreTrainedConfig, *model_args: Any) -> Self:
        with torch.device("meta"):
            return cls(copy.deepcopy(config), *model_args)

    @staticmethod
    def _can_map(
        folder: Path, source: str | os.PathLike[str], config: PreTrainedConfig, device_map: Any, kwargs: dict[str, Any]
    ) -> bool:
        """Whether nothing is asked for that needs transformers' own loading."""
        plain = device_map is None or str(device_map) == "cpu"
        plain = plain and torch.get_default_device().type == "cpu" and not getattr(config, "tie_word_embeddings", False)
        return plain and not kwargs and can_map(folder, source)

    @staticmethod
    def _load_mapped(model: Any, folder: Path, source: str | os.PathLike[str], dtype: torch.dtype | None) -> Any:
        """Fill `model`, which is on the meta device, with tensors that stay in the files until they are read."""
        if dtype is None:
            stored = describe(mapped_safetensors(folder, source), source)
            dtype = parse_dtype(getattr(model.config, "dtype", None)) or main_dtype(stored)
        devices = {"": torch.device("cpu")}
        fill(model, mapped_safetensors(folder, source), dtype, devices, copy=False)
        fill_other_buffers(model, devices)
        model.config.dtype = dtype
        return model.eval()

    @classmethod
    def _load_foreign(
        cls,
        form: ForeignFormat,
        folder: Path,
        source: str | os.PathLike[str],
        config: PreTrainedConfig,
        dtype: torch.dtype | None,
        device_map: Any,
        model_args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Self:
        if form.absent:
            config.absent_modules = list(form.absent)
        model = cls._on_meta(config, *model_args)
        stored = describe(form.tensors(folder, model.config), source)
        check_weights(model, stored, source)
        if dtype is None:
            dtype = parse_dtype(getattr(config, "dtype", None)) or main_dtype(stored)
        devices = place_modules(model, device_map, kwargs.get("max_memory"), dtype)
        fill(model, form.tensors(folder, model.config), dtype, devices)
        fill_other_buffers(model, devices)
        model.config.dtype = dtype
        model.eval()
        if len(set(devices.values())) > 1:
            from accelerate import dispatch_model

            dispatch_model(model, device_map=devices, skip_keys=list(model._skip_keys_device_placement))
        return model


def no_problems() -> dict[str, Any]:
    """What transformers calls the loading information, where all was checked before."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def find_folder(
    source: str | os.PathLike[str], formats: Sequence[ForeignFormat], trust_pickle: bool, **options: Any
) -> Path:
    """The local folder of `source`, with weights in our format or one of `formats` downloaded if need be.

    Args:
        source: a folder, a hub id, a wandb artifact.
        formats: that may be downloaded; pickled ones are only where they are trusted.
        trust_pickle: whether they are.
        **options: of `storage.resolve_model`.

    Raises:
        FileNotFoundError: there is no such source, or it has no weights.
        CheckpointError: all weights there are pickled and not trusted.
    """
    if Path(source).expanduser().is_dir():
        folder = Path(source).expanduser() / (options.get("subfolder") or "")
        if not folder.is_dir():
            raise FileNotFoundError(f"{source} has no subfolder {options['subfolder']!r}")
        return folder
    readable = [form for form in formats if trust_pickle or not form.pickled]
    try:
        return resolve_model(source, weight_formats=[*SAFETENSORS, *(form.files for form in readable)], **options)
    except FileNotFoundError as error:
        pickled = [name for form in formats if form not in readable for name in form.files]
        if any(name in str(error) for name in pickled):
            raise CheckpointError(f"{error}; pickled weights are read only with trust_pickle=True") from error
        raise
