"""Which layer of a net each layer of a file is: by its path, other libraries' names, or a table; never by a guess."""
from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from mindpet_lite.names.components import COMPONENTS, NUMBERED, TEXT_ENCODER, TRANSFORMER, UNET, alike, component_of
from mindpet_lite.names.families import FAMILIES, Spelling
from mindpet_lite.names.table import Table, check_table, near, renamed
from mindpet_lite.names.wrappers import Bare, bare

# To look for close names takes long: so many problems get them.
_HINTS = 20


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of a file or a net.

    Args:
        path: all of it.
        component: that it is of; empty where that is not known.
        said: whether its path or the user says so; else it goes by the names of all layers.
        bare: the path without wrappers and component.
    """

    path: str
    component: str
    said: bool
    bare: Bare

    def names(self) -> list[str]:
        """Return what the layer is called within its component."""
        # transformers 5 has no `text_model` around CLIP's layers.
        short = self.bare.rest.removeprefix("text_model.") if self.component.startswith(TEXT_ENCODER) else ""
        return [self.bare.rest, *([short] if short and short != self.bare.rest else [])]


def map_names(paths_in_file: Iterable[str], paths_in_net: Iterable[str], table: Table | None = None,
              component: str = "", net_component: str = "") -> dict[str, str]:
    """Return the net's path of each path in a file, one to one.

    A path that `table` renames is that of the net. Any other path is, in this order: the same path; the path that is
    the same without wrappers (`names.wrappers`) and with its component's other names (`names.components`); the layer
    that another library calls so (`names.families`), where what stands before is the same in this way. A cell that only
    holds the layer of its path, as Wukong's do, gives way to that layer.

    Args:
        paths_in_file: of the file's layers.
        paths_in_net: of all layers of the net.
        table: the user's own names, ``{path in file: path in net}``, or pairs of a regular expression and what to put
            in its place, all used one after the other with `re.sub`.
        component: that the file is of, where it says so and the paths do not.
        net_component: that the net is, where the user says so.

    Raises:
        ValueError: `table` is no table, or an entry renames nothing; or a path has no place in the net, or several, or
            two have the same: all of them stand in one message, with the pair that would have matched by its end.
    """
    check_table(table)
    wanted = list(dict.fromkeys(paths_in_file))
    own_names, problems = renamed(wanted, table)
    net = _Net(paths_in_net, net_component)
    problems += [f"{path} is {own} by your table, which the net does not have.{near(own, net.paths)}"
                 for path, own in own_names.items() if own and own not in net.paths]
    layers = _in_file([path for path in wanted if path not in own_names], component)
    found: dict[str, str] = {}
    rest = []
    for path, layer in layers.items():
        if path in net.paths and _same_component(layer, net.layer(path)):
            found[path] = path
        else:
            rest.append(layer)
    plain = {layer.path: net.without_wrappers(layer) for layer in rest}
    families = net.by_family([layer for layer in rest if len(plain[layer.path]) != 1])
    for layer in rest:
        places = plain[layer.path] if len(plain[layer.path]) == 1 else \
            families.get(layer.path) or plain[layer.path]
        if len(places) == 1:
            found[layer.path] = places[0]
        elif places:
            problems.append(f"{layer.path} may be {' or '.join(places[:3])}{' or others' if len(places) > 3 else ''}: "
                            f"say which with a name map.")
        else:
            problems.append(f"{layer.path} is no layer of the net."
                            f"{net.hint(layer) if len(problems) < _HINTS else ''}")
    inside = net.inside(found.values())
    found = {path: inside.get(place, place) for path, place in found.items()} | own_names
    taken = Counter(found.values())
    problems += [f"{place} is the place of {' and '.join(path for path in wanted if found.get(path) == place)}."
                 for place, count in taken.items() if count > 1]
    if problems:
        several = {layer.component for layer in layers.values() if layer.said}
        raise ValueError("\n  ".join([*_take_one(several), *problems]))
    return {path: found[path] for path in wanted}


class _Net:
    """The layers of a net, found by what they mean."""

    def __init__(self, paths: Iterable[str], component: str) -> None:
        self.paths = dict.fromkeys(paths)
        self._component = component
        self._layers: dict[str, _Layer] = {}
        self._by_name: dict[str, list[_Layer]] = defaultdict(list)

    def layer(self, path: str) -> _Layer:
        """Return the layer at a path of the net."""
        return self._read()[path]

    def without_wrappers(self, layer: _Layer) -> list[str]:
        """Return the paths that are a layer's but for wrappers; of several those that end as it does, or it as they."""
        self._read()
        found = {other.path: None for name in layer.names() for other in self._by_name.get(name, [])
                 if _same_component(layer, other) and _same_architecture(layer.bare, other.bare)}
        ends = [path for path in found if path.endswith(f".{layer.path}") or layer.path.endswith(f".{path}")]
        return ends or list(found)

    def by_family(self, layers: Collection[_Layer]) -> dict[str, list[str]]:
        """Return for each layer the net's layers of the same meaning, by the spellings that find the most of them."""
        found: dict[str, list[str]] = {}
        for spellings in FAMILIES.values() if layers else ():
            places = [_spelled(self._read().values(), spelling) for spelling in spellings]
            hits = []
            for spelling in spellings:
                meanings = _spelled(layers, spelling)
                hits += [{layer.path: same for meaning, those in meanings.items() for layer, head in those
                          if (same := [other.path for other, others_head in there.get(meaning, [])
                                       if _same_component(layer, other) and _same_architecture(head, others_head)
                                       and _same_architecture(layer.bare, other.bare)])}
                         for there in places]
            most = max(map(len, hits))
            for hit in hits:
                if most and len(hit) == most:
                    for path, those in hit.items():
                        found[path] = _innermost([*found.get(path, []), *those])
        return found

    def inside(self, paths: Collection[str]) -> dict[str, str]:
        """Return, of the net's own paths, those that hold the layer they mean, and where: Wukong's cells around one."""
        holders = self._holders()
        within = self.by_family([self.layer(path) for path in paths if path in holders])
        return {path: places[0] for path, places in within.items()
                if len(places) == 1 and places[0].startswith(f"{path}.")}

    def hint(self, layer: _Layer) -> str:
        """Return what to do about a layer that the net does not have."""
        self._read()
        other = next((other for name in layer.names() for other in self._by_name.get(name, [])
                      if not _same_component(layer, other)), None)
        if other is not None:
            kind = layer.component or other.component
            cure = f"if both are one, say component={kind!r} (--component {kind})." if not other.bare.component or \
                not layer.said else _say_so(layer.path, other.path)
            return (f" It would be {other.path}, but {_words(layer, 'the file', 'is of')}, and "
                    f"{_words(other, 'the net', 'is')}: {cure}")
        common = {path: _common_end(path, layer.path) for path in self.paths}
        closest = [path for path, length in common.items() if length and length == max(common.values())]
        if closest:
            verb = "ends" if len(closest) == 1 else "end"
            return f" {' and '.join(closest[:3])} {verb} as it does: {_say_so(layer.path, closest[0])}"
        named = self._called_alike(layer)
        if named is not None:
            return f" {named} is what other libraries call it, but for what stands before: {_say_so(layer.path, named)}"
        return near(layer.path, self.paths)

    def _called_alike(self, layer: _Layer) -> str | None:
        """Return a layer of the net that has another library's name of a layer, whatever stands before it."""
        for spellings in FAMILIES.values():
            names = {found[1] for spelling in spellings if (found := spelling(layer.path)) is not None}
            other = next((path for spelling in spellings for path in self.paths
                          if (found := spelling(path)) is not None and found[1] in names), None)
            if other is not None:
                return other
        return None

    def _holders(self) -> set[str]:
        """Return the paths that others stand below."""
        return {path.rpartition(".")[0] for path in self.paths if path} & self.paths.keys()

    def _read(self) -> Mapping[str, _Layer]:
        """Return the layers by path; they are read when they are first asked for."""
        if not self._layers:
            found = {path: bare(path) for path in self.paths}
            plain = self._component or component_of(item.rest for item in found.values() if not item.component)
            inner = component_of(item.rest for item in found.values() if item.component == TRANSFORMER)
            # Where all layers stand in one component, its name tells it from no other.
            alone = len({found[path].component for path in found.keys() - self._holders()}) == 1
            for path, item in found.items():
                # A text encoder's layers may stand below a `transformer`, too.
                said = bool(item.component) and not (item.component == TRANSFORMER and inner == TEXT_ENCODER)
                kind = item.component if said else inner if item.component else plain
                self._layers[path] = layer = _Layer(path, kind, said and not alone, item)
                for name in layer.names():
                    self._by_name[name].append(layer)
        return self._layers


def _in_file(paths: Collection[str], component: str) -> dict[str, _Layer]:
    """Return the layers of a file by path."""
    if component:
        return {path: _Layer(path, component, True, bare(path, with_component=False)) for path in paths}
    found = {path: bare(path) for path in paths}
    several = len({item.component for item in found.values()}) > 1
    # Below one `transformer` alone are the layers of a language model, most of the time.
    said = {path: bool(item.component) and (several or item.component != TRANSFORMER) for path, item in found.items()}
    kind = component_of(item.rest for path, item in found.items() if not said[path])
    # An encoder's layers may be those of another one than a text encoder.
    kind = kind if kind in (UNET, TRANSFORMER) else ""
    return {path: _Layer(path, item.component if said[path] else kind, said[path], item)
            for path, item in found.items()}


def _same_component(layer: _Layer, place: _Layer) -> bool:
    """Tell whether a layer of a file may be one of the component that a layer of the net is of."""
    below_transformer = not layer.said and layer.bare.component == TRANSFORMER
    if below_transformer and place.bare.component not in ("", TRANSFORMER) and f".{TRANSFORMER}." not in place.path:
        # Whatever it is, a component or a wrapper, no other component's layers stand there.
        return False
    if not layer.said:
        return not place.said or place.component == TRANSFORMER and layer.component in ("", TRANSFORMER) or \
            bool(layer.component) and alike(layer.component, place.component)
    return alike(layer.component, place.component) if place.component else layer.component not in NUMBERED


def _same_architecture(one: Bare, other: Bare) -> bool:
    return one.architectures <= other.architectures or other.architectures <= one.architectures


def _spelled(layers: Iterable[_Layer], spelling: Spelling) -> dict[tuple[str, str], list[tuple[_Layer, Bare]]]:
    """Return by what stands before the network and its name those layers that have a name, each with what is before."""
    found: dict[tuple[str, str], list[tuple[_Layer, Bare]]] = defaultdict(list)
    for layer in layers:
        spelled = spelling(layer.path)
        if spelled is not None:
            head = bare(f"{spelled[0]}layer", layer.bare.component != "")
            found[head.rest, spelled[1]].append((layer, head))
    return found


def _innermost(places: Collection[str]) -> list[str]:
    """Return the places without those that hold another of them, as Wukong's cells hold their convolution."""
    return [place for place in dict.fromkeys(places) if not any(other.startswith(f"{place}.") for other in places)]


def _take_one(components: Collection[str]) -> list[str]:
    """Return what to do with a file of several components."""
    names = [name for name in COMPONENTS if name in components]
    return [f"the file holds adapters of {', '.join(names)}: where the net is one of them, component={names[0]!r} "
            f"(--component {names[0]}) takes its part."] if len(names) > 1 else []


def _words(layer: _Layer, whose: str, verb: str) -> str:
    return f"{whose} {verb} the {layer.component}" if layer.component else f"{whose} does not say of which component"


def _common_end(one: str, other: str) -> int:
    """Return how many last parts of two paths are the same; 0 where they may not be one layer for all that."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")))
    end = [mine for mine, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    heads = [path.split(".")[:-len(end)] for path in (one, other)] if end else []
    # A bare number says nothing, and the number of a block says that another one is meant.
    differ = all(heads) and any(part.isdecimal() for head in heads for part in head)
    return 0 if differ or all(part.isdecimal() for part in end) else len(end)


def _say_so(path: str, place: str) -> str:
    return f"if that is meant, say so with name_map={{{path!r}: {place!r}}} or --names."
