"""What is wrong with a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint can't be read, or doesn't fit the model."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class MisfitError(CheckpointError):
    """The weights of a checkpoint don't fit the backbone.

    Args:
        place (str): Which weights, of which file.
        problems (str): What is missing, unexpected or different.
        shapes (dict): Shape of each weight of the backbone in the checkpoint.
        hint (str): What the checkpoint has instead.

    Attributes:
        shapes (dict): As above.
        hint (str): As above; a caller that knows more may replace it.
    """

    def __init__(self, place: str, problems: str, shapes: dict, hint: str):
        super().__init__(place, problems, shapes, hint)
        self.place, self.problems, self.shapes, self.hint = self.args

    def __str__(self) -> str:
        return f'{self.place} does not fit this backbone, {self.hint}. Weights {self.problems}'
