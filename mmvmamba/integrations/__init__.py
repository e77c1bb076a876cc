"""The backbone in other libraries' ways: timm's names, and the hub of huggingface_hub. Import the one you want."""
