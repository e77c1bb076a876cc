"""The backbone with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of huggingface_hub."""

from huggingface_hub import PyTorchModelHubMixin

from mmvmamba.models.vssm import VSSMBackbone


class HubBackbone(VSSMBackbone, PyTorchModelHubMixin, library_name='mmvmamba', tags=['vmamba'], license='apache-2.0'):
    """:class:`VSSMBackbone`, saved as safetensors beside a ``config.json`` with its arguments.

    Examples:
        >>> HubBackbone('nano').save_pretrained('my-backbone')
        >>> backbone = HubBackbone.from_pretrained('my-backbone')
    """
