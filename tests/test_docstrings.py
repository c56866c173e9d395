"""What `help()` says of each public name: every argument with its default, and an example that runs."""
from __future__ import annotations

import ast
import doctest
import inspect
import re
import sys
from collections.abc import Iterator

import mindspore as ms
import numpy as np
import pytest

import mindpet_lite as mp
from mindpet_lite import estimate, tasks
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.inherited_docs import entries_of, inherit_args
from mindpet_lite.offline.combine import combine_files
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.extract import extract
from mindpet_lite.offline.inspect import inspect as inspect_file
from mindpet_lite.offline.merge import merge
from mindpet_lite.offline.quantise import quantise_files

PUBLIC = {name: getattr(room, name) for room in (mp, tasks, estimate) for name in room.__all__}
PUBLIC |= {f"offline.{item.__name__}": item for item in (inspect_file, merge, convert, extract, combine_files,
                                                         quantise_files)}
# Examples that no single process can run, and why. Their lines are marked with `doctest: +SKIP`.
SKIPPED = {
    "init_data_parallel": "msrun starts the processes of the job that it joins",
    "split_linear": "each of the processes that msrun starts keeps a part of a layer",
}
CONFIGS = [name for name, item in PUBLIC.items() if isinstance(item, type) and issubclass(item, DeltaConfig)]


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a public name; a Cell that takes none has nothing but MindSpore's catch-alls."""
    found = inspect.signature(PUBLIC[name]).parameters
    return {} if list(found) == ["args", "kwargs"] else dict(found)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_documented_with_its_default(name):
    item = PUBLIC[name]
    doc = inspect.cleandoc(vars(item)["__doc__"] if isinstance(item, type) else item.__doc__)
    entries, parameters = entries_of(doc), parameters_of(name)
    assert entries.keys() == parameters.keys()
    for parameter in parameters.values():
        text = " ".join(entries[parameter.name].split())
        if parameter.default is parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            continue
        said = re.search(r"Default: (.*?)\.(?: |$)", text)
        assert said, f"{parameter.name} says no default: {text}"
        plain = isinstance(parameter.default, (bool, int, float, str, tuple, type(None)))
        if plain and "_init" not in parameter.name:
            value = said[1] if isinstance(parameter.default, (str, tuple)) else said[1].partition(",")[0]
            assert ast.literal_eval(value) == parameter.default, parameter.name
    assert len(re.findall("^Args:$", doc, re.MULTILINE)) <= 1


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_show_no_addresses_and_nothing_private(name):
    item = PUBLIC[name]
    functions = [item, *(value for key, value in inspect.getmembers(item, callable) if key[0] != "_" and (getattr(
        value, "__module__", None) or "").startswith("mindpet_lite"))] if isinstance(item, type) else [item]
    for function in functions:
        text = str(inspect.signature(function))
        assert " at 0x" not in text, text
    assert not [key for key in parameters_of(name) if key.startswith("_")]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_document_all_fields_that_they_inherit(name):
    entries = entries_of(inspect.getdoc(PUBLIC[name]))
    assert entries.keys() >= entries_of(inspect.getdoc(DeltaConfig)).keys() - {"self"}
    assert len(set(entries)) == len(re.findall(r"^    \*{0,2}\w+(?: \(.*?\))?:", "\n".join(entries.values()),
                                               re.MULTILINE))


def test_what_is_inherited_stands_behind_what_a_class_says_itself():
    class Parent:
        """A parent.

        Args:
            size: how large. Default: 3.
            name: what it is
                called.
        """

    class Child(Parent):
        """A child.

        Args:
            size: how small. Default: 1.

        Raises:
            ValueError: never.
        """

    class Silent(Parent):
        """Says nothing.

        Examples:
            >>> 1
            1
        """

    Parent.__module__ = Child.__module__ = Silent.__module__ = "mindpet_lite.test"
    inherit_args(Child)
    inherit_args(Silent)
    assert Child.__doc__ == ("A child.\n\nArgs:\n    size: how small. Default: 1.\n    name: what it is\n"
                             "        called.\n\nRaises:\n    ValueError: never.\n")
    assert list(entries_of(Silent.__doc__)) == ["size", "name"] and Silent.__doc__.endswith(
        "called.\n\nExamples:\n    >>> 1\n    1\n")


@pytest.fixture
def eager() -> Iterator[None]:
    """PyNative mode, and an `import mindpet` that is undone."""
    mode, finders, modules = ms.get_context("mode"), list(sys.meta_path), set(sys.modules)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=mode)
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] == "mindpet":
            del sys.modules[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, eager):
    """Each by itself, as a reader types it: it imports what it needs."""
    doc, names = inspect.getdoc(PUBLIC[name]), {"__name__": "__main__"}
    examples = doctest.DocTestParser().get_doctest(doc, names, name, None, 0)
    skipped = [item for item in examples.examples if item.options.get(doctest.SKIP)]
    assert examples.examples and bool(skipped) == (name in SKIPPED)
    np.random.seed(1)
    report: list[str] = []
    assert not doctest.DocTestRunner().run(examples, out=report.append).failed, "".join(report)
