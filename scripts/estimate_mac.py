"""What a Mac would take by its published figures: counted operations over FLOP/s and bandwidth.

An estimate on paper, for a Mac's owner to check: nothing is run. Operations of products, and bytes
of what is bound by memory, are counted for each stage and added up as if the two never overlapped.

    python scripts/estimate_mac.py --tflops 13 --bandwidth 546
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from measuring import table_head, table_row

BITS = 4.5  # of a weight: 4, and a scale and a bias in half precision for each group of 64


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, from its ``config.json``; of a mixture's experts, ``active`` are used."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int
    experts: int = 1
    active: int = 1

    def attention(self) -> list[tuple[int, int]]:
        """(out, in) of the attention's linear layers; q, k and v read one input."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q)]

    def expert(self) -> list[tuple[int, int]]:
        """(out, in) of an MLP's linear layers; gate and up read one input."""
        wide = (self.intermediate, self.hidden)
        return [wide, wide, (self.hidden, self.intermediate)]


MODELS = {
    "7B (Mistral 7B v0.3)": Shape(4096, 32, 32, 8, 128, 14336, 32768),
    "30B-A3B (Qwen3)": Shape(2048, 48, 32, 4, 128, 768, 151936, experts=128, active=8),
}


def entries(linears: list[tuple[int, int]]) -> int:
    """The weights of these layers."""
    return sum(out_features * in_features for out_features, in_features in linears)


def stages(m: Shape, samples: int, length: int, batch: int, rank: int) -> dict[str, float]:
    """Operations and bytes: calibration, A, one training step; and memory in bytes.

    Targets are all linear layers, but of a mixture (as by default) the attention's only. Streaming
    is what it takes beyond the exact way: five forward passes, and no covariance.
    """
    targets = m.attention() + (m.expert() if m.experts == 1 else [])
    used = m.layers * (entries(m.attention()) + m.active * entries(m.expert()))
    adapted, output = m.layers * entries(targets), m.vocabulary * m.hidden
    # Scores and weighted values, forwards; backwards twice as much. Causality is not used.
    attention = 4 * length * m.heads * m.head * m.layers
    leaders = [m.hidden, m.heads * m.head] + ([m.hidden, m.intermediate] if m.experts == 1 else [])
    # Forwards 2, towards the inputs 2; the output layer likewise; here every token counts.
    pass_ = 4 * used + 3 * attention + 4 * output
    gram = 2 * m.layers * sum(width**2 for width in leaders) * 5 / 8
    # W and its gradient are written and read as float32, so are their products, sample by sample.
    scoring = adapted * (BITS / 8 + 4 * 6)
    # About 8 products with blocks of rank + 8 columns and as many with W; W as float32 each time.
    wide = rank + 8
    squares = m.layers * sum(2 * wide * 8 * (i**2 + 2 * o * i) for o, i in targets)
    covariances = 4 * m.layers * sum(width**2 for width in leaders)
    everything = m.layers * (entries(m.attention()) + m.experts * entries(m.expert())) + 2 * output
    # Kept of a token in a block, bfloat16: inputs of the norms, q, k, v and what comes out, three
    # arrays of the MLP; and the attention's probabilities in float32, which it has no fused
    # gradient for.
    kept = 2 * (
        3 * m.hidden + (2 * m.heads + 2 * m.kv_heads) * m.head + 3 * m.active * m.intermediate
    )
    kept += 4 * m.heads * length
    return {
        "calibration flop": samples * length * (pass_ + 2 * adapted + gram),
        "streaming flop": samples * length * (5 * (2 * used + attention) - gram),
        "streaming bytes": 0,
        "calibration bytes": samples * scoring + samples / batch * used * BITS / 8,
        "subspace flop": squares,
        "subspace bytes": 8 * (covariances + 8 * adapted),
        "step flop": batch * length * pass_,
        "step bytes": 2 * used * BITS / 8 * (1 if m.experts == 1 else m.experts / m.active),
        "weights": everything * BITS / 8,
        "covariances": covariances,
        "activations": batch * length * m.layers * kept,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=13.0, help="of large products")
    parser.add_argument("--bandwidth", type=float, default=546.0, help="GB/s")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    titles = ["model in 4 bit", "calibration s", "A s", "streaming: + s", "step s", "tokens/s"]
    titles += ["weights GB"]
    titles += ["covariances GB", "activations of a step GB"]
    print(table_head(titles))
    for name, shape in MODELS.items():
        found = stages(shape, args.samples, args.length, args.batch, args.rank)
        seconds = [
            found[f"{stage} flop"] / args.tflops / 1e12
            + found[f"{stage} bytes"] / args.bandwidth / 1e9
            for stage in ("calibration", "subspace", "streaming", "step")
        ]
        cells = [name, *(f"{s:.3g}" for s in seconds)]
        cells.append(f"{args.batch * args.length / seconds[-1]:.0f}")
        cells += [f"{found[k] / 1e9:.1f}" for k in ("weights", "covariances", "activations")]
        print(table_row(cells))


if __name__ == "__main__":
    main()
