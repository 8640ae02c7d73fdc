"""Displayed formulas evaluated: each side of a claim's LaTeX, read by `theory.symbolic.latex`, on a symbolic net.

The left side names what is meant, and its value comes from differentiating the net, the loss or the family itself;
the right sides are computed from the LaTeX alone. `identities(claim)` subtracts them in every case of the claim: every
layer, parameter or β. So there is one source: change the formula that a reader sees and its difference is no longer
zero, or it means nothing and is refused.

    FamilyWorld   x, α, σ_{α,β} and its derivatives                                E[1]-E[6], section 3.1, figure 2
    ShallowWorld  the net of E[10], ½(f - y)² differentiated as it stands          E[9]-E[18]
    NormWorld     p symbols for the entries of the diagonal                        E[8], section 2.4
    DeepWorld     the net of E[19] with σ', σ'' named: polynomials                 E[7], E[19]-E[33], docs/derivation.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import sympy as sp

from theory._refusals import refuse
from theory.claims import BY_ID
from theory.symbolic import latex, rct
from theory.symbolic.deep import DeepNet
from theory.symbolic.deep_identities import LayerIdentity, R, parameter_derivatives, whole_net
from theory.symbolic.functions import sigma, sigma1, sigma2
from theory.symbolic.latex import Chain, Node, Symbol
from theory.symbolic.one_hidden_layer import OneHiddenLayer, network
from theory.symbolic.rct import Identity, zero

Expr = Any
Env = dict[Any, int]
SIGMAS = (sigma, sigma1, sigma2)
Y = sp.Symbol("y")


def formula_of(claim: str) -> str:
    """The LaTeX that a reader is shown."""
    return BY_ID[claim].formula


def chains(claim: str) -> tuple[Chain, ...]:
    """The same, read."""
    return latex.parse(formula_of(claim))


def number_in(claim: str, side: int = -1) -> sp.Expr:
    """The number on one side of a claim's formula, ∞ included."""
    node = chains(claim)[-1].sides[side]
    return FamilyWorld().value(node, {})


class World:
    """Arithmetic, sums and indices, which mean the same everywhere; symbols are the worlds' own."""

    def value(self, node: Node, env: Env) -> Expr:
        """What a piece of a formula is worth."""
        if isinstance(node, latex.Number):
            return sp.Rational(node.value.numerator, node.value.denominator)
        if isinstance(node, latex.Operation):
            return self._operation(node, env)
        if isinstance(node, latex.Big):
            return self._big(node, env)
        method = getattr(self, f"on_{type(node).__name__.lower()}", None)
        if method is None:
            refuse(f"a {type(node).__name__.lower()} has no meaning in this formula: {node}")
        return method(node, env)

    def number(self, node: Node, env: Env) -> int:
        """An index or a layer."""
        if isinstance(node, latex.Number) and node.value.denominator == 1:
            return int(node.value)
        if isinstance(node, latex.Operation) and node.operator in ("+", "-"):
            a, b = (self.number(part, env) for part in node.parts)
            return a + b if node.operator == "+" else a - b
        if isinstance(node, Symbol) and not node.primes and node.layer is None:
            key: Any = node.name
            if node.index:
                key = (node.name, *(self.number(i, env) for i in node.index))
            if key in env:
                return env[key]
        refuse(f"{node} is no index that is known here; known: {sorted(map(str, env))}")

    def _operation(self, node: latex.Operation, env: Env) -> Expr:
        parts = [self.value(part, env) for part in node.parts]
        if node.operator == "neg":
            return -parts[0]
        if node.operator == "sqrt":
            return sp.sqrt(parts[0])
        a, b = parts
        if node.operator == "+":
            return a + b
        if node.operator == "-":
            return a - b
        if node.operator == "*":
            return a * b
        return a / b if node.operator == "/" else a**b

    def _big(self, node: latex.Big, env: Env) -> Expr:
        if node.index in env:
            refuse(f"the index {node.index} is taken already")
        if node.low is not None and node.high is not None:
            steps = range(self.number(node.low, env), self.number(node.high, env) + 1)
        else:
            steps = range(*self.reach(node.index, node.body, env))
        parts = [self.value(node.body, env | {node.index: k}) for k in steps]
        return sp.Add(*parts) if node.kind == "sum" else sp.Mul(*parts)

    def reach(self, index: str, body: Node, env: Env) -> tuple[int, int]:
        """First and one past the last value of an index whose sum names no ends."""
        refuse(f"the sum over {index} has no ends here: {body}")

    def chain(self, chain: Chain, env: Env) -> Iterator[Expr]:
        """First side minus each of the others; every relation must be an equality."""
        if set(chain.relations) != {"="}:
            refuse(f"equalities are compared, not {chain.relations}")
        first = self.value(chain.sides[0], env)
        for side in chain.sides[1:]:
            yield first - self.value(side, env)


# The family ----------------------------------------------------------------------------------------------------------


class FamilyWorld(World):
    """σ_{α,β}(x) by the recursion; β from the index, or `beta` where the index says β."""

    def __init__(self, beta: int | None = None) -> None:
        self.beta = beta

    def on_symbol(self, node: Symbol, env: Env) -> Expr:
        """x, α, β, e."""
        plain = {"x": rct.x, "alpha": rct.alpha, "e": sp.E, "oo": sp.oo}
        if node.primes or node.index or node.layer is not None:
            refuse(f"{node.name} with primes, index or layer means nothing in the family")
        if node.name == "beta" and self.beta is not None:
            return sp.Integer(self.beta)
        if node.name not in plain:
            refuse(f"{node.name!r} means nothing in the family")
        return plain[node.name]

    def member(self, node: Symbol) -> tuple[Expr, int]:
        """α and β of σ with its index: {β=0}, β, {α,β}, {1,0}, {50,β}."""
        index = node.index
        if node.name != "sigma" or node.layer is not None:
            refuse(f"{node.name!r} is no member of the family")
        if len(index) == 1 and isinstance(index[0], Chain):
            name, given = index[0].sides
            if name != Symbol("beta"):
                refuse(f"the index of sigma names {name}, not beta")
            return rct.alpha, int(self.value(given, {}))
        if len(index) == 1:
            return rct.alpha, int(self.value(index[0], {}))
        if len(index) == 2:
            return self.value(index[0], {}), int(self.value(index[1], {}))
        refuse("sigma needs its beta as an index")

    def on_call(self, node: latex.Call, env: Env) -> Expr:
        """σ, σ', σ'' at a point; ln; max."""
        arguments = [self.value(a, env) for a in node.arguments]
        if node.function.name == "ln" and node.function == Symbol("ln") and len(arguments) == 1:
            return sp.log(arguments[0])
        if node.function == Symbol("max"):
            return sp.Max(*arguments)
        alpha, beta = self.member(node.function)
        if len(arguments) != 1 or beta not in (0, 1, 2):
            refuse("sigma takes one argument and a beta of 0, 1 or 2")
        shape = sp.diff(rct.rct(beta), rct.x, node.function.primes)
        return shape.subs(rct.alpha, alpha).subs(rct.x, arguments[0])

    def on_slope(self, node: latex.Slope, env: Env) -> Expr:
        """(...)': d/dx."""
        return sp.diff(self.value(node.body, env), rct.x, node.order)

    def on_extreme(self, node: latex.Extreme, env: Env) -> Expr:
        """Max over x of σ''_{α,β}, where `maxima` proves it."""
        from theory.symbolic.maxima import maximum_at_zero

        body = node.body
        if isinstance(body, latex.Call) and body.arguments == (Symbol("x"),):
            body = body.function
        if not isinstance(body, Symbol) or body.primes != 2:
            refuse("only the maximum of sigma'' is known")
        alpha, beta = self.member(body)
        proof = maximum_at_zero(beta)
        if not proof.proved:
            refuse(f"the maximum of sigma'' is not proved for beta = {beta}")
        return proof.value.subs(rct.alpha, alpha)

    def on_limit(self, node: latex.Limit, env: Env) -> Expr:
        """α -> oo, as a function of the sign of x: σ -> max(x, 0)."""
        if node.variable != Symbol("alpha") or node.target != Symbol("oo"):
            refuse("only the limit alpha -> oo is known")
        if not isinstance(node.body, latex.Call) or node.body.function.primes or node.body.arguments != (Symbol("x"),):
            refuse("only the limit of sigma(x) is known")
        alpha, beta = self.member(node.body.function)
        if alpha != rct.alpha:
            refuse("the limit is one in the sharpness of sigma")
        positive, negative = rct.sharp_limit(beta)
        p = next(iter(positive.free_symbols))
        if (positive, negative) != (p, 0):
            return sp.nan
        return sp.Max(rct.x, 0)

    def on_count(self, node: latex.Count, env: Env) -> Expr:
        """Zeros of σ''' where `extrema` settles their number."""
        from theory.symbolic.extrema import extrema

        call = node.left
        if node.variable != Symbol("x") or self.value(node.right, env) != 0:
            refuse("only zeros in x are counted")
        if not isinstance(call, latex.Call) or call.function.primes != 3 or call.arguments != (Symbol("x"),):
            refuse("only the zeros of sigma''' are counted")
        found = extrema(self.member(call.function)[1])
        if not found.exact:
            refuse("the number of zeros is not settled")
        return sp.Integer(found.count)


def _vanishes(difference: Expr) -> Expr:
    """The difference in normal form: rational functions of x, α, e^{αx} by polynomials, logarithms as they are."""
    difference = sp.sympify(difference)
    if difference == 0:
        return difference
    if difference.has(sp.Max, sp.log):
        return sp.simplify(difference)
    somewhere = sp.N(difference.subs({rct.x: sp.Rational(1, 3), rct.alpha: 2}), 40)
    if somewhere.is_number and abs(somewhere) > sp.Float("1e-20"):
        return difference  # certainly not zero: the normal form may take long and would say no more
    return zero(difference)


# One hidden layer ----------------------------------------------------------------------------------------------------


class ShallowWorld(World):
    """E[10] with d inputs and m neurons; everything else is differentiated. θ is the parameter `theta`."""

    def __init__(self, inputs: int = 3, neurons: int = 2, theta: Expr = None) -> None:
        self.net: OneHiddenLayer = network(inputs, neurons)
        self.inputs, self.neurons, self.theta = inputs, neurons, theta

    def on_symbol(self, node: Symbol, env: Env) -> Expr:
        """The symbols of section A.3.1."""
        net = self.net
        layer = None if node.layer is None else self.number(node.layer, env)
        if node.name == "theta" and node.index == (Symbol("k"),) and self.theta is not None and not node.primes:
            return self.theta
        at = tuple(self.number(i, env) for i in node.index)
        sizes = {
            ("f", None): (net.f, 0),
            ("y", None): (net.y, 0),
            ("z", None): (net.z, 1),
            ("h", None): (tuple(sigma(z) for z in net.z), 1),
            ("x", None): (net.x, 1),
            ("W", 1): (net.w1, 2),
            ("W", 2): (net.w2, 1),
            ("b", 1): (net.b1, 1),
            ("b", 2): (net.b2, 0),
        }
        found, depth = sizes.get((node.name, layer), (None, 0))
        if node.primes or len(at) != depth or found is None:
            refuse(f"{node.name} with layer {layer} and {len(at)} indices means nothing in a net with one hidden layer")
        for k in at:
            if not 0 <= k < len(found):
                refuse(f"{node.name} has no index {k + 1} here")
            found = found[k]
        return found

    def reach(self, index: str, body: Node, env: Env) -> tuple[int, int]:
        """An index of a neuron, or of an input where it stands second in W^(1) or at x."""
        for node in body.walk():
            if isinstance(node, Symbol) and Symbol(index) in node.index:
                second = node.name == "W" and node.index.index(Symbol(index)) == 1
                return (0, self.inputs) if node.name == "x" or second else (0, self.neurons)
        return super().reach(index, body, env)

    def on_call(self, node: latex.Call, env: Env) -> Expr:
        """σ, σ', σ''."""
        return SIGMAS[_order(node)](self.value(node.arguments[0], env))

    def on_derivative(self, node: latex.Derivative, env: Env) -> Expr:
        """By sympy."""
        return sp.diff(self.value(node.body, env), self.value(node.variable, env), node.order)

    def on_entry(self, node: latex.Entry, env: Env) -> Expr:
        """Second derivative of ½(f - y)² in one parameter."""
        if node.index == (Symbol("k"), Symbol("k")) and self.theta is not None:
            return sp.diff(self.net.loss, self.theta, 2)
        if len(node.index) != 2 or node.index[0] != node.index[1]:
            refuse(f"the entry {node.index} is none of the diagonal")
        return sp.diff(self.net.loss, self.value(node.index[0], env), 2)


def _order(node: latex.Call) -> int:
    function = node.function
    if function.name != "sigma" or function.index or function.layer is not None or len(node.arguments) != 1:
        refuse(f"{function.name} with an index, or of several arguments, is no activation")
    if function.primes > 2:
        refuse("third derivatives of sigma occur nowhere")
    return function.primes


# The norm ------------------------------------------------------------------------------------------------------------


class NormWorld(World):
    """`parameters` positive symbols h_1, h_2, ... for the entries of the diagonal."""

    def __init__(self, parameters: int = 4) -> None:
        self.p = parameters
        self.h = sp.symbols(f"h1:{parameters + 1}", positive=True)

    def on_symbol(self, node: Symbol, env: Env) -> Expr:
        """p, and h with or without an index."""
        if node == Symbol("p"):
            return sp.Integer(self.p)
        if node.name == "h" and len(node.index) == 1 and not node.primes and node.layer is None:
            return self.h[self.number(node.index[0], env) - 1]
        refuse(f"{node.name!r} means nothing beside a norm")

    def number(self, node: Node, env: Env) -> int:
        """P is a number here."""
        return self.p if node == Symbol("p") else super().number(node, env)

    def reach(self, index: str, body: Node, env: Env) -> tuple[int, int]:
        """All entries."""
        return (1, self.p + 1)

    def on_entry(self, node: latex.Entry, env: Env) -> Expr:
        """H_kk, or the whole Hessian with 0 off its diagonal."""
        if not node.index:
            return sp.diag(*self.h)
        if len(node.index) != 2 or node.index[0] != node.index[1]:
            refuse(f"the entry {node.index} is none of the diagonal")
        return self.h[self.number(node.index[0], env) - 1]

    def on_call(self, node: latex.Call, env: Env) -> Expr:
        """Diag of a matrix, as a column."""
        if node.function != Symbol("diag") or len(node.arguments) != 1:
            refuse(f"{node.function.name!r} is no function beside a norm")
        return self.value(node.arguments[0], env).diagonal().T

    def on_norm(self, node: latex.Norm, env: Env) -> Expr:
        """The root of the sum of squares."""
        return sp.sqrt(sum(v**2 for v in self.value(node.body, env)))


# Deep nets -----------------------------------------------------------------------------------------------------------


@dataclass
class DeepWorld(World):
    """E[19] with hidden `widths`: δ, D, H by differentiating the net, with σ', σ'' named u, v.

    `theta` places θ_k; `recursion` names the claim by whose own formula D is computed (None: D is the exact ∂δ/∂z);
    `raw` keeps σ(z) as it is, for the forward pass.
    """

    widths: tuple[int, ...]
    theta: tuple[int, Expr, Expr, dict[str, Expr]] | None = None
    recursion: str | None = None
    raw: dict[tuple[int, int], Expr] | None = None
    side: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.net = DeepNet(self.widths)

    def width(self, layer: int) -> int:
        """n_l; one input."""
        if not 0 <= layer <= self.net.depth:
            refuse(f"there is no layer {layer} in a net of {self.net.depth}")
        return self.net.width(layer) if layer else 1

    def chain(self, chain: Chain, env: Env) -> Iterator[Expr]:
        """The left side is exact; only on the right may D stand for the recursion."""
        if set(chain.relations) != {"="}:
            refuse(f"equalities are compared, not {chain.relations}")
        self.side = 0
        first = self.value(chain.sides[0], env)
        for self.side, side in enumerate(chain.sides[1:], 1):
            yield first - self.value(side, env)
        self.side = 0

    def number(self, node: Node, env: Env) -> int:
        """L is the depth."""
        return self.net.depth if node == Symbol("L") else super().number(node, env)

    def reach(self, index: str, body: Node, env: Env) -> tuple[int, int]:
        """As wide as the layer at which the index stands."""
        for node in body.walk():
            if isinstance(node, Symbol) and Symbol(index) in node.index:
                if node.layer is None:
                    continue
                if {n.name for n in node.layer.walk() if isinstance(n, Symbol)} - {*env, "L"}:
                    continue  # a layer that is bound further in: another place says more
                layer = self.number(node.layer, env)
                second = node.name == "W" and node.index.index(Symbol(index)) == 1
                return (0, self.width(layer - second))
        return super().reach(index, body, env)

    def _place(self, node: Symbol, env: Env, indices: int) -> tuple[int, ...]:
        if node.layer is None or len(node.index) != indices or node.primes:
            refuse(f"{node.name} needs a layer and {indices} indices here")
        layer = self.number(node.layer, env)
        at = tuple(self.number(i, env) for i in node.index)
        for k, i in enumerate(at):
            if not 0 <= i < self.width(layer - (node.name == "W" and k == 1)):
                refuse(f"{node.name} has no index {i} in layer {layer}")
        return (layer, *at)

    def _neuron(self, node: Symbol, env: Env) -> tuple[int, int]:
        layer, i = self._place(node, env, 1)
        return layer, i

    def on_symbol(self, node: Symbol, env: Env) -> Expr:
        """The symbols of section A.1."""
        net, name = self.net, node.name
        if node == Symbol("f"):
            return Y + R if self.raw is None else sp.Matrix([self.raw[net.depth, 0]])
        if node == Symbol("y"):
            return Y
        if node == Symbol("c", index=(Symbol("k"),)) and self.theta is not None:
            return self.theta[2]
        if node == Symbol("theta", index=(Symbol("k"),)) and self.theta is not None:
            return self.theta[1]
        if self.raw is not None:
            return self._raw_symbol(node, env)
        if name == "W":
            return net.weight(*self._place(node, env, 2))
        if name == "I":
            a, b = (self.number(i, env) for i in node.index)
            return sp.Integer(a == b)
        if name == "H":
            layer, i, j = self._place(node, env, 2)
            return exact_second(self.widths, layer, i, j)
        if name == "D" and node.layer is not None and not node.index and self.number(node.layer, env) == net.depth:
            return exact_second(self.widths, net.depth, 0, 0)
        if name == "delta" and node.layer is not None and not node.index and self.number(node.layer, env) == net.depth:
            return exact_first(self.widths, net.depth, 0)
        layer, i = self._place(node, env, 1)
        if name == "delta":
            return exact_first(self.widths, layer, i)
        if name == "B":
            return recursive("E28", formula_of("E28"), self.widths, layer, i)
        if name == "S":
            return exact_tail(self.widths, layer, i)
        if name == "D":
            if self.recursion is None or self.side == 0:
                return exact_second(self.widths, layer, i, i)
            return recursive(self.recursion, formula_of(self.recursion), self.widths, layer, i)
        if name == "h":
            return sp.Symbol("x") if layer == 0 else sp.Symbol(f"h{layer}_{i}")
        refuse(f"{name!r} means nothing in a deep net")

    def _raw_symbol(self, node: Symbol, env: Env) -> Expr:
        """Whole layers as columns, or single neurons, of the forward pass."""
        assert self.raw is not None
        if node == Symbol("x"):
            return sp.Matrix([sp.Symbol("x")])
        if node.layer is None or node.primes:
            refuse(f"{node.name!r} means nothing in the forward pass")
        layer = self.number(node.layer, env)
        rows = range(self.width(layer))
        if node.name == "W":
            weights = sp.Matrix(len(rows), self.width(layer - 1), lambda a, b: self.net.weight(layer, a, b))
            return weights if not node.index else weights[tuple(self.number(i, env) for i in node.index)]
        columns: dict[str, Callable[[int], Expr]] = {
            "z": lambda i: self.raw[layer, i],  # type: ignore[index]
            "h": lambda i: sp.Symbol("x") if layer == 0 else sigma(self.raw[layer, i]),  # type: ignore[index]
            "b": lambda i: sp.Symbol(f"b{layer}_{i}"),
        }
        if node.name not in columns:
            refuse(f"{node.name!r} means nothing in the forward pass")
        if len(node.index) == 1:
            return columns[node.name](self.number(node.index[0], env))
        column = sp.Matrix([columns[node.name](i) for i in rows])
        return column

    def on_call(self, node: latex.Call, env: Env) -> Expr:
        """σ' and σ'' at a pre-activation; σ in the forward pass."""
        order, (at,) = _order(node), node.arguments
        if self.raw is not None:
            argument = self.value(at, env)
            if order:
                refuse("the forward pass holds no derivative")
            return argument.applyfunc(sigma) if isinstance(argument, sp.MatrixBase) else sigma(argument)
        if not isinstance(at, Symbol) or at.name != "z" or order == 0:
            refuse("sigma' and sigma'' stand at a pre-activation z")
        layer, i = self._place(at, env, 1)
        if not 0 < layer < self.net.depth:
            refuse(f"layer {layer} has no activation")
        return self.net.u(layer, i) if order == 1 else self.net.v(layer, i)

    def on_derivative(self, node: latex.Derivative, env: Env) -> Expr:
        """∂z/∂z, ∂δ/∂z, and z, f, c in θ_k."""
        body, variable = node.body, node.variable
        if not isinstance(body, Symbol) or not isinstance(variable, Symbol):
            refuse("a derivative is one of a single symbol")
        if variable.name == "theta" and variable.index == (Symbol("k"),) and self.theta is not None:
            return self._in_theta(body, node.order, env)
        if variable.name != "z" or node.order != 1:
            refuse("derivatives are taken once in z, or in theta_k")
        below, above = self._neuron(variable, env), self._neuron(body, env)
        if body.name == "delta":
            return gradient_slope(self.widths, above, below)
        if body.name == "z":
            return slope(self.widths, above, below)
        refuse(f"the derivative of {body.name} in z is not known")

    def _in_theta(self, body: Symbol, order: int, env: Env) -> Expr:
        assert self.theta is not None
        layer, parameter, _, found = self.theta
        if body == Symbol("f") and order in (1, 2):
            return found["first" if order == 1 else "second"]
        if order != 1:
            refuse("only f is differentiated twice in theta_k")
        if body == Symbol("c", index=(Symbol("k"),)):
            return sp.diff(whole_net(self.widths)[layer, 0], parameter, 2)
        if body.name == "z" and self._place(body, env, 1) == (layer, 0):
            return found["z"]
        refuse(f"the derivative of {body.name} in theta_k is not known")

    def on_entry(self, node: latex.Entry, env: Env) -> Expr:
        """∂²/∂θ_k² of ½(f - y)²."""
        if node.index != (Symbol("k"), Symbol("k")) or self.theta is None:
            refuse(f"the entry {node.index} is none of the diagonal")
        return self.theta[3]["entry"]

    def on_choice(self, node: latex.Choice, env: Env) -> Expr:
        """E[21]: the first for a weight, the second for a bias."""
        if self.theta is None or len(node.options) != 2:
            refuse("two options belong to a weight and a bias")
        return self.value(node.options[str(self.theta[1]).startswith("b")], env)

    def on_paths(self, node: latex.Paths, env: Env) -> Expr:
        """Σ over paths (l,i) -> (r,j) and over j: single ones (i_s), or pairs (p_s, q_s), all or different."""
        l, i = (self.number(part, env) for part in node.start)
        r, end = self.number(node.end[0], env), node.end[1]
        if not isinstance(end, Symbol) or end.index or end.name in env:
            refuse("a path ends at a neuron that the sum runs over")
        total = []
        for j in range(self.width(r)):
            paths = self.net.paths(l, i, r, j)
            here = env | {end.name: j}
            if node.kind == "P":
                choices = [_steps(here, l, i=path) for path in paths]
            else:
                pairs = [(p, q) for p, q in product(paths, repeat=2) if node.kind == "P,Q" or p != q]
                choices = [_steps(here, l, p=p, q=q) for p, q in pairs]
            total += [sp.expand(self.value(node.body, chosen)) for chosen in choices]
        return sp.Add(*total)


def _steps(env: Env, start: int, **paths: tuple[int, ...]) -> Env:
    found = dict(env)
    for name, path in paths.items():
        found |= {(name, start + k): neuron for k, neuron in enumerate(path)}
    return found


@lru_cache(maxsize=4096)
def exact_first(widths: tuple[int, ...], layer: int, i: int) -> Expr:
    """∂f/∂z_i^(l), by differentiating."""
    net = DeepNet(widths)
    return net.exact_gradient(layer, i) if layer < net.depth else sp.Integer(1)


@lru_cache(maxsize=4096)
def exact_second(widths: tuple[int, ...], layer: int, i: int, j: int) -> Expr:
    """∂²f/∂z_i∂z_j of one layer, by differentiating; 0 at the output, since f is z^(L)."""
    net = DeepNet(widths)
    return net.exact_hessian(layer, i, j) if layer < net.depth else sp.Integer(0)


@lru_cache(maxsize=4096)
def exact_tail(widths: tuple[int, ...], layer: int, i: int) -> Expr:
    """S_i^(l) = ∂f/∂h_i^(l) = Σ_t δ_t W_ti, as the text below E[28] defines it."""
    net = DeepNet(widths)
    if layer >= net.depth:
        refuse(f"S belongs to hidden layers; {layer} is none")
    terms = (exact_first(widths, layer + 1, t) * net.weight(layer + 1, t, i) for t in range(net.width(layer + 1)))
    return sp.expand(sp.Add(*terms))


@lru_cache(maxsize=4096)
def slope(widths: tuple[int, ...], above: tuple[int, int], below: tuple[int, int]) -> Expr:
    """∂z_t^(r)/∂z_i^(l), by differentiating the forward pass from layer l."""
    net = DeepNet(widths)
    if not below[0] <= above[0]:
        refuse("z of a lower layer does not depend on a higher one")
    z = net.forward(below[0])
    return net.named(sp.diff(z[above], net.z(*below)), z)


@lru_cache(maxsize=4096)
def gradient_slope(widths: tuple[int, ...], above: tuple[int, int], below: tuple[int, int]) -> Expr:
    """∂δ_t^(r)/∂z_i^(l): δ as a function of z^(r), which is put in as a function of z^(l)."""
    net = DeepNet(widths)
    if above[0] == below[0]:
        return exact_second(widths, above[0], above[1], below[1])
    if above[0] != below[0] + 1:
        refuse("the derivative of a gradient is taken in its own layer or in the one below")
    if above[0] == net.depth:
        return sp.Integer(0)
    z, lifted = net.forward(below[0]), net.forward(above[0])
    gradient = sp.diff(lifted[net.depth, 0], net.z(*above))
    inside = {net.z(above[0], s): z[above[0], s] for s in range(net.width(above[0]))}
    return net.named(sp.diff(gradient.xreplace(inside), net.z(*below)), z)


@lru_cache(maxsize=4096)
def recursive(claim: str, formula: str, widths: tuple[int, ...], layer: int, i: int) -> Expr:
    """D_i^(l) by the last side of a claim's own formula, applied from D^(L) = 0 downwards."""
    world = DeepWorld(widths, recursion=claim)
    if layer == world.net.depth:
        return sp.Integer(0)
    world.side = 1
    return sp.expand(world.value(latex.parse(formula)[-1].sides[-1], {"l": layer, "i": i}))


# Claims --------------------------------------------------------------------------------------------------------------

FAMILY: dict[str, tuple[int | None, ...]] = {
    **{f"E{n}": (None,) for n in range(1, 7)},
    **{f"S3.1.{name}": (None,) for name in ("alpha-over-4", "alpha-over-2", "alpha", "is-softplus", "is-swish")},
    "S3.1.linear-in-alpha": (0, 1, 2),
    "S3.1.rectification": (0, 1, 2),
    "F2.even": (0, 1, 2),
    "S4.2.2beta+1-extrema": (0, 1, 2),
    "S4.2.limits-expressivity": (0, 1, 2),
    "T1.rct.alpha": (None,),
}
"""Claims about the family, with the β for which their formula is meant (None: it names its own)."""

SHALLOW = (*(f"E{n}" for n in range(9, 19)), "A3.2.output-free")
PER_PARAMETER = ("E9",)

HIDDEN = ("E20", "E24", "E25", "E26", "E27", "E28", "E29", "E30", "E31")
ENTRIES = ("E7", "E21", "E22", "E23", "E32", "E33", "A4.2.ck-independent", "A5.amplification", "D.entry")
RECURSION = {"E28": "E28", "E30": "E30", "E32": "E30", "D.gap": "E28"}
"""Where D on the right (in D.gap: B) is the recursion's own, from which formula it comes."""


def displayed(claim: str) -> Expr:
    """The last side of a claim about the family, in x and α."""
    return FamilyWorld().value(chains(claim)[-1].sides[-1], {})


def orders(claim: str, betas: tuple[int, ...] = (0, 1, 2)) -> list[tuple[int, Expr, bool]]:
    """A claim that the family's first side is at least (at most) a bound: β, what it is, and whether it is so."""
    (chain,) = chains(claim)
    rows = []
    for beta in betas:
        left, right = (FamilyWorld(beta).value(side, {}) for side in chain.sides)
        relation = {">=": left >= right, "<=": left <= right}.get(chain.relations[0])
        if relation is None:
            refuse(f"the formula of {claim} states no bound")
        rows.append((beta, left, bool(relation)))
    return rows


def family_identities(claim: str) -> tuple[Identity, ...]:
    """A claim about RCT-AF, for each of its β."""
    return _family(claim, formula_of(claim))


@lru_cache(maxsize=128)
def _family(claim: str, formula: str) -> tuple[Identity, ...]:
    rows = []
    for beta in FAMILY[claim]:
        world = FamilyWorld(beta)
        for chain in latex.parse(formula):
            for number, difference in enumerate(world.chain(chain, {}), 2):
                where = f"side 1 - side {number}" + ("" if beta is None else f", beta={beta}")
                rows.append(Identity(claim, where, _vanishes(difference)))
    return tuple(rows)


def shallow_identities(claim: str, *, inputs: int = 3, neurons: int = 2) -> tuple[Identity, ...]:
    """E[9]-E[18] for every parameter, neuron and input."""
    return _shallow(claim, formula_of(claim), inputs, neurons)


@lru_cache(maxsize=128)
def _shallow(claim: str, formula: str, inputs: int, neurons: int) -> tuple[Identity, ...]:
    rows = []
    net = network(inputs, neurons)
    thetas = net.parameters() if claim in PER_PARAMETER else (None,)
    for theta, i, j in product(thetas, range(neurons), range(inputs)):
        if theta is not None and (i, j) != (0, 0):
            continue
        world = ShallowWorld(inputs, neurons, theta)
        for chain in latex.parse(formula):
            free = {name: at for name, at in (("i", i), ("j", j)) if name not in _bound(chain)}
            for number, difference in enumerate(world.chain(chain, free), 2):
                where = f"side 1 - side {number}" + (f" at {theta}" if theta is not None else f" at i={i}, j={j}")
                rows.append(Identity(claim, where, sp.expand(difference)))
    return tuple(dict.fromkeys(rows))


def _bound(node: Node) -> set[str]:
    """Indices over which a formula sums."""
    return {n.index for n in node.walk() if isinstance(n, latex.Big)}


def norm_sides(claim: str = "E8", *, parameters: int = 4) -> tuple[Expr, ...]:
    """The sides of E[8] for p symbols."""
    (chain,) = chains(claim)
    if chain.relations != ("=",):
        refuse(f"the two norms are compared by {chain.relations}")
    world = NormWorld(parameters)
    return tuple(world.value(side, {}) for side in chain.sides)


def zero_only_at_zero(claim: str, *, parameters: int = 4) -> bool:
    """`Σ h² = 0 iff h = 0`: the left side a positive definite form of the entries, the right side every entry."""
    (chain,) = chains(claim)
    if chain.relations != ("=", "iff", "=") or chain.sides[2] != Symbol("h"):
        refuse(f"the formula of {claim} is no such equivalence")
    world = NormWorld(parameters)
    form, zero_side, other = (world.value(chain.sides[k], {}) for k in (0, 1, 3))
    real = sp.symbols(f"r1:{parameters + 1}", real=True)
    form = form.subs(dict(zip(world.h, real)))
    hessian = sp.Matrix(sp.hessian(form, real))
    constant = not any(hessian[i].free_symbols for i in range(len(hessian)))
    vanishes = zero_side == 0 and other == 0 and form.subs(dict.fromkeys(real, 0)) == 0
    flat = all(sp.diff(form, r).subs(dict.fromkeys(real, 0)) == 0 for r in real)
    return bool(vanishes and flat and constant and hessian.is_positive_definite)


def norm_ratio(parameters: int) -> Expr:
    """Right side over left side of E[8] for p symbols: √p, whatever the entries."""
    left, right = norm_sides(parameters=parameters)
    return sp.sqrt(sp.cancel(right**2 / left**2))


def forward_identities(claim: str, *, widths: tuple[int, ...] = (2, 2)) -> tuple[LayerIdentity, ...]:
    """E[19], layer by layer."""
    world = DeepWorld(widths, raw=whole_net(widths))
    rows = []
    for layer in range(1, world.net.depth):
        for chain in chains(claim):
            for difference in world.chain(chain, {"l": layer}):
                entries = difference if isinstance(difference, sp.MatrixBase) else [difference]
                for entry in entries:
                    rows.append(LayerIdentity(claim, f"layer {layer}", sp.expand(entry), layer, world.net.depth))
    return tuple(rows)


def deep_identities(claim: str, widths: tuple[int, ...]) -> tuple[LayerIdentity, ...]:
    """A claim about deep nets at every layer, for one neuron (neurons are alike) or for one weight and one bias."""
    recursion = RECURSION.get(claim)
    return _deep(claim, formula_of(claim), recursion, formula_of(recursion) if recursion else "", widths)


@lru_cache(maxsize=256)
def _deep(
    claim: str, formula: str, recursion: str | None, _recursion_formula: str, widths: tuple[int, ...]
) -> tuple[LayerIdentity, ...]:
    rows = []
    depth = len(widths) + 1
    for world, env, where in _cases(claim, recursion, widths):
        for chain in latex.parse(formula):
            for difference in world.chain(chain, env):
                rows.append(LayerIdentity(claim, where, _polynomial(difference), env["l"], depth))
    return tuple(rows)


def _polynomial(difference: Expr) -> Expr:
    if isinstance(difference, sp.MatrixBase):
        return sp.Add(*(sp.Abs(e) for e in difference.applyfunc(sp.expand)))
    return sp.expand(difference)


def _cases(claim: str, recursion: str | None, widths: tuple[int, ...]) -> Iterator[tuple[DeepWorld, Env, str]]:
    net = DeepNet(widths)
    if claim in ENTRIES:
        for theta in parameter_derivatives(widths):
            if claim == "E32" and theta[0] == net.depth:
                continue  # its bracket holds σ'(z^(l)): it is about hidden layers
            where = f"{theta[1]} in hidden widths {widths}"
            env: Env = {"l": theta[0], "i": 0}
            if claim == "E21" and str(theta[1]).startswith("W"):
                env["j"] = int(str(theta[1])[-1])
            yield DeepWorld(widths, theta=theta, recursion=recursion), env, where
        return
    for layer in range(1, net.depth):
        where = f"layer {layer} of hidden widths {widths}"
        if claim == "E25":
            t = net.width(layer + 1) - 1
            yield DeepWorld(widths, raw=net.forward(layer)), {"l": layer, "t": t}, where
            continue
        base: Env = {"l": layer, "i": 0}
        if claim in ("E26", "E27"):
            base["t"] = net.width(layer + 1) - 1  # another neuron than i, where there is one
        if claim in BOTH:
            for j in range(net.width(layer)):
                yield DeepWorld(widths, recursion=recursion), base | {"j": j}, f"{where}, j = {j}"
            continue
        yield DeepWorld(widths, recursion=recursion), base, where


BOTH = ("D.recursion",)
"""Claims whose formula has two free neurons of one layer."""


@contextmanager
def _meaning(claim: str) -> Iterator[None]:
    """What has no meaning on the net is refused in one line, whatever sympy says of it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if type(error).__module__.startswith("hessdiag"):
            raise  # refused already
        refuse(f"the formula of {claim} has no meaning: {type(error).__name__}: {error} ({formula_of(claim)})")


def identities(claim: str, *, widths: tuple[int, ...] = (2, 2, 2)) -> tuple[Identity, ...]:
    """First side minus the others, in every case of a claim whose formula is an equation; () where it is none."""
    with _meaning(claim):
        return _identities(claim, widths)


def _identities(claim: str, widths: tuple[int, ...]) -> tuple[Identity, ...]:
    if claim in FAMILY:
        return family_identities(claim)
    if claim in SHALLOW:
        return shallow_identities(claim)
    if claim == "E19":
        return forward_identities(claim)
    if claim == "E8":
        left, right = norm_sides()
        statement = f"left - right; right over left is {norm_ratio(4)} with p = 4"
        return (Identity("E8", statement, sp.simplify(left - right)),)
    if claim in (*HIDDEN, *ENTRIES, *DERIVATION):
        return deep_identities(claim, widths)
    return ()


DERIVATION = ("A4.3.base-case", "D.recursion", "D.sites", "D.pairs", "D.gap")
"""Further statements on the symbolic net: the base case, and those of docs/derivation.md."""
