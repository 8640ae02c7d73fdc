"""Reading a model's autograd graph: which nodes are affine, where it bends, and which node applies each parameter.

Coverage is an allow-list. Between the chosen parameters and the outputs every node must be known: affine, piecewise
linear, an elementwise curve, a product of two activations, or a layer that applies a parameter affinely. Anything
else - a normalisation over the batch or over features, softmax, a product of matrices, scripted or custom code, a
parameter used twice or behind a parametrisation - raises UncoveredModelError with its name and place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ..errors import StochasticModeError, UncoveredModelError
from .elementwise import is_curved, is_elementwise
from .formulas import PIECEWISE_LINEAR
from .live import Live
from .nodes import AFFINE, BATCH_NORM, MATRIX, PRODUCTS, RANDOM, TURNED, is_leaf

Edge = tuple[Any, int]


@dataclass(frozen=True)
class Layer:
    """One node that applies parameters affinely: a = weight * x + bias, once in the graph.

    `kind` is linear, conv, norm, shift or scale; `weight` and `bias` are names of *chosen* parameters or None;
    `transposed` marks a matrix stored [in, out]; `depth` counts the layers below it.
    """

    kind: str
    name: str
    node: Any
    weight: str | None
    bias: str | None
    transposed: bool = False

    @property
    def edge(self) -> GradientEdge:
        """The layer's output in the graph."""
        return GradientEdge(self.node, 0)


class Graph(Live):
    """The part of an autograd graph between chosen parameters and outputs, classified, in forward order.

    After construction: `layers`, `elementwise` (nodes), of these `curves` (with sigma'' != 0), `products`, and
    `unused`, the names of parameters that do not reach the outputs.
    """

    def __init__(self, outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(outputs, parameters)
        self.layers: list[Layer] = []
        self.curves: list[Any] = []
        self.elementwise: list[Any] = []
        self.products: list[Any] = []
        for node in self.nodes:
            if self.is_live(node) and not is_leaf(node):
                self._classify(node)
        reached = {name for layer in self.layers for name in (layer.weight, layer.bias) if name}
        self.unused = tuple(name for name in parameters if name not in reached)
        self._check_all_uses(reached)

    def is_first(self, layer: Layer) -> bool:
        """True if no other layer stands below this one."""
        return not any(self._below.get(id(source)) for source, _ in layer.node.next_functions if source is not None)

    # -- construction

    def _classify(self, node: Any) -> None:
        name, sources = node.name(), [source for source, _ in node.next_functions]
        live = [self.is_live(source) for source in sources]
        self._below[id(node)] = next((self._below[id(s)] for s in sources if id(s) in self._below), "")
        if name in RANDOM:
            raise StochasticModeError(f"active dropout {self.place(node)}; call model.eval()")
        if name in BATCH_NORM:
            self._batch_norm(node)
        elif name == "ConvolutionBackward0":
            self._convolution(node)
        elif name in MATRIX:
            self._matrix(node)
        elif name in TURNED and self._turned(node) is not None:
            return  # a transposed weight on its way to its layer, read there
        elif is_elementwise(node):
            self._refuse_parameters(node)
            self.elementwise.append(node)
            if is_curved(node):
                self.curves.append(node)
        elif name in PRODUCTS:
            if not self._applied(node, "scale") and all(live) and len(live) == 2:
                self.products.append(node)
        elif name == "DivBackward0":
            self._refuse_parameters(node)
            if len(live) > 1 and live[1]:
                self._refuse(node, "a quotient whose denominator depends on the parameters")
        elif name in ("AddBackward0", "SubBackward0"):
            if not self._applied(node, "shift"):
                self._refuse_parameters(node)
        elif name in AFFINE or name in PIECEWISE_LINEAR or (name == "BmmBackward0" and sum(live) == 1):
            self._refuse_parameters(node)
        else:
            taken = [self.parameter_of(s) for s in sources if is_leaf(s) and self.is_live(s)]
            of = f" (it takes parameter {taken[0]!r} itself: a parametrisation?)" if taken else ""
            self._refuse(node, f"an operation that the site identity does not cover{of}")

    def _add(self, layer: Layer) -> None:
        self.layers.append(layer)
        self._below[id(layer.node)] = layer.name

    def _layer_name(self, *parameters: str | None) -> str:
        first = next(name for name in parameters if name)
        return first.rpartition(".")[0] or first

    def _batch_norm(self, node: Any) -> None:
        if node._saved_training:
            if node._saved_input.shape[0] == 1 != self.outputs.shape[0]:
                self._refuse(node, "an instance normalisation")
            raise StochasticModeError(f"BatchNorm on batch statistics {self.place(node)}; call model.eval()")
        weight, bias = (self._direct(node, slot) for slot in (1, 2))
        if weight or bias:
            self._add(Layer("norm", self._layer_name(weight, bias), node, weight, bias))

    def _convolution(self, node: Any) -> None:
        weight, bias = self._direct(node, 1), self._direct(node, 2)
        if node._saved_transposed and weight:
            self._refuse(node, f"a transposed convolution ({weight!r})")
        if weight or bias:
            self._add(Layer("conv", self._layer_name(weight, bias), node, weight, bias))

    def _matrix(self, node: Any) -> None:
        name = node.name()
        left, right, extra = {
            "AddmmBackward0": (1, 2, 0),
            "MmBackward0": (0, 1, None),
            "LinearBackward0": (0, 1, 2),
        }[name]
        sources = [source for source, _ in node.next_functions]
        bias = None
        if extra is not None and extra < len(sources) and self.is_live(sources[extra]) and is_leaf(sources[extra]):
            bias = self._direct(node, extra)
            shape, width = sources[extra].variable.shape, node._input_metadata[0].shape[-1]
            if shape.numel() != width:
                self._refuse(node, f"bias {bias!r} of shape {list(shape)} for {width} outputs")
        turned = self._turned(sources[right])
        weight = self._direct(node, right) if is_leaf(sources[right]) else turned
        if weight is None and self.is_live(sources[right]):
            if turned is None and self._through(sources[right]):
                self._refuse(node, f"a weight computed from {self._through(sources[right])!r} (a parametrisation)")
            self._refuse(
                node,
                "a product of two matrices that both depend on the parameters"
                if self.is_live(sources[left])
                else "a matrix that is computed from parameters",
            )
        if is_leaf(sources[left]) and self.is_live(sources[left]):
            self._refuse(node, f"parameter {self.parameter_of(sources[left])!r} applied from the left")
        if name == "AddmmBackward0" and (node._saved_alpha != 1 or node._saved_beta != 1) and (weight or bias):
            self._refuse(node, "a scaled addmm")
        if weight or bias:
            transposed = weight is not None and (turned is None) != (name == "LinearBackward0")
            self._add(Layer("linear", self._layer_name(weight, bias), node, weight, bias, transposed))

    def _applied(self, node: Any, kind: str) -> bool:
        """A parameter added or multiplied elementwise: a layer of its own."""
        found = [slot for slot, (s, _) in enumerate(node.next_functions) if is_leaf(s) and self.is_live(s)]
        if not found:
            return False
        name = self._direct(node, found[0])
        assert name is not None
        if len(found) > 1 or (kind == "scale" and node.next_functions[found[0]][0].variable.numel() == 1):
            self._refuse(node, f"a learnable factor {name!r} (alpha of an activation, a temperature)")
        if kind == "shift" and getattr(node, "_saved_alpha", 1) != 1:
            self._refuse(node, f"parameter {name!r} in a scaled sum")
        if kind == "shift" and node.name() == "SubBackward0" and found[0] == 1:
            self._refuse(node, f"parameter {name!r} subtracted")
        weight, bias = (name, None) if kind == "scale" else (None, name)
        self._add(Layer(kind, name, node, weight, bias))
        return True

    def _turned(self, node: Any) -> str | None:
        """The chosen parameter behind one transposition, if that is all there is."""
        if node is None or node.name() not in TURNED:
            return None
        source = node.next_functions[0][0]
        if not (is_leaf(source) and self.is_live(source) and source.variable.ndim == 2):
            return None
        dims = getattr(node, "_saved_dims", None) or (getattr(node, "_saved_dim0", 0), getattr(node, "_saved_dim1", 1))
        if [int(d) % 2 for d in dims] not in ([0, 1], [1, 0]) or (
            node.name() == "PermuteBackward0" and int(dims[0]) % 2 == 0
        ):
            return None  # a turn that turns nothing
        if (uses := len(self.consumers(node))) > 1:
            self._refuse(node, f"parameter {self.parameter_of(source)!r} (transposed) used {uses} times")
        return self._direct(node, 0)

    def _direct(self, node: Any, slot: int) -> str | None:
        """The chosen parameter that feeds `slot` of `node`; refused if something stands between, or used twice."""
        if slot >= len(node.next_functions):
            return None
        source = node.next_functions[slot][0]
        if not self.is_live(source):
            return None
        if not is_leaf(source):
            self._refuse(node, f"a weight computed from {self._through(source)!r} (a parametrisation)")
        name = self.parameter_of(source)
        if len(self._uses[id(source)]) > 1:
            self._refuse(node, f"parameter {name!r} used {len(self._uses[id(source)])} times")
        return name

    def _refuse_parameters(self, node: Any) -> None:
        for source, _ in node.next_functions:
            if is_leaf(source) and self.is_live(source):
                self._refuse(
                    node,
                    f"parameter {self.parameter_of(source)!r} is not the weight or bias of a known layer",
                )

    def _check_all_uses(self, reached: set[str]) -> None:
        for node in self.nodes:
            if self.is_live(node) and is_leaf(node):
                name = self.parameter_of(node)
                if name not in reached:
                    self._refuse(
                        self._uses[id(node)][0][0],
                        f"parameter {name!r} is not the weight or bias of a known layer",
                    )


def detach_guard(outputs: Tensor) -> None:
    """Refuse outputs that do not depend on any parameter."""
    if outputs.grad_fn is None:
        raise UncoveredModelError(
            "the outputs do not depend on the chosen parameters (no autograd graph): does the model run under no_grad?"
        )
