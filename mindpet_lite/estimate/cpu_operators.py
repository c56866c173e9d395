"""The operators that `examples/wukong/cpu_operators.py` writes out for CPU, with the kernels that they are there."""
from __future__ import annotations

from mindpet_lite.estimate.layers import Gradients, Layers, Values
from mindpet_lite.estimate.tape import Value


class CpuOperators(Layers):
    """A tape with norms, gates and attention in plain operators; what stands for a row or column is spelled out first.

    Their gradients make what they need again from what went in, and wait for the gradient of what came out. A net that
    recomputes has MindSpore's own operators in their place (`plain_...`).
    """

    def along(self, value: Value, rows: tuple[int, int]) -> Value:
        """Spell a value out, which stands once for each row or each column."""
        return self.run("Tile", [value], rows)

    def sums(self, value: Value, count: int, *after: Value) -> Value:
        """Product with a column of ones, which waits for `after`."""
        return self.run("MatMul", [value, *after], (count, 1))

    def deviations(self, x: Value, *after: Value) -> tuple[Value, Value]:
        """Differences x - mean of each row, and 1 / sqrt(var + eps); they wait for `after`."""
        rows, column = (x.shape[0], x.shape[1]), (x.shape[0], 1)
        d = self.run("Sub", [x, self.along(self.sums(x, rows[0], *after), rows)], rows)
        variance = self.sums(self.run("Mul", [d, d], rows), rows[0])
        return d, self.run("Rsqrt", [self.run("Add", [variance], column)], column)

    def layer_norm(self, x: Value, path: str) -> Value:
        """`cpu_operators.LayerNorm` with the parameters at `path`."""
        width = x.shape[-1]
        rows = (x.numel // width, width)

        def forward(reads: Values) -> Values:
            return [self.run("LayerNorm", reads, x.shape)]

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            dy = dy.viewed(*rows)
            d, root = self.deviations(reads[0].viewed(*rows), dy)
            root = self.along(root, rows)
            n = self.run("Mul", [d, root], rows)
            dn = self.run("Mul", [dy, self.run("BroadcastTo", [reads[1], dy], rows)], rows)
            slope = self.along(self.sums(self.run("Mul", [dn, n], rows), rows[0]), rows)
            dx = self.run("Sub", [dn, self.along(self.sums(dn, rows[0]), rows)], rows)
            dx = self.run("Mul", [self.run("Sub", [dx, self.run("Mul", [n, slope], rows)], rows), root], rows)
            return [dx.viewed(*x.shape), self.run("MatMul", [self.run("Mul", [dy, n], rows)], (width,)),
                    self.run("MatMul", [dy], (width,))]

        return self.record(self._of_norm(x, path, width), forward, backward, True)

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
            return [y.viewed(*x.shape)]

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            dy, gamma = dy.viewed(*by_channel), reads[1]
            d, root = self.deviations(reads[0].viewed(*by_group), dy)
            sums = self.sums(dy, channel[0])
            products = self.sums(self.run("Mul", [dy, d.viewed(*by_channel)], by_channel), channel[0])
            mean, slope = (self.run("Div", [self.run("ReduceSum", [self.run("Mul", [part, gamma], channel)], group)],
                                    group) for part in (sums, products))
            cube = self.run("Mul", [self.run("Mul", [root, root], group), root], group)
            slope = self.along(self.run("Mul", [cube, slope], group), by_group)
            mean = self.along(self.run("Mul", [root, mean], group), by_group)
            scale = self.along(self.run("Mul", [root, gamma], channel), by_channel)
            dn = self.run("Mul", [dy, scale], by_channel).viewed(*by_group)
            part = self.run("Add", [self.run("Mul", [d, slope], by_group), mean], by_group)
            by_root = self.run("Mul", [products, root], channel)
            return [self.run("Sub", [dn, part], by_group).viewed(*x.shape),
                    self.run("ReduceSum", [by_root], (channels,)), self.run("ReduceSum", [sums], (channels,))]

        return self.record(self._of_norm(x, path, channels), forward, backward, True)

    def plain_norm(self, kind: str, x: Value, path: str, channels: int) -> Value:
        """`ops.LayerNorm` or `ops.GroupNorm`, with the parameters at `path`."""
        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            return [self.run(f"{kind}Grad", [dy, *reads], x.shape), self.run(f"{kind}Grad", [dy], (channels,)),
                    self.run(f"{kind}Grad", [dy], (channels,))]

        return self.record(self._of_norm(x, path, channels), lambda reads: [self.run(kind, reads, x.shape)], backward)

    def _of_norm(self, x: Value, path: str, channels: int) -> Values:
        return [x, *(self.parameter(f"{path}.{name}", channels) for name in ("gamma", "beta"))]

    def row_softmax(self, x: Value) -> Value:
        """`cpu_operators.Softmax`."""
        rows = (x.numel // x.shape[-1], x.shape[-1])

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            y = results[0].viewed(*rows)
            products = self.run("Mul", [y, dy.viewed(*rows)], rows)
            sums = self.along(self.sums(products, rows[0]), rows)
            return [self.run("Sub", [products, self.run("Mul", [y, sums], rows)], rows).viewed(*x.shape)]

        return self.record([x], lambda reads: [self.run("Softmax", reads, x.shape)], backward, True)

    def attend_by_head(self, query: Value, key: Value, value: Value, heads: int) -> Value:
        """`cpu_operators.AttendByHead` on (batch, tokens, width): each head waits for the one before it."""
        def parts(x: Value) -> Values:
            whole = self.run("Split", [x], x.shape)
            return [whole.viewed(*x.shape[:-1], x.shape[-1] // heads)] * heads

        def weights(q: Value, k: Value, *after: Value) -> Value:
            shape = (q.shape[0], q.shape[1], k.shape[1])
            return self.run("Softmax", [self.run("BatchMatMul", [q, k, *after], shape)], shape)

        def widened(x: Value, column: Value) -> Values:
            return parts(self.run("Concat", [x, column], (*x.shape[:-1], x.shape[-1] + heads)))

        def forward(reads: Values) -> Values:
            queries = parts(self.run("Mul", [reads[0]], query.shape))
            outputs: Values = []
            for q, k, v in zip(queries, parts(reads[1]), parts(reads[2])):
                outputs.append(self.run("BatchMatMul", [weights(q, k, *outputs[-1:]), v], q.shape))
            return [self.run("Concat", outputs, query.shape)]

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            late = self.run("Split", [reads[1], dy], key.shape)
            queries = parts(self.run("Mul", [reads[0], dy], query.shape))
            keys = [late.viewed(*key.shape[:-1], key.shape[-1] // heads)] * heads
            sums = self.sums(self.run("Mul", [dy, results[0]], query.shape), query.numel // query.shape[-1] * heads)
            values, more = widened(reads[2], sums), widened(dy, sums)
            found: list[Values] = [[], [], []]
            for q, k, v, do, wide in zip(queries, keys, values, parts(dy), more):
                p = weights(q, k, *found[0][-1:])
                ds = self.run("Mul", [p, self.run("BatchMatMul", [wide, v, p], p.shape)], p.shape)
                for gradient, pair, shape in zip(found, ((ds, k), (ds, q), (p, do)), (q.shape, k.shape, k.shape)):
                    gradient.append(self.run("BatchMatMul", pair, shape))
            dq, dk, dv = (self.run("Concat", gradient, like.shape)
                          for gradient, like in zip(found, (query, key, value)))
            return [self.run("Mul", [dq], query.shape), dk, dv]

        return self.record([query, key, value], forward, backward, True)

    def gated(self, both: Value) -> Value:
        """`cpu_operators.GatedGelu`: the first half of `both` times the GELU of the second."""
        shape = (*both.shape[:-1], both.shape[-1] // 2)

        def gelu(gate: Value) -> tuple[Value, Value, Value]:
            square = self.run("Mul", [gate, gate], shape)
            inner = self.run("Add", [self.run("Mul", [square], shape)], shape)
            sigmoid = self.run("Sigmoid", [self.run("Mul", [gate, inner], shape)], shape)
            return self.run("Mul", [gate, sigmoid], shape), sigmoid, square

        def forward(reads: Values) -> Values:
            value, gate = self.run("Split", reads, shape), self.run("Split", reads, shape)
            return [self.run("Mul", [value, gelu(gate)[0]], shape)]

        def backward(reads: Values, results: Values, dy: Value) -> Gradients:
            value, gate = self.run("Split", [*reads, dy], shape), self.run("Split", [*reads, dy], shape)
            y, sigmoid, square = gelu(gate)
            inner = self.run("Sub", [y, self.run("Mul", [y, sigmoid], shape)], shape)
            outer = self.run("Add", [self.run("Mul", [square], shape)], shape)
            slope = self.run("Add", [sigmoid, self.run("Mul", [inner, outer], shape)], shape)
            by_gate = self.run("Mul", [self.run("Mul", [dy, value], shape), slope], shape)
            return [self.run("Concat", [self.run("Mul", [dy, y], shape), by_gate], both.shape)]

        return self.record([both], forward, backward, True)

    def plain_gated(self, both: Value) -> Value:
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
