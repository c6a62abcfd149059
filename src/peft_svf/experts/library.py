# SPDX-License-Identifier: Apache-2.0
"""
Experts + base model -> one model in which every row of a batch may have its own mixture of them.

The library keeps z-vectors, not adapters. With a memory limit, they are read when they are needed, and the expert used
longest ago makes room. `activate` gives the rows of the next forwards their mixtures and takes them away again; the
weights themselves are never touched. Nothing here knows how a mixture is chosen.
"""

import asyncio
import difflib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from os import PathLike
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..tuner.config import SVFConfig, selecting
from ..tuner.layer import SVFLayer, svf_weights
from ..tuner.loading import remove
from ..tuner.rows import active_rows
from .base import refuse_adapters, weights_in
from .expert import OTHER, Expert, Mixture, SavedOffsets
from .key import RoutingKey

Source = str | PathLike[str] | Expert
CLASSIFIER = "classifier: "  # prefix that keeps the classifier's name from clashing with an expert's
HOST = "library: "  # prefix of the adapters that only bring layers: z = 1 and never active


class ExpertLibrary:
    """
    The experts of one base model.

    `lock`, a `threading.RLock`, is held by a request for both passes; `add`, `remove` and `activate` take it, so they
    wait for the request that runs. Forwards outside of `activate` take no lock: if other threads send requests, run
    them inside `with library.lock:`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The base model, or one with SVF adapters, each of which becomes an expert under its name, with the values
            it has now. The library puts layers for the z-vectors into it.
        experts (`Sequence` or `Mapping[str, ...]`):
            Folders, Hub repositories or [`Expert`]s, named by themselves or by the keys.
        classifier (folder, repository or [`Expert`], *optional*):
            An expert for the first pass only: it names the kind of a question. No mixture contains it.
        limit_bytes (`int`, *optional*):
            Memory for z-vectors. If it is used up, the expert used longest ago makes room and is read again when it
            is needed; one always fits. An [`Expert`] whose values were read before stays in the CPU's memory as well.

    Raises:
        `FileNotFoundError`: if a folder or file is missing.
        `ValueError`: if there are no experts, two have one name, a name is `"other"`, an expert belongs to another
            base model or is damaged, or adapters of the model cannot be mixed. The model is then as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self.model: PeftModel = model  # type: ignore[assignment]
        self.limit_bytes = limit_bytes
        self.lock = threading.RLock()
        self.classifier: str | None = None
        self._open: tuple[Any, ...] = ()  # the tasks whose `activate` contexts are open, the innermost last
        self._experts: dict[str, Expert] = {}
        self._mixtures: dict[str, Mixture] = {}
        self._keys: dict[str, RoutingKey] = {}  # mixtures' keys
        self._loaded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # the one used longest ago first
        self._hosts: list[str] = []
        lazy = limit_bytes is not None
        admitted = [*_own(model), *loaded(experts, lazy)]
        if not admitted:
            raise ValueError("There are no experts: pass experts=[...], folders or Hub repositories of SVF adapters.")
        if classifier is not None:
            (chosen,) = loaded(classifier, lazy)
            self.classifier = CLASSIFIER + chosen.name
            admitted.append(replace(chosen, name=self.classifier))
        with ExitStack() as undo:
            for parameter in model.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            undo.callback(lambda: self._drop_hosts(0) if self.model is model else self.model.unload())
            for expert in admitted:
                self.check_name(expert.name)
                self._admit(expert)
            undo.pop_all()
        self.model.eval()

    @property
    def names(self) -> list[str]:
        """The names of the experts, sorted."""
        return sorted(set(self._experts) - {self.classifier})

    @property
    def descriptions(self) -> dict[str, str]:
        """What each expert is good at, by name."""
        return {name: self._experts[name].description for name in self.names}

    @property
    def in_memory(self) -> list[str]:
        """The experts whose z-vectors are in memory, the one used longest ago first."""
        return list(self._loaded)

    @property
    def nbytes(self) -> int:
        """The memory of the z-vectors, in bytes; at most the limit, or one expert's."""
        return sum(offset.nbytes for offsets in self._loaded.values() for offset in offsets.values())

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """The named mixtures, sorted."""
        return dict(sorted(self._mixtures.items()))

    @property
    def keys(self) -> dict[str, RoutingKey | None]:
        """The routing key of each expert, `None` if it has none, and of each named mixture that has one."""
        return {**{name: self._experts[name].key for name in self.names}, **dict(sorted(self._keys.items()))}

    @property
    def choices(self) -> list[str]:
        """The names that a request may use: experts, `"other"`, and mixtures as such."""
        return [*self.names, OTHER, *(f"the mixture {name}" for name in self.mixtures)]

    def mixture(self, name: str) -> Mixture:
        """Return the mixture of a name: a named one, else an expert alone; the base model for `"other"`."""
        return self._mixtures.get(name) or Mixture({name: 1.0})

    def expert(self, name: str) -> Expert:
        """Get an expert as a value, to be saved, plotted or transferred. Raises `ValueError` for an unknown name."""
        self.check_experts([name])
        return self._experts[name]

    def check_experts(self, names: Iterable[str]) -> None:
        """Raise a `ValueError` if an expert is unknown; it lists all names, or the closest of more than 20."""
        if not (unknown := sorted(set(names) - set(self.names))):
            return
        known = f"there are {', '.join(self.choices)}"
        if len(self.choices) > 20:
            closest = difflib.get_close_matches(unknown[0], self.choices, n=5, cutoff=0.0)
            known = f"of the {len(self.choices)} names the nearest are {', '.join(closest)}"
        raise ValueError(f"There is no expert {unknown[0]!r}; {known}.")

    def check_name(self, name: str) -> None:
        """Raise a `ValueError` if a new expert or mixture can't have a name."""
        kinds = {"An expert": {*self._experts}, "A mixture": {*self._mixtures}, "The base model": {OTHER}}
        if taken := [kind for kind, names in kinds.items() if name in names]:
            raise ValueError(
                f"{taken[0]} of this library is called {name!r}: give another name, as the key of a dict (on the "
                "command line NAME=EXPERT), or remove it first."
            )

    def add(self, source: Source, name: str | None = None) -> str:
        """
        Add an expert and return its name; waits for a request that runs.

        Args:
            source (folder, repository or [`Expert`]): The expert.
            name (`str`, *optional*): Default its own, or the last part of its folder or repository.

        Raises:
            `FileNotFoundError`, `ValueError`: as in the constructor. Library and model are then as they were.
        """
        (expert,) = loaded({name: source} if name else source, self.limit_bytes is not None)
        with self.lock, ExitStack() as undo:
            self.check_name(expert.name)
            undo.callback(self._drop_hosts, len(self._hosts))
            self._admit(expert)
            undo.pop_all()
        return expert.name

    def add_mixture(self, name: str, mixture: Mixture | str | PathLike[str], key: RoutingKey | None = None) -> None:
        """
        Add a mixture, or one from a file that [`Mixture.save`] wrote: requests may name it like an expert.

        The first pass `"key"` chooses it if it has a routing key. Raises `ValueError` if the name is taken or an
        expert of the mixture isn't here.
        """
        mixture = mixture if isinstance(mixture, Mixture) else Mixture.load(mixture)
        with self.lock:
            self.check_name(name)
            self.check_experts(mixture.alpha)
            self._mixtures[name] = mixture
            if key is not None:
                self._keys[name] = key

    def remove(self, name: str) -> None:
        """
        Remove an expert or a named mixture; waits for a request that runs.

        Raises:
            `ValueError`: if there is none of that name, or it is the last expert or one of a named mixture.
        """
        with self.lock:
            if name in self._mixtures:
                del self._mixtures[name]
                self._keys.pop(name, None)
                return
            self.check_experts([name])
            uses = [f"in the mixture {key!r}: remove that" for key, m in self._mixtures.items() if name in m.alpha]
            uses += ["the last expert of this library: add another"] * (len(self.names) == 1)
            if uses:
                raise ValueError(f"{name!r} is {uses[0]} first.")
            del self._experts[name]
            self._loaded.pop(name, None)

    def activate(self, mixtures: Mixture | Sequence[Mixture], merge: int = 0) -> AbstractContextManager[PeftModel]:
        """
        Give the model one mixture, or each row of a batch its own, while the context is open.

        Rows may be repeated side by side, as beams and returned sequences are. Other threads wait. Afterwards, also
        after an exception, the model is as it was.

        Args:
            mixtures ([`Mixture`] or a list of them):
                What to activate; a list has one for each row.
            merge (`int`):
                Many forwards will follow: if the rows agree, run them on a merged copy of the weights, from the first
                (1 or `True`) or a later one of them on.
                It costs a second copy of the adapted weights, and time to make it if the last mixture was another.

        Raises:
            `ValueError`: if a mixture names an expert that isn't here, or adapters are merged or disabled.
            `RuntimeError`: if another coroutine of this thread has a context open, or another thread or coroutine
                closes this one; it then stays open until its owner does.
        """
        return _Owned(self._activated([mixtures] if isinstance(mixtures, Mixture) else list(mixtures), merge))

    @contextmanager
    def _activated(self, rows: Sequence[Mixture], merge: int) -> Iterator[PeftModel]:
        names = list(dict.fromkeys(name for mixture in rows for name in mixture.alpha))
        alpha = torch.tensor([[mixture.alpha.get(name, 0.0) for name in names] for mixture in rows])
        if len(rows) > 0 and bool((alpha == alpha[0]).all()):  # (B, experts)
            alpha = alpha[:1]  # the batch agrees
        with self.lock:
            self.refuse_other_coroutine()
            layers, before = self.layers(), self._open
            if any(layer.merged or layer.disable_adapters for layer in layers.values()):
                raise ValueError(
                    "No mixture can be active while adapters are merged or disabled: unmerge or enable them."
                )
            offsets = self.mix(names, lambda _: alpha)
            try:
                try:
                    self._open = (*before, _task())
                    with active_rows(layers, offsets, torch.arange(len(alpha)), merge if len(alpha) == 1 else 0):
                        yield self.model
                finally:
                    self._open = before
            finally:  # again, because Ctrl-C may have come in the first
                self._open = before

    def refuse_other_coroutine(self) -> None:
        """Raise a `RuntimeError` if another coroutine of this thread has a mixture active: waiting would never end."""
        if self._open and self._open[-1] is not _task():
            raise RuntimeError(
                "Another coroutine of this thread has a mixture active, which this one would see. Let one finish "
                "before the other begins, or run requests in threads (asyncio.to_thread)."
            )

    def mix(self, names: Sequence[str], alpha: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """
        Mix the offsets of experts for each SVF layer; gradients flow to the weights.

        `alpha` maps a layer's name to the weights `(B, experts)`. Returns per layer `(B, k)`, float32, or float64 for
        such a model; empty if no expert reaches it.
        """
        with self.lock:
            layers = self.layers()
            mixed = {name: torch.zeros(0) for name in layers}
            weights: dict[str, Tensor] = {}
            for i, name in enumerate(names):
                for module, offset in self._offsets(name, layers).items():
                    weights[module] = alpha(module) if module not in weights else weights[module]
                    share = weights[module][:, i, None]  # (B, 1)
                    with torch.inference_mode(False), torch.set_grad_enabled(share.requires_grad):
                        part = share.to(offset) * layers[module].padded(offset)  # (B, k)
                        mixed[module] = mixed[module] + part if mixed[module].numel() else part
            return mixed

    def _offsets(self, name: str, layers: Mapping[str, SVFLayer]) -> dict[str, Tensor]:
        """Return an expert's offsets by layer, on the layers' devices: from memory, else read and kept."""
        if name != self.classifier:
            self.check_experts([name])
        if name not in self._loaded:
            expert = self._experts[name]
            names, saved = weights_in(self.model, expert.config), expert.offsets
            loaded = {}
            with torch.inference_mode(False), torch.no_grad():  # what is kept serves later calls
                for path, offset in (saved.read() if isinstance(saved, SavedOffsets) else saved).items():
                    module = names.get(path, path)
                    Q = layers[module]._basis()  # raises if the weight is still on the meta device
                    loaded[module] = offset.to(Q.device, torch.promote_types(torch.float32, Q.dtype))
            size = sum(offset.nbytes for offset in loaded.values())
            while self._loaded and self.limit_bytes is not None and self.nbytes + size > self.limit_bytes:
                self._loaded.popitem(last=False)
            self._loaded[name] = loaded
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def layers(self) -> dict[str, SVFLayer]:
        """The SVF layers by the name of the base model's weight; of a stacked one the parameter's."""
        return svf_weights(self.model)

    def _admit(self, expert: Expert) -> None:
        """Check an expert against the base model, give the model the layers it needs, and list it."""
        names = weights_in(self.model, expert.config)
        sizes = {names.get(module, module): size for module, size in expert.sizes.items()}
        widths = {name: layer.size_of(layer.columns) for name, layer in self.layers().items() if layer.columns}
        if all(size <= widths.get(module, 0) for module, size in sizes.items()):
            weights = {name: layer.svf_fingerprint for name, layer in self.layers().items() if layer.svf_fingerprint}
            here = getattr(self.model.get_base_model(), "name_or_path", "") or type(self.model).__name__
            expert.check_base(weights, here)
        elif self._open:
            raise ValueError(
                f"Expert {expert.name!r} moves weights that no expert here has moved yet: add it outside of "
                "activate() and using()."
            )
        else:
            try:
                self._add_host(expert, sizes, set(names.values()))  # PEFT compares the fingerprints
            except ValueError as error:
                named = re.sub(f"Adapter '{HOST}\\d+'", lambda _: f"Expert {expert.name!r}", str(error))
                raise ValueError(named) from error
        layers = self.layers()
        for module, size in sizes.items():
            directions = layers[module].size_of(expert.config.get("rank")) if module in layers else 0
            if size != directions:
                raise ValueError(
                    f"Expert {expert.name!r} has a z-vector of length {size} for {module}, but this model has "
                    f"{directions} directions there. It was trained on {expert.base_model!r}; load the matching base."
                )
        self._experts[expert.name] = expert

    def _add_host(self, expert: Expert, sizes: Mapping[str, int], stacked: set[str]) -> None:
        """Put the layers of an expert into the model, as an adapter with z = 1 that is never active."""
        prints = {name: entry for name, entry in (expert.config.get("fingerprint") or {}).items() if name in sizes}
        values = {"fingerprint": prints, "modules_to_save": None, "inference_mode": True, "init_weights": True}
        values |= selecting(set(sizes) - stacked, sorted(set(sizes) & stacked))  # never by a file's expression
        host = SVFConfig.from_peft_type(**expert.config | values)
        taken = getattr(self.model, "peft_config", {})
        name = next(name for i in count() if (name := f"{HOST}{i}") not in taken)
        before = set(self.layers())
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, host)
        else:
            # get_peft_model would replace the name of the expert's base by this model's
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(host.task_type, PeftModel)
            self.model = kind(self.model, host, adapter_name=name)
        self._hosts.append(name)
        for module, layer in self.layers().items():
            if module not in before:
                layer.set_adapter([])  # outside of `activate` it is the base layer and nothing else
                layer.train(self.model.training)

    def _drop_hosts(self, first: int) -> None:
        """Take the latest layers out of the model again, because their expert was refused."""
        while len(self._hosts) > first:
            self.model.delete_adapter(name := self._hosts.pop())
            remove(self.model, name)


class _Owned(AbstractContextManager[PeftModel]):
    """A context that only the thread and the coroutine that opened it can close."""

    def __init__(self, context: AbstractContextManager[PeftModel]) -> None:
        self._context = context

    def __enter__(self) -> PeftModel:
        self._owner = threading.get_ident(), _task()
        return self._context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        if self._owner != (threading.get_ident(), _task()):
            raise RuntimeError(
                "This context was opened by another thread or coroutine and stays open until that one closes it."
            )
        return self._context.__exit__(*error)


def _task() -> "asyncio.Task[Any] | None":
    """The coroutine that runs, as its event loop knows it."""
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def _own(model: PreTrainedModel | PeftModel) -> list[Expert]:
    """Return the adapters of a model as experts, with the values they have now; refuse those that are more than z."""
    if not isinstance(model, PeftModel):
        refuse_adapters(model)
        return []
    experts = []
    for name, config in model.peft_config.items():
        if config.peft_type != "SVF" or config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} of this model cannot be mixed: it is of PEFT type {config.peft_type.value} or "
                "trains more than z-vectors. Delete it, or load the base model without it."
            )
        if name.startswith(HOST):
            continue
        paths = {weight: path for path, weight in weights_in(model, config.to_dict()).items()}
        layers = {n: layer for n, layer in svf_weights(model).items() if name in layer.svf_offset}
        values = {n: layer.svf_offset[name].weight.detach().float().cpu().clone() for n, layer in layers.items()}
        prints = {n: layer.svf_fingerprint.to_json() for n, layer in layers.items() if layer.svf_fingerprint}
        base = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None)
        facts = {"fingerprint": prints or None, "base_model_name_or_path": base}
        experts.append(Expert(name, {paths.get(n, n): z for n, z in values.items()}, config.to_dict() | facts))
    return experts


def loaded(sources: Source | Sequence[Source] | Mapping[str, Source], lazy: bool = False) -> list[Expert]:
    """Load experts, named by themselves or by keys; `lazy` keeps no values, as a library with a limit needs it."""
    if isinstance(sources, (str, PathLike, Expert)):
        sources = [sources]
    named = sources.items() if isinstance(sources, Mapping) else ((None, source) for source in sources)
    return [
        replace(source, name=name or source.name)
        if isinstance(source, Expert)
        else Expert.load(source, name, lazy=lazy)
        for name, source in named
    ]
