"""Text that every Python installation has: docstrings and error messages, and tasks whose labels come by themselves.

Modules of the standard library and of installed libraries are read, never imported. A label may be wrong now and then,
but it is real. The texts change with the versions of Python and the libraries: figures may be compared only where a
task's sha256 is the same.
"""

import ast
import platform
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("datasets", "huggingface_hub", "numpy", "pandas", "scipy", "sklearn", "torch", "transformers")
PACKAGES = {"sklearn": "scikit-learn"}  # where the package has another name
NUMPYDOC = ("numpy", "pandas", "scipy", "sklearn")  # have sections with underlined titles
FILES = 600  # of each library at most
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
SHORTEST, SAME = 40, 160  # characters: of a text; and two texts that begin with as many equal ones are one
CAP, LEAST = 300, 60  # texts of a class; with fewer it is left out

VERBS = (
    "add",
    "check",
    "compute",
    "convert",
    "create",
    "find",
    "get",
    "load",
    "make",
    "parse",
    "read",
    "set",
    "write",
)
SECTIONS = ("Attributes", "Examples", "Notes", "Parameters", "Raises", "References", "Returns", "See Also")
EXCEPTIONS = (
    "AttributeError",
    "ImportError",
    "IndexError",
    "KeyError",
    "NotImplementedError",
    "RuntimeError",
    "TypeError",
    "ValueError",
)
MATCHES = ("another's docstring", "its own docstring")
FOLLOWS = ("another's sentence", "its own sentence")
RETURNS = ("a value", "nothing")
METHODS = ("a function", "a method")


@dataclass(frozen=True)
class Example:
    """One text, or two to be compared, and its class."""

    text: str
    label: str
    second: str | None = None


@dataclass(frozen=True)
class Function:
    """A function that has a docstring."""

    library: str
    name: str
    arguments: str
    doc: str
    returns: bool  # a value, somewhere in it


@dataclass(frozen=True)
class Message:
    """What is said where an exception is raised."""

    exception: str
    text: str


def versions() -> str:
    """Of all that is read."""
    found = [f"{name} {version(PACKAGES.get(name, name))}" for name in LIBRARIES]
    return "; ".join([f"Python {platform.python_version()}", *found])


@cache
def harvest() -> tuple[tuple[Function, ...], tuple[Message, ...]]:
    """All that is read: functions, and messages of exceptions."""
    functions: list[Function] = []
    messages: list[Message] = []
    for library, folder in _roots().items():
        for tree in map(_parsed, _files(folder)):
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                    functions.append(Function(library, node.name, ast.unparse(node.args), doc, _returns(node)))
                elif isinstance(node, ast.Raise):
                    messages += _messages(node)
    return tuple(functions), tuple(messages)


def _roots() -> dict[str, Path]:
    """Where the modules lie.

    Raises:
        ModuleNotFoundError: If a library is not installed.
    """
    specs = {name: find_spec(name) for name in LIBRARIES}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise ModuleNotFoundError(f"the text tasks are made of docstrings of {missing}: pip install 'hf_modular[dev]'")
    folders = {name: Path(str(spec.origin)).parent for name, spec in specs.items() if spec}
    return {"the standard library": Path(sysconfig.get_paths()["stdlib"]), **folders}


def _files(folder: Path) -> list[Path]:
    """The modules below a folder, in an order that is always the same; some of them, if there are many."""
    found = sorted(path for path in folder.rglob("*.py") if not SKIPPED & {*path.relative_to(folder).parts})
    return found if len(found) <= FILES else sorted(random.Random(0).sample(found, FILES))


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            return ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the standard library keeps templates of modules as well
            return ast.Module([], [])


def _returns(function: ast.FunctionDef) -> bool:
    values = (node.value for node in ast.walk(function) if isinstance(node, ast.Return | ast.Yield))
    return any(value is not None and not (isinstance(value, ast.Constant) and value.value is None) for value in values)


def _messages(node: ast.Raise) -> Iterator[Message]:
    match node.exc:
        case ast.Call(ast.Name(name), [ast.Constant(str(text)), *_]):
            yield Message(name, text)
        case ast.Call(ast.Name(name), [ast.JoinedStr(parts), *_]):
            yield Message(name, "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts))


def verb() -> list[Example]:
    """The docstring of a function -> the verb that its name begins with."""
    return [
        Example(_tidy(function.doc), name)
        for function in harvest()[0]
        if (name := function.name.strip("_").split("_")[0]) in VERBS
    ]


def section() -> list[Example]:
    """A section of a docstring -> its title; without the marks that would give it away."""
    marks = re.compile(r">>>|\.\.\. |\.\. \[\d+\]|\[\d+\]_|:.*?:`|" + "|".join(SECTIONS), re.IGNORECASE)
    titles = re.compile(rf"^({'|'.join(SECTIONS)})\n-{{3,}}\n", re.MULTILINE)
    any_title = re.compile(r"^[A-Z][A-Za-z ]+\n-{3,}\n", re.MULTILINE)
    return [
        Example(_tidy(marks.sub(" ", any_title.split(function.doc[title.end() :])[0])), title[1])
        for function in harvest()[0]
        if function.library in NUMPYDOC
        for title in titles.finditer(function.doc)
    ]


def exception() -> list[Example]:
    """The message of an exception -> its type."""
    hidden = re.compile(r"\w*(Error|Exception)\b")
    return [
        Example(_tidy(hidden.sub("…", message.text)), message.exception)
        for message in harvest()[1]
        if message.exception in EXCEPTIONS
    ]


def match() -> list[Example]:
    """Arguments and the first words of a docstring -> whether they belong together; both classes of one library."""
    known = [function for function in harvest()[0] if len(function.arguments) > len("self, x")]
    return _pairs(
        known, lambda f: textwrap.shorten(f.arguments, 40, placeholder=" …"), lambda f: _tidy(f.doc), MATCHES
    )


def follows() -> list[Example]:
    """The first sentence of a docstring and a second one -> whether it is the next one of the same docstring."""
    known = [function for function in harvest()[0] if len(_sentences(function)) > 1]
    return _pairs(known, lambda f: _sentences(f)[0][:80], lambda f: _sentences(f)[1], FOLLOWS)


def _sentences(function: Function) -> list[str]:
    """Those that are long enough to say something, up to the first heading, list or code."""
    prose = re.split(r"\n-{3,}|\n\s*(?:[-*:>]|\.\.)|\n\w+:", function.doc)[0]
    return [sentence for sentence in re.split(r"(?<=[.!?]) ", _tidy(prose)) if len(sentence) >= SHORTEST]


def _pairs(
    functions: Iterable[Function],
    first: Callable[[Function], str],
    second: Callable[[Function], str],
    labels: tuple[str, str],
) -> list[Example]:
    """Two texts, drawn from functions of one library in pairs: half of the pairs keep what is theirs, half swap it."""
    functions, examples = list(functions), []
    for library in ("the standard library", *LIBRARIES):
        known = {f.doc[:SAME]: f for f in functions if f.library == library}
        some = random.Random(0).sample(sorted(known.values(), key=lambda f: (f.name, f.doc)), min(len(known), CAP))
        for number, (one, other) in enumerate(zip(some[::2], some[1::2], strict=False)):
            for function, text in ((one, one), (other, other)) if number % 2 else ((one, other), (other, one)):
                examples.append(Example(first(function), labels[function is text], second(text)))
    return examples


def library() -> list[Example]:
    """A docstring -> which library it is of; without the libraries' names."""
    names = re.compile(rf"\b(?:{'|'.join(LIBRARIES)}|scikit-learn|python|np|pd|hugging ?face|hf|hub)\b", re.IGNORECASE)
    return [Example(_tidy(names.sub("…", function.doc)), function.library) for function in harvest()[0]]


def returns() -> list[Example]:
    """The docstring of a function -> whether it returns a value; without the word."""
    word = re.compile(r"\b(?:returns?|yields?)\b", re.IGNORECASE)
    return [Example(_tidy(word.sub("…", f.doc)), RETURNS[not f.returns]) for f in harvest()[0]]


def method() -> list[Example]:
    """A docstring -> whether it is that of a method; without `self`."""
    word = re.compile(r"\b(?:self|cls)\b")
    return [
        Example(_tidy(word.sub("…", f.doc)), METHODS[f.arguments.split(",")[0] in ("self", "cls")])
        for f in harvest()[0]
    ]


RECIPES: dict[str, Callable[[], list[Example]]] = {
    "verb": verb,
    "section": section,
    "match": match,
    "exception": exception,
    "library": library,
    "returns": returns,
    "method": method,
    "follows": follows,
}


def examples(name: str) -> list[Example]:
    """Those of a task: every text once, classes of similar sizes, in random order."""
    once = {(e.second or e.text)[:SAME].lower(): e for e in reversed(RECIPES[name]())}
    rng = random.Random(0)
    chosen: list[Example] = []
    labels = sorted({e.label for e in once.values()})
    most = CAP * len(VERBS) // 2 if len(labels) == 2 else CAP
    for label in labels:
        mine = sorted(
            (e for e in once.values() if e.label == label and len(e.second or e.text) >= SHORTEST // 2),
            key=lambda e: (e.text, e.second or ""),
        )
        rng.shuffle(mine)
        chosen += mine[:most] if len(mine) >= LEAST else []
    rng.shuffle(chosen)
    return chosen


def _tidy(text: str) -> str:
    return " ".join(text.split())[:400]


def texts(some: Iterable[Example]) -> tuple[list[str], list[str] | None]:
    """As a tokenizer takes them: the first texts, and the second ones if there are any."""
    some = list(some)
    seconds = [e.second for e in some if e.second is not None]
    return [e.text for e in some], seconds or None
