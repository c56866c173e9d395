"""The operators that `examples/wukong/cpu_operators.py` writes out for CPU, with the kernels that they are there."""
from __future__ import annotations

from mindpet_lite.estimate.layers import Gradients, Layers, Values
from mindpet_lite.estimate.tape import Value


class CpuOperators(Layers):
    """A tape with norms and a softmax in plain operators; what stands for a row or column is spelled out first.

    Forward and gradient both compute what they need of the input; the compiler makes one of two that are equal, and so
    keeps it for the gradient.
    """

    def along(self, value: Value, rows: tuple[int, int]) -> Value:
        """Spell a value out, which stands once for each row or each column."""
        return self.run("Tile", [value], rows)

    def sums(self, value: Value, count: int) -> Value:
        """Product with a column of ones."""
        return self.run("MatMul", [value], (count, 1))

    def deviations(self, x: Value) -> tuple[Value, Value]:
        """Differences x - mean of each row, and 1 / sqrt(var + eps)."""
        rows, column = (x.shape[0], x.shape[1]), (x.shape[0], 1)
        d = self.run("Sub", [x, self.along(self.sums(x, rows[0]), rows)], rows)
        variance = self.sums(self.run("Mul", [d, d], rows), rows[0])
        return d, self.run("Rsqrt", [self.run("Add", [variance], column)], column)

    def layer_norm(self, x: Value, path: str) -> Value:
        """`cpu_operators.LayerNorm` with the parameters at `path`."""
        width = x.shape[-1]
        rows = (x.numel // width, width)

        def forward(reads: Values) -> Values:
            x, gamma, beta = reads
            d, root = self.deviations(x.viewed(*rows))
            root = self.along(root, rows)
            n, gamma = self.run("Mul", [d, root], rows), self.along(gamma, rows)
            y = self.run("Add", [self.run("Mul", [n, gamma], rows), self.along(beta, rows)], rows)
            return [y.viewed(*x.shape), n, root, gamma]

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            _, n, root, gamma = results
            dy = dy.viewed(*rows)
            dn = self.run("Mul", [dy, gamma], rows)
            slope = self.along(self.sums(self.run("Mul", [dn, n], rows), rows[0]), rows)
            dx = self.run("Sub", [dn, self.along(self.sums(dn, rows[0]), rows)], rows)
            dx = self.run("Mul", [self.run("Sub", [dx, self.run("Mul", [n, slope], rows)], rows), root], rows)
            return [dx.viewed(*x.shape), self.run("MatMul", [self.run("Mul", [dy, n], rows)], (width,)),
                    self.run("MatMul", [dy], (width,))]

        return self.record([x, *(self.parameter(f"{path}.{name}", width) for name in ("gamma", "beta"))], forward,
                           backward, True)

    def group_norm(self, x: Value, path: str, groups: int = 32) -> Value:
        """`cpu_operators.GroupNorm` with the parameters at `path`."""
        batch, channels = x.shape[:2]
        by_group, group = (batch * groups, x.numel // batch // groups), (batch * groups, 1)
        by_channel, channel = (batch * channels, x.numel // batch // channels), (batch * channels, 1)

        def forward(reads: Values) -> Values:
            x, gamma, beta = reads
            d, root = self.deviations(x.viewed(*by_group))
            scale = self.along(self.run("Mul", [root, gamma], channel), by_channel)
            shift = self.along(self.run("Tile", [beta], channel), by_channel)
            y = self.run("Add", [self.run("Mul", [d.viewed(*by_channel), scale], by_channel), shift], by_channel)
            return [y.viewed(*x.shape), d, root, scale]

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            (_, gamma, _), (_, d, root, scale) = reads, results
            dy = dy.viewed(*by_channel)
            sums = self.sums(dy, channel[0])
            products = self.sums(self.run("Mul", [dy, d.viewed(*by_channel)], by_channel), channel[0])
            mean, slope = (self.run("Div", [self.run("ReduceSum", [self.run("Mul", [part, gamma], channel)], group)],
                                    group) for part in (sums, products))
            cube = self.run("Mul", [self.run("Mul", [root, root], group), root], group)
            slope = self.along(self.run("Mul", [cube, slope], group), by_group)
            mean = self.along(self.run("Mul", [root, mean], group), by_group)
            dn = self.run("Mul", [dy, scale], by_channel).viewed(*by_group)
            part = self.run("Add", [self.run("Mul", [d, slope], by_group), mean], by_group)
            by_root = self.run("Mul", [products, root], channel)
            return [self.run("Sub", [dn, part], by_group).viewed(*x.shape),
                    self.run("ReduceSum", [by_root], (channels,)), self.run("ReduceSum", [sums], (channels,))]

        return self.record([x, *(self.parameter(f"{path}.{name}", channels) for name in ("gamma", "beta"))], forward,
                           backward, True)

    def row_softmax(self, x: Value) -> Value:
        """`cpu_operators.Softmax`."""
        rows = (x.numel // x.shape[-1], x.shape[-1])

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            y = results[0].viewed(*rows)
            products = self.run("Mul", [y, dy.viewed(*rows)], rows)
            sums = self.along(self.sums(products, rows[0]), rows)
            return [self.run("Sub", [products, self.run("Mul", [y, sums], rows)], rows).viewed(*x.shape)]

        return self.record([x], lambda reads: [self.run("Softmax", reads, x.shape)], backward, True)

    def gated(self, both: Value) -> Value:
        """The first half of `both` times the GELU of the second, which is written out."""
        shape = (*both.shape[:-1], both.shape[-1] // 2)

        def forward(reads: Values) -> Values:
            value, gate = self.run("Split", reads, shape), self.run("Split", reads, shape)
            scaled = self.run("Mul", [gate], shape)
            square = self.run("Mul", [scaled, gate], shape)
            cube = self.run("Mul", [square, gate], shape)
            inner = self.run("Mul", [self.run("Add", [gate, cube], shape)], shape)
            sigmoid = self.run("Sigmoid", [inner], shape)
            gelu = self.run("Mul", [gate, sigmoid], shape)
            return [self.run("Mul", [value, gelu], shape), value, gate, scaled, square, sigmoid, gelu]

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            _, value, gate, scaled, square, sigmoid, gelu = results
            by_value, by_gelu = self.run("Mul", [dy, gelu], shape), self.run("Mul", [dy, value], shape)
            by_sigmoid = self.run("SigmoidGrad", [sigmoid, self.run("Mul", [by_gelu, gate], shape)], shape)
            inner = self.run("Mul", [by_sigmoid], shape)
            by_square = self.run("Mul", [inner, gate], shape)
            parts = [self.run("Mul", [by_gelu, sigmoid], shape), inner, self.run("Mul", [inner, square], shape),
                     self.run("Mul", [by_square, scaled], shape),
                     self.run("Mul", [self.run("Mul", [by_square, gate], shape)], shape)]
            return [self.run("Concat", [by_value, self.run("AddN", parts, shape)], both.shape)]

        return self.record([both], forward, backward)
