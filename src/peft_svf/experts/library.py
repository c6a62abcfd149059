# SPDX-License-Identifier: Apache-2.0
"""
Experts + base model -> one model in which every row of a batch may have its own mixture of them.

The library keeps z-vectors, not adapters: one tensor per weight, a place in it for each expert that was used lately.
Experts in folders are read when they are first needed, and the one used longest ago makes room where there is a limit.
`activate` gives the rows of the next forwards their mixtures and takes them away again; the weights themselves are
never touched. Nothing here knows how a mixture is found.
"""

import difflib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from ..tuner.config import SVFConfig
from ..tuner.fingerprint import Fingerprint, check
from ..tuner.layer import SVFLayer, active_rows, svf_layers
from .expert import OTHER, Expert, Mixture, SavedExpert

Source = str | PathLike[str] | Expert | SavedExpert
CLASSIFIER = "classifier: "  # in front of its name, so that no expert is called like it
HOST = "library: "  # adapters that are there for their layers: z = 1 and never active


@dataclass(eq=False)  # an expert that is added again under its name is another one
class _Entry:
    name: str
    source: Expert | SavedExpert

    def read(self) -> Expert:
        expert = self.source if isinstance(self.source, Expert) else self.source.load()
        return Expert(self.name, expert.offsets, expert.config, expert.provenance)


class ExpertLibrary:
    """
    The experts of one base model.

    A request holds `lock`, a `threading.RLock`, for both passes; `add`, `remove` and `activate` take it, so they wait
    for a request that runs.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The base model, or one with SVF adapters, each of which becomes an expert under its name, with the values
            it has now. Layers for the z-vectors are put into it.
        experts (`Sequence` or `Mapping[str, ...]`):
            Folders, Hub repositories or [`Expert`]s, with names of their own or as keys. Of a folder or
            repository everything is checked at once but the values, which are read when they are needed.
        classifier (folder, repository or [`Expert`], *optional*):
            An expert for the first pass only: it names the kind of a question. No mixture contains it.
        limit_bytes (`int`, *optional*):
            Memory for z-vectors. Where it is used up, the expert that was used longest ago makes room and is read
            again when it is needed, and a mixture of more experts than fit is summed up in groups that do. An
            [`Expert`] that was given as such stays in the CPU's memory besides.

    Raises:
        `FileNotFoundError`: if a folder or file is not there.
        `ValueError`: if there are no experts, two have one name, a name is `"other"`, one belongs to another base
            model, its files are damaged, the model has adapters that cannot be mixed, or the limit is too small for
            one expert. The model is then as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        if isinstance(experts, (str, PathLike)):
            raise ValueError(f"experts is a list or a dict of experts, got {str(experts)!r}.")
        given = experts.items() if isinstance(experts, Mapping) else [(None, source) for source in experts]
        entries = [*_own(model), *(_find(source, name) for name, source in given)]
        if not entries:
            raise ValueError("There are no experts: pass experts=[...], folders or Hub repositories of SVF adapters.")
        for i, entry in enumerate(entries):
            _check_name(entry.name, [other.name for other in entries[:i]])
        self.classifier: str | None = None
        if classifier is not None:
            chosen = _find(classifier, None)
            self.classifier = chosen.name = CLASSIFIER + chosen.name
            entries.append(chosen)
        self.model: PeftModel = model  # type: ignore[assignment]
        self.lock = threading.RLock()
        self._active = 0  # open contexts of `activate`
        self._entries: dict[str, _Entry] = {}
        self._mixtures: dict[str, Mixture] = {}
        self._tables = _Tables(limit_bytes)
        self._hosts: list[str] = []
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            for entry in entries:
                self._admit(entry)
        except BaseException:
            self._withdraw(model)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        self.model.eval()

    @property
    def names(self) -> list[str]:
        """The names of the experts, sorted."""
        return sorted(set(self._entries) - {self.classifier})

    @property
    def descriptions(self) -> dict[str, str]:
        """What each expert is good at, by name."""
        known = sorted(dict(self._entries).items())
        return {name: e.source.config.get("description") or "" for name, e in known if name != self.classifier}

    @property
    def in_memory(self) -> list[str]:
        """The experts whose z-vectors are in memory, the one used longest ago first."""
        with self.lock:
            return [entry.name for entry in self._tables.places]

    @property
    def nbytes(self) -> int:
        """The memory of the z-vectors, in bytes; at most the limit."""
        return self._tables.nbytes

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """The named mixtures, sorted."""
        return dict(sorted(self._mixtures.items()))

    def mixture(self, name: str) -> Mixture:
        """What a name stands for: a named mixture, else an expert alone, of `"other"` the base model."""
        return self.mixtures.get(name, explicit(name))

    def expert(self, name: str) -> Expert:
        """
        Get an expert as a value, to be saved, plotted or transferred.

        Raises:
            `ValueError`: if there is none of that name.
        """
        if name not in self.names:
            raise ValueError(no_expert(name, self.choices))
        return self._entries[name].read()

    def check_name(self, name: str) -> None:
        """Refuse a name that something here has, or that is the base model's, with a `ValueError`."""
        _check_name(name, ())
        if name in self._entries or name in self._mixtures:
            what = "An expert" if name in self._entries else "A mixture"
            raise ValueError(f"{what} of this library is called {name!r}: give another name, or remove it first.")

    def add(self, source: Source, name: str | None = None) -> str:
        """
        Add an expert; waits for a request that runs.

        Args:
            source (folder, repository or [`Expert`]):
                The expert.
            name (`str`, *optional*):
                Its name; default the last part of its folder or repository.

        Returns:
            `str`: the name.

        Raises:
            `FileNotFoundError`, `ValueError`: as in the constructor. Library and model are then as they were.
        """
        entry = _find(source, name)
        with self.lock:
            self.check_name(entry.name)
            self._admit(entry)
        return entry.name

    def add_mixture(self, name: str, mixture: Mixture | str | PathLike[str]) -> None:
        """
        Add a mixture, or one from a file that [`Mixture.save`] wrote: requests may name it like an expert.

        No first pass chooses it.

        Raises:
            `ValueError`: if the name is taken, an expert of the mixture is not here, or the file holds none.
        """
        found = mixture if isinstance(mixture, Mixture) else Mixture.load(mixture)
        with self.lock:
            self.check_name(name)
            if unknown := sorted(set(found.alpha) - (set(self._entries) - {self.classifier})):
                raise ValueError(no_expert(unknown[0], self.choices))
            self._mixtures[name] = found

    def remove(self, name: str) -> None:
        """
        Remove an expert or a named mixture; waits for a request that runs.

        Raises:
            `ValueError`: if there is none of that name, or it is the last expert or one of a named mixture.
        """
        with self.lock:
            if name in self._mixtures:
                del self._mixtures[name]
                return
            if using := [mixture for mixture, found in self._mixtures.items() if name in found.alpha]:
                raise ValueError(f"{name!r} is in the mixture {using[0]!r}: remove that first.")
            if name not in self._entries or name == self.classifier:
                raise ValueError(no_expert(name, self.choices))
            if len(set(self._entries) - {self.classifier}) == 1:
                raise ValueError(f"{name!r} is the last expert of this library: add another one first.")
            self._tables.drop(self._entries.pop(name))

    @contextmanager
    def activate(self, mixtures: Mixture | Sequence[Mixture], merge: bool = False) -> Iterator[PeftModel]:
        """
        Give the model one mixture, or each row of a batch its own, while the context is open.

        Rows may be repeated side by side, as beams and returned sequences are. Other threads wait. Afterwards, also
        after an exception, the model is as it was.

        Args:
            mixtures ([`Mixture`] or a list of them):
                What to activate; a list has one for each row.
            merge (`bool`):
                Many forwards will follow: where the rows agree, run them on a merged copy of the weights. It costs a
                second copy of the adapted weights, and the time to make it where the mixture is another than before.

        Raises:
            `ValueError`: if a mixture names an expert that is not here, or adapters are merged or disabled.
        """
        rows = [mixtures] if isinstance(mixtures, Mixture) else list(mixtures)
        with self.lock, ExitStack() as stack:
            used = list(dict.fromkeys(name for mixture in rows for name in mixture.alpha))
            entries = self._entries_of(used)
            alpha = torch.tensor([[mixture.alpha.get(name, 0.0) for name in used] for mixture in rows])
            if len(rows) > 0 and bool((alpha == alpha[0]).all()):  # (B, experts)
                alpha = alpha[:1]  # the batch agrees
            layers = self.layers()
            for layer in layers.values():
                if layer.merged or layer.disable_adapters:
                    state = "merged: unmerge_adapter()" if layer.merged else "disabled: enable them"
                    raise ValueError(f"No mixture can be active while the model's adapters are {state} first.")
            offsets = self._tables.mix(entries, lambda _: alpha, layers)
            stack.enter_context(active_rows(layers, offsets, merge=merge and len(alpha) == 1))
            self._active += 1
            try:
                yield self.model
            finally:
                self._active -= 1

    @property
    def choices(self) -> list[str]:
        """What a request may name: experts, `"other"`, mixtures as such."""
        return [*self.names, OTHER, *(f"the mixture {name}" for name in self.mixtures)]

    def mix(self, names: Sequence[str], alpha: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """
        Mix the offsets of each SVF layer, by module; gradients flow to the weights.

        Args:
            names (`Sequence[str]`): The experts.
            alpha (`Callable`): Module -> weights `(B, experts)`.

        Returns:
            Per module `(B, k)`, float32 or beside a model in float64 that; empty where no expert reaches.

        Raises:
            `ValueError`: if there is no expert of a name.
        """
        with self.lock:
            return self._tables.mix(self._entries_of(names), alpha, self.layers())

    def _entries_of(self, names: Sequence[str]) -> list[_Entry]:
        if unknown := sorted(set(names) - set(self._entries)):
            raise ValueError(no_expert(unknown[0], self.choices))
        return [self._entries[name] for name in names]

    def layers(self) -> dict[str, SVFLayer]:
        """The SVF layers by the names of the base model's modules."""
        return svf_layers(self.model)

    def _fits(self, entry: _Entry) -> bool:
        """Whether the model has layers with enough directions for every z-vector of an expert."""
        layers = self.layers()
        bases = {name: layer.svf_basis for name, layer in layers.items() if layer.svf_basis is not None}
        return all(name in bases and size <= bases[name].shape[-1] for name, size in entry.source.sizes.items())

    def _admit(self, entry: _Entry) -> None:
        """Check an expert against the base model, give the model the layers it needs, and list it."""
        config, sizes = entry.source.config, entry.source.sizes
        if missing := sorted(set(config.get("fingerprint") or sizes) - set(sizes)):
            raise ValueError(f"Expert {entry.name!r} has no z-vector for {missing[0]}, which its config targets.")
        shape = self._tables.with_room_for(sizes)
        if self._fits(entry):
            self._check_fingerprint(entry)
            self._check_sizes(entry)
        elif self._active:
            raise ValueError(
                f"Expert {entry.name!r} moves weights that no expert here has moved yet: add it outside of activate() "
                "and using()."
            )
        else:
            host = self._add_host(config)  # compares the fingerprints
            try:
                self._check_sizes(entry)
            except BaseException:
                if len(self.model.peft_config) > 1:
                    self._drop_host(host)
                raise
        self._tables.take(shape)
        self._entries[entry.name] = entry

    def _check_sizes(self, entry: _Entry) -> None:
        config, layers = entry.source.config, self.layers()
        for module, size in entry.source.sizes.items():
            layer = layers.get(module)
            expected = layer.size_of(config.get("rank")) if layer is not None else 0
            if size != expected:
                found = "no such module" if layer is None else f"{expected} directions"
                raise ValueError(
                    f"Expert {entry.name!r} has a z-vector of length {size} for {module}, but this model has {found} "
                    f"there. It was trained on {config.get('base_model_name_or_path')!r}; load the matching base."
                )

    def _add_host(self, config: Mapping[str, object]) -> str:
        """Put the layers of an expert into the model, as an adapter with z = 1 that is never active."""
        values = {**config, "inference_mode": True, "init_weights": True, "modules_to_save": None}
        host = SVFConfig.from_peft_type(**values)
        model = self.model
        first = not isinstance(model, PeftModel)
        name = next(n for i in range(10**6) if (n := f"{HOST}{i}") not in ({} if first else model.peft_config))
        before = set(self.layers())
        if first:
            # not get_peft_model: it writes this model's name over that of the expert's base
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(host.task_type, PeftModel)
            self.model = kind(model, host, adapter_name=name)
        else:
            model.add_adapter(name, host)
        self._hosts.append(name)
        for module, layer in self.layers().items():
            if module not in before:
                layer.set_adapter([])  # outside of `activate` it is the base layer and nothing else
                layer.train(self.model.training)
        return name

    def _check_fingerprint(self, entry: _Entry) -> None:
        own = {name: layer.svf_fingerprint for name, layer in self.layers().items()}
        saved = entry.source.config.get("fingerprint") or {}
        check(
            {name: Fingerprint.from_json(fingerprint) for name, fingerprint in saved.items()},
            {name: fingerprint for name, fingerprint in own.items() if fingerprint is not None},
            absent=[],  # all that it names has a layer here
            adapter=entry.name,
            here=getattr(self.model.get_base_model(), "name_or_path", "") or type(self.model).__name__,
            there=entry.source.config.get("base_model_name_or_path"),
        )

    def _withdraw(self, model: PreTrainedModel | PeftModel) -> None:
        """Take the layers of a library that could not be made out of the model again."""
        if model is not self.model:
            self.model.unload()
        elif isinstance(model, PeftModel):
            for name in list(self._hosts):
                self._drop_host(name)

    def _drop_host(self, name: str) -> None:
        self._hosts.remove(name)
        self.model.delete_adapter(name)
        for path, layer in self.layers().items():
            if not len(layer.svf_offset):
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_base_model().get_submodule(parent), child, layer.base_layer)


class _Tables:
    """
    The z-vectors in memory: per weight one tensor `(places, k)`, with a place for each expert that was used lately.

    Args:
        limit_bytes (`int`, *optional*):
            Of all tensors together.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.places: OrderedDict[_Entry, int] = OrderedDict()  # the one used longest ago first
        self._tensors: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def with_room_for(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The lengths of the rows with another expert; refuses those of which the limit holds not a single one."""
        shape = {name: tensor.shape[1] for name, tensor in self._tensors.items()}
        shape |= {name: max(size, shape.get(name, 0)) for name, size in sizes.items()}
        if self.limit_bytes is not None and self.limit_bytes < 4 * sum(shape.values()):
            raise ValueError(
                f"limit_bytes={self.limit_bytes} is too small: one expert takes {4 * sum(shape.values())} bytes."
            )
        return shape

    def take(self, shape: Mapping[str, int]) -> None:
        """Take new lengths of the rows. Where they are others than before, all experts are read again."""
        if shape != {name: tensor.shape[1] for name, tensor in self._tensors.items()}:
            self.places.clear()
            self._tensors = {name: torch.zeros(0, k) for name, k in shape.items()}

    def mix(
        self, entries: Sequence[_Entry], alpha: Callable[[str], Tensor], layers: Mapping[str, SVFLayer]
    ) -> dict[str, Tensor]:
        """
        Mix the offsets of each layer by its weights `(B, experts)`: `(B, k)`, empty where no expert reaches.

        The sum runs over groups of experts that fit into memory together. Gradients flow to the weights.
        """
        mixed = {name: torch.zeros(0) for name in layers}
        capacity = self._capacity(len(entries))
        for start in range(0, len(entries), capacity):
            group = entries[start : start + capacity]
            with torch.inference_mode(False), torch.no_grad():  # what is kept here serves later calls
                places = self._hold(group, capacity)
            sizes = [entry.source.sizes for entry in group]
            for name, layer in layers.items():
                used = [i for i, modules in enumerate(sizes) if name in modules]
                if not used:
                    continue
                basis = layer.svf_basis
                if basis is None:
                    raise ValueError(
                        f"{name} has no basis: its weight was on the meta device when the library was made. Load the "
                        "weights, then call `model.library.model.base_model.fetch_bases()`."
                    )
                weights = alpha(name)
                with torch.inference_mode(False), torch.set_grad_enabled(weights.requires_grad):
                    tensor = self._tensors[name] = self._tensors[name].to(basis.device)
                    rows = tensor[[places[i] for i in used]].to(torch.promote_types(tensor.dtype, basis.dtype))
                    rows = weights[:, [start + i for i in used]].to(rows) @ rows
                    rows = F.pad(rows, (0, basis.shape[1] - rows.shape[1]))  # (B, k)
                    mixed[name] = mixed[name] + rows if mixed[name].numel() else rows
        return mixed

    def drop(self, entry: _Entry) -> None:
        """Free the place of an expert, if it has one."""
        self.places.pop(entry, None)

    def _capacity(self, wanted: int) -> int:
        """How many experts the limit holds; without one room for those that are wanted and for some more."""
        if self.limit_bytes is None:
            return max(wanted, 2 * self._size, 4)
        return self.limit_bytes // (4 * sum(tensor.shape[1] for tensor in self._tensors.values()))

    def _hold(self, entries: Sequence[_Entry], capacity: int) -> list[int]:
        """Read what is not in memory; returns the place of each expert."""
        for entry in entries:
            if entry not in self.places:
                offsets = entry.read().offsets  # before anything changes: it may fail
                place = self._free(entries, capacity)
                for name, tensor in self._tensors.items():
                    offset = offsets.get(name, tensor.new_zeros(0))
                    tensor[place] = F.pad(offset, (0, tensor.shape[1] - len(offset)))
                self.places[entry] = place
            self.places.move_to_end(entry)
        return [self.places[entry] for entry in entries]

    @property
    def _size(self) -> int:
        return len(next(iter(self._tensors.values())))

    def _free(self, wanted: Sequence[_Entry], capacity: int) -> int:
        """Find a place: a free one, a new one, or that of the expert that was used longest ago."""
        taken = set(self.places.values())
        if len(taken) == self._size < capacity:
            size = min(max(4, 2 * self._size), capacity)
            for name, tensor in self._tensors.items():
                self._tensors[name] = torch.cat([tensor, tensor.new_zeros(size - len(tensor), tensor.shape[1])])
        free = next((place for place in range(self._size) if place not in taken), None)
        if free is None:
            oldest = next(entry for entry in self.places if entry not in wanted)
            free = self.places.pop(oldest)
        return free


def no_expert(name: str, names: Sequence[str]) -> str:
    """Say that there is no expert of a name, and which there are: of more than 20 the nearest five."""
    if len(names) <= 20:
        return f"There is no expert {name!r}; there are {', '.join(names)}."
    nearest = difflib.get_close_matches(name, names, n=5, cutoff=0.0)
    return f"There is no expert {name!r}; of the {len(names)} names the nearest are {', '.join(nearest)}."


def _own(model: PreTrainedModel | PeftModel) -> list[_Entry]:
    """The adapters that a model comes with, as they are now; refuses those that a mixture cannot hold."""
    if not isinstance(model, PeftModel):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "This model has adapters already, but is no PeftModel: pass the PeftModel that was made of it (of a "
                "pipeline: pipe.model.library.model), or load the base model anew and give them as experts=[...]."
            )
        return []
    entries = []
    for name, config in model.peft_config.items():
        if config.peft_type != "SVF" or config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} of this model cannot be mixed: it is of PEFT type {config.peft_type.value} or "
                "trains more than z-vectors. Delete it, or load the base model without it."
            )
        if name.startswith(HOST):
            continue
        layers = {module: layer for module, layer in svf_layers(model).items() if name in layer.svf_offset}
        offsets = {m: layer.svf_offset[name].weight.detach().float().cpu().clone() for m, layer in layers.items()}
        prints = {m: layer.svf_fingerprint.to_json() for m, layer in layers.items() if layer.svf_fingerprint}
        base = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None)
        known = {
            **config.to_dict(),
            "fingerprint": prints or None,
            "base_model_name_or_path": base,
        }
        entries.append(_Entry(name, Expert(name, offsets, known)))
    return entries


def _find(source: Source, name: str | None) -> _Entry:
    found = source if isinstance(source, (Expert, SavedExpert)) else SavedExpert.find(source, name)
    return _Entry(name or found.name, found)


def _check_name(name: str, taken: Sequence[str] | Mapping[str, object]) -> None:
    if name == OTHER:
        raise ValueError(f"No expert can be called {OTHER!r}: that name stands for the base model.")
    if name in taken:
        raise ValueError(
            f"Two experts are called {name!r}: give each a name, as a dict (on the command line NAME=EXPERT)."
        )


def explicit(name: str) -> Mixture:
    """The mixture that is one expert, or the base model for `"other"`."""
    return Mixture() if name == OTHER else Mixture({name: 1.0})
