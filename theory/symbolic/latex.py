r"""The LaTeX of a displayed formula, read back: what the page shows is what the check evaluates.

A small grammar, no more than the formulas of `theory.claims` need, and strict: a token that it does not know, or one
that is left over, is refused. `parse` gives chains of sides (`a = b = c`), which `theory.symbolic.printed` evaluates
on symbolic nets. Nothing here knows what a symbol means.

    chains      chain (, chain)*
    chain       side (relation side)*, relations = < > \le \ge \to \iff
    side        expression (\text{ or } expression)*
    expression  products joined by + and -; a product is factors side by side, with \cdot, \times or /
    factor      number, symbol with primes, index and (layer), group, \frac, \sqrt, derivative, \sum and \prod (which
                take the rest of their product), \max, \lim, a norm, an entry of the Hessian, a count #{x: ... = 0}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import NoReturn

from theory._refusals import refuse


@dataclass(frozen=True)
class Node:
    """A piece of a formula."""

    def walk(self) -> Iterator[Node]:
        """This node and all below."""
        yield self
        for field in fields(self):
            value = getattr(self, field.name)
            for child in value if isinstance(value, tuple) else (value,):
                if isinstance(child, Node):
                    yield from child.walk()


@dataclass(frozen=True)
class Number(Node):
    """An integer or a decimal, exactly."""

    value: Fraction


@dataclass(frozen=True)
class Symbol(Node):
    """A name with primes, indices (expressions, or `name = value`) and a layer, the superscript in round brackets."""

    name: str
    primes: int = 0
    index: tuple[Node, ...] = ()
    layer: Node | None = None


@dataclass(frozen=True)
class Call(Node):
    """A function at its arguments: σ''(z), ln(1 + x), max(x, 0), diag(...)."""

    function: Symbol
    arguments: tuple[Node, ...]


@dataclass(frozen=True)
class Operation(Node):
    """`+ - * / ^` on two parts, `neg` and `sqrt` on one."""

    operator: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Slope(Node):
    """(...)': the derivative of a group in x."""

    body: Node
    order: int


@dataclass(frozen=True)
class Derivative(Node):
    """∂^order body / ∂variable^order."""

    body: Node
    variable: Node
    order: int


@dataclass(frozen=True)
class Big(Node):
    """A sum or a product over `index`, from `low` to `high` where they are given."""

    kind: str
    index: str
    low: Node | None
    high: Node | None
    body: Node


@dataclass(frozen=True)
class Paths(Node):
    r"""A sum over paths from `start` to `end`: one path `P`, pairs `P,Q`, or different ones `P\ne Q`."""

    kind: str
    start: tuple[Node, Node]
    end: tuple[Node, Node]
    body: Node


@dataclass(frozen=True)
class Extreme(Node):
    """max over x of the body; `sup` as well."""

    body: Node


@dataclass(frozen=True)
class Limit(Node):
    """The limit of the body as `variable` tends to `target`."""

    variable: Symbol
    target: Node
    body: Node


@dataclass(frozen=True)
class Entry(Node):
    """An entry of the loss's Hessian, or with no index the whole Hessian."""

    index: tuple[Node, ...]


@dataclass(frozen=True)
class Norm(Node):
    """‖body‖₂."""

    body: Node


@dataclass(frozen=True)
class Count(Node):
    """#{variable : left = right}."""

    variable: Symbol
    left: Node
    right: Node


@dataclass(frozen=True)
class Absolute(Node):
    """|body|."""

    body: Node


@dataclass(frozen=True)
class Choice(Node):
    r"""One of several (`\text{ or }`)."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Chain(Node):
    """Sides and the relations between them."""

    sides: tuple[Node, ...]
    relations: tuple[str, ...]


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\[#{}|, ]|\d+(?:\.\d+)?|[a-zA-Z]|[-+=<>/|'^_{}()\[\],:]|\s+")
_GREEK = "alpha beta gamma delta theta sigma eta lambda mu ell Sigma"
_SYMBOLS = {f"\\{name}": name for name in _GREEK.split()} | {r"\infty": "oo"}
_FUNCTIONS = {r"\ln": "ln", r"\max": "max"}
_EXTREMES = (r"\max", r"\sup")
_SIZES = {r"\left", r"\right", r"\Bigl", r"\Bigr", r"\bigl", r"\bigr", r"\quad", r"\ ", r"\,", r"\textstyle"}
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\to": "->", r"\iff": "iff"}
_CALLABLE = {"sigma", "ln", "max", "diag"}
_CLOSING = {"(": ")", "[": "]", r"\{": r"\}", "|": "|", r"\|": r"\|"}


def tokens(latex: str) -> tuple[str, ...]:
    """The tokens that carry meaning; anything unknown is refused."""
    found, at = [], 0
    while at < len(latex):
        match = _TOKEN.match(latex, at)
        if match is None:
            refuse(f"no formula: {latex[at : at + 12]!r} at {at} of {latex!r}")
        at = match.end()
        token = match.group()
        if token in (r"\text", r"\operatorname", r"\hat"):
            end = (
                latex.index("}", at) + 1
                if latex[at : at + 1] == "{"
                else at + len(latex[at:]) - len(latex[at:].lstrip()) + 1
            )
            token, at = token + latex[at:end], end
        if not token.isspace() and token not in _SIZES:
            found.append(token)
    return tuple(found)


@lru_cache(maxsize=512)
def parse(latex: str) -> tuple[Chain, ...]:
    """All chains of a formula, separated by commas."""
    reader = _Reader(latex)
    chains = [reader.chain()]
    while reader.peek() == ",":
        reader.take()
        chains.append(reader.chain())
    if reader.peek():
        reader.wrong("is left over")
    return tuple(chains)


class _Reader:
    def __init__(self, latex: str) -> None:
        self.latex = latex
        self.tokens = tokens(latex)
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            self.wrong(f"stands where {wanted!r} should" if wanted else "ends the formula too early")
        self.at += 1
        return token

    def wrong(self, what: str) -> NoReturn:
        refuse(f"the formula {self.latex!r}: {self.peek() or 'its end'!r} (token {self.at + 1}) {what}")

    def chain(self) -> Chain:
        sides, relations = [self.side()], []
        while self.peek() in _RELATIONS:
            relations.append(_RELATIONS[self.take()])
            sides.append(self.side())
        return Chain(tuple(sides), tuple(relations))

    def side(self) -> Node:
        options = [self.expression()]
        while self.peek().startswith(r"\text"):
            if self.take() != r"\text{ or }":
                self.wrong("follows a word that is not read")
            options.append(self.expression())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def expression(self) -> Node:
        if self.peek() == "-":
            self.take()
            found: Node = Operation("neg", (self.product(),))
        else:
            found = self.product()
        while self.peek() in ("+", "-"):
            found = Operation(self.take(), (found, self.product()))
        return found

    def product(self) -> Node:
        found = self.factor()
        while self.starts_factor() or self.peek() in (r"\cdot", r"\times", "/"):
            operator = "*"
            if self.peek() in (r"\cdot", r"\times", "/"):
                operator = "/" if self.take() == "/" else "*"
            found = Operation(operator, (found, self.factor()))
        return found

    def starts_factor(self) -> bool:
        token = self.peek()
        known = {r"\frac", r"\sum", r"\prod", r"\sqrt", r"\lim", r"\sup", r"\nabla", r"\#", "(", "["}
        return token in known or token in _SYMBOLS or token in _FUNCTIONS or token[:1].isalnum() or token[:4] == r"\ope"

    def factor(self) -> Node:
        found = self.base()
        while self.peek() == "^":
            self.take()
            found = Operation("^", (found, self.argument()))
        return found

    def argument(self) -> Node:
        """{expression}, or a single token."""
        if self.peek() == "{":
            self.take()
            found = self.expression()
            self.take("}")
            return found
        token = self.take()
        if re.fullmatch(r"\d+", token):
            return Number(Fraction(token))
        if token.isalpha():
            return Symbol(token)
        if token in _SYMBOLS:
            return Symbol(_SYMBOLS[token])
        self.at -= 1
        self.wrong("is no argument")

    def base(self) -> Node:
        token = self.peek()
        if re.fullmatch(r"\d+(\.\d+)?", token):
            return Number(Fraction(self.take()))
        if token in ("(", "["):
            return self.group()
        if token == r"\frac":
            return self.fraction()
        if token == r"\sqrt":
            self.take()
            return Operation("sqrt", (self.argument(),))
        if token in (r"\sum", r"\prod"):
            return self.big()
        if token in _EXTREMES and self.peek(1) != "(":
            self.take()
            if self.peek() == "_":
                self.take()
                if self.argument() != Symbol("x"):
                    self.wrong("follows a maximum over something else than x")
            return Extreme(self.product())
        if token == r"\lim":
            return self.limit()
        if token == r"\|":
            self.take()
            body = self.expression()
            self.take(r"\|")
            self.take("_")
            self.take("2")
            return Norm(body)
        if token == "|":
            self.take()
            body = self.expression()
            self.take("|")
            return Absolute(body)
        if token == r"\#":
            return self.count()
        if token == r"\nabla":
            self.hessian()
            return Entry(())
        if token in _SYMBOLS or token in _FUNCTIONS or token.isalpha() or token.startswith(r"\operatorname"):
            return self.symbol()
        self.wrong("cannot stand here")

    def group(self) -> Node:
        opening = self.take()
        if opening == "[" and self.peek() == r"\nabla":
            self.hessian()
            self.take("]")
            return Entry(self.indices())
        body = self.expression()
        self.take(_CLOSING[opening])
        order = self.primes()
        return Slope(body, order) if order else body

    def hessian(self) -> None:
        for wanted in (r"\nabla", "^", "2", "_", r"\theta", r"\hat L"):
            self.take(wanted)

    def primes(self) -> int:
        count = 0
        while self.peek() == "'":
            self.take()
            count += 1
        return count

    def symbol(self) -> Node:
        token = self.take()
        name = _SYMBOLS.get(token) or _FUNCTIONS.get(token) or token
        if token.startswith(r"\operatorname"):
            name = token[len(r"\operatorname{") : -1]
        primes = self.primes()
        index: tuple[Node, ...] = ()
        layer: Node | None = None
        while self.peek() == "_" or (self.peek() == "^" and self.peek(1) == "{" and self.peek(2) == "("):
            if self.peek() == "_":
                if index:
                    self.wrong("is a second index")
                index = self.indices()
            else:
                if layer is not None:
                    self.wrong("is a second layer")
                for wanted in ("^", "{", "("):
                    self.take(wanted)
                layer = self.expression()
                self.take(")")
                self.take("}")
        found = Symbol(name, primes, index, layer)
        if name in _CALLABLE and self.peek() == "(":
            self.take()
            arguments = [self.expression()]
            while self.peek() == ",":
                self.take()
                arguments.append(self.expression())
            self.take(")")
            return Call(found, tuple(arguments))
        return found

    def indices(self) -> tuple[Node, ...]:
        r"""_i, _{ti}, _{i_{s+1},i_s}, _{\beta=0}, _{W_i,W_i}: indices side by side or with commas."""
        self.take("_")
        if self.peek() != "{":
            return (self.argument(),)
        self.take()
        found: list[Node] = []
        while self.peek() != "}":
            piece: Node = self.index()
            if self.peek() == "=":
                self.take()
                piece = Chain((piece, self.index()), ("=",))
            found.append(piece)
            if self.peek() == ",":
                self.take()
        self.take("}")
        return tuple(found)

    def index(self) -> Node:
        """One index: a number, or a symbol, with + or - a number."""
        token = self.peek()
        found: Node
        if re.fullmatch(r"\d+", token):
            found = Number(Fraction(self.take()))
        elif token.isalpha() or token in _SYMBOLS:
            found = self.symbol()
        else:
            self.wrong("is no index")
        while self.peek() in ("+", "-"):
            found = Operation(self.take(), (found, self.index()))
        return found

    def fraction(self) -> Node:
        self.take(r"\frac")
        if not (self.peek() == "{" and self.peek(1) == r"\partial"):
            return Operation("/", (self.argument(), self.argument()))
        self.take("{")
        self.take(r"\partial")
        order = 1
        if self.peek() == "^":
            self.take()
            number = self.argument()
            if not isinstance(number, Number):
                self.wrong("follows an order that is no number")
            order = int(number.value)
        body = self.expression()
        for wanted in ("}", "{", r"\partial"):
            self.take(wanted)
        variable = self.factor()
        self.take("}")
        if order > 1:
            if not (isinstance(variable, Operation) and variable.operator == "^"):
                self.wrong(f"follows a derivative of order {order} above, 1 below")
            variable, power = variable.parts
            if power != Number(Fraction(order)):
                self.wrong("follows a derivative of different orders above and below")
        if not isinstance(variable, Symbol):
            self.wrong("follows a derivative in something that is no variable")
        return Derivative(body, variable, order)

    def big(self) -> Node:
        kind = self.take()[1:]
        self.take("_")
        if self.peek() != "{":
            name = self.argument()
            return Big(kind, _name(name, self), None, None, self.product())
        if self.peek(1) in ("P",):
            return self.paths(kind)
        self.take("{")
        name = self.symbol()
        low = high = None
        if self.peek() == "=":
            self.take()
            low = self.expression()
        self.take("}")
        if self.peek() == "^":
            self.take()
            high = self.argument()
        if (low is None) != (high is None):
            self.wrong("follows a sum with one end only")
        return Big(kind, _name(name, self), low, high, self.product())

    def paths(self, kind: str) -> Node:
        if kind != "sum":
            self.wrong("stands in a product over paths")
        self.take("{")
        self.take("P")
        which = "P"
        if self.peek() in (",", r"\ne"):
            which = "P,Q" if self.take() == "," else "P!=Q"
            self.take("Q")
        self.take(":")
        start = self.place()
        self.take(r"\to")
        end = self.place()
        self.take("}")
        return Paths(which, start, end, self.product())

    def place(self) -> tuple[Node, Node]:
        self.take("(")
        layer = self.expression()
        self.take(",")
        neuron = self.expression()
        self.take(")")
        return layer, neuron

    def limit(self) -> Node:
        for wanted in (r"\lim", "_", "{"):
            self.take(wanted)
        variable = self.symbol()
        self.take(r"\to")
        target: Node
        if self.peek() == r"\infty":
            self.take()
            target = Symbol("oo")
        else:
            target = self.expression()
        self.take("}")
        if not isinstance(variable, Symbol):
            self.wrong("follows a limit in something that is no symbol")
        return Limit(variable, target, self.product())

    def count(self) -> Node:
        for wanted in (r"\#", r"\{"):
            self.take(wanted)
        variable = self.symbol()
        self.take(":")
        left = self.expression()
        self.take("=")
        right = self.expression()
        self.take(r"\}")
        if not isinstance(variable, Symbol):
            self.wrong("follows a set of something that is no symbol")
        return Count(variable, left, right)


def _name(node: Node, reader: _Reader) -> str:
    if not isinstance(node, Symbol) or node.index or node.layer is not None:
        reader.wrong("follows a sum over something that is no plain index")
    return node.name
