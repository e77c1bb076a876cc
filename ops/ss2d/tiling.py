"""How the Triton kernels of the fused SS2D core cut images: without Triton, since fake kernels ask too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """Sizes of what a thread, a program and an image are cut into.

    Attributes:
        segment (int): Pixels of a segment, which a thread scans one after the other.
        block (int): Segments of a block, one program, where an image is a chain of them; a power of two.
        lone (int): Most segments of an image that is one block.
        elements (int): Segments times channels of a block, if that leaves at least ``narrowest`` channels.
        narrowest (int): Channels; 16 are 32 bytes of float16, what memory moves at a time.
        per_thread (int): Channels of a segment that a thread has: more need fewer shuffles, fewer need fewer registers.
        forward_registers (int): Most registers of a thread in forward.
        backward_registers (int): Most registers of a thread in backward.
        carry_width (int): Most channels of a program that finds the carry of a block, where a thread walks through all
            of it; 0: programs are those of the scan.
    """

    segment: int
    block: int
    lone: int
    elements: int
    narrowest: int
    per_thread: int
    forward_registers: int
    backward_registers: int
    carry_width: int = 0

    def segments(self, length: int) -> int:
        """Segments of an image of ``length`` pixels."""
        return ceil_div(length, self.segment)

    def chain(self, length: int) -> int:
        """Blocks of an image."""
        segments = self.segments(length)
        return 1 if segments <= self.lone else ceil_div(segments, self.block)

    def tile(self, length: int, channels: int) -> tuple:
        """Segments of a program of the scan, steps of a segment, channels.

        At least 32 elements a step, so that no two threads hold the same one: backward replaces u in place.
        """
        segments = self.segments(length)
        block = max(2, power_of_two(segments)) if segments <= self.lone else self.block
        return block, self.segment, _width(channels, max(self.elements // block, self.narrowest), 32 // block)

    def carry_tile(self, length: int, channels: int) -> tuple:
        """The same of a program that finds the carry of a block of a chain."""
        if not self.carry_width:
            return self.tile(length, channels)
        return 1, self.block * self.segment, _width(channels, self.carry_width, 32)

    def warps(self, segments: int, width: int) -> int:
        """Warps of a program."""
        return max(1, segments * width // (32 * self.per_thread))


def _width(channels: int, most: int, least: int) -> int:
    """Channels of a program, a power of two; above 32 one that divides all of them."""
    width = max(least, min(most, power_of_two(channels)), 1)
    while width > max(least, 32) and channels % width:
        width //= 2
    return width


# A segment of 7 divides the sides of the maps of an image of 224 x 224. With 128 and 168 registers 16 and 12 warps fit
# a processor. A block for several states is one warp, whose segments meet by shuffles alone.
TILINGS = dict(
    one=Tiling(
        segment=7, block=8, lone=32, elements=256, narrowest=16, per_thread=2,
        forward_registers=128, backward_registers=168,
    ),
    several=Tiling(
        segment=7, block=4, lone=8, elements=64, narrowest=16, per_thread=2,
        forward_registers=128, backward_registers=168, carry_width=64,
    ),
)  # fmt: skip


def tiling_of(d_state: int) -> Tiling:
    """The tiling for one state a channel, or for several."""
    return TILINGS['one' if d_state == 1 else 'several']


def ceil_div(n: int, step: int) -> int:
    """n / step, rounded up."""
    return (n + step - 1) // step


def power_of_two(n: int) -> int:
    """The smallest power of two of n or more."""
    return 1 << (n - 1).bit_length()
