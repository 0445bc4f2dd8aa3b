"""What a core takes for what: the constants of every estimate, in one place.

All are round numbers, in the time of one vector FMA unless another unit is given. Those of issued instructions order
schedules as measured on Zen 4 with AVX-512, which issues one vector FMA and one vector load a cycle;
``bench/rank_correlation.py`` tells how well they do elsewhere. Of the others (register tiles, blocks, caches,
transforms, whole algorithms) it is not recorded on which machine they were fitted: the default schedules depend on
them, so that a change needs those measured. Rates of caches and memory in the tuner's bound are not constants: they are
calibrated (``cost.Rates``).
"""

from __future__ import annotations

from dataclasses import dataclass

CUT_ELEMENTS = 14  # elements of a row that ``Core.cut_square`` is taken to stand for: a common tile, not a measurement


@dataclass(frozen=True)
class Core:
    """A core in units of its vector FMAs."""

    # FMAs
    latency: int = 4  # FMAs in flight that keep one pipe busy
    pipes: int = 2  # of FMAs, as register tiles are chosen for: twice as many sums hide the latency of both

    # Loads, in vector loads
    broadcast: float = 0.5  # one element for all lanes: half the width of a port
    split: float = 1.0  # more for a vector across two cache lines
    # the same in FMAs, where a register tile is chosen
    load: float = 1.0  # where FMAs broadcast as they load
    own_load: float = 1.3  # where broadcasts are loads of their own
    weight_vector: float = 0.15  # beside an FMA, of a vector that comes from L2
    input_element: float = 0.03  # beside an FMA, of a broadcast from L1

    # Stores, and accesses lane by lane
    store: float = 2.0  # in vector loads: one port for two
    masked_store: float = 8.0  # of part of a vector, beside a whole one
    shuffle: float = 1.0  # of one or two vectors
    gather: float = 4.0  # of a lane
    scatter: float = 4.0  # of a lane
    square: float = 150.0  # to transpose and store 16 x 16 elements
    cut_square: float = 240.0  # the same where rows are cut short, and are masked stores; see CUT_ELEMENTS
    cut_row: float = 11.2  # of each element that rows are longer, or shorter
    evicted: float = 2.0  # times a store, where a set of L1 holds too few lines: they leave half written

    # Tests and loops
    guard: float = 1.4  # a test of one element or row against the border
    mask: float = 3.0  # a run-time mask of a vector: compares of 64-bit indices, two registers a vector
    step: float = 0.25  # an iteration of a loop
    entry: float = 6.0  # a loop: its end is not foreseen
    tile_step: float = 0.5  # of a register tile: a channel and tap, loop and addresses
    exponential: float = 20.0

    # Caches
    ways: int = 8  # lines that a set of L1 holds
    way: int = 4096  # bytes of a way of L1, which is a page wherever it is looked up by virtual addresses
    l3_vector: float = 4.0  # a vector from L3
    memory_vector: float = 12.0  # a vector from memory
    overlap: float = 0.15  # the share of the smaller bounds that shows beside the greatest

    # Bilinear algorithms
    transform: float = 13.0  # one vector at one point of a tile: transformed, stored, loaded again
    product_step: float = 1.0  # a step of a register tile: a vector of weights loaded, and the loop
    fft_factor: float = 5.0  # instructions for each element of a factor of an FFT
    fft_spill: float = 32.0  # points from which moving what does not stay in registers takes as long again
    fft_weight: float = 16.0  # products in the time of a transformed weight on its way from memory

    # Whole algorithms
    fft: float = 1.5  # times as long as FFT tiles' products at full rate
    im2col: float = 1.25  # times as long as direct convolution

    # Code
    copy: float = 0.01  # the share of a tile's time that an own copy of the nest for a remainder costs: code to fetch

    def squares(self, elements: int, lanes: int) -> float:
        """Time of rows of so many elements, transposed by the register and stored; as for all rows of ``lanes``."""
        full, cut = divmod(elements, lanes)
        time = full * self.square + (self.cut_square + (cut - CUT_ELEMENTS) * self.cut_row if cut else 0.0)
        return time * lanes / 16

    @property
    def in_flight(self) -> int:
        """FMAs that keep all pipes busy."""
        return self.latency * self.pipes


CORE = Core()
